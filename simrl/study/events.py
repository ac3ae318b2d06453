"""Events of a study: each is a frozen dataclass, stored as its name and a JSON object.

A participant's events are numbered from 1 (`Stored.version`); the n-th is written once, so that of two writers that
both knew n - 1 events one is refused. Names of models and which one stood on the left are in the events and never in
what a browser is sent.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

Mode = Literal['live', 'preview', 'rehearsal']
Side = Literal['left', 'right']
Choice = Literal['left', 'tie', 'right']
SESSIONS = ('training', 'main')
Session = Literal['training', 'main']


class EventError(ValueError):
    """A row of the store is no event: of a newer version, or damaged."""


@dataclasses.dataclass(frozen=True)
class Conduct:
    """Signs of how a text was written, as the page's script saw it; 0 and None without a script.

    Attributes:
        pasted: characters that were pasted.
        typed: keys that were pressed.
        seconds: from the page's being shown to its being sent.
    """

    pasted: int = 0
    typed: int = 0
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Arrived:
    mode: Mode


@dataclasses.dataclass(frozen=True)
class Returned:
    """The participant entered once more; one who was turned away before the consent is at the consent again.

    Attributes:
        same_session: the panel's session id is that of the first time.
    """

    same_session: bool


@dataclasses.dataclass(frozen=True)
class Consented:
    agreed: bool
    plan: str  # hash of the analysis plan


@dataclasses.dataclass(frozen=True)
class Instructed:
    """The participant read the instructions."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A try of the comprehension check. `last`: no further try is left."""

    answers: tuple[int, ...]
    right: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class TypeAssigned:
    document_type: str


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The task that was chosen, and the answers (`notes`) to the questions before writing."""

    task: str
    notes: tuple[str, ...]
    conduct: Conduct = Conduct()
    questions: tuple[str, ...] = ()  # as they were asked


@dataclasses.dataclass(frozen=True)
class PairAssigned:
    """The models of a session, in the order of the config. That of the training exchange counts in no balance."""

    session: Session
    first: str
    second: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """The participant sent a message; replies are asked for."""

    message: str
    conduct: Conduct = Conduct()


@dataclasses.dataclass(frozen=True)
class Replied:
    """Both replies are there, and are shown at once. `left`, `right`: names of models."""

    left: str
    right: str
    left_text: str
    right_text: str
    left_seconds: float
    right_seconds: float
    left_cut: bool = False  # at its max number of tokens
    right_cut: bool = False
    named: tuple[Side, ...] = ()  # replies in which a model may name itself


@dataclasses.dataclass(frozen=True)
class Voided:
    """A turn without replies: a model failed, or the message was refused by moderation. It counts nowhere.

    Attributes:
        cause: the whole of it. It may name the model.
        refused: by moderation: the same message is not tried again.
        kind: of cause, for the administrators while the study runs: the same whichever model failed.
    """

    cause: str
    refused: bool = False
    kind: str = ''


@dataclasses.dataclass(frozen=True)
class Retried:
    """The participant had the same message of a void turn asked once more."""


@dataclasses.dataclass(frozen=True)
class Preferred:
    """The vote of a turn. `kept`: the reply that both models continue from; of a tie it is drawn."""

    choice: Choice
    kept: Side
    reason: str
    conduct: Conduct = Conduct()


@dataclasses.dataclass(frozen=True)
class Concluded:
    """The participant ended the conversation, or it had its max number of exchanges; the final text follows."""


@dataclasses.dataclass(frozen=True)
class Wrote:
    """The final text, and whether the attention item beside it was answered as it asks. The outcome is `completed`."""

    text: str
    attentive: bool
    conduct: Conduct = Conduct()


@dataclasses.dataclass(frozen=True)
class Withdrew:
    """The participant left for good. `reason` may be empty."""

    reason: str


@dataclasses.dataclass(frozen=True)
class TurnedAway:
    """The study was paused, or had all its participants, when they came; or they came back to one without what they
    need before they can complete it: a model of theirs, or their type of document."""


@dataclasses.dataclass(frozen=True)
class Deleted:
    """The participant's data was deleted at their wish: their earlier events and identity are gone."""


