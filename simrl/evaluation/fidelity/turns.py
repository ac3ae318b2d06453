"""People's turns in real conversations, and what a simulator said in their place.

A conversation is replayed turn by turn: the simulator reads what was really said before a turn of the person, and says
that turn, or ends the conversation (App. I.1 of arXiv:2605.09808; Ivey et al. 2024, arXiv:2409.08330). Whatever it
says, the next turn is replayed from what was really said.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from simrl.conversations.records import Conversation
from simrl.conversations.row_files import placed_rows, write_rows
from simrl.run.config import from_config_dict


@dataclasses.dataclass(frozen=True)
class Turn:
    """A person's turn, and a simulator's in its place.

    Attributes:
        conversation: its id.
        source: of the conversation.
        turn: its number among the person's turns, 0 the opening.
        end: of the conversation, as in `Conversation`.
        intent: of the person, where known.
        real: what the person wrote; None where they ended the conversation without a word.
        real_end: True where the person ended the conversation with this turn, False where they did not; None where that
            is not known, as a collection that was cut ends here.
        real_truncated: whether the data set cut the message.
        simulated: what the simulator said; None where it ended the conversation without a word, failed, or is people's
            turn alone.
        ended: whether the simulator ended the conversation with this turn; None as before.
        truncated: whether its budget cut the simulator's message.
        failure: why there is no turn of the simulator; empty where there is one.
    """

    conversation: str
    source: str
    turn: int
    end: str = 'unknown'
    intent: str | None = None
    real: str | None = None
    real_end: bool | None = None
    real_truncated: bool = False
    simulated: str | None = None
    ended: bool | None = None
    truncated: bool = False
    failure: str = ''

    def __post_init__(self) -> None:
        if self.turn < 0:
            raise ValueError(f'Turn.turn: expected at least 0, found {self.turn}')
        if self.real is None and not self.real_end:
            raise ValueError('Turn.real: expected a text, as the person did not end the conversation, found None')
        if self.simulated is None and self.ended is False:
            raise ValueError('Turn.simulated: expected a text, as the simulator did not end, found None')

    @property
    def replayed(self) -> bool:
        """True if a simulator took this turn."""
        return self.ended is not None


def turns_of(conversation: Conversation, *, first: int = 0) -> list[Turn]:
    """The turns of a person.

    After a natural end by the assistant's message there is one more, with which the person left without a word.

    Args:
        first: number of the first turn; 1 leaves out the opening.
    """
    spoken = conversation.spoken
    said = [*spoken[::2], *([None] if conversation.end == 'natural' and len(spoken) % 2 == 0 else [])]
    turns = []
    for number, message in enumerate(said):
        last = number == len(said) - 1
        real_end: bool | None = False
        if last and conversation.end == 'natural':
            real_end = True
        elif 2 * number == len(spoken) - 1:
            real_end = None
        turns.append(
            Turn(
                conversation.id,
                conversation.source,
                number,
                conversation.end,
                conversation.intent,
                real=None if message is None else message.content,
                real_end=real_end,
                real_truncated=message is not None and message.truncated,
            )
        )
    return turns[first:]


def write_turns(path: pathlib.Path, turns: Iterable[Turn]) -> None:
    """Writes turns as rows."""
    write_rows(path, map(dataclasses.asdict, turns))


def read_turns(path: pathlib.Path) -> list[Turn]:
    """Reads the rows of `write_turns`.

    Raises:
        ConfigError: a row is no turn; it names the file, the line and the field.
    """
    names = [field.name for field in dataclasses.fields(Turn)]
    return [from_config_dict(Turn, row, place) for place, row in placed_rows(path, names)]


def paired(turns: Sequence[Turn]) -> tuple[list[Turn], dict[str, int]]:
    """The turns in which both wrote a whole message, and why others are left out."""
    counts: dict[str, int] = {}
    kept = []
    for turn in turns:
        reason = _left_out(turn)
        if reason is None:
            kept.append(turn)
        else:
            counts[reason] = counts.get(reason, 0) + 1
    return kept, counts


def _left_out(turn: Turn) -> str | None:
    if turn.failure:
        return 'the simulator failed'
    if turn.real is None:
        return 'the person left without a word'
    if turn.real_truncated:
        return "the data set cut the person's message"
    if turn.replayed and not (turn.simulated or '').strip():
        return 'the simulator ended without a word' if turn.ended else "the simulator's message is empty"
    return None
