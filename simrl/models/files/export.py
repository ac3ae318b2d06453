"""Exports params as a Hugging Face model folder that transformers 5 and `huggingface.load_params` read.

Tensor names and layouts are those of `huggingface_table.py`. The folder is written atomically: under a temporary
name, flushed to disk, then renamed. The vocabulary's padding is stripped.

Hugging Face has no standard form for a value or reward head. Heads go to `simrl_heads.safetensors` in the same folder,
which transformers ignores and `load_params` reads.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from simrl.models.files.huggingface import HEADS, HEADS_FILE, INDEX_FILE, SINGLE_FILE, at_path, dtype_of
from simrl.models.files.huggingface_config import config_to_json, read_json
from simrl.models.files.huggingface_table import Row, array_shape, axis_sizes, stored_shape, tensor_names, weight_table
from simrl.models.transformer import Params, TransformerConfig
from simrl.run.stage_files import sync


def export(
    params: Params,
    config: TransformerConfig,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: str = 'float32',
    generation_config: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model folder that transformers 5 and `load_params` read, atomically.

    Args:
        params: a params tree of `config`, sharded or not; a head goes to `simrl_heads.safetensors`.
        config: the vocabulary's padding is stripped: rows are written for `config.vocab_size` ids and all of the
            tokenizer's.
        tokenizer: a transformers tokenizer, saved beside the weights; None for no tokenizer files.
        folder: must not exist yet.
        dtype: of the stored weights (heads stay float32).
        generation_config: of the source model; None writes only the tokenizer's special token ids.
        stop_ids: ids that end a message; they come before others in the `eos_token_id` of the generation config.
        max_file_bytes: larger weights are split over several files with an index.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: params of another config, or a tokenizer with more tokens than rows.
    """
    num_rows = max(config.vocab_size, 0 if tokenizer is None else 1 + max(tokenizer.get_vocab().values()))
    if num_rows > config.padded_vocab_size:
        raise ValueError(
            f'export: expected a tokenizer of at most {config.padded_vocab_size} tokens (the rows of the embedding), '
            f'found {num_rows}'
        )
    _check_params(params, config)
    ids = {} if tokenizer is None else _special_ids(tokenizer)
    with _new_folder(Path(folder)) as temporary:
        _write_json(temporary / 'config.json', config_to_json(config, num_rows, dtype) | ids)
        generation = _with_stop_ids(ids if generation_config is None else generation_config, stop_ids)
        _write_json(temporary / 'generation_config.json', generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _write_weights(temporary, params['decoder'], config, num_rows, dtype, max_file_bytes)
        heads = {
            f'{head}.{part}': np.asarray(jax.device_get(array), np.float32)
            for head in HEADS
            if head in params
            for part, array in params[head].items()
        }
        if heads:
            safetensors.numpy.save_file(heads, temporary / HEADS_FILE)
        for file in temporary.glob('*.safetensors'):  # which safetensors keeps to their owner
            shutil.copymode(temporary / 'config.json', file)


def read_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the generation config of a model folder, for `export`; None if the folder has none."""
    file = Path(folder) / 'generation_config.json'
    return read_json(file) if file.exists() else None


def _with_stop_ids(generation_config: Mapping[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    if not stop_ids:
        return dict(generation_config)
    found = generation_config.get('eos_token_id')
    known = [] if found is None else [found] if isinstance(found, int) else list(found)
    return {**generation_config, 'eos_token_id': list(dict.fromkeys([*stop_ids, *known]))}


def _special_ids(tokenizer: Any) -> dict[str, int]:
    ids = {name: getattr(tokenizer, name) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    return {name: value for name, value in ids.items() if value is not None}


def _check_params(params: Params, config: TransformerConfig) -> None:
    expected = {('decoder', *row.path): array_shape(row, config) for row in weight_table(config)}
    for head in HEADS:
        if head in params:
            expected |= {(head, 'kernel'): (config.model_dim,), (head, 'bias'): ()}
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    found = {tuple(entry.key for entry in path): tuple(np.shape(leaf)) for path, leaf in leaves}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f'params {"/".join(path)}: expected shape {expected.get(path)}, found {found.get(path)} '
                f'(None: no such array)'
            )


def _write_weights(
    folder: Path, decoder: Params, config: TransformerConfig, num_rows: int, dtype: str, max_file_bytes: int
) -> None:
    """Writes the decoder's tensors, with one file's tensors in host memory at a time."""
    sizes = axis_sizes(config, num_rows)
    item_bytes = dtype_of(dtype).itemsize
    files: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    file_bytes = total_bytes = 0
    for row in weight_table(config):
        array = at_path(decoder, row.path)
        tensor_bytes = math.prod(stored_shape(row, sizes)) * item_bytes
        for layer, name in enumerate(tensor_names(row, config)):
            if files[-1] and file_bytes + tensor_bytes > max_file_bytes:
                files.append([])
                file_bytes = 0
            part = _stored_reader(row, array, layer, sizes, dtype)
            files[-1].append((name, part))
            file_bytes += tensor_bytes
            total_bytes += tensor_bytes

    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        name = SINGLE_FILE if len(files) == 1 else f'model-{number:05}-of-{len(files):05}.safetensors'
        # transformers requires this metadata.
        safetensors.numpy.save_file({key: part() for key, part in tensors}, folder / name, metadata={'format': 'pt'})
        weight_map |= {key: name for key, _ in tensors}
    if len(files) > 1:
        _write_json(folder / INDEX_FILE, {'metadata': {'total_size': total_bytes}, 'weight_map': weight_map})


def _stored_reader(row: Row, array: Any, layer: int, sizes: Mapping[str, int], dtype: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        part = np.asarray(jax.device_get(array[layer] if row.stacked else array))
        if 'V' in row.ours:
            part = part[: sizes['V']]
        letters = row.stored.replace(' ', '')
        part = part.transpose([row.ours.index(letter) for letter in letters])
        return np.ascontiguousarray(part.reshape(stored_shape(row, sizes)), dtype_of(dtype))

    return read


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder, renamed to `folder` if the block succeeds and removed if it fails."""
    if folder.exists():
        raise FileExistsError(f'{folder}: expected no such folder yet, found one')
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes private folders
        for path in itertools.chain(temporary.rglob('*'), [temporary]):
            sync(path)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
