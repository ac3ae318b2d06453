"""Builds a Hugging Face byte-level BPE tokenizer from the metadata of a GGUF file.

A GGUF file has tokens, merges and special ids, but only the name of the pre-tokenizer, which splits text before merging
(`tokenizer.ggml.pre`). The pre-tokenizers below are those of the models' own `tokenizer.json`. A wrong one gives ids
that the model never saw, so an unknown name is an error.
"""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:  # importing it takes a second, and the concierge world has no need of it
    from transformers import PreTrainedTokenizerFast


class TokenType(enum.IntEnum):
    """llama.cpp's kinds of tokens (`tokenizer.ggml.token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # matched whole in text, but not special, such as Qwen3's <think>
    UNUSED = 5  # spare row of the embedding


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Rules of a pre-tokenizer."""

    digits: bool = False  # split off every digit, then apply GPT-2's rule
    split: str | None = None  # regular expression of the parts of a text; None: GPT-2's
    nfc: bool = False  # normalise the text to Unicode NFC first
    ignore_merges: bool = False  # a part that is a token stays whole
    add_bos: bool = False  # default if the file does not say


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_GPT4 = rf'{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}'
_LLAMA3 = PreTokenizer(split=_GPT4, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    'smollm': PreTokenizer(digits=True),
    'llama-bpe': _LLAMA3,
    'llama-v3': _LLAMA3,
    'llama3': _LLAMA3,
    'dbrx': PreTokenizer(split=_GPT4),  # also OLMo 2's
    'qwen2': PreTokenizer(split=rf'{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}', nfc=True),
}

_SPECIAL_IDS = {'bos_token': 'bos', 'eos_token': 'eos', 'pad_token': 'padding', 'unk_token': 'unknown'}


def tokenizer_from_metadata(
    path: str | Path, metadata: Mapping[str, Any], *, num_tokens: int
) -> 'PreTrainedTokenizerFast':
    """Builds the tokenizer of a GGUF file.

    Control tokens become special tokens, user-defined tokens plain added tokens. Unused rows at the end of the
    vocabulary are left out, so `len(tokenizer)` is the number of real tokens. As in the models' own tokenizers,
    `encode` drops bytes that the vocabulary lacks: in SmolLM2 six control characters and the lead bytes of unassigned
    planes.

    Args:
        path: of the file, for errors.
        metadata: the file's keys and values.
        num_tokens: rows of the embedding.

    Raises:
        ValueError: not a byte-level BPE, an unknown pre-tokenizer, or inconsistent tokens, types, merges or ids.
    """

    def fail(key: str, expected: str, found: object) -> ValueError:
        return ValueError(f'{path}: tokenizer.ggml.{key}: expected {expected}, found {found}')

    def get(key: str, kind: type) -> Any:
        value = metadata.get(f'tokenizer.ggml.{key}')
        if type(value) is not kind:
            raise fail(key, kind.__name__, 'none' if value is None else f'{type(value).__name__} {str(value)[:60]}')
        return value

    if get('model', str) != 'gpt2':
        raise fail('model', "'gpt2' (byte-level BPE; sentencepiece is not supported)", repr(get('model', str)))
    pre = PRE_TOKENIZERS.get(get('pre', str))
    if pre is None:
        raise fail('pre', f'one of {sorted(PRE_TOKENIZERS)}', repr(get('pre', str)))
    if metadata.get('tokenizer.ggml.add_space_prefix', False) is not False:
        raise fail('add_space_prefix', 'false', metadata['tokenizer.ggml.add_space_prefix'])

    tokens, types = get('tokens', list), get('token_type', list)
    if len(tokens) != num_tokens:
        raise fail('tokens', f'{num_tokens}, the rows of token_embd.weight', len(tokens))
    if len(types) != len(tokens):
        raise fail('token_type', f'{len(tokens)}, one per token', len(types))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise fail('tokens', 'different tokens', f'{twice!r} twice')
    for i, kind in enumerate(types):
        if kind not in list(TokenType):
            raise fail('token_type', f'one of {[int(t) for t in TokenType]} for token {i}', kind)

    # Tokens that merging can produce are model tokens. The special tokens after them are added tokens, as in the
    # models' own files: encoding text without added tokens never produces them.
    num_used = 1 + max((i for i, kind in enumerate(types) if kind != TokenType.UNUSED), default=-1)
    unadded = [i for i in range(num_used) if types[i] in (TokenType.NORMAL, TokenType.UNUSED)]
    num_model_tokens = 1 + max(unadded, default=-1)
    vocabulary = {token: i for token, i in ids.items() if i < num_model_tokens}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(fail, get('merges', list), vocabulary), ignore_merges=pre.ignore_merges
        )
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    special = {i for i in range(num_used) if types[i] in (TokenType.UNKNOWN, TokenType.CONTROL)}
    added = [i for i in range(num_used) if types[i] not in (TokenType.NORMAL, TokenType.UNUSED)]
    backend.add_tokens([AddedToken(tokens[i], normalized=False, special=i in special) for i in added])
    for i in added:
        if backend.token_to_id(tokens[i]) != i:
            raise fail('tokens', f'{tokens[i]!r} to be addable at id {i}', f'id {backend.token_to_id(tokens[i])}')

    named = {}
    for name, key in _SPECIAL_IDS.items():
        if f'tokenizer.ggml.{key}_token_id' not in metadata:
            continue
        token_id = get(f'{key}_token_id', int)
        if not 0 <= token_id < num_used:
            raise fail(f'{key}_token_id', f'an id below {num_used}', token_id)
        named[name] = tokens[token_id]
    add_bos = metadata.get('tokenizer.ggml.add_bos_token', pre.add_bos)
    if add_bos and 'bos_token' not in named:
        raise fail('bos_token_id', 'an id, as add_bos_token is true', 'none')
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named.get('bos_token'),
        eos_token=named.get('eos_token'),
        pad_token=named.get('pad_token'),
        unk_token=named.get('unk_token'),
        extra_special_tokens=[tokens[i] for i in sorted(special) if tokens[i] not in named.values()],
        chat_template=metadata.get('tokenizer.chat_template'),
        add_bos_token=add_bos,
        add_eos_token=metadata.get('tokenizer.ggml.add_eos_token', False),
        clean_up_tokenization_spaces=False,
    )


def _merges(fail: Any, merges: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for i, merge in enumerate(merges):
        first, space, second = merge.partition(' ')
        if not space or any(token not in vocabulary for token in (first, second, first + second)):
            raise fail('merges', f'merge {i} to be two tokens of the vocabulary that make a third', repr(merge))
        pairs.append((first, second))
    return pairs


def _pre_tokenizer(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    if pre.split is not None:
        cut = pre_tokenizers.Split(Regex(pre.split), behavior='isolated')
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level
