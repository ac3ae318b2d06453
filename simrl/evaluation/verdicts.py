"""Verdicts of judges and people on a run's assistants, in short: for a card, a page of several runs and the terminal.

Their results, which tools have added to the run, have more, and the report of the run has sections of them.
"""

import dataclasses
import re
from collections.abc import Iterator

from simrl.evaluation.results.files import Added
from simrl.evaluation.results.judges import PANEL, JudgesResult
from simrl.evaluation.results.study import StudyResult
from simrl.evaluation.results.wildbench import WildBenchResult
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate

WIN_RATE = 'win rate'
NUMBERS = {'checklist': 'share of checklists', 'win rate': 'win rate by checklists'}  # of WildBench; others as they are


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A number that judges or people gave an assistant.

    Attributes:
        assistant: 'initial', 'ARM/seed-K', or an arm over its training seeds.
        against: the other one of a win rate, or the reference of WB-Reward; None of a number without one.
        number: its name.
        judges: who judged, in words.
        sample: of an arm its training seeds, else what the interval of this checkpoint is over, in words.
        mean, low, high: None without a number, or an interval.
        lost, won: the mean with all failures at the lowest value, and at the highest; None without failures.
    """

    assistant: str
    against: str | None
    number: str
    judges: str
    sample: str
    mean: float | None
    low: float | None
    high: float | None
    lost: float | None = None
    won: float | None = None

    def about(self, arm: str) -> bool:
        """True if an assistant of the arm is one of the two."""
        return any(name is not None and _arm_of(name) == arm for name in (self.assistant, self.against))


def verdicts_of(added: Added) -> tuple[Verdict, ...]:
    """The verdicts of people, of judges of pairs, then those on WildBench.

    Of an arm with several training seeds it is the win rate over these, else that of each checkpoint.
    """
    return (
        *(_of_study(added.study) if added.study else ()),
        *(_of_judges(added.judges) if added.judges else ()),
        *(_of_wildbench(added.wildbench) if added.wildbench else ()),
    )


def _of_study(found: StudyResult) -> Iterator[Verdict]:
    who = 'people in a blind study' if found.mode == 'live' else 'participants of a rehearsed study, who are no people'
    for pair in found.pairs:
        yield Verdict(
            pair.first, pair.second, WIN_RATE, who, f'{pair.participants:,} participants', *_bounds(pair.win_rate)
        )


def _of_judges(found: JudgesResult) -> Iterator[Verdict]:
    for comparison in found.comparisons.values():
        several = [arm for arm in comparison.arms if arm.win_rate.num_seeds > 1]
        for arm in several:
            sample = f'{len(arm.seeds)} training seeds'
            bounds = (None, None) if arm.bounds is None else (arm.bounds.lost.mean, arm.bounds.won.mean)
            yield Verdict(arm.arm, arm.other, WIN_RATE, comparison.who, sample, *_bounds(arm.win_rate), *bounds)
        known = {(arm.arm, arm.other) for arm in several}
        for pair in comparison.pairs:
            if (_arm_of(pair.first), pair.second) not in known:
                sample, of = f'{pair.clusters:,} {comparison.unit}', pair.primary
                failed = of.failure_bounds or (None, None)
                yield Verdict(pair.first, pair.second, WIN_RATE, comparison.who, sample, *_bounds(of.rate), *failed)


def _of_wildbench(found: WildBenchResult) -> Iterator[Verdict]:
    for numbers in found.outputs.values():
        by_panel = any(of.judge == PANEL for of in numbers)
        for of in numbers:
            if of.judge == PANEL or not by_panel:
                judged = of.estimate.num_observations if of.estimate else 0
                failed = (of.lost, of.won) if judged < of.tasks else (None, None)
                name, sample = NUMBERS.get(of.metric, of.metric), f'{judged:,} of {of.tasks:,} tasks'
                yield Verdict(of.assistant, of.against, name, of.judge, sample, *_bounds(of.estimate), *failed)


def _bounds(found: Estimate | SeedEstimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if found is None else (found.mean, found.low, found.high)


def _arm_of(assistant: str) -> str:
    return re.sub(r'/seed-\d+$', '', assistant)
