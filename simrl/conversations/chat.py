"""A chat template as constant token runs around messages: conversations are built token by token.

1. The template is rendered with probe messages. The text around them gives the headers and ends of turn.
2. Rendering message by message must equal the template's rendering of the whole, token for token, or it is an error.
3. In message text special tokens are plain text, and so are the added tokens that the template writes.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
import transformers

PAD, TEMPLATE, USER, ASSISTANT = 0, 1, 2, 3  # roles of tokens, int8: the speaker, or padding or template

Header = Literal['user', 'assistant']
Rewrites = Literal['error', 'keep', 'omit']

ROLE_CODES: Mapping[str, int] = {'user': USER, 'assistant': ASSISTANT}
TERMINAL_TEXT = '<|endconversation|>'  # name of the added terminal token; in a message it is plain text


class EncodingError(ValueError):
    """A text with a character that the tokenizer has no token for."""

    def __init__(self, text: str, character: str) -> None:
        code = f' (U+{ord(character):04X})' if len(character) == 1 else ''
        super().__init__(f'cannot encode {_shown(text)}: the tokenizer has no token for {_shown(character)}{code}')


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
        known: characters that `check` found to have tokens.
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
    known: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)

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
        """Encodes a message's text. A character that the tokenizer has no token for is an `EncodingError`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which tokenizers refuse in ways of their own
            raise EncodingError(text, text[error.start]) from None
        ids = self.tokenizer.encode(text)
        if not self.reserved.isdisjoint(ids):
            unknown = (part for part in text if not self.reserved.isdisjoint(self.tokenizer.encode(part)))
            raise EncodingError(text, next(unknown, text))
        return ids

    def check(self, text: str) -> None:
        """Raises the `EncodingError` that `encode` would; texts of known characters are not encoded."""
        new = set(text) - self.known
        if new:
            try:
                self.encode(''.join(sorted(new)))
            except EncodingError:  # the text decides: a tokenizer may know words and not their letters
                self.encode(text)
            self.known.update(new)

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
                try:
                    ids = self.encode(before + text + after)
                except EncodingError:
                    self.encode(text)
                    continue  # no model writes it between these
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
    """A fast Hugging Face tokenizer as a `Tokenizer`.

    Content is encoded as by `encode(text, split_special_tokens=True)`: only special tokens are plain text.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, lead: str = '', template_ids: Iterable[int] = ()
    ) -> None:
        """Copies the tokenizer for content.

        Args:
            tokenizer: a fast tokenizer.
            lead: text, usually one space, that the template puts before content and the tokenizer joins with it.
            template_ids: ids that the template writes; added tokens among them are treated as special.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise ValueError(f'{_name(tokenizer)}: expected a fast tokenizer, found {type(tokenizer).__name__}')
        state = json.loads(backend.to_str())
        state |= {'post_processor': None, 'truncation': None, 'padding': None}
        self.added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        special = {*tokenizer.all_special_ids, *template_ids}
        for token in state['added_tokens']:
            token['special'] = token['special'] or token['id'] in special
        self.special = frozenset(token['id'] for token in state['added_tokens'] if token['special'])
        ids = set(tokenizer.get_vocab().values())
        self.size = max(ids) + 1
        unknown = state['model'].get('unk_id'), backend.token_to_id(state['model'].get('unk_token') or '')
        # Ids of no token, and of the unknown token.
        self.without_text = frozenset(set(range(self.size)) - ids | {i for i in unknown if i is not None})
        self.lead = lead
        self._whole = tokenizer
        self._content = tokenizers.Tokenizer.from_str(json.dumps(state))
        self._content.encode_special_tokens = True
        self._model = state['model']['type']
        self._kept: set[str] = set()  # characters that are not dropped

    def encode(self, text: str) -> list[int]:
        # A BPE drops bytes that its vocabulary lacks. Other models have an unknown token.
        if self._model == 'BPE' and not self._kept.issuperset(text):
            self._check(text)
        return self.encode_unchecked(text)

    def _check(self, text: str) -> None:
        """Raises an error for a character that does not come back from its tokens."""
        for character in dict.fromkeys(text):
            if character not in self._kept:
                decoded = self.decode(self.encode_unchecked(f'0{character}0'))  # some decoders strip outer spaces
                normalizer = self._content.normalizer
                normalized = character if normalizer is None else normalizer.normalize_str(character)
                if character not in decoded and normalized not in decoded:
                    raise EncodingError(text, character)
                self._kept.add(character)

    def encode_unchecked(self, text: str) -> list[int]:
        """Encodes a text without what the vocabulary lacks."""
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
    with_system = plain
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
    # Text must not pose as a header, even where the tokenizer does not call its tokens special. A think block that is
    # only written before a reply is ordinary text elsewhere.
    history = [dataclasses.replace(survey, generated='') for survey in (plain, with_system)]
    runs = [run for survey in history for run in dataclasses.astuple(survey)]
    written = {i for run in runs for i in content.encode_template(run)}
    if not content.special.issuperset(written & content.added.keys()):
        content = HuggingFaceTokenizer(tokenizer, lead, written)
    return Chat(
        tokenizer=content,
        end_of_turn={'user': user_end, 'assistant': assistant_end},
        headers={'user': tuple(user_header), 'assistant': tuple(assistant_header)},
        first_headers={'user': tuple(user_header[len(footer) :]), 'assistant': tuple(assistant_header[len(footer) :])},
        default_prefix=tuple(opening[: len(opening) - common]),
        system_header=system_header,
        system_end=system_end,
        no_system_reason=reason,
        reserved=_reserved(name, content),
    )


def _reserved(name: str, content: HuggingFaceTokenizer) -> frozenset[int]:
    """Ids that no text encodes to; checks that no text encodes to a special token."""
    for i in sorted(content.special):
        text = content.added[i].content
        if any(i in content.encode_unchecked(written) for written in (text, f'a{text}b', f' {text} ')):
            raise ValueError(f'{name}: the text {text!r} in a message would become the special token {i}')
    return content.special | content.without_text


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
    except Exception as error:  # a template's code may raise anything: TypeError, RecursionError
        roles = ', '.join(message['role'] for message in messages)
        raise ValueError(
            f'{_name(tokenizer)}: the chat template refuses messages by {roles}: {type(error).__name__}: {error}'
        ) from error
    runs: list[str] = []
    ids: list[int] = []
    cursor = 0
    for message in messages:
        found = text.find(message['content'], cursor)
        if found < 0 or text.count(message['content']) != 1:
            raise ValueError(f'{_name(tokenizer)}: the chat template drops, repeats or moves a message: {text!r}')
        runs.append(text[cursor:found].removesuffix(content.lead))
        ids += content.encode_template(runs[-1]) + content.encode_unchecked(message['content'])
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
