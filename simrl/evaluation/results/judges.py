"""Judges who compared a run's assistants two by two, in both orders.

A number that their verdicts do not determine is None; the `reasons` beside it say why, by its name. The tool's own
files have more: each verdict, regressions, strengths by each judge.
"""

import dataclasses

from simrl.evaluation.length_control import LengthControlled
from simrl.evaluation.position import Combine, PanelAgreement, PositionBias, Votes
from simrl.evaluation.preferences import WinRates
from simrl.evaluation.results.measures import OtherIntervals, SeedBounds
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate

PANEL = 'panel'  # the name of all judges together; no judge has it


@dataclasses.dataclass(frozen=True)
class ArmWinRate:
    """The win rate of an arm over another assistant.

    Attributes:
        seeds: of training, ascending; a run without any verdict is in none of the numbers but the bounds.
        win_rate: the mean over seeds of each run's mean over clusters, by t-interval and sign-flip test.
        intervals: with the spread pooled over arms, and over seeds and clusters at once.
        bounds: with failures lost, and won; None without any.
        adjusted: the p-value by Holm over all arms against that assistant; None with one seed.
    """

    arm: str
    other: str
    seeds: tuple[int, ...]
    win_rate: SeedEstimate
    intervals: OtherIntervals
    bounds: SeedBounds | None
    adjusted: float | None


@dataclasses.dataclass(frozen=True)
class JudgeNumbers:
    """One judge, or the panel, on two assistants; win rates are the first one's."""

    wins: int  # prompts on which the first is preferred
    ties: int
    losses: int
    failures: int  # prompts without a preference
    win_rates: WinRates | None
    length_controlled: LengthControlled | None
    position: PositionBias | None  # None for the panel, too
    causes: dict[str, int]  # verdicts that could not be had
    reasons: dict[str, str]

    @property
    def rate(self) -> Estimate | None:
        """The win rate with its primary interval, over clusters."""
        return None if self.win_rates is None else self.win_rates.observed.by_participant

    @property
    def rate_at_equal_lengths(self) -> Estimate | None:
        """The win rate were all responses equally long; it has no interval."""
        if self.rate is None or self.length_controlled is None:
            return None
        return dataclasses.replace(self.rate, mean=self.length_controlled.controlled, low=None, high=None)

    @property
    def failure_bounds(self) -> tuple[float, float] | None:
        """The win rate with failures lost, and won; None without any, or where all failed."""
        if self.win_rates is None or not self.win_rates.failures:
            return None
        return self.win_rates.all_lost.by_participant.mean, self.win_rates.all_won.by_participant.mean


@dataclasses.dataclass(frozen=True)
class JudgedPair:
    """Two assistants on the same prompts, or with the same simulated users."""

    first: str
    second: str
    prompts: int
    clusters: int  # what intervals resample: see the unit of the comparison
    missing: dict[str, int]  # prompts without a response, by assistant
    empty: dict[str, int]  # prompts with an empty one
    characters: dict[str, float]  # mean, of the assistants' responses
    judges: dict[str, JudgeNumbers]  # with several also `PANEL`, the last one
    agreement: dict[str, Estimate]  # of each two judges: 1 less the mean distance between their preferences
    votes: Votes | None  # judges that vary as much; None with one judge
    errors: PanelAgreement | None  # against people's preferences; None where no people were asked
    p_value: float | None  # of the sign test over clusters by the panel, or the one judge
    adjusted_p: float | None  # Holm's, over the pairs of the comparison
    reasons: dict[str, str]

    @property
    def primary(self) -> JudgeNumbers:
        """The numbers of the panel, or of the one judge."""
        return list(self.judges.values())[-1]


@dataclasses.dataclass(frozen=True)
class JudgedComparison:
    """All that one call of `tools.win_rate` compared."""

    judges: tuple[str, ...]
    combine: Combine  # how a preference is made of both orders
    unit: str  # what intervals of a checkpoint resample, in the plural
    pairs: tuple[JudgedPair, ...]
    arms: tuple[ArmWinRate, ...]  # over training seeds
    strengths: dict[str, Estimate]  # log-odds by assistant, the strongest first; empty for two, and without a fit

    @property
    def who(self) -> str:
        """The judges in words."""
        return f'a panel of {len(self.judges)} judges' if len(self.judges) > 1 else self.judges[0]


@dataclasses.dataclass(frozen=True)
class JudgesResult:
    """judges.json, which `tools.win_rate` leaves in a run: no stage of the run makes it."""

    comparisons: dict[str, JudgedComparison]  # by the folder of their verdicts
