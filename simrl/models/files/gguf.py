"""Loads GGUF files (llama.cpp's format) of the known architectures: config, params and tokenizer.

1. `gguf_file.py` reads metadata and the tensor table.
2. The metadata become a `TransformerConfig`. Unsupported features (experts, windows, other RoPE scalings) are refused.
3. Every tensor is dequantised once, directly into our stacked float32 arrays.
4. `gguf_tokenizer.py` builds the tokenizer from the metadata.

The dimension letters are those of `transformer.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from simrl.models.files import gguf_tokenizer
from simrl.models.files.gguf_file import Tensor, read
from simrl.models.layouts import MATRICES
from simrl.models.transformer import Params, RopeScaling, TransformerConfig, init_params, rope_frequencies

if TYPE_CHECKING:  # importing it takes a second, and the concierge world has no need of it
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Structure that a `general.architecture` gives the decoder."""

    rope_pairs: Literal['neighbours', 'halves'] = 'halves'  # rows of a head in Q and K that RoPE rotates together
    norm_placement: Literal['before', 'after'] = 'before'
    qk_norm: Literal['none', 'head', 'all_heads'] = 'none'
    bias_groups: tuple[tuple[str, ...], ...] = ()  # matrices that have biases where the file has one for any of them


ARCHITECTURES: Mapping[str, Architecture] = {
    'llama': Architecture('neighbours', bias_groups=(('query', 'key', 'value', 'output'), ('gate', 'up', 'down'))),
    'qwen2': Architecture(bias_groups=(('query', 'key', 'value'),)),
    'qwen3': Architecture(qk_norm='head'),
    'olmo2': Architecture(norm_placement='after', qk_norm='all_heads'),
}

# `<architecture>.*` keys of the metadata that `config_from_metadata` reads.
_READ_KEYS = (
    'block_count',
    'context_length',
    'embedding_length',
    'feed_forward_length',
    'attention.head_count',
    'attention.head_count_kv',
    'attention.key_length',
    'attention.value_length',
    'attention.layer_norm_rms_epsilon',
    'rope.dimension_count',
    'rope.freq_base',
    'vocab_size',
)
# `<architecture>.*` keys with the values at which they have no effect. All other keys are refused.
_NEUTRAL_KEYS = {
    'expert_count': 0,
    'expert_used_count': 0,
    'rope.scaling.type': 'none',
    'rope.scale_linear': 1.0,
    'tensor_data_layout': 'Meta AI original pth',  # order of Q and K rows in every llama file
}

# The same in Llama 3.1, 3.2 and 3.3. A GGUF file has only the resulting factors, which are checked against these.
_LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR, _LLAMA3_ORIGINAL_POSITIONS = 1.0, 4.0, 8192


def load_config(path: str | Path) -> tuple[TransformerConfig, 'PreTrainedTokenizerFast']:
    """Reads config and tokenizer from a GGUF file.

    Raises:
        ValueError: a truncated file or no GGUF file; an unsupported architecture or tokenizer; a missing or misshapen
            tensor on which the config depends. The message names the file and the key or tensor.
    """
    metadata, tensors = read(path)
    config = config_from_metadata(path, metadata, tensors)
    tokenizer = gguf_tokenizer.tokenizer_from_metadata(path, metadata, num_tokens=config.vocab_size)
    tokenizer.model_max_length = config.max_positions
    return config, tokenizer


def load_params(path: str | Path, config: TransformerConfig) -> Params:
    """Reads float32 numpy arrays on the host. Besides them and the mapped file, memory has one chunk of one tensor.

    Raises:
        ValueError: an unsupported tensor type; a missing, unknown or misshapen tensor. The message names the file and
            the tensor.
    """
    metadata, tensors = read(path)
    return params_from_tensors(path, metadata['general.architecture'], config, tensors)


# The config.


