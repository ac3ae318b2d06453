"""Participants -> votes: one row for each judged turn of a main session, with all that is known of it.

The training exchange counts nowhere. Nobody is left out here: `analysis` states whose votes it takes, and counts the
others by reason.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence

from simrl.study.events import Choice, Conduct, Mode, Side
from simrl.study.participant import Outcome, Participant, Turn

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Vote:
    """A judged turn.

    Attributes:
        pair: the models, in the order in which the win rate is given: of the plan, or else of the first vote on them.
        turn: its number in the session, from 1. Replies of later turns share the history of the earlier ones.
        left: the model whose reply was shown on the left.
        preference: 1 for the pair's first model, 0 for its second, 1/2 for a tie.
        kept: the side that the conversation continues from.
        named: sides whose reply may name its model.
        flags: of the participant.
        outcome: of the participant; None while they are under way.
        excluded: an administrator's reason to exclude the participant; None: they are not excluded.
        asked_at, shown_at, judged_at: seconds since 1970.
    """

    participant: str
    pair: tuple[str, str]
    document_type: str
    task: str
    turn: int
    left: str
    choice: Choice
    preference: float
    kept: Side
    reason: str
    message: str
    left_text: str
    right_text: str
    left_seconds: float
    right_seconds: float
    left_cut: bool
    right_cut: bool
    named: tuple[Side, ...]
    flags: tuple[str, ...]
    outcome: Outcome | None
    excluded: str | None
    message_conduct: Conduct
    reason_conduct: Conduct
    asked_at: float
    shown_at: float
    judged_at: float

    @property
    def id(self) -> str:
        return f'{self.participant}/{self.turn}'

    @property
    def right(self) -> str:
        """The model whose reply was shown on the right."""
        return self.pair[1] if self.left == self.pair[0] else self.pair[0]

    @property
    def first_was_left(self) -> bool:
        """True if the reply of the pair's first model was shown on the left."""
        return self.left == self.pair[0]

    def text_of(self, model: str) -> str:
        """The reply of one of the pair's models."""
        return self.left_text if model == self.left else self.right_text


def votes(
    participants: Iterable[Participant],
    mode: Mode = 'live',
    flags: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
    pairs: Iterable[Pair] = (),
) -> list[Vote]:
    """The votes of all participants of a mode, in the order of participants and turns.

    All votes on two models have them in one order, though a config that was changed had them in both.

    Args:
        participants: of any mode.
        mode: whose participants are counted.
        flags: by participant, the names of their flags; none of one who is not there.
        pairs: of the plan; others have the order in which they come first.
    """
    order = {frozenset(pair): pair for pair in pairs}
    return [
        _vote(
            participant,
            order.setdefault(frozenset(participant.main.pair), participant.main.pair),
            number,
            turn,
            tuple(flags.get(participant.id, ())),
        )
        for participant in participants
        if participant.mode == mode and participant.main is not None
        for number, turn in enumerate(participant.main.turns, 1)
        if turn.status == 'judged'
    ]


def _vote(participant: Participant, pair: Pair, number: int, turn: Turn, flags: tuple[str, ...]) -> Vote:
    prepared, replies, preferred = participant.prepared, turn.replies, turn.preferred
    # What the fold guarantees of a judged turn of a main session.
    assert prepared is not None
    assert replies is not None
    assert preferred is not None
    assert participant.document_type is not None
    assert turn.shown_at is not None
    assert turn.judged_at is not None
    first_was_left = replies.left == pair[0]
    left_preferred = {'left': 1.0, 'tie': 0.5, 'right': 0.0}[preferred.choice]
    return Vote(
        participant=participant.id,
        pair=pair,
        document_type=participant.document_type,
        task=prepared.task,
        turn=number,
        left=replies.left,
        choice=preferred.choice,
        preference=left_preferred if first_was_left else 1 - left_preferred,
        kept=preferred.kept,
        reason=preferred.reason,
        message=turn.message,
        left_text=replies.left_text,
        right_text=replies.right_text,
        left_seconds=replies.left_seconds,
        right_seconds=replies.right_seconds,
        left_cut=replies.left_cut,
        right_cut=replies.right_cut,
        named=replies.named,
        flags=flags,
        outcome=participant.outcome,
        excluded=participant.excluded.reason if participant.is_excluded and participant.excluded else None,
        message_conduct=turn.conduct,
        reason_conduct=preferred.conduct,
        asked_at=turn.asked_at,
        shown_at=turn.shown_at,
        judged_at=turn.judged_at,
    )
