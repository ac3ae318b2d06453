"""What the files of `results/` hold, as dataclasses: what the experiment writes, and what the report reads.

An assistant is 'initial' or 'ARM/seed-K'. `simrl.config.to_dict` makes the JSON of each; `read` checks it.
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal, TypeVar

from simrl.evaluation.gap_recovered import RecoveredShare
from simrl.evaluation.statistics import Estimate, SeedEstimate
from simrl.run import config

T = TypeVar('T')

RESULTS_FOLDER = 'results'
INITIAL = 'initial'
ORACLE = 'oracle'
PEOPLE = 'people'


class ResultError(ValueError):
    """A file of results is not what it should be: names the file and the key."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm's simulator, as far as results tell arms apart; its name is free."""

    kind: str  # arms whose simulators are of one kind differ in size or settings
    oracle: bool = False  # its simulator is the people themselves


@dataclasses.dataclass(frozen=True)
class MeasureWords:
    """The names of a measure's numbers."""

    title: str  # heading, such as 'Satisfaction of new people'
    score: str  # what one conversation or reply gets, such as 'satisfaction'
    unit: str  # what intervals of one checkpoint resample, in the plural: 'people', 'openings'
    about: str  # sentences below the table: what the score is, and where it misleads


@dataclasses.dataclass(frozen=True)
class World:
    dial: float  # 0: people are a stereotype, 1: people as the world describes them
    people: int  # how many new people every assistant met


@dataclasses.dataclass(frozen=True)
class AssistantResult:
    """One assistant on new people; all intervals are over people."""

    satisfaction: Estimate
    share_met: Estimate  # of the intent
    assistant_turns: float  # mean
    ends: dict[str, float]  # shares of conversations by reason: accepted, left, turns
    first_acts: dict[str, float]  # shares of conversations by what the assistant did first
    truncated: float  # share of the assistant's messages that the budget cut
    user_truncated: float  # share of conversations in which the budget cut a message of the person
    gain: Estimate | None = None  # satisfaction minus the initial assistant's, paired; None for the initial one
    win_rate: Estimate | None = None  # expected votes against the initial assistant
    strict_win_rate: Estimate | None = None  # satisfaction is higher than with the initial assistant; ties count 1/2


@dataclasses.dataclass(frozen=True)
class PeopleResult:
    """people.json."""

    world: World
    assistants: dict[str, AssistantResult]


@dataclasses.dataclass(frozen=True)
class ArmClaim:
    """One arm over its training seeds."""

    seeds: tuple[int, ...]  # in the order of every estimate's values
    satisfaction: SeedEstimate
    share_met: SeedEstimate
    gain: SeedEstimate
    win_rate: SeedEstimate
    strict_win_rate: SeedEstimate
    gain_over_people: Estimate  # seeds averaged, people resampled: of these checkpoints only
    recovered: RecoveredShare


@dataclasses.dataclass(frozen=True)
class DifferenceClaim:
    """One arm minus another over the training seeds that both have."""

    seeds: tuple[int, ...]
    satisfaction: SeedEstimate
    win_rate: SeedEstimate
    satisfaction_over_people: Estimate  # seeds averaged, people resampled: of these checkpoints only


@dataclasses.dataclass(frozen=True)
class TransferClaim:
    """What an arm gained over the initial assistant with each simulator, over its training seeds."""

    seeds: tuple[int, ...]
    users: dict[str, SeedEstimate]  # satisfaction minus the initial assistant's with the same simulator
    others: SeedEstimate | None  # the mean over simulators of other kinds than its own; None without one


@dataclasses.dataclass(frozen=True)
class ClaimsResult:
    """claims.json; `differences` by 'ARM - OTHER', the others by arm."""

    seeds: tuple[int, ...]
    arms: dict[str, ArmClaim]
    differences: dict[str, DifferenceClaim]
    transfers: dict[str, TransferClaim]


@dataclasses.dataclass(frozen=True)
class MatrixResult:
    """matrix.json: mean satisfaction of each user (rows) with each assistant (columns).

    A simulator that is trained anew for each training seed is the one of the assistant's seed; with the initial
    assistant it is the mean over all of them.
    """

    users: tuple[str, ...]
    assistants: tuple[str, ...]
    mean: tuple[tuple[float, ...], ...]
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    conversations: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        expected = (len(self.users), len(self.assistants))
        for field in ('mean', 'low', 'high', 'conversations'):
            rows = getattr(self, field)
            if len(rows) != expected[0] or any(len(row) != expected[1] for row in rows):
                found = (len(rows), *sorted({len(row) for row in rows}))
                raise ValueError(f'MatrixResult.{field}: expected [users, assistants] {expected}, found {found}')


