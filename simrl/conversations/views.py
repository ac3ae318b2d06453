"""Conversations as rows of tokens, with the speaker of each token and a mask of trained tokens.

Two views of one conversation:
- natural: each role speaks under its own header. The system text is the template's default, or the user's intent.
- swapped: roles are exchanged, so that a prompted model plays the user under the assistant's header. The system text is
  the role-play text. With the opening in it, the first rendered message is the assistant's reply (number 1).

In both views messages are numbered from the user's opening (0), `role` is the speaker whatever the header, and contents
are the same ids, unless the template's headers make a text be encoded in several ways (`Chat.elsewhere`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from simrl.conversations.chat import ROLE_CODES, TEMPLATE, Chat, EncodingError, Header
from simrl.conversations.records import Conversation, End, Message, Preference

View = Literal['natural', 'swapped']
OnLong = Literal['error', 'cut', 'drop']
# The user's opening: known beforehand, in the swapped view from the system text; a message of its own in either view;
# or trained on, too.
Openings = Literal['given', 'written', 'trained']
System = Callable[[Conversation], str | None]

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
        role: int8 `[N]`, the speaker: USER or ASSISTANT for content and its end-of-turn, TEMPLATE for the rest. The
            end-of-turn of a cut message is TEMPLATE: its speaker did not write it.
        message: int16 `[N]`, number of the token's message; a header belongs to the message after it; -1 before the
            first message.
        trained: bool `[N]`, True for targets of supervised training.
    """

    tokens: np.ndarray
    role: np.ndarray
    message: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, length: int) -> 'Rendered':
        """Returns the first `length` tokens."""
        return Rendered(self.tokens[:length], self.role[:length], self.message[:length], self.trained[:length])


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceRow:
    """Two replies to one prompt, each rendered with the prompt and ending with the reply's end-of-turn."""

    chosen: Rendered
    rejected: Rendered

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
        train: the trained role: its content and the ends of turn that it wrote. None trains nothing.
        end: as in `Conversation`. After 'cut' the last end-of-turn is TEMPLATE, as in truncated messages.
        terminal: True writes the user's terminal token after a natural end; natural view only. It follows the content
            of the user's last message, as a simulator samples it, unless that is truncated. After an assistant's last
            message it is a message of its own, `[terminal, end-of-turn]` under the user's header.
        openings: 'given' and 'written' do not train on the user's opening. 'trained' does, for simulators that open
            conversations themselves; natural view only. In the swapped view a 'written' opening is a message like any
            other; the system text need not contain it.
    """
    _check_alternation(messages)
    if view == 'swapped' and (system is None or (openings != 'written' and messages[0].content not in system)):
        raise ValueError('swapped view: expected a system text that contains the opening, found none or one without it')
    if view == 'swapped' and terminal:
        raise ValueError('terminal token: only the natural view has one; a prompted model ends by its stop sequence')
    if view == 'swapped' and openings == 'trained':
        raise ValueError(
            "swapped view: the opening is in the system text, so expected openings='given', found 'trained'"
        )
    first = 0 if view == 'natural' or openings == 'written' else 1
    ends_here = terminal and end == 'natural'

    tokens = list(chat.system_prefix(system))
    role = [TEMPLATE] * len(tokens)
    message = [-1] * len(tokens)

    def append(number: int, speaker: Header, content: Sequence[int], ends: bool) -> None:
        spoken_as = speaker if view == 'natural' else _OTHER[speaker]
        header = chat.first_header(spoken_as, system) if number == first else chat.header(spoken_as)
        code = ROLE_CODES[speaker]
        if train == speaker:
            chat.check_ends(spoken_as)
        tokens.extend((*header, *content, chat.end_of_turn[spoken_as]))
        role.extend([TEMPLATE] * len(header) + [code] * len(content) + [code if ends else TEMPLATE])
        message.extend([number] * (len(header) + len(content) + 1))

    for number, given in enumerate(messages):
        if number >= first:
            last = number == len(messages) - 1
            speaker: Header = 'assistant' if given.role == 'assistant' else 'user'
            spoken_as = speaker if view == 'natural' else _OTHER[speaker]
            content = chat.encode(given.content, 'first' if number == first and system is not None else spoken_as)
            if last and ends_here and speaker == 'user' and not given.truncated:
                content.append(chat.terminal)
            append(number, speaker, content, not given.truncated and not (last and end == 'cut'))
    if ends_here and messages[-1].role == 'assistant':
        append(len(messages), 'user', [chat.terminal], ends=True)

    roles, numbers = np.array(role, np.int8), np.array(message, np.int16)
    trained = np.zeros(len(tokens), np.bool_)
    if train is not None:
        trained = roles == ROLE_CODES[train]
        if train == 'user' and openings != 'trained':
            trained &= numbers > 0
    return Rendered(np.array(tokens, np.int32), roles, numbers, trained)


def _check_alternation(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError('expected at least one message, found none')
    for i, message in enumerate(messages):
        expected = ('user', 'assistant')[i % 2]
        if message.role != expected:
            raise ValueError(f'message {i}: expected role {expected!r}, found {message.role!r}')


def natural_prompt(chat: Chat, opening: str | None, system: str | None = None) -> Rendered:
    """Renders the natural view before the assistant's first reply: the system text and the opening.

    It ends with the opening's end-of-turn, without the header of the reply. For an assistant the system text is the
    template's default; for a fine-tuned simulator the default or its intent, as in its training rows.

    Args:
        opening: the user's first message; None renders the system text only, for a simulator that writes the opening.
        system: the system text; None keeps the template's default.
    """
    if opening is not None:
        return render(chat, [Message('user', opening)], system=system)
    tokens = np.array(chat.system_prefix(system), np.int32)
    role = np.full(len(tokens), TEMPLATE, np.int8)
    return Rendered(tokens, role, np.full(len(tokens), -1, np.int16), np.zeros(len(tokens), np.bool_))


def swapped_prompt(chat: Chat, role_play: str) -> Rendered:
    """Renders the swapped view before the assistant's first reply: the role-play text with the opening in it.

    It ends with the system message's end-of-turn, without the header of the assistant's reply.
    """
    return natural_prompt(chat, None, role_play)


def default_system(_: Conversation) -> str | None:
    """Keeps the template's default system text."""
    return None


