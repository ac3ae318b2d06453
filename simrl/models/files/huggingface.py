"""Reads Hugging Face model folders: safetensors into params, by the table of `huggingface_table.py`.

Each shard of each array is read directly from the files: without torch, and never with a whole model in host memory.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from simrl.models.files.huggingface_config import config_from_json, read_json
from simrl.models.files.huggingface_table import Row, array_shape, axis_sizes, stored_shape, tensor_names, weight_table
from simrl.models.transformer import Params, TransformerConfig, rope_frequencies

HEADS_FILE = 'simrl_heads.safetensors'
HEADS = ('value_head', 'reward_head')
INDEX_FILE = 'model.safetensors.index.json'
SINGLE_FILE = 'model.safetensors'
_FREQUENCY_NAME = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
FLOAT_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}  # safetensors' names -> numpy's


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open safetensors file; `slices` reads parts of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    slices: Any


def load_config(folder: str | os.PathLike[str]) -> TransformerConfig:
    """Reads the config of a Hugging Face model folder from its `config.json`."""
    file = Path(folder) / 'config.json'
    return config_from_json(read_json(file), file)


def load_params(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    *,
    dtype: str = 'float32',
    shardings: Any = None,
) -> Params:
    """Reads the weights of a Hugging Face model folder.

    Tensor names must be exactly those of the config's table, with two exceptions. A tied model's file may contain the
    embedding as `lm_head.weight`, alone or, as Qwen3's do, beside it with equal numbers. Files of older versions of
    transformers also contain RoPE's frequencies (`inv_freq`), which must be those of the config. Rows of the
    vocabulary's padding are 0.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and the files that it names; perhaps with
            `simrl_heads.safetensors`, from `export`.
        config: from `load_config(folder)`.
        dtype: of the returned arrays, for any float type in the file.
        shardings: function from the names of the folder's heads to a tree of shardings like the params, such as
            `functools.partial(sharding.param_shardings, config, mesh, rules)`: arrays are read shard by shard. None
            returns host (numpy) arrays.

    Returns:
        `{'decoder': ..., 'value_head'?: ..., 'reward_head'?: ...}`, with the names and shapes of `transformer.py`.

    Raises:
        FileNotFoundError: no weights, or a file of the index is missing.
        ValueError: a truncated or damaged file; names missing, unknown or in two files; a wrong shape or type. The
            message names the file, the tensor, and what was expected and found.
    """
    folder = Path(folder)
    table = weight_table(config)
    sizes = axis_sizes(config, config.vocab_size)
    with contextlib.ExitStack() as stack:
        tensors = _open_checkpoint(folder, stack)
        expected = {name: stored_shape(row, sizes) for row in table for name in tensor_names(row, config)}
        duplicate = tensors.pop('lm_head.weight', None) if config.tied_embedding else None
        if duplicate is not None:
            tensors.setdefault('model.embed_tokens.weight', duplicate)
        frequencies = [tensors.pop(name) for name in list(tensors) if _FREQUENCY_NAME.fullmatch(name)]
        _check_tensors(tensors, expected, folder)
        if duplicate is not None:
            _check_tied(duplicate, tensors['model.embed_tokens.weight'])
        _check_frequencies(frequencies, config)
        heads = _load_heads(folder, config, dtype)
        placed = None if shardings is None else shardings(heads=tuple(heads))
        decoder: dict[str, Any] = {}
        for row in table:
            parts = [tensors[name] for name in tensor_names(row, config)]
            node = decoder
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = _read_array(row, config, parts, dtype, placed and at_path(placed['decoder'], row.path))
    if placed is not None:
        heads = jax.tree.map(_shard, heads, {name: placed[name] for name in heads})
    return {'decoder': decoder, **heads}


def at_path(tree: Any, path: tuple[str, ...]) -> Any:
    """Looks up a leaf or subtree of nested dicts by a path of keys."""
    for key in path:
        tree = tree[key]
    return tree


def _shard(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def read_index(folder: Path) -> dict[str, str] | None:
    """Reads the index of a folder's weights: tensor names and their files; None if the folder has no index."""
    file = folder / INDEX_FILE
    if not file.exists():
        return None
    listed = read_json(file).get('weight_map')
    if not isinstance(listed, dict) or not all(str(name).endswith('.safetensors') for name in listed.values()):
        raise ValueError(f'{file}: weight_map: expected an object of names to files (.safetensors)')
    return listed


