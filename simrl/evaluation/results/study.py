"""A blind user study of a run's assistants."""

import dataclasses

from simrl.evaluation.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class StudyPair:
    """Two assistants in a blind user study, 'initial' second: a win rate is the first one's, ties one half."""

    first: str
    second: str
    participants: int
    votes: int
    win_rate: Estimate
    first_turns: Estimate | None  # of the first turns alone, whose replies share no history; None without an estimate
    p_value: float | None  # None without an interval
    adjusted_p: float  # Holm's, over the pairs of the study
    significant: bool  # by Holm's procedure at the level of the study's look


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """study.json, which a user study of a run's assistants leaves in it: no stage of the run makes it."""

    report: str  # path of the study's report
    mode: str  # 'live', or 'rehearsal': its participants are no people
    unit: str  # 'participant' or 'vote': what its win rates are means over
    departures: int  # from its frozen plan
    pairs: tuple[StudyPair, ...]
