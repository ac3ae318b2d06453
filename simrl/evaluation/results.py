"""Dataclasses of the files in `results/`, and how they are written and read back.

An assistant is 'initial' or 'ARM/seed-K'. The experiment makes the dataclasses, `write` stores each as a JSON file, the
report takes them as they are. `read` is for tools that open a finished run.
"""

import dataclasses
import json
import pathlib
from typing import Any, TypeVar

from simrl.evaluation.crossed import CrossedEstimate
from simrl.evaluation.fidelity.measure import SourceFidelity
from simrl.evaluation.forecast import RankCorrelation
from simrl.evaluation.gap_recovered import GapRecovered
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate
from simrl.run import config as config_lib
from simrl.run.stage_files import write_json

T = TypeVar('T')

RESULTS_FOLDER = 'results'
INITIAL = 'initial'
STUDY = 'study'  # the name of its file


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


@dataclasses.dataclass(frozen=True)
class MeasureScores:
    """The scores that a measure's results are computed from."""

    clusters: tuple[int, ...]  # numbered in the order in which they first come
    assistants: dict[str, tuple[float | None, ...]]  # None without an outcome


@dataclasses.dataclass(frozen=True)
class ScoresResult:
    """scores.json."""

    measures: dict[str, MeasureScores]


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


@dataclasses.dataclass(frozen=True)
class ValidationCurve:
    """A run's validation: the mean reward by validated step, and the step whose checkpoint is the result."""

    step: tuple[int, ...]
    reward: tuple[float | None, ...]
    chosen: int
    margin: float  # standard errors by which a later step must be better for an earlier one to be passed over
    judged: tuple[int, ...] | None = None  # conversations that the mean is over; None in results of an earlier version
    examples: int | None = None  # conversations held


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """One run, by logged step; None where a step had nothing to measure."""

    step: tuple[int, ...]
    reward: tuple[float | None, ...]  # mean over the step's conversations, under the arm's own simulator
    end_signal: tuple[float | None, ...]  # share of conversations that the user ended
    kl: tuple[float | None, ...] | None = None  # to the initial assistant, nats per token
    zero_variance: tuple[float | None, ...] | None = None  # share of groups of equal rewards: no gradient
    validation: ValidationCurve | None = None
    # None, or none, in results of an earlier version.
    message_tokens: tuple[float | None, ...] | None = None  # mean tokens of the assistant's messages
    truncated: tuple[float | None, ...] | None = None  # share of them that reached max_new_tokens
    unjudged: tuple[float | None, ...] | None = None  # share of conversations without a reward
    ends: dict[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)  # shares by reason


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """training.json."""

    assistants: dict[str, TrainingCurve]


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class ShownConversation:
    messages: tuple[Message, ...]
    score: float
    parts: dict[str, float]
    end: str


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """The conversations of one example with every assistant, all from the same seed."""

    example: str
    intent: str | None
    traits: dict[str, float]
    conversations: dict[str, ShownConversation]


@dataclasses.dataclass(frozen=True)
class ConversationsResult:
    """conversations.json."""

    measures: dict[str, tuple[ShownExample, ...]]


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


@dataclasses.dataclass(frozen=True)
class TimingsResult:
    """timings.json."""

    stages: dict[str, float]  # seconds of each stage's work


@dataclasses.dataclass(frozen=True)
class Results:
    """All of a finished run; a field is a file of its name, `measures` are one file each."""

    experiment: ExperimentResult
    measures: dict[str, MeasureResult]
    scores: ScoresResult
    matrix: MatrixResult | None  # None where assistants do not meet simulators
    fidelity: FidelityResult
    training: TrainingResult
    conversations: ConversationsResult
    timings: TimingsResult
    forecast: ForecastResult | None = None  # None where nothing was forecast, and in results of an earlier version


FILES: dict[str, type] = {
    'experiment': ExperimentResult,
    'scores': ScoresResult,
    'matrix': MatrixResult,
    'fidelity': FidelityResult,
    'training': TrainingResult,
    'conversations': ConversationsResult,
    'timings': TimingsResult,
    'forecast': ForecastResult,
}
OPTIONAL = ('matrix', 'forecast')  # null where there is none


def write(results: Results, workdir: pathlib.Path) -> None:
    """Stores each part of the results as `results/NAME.json`."""
    (workdir / RESULTS_FOLDER).mkdir(exist_ok=True)
    for name, part in {**{name: getattr(results, name) for name in FILES}, **results.measures}.items():
        write_json(workdir / RESULTS_FOLDER / f'{name}.json', config_lib.to_dict(part))


def read(workdir: pathlib.Path) -> Results:
    """The results of a finished run.

    Raises:
        ConfigError: there are none, or a file is not JSON or not of this version; names the file and the field.
    """
    parts: dict[str, Any] = {name: _read(cls, workdir, name) for name, cls in FILES.items() if name not in OPTIONAL}
    measures = {name: _read(MeasureResult, workdir, name) for name in parts['experiment'].measures}
    parts['matrix'] = None if _content(workdir, 'matrix') is None else _read(MatrixResult, workdir, 'matrix')
    forecast = _path(workdir, 'forecast').exists() and _content(workdir, 'forecast') is not None
    return Results(
        measures=measures, forecast=_read(ForecastResult, workdir, 'forecast') if forecast else None, **parts
    )


def write_study(found: StudyResult, workdir: pathlib.Path) -> None:
    """Stores the result of a study beside those of the run, whose own `write` leaves it as it is."""
    write_json(_path(workdir, STUDY), config_lib.to_dict(found))


def read_study(workdir: pathlib.Path) -> StudyResult | None:
    """The result of a study of the run's assistants; None without one.

    Raises:
        ConfigError: as of `read`.
    """
    return _read(StudyResult, workdir, STUDY) if _path(workdir, STUDY).exists() else None


def _read(cls: type[T], workdir: pathlib.Path, name: str) -> T:
    return config_lib.from_config_dict(cls, _content(workdir, name), str(_path(workdir, name)))


def _content(workdir: pathlib.Path, name: str) -> Any:
    path = _path(workdir, name)
    if not path.exists():
        raise config_lib.ConfigError(f'{path}: expected the results of a finished run, found no such file')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise config_lib.ConfigError(f'{path}: expected JSON, found an error: {error}') from error


def _path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / RESULTS_FOLDER / f'{name}.json'
