"""A fast Hugging Face tokenizer as a `Tokenizer`: content is encoded as in the place where a chat template writes it.

1. In content special tokens are plain text, as in `encode(text, split_special_tokens=True)`.
2. Sentencepiece tokenizers put a space before a text, and join a space before it with its first word. `at` makes the
   tokenizer of a place: what precedes content there decides.
3. The terminal token, which exported models have, is not counted: `Chat` adds it to every vocabulary.
"""

import copy
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from simrl.conversations.chat import TERMINAL_TEXT, EncodingError

if TYPE_CHECKING:  # importing it takes a second, and the concierge world has no need of it
    import transformers

RECENT_TEXTS = 256  # texts whose ids are remembered: an opening is in the prompts of several agents
Spans = list[tuple[int, int, int]]  # tokens: id, and start and end of its text


class HuggingFaceTokenizer:
    """A fast Hugging Face tokenizer, and its copies that encode content."""

    def __init__(self, tokenizer: 'transformers.PreTrainedTokenizerBase', template_ids: Iterable[int] = ()) -> None:
        """Copies the tokenizer for content.

        Args:
            tokenizer: a fast tokenizer.
            template_ids: ids that the template writes; added tokens among them are treated as special.

        Raises:
            ValueError: a slow tokenizer, one with an id of two tokens, or with the terminal token before the end of its
                vocabulary.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise ValueError(f'{name_of(tokenizer)}: expected a fast tokenizer, found {type(tokenizer).__name__}')
        state = json.loads(backend.to_str())
        state |= {'post_processor': None, 'truncation': None, 'padding': None}
        ids = _checked_ids(tokenizer)
        self.size = max(ids) + 1
        self.added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        terminal = terminal_id(tokenizer)
        if terminal is not None:
            if terminal != self.size - 1:
                raise ValueError(
                    f'{name_of(tokenizer)}: expected {TERMINAL_TEXT} as the last token, of id {self.size - 1}, found '
                    f'it as {terminal}'
                )
            self.size = terminal
            del self.added[terminal]
        special = {*tokenizer.all_special_ids, *template_ids}
        for token in state['added_tokens']:
            token['special'] = token['special'] or token['id'] in special
        self.special = frozenset(token['id'] for token in state['added_tokens'] if token['special']) - {terminal}
        unknown = state['model'].get('unk_id'), backend.token_to_id(state['model'].get('unk_token') or '')
        # Ids of no token, and of the unknown token.
        self.without_text = frozenset(set(range(self.size)) - ids | {i for i in unknown if i is not None})
        has_bytes = 'ByteFallback' in json.dumps(state['decoder'])
        pieces = tokenizer.get_vocab() if has_bytes else {}
        self.byte_ids = frozenset(i for piece, i in pieces.items() if re.fullmatch('<0x[0-9A-Fa-f]{2}>', piece))
        self.lead = self.trail = self._strip_lead = self.decoded_trail = ''
        self.inside = False
        self._whole = tokenizer
        self._alone = _text_tokenizer(state)
        inner = state | {key: _without_prefix(state[key]) for key in ('normalizer', 'pre_tokenizer')}
        self.has_prefix = inner != state  # whether it puts a space before a text
        self._inside = _text_tokenizer(inner) if self.has_prefix else self._alone
        self._model = state['model']['type']
        self._kept: set[str] = set()  # characters that are not dropped
        self._ids = functools.lru_cache(RECENT_TEXTS)(self._encode)

    def at(self, lead: str = '', trail: str = '', *, inside: bool = False) -> 'HuggingFaceTokenizer':
        """The tokenizer of a place.

        Args:
            lead: text, usually one space, that the template writes before content and the tokenizer joins with it.
            trail: space that the template writes after content, before a special token.
            inside: True where other text precedes, so that the tokenizer puts no space before the content.
        """
        place = copy.copy(self)
        place.lead, place.trail, place.inside = lead, trail, inside
        return place.stripping(lead, trail)

    def stripping(self, lead: str, trail: str) -> 'HuggingFaceTokenizer':
        """The same; decoding leaves out these spaces before and after a content."""
        made = copy.copy(self)
        made._strip_lead, made.decoded_trail = lead, trail
        return made

    def encodes_as(self, other: 'HuggingFaceTokenizer') -> bool:
        """Returns True if the other place gives every text the same tokens."""
        return (self.lead, self.trail, self.inside) == (other.lead, other.trail, other.inside)

    @property
    def _content(self) -> tokenizers.Tokenizer:
        return self._inside if self.inside else self._alone

    def encode(self, text: str) -> list[int]:
        # A BPE drops bytes that its vocabulary lacks. Other models have an unknown token.
        if self._model == 'BPE' and not self.covers(text):
            self._check(text)
        return self.encode_unchecked(text)

    def encode_raw(self, text: str, add_special_tokens: bool) -> list[int]:
        found = self._whole(text, add_special_tokens=add_special_tokens, verbose=False)  # of long texts
        return [int(i) for i in found['input_ids']]

    def covers(self, text: str) -> bool:
        return self._model == 'BPE' and self._kept.issuperset(text)

    def _check(self, text: str) -> None:
        """Raises an error for a character that does not come back from its tokens."""
        for character in dict.fromkeys(text):
            if character not in self._kept:
                probe = f'0{character}0'  # some decoders strip outer spaces
                ids, normalizer = self.encode_unchecked(probe), self._content.normalizer
                normalized = probe if normalizer is None else normalizer.normalize_str(probe)
                wanted = {probe, normalized, normalized.removeprefix('▁')} - {'00'}  # some put a space before texts,
                wanted |= {x.replace(' ', '') for x in wanted} - {'00'}  # and some between tokens
                decoded = self.decode(ids).removeprefix(' ')
                if not self.without_text.isdisjoint(ids) or wanted.isdisjoint({decoded, decoded.replace(' ', '')}):
                    raise EncodingError(text, character)
                self._kept.add(character)

    def encode_unchecked(self, text: str) -> list[int]:
        """Encodes a text without what the vocabulary lacks."""
        return list(self._ids(self.lead + text + self.trail, self.inside))

    def _encode(self, text: str, inside: bool) -> list[int]:
        """The same for all places, which share the texts that are remembered."""
        return (self._inside if inside else self._alone).encode(text, add_special_tokens=False).ids

    def content_spans(self, text: str) -> Spans:
        """The tokens of content with its lead and trail."""
        encoding = self._content.encode(self.lead + text + self.trail, add_special_tokens=False)
        return _spans(encoding.ids, encoding.offsets)

    def to_json(self) -> str:
        """The tokenizer's description, as of a `tokenizer.json`."""
        return str(self._alone.to_str())

    def encode_template(self, text: str, *, inside: bool = False) -> list[int]:
        """Encodes template text, in which special tokens are special tokens.

        Args:
            text: of the template.
            inside: True where content precedes.
        """
        return [i for i, *_ in self.template_spans(text, inside=inside)]

    def template_spans(self, text: str, *, inside: bool = False) -> Spans:
        """The tokens of `encode_template`."""
        if not text:
            return []
        found = self._whole(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = _spans(found['input_ids'], found['offset_mapping'])
        if not (inside and self.has_prefix):
            return spans
        start = next((start for i, start, _ in spans if i in self.added), len(text))
        if start == 0:
            return spans
        before = self._inside.encode(text[:start], add_special_tokens=False)
        return _spans(before.ids, before.offsets) + moved(self.template_spans(text[start:]), start)

    def decode(self, ids: Sequence[int]) -> str:
        text = self._whole.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).removeprefix(self._strip_lead).removesuffix(self.decoded_trail)


