"""Assistants and arms that were compared, and their results by each measure: over examples, and over training seeds.

An assistant is 'initial' or 'ARM/seed-K'.
"""

import dataclasses

from simrl.evaluation.crossed import CrossedEstimate
from simrl.evaluation.gap_recovered import GapRecovered
from simrl.evaluation.position import Votes
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate

INITIAL = 'initial'


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm's simulator, as far as results tell arms apart; its name is free."""

    kind: str  # arms whose simulators are of one kind differ in size or settings
    oracle: bool = False  # its simulator is the people themselves
    parameters: int | None = None  # of its simulator's model; None where it is no model here
    held_out: bool = False  # no assistant trains against its simulator, and all meet it


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of an assistant."""

    arm: str
    seed: int


@dataclasses.dataclass(frozen=True)
class ExperimentResult:
    """experiment.json: what was compared."""

    arms: dict[str, Arm]  # in the order of the config
    runs: dict[str, Run]  # by assistant
    measures: tuple[str, ...]  # each has a file of its name; the first is the headline
    caution: str  # what the numbers do not show

    def assistants_of(self, arm: str) -> list[str]:
        """The arm's assistants, by ascending seed."""
        return sorted(
            (name for name, run in self.runs.items() if run.arm == arm), key=lambda name: self.runs[name].seed
        )

    def by_name(self) -> dict[str, str]:
        """Assistants by the names that they go by: their own, with '-' for '/', and that of an arm with one seed."""
        own = (INITIAL, *self.runs)
        alone = {arm: names[0] for arm in self.arms if len(names := self.assistants_of(arm)) == 1}
        return alone | {name.replace('/', '-'): name for name in own} | {name: name for name in own}


@dataclasses.dataclass(frozen=True)
class MeasureWords:
    """The names of a measure's numbers."""

    title: str  # heading, such as 'Satisfaction of new people'
    score: str  # what one conversation or reply gets, such as 'satisfaction'
    unit: str  # what intervals of one checkpoint resample, in the plural: 'people', 'openings'
    about: str  # sentences below the table: what the score is, and where it misleads


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A win rate with every example that has no outcome counted as lost, and as won."""

    lost: Estimate
    won: Estimate


@dataclasses.dataclass(frozen=True)
class SeedBounds:
    """The same of an arm, over its training seeds."""

    lost: SeedEstimate
    won: SeedEstimate


@dataclasses.dataclass(frozen=True)
class OtherIntervals:
    """Further intervals of a number over training seeds, beside its t-interval, which is primary."""

    pooled: SeedEstimate | None  # with the spread of all arms (`blocks`); None where no two arms share two seeds
    crossed: CrossedEstimate | None  # over seeds and clusters at once; None where no example has all seeds' outcomes


@dataclasses.dataclass(frozen=True)
class AssistantResult:
    """One assistant; all intervals are over clusters of examples: of this checkpoint only."""

    score: Estimate
    parts: dict[str, Estimate]  # further numbers of the scene
    assistant_turns: float  # mean
    ends: dict[str, float]  # share of conversations by reason for ending
    labels: dict[str, dict[str, float]]  # share of conversations by value of each label of the scene
    truncated: float  # share of the assistant's messages that reached max_new_tokens
    user_truncated: float  # share of conversations in which a message of the user did
    gain: Estimate | None = None  # score minus the initial assistant's, paired; None for the initial one
    win_rate: Estimate | None = None  # against the initial assistant
    strict_win_rate: Estimate | None = None  # share of higher scores, ties count 1/2; None where win_rate is that
    causes: dict[str, int] = dataclasses.field(default_factory=dict)  # examples without an outcome, by cause
    win_rate_bounds: Bounds | None = None  # None without failures of it or of the initial assistant
    strict_win_rate_bounds: Bounds | None = None
    # None in results of an earlier version.
    message_tokens: float | None = None  # mean tokens of the assistant's messages
    length_correlation: float | None = None  # of the score with the assistant's tokens, by ranks of conversations


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One arm over its training seeds."""

    seeds: tuple[int, ...]  # in the order of every estimate's values
    score: SeedEstimate
    parts: dict[str, SeedEstimate]
    gain: SeedEstimate
    win_rate: SeedEstimate
    strict_win_rate: SeedEstimate | None
    checkpoint_gain: Estimate  # mean over seeds, clusters resampled: of these checkpoints only
    gap_recovered: GapRecovered | None  # None without an oracle
    # None, or (), in what follows: in results of an earlier version.
    compared: tuple[int, ...] = ()  # by seed, examples with an outcome of it and of the initial assistant
    win_rate_bounds: SeedBounds | None = None  # None without failures, too
    strict_win_rate_bounds: SeedBounds | None = None
    gain_intervals: OtherIntervals | None = None
    win_rate_intervals: OtherIntervals | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm minus another over the training seeds that both have."""

    first: str
    second: str
    seeds: tuple[int, ...]
    score: SeedEstimate
    win_rate: SeedEstimate
    checkpoint_score: Estimate  # mean over seeds, clusters resampled: of these checkpoints only
    # None, or (), in what follows: in results of an earlier version.
    compared: tuple[int, ...] = ()  # by seed, examples with an outcome of both
    adjusted_p: float | None = None  # of `score` by Holm over all pairs of arms of the measure; None without a p-value
    score_intervals: OtherIntervals | None = None
    win_rate_intervals: OtherIntervals | None = None


@dataclasses.dataclass(frozen=True)
class MeasureResult:
    """MEASURE.json: all assistants on the same examples."""

    name: str
    words: MeasureWords
    examples: int
    clusters: int
    assistants: dict[str, AssistantResult]
    arms: dict[str, ArmResult]
    differences: tuple[Difference, ...]  # of every pair of arms with a common seed
    without_outcome: int = 0  # examples that have none with any assistant; they are in no number
    # That a panel of judges is worth, whose scores are parts; None without one, and in results of an earlier version.
    votes: Votes | None = None


@dataclasses.dataclass(frozen=True)
class MeasureScores:
    """The scores that a measure's results are computed from."""

    clusters: tuple[int, ...]  # numbered in the order in which they first come
    assistants: dict[str, tuple[float | None, ...]]  # None without an outcome


@dataclasses.dataclass(frozen=True)
class ScoresResult:
    """scores.json."""

    measures: dict[str, MeasureScores]
