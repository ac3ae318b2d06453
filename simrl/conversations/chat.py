"""A chat template as constant token runs around messages: conversations are built token by token.

1. The template is rendered with probe messages. The text around them gives the headers and ends of turn.
2. Rendering message by message must equal the template's rendering of the whole, token for token, or it is an error.
3. Message text is encoded without the tokenizer's added tokens: text never becomes a special token.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import jinja2
import numpy as np
import tokenizers
import transformers

PAD, TEMPLATE, USER, ASSISTANT = 0, 1, 2, 3  # roles of tokens, int8: the speaker, or padding or template

Header = Literal['user', 'assistant']
Rewrites = Literal['error', 'keep', 'omit']

ROLE_CODES: Mapping[str, int] = {'user': USER, 'assistant': ASSISTANT}
TERMINAL_TEXT = '<|endconversation|>'  # name of the added terminal token; in a message it is plain text


class Tokenizer(Protocol):
    """Encodes and decodes text, without headers. No text encodes to a special token."""

    @property
    def size(self) -> int:
        """Number of ids; the ids are 0 to size - 1."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """The token runs of a chat template.

    A conversation is `system_prefix(system)`, then for each message its header, content and end-of-turn. The header of
    the first message is `first_header(role, system)`, the header of later ones `header(role)`. Headers and ends of turn
    depend on the role that the template names; in a swapped view the speaker is the other role.

    Attributes:
        tokenizer: encodes and decodes content.
        end_of_turn: id that ends a message, by the role of its header.
        headers: run between an end-of-turn and the next content, by the role of the header; it starts with the
            template's text after an end-of-turn.
        first_headers: the same directly after `default_prefix`.
        default_prefix: run before the first header without a given system text: the template's default system message,
            the beginning-of-sequence id, or nothing.
        system_header: run before a given system text; None if the template has no place for one.
        system_end: id that ends the system message.
        no_system_reason: reason why `system_header` is None; empty otherwise.
        reserved: ids that no text encodes to and no model may sample, except ends of turn.
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

    def encode(self, text: str) -> list[int]:
        """Encodes a message's text. A character that the tokenizer does not know is an error."""
        ids = self.tokenizer.encode(text)
        if not self.reserved.isdisjoint(ids):
            unknown = self.decode([i for i in ids if i in self.reserved][:1])
            raise ValueError(f'cannot encode {_shown(text)}: a part of it has no token of its own, only {unknown!r}')
        return ids

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
        return self.first_headers[role] if system is None else self.headers[role]

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
        return (*self.system_header, *self.encode(system), self.system_end)

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
        for before in ('', ' ', '\n', '\n\n', 'a', '.', '. ', '.\n', *'!?)"*[(,:-'):
            for after in ('', '\n', *'.,!?:)]"*', "'"):
                ids = self.encode(before + text + after)
                start = len(ids) - 1
                while start > 0 and text not in self.decode(ids[start:]):
                    start -= 1
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


class HuggingFaceTokenizer:
    """A fast Hugging Face tokenizer as a `Tokenizer`: content is encoded without its added tokens."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, lead: str = '') -> None:
        """`lead`: text, usually one space, that the template puts before content and the tokenizer joins with it."""
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise ValueError(f'{_name(tokenizer)}: expected a fast tokenizer, found {type(tokenizer).__name__}')
        state = json.loads(backend.to_str())
        state |= {'added_tokens': [], 'post_processor': None, 'truncation': None, 'padding': None}
        self.size = len(tokenizer)
        self.added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        self.lead = lead
        self._whole = tokenizer
        self._content = tokenizers.Tokenizer.from_str(json.dumps(state))

    def encode(self, text: str) -> list[int]:
        return self._content.encode(self.lead + text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Encodes template text, in which special tokens are special tokens."""
        return self._whole.encode(text, add_special_tokens=False) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        text = self._whole.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).removeprefix(self.lead)


