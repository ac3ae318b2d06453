"""Models known by their published sizes, so that no file of theirs is needed: neither weights nor tokenizer.

A model's programs depend on its config, and on little of its tokenizer: how many tokens headers have, and the runs that
end a conversation. `stand_in` makes a tokenizer whose ChatML headers have as many tokens as those of Qwen2.5.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import tokenizers

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.templates import chat_from_huggingface
from simrl.experiments import sources
from simrl.experiments.sources import Model, ModelSettings
from simrl.models.transformer import RopeScaling, TransformerConfig
from simrl.run.config import ConfigError


def _qwen2(vocab_size: int, sizes: tuple[int, int, int, int, int], *, tied: bool = False) -> TransformerConfig:
    model_dim, num_layers, num_heads, num_kv_heads, mlp_dim = sizes
    return TransformerConfig(
        vocab_size=vocab_size,
        model_dim=model_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=model_dim // num_heads,
        mlp_dim=mlp_dim,
        max_positions=32768,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        biases=('query', 'key', 'value'),
        tied_embedding=tied,
    )


def _qwen3(sizes: tuple[int, int, int, int, int]) -> TransformerConfig:
    config = _qwen2(151936, sizes)
    return dataclasses.replace(config, head_dim=128, max_positions=40960, biases=(), qk_norm='head')


_QWEN2 = {
    '0.5B': _qwen2(151936, (896, 24, 14, 2, 4864), tied=True),
    '1.5B': _qwen2(151936, (1536, 28, 12, 2, 8960), tied=True),
    '3B': _qwen2(151936, (2048, 36, 16, 2, 11008), tied=True),
    '7B': _qwen2(152064, (3584, 28, 28, 4, 18944)),
    '14B': _qwen2(152064, (5120, 48, 40, 8, 13824)),
    '32B': _qwen2(152064, (5120, 64, 40, 8, 27648)),
}
# By the names of the hub: the sizes of each model's own config.json.
PUBLISHED: Mapping[str, TransformerConfig] = {
    **{f'Qwen/Qwen2.5-{size}-Instruct': config for size, config in _QWEN2.items()},
    **{
        f'jjssuh/{series}-base-Qwen2.5-{size}-Instruct': _QWEN2[size]
        for series, size in itertools.product(('sftuser', 'sftuser2'), ('7B', '14B', '32B'))
    },
    'Qwen/Qwen3-14B': _qwen3((5120, 40, 40, 8, 17408)),
    'Qwen/Qwen3-32B': _qwen3((5120, 64, 64, 8, 25600)),
    'meta-llama/Llama-3.2-3B-Instruct': TransformerConfig(
        vocab_size=128256,
        model_dim=3072,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=8192,
        max_positions=131072,
        rope_theta=5e5,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        tied_embedding=True,
    ),
    'HuggingFaceTB/SmolLM2-135M-Instruct': TransformerConfig(
        vocab_size=49152,
        model_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        max_positions=8192,
        rope_theta=1e5,
        tied_embedding=True,
    ),
}

_SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
_SYSTEM = 'You are a helpful assistant.'
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace('SYSTEM', _SYSTEM)


@functools.cache  # a template is examined with many texts
def stand_in(fine_tuned: bool) -> tuple[Chat, Any]:
    """A tokenizer of bytes with ChatML's template, in which the names of roles are a token each, and its chat.

    Args:
        fine_tuned: True gives it the terminal token, as that of a published simulator has.
    """
    import transformers

    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in ('system', 'user', 'assistant'):
        for length in range(2, len(word) + 1):
            if word[:length] not in pieces:
                pieces.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *_SPECIAL])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_SPECIAL[2])
    tokenizer.chat_template = _TEMPLATE
    if fine_tuned:
        tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    return chat_from_huggingface(tokenizer), tokenizer


def model_of(field: str, settings: ModelSettings, *, fine_tuned: bool = False) -> Model:
    """A model without weights: that of a folder or file as it is there, one of the hub by its published sizes.

    Args:
        field: what errors call the settings.
        fine_tuned: True: it is a simulator already.

    Raises:
        ConfigError: a hub's model of unknown sizes, or files that cannot be used.
    """
    if sources.model_files('model', settings):
        try:
            return sources.open_model(settings)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f'{field}: {error}') from error
    stored = PUBLISHED.get(settings.source)
    if stored is None:
        raise ConfigError(
            f'{field}.source: expected a folder, a .gguf file or one of {", ".join(sorted(PUBLISHED))}, '
            f'found {settings.source!r}; a folder with its config.json and the files of its tokenizer suffices'
        )
    chat, tokenizer = stand_in(fine_tuned)
    if settings.random is not None:
        stored = settings.random.transformer_config(stored.vocab_size)
    config = dataclasses.replace(stored, vocab_size=max(stored.vocab_size, chat.size))
    return Model(settings, config, stored, chat, tokenizer)
