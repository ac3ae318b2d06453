"""Sampled ids in, their text out, in pieces that never change later; each id costs the same, however many there were.

1. `IncrementalDecoder` decodes a window of the last ids and hands out what no later id changes.
2. `AnswerText` is the text of an answer: it ends at a stop text, and special tokens are left out or written out.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from simrl.conversations.chat import Chat
from simrl.conversations.huggingface_tokenizer import HuggingFaceTokenizer

INCOMPLETE = '\N{REPLACEMENT CHARACTER}'  # what decoding makes of a character whose last bytes are still to come
# Ids that decide how the next ones are decoded. A character has up to four bytes; some decoders strip a space from the
# first id, or join an id with the one before.
CONTEXT = 8


class IncrementalDecoder:
    """The text of a growing list of ids, as `Chat.decode` gives it for all of them.

    What later ids may change is kept back: a character of which bytes are missing, a run of ids of bytes where the
    tokenizer decodes runs as a whole, and space that the decoder removes at the end.
    """

    def __init__(self, chat: Chat, after: Sequence[int] = ()) -> None:
        """Starts with no text.

        Args:
            after: ids before the text, which it continues; none where it starts anew.
        """
        if after and isinstance(chat.tokenizer, HuggingFaceTokenizer):  # of a completion no space is the template's
            chat = dataclasses.replace(chat, tokenizer=chat.tokenizer.stripping('', ''))
        self._chat = chat
        self._context = CONTEXT + len(chat.tokenizer.decoded_trail)
        start = max(len(after) - self._context, 0)
        while start and after[start] in chat.tokenizer.byte_ids:
            start -= 1
        self._ids: list[int] = []
        self._ready = 0  # number of `_ids` up to the last that ends a run
        self._shown = 0  # characters of `_ids` that were handed out
        self.push(after[start:])
        if not (before := chat.decode(self._ids)).endswith(INCOMPLETE):
            self._shown = len(before)

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids. Returns the text that is new and final."""
        before = self._ready
        for i in ids:
            self._ids.append(i)
            if i not in self._chat.tokenizer.byte_ids:
                self._ready = len(self._ids)
        if self._ready == before:
            return ''
        text = self._final()
        new = text[self._shown :]
        self._shown += len(new)
        if self._ready > 2 * self._context:
            kept = self._shown - len(text)
            del self._ids[: self._ready - self._context]
            self._ready = self._context
            self._shown = len(self._final()) + kept
        return new

    def rest(self) -> str:
        """The text that was kept back, as it is if no id follows."""
        return self._chat.decode(self._ids)[self._shown :]

    def _final(self) -> str:
        """The text of the ids that are ready, without an end that may change."""
        text = self._chat.decode(self._ids[: self._ready]).removesuffix(INCOMPLETE)
        trail = self._chat.tokenizer.decoded_trail
        return text[: len(text) - overlap(text, trail)]


class AnswerText:
    """The text of an answer, of which what may become a stop text is kept back.

    The answer ends at the first character at which its text contains a stop text, so that neither the order of the stop
    texts nor how the text is cut into tokens matters. Of those that end there it is the longest.

    Attributes:
        stop: the stop text that was found; None before.
        num_ids: ids that were taken; after a stop text was found, the ids up to the one that completed it.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        keep_special: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        """Starts with no text.

        Args:
            stop: texts that end the answer.
            keep_stop: whether the stop text, or the id that ended the answer, is part of the text.
            keep_special: whether special tokens (`Chat.reserved` and the terminal token) are.
            after: ids before the text, which it continues, as a completion its prompt; none for a message.

        Raises:
            ValueError: an empty stop text.
        """
        if '' in stop:
            raise ValueError('stop: expected texts, found an empty one')
        self.stop: str | None = None
        self.num_ids = 0
        self._chat, self._stops = chat, tuple(stop)
        self._keep_stop, self._keep_special = keep_stop, keep_special
        self._decoder = IncrementalDecoder(chat, self._with_text(after))
        self._held = ''  # may become a stop text

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids, without the id that ends the answer. Returns the text that is new.

        Ids after a stop text are left out.
        """
        new = ''
        for part in ([i] for i in ids) if self._stops else (ids,):
            if self.stop is None:
                self.num_ids += len(part)
                new += self._until_stop(self._decoder.push(self._with_text(part)))
        return new

    def close(self, end: int | None = None) -> str:
        """Ends the answer. Returns the rest of its text, in which a stop text may be found yet.

        Args:
            end: the id that ended it; None where none did.
        """
        if self.stop is not None:
            return ''
        new = ''
        if end is not None:
            of_text = [end] if self._keep_stop and end < self._chat.size else []
            of_text = of_text or (self._with_text([end]) if self._is_special(end) else [])
            new = self._until_stop(self._decoder.push(of_text))
        new += self._until_stop(self._decoder.rest()) if self.stop is None else ''
        new, self._held = new + self._held, ''
        return new

    def _is_special(self, i: int) -> bool:
        return i in self._chat.reserved or i >= self._chat.tokenizer.size

    def _with_text(self, ids: Iterable[int]) -> list[int]:
        """The ids that are part of the text and have some."""
        return [
            i
            for i in ids
            if not self._is_special(i) or (self._keep_special and i < self._chat.size and self._chat.decode([i]))
        ]

    def _until_stop(self, text: str) -> str:
        """Appends a text. Returns what is new of the answer."""
        text = self._held + text
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, _, self.stop = min(ends)
            self._held = ''
            return text[: end if self._keep_stop else end - len(self.stop)]
        size = len(text) - max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[size:]
        return text[:size]


def overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that another one, which is longer, starts with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
