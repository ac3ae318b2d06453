"""Results of forecasts, from the outputs of their stages; see `forecasts`."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from simrl.evaluation.fidelity.table import text_table
from simrl.evaluation.forecast import best_of_n, gradient_cosine, rank_correlation
from simrl.evaluation.results.measures import MeasureResult
from simrl.evaluation.results.simulators import ForecastResult, SimulatorForecast
from simrl.experiments.outputs import read_result

FORECASTS, UTILITIES = ('cosine', 'best_of_n'), ('gain', 'win_rate')


@dataclasses.dataclass(frozen=True)
class ForecastSpec:
    """The stages of an experiment's forecasts.

    Attributes:
        words: what stands for people, as a sentence.
        people: the stage of people's side.
        stages: arm -> the stages of its simulators: one, or one for each training seed.
        n: of best-of-n.
    """

    words: str
    people: str
    stages: Mapping[str, Sequence[str]]
    n: int


def forecast_of(
    people: Mapping[str, Any], simulators: Sequence[Mapping[str, Any]], n: int, stages: Sequence[str]
) -> SimulatorForecast:
    """The forecast of an arm.

    Args:
        people, simulators: results of the stages of people's side and of the arm's simulators.
        n: of best-of-n.
        stages: the simulators'.
    """
    own, cross = ([np.array(x[name]) for x in simulators] for name in ('products', 'cross'))
    cosine, reason = gradient_cosine(own, cross, np.array(people['products']), people['clusters'])
    best, reasons = None, [reason, *(x['reason'] for x in simulators)]
    if all(x['rewards'] is not None for x in simulators):
        rewards = [np.array(x['rewards'], np.float64) for x in simulators]  # null becomes NaN
        best = best_of_n(rewards, np.array(people['values'], np.float64), n, people['clusters'])
        if best is None:
            reasons.append(f'no example has {n} replies with both numbers')
    return SimulatorForecast(cosine, best, '; '.join(dict.fromkeys(x for x in reasons if x)) or None, tuple(stages))


def forecasts_of(spec: ForecastSpec, workdir: pathlib.Path, people: Mapping[str, Any]) -> dict[str, SimulatorForecast]:
    """The forecast of each arm; `people` as of `forecast_of`."""
    return {
        arm: forecast_of(people, [read_result(workdir / stage) for stage in stages], spec.n, stages)
        for arm, stages in spec.stages.items()
    }


def forecast_table(spec: ForecastSpec, workdir: pathlib.Path, done: Collection[str]) -> str:
    """A table of the arms whose stages are all among `done`; empty where there are none."""
    whole = {arm: stages for arm, stages in spec.stages.items() if set(stages) <= set(done)}
    if not whole:
        return ''
    found = forecasts_of(dataclasses.replace(spec, stages=whole), workdir, read_result(workdir / spec.people))
    lines = [(arm, str(x.cosine or 'none'), str(x.best_of_n or 'none'), x.reason or '') for arm, x in found.items()]
    return text_table(('forecast', 'cosine', f'best of {spec.n}', 'reason'), lines)


def forecast_result(spec: ForecastSpec, workdir: pathlib.Path, measure: MeasureResult) -> ForecastResult:
    """All forecasts of a run, and their rank correlations with what came out.

    Args:
        measure: of the trained assistants; an arm without any is in no correlation.
    """
    people = read_result(workdir / spec.people)
    simulators = forecasts_of(spec, workdir, people)
    correlations = []
    for name in FORECASTS:
        found = {arm: getattr(x, name) for arm, x in simulators.items() if arm in measure.arms}
        known = {arm: estimate.mean for arm, estimate in found.items() if estimate is not None}
        for utility in UTILITIES:
            utilities = [getattr(measure.arms[arm], utility).mean for arm in known]
            correlations.append(rank_correlation(name, utility, list(known.values()), utilities))
    return ForecastResult(
        people=spec.words,
        people_stage=spec.people,
        measure=measure.name,
        examples=len(people['values']),
        samples=len(people['values'][0]),
        n=spec.n,
        simulators=simulators,
        correlations=tuple(correlations),
    )