@dataclasses.dataclass(frozen=True)
class TurnStatistics:
    """How users of one kind talk, in means over conversations; None where nothing was there to be measured."""

    words_per_message: float | None
    opening_attributes: float | None  # told in the first message
    typo_rate: float | None  # share of the words of values
    against_intent: float | None  # share of the values told
    left: float | None  # share of conversations
    accepted: float | None  # share of conversations
    messages: float | None  # of the user, in a conversation


@dataclasses.dataclass(frozen=True)
class SimulatorFidelity(TurnStatistics):
    perplexity: float | None  # per token of held-out people's messages
    nats_per_token: Estimate | None


@dataclasses.dataclass(frozen=True)
class FidelityResult:
    """fidelity.json."""

    people: TurnStatistics
    simulators: dict[str, SimulatorFidelity]


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """One run of training.json; None where a step had nothing to measure."""

    step: tuple[int, ...]
    reward: tuple[float | None, ...]  # mean over the step's conversations, under the arm's own simulator
    end_signal: tuple[float | None, ...]  # share of conversations that the user ended
    kl: tuple[float | None, ...] | None = None  # to the initial assistant, nats per token
    no_spread: tuple[float | None, ...] | None = None  # share of groups of equal rewards, which teach nothing

    def __post_init__(self) -> None:
        for field in ('reward', 'end_signal', 'kl', 'no_spread'):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.step):
                raise ValueError(f'TrainingCurve.{field}: expected {len(self.step)} values, found {len(values)}')


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """training.json, under the key that the reader adds: the file is what `assistants` holds."""

    assistants: dict[str, TrainingCurve]


@dataclasses.dataclass(frozen=True)
class Message:
    role: Literal['user', 'assistant']
    content: str


@dataclasses.dataclass(frozen=True)
class Talk:
    messages: tuple[Message, ...]
    satisfaction: float
    share_met: float
    end: str


@dataclasses.dataclass(frozen=True)
class PersonTalks:
    """One person's conversations with every assistant, all from the same seed."""

    person: str
    intent: str
    traits: dict[str, float]
    talks: dict[str, Talk]


@dataclasses.dataclass(frozen=True)
class ConversationsResult:
    """conversations.json, under the key that the reader adds: the file is the list."""

    people: tuple[PersonTalks, ...]


@dataclasses.dataclass(frozen=True)
class TimingsResult:
    """timings.json."""

    stages: dict[str, float]  # seconds of each stage's work


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run directory holds so far; None for a file that is not there (yet)."""

    people: PeopleResult | None
    claims: ClaimsResult | None
    matrix: MatrixResult | None
    fidelity: FidelityResult | None
    training: TrainingResult | None
    conversations: ConversationsResult | None
    timings: TimingsResult | None
    config: dict[str, Any] | None


def read(workdir: pathlib.Path) -> Results:
    """The results of a run directory.

    Raises:
        ResultError: a file that is there is not JSON, or does not hold what its dataclass says.
    """
    settings = _json(workdir / 'config.json')
    if settings is not None and not isinstance(settings, dict):
        raise ResultError(f'{workdir / "config.json"}: expected settings by name, found a {type(settings).__name__}')
    return Results(
        people=_read(PeopleResult, workdir, 'people.json'),
        claims=_read(ClaimsResult, workdir, 'claims.json'),
        matrix=_read(MatrixResult, workdir, 'matrix.json'),
        fidelity=_read(FidelityResult, workdir, 'fidelity.json'),
        training=_read(TrainingResult, workdir, 'training.json', inside='assistants'),
        conversations=_read(ConversationsResult, workdir, 'conversations.json', inside='people'),
        timings=_read(TimingsResult, workdir, 'timings.json'),
        config=settings,
    )


def _read(cls: type[T], workdir: pathlib.Path, name: str, *, inside: str | None = None) -> T | None:
    path = workdir / RESULTS_FOLDER / name
    content = _json(path)
    if content is None:
        return None
    try:
        return config.from_config_dict(cls, content if inside is None else {inside: content}, str(path))
    except config.ConfigError as error:
        raise ResultError(str(error)) from error


def _json(path: pathlib.Path) -> Any:
    """What a JSON file holds, None where there is no file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'), parse_constant=_no_constant)
    except ValueError as error:
        raise ResultError(f'{path}: expected JSON, found an error: {error}') from error
    if content is None:
        raise ResultError(f'{path}: expected results, found null')
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f'{name} is no number of JSON')
