"""A participant's events -> where they are in the study: a pure fold, the same after every restart.

`apply` takes the next event and refuses one that cannot follow, so that what is stored can always be folded. Who
decides that an event happens (how many exchanges, how many tries) knows the settings; the fold does not.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from simrl.study.events import (
    STUDY,
    Arrived,
    Asked,
    Checked,
    Concluded,
    Conduct,
    Consented,
    Deleted,
    Excluded,
    Flagged,
    Instructed,
    Mode,
    PairAssigned,
    PanelStatus,
    Preferred,
    Prepared,
    Replied,
    Retried,
    Returned,
    Stored,
    TurnedAway,
    TypeAssigned,
    Voided,
    Withdrew,
    Wrote,
)

# What the participant's page asks for. `consent` ... `final` in this order; `over`: nothing more.
Step = Literal['consent', 'instructions', 'check', 'task', 'training', 'conversation', 'final', 'over']
Outcome = Literal['completed', 'declined', 'failed_check', 'withdrawn', 'closed', 'deleted']


class OutOfPlaceError(ValueError):
    """An event that cannot follow a participant's earlier ones."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message, its two replies, and the vote.

    Attributes:
        status: `waiting` for replies; `void`: there are none, and the message may be tried again unless `refused`;
            `shown`: both replies are there; `judged`.
        voids: times that a try of it was void. failed: of those, tries of the last message.
        asked_at, shown_at, judged_at: seconds since 1970; None until then.
    """

    message: str
    conduct: Conduct
    asked_at: float
    status: Literal['waiting', 'void', 'shown', 'judged'] = 'waiting'
    voids: int = 0
    refused: bool = False
    replies: Replied | None = None
    shown_at: float | None = None
    preferred: Preferred | None = None
    judged_at: float | None = None
    failed: int = 0

    @property
    def shown(self) -> tuple[str, ...]:
        """The texts of both replies, left first; none until they are there."""
        return (self.replies.left_text, self.replies.right_text) if self.replies else ()

    @property
    def kept(self) -> str:
        """The reply that the conversation continues from."""
        assert self.replies is not None
        assert self.preferred is not None
        return self.replies.left_text if self.preferred.kept == 'left' else self.replies.right_text


@dataclasses.dataclass(frozen=True)
class Talk:
    """A session: the pair of models, in the order of the config, and its turns; `void_kinds` of all causes so far."""

    pair: tuple[str, str]
    assigned_at: float
    turns: tuple[Turn, ...] = ()
    void_kinds: tuple[str, ...] = ()

    @property
    def judged(self) -> tuple[Turn, ...]:
        return tuple(turn for turn in self.turns if turn.status == 'judged')

    def messages(self) -> list[tuple[Literal['user', 'assistant'], str]]:
        """Returns (role, text) of all that both models continue from: judged turns with the reply that was kept, and
        the message that waits for replies, if any."""
        found: list[tuple[Literal['user', 'assistant'], str]] = []
        for turn in self.turns:
            if turn.status == 'judged':
                found += [('user', turn.message), ('assistant', turn.kept)]
            elif turn.status == 'waiting':
                found.append(('user', turn.message))
        return found


@dataclasses.dataclass(frozen=True)
class Participant:
    """All that is known of a participant.

    Attributes:
        version: number of their events.
        page: version of the last event that changed their page. A form is up to date if its version is no smaller.
        checks: tries of the comprehension check so far.
        began_at, seen_at: of their first and last event, seconds since 1970.
        agreed_at: of their consent.
    """

    id: str
    mode: Mode
    step: Step
    version: int
    began_at: float
    seen_at: float
    page: int = 1
    outcome: Outcome | None = None
    plan: str = ''
    agreed_at: float | None = None
    checks: tuple[Checked, ...] = ()
    document_type: str | None = None
    prepared: Prepared | None = None
    training: Talk | None = None
    main: Talk | None = None
    wrote: Wrote | None = None
    withdrew: Withdrew | None = None
    other_sessions: int = 0  # times they entered by another session id of the panel
    flagged: tuple[Flagged, ...] = ()
    excluded: Excluded | None = None  # the last word of an administrator
    panel_status: str = ''  # of the submission on the panel, in capitals, as far as it was entered

    @property
    def talk(self) -> Talk | None:
        """The session that the step is of."""
        return {'training': self.training, 'conversation': self.main}.get(self.step)

    @property
    def turn(self) -> Turn | None:
        """The last turn of that session."""
        return self.talk.turns[-1] if self.talk and self.talk.turns else None

    @property
    def was_turned_away(self) -> bool:
        """True of one who was not let in: they begin at the consent if they come back."""
        return self.outcome == 'closed' and self.agreed_at is None

    @property
    def has_left_panel(self) -> bool:
        return PanelStatus(self.panel_status).has_left

    @property
    def is_excluded(self) -> bool:
        return self.excluded is not None and self.excluded.excluded


def fold(events: Iterable[Stored]) -> Participant | None:
    """The state after events of one participant, in their order; None of no events."""
    state = None
    for event in events:
        state = apply(state, event)
    return state


def fold_all(events: Iterable[Stored]) -> dict[str, Participant]:
    """The state of each participant by id, in the order in which they arrived; events of the study itself are not read.

    Raises:
        OutOfPlaceError: an event cannot follow those before it.
    """
    states: dict[str, Participant] = {}
    for stored in events:
        if stored.participant != STUDY:
            states[stored.participant] = apply(states.get(stored.participant), stored)
    return states


def completed(participants: Iterable[Participant], mode: Mode) -> list[Participant]:
    """The participants of a mode who completed the study and are not excluded."""
    return [one for one in participants if one.mode == mode and one.outcome == 'completed' and not one.is_excluded]


def apply(state: Participant | None, stored: Stored) -> Participant:
    """The state after one more event.

    Raises:
        OutOfPlaceError: the event cannot follow, by its version or its kind.
    """
    event = stored.event
    expected = 1 if state is None else state.version + 1
    # The events between a participant's first and `Deleted` are no longer stored.
    if stored.version != expected and not (isinstance(event, Deleted) and stored.version > expected > 1):
        raise OutOfPlaceError(f'{stored.participant}: expected event {expected}, found {stored.version}')
    if state is None:
        match event:
            case Arrived(mode):
                return Participant(stored.participant, mode, 'consent', 1, stored.at, stored.at)
        raise _out_of_place(stored, 'before the first')
    changed = _change(state, stored)
    if changed is None:
        raise _out_of_place(stored, f'in {state.step}' + (f' ({state.outcome})' if state.outcome else ''))
    seen = state.seen_at if isinstance(event, Flagged | Excluded | PanelStatus | Replied | Voided) else stored.at
    is_seen = changed.step != state.step or not isinstance(event, Returned | Flagged | Excluded | PanelStatus)
    page = stored.version if is_seen else state.page
    return dataclasses.replace(changed, version=stored.version, seen_at=seen, page=page)


def _out_of_place(stored: Stored, where: str) -> OutOfPlaceError:
    return OutOfPlaceError(f'{stored.participant}: event {stored.version}: found {type(stored.event).__name__} {where}')


def _change(state: Participant, stored: Stored) -> Participant | None:
    """The state but for its version and time; None where the event cannot follow."""
    event, step, at = stored.event, state.step, stored.at

    def to(step: Step, outcome: Outcome | None = None, **fields: object) -> Participant:
        return dataclasses.replace(state, step=step, outcome=outcome or state.outcome, **fields)  # type: ignore[arg-type]

    if state.outcome == 'deleted':
        return None
    match event:  # what may come at any time
        case Deleted():  # of what was known, the id and the mode stay
            return Participant(
                state.id, state.mode, 'over', state.version, state.began_at, state.seen_at, outcome='deleted'
            )
        case Flagged():
            return dataclasses.replace(state, flagged=(*state.flagged, event))
        case PanelStatus(status):
            return dataclasses.replace(state, panel_status=status)
        case Excluded():
            return dataclasses.replace(state, excluded=event)
        case Returned(same_session):
            again = dataclasses.replace(state, other_sessions=state.other_sessions + (not same_session))
            return dataclasses.replace(again, step='consent', outcome=None) if state.was_turned_away else again
    if step == 'over':
        return None
    match step, event:
        case _, Withdrew():
            return to('over', 'withdrawn', withdrew=event)
        case _, TurnedAway():
            return to('over', 'closed')
        case 'consent', Consented(agreed, plan):
            return to('instructions', plan=plan, agreed_at=at) if agreed else to('over', 'declined', plan=plan)
        case 'instructions', Instructed():
            return to('check')
        case 'check', Checked(_, right, last):
            checks = (*state.checks, event)
            if right:
                return to('task', checks=checks)
            return to('over', 'failed_check', checks=checks) if last else to('check', checks=checks)
        case 'task', TypeAssigned(document_type) if state.document_type is None:
            return to('task', document_type=document_type)
        case 'task', Prepared() if state.document_type is not None:
            return to('training', prepared=event)
        case 'training', PairAssigned('training', first, second) if state.training is None:
            return to('training', training=Talk((first, second), at))
        case 'conversation', PairAssigned('main', first, second) if state.main is None:
            return to('conversation', main=Talk((first, second), at))
        case 'conversation', Concluded() if (
            state.main is not None and state.turn and state.turn.status in ('judged', 'void')
        ):
            return to('final')
        case 'final', Wrote():
            return to('over', 'completed', wrote=event)
        case 'training' | 'conversation', Asked() | Retried() | Replied() | Voided() | Preferred():
            return _in_talk(state, stored)
    return None


def _in_talk(state: Participant, stored: Stored) -> Participant | None:
    """The state after an event of the session that is under way; the training session ends with its vote."""
    talk, turn, at = state.talk, state.turn, stored.at
    if talk is None:
        return None
    earlier: Sequence[Turn] = talk.turns[:-1]
    status = 'judged' if turn is None else turn.status
    made: Turn | None = None
    match stored.event, status:
        case Asked(message, conduct), 'judged':
            earlier, made = talk.turns, Turn(message, conduct, at)
        case Asked(message, conduct), 'void':  # another message in the place of the void one
            assert turn is not None
            made = Turn(message, conduct, at, voids=turn.voids)
        case Retried(), 'void':
            assert turn is not None
            made = None if turn.refused else dataclasses.replace(turn, status='waiting', asked_at=at)
        case Voided(_, refused), 'waiting':
            assert turn is not None
            made = dataclasses.replace(
                turn, status='void', voids=turn.voids + 1, failed=turn.failed + 1, refused=refused
            )
        case Replied(left, right), 'waiting' if {left, right} == set(talk.pair):
            assert turn is not None
            assert isinstance(stored.event, Replied)
            made = dataclasses.replace(turn, status='shown', replies=stored.event, shown_at=at)
        case Preferred(choice, kept), 'shown' if choice in ('tie', kept):
            assert turn is not None
            assert isinstance(stored.event, Preferred)
            made = dataclasses.replace(turn, status='judged', preferred=stored.event, judged_at=at)
    if made is None:
        return None
    kinds = (stored.event.kind,) if isinstance(stored.event, Voided) else ()
    talk = dataclasses.replace(talk, turns=(*earlier, made), void_kinds=talk.void_kinds + kinds)
    if state.step == 'conversation':
        return dataclasses.replace(state, main=talk)
    return dataclasses.replace(state, training=talk, step='conversation' if made.status == 'judged' else 'training')
