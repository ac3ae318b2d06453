"""A chat template as constant token runs around messages: conversations are built token by token.

`templates.py` finds the runs of a Hugging Face chat template, `sentencepiece.py` those of models trained from scratch.
In message text special tokens are plain text, and so are the added tokens that the template writes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

PAD, TEMPLATE, USER, ASSISTANT = 0, 1, 2, 3  # roles of tokens, int8: the speaker, or padding or template

Header = Literal['user', 'assistant']
# Where a text is written: under a header, as a system text, or under the user's header right after a given system text.
Place = Literal['user', 'assistant', 'system', 'first']

ROLE_CODES: Mapping[Header, int] = {'user': USER, 'assistant': ASSISTANT}
HEADERS: Mapping[int, Header] = {USER: 'user', ASSISTANT: 'assistant'}  # a role's own, in the natural view
TERMINAL_TEXT = '<|endconversation|>'  # name of the added terminal token; in a message it is plain text


class EncodingError(ValueError):
    """A text with a character that the tokenizer has no token for; `reason` says so without the text."""

    def __init__(self, text: str, character: str) -> None:
        code = f' (U+{ord(character):04X})' if len(character) == 1 else ''
        self.reason = f'the tokenizer has no token for {_shown(character)}{code}'
        super().__init__(f'cannot encode {_shown(text)}: {self.reason}')


class Tokenizer(Protocol):
    """Encodes and decodes text, without headers. No text encodes to a special token.

    Attributes:
        byte_ids: ids of bytes that are decoded together with such ids around them: the text of a run of them is known
            when another id follows.
        decoded_trail: space that `decode` leaves out at the end of a text.
    """

    byte_ids: frozenset[int]
    decoded_trail: str

    @property
    def size(self) -> int:
        """Number of ids; the ids are 0 to size - 1."""

    def encode(self, text: str) -> list[int]: ...

    def encode_raw(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encodes text in which special tokens are special tokens, as the one text of a prompt.

        Args:
            text: of a prompt.
            add_special_tokens: True adds those that the tokenizer puts around a text, such as a beginning.
        """

    def covers(self, text: str) -> bool:
        """Returns True if each character is known to have tokens, whatever its neighbours; False: `encode` decides."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """The token runs of a chat template.

    A conversation is `system_prefix(system)`, then for each message its header, content and end-of-turn. The header of
    the first message is `first_header(role, system)`, the header of later ones `header(role)`. Headers and ends of turn
    depend on the role that the template names; in a swapped view the speaker is the other role.

    Attributes:
        tokenizer: decodes content, and encodes it except in the places of `elsewhere`.
        end_of_turn: id that ends a message, by the role of its header. It is a token of text where the template ends
            the user's messages with text: the first token of that text. No model can speak there.
        headers: run between an end-of-turn and the next content, by the role of the header; it starts with the
            template's text after an end-of-turn.
        first_headers: the same directly after `default_prefix`.
        default_prefix: run before the first header without a given system text: the template's default system message,
            the beginning-of-sequence id, or nothing.
        system_header: run before a given system text; None if the template has no place for one.
        system_end: id that ends the system message: the first token after its text.
        no_system_reason: reason why `system_header` is None; empty otherwise.
        reserved: ids that no text encodes to and no model may sample, except ends of turn.
        elsewhere: encodes content in places where a text has other tokens, as sentencepiece models make of a text that
            follows a space, or other text.
        headers_after_system: run between `system_end` and the content of the first message, where it differs from that
            between later messages.
    """

    tokenizer: Tokenizer
    end_of_turn: Mapping[str, int]
    headers: Mapping[str, tuple[int, ...]]
    first_headers: Mapping[str, tuple[int, ...]]
    default_prefix: tuple[int, ...]
    system_header: tuple[int, ...] | None
    system_end: int
    no_system_reason: str
    reserved: frozenset[int]
    elsewhere: Mapping[Place, Tokenizer] = dataclasses.field(default_factory=dict)
    headers_after_system: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def terminal(self) -> int:
        """Id of the token that simrl adds: a fine-tuned simulator ends a conversation with it."""
        return self.tokenizer.size

    @property
    def size(self) -> int:
        """Number of ids in use, the terminal token included."""
        return self.tokenizer.size + 1

    @property
    def default_system(self) -> str:
        """Text that the template writes before the first message without a given system text; for logging."""
        return self.decode(self.default_prefix)

    @property
    def terminal_start(self) -> int:
        """Id of the token that the terminal token starts as a copy of."""
        return self.end_of_turn['user' if self.ends('user') else 'assistant']

    def ends(self, role: Header) -> bool:
        """Returns True if a token of its own ends the messages under a header; False if text does."""
        return self.end_of_turn[role] in self.reserved

    def check_ends(self, role: Header) -> None:
        """Refuses a header under which no model can end a message."""
        if not self.ends(role):
            raise ValueError(
                f"no model can speak under the {role}'s header: this chat template ends its messages with text "
                f'({self.decode([self.end_of_turn[role]])!r}) and not with a special token'
            )

    def encode(self, text: str, place: Place = 'user') -> list[int]:
        """Encodes a message's text. A character that the tokenizer has no token for is an `EncodingError`."""
        tokenizer = self.elsewhere.get(place, self.tokenizer)
        _check_unicode(text)
        ids = tokenizer.encode(text)
        if not self.reserved.isdisjoint(ids):
            unknown = (part for part in text if not self.reserved.isdisjoint(tokenizer.encode(part)))
            raise EncodingError(text, next(unknown, text))
        return ids

    def encode_raw(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encodes a raw prompt, in which the texts of special tokens and of the terminal token are those tokens.

        Raises:
            EncodingError: half of a surrogate pair.
        """
        _check_unicode(text)
        first, *others = text.split(TERMINAL_TEXT)
        ids = self.tokenizer.encode_raw(first, add_special_tokens)
        for part in others:
            ids += [self.terminal, *self.tokenizer.encode_raw(part, False)]
        return ids

    def check(self, text: str) -> None:
        """Raises the `EncodingError` that `encode` would; most texts need not be encoded for that."""
        if not self.tokenizer.covers(text):
            self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, with special tokens and the terminal token written out."""
        parts: list[str] = []
        start = 0
        values = [int(i) for i in ids]
        for position, value in enumerate([*values, self.terminal]):
            if value > self.terminal or value < 0:
                raise ValueError(f'cannot decode id {value}: expected 0 to {self.terminal}')
            if value == self.terminal:
                parts.append(self.tokenizer.decode(values[start:position]))
                start = position + 1
        return TERMINAL_TEXT.join(parts)

    def header(self, role: Header) -> tuple[int, ...]:
        """Run between the end-of-turn of any message and the content of a message under `role`'s header."""
        return self.headers[role]

    def first_header(self, role: Header, system: str | None = None) -> tuple[int, ...]:
        """Run between `system_prefix(system)` and the content of the first message."""
        if system is None:
            return self.first_headers[role]
        return self.headers_after_system.get(role, self.headers[role])

    def system_prefix(self, system: str | None = None) -> tuple[int, ...]:
        """Run before the first header, including the end-of-turn of the system message.

        Args:
            system: the system text; None keeps the template's default.
        """
        if system is None:
            return self.default_prefix
        if self.system_header is None:
            raise ValueError(
                f'this chat template takes no system text ({self.no_system_reason}), found {_shown(system)}'
            )
        return (*self.system_header, *self.encode(system, 'system'), self.system_end)

    def token_mask(self, num_rows: int, terminal: bool, header: Header | None = None) -> np.ndarray:
        """Mask of the ids that a model may sample, bool `[num_rows]`: text, ends of turn, perhaps the terminal token.

        Args:
            num_rows: rows of the (padded) embedding; at least `size`.
            terminal: True allows the terminal token.
            header: the header under which the model speaks; None allows both ends of turn.
        """
        if num_rows < self.size:
            raise ValueError(f'num_rows: expected at least the {self.size} ids in use, found {num_rows}')
        mask = np.zeros(num_rows, np.bool_)
        mask[: self.tokenizer.size] = True
        mask[list(self.reserved)] = False
        mask[[self.end_of_turn[role] for role in ROLE_CODES if header in (None, role)]] = True
        mask[self.terminal] = terminal
        return mask

    def terminal_runs(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Lists the token runs that end in `text`, a stop sequence of prompted models.

        A tokenizer may join the text's first and last characters with their neighbours, so the text is encoded between
        common characters. A run is the fewest tokens that contain the text; runs that end with another run are left
        out. An encoding that is not listed is found in decoded text only.
        """
        if not text:
            raise ValueError('stop sequence: expected text, found none')
        runs: set[tuple[int, ...]] = set()
        endings: set[tuple[int, ...]] = set()  # from the first token of a run to the last of all: each is cut once
        for before in ('', ' ', '\n', '\n\n', 'a', '.', '. ', '.\n', *'!?)"*[(,:-'):
            for after in ('', '\n', *'.,!?:)]"*', "'"):
                try:
                    ids = self.encode(before + text + after)
                except EncodingError:
                    self.encode(text)
                    continue  # no model writes it between these
                if any(tuple(ids[-len(ending) :]) == ending for ending in endings):
                    continue
                start = len(ids) - 1
                while start > 0 and text not in self.decode(ids[start:]):
                    start -= 1
                endings.add(tuple(ids[start:]))
                stop = len(ids)  # tokens after the text are dropped
                while text in self.decode(ids[start : stop - 1]):
                    stop -= 1
                runs.add(tuple(ids[start:stop]))
        shortest_first = sorted(runs, key=lambda run: (len(run), run))
        kept: list[tuple[int, ...]] = []
        for run in shortest_first:
            if not any(run[-len(other) :] == other for other in kept):
                kept.append(run)
        return tuple(kept)


def _check_unicode(text: str) -> None:
    """Refuses half of a surrogate pair, which tokenizers refuse in ways of their own."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EncodingError(text, text[error.start]) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + '...')