def told_intent(conversation: Conversation) -> str:
    """Uses the intent as the system text; a conversation without one is an error."""
    if conversation.intent is None:
        raise ValueError(f'conversation {conversation.id}: expected an intent, found none')
    return conversation.intent


def user_rows(
    conversations: Iterable[Conversation],
    chat: Chat,
    max_length: int,
    *,
    on_long: OnLong = 'error',
    system: System = default_system,
    view: View = 'natural',
    openings: Openings = 'given',
) -> tuple[list[Rendered], collections.Counter[str]]:
    """Makes rows that train a simulator on people's messages (protocol of arXiv:2605.09808, appendix C).

    Trained tokens are the user's messages with their ends of turn, without a given opening, and in the natural view
    the terminal token of natural ends (see `render`). A conversation's own system message was written for
    the assistant and is left out. Rows end with their last trained token, since no loss depends on later ones.

    Args:
        max_length: most tokens per row.
        on_long: treatment of longer rows: 'error'; 'cut' keeps the whole messages that fit; 'drop'.
        system: function from a conversation to its system text; None keeps the template's default. The swapped view
            needs a text.
        view: of the rows.
        openings: see `render`; 'given' as in the protocol.

    Returns:
        The rows, and counts of cut and dropped rows.
    """

    def row(conversation: Conversation) -> Rendered:
        return render(
            chat,
            conversation.spoken,
            system=system(conversation),
            view=view,
            train='user',
            end=conversation.end,
            terminal=view == 'natural',
            openings=openings,
        )

    return _rows(conversations, row, max_length, on_long)


def assistant_rows(
    conversations: Iterable[Conversation], chat: Chat, max_length: int, *, on_long: OnLong = 'error'
) -> tuple[list[Rendered], collections.Counter[str]]:
    """Makes rows that train an assistant on all its messages: natural view, own system text or the default.

    Arguments and results as in `user_rows`. A conversation with a system text is dropped if the template has no place
    for one.
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
        try:
            row = _until_last_trained(render_row(conversation))
        except EncodingError as error:
            raise ValueError(f'conversation {conversation.id}: {error}') from error
        if len(row) > max_length:
            if on_long == 'error':
                raise ValueError(
                    f'conversation {conversation.id}: expected at most max_length={max_length} tokens, found '
                    f"{len(row)}; on_long='cut' keeps the whole messages that fit, 'drop' drops it"
                )
            if on_long == 'drop':
                counts[TOO_LONG] += 1
                continue
            # Drop the first message that exceeds max_length, and all later ones.
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
    """Renders both replies of each pair after the prompt, for a reward read at the last token.

    A pair with a system text is dropped if the template has no place for one.

    Args:
        max_length: most tokens per row, prompt and reply.
        on_long: treatment of pairs with a longer row: 'error' or 'drop'.

    Returns:
        The rows, and counts of dropped pairs.
    """
    rows: list[PreferenceRow] = []
    counts: collections.Counter[str] = collections.Counter()
    for preference in preferences:
        system = preference.prompt[0].content if preference.prompt[0].role == 'system' else None
        if system is not None and chat.system_header is None:
            counts[NO_SYSTEM] += 1
            continue
        prompt = [message for message in preference.prompt if message.role != 'system']
        try:
            chosen, rejected = (
                render(chat, [*prompt, Message('assistant', reply)], system=system)
                for reply in (preference.chosen, preference.rejected)
            )
        except EncodingError as error:
            raise ValueError(f'preference {preference.id}: {error}') from error
        row = PreferenceRow(chosen, rejected)
        if len(row) <= max_length:
            rows.append(row)
        elif on_long == 'drop':
            counts[TOO_LONG] += 1
        else:
            raise ValueError(
                f'preference {preference.id}: expected at most max_length={max_length} tokens, found {len(row)}; '
                "on_long='drop' drops it"
            )
    return rows, counts
