"""Plausible verdicts of judges on assistants of a run that never was, and their numbers on WildBench."""

import dataclasses
import pathlib

from simrl.evaluation.length_control import LengthControlled
from simrl.evaluation.position import PanelAgreement, PositionBias, Votes
from simrl.evaluation.preferences import WinRate, WinRates
from simrl.evaluation.results.files import add_judges, add_wildbench
from simrl.evaluation.results.judges import PANEL, ArmWinRate, JudgedComparison, JudgedPair, JudgeNumbers
from simrl.evaluation.results.measures import ExperimentResult, OtherIntervals, SeedBounds
from simrl.evaluation.results.wildbench import WildBenchNumber
from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import Estimate

HOSTILE = '<script>alert("& no escape")</script> $x_1$ \\frac'  # what a model may say


def add_all(experiment: ExperimentResult, workdir: pathlib.Path) -> None:
    """Adds both to a run."""
    add_judges(pathlib.Path('/judged/by two'), judged_like(experiment), workdir)
    add_wildbench(wildbench_like(experiment), workdir)


def judged_like(experiment: ExperimentResult) -> JudgedComparison:
    """Every assistant over the initial one by two judges, of which one says what models may say."""
    judges = ('judge-a', HOSTILE)

    def estimate(mean: float) -> Estimate:
        return Estimate(mean, mean - 0.07, mean + 0.07, 38, 38, 0.95)

    def numbers(mean: float, *, alone: bool) -> JudgeNumbers:
        rates = [WinRate(estimate(x), estimate(x), estimate(x)) for x in (mean, mean - 0.025, mean + 0.025)]
        near, even = estimate(0.9), estimate(0.5)
        return JudgeNumbers(
            wins=round(38 * mean),
            ties=0,
            losses=38 - round(38 * mean),
            failures=2,
            win_rates=WinRates(*rates, failures=2),
            length_controlled=None if alone else LengthControlled(mean, mean - 0.05, 0.4, 0.1, 0.0, 1.0),
            position=PositionBias(near, even, even, estimate(0.55), 2) if alone else None,
            causes={HOSTILE: 1, 'schema': 2},
            reasons={}
            if not alone
            else {'win rate at equal lengths': f'length_term: expected a spread, found {HOSTILE}'},
        )

    strength = dict(zip(experiment.arms, (0.47, 0.52, 0.63, 0.71), strict=False))
    pairs = tuple(
        JudgedPair(
            first=name,
            second='initial',
            prompts=40,
            clusters=40,
            missing={name: 0, 'initial': 1},
            empty={name: 1, 'initial': 0},
            characters={name: 812.4, 'initial': 530.1},
            judges={
                **{judge: numbers(strength[run.arm] + 0.02 * k, alone=True) for k, judge in enumerate(judges)},
                PANEL: numbers(strength[run.arm] + 0.01, alone=False),
            },
            agreement={f'{judges[0]} and {judges[1]}': estimate(0.83)},
            votes=Votes(0.62, 1.23, 1.1, 1.5),
            errors=PanelAgreement(
                judges,
                {judge: estimate(0.7) for judge in judges},
                estimate(0.72),
                ((1.0, 0.5), (0.5, 1.0)),
                0.5,
                1.33,
                1.2,
                1.6,
                0.0,
                3,
            ),
            p_value=0.004,
            adjusted_p=0.02,
            reasons={},
        )
        for name, run in experiment.runs.items()
        if run.arm in strength
    )
    arms = []
    for arm, mean in strength.items():
        seeds = tuple(experiment.runs[name].seed for name in experiment.assistants_of(arm))
        if seeds:
            own = t_interval([mean + 0.02 * seed for seed in seeds], null=0.5)
            bounds = SeedBounds(own, dataclasses.replace(own, mean=own.mean + 0.03))
            arms.append(ArmWinRate(arm, 'initial', seeds, own, OtherIntervals(None, None), bounds, 0.5))
    strengths = {name: estimate(0.3 - 0.1 * k) for k, name in enumerate(['initial', *experiment.runs])}
    return JudgedComparison(judges, 'mean', 'openings', pairs, tuple(arms), strengths)


def wildbench_like(experiment: ExperimentResult) -> dict[str, list[WildBenchNumber]]:
    """Numbers of every metric, of two assistants by two judges, by file."""
    first, second = list(experiment.runs)[:2]
    mean = Estimate(0.61, 0.58, 0.64, 1000, 1000, 0.95)
    score = dataclasses.replace(mean, mean=7.1, low=7.0, high=7.2)
    groups = {
        name: dataclasses.replace(mean, mean=x, num_observations=200) for name, x in (('Coding', 0.5), ('Math', 0.7))
    }
    more = {'groups': groups, 'left_out': {HOSTILE: 24}, 'settings': {'length_margin': '500'}}
    return {
        f'/{HOSTILE}/mine.jsonl': [
            WildBenchNumber('checklist', first, None, PANEL, mean, 1024, 0.6, 0.62, groups=groups),
            WildBenchNumber('checklist', first, None, HOSTILE, mean, 1024, 0.6, 0.62),
            WildBenchNumber('checklist', second, None, PANEL, None, 1024, None, None),
        ],
        '/mine over initial': [WildBenchNumber('win rate', first, 'initial', PANEL, mean, 1024, 0.6, 0.62)],
        '/score.json': [WildBenchNumber('WB-Score', second, None, 'judge-b', score, 1024, 7.0, 7.2, 4.1, 3.9, 4.3)],
        '/reward.json': [
            WildBenchNumber('WB-Reward', second, HOSTILE, 'b', mean, 1024, 0.5, 0.7, 0.3, 0.2, 0.4, **more)
        ],
        '/again.json': [WildBenchNumber('WB-Reward', second, HOSTILE, 'b', mean, 1024, 0.5, 0.7, **more)],
    }
