"""Simulators: assistants that meet them, beside people, and their utility as it is forecast."""

import dataclasses

from simrl.evaluation.fidelity.measure import SourceFidelity
from simrl.evaluation.forecast import RankCorrelation
from simrl.evaluation.position import Votes
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The gain of an arm over the initial assistant with each simulator, over its training seeds."""

    seeds: tuple[int, ...]
    simulators: dict[str, SeedEstimate]  # by the simulator's arm
    other_kinds: SeedEstimate | None  # the mean over simulators of other kinds than its own; None without one
    held_out: SeedEstimate | None = None  # the mean over held-out simulators, the same for every arm; None without one
    # The same as means over seeds, conversations resampled: of these checkpoints only.
    checkpoints: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    checkpoint_other_kinds: Estimate | None = None
    checkpoint_held_out: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class SimulatorDifference:
    """One arm minus another with the same simulator, conversation by conversation, over the seeds that both have."""

    user: str  # the simulator's arm
    first: str
    second: str
    seeds: tuple[int, ...]
    score: SeedEstimate
    checkpoint_score: Estimate  # mean over seeds, conversations resampled: of these checkpoints only


@dataclasses.dataclass(frozen=True)
class MatrixResult:
    """matrix.json: mean score with each user (rows) of each assistant (columns), on the same examples.

    A simulator is named by its arm. One that is trained anew for each training seed is that of the assistant's seed;
    with the initial assistant it is the mean over all of them.
    """

    score: str  # its name
    users: tuple[str, ...]
    people: str | None  # the user that is a measure on people, the last one
    assistants: tuple[str, ...]
    mean: tuple[tuple[float, ...], ...]
    low: tuple[tuple[float | None, ...], ...]  # None where there is no interval
    high: tuple[tuple[float | None, ...], ...]
    conversations: tuple[tuple[int, ...], ...]  # that the mean is over
    transfers: dict[str, Transfer]
    failed: tuple[tuple[int, ...], ...] = ()  # conversations without a score; () in results of an earlier version
    causes: dict[str, int] = dataclasses.field(default_factory=dict)  # of those with simulators
    times: int = 1  # reports show scores multiplied by it: 100 for a score of at most 1
    differences: tuple[SimulatorDifference, ...] = ()  # of every pair of arms with a common seed
    # Of a score by a panel of judges, by the part of each judge: means as `mean`, with simulators alone; and the votes
    # that the panel is worth. Empty, and None, without a panel, and in results of an earlier version.
    judges: dict[str, tuple[tuple[float, ...], ...]] = dataclasses.field(default_factory=dict)
    votes: Votes | None = None


@dataclasses.dataclass(frozen=True)
class SimulatorFidelity:
    """A simulator beside people; likelihoods are None off the device."""

    perplexity: float | None  # per token of people's held-out messages
    nats_per_token: Estimate | None
    statistics: dict[str, float | None]  # rates of its messages; None without anything to divide by
    nats_by_source: dict[str, Estimate] = dataclasses.field(default_factory=dict)  # by data set
    # Its turns in people's place, by data set; with several, all of them come first. Empty where none are replayed.
    replayed: dict[str, SourceFidelity] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FidelityResult:
    """fidelity.json, by the arm that trains against the simulator."""

    people: dict[str, float | None]  # the same rates of people's messages
    simulators: dict[str, SimulatorFidelity]


@dataclasses.dataclass(frozen=True)
class SimulatorForecast:
    """A simulator as it is known before anything is trained against it; see `evaluation.forecast`.

    Of an arm whose simulator is trained anew for each training seed it is the mean over these simulators. All intervals
    are over clusters of examples.
    """

    cosine: Estimate | None  # of the policy gradients under it and under people; None where noise hides one of them
    best_of_n: Estimate | None  # gain in people's value by its choice; None where too few replies have both numbers
    reason: str | None  # why there is no cosine, or no best of n
    stages: tuple[str, ...]  # its own; timings.json has their seconds


@dataclasses.dataclass(frozen=True)
class ForecastResult:
    """forecast.json, by the arm that trains against the simulator."""

    people: str  # what stands for people, as a sentence
    people_stage: str  # of people's side, which all arms share; timings.json has its seconds
    measure: str  # whose utilities the forecasts are correlated with
    examples: int
    samples: int  # conversations, or replies, of each example
    n: int  # of best-of-n
    simulators: dict[str, SimulatorForecast]
    correlations: tuple[RankCorrelation, ...]  # of each forecast with each utility, over these arms
