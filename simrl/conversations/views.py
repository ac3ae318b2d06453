"""Conversations as rows of tokens, with who spoke each one and which ones are trained on.

Two views of one conversation:
- natural: everyone speaks under their own header; the system text is the template's default, or the user's intent.
- swapped: roles exchanged, so that a prompted model plays the user under the assistant's header. The system text is the
  role-play text with the opening in it, so the first rendered message is the assistant's reply (number 1).

In both, messages are numbered from the user's opening (0), `role` says who spoke whatever the header, and contents are
the same ids.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from simrl.conversations.chat import ROLE_CODES, TEMPLATE, Chat, Header
from simrl.conversations.records import Conversation, End, Message, Preference

View = Literal['natural', 'swapped']
OnLong = Literal['error', 'cut', 'drop']
Openings = Literal['given', 'trained']

NOTHING_TO_TRAIN_ON = 'dropped: nothing to train on'
CUT = 'cut to the whole messages that fit'
TOO_LONG = 'dropped: longer than max_length'
NO_SYSTEM = 'dropped: has a system text, for which the chat template has no place'

_OTHER: dict[Header, Header] = {'user': 'assistant', 'assistant': 'user'}


@dataclasses.dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation, or the start of one, as N tokens.

    Attributes:
        tokens: int32 `[N]`.
        role: int8 `[N]`, who spoke: USER or ASSISTANT for content and the end-of-turn that ends it, TEMPLATE for the
            rest. An end-of-turn that its speaker did not mean (a cut message) is TEMPLATE.
        message: int16 `[N]`, the number of the message that a token belongs to, headers to the message that they open;
            -1 before the first.
        trained: bool `[N]`, whether the token is a target of supervised training.
    """

    tokens: np.ndarray
    role: np.ndarray
    message: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, length: int) -> 'Rendered':
        """The first `length` tokens."""
        return Rendered(self.tokens[:length], self.role[:length], self.message[:length], self.trained[:length])


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceRow:
    """Two replies to one prompt, each rendered with the prompt and ending with the reply's end-of-turn."""

    chosen: Rendered
    rejected: Rendered
    opening: str  # pairs that share it are not independent

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def render(
    chat: Chat,
    messages: Sequence[Message],
    *,
    system: str | None,
    view: View = 'natural',
    train: Header | None = None,
    end: End = 'unknown',
    terminal: bool = False,
    openings: Openings = 'given',
) -> Rendered:
    """Renders messages that alternate from the user's opening.

    Args:
        system: the system text; None keeps the template's default. The swapped view needs one, with the opening in it.
        train: whose tokens are trained on: content and meant ends of turn.
        end: how the conversation ended. After 'cut' the last end-of-turn is nobody's; so is that of every message that
            is truncated.
        terminal: natural view: write the user's terminal token where the end is natural. It follows the content of the
            user's last message, as a simulator samples it, unless that is truncated; where the assistant spoke last it
            is a turn of its own, `[terminal, end-of-turn]` under the user's header.
        openings: whether the user's opening is 'given', and not trained on, or 'trained' as the user's other messages
            are, for simulators that open conversations themselves. The swapped view has only given ones.
    """
    _check_alternation(messages)
    if view == 'swapped' and (system is None or messages[0].content not in system):
        raise ValueError('swapped view: expected a system text that holds the opening, found none or one without it')
    if view == 'swapped' and terminal:
        raise ValueError(
            'terminal turn: only the natural view has one; a prompted model ends by the text of its signal'
        )
    if view == 'swapped' and openings == 'trained':
        raise ValueError(
            "swapped view: the opening is in the system text, so expected openings='given', found 'trained'"
        )
    first = 0 if view == 'natural' else 1
    ends_here = terminal and end == 'natural'

    tokens = list(chat.system_prefix(system))
    role = [TEMPLATE] * len(tokens)
    message = [-1] * len(tokens)

    def append(number: int, speaker: Header, content: Sequence[int], ends: bool) -> None:
        spoken_as = speaker if view == 'natural' else _OTHER[speaker]
        header = chat.first_header(spoken_as, system) if number == first else chat.header(spoken_as)
        code = ROLE_CODES[speaker]
        tokens.extend((*header, *content, chat.end_of_turn[spoken_as]))
        role.extend([TEMPLATE] * len(header) + [code] * len(content) + [code if ends else TEMPLATE])
        message.extend([number] * (len(header) + len(content) + 1))

    for number, turn in enumerate(messages):
        if number >= first:
            last = number == len(messages) - 1
            speaker: Header = 'assistant' if turn.role == 'assistant' else 'user'
            content = chat.encode(turn.content)
            if last and ends_here and speaker == 'user' and not turn.truncated:
                content.append(chat.terminal)
            append(number, speaker, content, not turn.truncated and not (last and end == 'cut'))
    if ends_here and messages[-1].role == 'assistant':
        append(len(messages), 'user', [chat.terminal], ends=True)

    roles, numbers = np.array(role, np.int8), np.array(message, np.int16)
    trained = np.zeros(len(tokens), np.bool_)
    if train is not None:
        trained = roles == ROLE_CODES[train]
        if train == 'user' and openings == 'given':
            trained &= numbers > 0
    return Rendered(np.array(tokens, np.int32), roles, numbers, trained)