def config_from_metadata(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TransformerConfig:
    """Reads the config from the metadata, and from tensors whose presence or shape decides it."""
    name = metadata.get('general.architecture')
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None:
        raise ValueError(f'{path}: general.architecture: expected one of {", ".join(ARCHITECTURES)}, found {name!r}')

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f'{name}.{key}', default)
        if type(value) is not kind:
            raise ValueError(f'{path}: {name}.{key}: expected {kind.__name__}, found {value!r}')
        return value

    for full_key, value in metadata.items():
        key = full_key.removeprefix(f'{name}.')
        if key == full_key or key in _READ_KEYS:
            continue
        if key not in _NEUTRAL_KEYS:
            raise ValueError(f'{path}: {full_key}: expected none, found {value!r}: not supported')
        if value != _NEUTRAL_KEYS[key]:
            raise ValueError(
                f'{path}: {full_key}: expected {_NEUTRAL_KEYS[key]!r}, found {value!r}, which is not supported'
            )

    model_dim, num_heads = get('embedding_length', int), get('attention.head_count', int)
    head_dim = get('attention.key_length', int, model_dim // max(num_heads, 1))
    for key in ('attention.value_length', 'rope.dimension_count'):
        if get(key, int, head_dim) != head_dim:
            found = metadata[f'{name}.{key}']
            raise ValueError(f'{path}: {name}.{key}: expected the head dimension {head_dim}, found {found}')
    if 'token_embd.weight' not in tensors:
        raise ValueError(f'{path}: tensor token_embd.weight: expected [vocabulary, {model_dim}], found none')
    vocab_size = tensors['token_embd.weight'].shape[0]
    if get('vocab_size', int, vocab_size) != vocab_size:
        found = metadata[f'{name}.vocab_size']
        raise ValueError(
            f'{path}: {name}.vocab_size: expected the {vocab_size} rows of token_embd.weight, found {found}'
        )
    try:
        config = TransformerConfig(
            vocab_size=vocab_size,
            model_dim=model_dim,
            num_layers=get('block_count', int),
            num_heads=num_heads,
            num_kv_heads=get('attention.head_count_kv', int, num_heads),
            head_dim=head_dim,
            mlp_dim=get('feed_forward_length', int),
            max_positions=get('context_length', int),
            rope_theta=get('rope.freq_base', float, 10_000.0),
            norm_epsilon=get('attention.layer_norm_rms_epsilon', float),
            norm_placement=architecture.norm_placement,
            qk_norm=architecture.qk_norm,
            biases=_biases(architecture, tensors),
            tied_embedding='output.weight' not in tensors,
        )
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f'{path}: {error}') from error
    if 'rope_freqs.weight' not in tensors:
        return config
    return dataclasses.replace(config, rope_scaling=_rope_scaling(path, config, tensors['rope_freqs.weight']))