def _open_checkpoint(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Opens all tensors of a model folder, by name; the files stay open until the stack closes."""
    listed = read_index(folder)
    if listed is not None:
        if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in listed.values():
            raise ValueError(f'{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found both, with different weights')
        files = sorted(set(listed.values()))
    elif (folder / SINGLE_FILE).exists():
        files = [SINGLE_FILE]
    else:
        found = sorted(file.name for file in folder.glob('*')) if folder.is_dir() else 'no such folder'
        raise FileNotFoundError(f'{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}')

    tensors: dict[str, _Tensor] = {}
    for name in files:
        for tensor in _open_file(folder / name, stack):
            if tensor.name in tensors:
                raise ValueError(f'{tensor.file}: {tensor.name}: also in {tensors[tensor.name].file.name}')
            tensors[tensor.name] = tensor
    if listed is not None:
        wrong = sorted(n for n in listed.keys() | tensors if n not in tensors or tensors[n].file.name != listed.get(n))
        if wrong:
            found = tensors[wrong[0]].file.name if wrong[0] in tensors else 'in no file'
            raise ValueError(
                f'{folder / INDEX_FILE}: {wrong[0]}: expected in {listed.get(wrong[0])}, found {found} '
                f'({len(wrong)} such names)'
            )
    return tensors


def _open_file(file: Path, stack: contextlib.ExitStack) -> list[_Tensor]:
    try:
        opened = stack.enter_context(safetensors.safe_open(file, framework='numpy'))
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise FileNotFoundError(f'{file}: expected this safetensors file, found none') from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'{file}: expected a complete safetensors file, found a damaged one: {error}') from None
    for name, part in slices.items():
        if part.get_dtype() not in FLOAT_DTYPES:
            raise ValueError(f'{file}: {name}: expected one of {", ".join(FLOAT_DTYPES)}, found {part.get_dtype()}')
    return [_Tensor(file, name, tuple(part.get_shape()), part) for name, part in slices.items()]


def _check_tensors(tensors: Mapping[str, _Tensor], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing:
        raise ValueError(f'{where}: expected the tensor {missing[0]}, found none ({len(missing)} missing)')
    if unknown:
        tensor = tensors[unknown[0]]
        raise ValueError(f'{tensor.file}: {tensor.name}: not a tensor of this config ({len(unknown)} unknown)')
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f'{tensors[name].file}: {name}: expected shape {list(shape)}, found {list(tensors[name].shape)}'
            )


def _check_tied(duplicate: _Tensor, embedding: _Tensor) -> None:
    if duplicate.shape != embedding.shape or not np.array_equal(duplicate.slices[:], embedding.slices[:]):
        raise ValueError(
            f'{duplicate.file}: {duplicate.name}: expected the numbers of {embedding.name} (the config ties them), '
            f'found others'
        )


def _check_frequencies(stored: list[_Tensor], config: TransformerConfig) -> None:
    """Holds stored RoPE frequencies, perhaps in half precision, against those of the config."""
    for tensor in stored:
        found, expected = tensor.slices[:].astype(np.float32), np.asarray(rope_frequencies(config))
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=0.01, atol=1e-7):
            raise ValueError(
                f'{tensor.file}: {tensor.name}: expected the RoPE frequencies of the config, {_shorten(expected)}, '
                f'found {_shorten(found)}'
            )


def _shorten(array: np.ndarray) -> str:
    return f'{list(array.shape)} from {array.max():.3g} to {array.min():.3g}'


def _read_array(
    row: Row, config: TransformerConfig, parts: list[_Tensor], dtype: str, sharding: jax.sharding.Sharding | None
) -> np.ndarray | jax.Array:
    """Reads one array of ours from the tensors of its row."""
    shape = array_shape(row, config)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        if not row.stacked:
            return _read_part(row, config, parts[0], bounds, dtype)
        layers = range(*bounds[0])
        return np.stack([_read_part(row, config, parts[layer], bounds[1:], dtype) for layer in layers])

    if sharding is None:
        return read((slice(None),) * len(shape))
    # A shard on several devices is read once.
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read_once(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if key not in shards:
            shards[key] = read(index)
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, read_once)


def _read_part(
    row: Row, config: TransformerConfig, tensor: _Tensor, bounds: list[tuple[int, int]], dtype: str
) -> np.ndarray:
    """Reads the part of one layer's array within `bounds` (of our dimensions), and few other rows of the file."""
    sizes = axis_sizes(config, config.vocab_size)
    wanted = dict(zip(row.ours, bounds, strict=True))
    if 'V' in wanted:  # rows past the file's are padding
        if wanted['V'][0] >= sizes['V']:
            return np.zeros([high - low for low, high in bounds], dtype_of(dtype))
        wanted['V'] = (wanted['V'][0], min(wanted['V'][1], sizes['V']))
    words = row.stored.split()
    # A word's first letter varies slowest, so its range is contiguous in the stored dimension.
    strides = [math.prod(sizes[letter] for letter in word[1:]) for word in words]
    runs = [
        slice(wanted[word[0]][0] * stride, wanted[word[0]][1] * stride)
        for word, stride in zip(words, strides, strict=True)
    ]
    part = tensor.slices[tuple(runs)]
    letters = ''.join(words)
    leading = {word[0] for word in words}
    part = part.reshape([wanted[x][1] - wanted[x][0] if x in leading else sizes[x] for x in letters])
    part = part[tuple(slice(None) if x in leading else slice(*wanted[x]) for x in letters)]
    part = part.transpose([letters.index(letter) for letter in row.ours]).astype(dtype_of(dtype))
    missing = [high - low - size for (low, high), size in zip(bounds, part.shape, strict=True)]
    return np.pad(part, [(0, rows) for rows in missing]) if any(missing) else np.ascontiguousarray(part)


def dtype_of(name: str) -> np.dtype:
    """Converts 'float32', 'bfloat16' or 'float16' to a numpy dtype."""
    if name not in FLOAT_DTYPES.values():
        raise ValueError(f'dtype: expected one of {", ".join(FLOAT_DTYPES.values())}, found {name!r}')
    return np.dtype(jnp.dtype(name))


def _load_heads(folder: Path, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Reads the heads that `export` wrote; none if the folder has no such file."""
    file = folder / HEADS_FILE
    if not file.exists():
        return {}
    shapes = {'kernel': (config.model_dim,), 'bias': ()}
    with contextlib.ExitStack() as stack:
        tensors = {tensor.name: tensor for tensor in _open_file(file, stack)}
        heads = [head for head in HEADS if any(name.startswith(f'{head}.') for name in tensors)]
        _check_tensors(tensors, {f'{h}.{part}': shape for h in heads for part, shape in shapes.items()}, file)
    arrays = safetensors.numpy.load_file(file)
    return {head: {part: arrays[f'{head}.{part}'].astype(dtype_of(dtype)) for part in shapes} for head in heads}
