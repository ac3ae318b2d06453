"""Results of every protocol, as the results of a run have them: numbers with intervals over tasks.

The arguments are the results that are written and printed: of `checklist.summary` and `checklist.compare`, and the
fields of `official.WBScore` and `official.WBReward`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from simrl.evaluation.results.judges import PANEL
from simrl.evaluation.results.wildbench import Metric, WildBenchNumber
from simrl.evaluation.statistics import Estimate, t_quantile

LEVEL = 0.95
RANGES: Mapping[Metric, tuple[float, float]] = {
    'checklist': (0.0, 1.0),
    'win rate': (0.0, 1.0),
    'WB-Score': (1.0, 10.0),
    'WB-Reward': (-1.0, 1.0),
}
Result = Mapping[str, Any]


def of_checklist(result: Result, assistant: str) -> list[WildBenchNumber]:
    """The share of satisfied items by the panel, and by each judge."""
    means = {PANEL: result['share']} | {name: of['share'] for name, of in result['judges'].items()}
    tasks = result['tasks']['all']
    return [_number('checklist', assistant, None, judge, _of_mean(mean), tasks) for judge, mean in means.items()]


def of_compare(result: Result, first: str, second: str) -> list[WildBenchNumber]:
    """The win rate of the first assistant by the panel, and by each judge."""
    fields = [field.name for field in dataclasses.fields(Estimate)]

    def estimate(found: Result | None) -> Estimate | None:
        return None if found is None else Estimate(**{name: found['win rate'][name] for name in fields})

    tasks = result['tasks']['all']
    found = {PANEL: estimate(result)} | {name: estimate(of) for name, of in result['judges'].items()}
    return [_number('win rate', first, second, judge, of, tasks) for judge, of in found.items()]


def of_score(result: Result, assistant: str, judge: str, tasks: int) -> WildBenchNumber:
    """WB-Score by a judge; `tasks` is the number of all tasks."""
    return _number('WB-Score', assistant, None, judge, _of_mean(result['score']), tasks, result['task_macro'])


def of_reward(result: Result, assistant: str, reference: str, judge: str, tasks: int) -> WildBenchNumber:
    """The same of WB-Reward over a reference."""
    mean, macro = _of_mean(result['reward']), result['task_macro']
    return _number('WB-Reward', assistant, reference, judge, mean, tasks, macro)


def _of_mean(found: Result) -> Estimate | None:
    """A mean over tasks with Student's t-interval from its standard error; without one where no task differs."""
    mean, error, n = found['mean'], found['sem'], found['n']
    if mean is None:
        return None
    half = t_quantile(n - 1, LEVEL) * error if error else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Estimate(mean, low, high, n, n, LEVEL)


def _number(
    metric: Metric,
    assistant: str,
    against: str | None,
    judge: str,
    estimate: Estimate | None,
    tasks: int,
    macro: float | None = None,
) -> WildBenchNumber:
    """A number, with all tasks that are not judged at the lowest value, and at the highest."""
    lost = won = None
    if estimate is not None:
        judged, total = estimate.num_observations, estimate.mean * estimate.num_observations
        lost, won = ((total + (tasks - judged) * value) / tasks for value in RANGES[metric])
    return WildBenchNumber(metric, assistant, against, judge, estimate, tasks, lost, won, macro)