def _check_alternation(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError('expected at least one message, found none')
    for i, turn in enumerate(messages):
        expected = ('user', 'assistant')[i % 2]
        if turn.role != expected:
            raise ValueError(f'message {i}: expected role {expected!r}, found {turn.role!r}')


def natural_prompt(chat: Chat, opening: str | None, system: str | None = None) -> Rendered:
    """What the natural view holds before the assistant's first reply: the system text and the opening.

    It ends with the opening's end-of-turn; the header of the reply is to follow. An assistant's has the template's
    default system text; a fine-tuned simulator's has the same, or its intent, as in the rows that it was trained on.

    Args:
        opening: the user's first message; None leaves only what precedes it, for a simulator that writes it.
        system: the system text; None keeps the template's default.
    """
    if opening is not None:
        return render(chat, [Message('user', opening)], system=system)
    tokens = np.array(chat.system_prefix(system), np.int32)
    role = np.full(len(tokens), TEMPLATE, np.int8)
    return Rendered(tokens, role, np.full(len(tokens), -1, np.int16), np.zeros(len(tokens), np.bool_))


def swapped_prompt(chat: Chat, role_play: str) -> Rendered:
    """What the swapped view holds before the assistant's first reply: the role-play text with the opening in it.

    It ends with the system message's end-of-turn; the user's header, with the assistant's reply, is to follow.
    """
    return natural_prompt(chat, None, role_play)


def user_rows(
    conversations: Iterable[Conversation],
    chat: Chat,
    max_length: int,
    *,
    on_long: OnLong = 'error',
    intents: bool = False,
    openings: Openings = 'given',
) -> tuple[list[Rendered], collections.Counter[str]]:
    """Rows that teach a simulator to speak as people did (protocol of arXiv:2605.09808, appendix C).

    Natural view; trained on are the user's turns, without a given opening, with their ends of turn, and the terminal
    token of natural ends: in the user's last turn, or in one of its own after the assistant's. A conversation's own
    system message was the assistant's and is not shown. What follows the last trained token is left off, since nothing
    depends on it.

    Args:
        max_length: tokens of a row.
        on_long: what to do with a longer row: 'error'; 'cut' to the whole messages that fit; or 'drop'.
        intents: the intent is the system text; a conversation without one is an error. False keeps the default text.
        openings: 'given', as in the protocol, or 'trained', for a simulator that opens conversations itself.

    Returns:
        The rows, and counts of what was cut or dropped.
    """

    def row(conversation: Conversation) -> Rendered:
        if intents and conversation.intent is None:
            raise ValueError(f'conversation {conversation.id}: expected an intent, found none')
        return render(
            chat,
            conversation.spoken,
            system=conversation.intent if intents else None,
            train='user',
            end=conversation.end,
            terminal=True,
            openings=openings,
        )

    return _rows(conversations, row, max_length, on_long)


def assistant_rows(
    conversations: Iterable[Conversation], chat: Chat, max_length: int, *, on_long: OnLong = 'error'
) -> tuple[list[Rendered], collections.Counter[str]]:
    """Rows that teach an assistant: natural view, the conversation's own system text or the default, all its turns.

    Arguments and results as of `user_rows`. A conversation whose system text the template has no place for is dropped.
    """

    def row(conversation: Conversation) -> Rendered:
        return render(chat, conversation.spoken, system=conversation.system, train='assistant', end=conversation.end)

    given = list(conversations)
    shown = [conversation for conversation in given if chat.system_header is not None or conversation.system is None]
    rows, counts = _rows(shown, row, max_length, on_long)
    if len(shown) < len(given):
        counts[NO_SYSTEM] = len(given) - len(shown)
    return rows, counts


def _rows(
    conversations: Iterable[Conversation],
    render_row: Callable[[Conversation], Rendered],
    max_length: int,
    on_long: OnLong,
) -> tuple[list[Rendered], collections.Counter[str]]:
    rows: list[Rendered] = []
    counts: collections.Counter[str] = collections.Counter()
    for conversation in conversations:
        row = _until_last_trained(render_row(conversation))
        if len(row) > max_length:
            if on_long == 'error':
                raise ValueError(
                    f'conversation {conversation.id}: expected at most max_length={max_length} tokens, found '
                    f"{len(row)}; on_long='cut' keeps the whole messages that fit, 'drop' leaves it out"
                )
            if on_long == 'drop':
                counts[TOO_LONG] += 1
                continue
            # The message that holds the first token too many is left off with all that follow.
            row = _until_last_trained(row.first(int(np.argmax(row.message == row.message[max_length]))))
            if len(row):
                counts[CUT] += 1
        if len(row):
            rows.append(row)
        else:
            counts[NOTHING_TO_TRAIN_ON] += 1
    return rows, counts


def _until_last_trained(row: Rendered) -> Rendered:
    trained = np.flatnonzero(row.trained)
    return row.first(int(trained[-1]) + 1 if len(trained) else 0)


def preference_rows(
    preferences: Iterable[Preference], chat: Chat, max_length: int, *, on_long: Literal['error', 'drop'] = 'error'
) -> tuple[list[PreferenceRow], collections.Counter[str]]:
    """Both replies of each pair rendered after the prompt, for a reward read at the last token.

    A pair whose system text the template has no place for is dropped.

    Args:
        max_length: tokens of either reply's row.
        on_long: what to do with a pair of which one row is longer: 'error' or 'drop'.

    Returns:
        The rows, and counts of what was dropped.
    """
    rows: list[PreferenceRow] = []
    counts: collections.Counter[str] = collections.Counter()
    for preference in preferences:
        system = preference.prompt[0].content if preference.prompt[0].role == 'system' else None
        if system is not None and chat.system_header is None:
            counts[NO_SYSTEM] += 1
            continue
        prompt = [turn for turn in preference.prompt if turn.role != 'system']
        chosen, rejected = (
            render(chat, [*prompt, Message('assistant', reply)], system=system)
            for reply in (preference.chosen, preference.rejected)
        )
        row = PreferenceRow(chosen, rejected, preference.opening)
        if len(row) <= max_length:
            rows.append(row)
        elif on_long == 'drop':
            counts[TOO_LONG] += 1
        else:
            raise ValueError(
                f'preference {preference.id}: expected at most max_length={max_length} tokens, found {len(row)}; '
                "on_long='drop' leaves it out"
            )
    return rows, counts
