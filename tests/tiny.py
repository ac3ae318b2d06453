"""Small things that tests are made of."""

from collections.abc import Sequence

import tokenizers
import transformers

CHATML_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def byte_tokenizer(
    special_tokens: Sequence[str] = CHATML_TOKENS,
    template: str | None = CHATML,
    *,
    merges: Sequence[tuple[str, str]] = (),
    bos_token: str | None = None,
    eos_token: str | None = None,
    without: str = '',
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, what `merges` joins (in byte-level characters), and `special_tokens` after them.

    Bytes in `without` (byte-level characters) have no token; their ids stay free.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + b for a, b in merges), *special_tokens]
    vocab = {piece: i for i, piece in enumerate(pieces) if piece not in set(without)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token)
    tokenizer.chat_template = template
    return tokenizer


CHATML_THINK = (*CHATML_TOKENS, '<think>', '</think>')
LLAMA3_TOKENS = ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
FAMILY_TOKENS = {  # the special tokens that each published template needs
    'gemma': ('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'),
    'llama3': LLAMA3_TOKENS,
    'llama3_1': LLAMA3_TOKENS,
    'llama3_2': LLAMA3_TOKENS,
    'phi3': ('<s>', '<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>'),
    'qwen2_5': CHATML_TOKENS,
    'qwen3': CHATML_THINK,
    'qwen3_instruct_2507': CHATML_THINK,
    'smollm2': CHATML_TOKENS,
}


def family_tokenizer(family: str, template: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's own special tokens and the text of its own chat template."""
    tokens = FAMILY_TOKENS[family]
    if tokens[0] == '<|endoftext|>':
        return byte_tokenizer(tokens, template, eos_token=tokens[0])
    return byte_tokenizer(tokens, template, bos_token=tokens[0], eos_token=tokens[1])