def _biases(architecture: Architecture, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The matrices with biases: all of a group, as `config.json` has them, though llama.cpp takes any of them."""
    found = [group for group in architecture.bias_groups if any(f'blk.0.{_MATRICES[x]}.bias' in tensors for x in group)]
    return tuple(x for x in MATRICES if any(x in group for group in found))


def _rope_scaling(path: str | Path, config: TransformerConfig, tensor: Tensor) -> RopeScaling:
    """Recovers Llama 3's scaling from the divisors of the RoPE frequencies, float32 `[H / 2]`.

    The largest divisor is the scaling's factor. Its other fields are those of the published models; the divisors that
    they imply must equal the file's.
    """
    name = 'rope_freqs.weight'
    _check_tensor(path, name, tensor, (config.head_dim // 2,))
    found = dequantize(tensor.data, tensor.type)
    scaling = RopeScaling(
        factor=float(found.max()),
        low_freq_factor=_LLAMA3_LOW_FREQ_FACTOR,
        high_freq_factor=_LLAMA3_HIGH_FREQ_FACTOR,
        original_max_positions=_LLAMA3_ORIGINAL_POSITIONS,
    )
    scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    expected = np.asarray(rope_frequencies(config) / scaled)
    if not np.allclose(found, expected, rtol=1e-4, atol=0):
        worst = int(np.argmax(np.abs(found / expected - 1)))
        raise ValueError(
            f'{path}: tensor {name}: expected the factors of a {scaling}, {expected[worst]:.5g} at index {worst}, '
            f'found {found[worst]:.5g}'
        )
    return scaling


# The params.

_CHUNK = 1 << 22  # number of weights dequantised at a time

# Matrices of a layer: our name and the file's.
_MATRICES = {
    'query': 'attn_q',
    'key': 'attn_k',
    'value': 'attn_v',
    'output': 'attn_output',
    'gate': 'ffn_gate',
    'up': 'ffn_up',
    'down': 'ffn_down',
}
_NORMS = {
    'before': {'attention_norm': 'attn_norm', 'mlp_norm': 'ffn_norm'},
    'after': {'attention_norm': 'post_attention_norm', 'mlp_norm': 'post_ffw_norm'},
}
_QK_NORMS = {'query_norm': 'attn_q_norm', 'key_norm': 'attn_k_norm'}


@dataclasses.dataclass(frozen=True)
class _Target:
    """Target array of a tensor. `view` makes a view of our array in the order of the file's tensor."""

    ours: str  # name of our array
    shape: tuple[int, ...]  # shape of the file's tensor
    view: Callable[[np.ndarray], np.ndarray]


def _as_is(array: np.ndarray) -> np.ndarray:
    return array


def _layer_targets(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> dict[str, _Target]:
    """Targets of the tensors `blk.<layer>.<name>`, by name, from the shapes of a layer's arrays."""

    def neighbours(array: np.ndarray) -> np.ndarray:
        # The file's rows 2i and 2i + 1 of a head are rows i and i + H/2 of our half-split order. So a head has the axes
        # (H/2, 2) there and (2, H/2) here.
        heads, head_dim, *others = array.shape
        return array.reshape(heads, 2, head_dim // 2, *others).swapaxes(1, 2)

    targets = {}
    for ours, name in (_NORMS[architecture.norm_placement] | _QK_NORMS).items():
        if ours in shapes:
            targets[f'{name}.weight'] = _Target(ours, (math.prod(shapes[ours]),), _as_is)
    for ours, name in _MATRICES.items():
        shape, num_inputs = shapes[ours], MATRICES[ours]
        order = neighbours if ours in ('query', 'key') and architecture.rope_pairs == 'neighbours' else _as_is

        def outputs_first(array: np.ndarray, inputs: int = num_inputs, order: Any = order) -> np.ndarray:
            outputs: np.ndarray = order(np.moveaxis(array, range(inputs), range(-inputs, 0)))
            return outputs

        size = math.prod(shape[num_inputs:])
        targets[f'{name}.weight'] = _Target(ours, (size, math.prod(shape[:num_inputs])), outputs_first)
        if f'{ours}_bias' in shapes:
            targets[f'{name}.bias'] = _Target(f'{ours}_bias', (size,), order)
    return targets


def params_from_tensors(
    path: str | Path, architecture: str, config: TransformerConfig, tensors: Mapping[str, Tensor]
) -> Params:
    """Reads the parameter tree, float32 numpy arrays; rows of the vocabulary's padding are zero.

    All tensors are checked before any is read. Each is used once (the RoPE factors by `config_from_metadata`).
    """
    c = config
    vocabulary_shape = (c.vocab_size, c.model_dim)
    targets = {
        'token_embd.weight': _Target('embedding', vocabulary_shape, lambda array: array[: c.vocab_size]),
        'output_norm.weight': _Target('final_norm', (c.model_dim,), _as_is),
    }
    if not c.tied_embedding:
        targets['output.weight'] = _Target('head', vocabulary_shape, lambda array: array[: c.vocab_size])
    abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), c))
    shapes = {name: leaf.shape[1:] for name, leaf in abstract['decoder']['layers'].items()}
    layer_targets = {
        short: target
        for short, target in _layer_targets(shapes, ARCHITECTURES[architecture]).items()
        # A bias that no layer has is zero.
        if not short.endswith('.bias') or any(f'blk.{layer}.{short}' in tensors for layer in range(c.num_layers))
    }

    wanted = {'rope_freqs.weight'} if c.rope_scaling is not None else set()
    for name, target in targets.items():
        _check_tensor(path, name, tensors.get(name), target.shape)
        wanted.add(name)
    for layer in range(c.num_layers):
        for short, target in layer_targets.items():
            name = f'blk.{layer}.{short}'
            _check_tensor(path, name, tensors.get(name), target.shape)
            wanted.add(name)
    for name in tensors:
        if name not in wanted:
            raise ValueError(
                f'{path}: tensor {name}: expected none of this name in a {architecture} of {c.num_layers} layers, '
                f'found {_describe(tensors[name])}'
            )

    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    decoder = params['decoder']
    for name, target in targets.items():
        _dequantise_into(target.view(decoder[target.ours]), tensors[name])
    for layer in range(c.num_layers):
        for short, target in layer_targets.items():
            _dequantise_into(target.view(decoder['layers'][target.ours][layer]), tensors[f'blk.{layer}.{short}'])
    return params


def _describe(tensor: Tensor) -> str:
    return f'{tensor.type.name} {list(tensor.shape)}'


def _check_tensor(path: str | Path, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f'{path}: tensor {name}: expected {list(shape)}, found none')
    if tensor.shape != shape:
        raise ValueError(f'{path}: tensor {name}: expected {list(shape)}, found {_describe(tensor)}')
    if not can_dequantise(tensor.type):
        raise ValueError(
            f'{path}: tensor {name}: expected a type of numbers that the gguf package dequantises, '
            f'found {_describe(tensor)}'
        )


@functools.cache
def can_dequantise(kind: GGMLQuantizationType) -> bool:
    """Asks the gguf package by one block of zeros."""
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantise_into(target: np.ndarray, tensor: Tensor) -> None:
    """Writes a tensor into `target`, a view of our array with flattened axes in the tensor's order."""
    if len(tensor.shape) == 1:
        target[...] = dequantize(tensor.data, tensor.type).reshape(target.shape)
        return
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    rows_each = len(rows) // len(target)  # rows of the tensor per index of the first axis of `target`
    step = max(1, _CHUNK // (target.size // len(target)))
    for start in range(0, len(target), step):
        part = target[start : start + step]
        part[...] = dequantize(rows[start * rows_each : (start + step) * rows_each], tensor.type).reshape(part.shape)