def terminal_id(tokenizer: 'transformers.PreTrainedTokenizerBase') -> int | None:
    """The id of the terminal token in a vocabulary that has it, as that of an exported model; None otherwise."""
    found: int | None = tokenizer.get_added_vocab().get(TERMINAL_TEXT)
    return found


def with_terminal(
    tokenizer: 'transformers.PreTrainedTokenizerBase', terminal: int
) -> 'transformers.PreTrainedTokenizerBase':
    """A copy of a tokenizer whose vocabulary has the terminal token, for an exported model.

    Raises:
        ValueError: the tokenizer gives the terminal token another id than `terminal`. `tokenizers` counts tokens to
            find a new id, which is another token's where the vocabulary has holes.
    """
    made = copy.deepcopy(tokenizer)
    made.add_tokens([TERMINAL_TEXT], special_tokens=True)
    found = terminal_id(made)
    if found != terminal:
        holes = sorted(set(range(terminal)) - set(tokenizer.get_vocab().values()))
        raise ValueError(
            f'{name_of(tokenizer)}: expected {TERMINAL_TEXT} to become token {terminal}, found {found}, since the '
            f'vocabulary has no tokens of the ids {holes[:8]}'
        )
    return made


def _checked_ids(tokenizer: 'transformers.PreTrainedTokenizerBase') -> set[int]:
    """The ids of all tokens."""
    tokens: dict[int, str] = {}
    for token, i in sorted(tokenizer.get_vocab().items()):  # whose order differs between two calls
        if i in tokens:
            raise ValueError(f'{name_of(tokenizer)}: expected one token of id {i}, found {tokens[i]!r} and {token!r}')
        tokens[i] = token
    return set(tokens)


def name_of(tokenizer: Any) -> str:
    """A tokenizer's name in errors."""
    return getattr(tokenizer, 'name_or_path', '') or 'tokenizer'


def moved(spans: Spans, by: int) -> Spans:
    """The same tokens in a text that starts earlier."""
    return [(i, start + by, end + by) for i, start, end in spans]


def _spans(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Spans:
    return [(i, start, end) for i, (start, end) in zip(ids, offsets, strict=True)]


def _text_tokenizer(state: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer by its state, for which special tokens are plain text."""
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = True
    return made


def _without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if not isinstance(step, dict):
        return step
    match step['type']:
        case 'Prepend':
            return None
        case 'Sequence':
            key = 'normalizers' if 'normalizers' in step else 'pretokenizers'
            return step | {key: [inner for inner in map(_without_prefix, step[key]) if inner is not None]}
        case 'Metaspace':
            return step | {'prepend_scheme': 'never'}
        case 'ByteLevel':
            return step | {'add_prefix_space': False}
    return step
