"""The model that is measured: a source, or random weights of known shapes, as one folder that both sides load."""

import pathlib

import jax
import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.huggingface_tokenizer import terminal_id
from simrl.conversations.templates import chat_from_huggingface
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.models.files.load import load_model, resize_vocabulary
from simrl.models.transformer import TransformerConfig
from tests.tiny import byte_tokenizer
from tools.benchmark.job import Dtype
from tools.compile_check.architectures import PUBLISHED

# A tokenizer of bytes writes the texts, so that only its first ids occur in prompts.
SHAPES = {
    'tiny': TransformerConfig(
        vocab_size=260,
        model_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=128,
        max_positions=2048,
        tied_embedding=True,
    ),
    'smollm2': PUBLISHED['HuggingFaceTB/SmolLM2-135M-Instruct'],
    'qwen2.5-1.5b': PUBLISHED['Qwen/Qwen2.5-1.5B-Instruct'],
}
RANDOM = 'random:'


def shape_of(source: str) -> TransformerConfig | None:
    """The shape of a `random:NAME` source, None for all others.

    Raises:
        ValueError: there is no such shape.
    """
    if not source.startswith(RANDOM):
        return None
    name = source.removeprefix(RANDOM)
    if name not in SHAPES:
        raise ValueError(f'--model: expected one of {", ".join(RANDOM + known for known in SHAPES)}, found {source!r}')
    return SHAPES[name]


def prepare(source: str, folder: pathlib.Path, dtype: Dtype) -> tuple[TransformerConfig, Chat]:
    """Writes the model as a Hugging Face folder in `dtype`, with the terminal token's row; its config and chat."""
    shape = shape_of(source)
    if shape is None:
        config, params, tokenizer = load_model(source)
    else:
        config, tokenizer = shape, byte_tokenizer(eos_token='<|im_end|>')
        tokenizer.pad_token = '<|endoftext|>'
        params = jax.tree.map(np.asarray, jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(0), config))
    chat = chat_from_huggingface(tokenizer)
    if terminal_id(tokenizer) is None and chat.size != config.vocab_size:
        params, config = resize_vocabulary(params, config, chat.size, chat.terminal_start)
    export(params, config, tokenizer, folder, dtype=dtype)
    return config, chat