@dataclasses.dataclass(frozen=True)
class Flagged:
    """A flag of a screen that cannot be computed from the events again: of a judge."""

    flag: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Excluded:
    """An administrator excluded the participant from the analysis, or took that back."""

    excluded: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class PanelStatus:
    """An administrator entered the status of the participant's submission on the panel, in capitals."""

    status: str

    @property
    def has_left(self) -> bool:
        """True of a submission that was returned, or timed out."""
        return self.status.replace('_', '-') in ('RETURNED', 'TIMED-OUT')


@dataclasses.dataclass(frozen=True)
class PlanFrozen:
    """Of the study: its analysis plan and config at the first consent of a live participant."""

    plan: dict[str, Any]
    plan_hash: str
    config_hash: str


@dataclasses.dataclass(frozen=True)
class Opened:
    """Of the study: the server was started.

    Attributes:
        version: of simrl.
        config_hash: of the config with the contents of its files.
        config: the fields that `config_hash` is of; of what is long or not for a report (texts, tasks, the panel's
            codes) the hash alone. Empty in a store of an earlier version.
    """

    version: str
    config_hash: str
    models: tuple[str, ...]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Paused:
    """Of the study: nobody new is let in, or again everybody."""

    paused: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class RecruitmentEnded:
    """Of the study: nobody new is let in any more, whatever the plan says; the next planned look is the last one."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Looked:
    """Of the study: an administrator saw, or may see from now on, results by model.

    Attributes:
        participants: who had completed and were not excluded.
        votes: theirs.
        planned: a look of the analysis plan; otherwise it departs from it.
        alpha: two-sided, of one pair, spent by this look; 0 if it was not planned.
        reason: of a look that was not planned.
    """

    participants: int
    votes: int
    planned: bool
    alpha: float
    reason: str = ''


ParticipantEvent = (
    Arrived
    | Returned
    | Consented
    | Instructed
    | Checked
    | TypeAssigned
    | Prepared
    | PairAssigned
    | Asked
    | Replied
    | Voided
    | Retried
    | Preferred
    | Concluded
    | Wrote
    | Withdrew
    | TurnedAway
    | Deleted
    | Flagged
    | Excluded
    | PanelStatus
)
StudyEvent = PlanFrozen | Opened | Paused | RecruitmentEnded | Looked
Event = ParticipantEvent | StudyEvent
STUDY = ''  # participant of the study's own events
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Event)}
_HINTS: dict[type[Any], dict[str, Any]] = {kind: typing.get_type_hints(kind) for kind in (*_KINDS.values(), Conduct)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An event of the store.

    Attributes:
        number: its place among all events of the store, rising.
        participant: pseudonymous id; `STUDY` for an event of the study itself.
        version: its number among the participant's events, from 1.
        at: time in seconds since 1970, UTC.
    """

    number: int
    participant: str
    version: int
    at: float
    event: Event


def to_row(event: Event) -> tuple[str, dict[str, Any]]:
    """An event's name and its fields as a JSON object."""
    return type(event).__name__, dataclasses.asdict(event)


def from_row(kind: str, body: Mapping[str, Any]) -> Event:
    """Reverses `to_row`.

    Raises:
        EventError: an unknown name, or fields that are missing, unknown or of another type.
    """
    if kind not in _KINDS:
        raise EventError(f'expected one of {sorted(_KINDS)}, found {kind!r}: the store may be of a newer version')
    return _from_object(_KINDS[kind], body, kind)


def _from_object(cls: type[Any], body: object, name: str) -> Any:
    if not isinstance(body, Mapping):
        raise EventError(f'{name}: expected an object, found {type(body).__name__}')
    hints = _HINTS[cls]
    fields = {}
    for field, value in body.items():
        if field not in hints:
            raise EventError(f'{name}.{field}: expected one of {", ".join(hints) or "no fields"}')
        hint = hints[field]
        if hint is Conduct:
            fields[field] = _from_object(Conduct, value, f'{name}.{field}')
        elif _fits(hint, value):
            fields[field] = tuple(value) if isinstance(value, list) else value
        else:  # its text may be a participant's, which no message repeats
            raise EventError(f'{name}.{field}: expected {hint}, found another {type(value).__name__}')
    try:
        return cls(**fields)
    except TypeError as error:
        raise EventError(f'{name}: {error}') from None


def _fits(hint: Any, value: object) -> bool:
    """True if a value of a JSON object is of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(arguments[0], item) for item in value)
    if origin is types.UnionType:
        return any(_fits(argument, value) for argument in arguments)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else origin or hint)