def chat_from_huggingface(
    tokenizer: transformers.PreTrainedTokenizerBase, *, rewrites: Rewrites = 'error', date: str | None = None
) -> Chat:
    """Finds the constant runs of a tokenizer's chat template by rendering probes, and checks them against it.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        rewrites: rule for a template whose assistant header before a reply differs from the one in history. Qwen3 with
            thinking off, for example, adds an empty think block before a reply. 'error'; 'keep' uses the header before
            a reply everywhere; 'omit' uses the header in history everywhere.
        date: today's date for templates that write it, such as '26 Jul 2024'; others ignore it.

    Raises:
        ValueError: no template; a template with today's date but no `date`; rewritten history without a rule; message
            ends that are not special tokens; any other difference between rendering by message and as a whole.
    """
    name = _name(tokenizer)
    template = getattr(tokenizer, 'chat_template', None)
    if not template:
        raise ValueError(f'{name}: the tokenizer has no chat template')
    if not isinstance(template, str):
        raise ValueError(f'{name}: expected one chat template, found {sorted(template)}')
    if 'strftime_now' in template and 'date_string' not in template:
        raise ValueError(f"{name}: the chat template writes today's date and reads no date_string that could pin it")
    if 'strftime_now' in template and date is None:
        raise ValueError(f"{name}: the chat template writes today's date; pin it with `date`, such as '26 Jul 2024'")
    if rewrites not in ('error', 'keep', 'omit'):
        raise ValueError(f"rewrites: expected 'error', 'keep' or 'omit', found {rewrites!r}")
    try:
        return _build(tokenizer, rewrites, date, lead='')
    except ValueError as error:
        try:  # sentencepiece tokenizers join a header's last space with the content (Mistral)
            return _build(tokenizer, rewrites, date, lead=' ')
        except ValueError:
            raise error from None


_PROBES = ('Probe one', '2, 3?', 'Über: "x"\n\ny.', '(four)', '漢字 5', '-- six')
_SYSTEM_PROBE = 'Say: probe!'


@dataclasses.dataclass(frozen=True)
class _Survey:
    """The text of a template around messages."""

    before_system: str  # text before the system message; empty without one
    opening: str  # text before the first message, after a given system text
    user: str  # text between an assistant's content and a user's
    assistant: str  # text between a user's content and an assistant's, in history
    generated: str  # text between a user's content and a reply to be generated
    end: str  # text after the last assistant's content


def _build(tokenizer: transformers.PreTrainedTokenizerBase, rewrites: Rewrites, date: str | None, lead: str) -> Chat:
    name = _name(tokenizer)
    content = HuggingFaceTokenizer(tokenizer, lead)
    reserved = _reserved(name, content)
    plain = _survey(tokenizer, content, date, system=None)
    assistant = plain.assistant
    if plain.generated != plain.assistant:
        if rewrites == 'error':
            raise ValueError(
                f'{name}: the chat template rewrites history: before a reply it writes {plain.generated!r}, '
                f"in history {plain.assistant!r}. Set `rewrites` to 'keep' (the first) or 'omit' (the second)"
            )
        if content.encode_template(plain.generated)[:1] != content.encode_template(plain.assistant)[:1]:
            raise ValueError(
                f'{name}: the message before a reply ends with {plain.generated!r}, in history with {plain.assistant!r}'
            )
        assistant = plain.generated if rewrites == 'keep' else plain.assistant

    user_end, *assistant_header = content.encode_template(assistant) or [-1]
    assistant_end, *user_header = content.encode_template(plain.user) or [-1]
    for role, end, run in (('user', user_end, assistant), ('assistant', assistant_end, plain.user)):
        if end not in content.added:
            raise ValueError(f"{name}: expected a special token at the end of the {role}'s message, found {run!r}")
    if content.encode_template(plain.end)[:1] != [assistant_end]:
        raise ValueError(f'{name}: the last message ends with {plain.end!r}, the others with {plain.user!r}')

    # The default prefix is the opening without the header and without the footer, the header's text after end-of-turn.
    opening = content.encode_template(plain.opening)
    common = 0
    while common < min(len(opening), len(user_header)) and opening[-1 - common] == user_header[-1 - common]:
        common += 1
    footer = user_header[: len(user_header) - common]
    if (user_header and not common) or assistant_header[: len(footer)] != footer:
        raise ValueError(
            f'{name}: the first header {plain.opening!r} and later ones {plain.user!r} have no common form'
        )

    system_header: tuple[int, ...] | None = None
    system_end, reason = user_end, ''
    try:
        with_system = _survey(tokenizer, content, date, system=_SYSTEM_PROBE)
    except ValueError as error:
        reason = str(error)
    else:
        after = content.encode_template(with_system.opening)
        around = [dataclasses.replace(survey, before_system='', opening='') for survey in (plain, with_system)]
        if around[0] != around[1]:
            reason = 'it writes other headers when one is given'
        elif after[:1] and after[0] in content.added and after[1:] == user_header:
            system_header, system_end = tuple(content.encode_template(with_system.before_system)), after[0]
        else:
            reason = f'it follows one with {with_system.opening!r}, not with a message of its own'
    return Chat(
        tokenizer=content,
        end_of_turn={'user': user_end, 'assistant': assistant_end},
        headers={'user': tuple(user_header), 'assistant': tuple(assistant_header)},
        first_headers={'user': tuple(user_header[len(footer) :]), 'assistant': tuple(assistant_header[len(footer) :])},
        default_prefix=tuple(opening[: len(opening) - common]),
        system_header=system_header,
        system_end=system_end,
        no_system_reason=reason,
        reserved=reserved,
    )


