"""Texts of others inside prompts, so that nothing in them can pose as a part of the prompt.

`as_json` writes them as JSON strings. Characters with which special tokens of chat templates begin are written as
escapes, too: a server that finds special tokens in text finds none here. `SpecialTexts` finds such text where a prompt
is sent as it is.
"""

import collections
import json
import re
from collections.abc import Sequence

from simrl.conversations.chat import Chat

# Beginnings of special tokens: <|im_end|>, </s>, [INST]; and line separators that JSON leaves as they are.
ESCAPED = re.compile('<|\\[(?=/?[A-Z_]+\\])|[\x7f-\x9f\u2028\u2029]')


def escape(text: str) -> str:
    """Writes the beginnings of special tokens in a text as JSON escapes."""
    return ESCAPED.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def as_json(value: object, *, indent: int | None = None) -> str:
    """Writes a JSON value, without `indent` on one line, with escapes. Decoding restores every text."""
    return escape(json.dumps(value, ensure_ascii=False, indent=indent))


class SpecialTexts:
    """The texts of a chat's special tokens, the terminal token included."""

    def __init__(self, chat: Chat) -> None:
        ids = [*sorted(chat.reserved), chat.terminal]
        self._texts = {token: text for token in ids if (text := chat.decode([token])).strip()}
        longest_first = sorted(self._texts.values(), key=len, reverse=True)
        self._pattern = re.compile('|'.join(map(re.escape, longest_first)))

    def first(self, text: str) -> str | None:
        """The first text of a special token in a text."""
        found = self._pattern.search(text)
        return None if found is None else found[0]

    def in_content(self, tokens: Sequence[int], text: str) -> str | None:
        """A special token's text that tokens decode to where none of them is that token.

        Args:
            text: the decoded tokens.
        """
        meant = collections.Counter(self._texts[token] for token in tokens if token in self._texts)
        found = collections.Counter(self._pattern.findall(text))
        return next((special for special in found if found[special] != meant[special]), None)
