"""Small things that tests are made of."""

from collections.abc import Sequence

import tokenizers
import transformers

CHATML_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    special_tokens: Sequence[str] = CHATML_TOKENS,
    template: str | None = CHATML,
    *,
    merges: Sequence[tuple[str, str]] = (),
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, what `merges` joins (in byte-level characters), and `special_tokens` after them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token)
    tokenizer.chat_template = template
    return tokenizer
