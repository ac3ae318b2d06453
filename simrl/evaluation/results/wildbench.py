"""A run's assistants on the tasks of WildBench."""

import dataclasses
from typing import Literal

from simrl.evaluation.statistics import Estimate

# The share of checklist items satisfied, and the win rate that follows from two such; the benchmark's own scores.
Metric = Literal['checklist', 'win rate', 'WB-Score', 'WB-Reward']


@dataclasses.dataclass(frozen=True)
class WildBenchNumber:
    """A number of one assistant, by one judge or the panel."""

    metric: Metric
    assistant: str
    against: str | None  # the other assistant of a win rate, the reference of WB-Reward
    judge: str
    estimate: Estimate | None  # over tasks; None without any
    tasks: int  # all, with those that are not judged
    lost: float | None  # the mean with all tasks that are not judged at the lowest value; None: not known
    won: float | None  # at the highest
    macro: float | None = None  # the weighted mean over groups of tasks, as the leaderboard has it


@dataclasses.dataclass(frozen=True)
class WildBenchResult:
    """wildbench.json, which `tools.wildbench` leaves in a run: no stage of the run makes it."""

    outputs: dict[str, tuple[WildBenchNumber, ...]]  # by the file of the verdicts
