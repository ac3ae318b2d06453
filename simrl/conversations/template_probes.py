"""Probes of a chat template: dialogues in, the texts that the template writes around their messages out.

1. `Template.of` takes a tokenizer's template and pins today's date in it.
2. `render_probes` renders dialogues of probe messages and cuts them at the messages.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simrl.conversations.chat import Place
from simrl.conversations.huggingface_tokenizer import name_of

if TYPE_CHECKING:  # importing it takes a second, and the concierge world has no need of it
    import transformers

PROBES = ('Probe one', '2, 3?', 'Über: "x"\n\ny.', '(four)', '漢字 5', '-- six')
SYSTEM_PROBES = ('Say: probe!', 'Be brief')


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template; `text` has the date in it, or reads it as `date_string`."""

    tokenizer: 'transformers.PreTrainedTokenizerBase'
    name: str
    text: str
    date: str | None

    @classmethod
    def of(cls, tokenizer: 'transformers.PreTrainedTokenizerBase', date: str | None) -> 'Template':
        name, text = name_of(tokenizer), getattr(tokenizer, 'chat_template', None)
        if not text:
            raise ValueError(f'{name}: the tokenizer has no chat template')
        if isinstance(text, Mapping):
            if 'default' not in text:
                raise ValueError(f"{name}: expected a chat template named 'default', found {sorted(text)}")
            text = text['default']
        if 'strftime_now' in text and date is None:
            raise ValueError(
                f"{name}: the chat template writes today's date; pin it with `date`, such as '26 Jul 2024'"
            )
        if 'strftime_now' in text:
            text = _pinned(name, text, str(date))
        return cls(tokenizer, name, text, date)

    def render(self, contents: Sequence[str], *, with_system: bool) -> list[str]:
        """Texts before, between and after the messages' contents; `with_system`: the first one is a system text."""
        roles = (['system'] if with_system else []) + [
            ('user', 'assistant')[i % 2] for i in range(len(contents) - with_system)
        ]
        messages = [{'role': role, 'content': content} for role, content in zip(roles, contents, strict=True)]
        dated: dict[str, Any] = {} if self.date is None else {'date_string': self.date}
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=roles[-1] == 'user',
                    enable_thinking=False,
                    **dated,
                )
            )
        except Exception as error:  # a template's code may raise anything: TypeError, RecursionError
            kind = type(error).__name__
            raise ValueError(
                f'{self.name}: the chat template refuses messages by {", ".join(roles)}: {kind}: {error}'
            ) from error
        runs: list[str] = []
        cursor = 0
        for content in contents:
            found = text.find(content, cursor)
            if found < 0 or text.count(content) != 1:
                raise ValueError(f'{self.name}: the chat template drops, repeats or moves a message: {text!r}')
            runs.append(text[cursor:found])
            cursor = found + len(content)
        return [*runs, text[cursor:]]


def _pinned(name: str, template: str, date: str) -> str:
    """A template with the date in place of each call that asks for today's."""
    try:
        day = datetime.datetime.strptime(date, '%d %b %Y')
    except ValueError:
        raise ValueError(f"date: expected one such as '26 Jul 2024', found {date!r}") from None
    call = r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)"""
    pinned = re.sub(call, lambda found: json.dumps(day.strftime(found[1] or found[2] or '')), template)
    if re.search(r'strftime_now\s*\(', pinned):
        raise ValueError(f"{name}: the chat template writes today's date in a format that is not written in it")
    return pinned


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A dialogue and the template's texts around its contents; `with_system`: the first one is a system text."""

    contents: tuple[str, ...]
    runs: tuple[str, ...]
    with_system: bool

    @property
    def places(self) -> list[Place]:
        messages: list[Place] = [('user', 'assistant')[i % 2] for i in range(len(self.contents) - self.with_system)]
        return ['system', 'first', *messages[1:]] if self.with_system else messages


def render_probes(template: Template, with_system: bool) -> list[Rendering]:
    """Renders dialogues of one to five probe messages, so that every position gets different texts."""
    renderings = []
    for length in range(1, 6):
        for start in range(2):
            contents = (*SYSTEM_PROBES[start : start + with_system], *PROBES[start : start + length])
            renderings.append(
                Rendering(contents, tuple(template.render(contents, with_system=with_system)), with_system)
            )
    return renderings
