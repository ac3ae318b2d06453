"""A run's assistants on the tasks of WildBench."""

import dataclasses
from typing import Literal

from simrl.evaluation.position import Votes
from simrl.evaluation.statistics import Estimate

# The share of checklist items satisfied, and the win rate that follows from two such; the benchmark's own scores.
Metric = Literal['checklist', 'win rate', 'WB-Score', 'WB-Reward']


@dataclasses.dataclass(frozen=True)
class WildBenchNumber:
    """A number of one assistant, by one judge or the panel; macro and groups of WB-Score are from -8 to 10."""

    metric: Metric
    assistant: str
    against: str | None  # the other assistant of a win rate, the reference of WB-Reward
    judge: str
    estimate: Estimate | None  # over tasks; None without any
    tasks: int  # all, with those that are not judged
    lost: float | None = None  # the mean with all tasks that are not judged at the lowest value; None without any mean
    won: float | None = None  # at the highest
    macro: float | None = None  # the weighted mean over groups of tasks, as the leaderboard has it
    # None, or none, in what follows: in results of an earlier version.
    macro_low: float | None = None
    macro_high: float | None = None
    groups: dict[str, Estimate] = dataclasses.field(default_factory=dict)  # over tasks of each group
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # tasks or verdicts in no number, by cause
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # that are not the defaults
    votes: Votes | None = None  # that a panel is worth


@dataclasses.dataclass(frozen=True)
class WildBenchResult:
    """wildbench.json, which `tools.wildbench` leaves in a run: no stage of the run makes it."""

    outputs: dict[str, tuple[WildBenchNumber, ...]]  # by the file of the verdicts