def _reserved(name: str, content: HuggingFaceTokenizer) -> frozenset[int]:
    """Ids of the added tokens; checks that no text encodes to a special one."""
    ids = sorted(content.added)
    if ids and ids[-1] >= content.size:
        raise ValueError(f'{name}: expected ids below len(tokenizer) = {content.size}, found added token {ids[-1]}')
    reserved = set(ids)
    for i in ids:
        text = content.added[i].content
        if any(i in content.encode(written) for written in (text, f'a{text}b', f' {text} ')):
            if content.added[i].special:
                raise ValueError(f'{name}: the text {text!r} in a message would become the special token {i}')
            reserved.remove(i)  # a plain word listed as added
    return frozenset(reserved)


def _survey(
    tokenizer: transformers.PreTrainedTokenizerBase, content: HuggingFaceTokenizer, date: str | None, system: str | None
) -> _Survey:
    """Renders dialogues of one to five probe messages and returns the text around them, or raises if it varies.

    Each rendering is also tokenised whole and must give the tokens of its parts.
    """
    seen: dict[str, set[str]] = {field.name: set() for field in dataclasses.fields(_Survey)}
    for length in range(1, 6):
        for start in range(2):  # so that every position gets different texts
            dialogue = [
                {'role': ('user', 'assistant')[i % 2], 'content': probe}
                for i, probe in enumerate(_PROBES[start : start + length])
            ]
            if system is not None:
                dialogue.insert(0, {'role': 'system', 'content': system})
            runs = _runs(tokenizer, content, dialogue, date)
            if system is None:
                runs.insert(0, '')
            seen['before_system'].add(runs[0])
            seen['opening'].add(runs[1])
            for i, run in enumerate(runs[2:], start=1):  # run i precedes message i, or is the tail
                if i % 2 == 0:
                    seen['end' if i == length else 'user'].add(run)
                else:  # a template may render the last reply as in history or as a reply to be generated
                    seen['generated' if i >= length - 1 else 'assistant'].add(run)
    if not seen['generated'] <= seen['assistant']:
        seen['generated'] -= seen['assistant']
    for place, found in seen.items():
        if len(found) != 1:
            raise ValueError(
                f'{_name(tokenizer)}: expected the chat template to write the same around every message, found for '
                f'{place!r}: {sorted(found)}'
            )
    return _Survey(**{place: found.pop() for place, found in seen.items()})


def _runs(
    tokenizer: transformers.PreTrainedTokenizerBase,
    content: HuggingFaceTokenizer,
    messages: list[dict[str, str]],
    date: str | None,
) -> list[str]:
    """Texts before, between and after the messages' contents, without the lead, which is part of the content."""
    dated: dict[str, Any] = {} if date is None else {'date_string': date}
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=messages[-1]['role'] == 'user',
                enable_thinking=False,
                **dated,
            )
        )
    except jinja2.TemplateError as error:
        roles = ', '.join(message['role'] for message in messages)
        raise ValueError(f'{_name(tokenizer)}: the chat template refuses messages by {roles}: {error}') from error
    runs: list[str] = []
    ids: list[int] = []
    cursor = 0
    for message in messages:
        found = text.find(message['content'], cursor)
        if found < 0 or text.count(message['content']) != 1:
            raise ValueError(f'{_name(tokenizer)}: the chat template drops, repeats or moves a message: {text!r}')
        runs.append(text[cursor:found].removesuffix(content.lead))
        ids += content.encode_template(runs[-1]) + content.encode(message['content'])
        cursor = found + len(message['content'])
    runs.append(text[cursor:])
    ids += content.encode_template(runs[-1])
    runs[-1] = runs[-1].removesuffix(content.lead)
    whole = content.encode_template(text)
    if whole != ids:
        at = next((i for i, (a, b) in enumerate(zip(whole, ids, strict=False)) if a != b), min(len(whole), len(ids)))
        raise ValueError(
            f'{_name(tokenizer)}: tokens of the whole rendering differ from those of its parts at token {at}, after '
            f'{content.decode(whole[max(0, at - 8) : at])!r}: {whole[at : at + 4]} against {ids[at : at + 4]}'
        )
    return runs


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, 'name_or_path', '') or 'tokenizer'


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + '...')
