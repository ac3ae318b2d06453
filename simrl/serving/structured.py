"""A JSON schema in, the tokens that may come next out: answers that are JSON of the schema, by llguidance.

    grammars = Grammars.of(chat, num_rows)  # once per model
    constraint = grammars.constraint(schema)  # once per answer

1. Text and the assistant's end-of-turn may come, the latter when the JSON is complete; special tokens never, nor ids
   beyond the tokenizer's, which the model's vocabulary has.
2. Between its parts the JSON has at most one space, or a line break and an indent: models that like spaces end, too.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.huggingface_tokenizer import HuggingFaceTokenizer

# Stand over what a schema says in `x-guidance`: a keyword that changes what is valid and is not known is an error.
OPTIONS = {
    'whitespace_pattern': r'[ ]|\n[ ]{0,16}',
    'item_separator': ',',
    'key_separator': ':',
    'coerce_one_of': False,
    'lenient': False,
}
JSON_CHARACTERS = '{}[]":,-.0123456789truefalsn'


class MissingPackageError(ImportError):
    """llguidance is not installed."""


class DeadEndError(ValueError):
    """No token continues an answer as its schema asks."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grammars:
    """A vocabulary as grammars see it; all answers of a model share it.

    Attributes:
        tokenizer: llguidance's.
        words: uint32 `[ceil(V / 32)]`, bits of the ids of text and the end-of-turn.
    """

    tokenizer: Any
    words: np.ndarray

    @classmethod
    def of(cls, chat: Chat, num_rows: int) -> 'Grammars':
        """Reads a tokenizer, in about a second for a large vocabulary.

        Args:
            chat: of the model.
            num_rows: rows of the (padded) embedding, V.

        Raises:
            MissingPackageError: llguidance is not installed.
            ValueError: a tokenizer that it cannot read, or a template in which no token ends the assistant's messages.
        """
        chat.check_ends('assistant')
        mask = chat.token_mask(-(-num_rows // 32) * 32, terminal=False, header='assistant')
        words = np.packbits(mask, bitorder='little').view('<u4').astype(np.uint32)
        library = _llguidance()
        try:
            vocabulary = library.TokenizerWrapper(_Vocabulary(chat, len(mask)))
            tokenizer = library.LLTokenizer(vocabulary, slices=library.LLTokenizer.json_slices())
        except ValueError as error:
            raise ValueError(f'its answers follow no schema: {_line(error)}') from error
        return cls(tokenizer, words)

    def constraint(self, schema: Mapping[str, Any]) -> 'JsonConstraint':
        """The state of an answer before its first token.

        Raises:
            ValueError: not a JSON schema, one of which llguidance cannot follow a part, or one that no text of this
                vocabulary fits.
        """
        if not isinstance(schema, Mapping):
            raise ValueError(f'expected an object, found {_line(json.dumps(schema))}')
        matcher = _llguidance().LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(dict(schema), overrides=OPTIONS)
        except ValueError as error:
            raise ValueError(_line(error)) from error
        refused, messages = matcher.validate_grammar_with_warnings(grammar, self.tokenizer)
        if refused:
            raise ValueError(_line(' '.join(messages)))
        limits = _llguidance().LLParserLimits(verbose_errors=False)
        return JsonConstraint(matcher(self.tokenizer, grammar, log_level=0, limits=limits), self.words)


class JsonConstraint:
    """The state of an answer that is JSON of a schema: a `Constraint`."""

    def __init__(self, matcher: Any, words: np.ndarray) -> None:
        """Computes what may come first.

        Args:
            matcher: llguidance's, at its start.
            words: as of `Grammars`.
        """
        self._matcher, self._words = matcher, words
        self._next: np.ndarray | None = None
        self.allowed()

    def allowed(self) -> np.ndarray:
        """Bits of the ids that may come next, uint32 `[ceil(V / 32)]`.

        Raises:
            DeadEndError: none may: the vocabulary lacks the characters, or the schema is too complex.
        """
        if self._next is None:
            words = np.zeros_like(self._words)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            words &= self._words
            if self._matcher.is_error() or not words.any():
                error = self._matcher.get_error()
                reason = 'the vocabulary lacks its characters' if not error or 'panic' in error else error.split()[0]
                raise DeadEndError(f'no token continues an answer of this schema ({reason})')
            self._next = words
        return self._next

    def advance(self, token: int) -> bool:
        """Takes the token that was sampled; returns True once nothing may follow.

        Raises:
            ValueError: it is none of those allowed.
        """
        word = self.allowed()[token // 32]
        if not int(word) >> token % 32 & 1 or not self._matcher.consume_token(token):
            raise ValueError(f'expected a token that the schema allows next, found {token}')
        self._next = None
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """A tokenizer as llguidance reads one: the bytes of tokens, and an encoder for text that must come.

    Of Hugging Face's own description llguidance would encode such text with special tokens in it.
    """

    def __init__(self, chat: Chat, size: int) -> None:
        tokenizer = chat.tokenizer
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError("expected a tokenizer of Hugging Face, found simrl's own, as of the concierge world")
        described = _llguidance().LLTokenizer(tokenizer.to_json(), n_vocab=chat.size)
        self.tokens = [described.decode_bytes([i]) for i in range(tokenizer.size)]
        self._encode = tokenizer.at(inside=True).encode_unchecked
        self.special_token_ids = sorted(chat.reserved)
        self.eos_token_id, self.bos_token_id = chat.end_of_turn['assistant'], None
        self._ids = {piece: i for i, piece in enumerate(self.tokens) if i not in chat.reserved}
        self.tokens += [b''] * (size - len(self.tokens))
        if missing := [character for character in JSON_CHARACTERS if character.encode() not in self._ids]:
            raise ValueError(f'expected tokens of the characters of JSON, found none of {" ".join(missing)}')

    def __call__(self, text: bytes) -> list[int]:
        """Encodes bytes: as the tokenizer does, or by the longest tokens first where that changes them."""
        ids = self._encode(text.decode(errors='replace'))
        if b''.join(self.tokens[i] for i in ids) == text:
            return ids
        ids, start = [], 0
        while start < len(text):
            end = next((n for n in range(len(text), start, -1) if text[start:n] in self._ids), 0)
            if not end:
                raise ValueError(f'the vocabulary has no token for the start of {text[start:]!r}')
            ids.append(self._ids[text[start:end]])
            start = end
        return ids


def _llguidance() -> Any:
    try:
        return importlib.import_module('llguidance')
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"answers of a JSON schema need the package llguidance ({error}): pip install 'simrl[structured]'"
        ) from error


def _line(message: object) -> str:
    """A message in one line."""
    text = ' '.join(str(message).split())
    return text if len(text) <= 300 else text[:297] + '...'
