"""Loads config, params and tokenizer from a model source, and adds the terminal token to a vocabulary.

A source is the name of a model on the Hugging Face hub, a local Hugging Face folder, or a `.gguf` file.
"""

import dataclasses
import functools
import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.models import sharding
from simrl.models.files import gguf, huggingface
from simrl.models.transformer import Params, TransformerConfig
from simrl.run.config import local_path

# Files downloaded from the hub, besides those that an index of weights names: no pickles, no code, no other weights.
HUB_FILES = ('*.json', '*.jinja', '*.txt', 'tokenizer.model', huggingface.SINGLE_FILE, huggingface.HEADS_FILE)


def load_model(
    source: str,
    *,
    dtype: str = 'float32',
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TRAINING_RULES,
    revision: str | None = None,
) -> tuple[TransformerConfig, Params, Any]:
    """Loads a model and its tokenizer. Code in a model's repository is never run.

    Args:
        source: a hub name ('HuggingFaceTB/SmolLM2-135M-Instruct'), a folder with `config.json`, safetensors and the
            tokenizer's files, or a `.gguf` file.
        dtype: of the params.
        mesh: params are sharded over it by `rules` (from a folder, read directly into their shards). None returns host
            (numpy) arrays.
        revision: of a hub model; None for its main branch.

    Returns:
        config, params `{'decoder': ..., heads?}`, and a transformers tokenizer.

    Raises:
        FileNotFoundError: `source` or one of its files does not exist.
        ValueError: the files are invalid, or this decoder does not compute their model; or `source` is a URL.
    """
    path = _find(source, revision)
    config, tokenizer = _read_config(path)
    return config, _read_params(path, config, dtype, mesh, rules), tokenizer


def load_config(source: str, *, revision: str | None = None) -> tuple[TransformerConfig, Any]:
    """Reads the config and the tokenizer of a model source, without its weights; see `load_model`."""
    return _read_config(_find(source, revision))


def load_params(
    source: str,
    config: TransformerConfig,
    *,
    dtype: str = 'float32',
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TRAINING_RULES,
    revision: str | None = None,
) -> Params:
    """Reads the weights of a model source of known config, without its tokenizer; see `load_model`."""
    return _read_params(_find(source, revision), config, dtype, mesh, rules)


def _read_config(path: Path) -> tuple[TransformerConfig, Any]:
    if path.suffix == '.gguf':
        return gguf.load_config(path)
    return huggingface.load_config(path), load_tokenizer(path)


def _read_params(
    path: Path, config: TransformerConfig, dtype: str, mesh: jax.sharding.Mesh | None, rules: sharding.Rules
) -> Params:
    if path.suffix == '.gguf':
        params = gguf.load_params(path, config)
        params = jax.tree.map(lambda x: x.astype(huggingface.dtype_of(dtype), copy=False), params)
        return params if mesh is None else sharding.shard(params, sharding.param_shardings(config, mesh, rules))
    shardings = None if mesh is None else functools.partial(sharding.param_shardings, config, mesh, rules)
    return huggingface.load_params(path, config, dtype=dtype, shardings=shardings)


def _find(source: str, revision: str | None) -> Path:
    """The GGUF file or the folder of a model source."""
    path = local_path(source)
    if path.suffix != '.gguf':
        return find_folder(source, revision)
    if not path.is_file():
        raise FileNotFoundError(f'{source}: expected a GGUF file, found none')
    return path


def find_folder(source: str, revision: str | None = None) -> Path:
    """Finds the folder of a model source other than a GGUF file; downloads a hub model into the hub's cache."""
    path = local_path(source)
    if path.is_dir():
        _check_adapter(path)
        return path
    if path.exists():
        raise FileNotFoundError(f'{source}: expected a folder or a .gguf file, found another file; give its folder')
    if source.count('/') != 1 or source.startswith(('.', '/', '~')):
        raise FileNotFoundError(f'{source}: expected a folder, a .gguf file or a hub name OWNER/MODEL, found none')
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_CACHE.startswith('~'):  # would become a folder of that name, here
        raise FileNotFoundError(f'{source}: no home folder for models of the hub; set HOME or HF_HOME')

    def download(patterns: Iterable[str], revision: str | None) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # of the hub, and of the connection to it, which have no type in common
            reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
            raise FileNotFoundError(f'{source}: no such folder, and nothing from the hub: {reason}') from error

    folder = download(HUB_FILES, revision)
    _check_adapter(folder)
    if (listed := huggingface.read_index(folder)) is not None:
        # The folder's name is the commit, from which the revision may have moved on.
        download(sorted({glob.escape(file) for file in listed.values()}), folder.name)
    return folder


def _check_adapter(folder: Path) -> None:
    """Refuses the folder of a LoRA adapter, which has no weights of its own."""
    file = folder / 'adapter_config.json'
    if file.exists() and not (folder / 'config.json').exists():
        base = huggingface.read_json(file).get('base_model_name_or_path')
        raise ValueError(f'{folder}: expected a whole model, found a LoRA adapter of {base}: merge it into that model')


def load_tokenizer(folder: Path) -> Any:
    """Loads the transformers tokenizer of a model folder."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for what its version does not know
        reason = ' '.join(str(error).split())
        raise ValueError(f'{folder}: expected the files of a tokenizer, found: {reason}') from error


def resize_vocabulary(
    params: Params, config: TransformerConfig, num_rows: int, copy_from: int
) -> tuple[Params, TransformerConfig]:
    """Adds a token of id `num_rows - 1` to the embedding (and to the head of an untied model).

    The new row is a copy of another token's row: the terminal token starts as end-of-turn. Rows between the old
    vocabulary and the new token are copies as well. If the embedding has spare rows (Qwen), only the new row is
    written. The model must not know the token yet: its row would be overwritten.

    Args:
        params: of `config`; host or device arrays. Device arrays keep their sharding.
        num_rows: number of ids in use, including the new token.
        copy_from: id of the copied row.

    Returns:
        New params, which share unchanged arrays with the old, and their config, with `vocab_size` at least `num_rows`.
    """
    if not 0 <= copy_from < min(num_rows - 1, config.vocab_size):
        raise ValueError(
            f'resize_vocabulary: copy_from: expected an id from 0 to {min(num_rows - 1, config.vocab_size) - 1}, '
            f'found {copy_from}'
        )
    resized = dataclasses.replace(config, vocab_size=max(config.vocab_size, num_rows))
    first = min(config.vocab_size, num_rows - 1)
    extra = resized.padded_vocab_size - config.padded_vocab_size

    def resize(rows: Any) -> Any:
        if isinstance(rows, jax.Array):
            grow = jax.jit(
                lambda x: jnp.pad(x, ((0, extra), (0, 0))).at[first:num_rows].set(x[copy_from]),
                out_shardings=rows.sharding,
            )
            return grow(rows)
        grown = np.pad(rows, ((0, extra), (0, 0)))
        grown[first:num_rows] = rows[copy_from]
        return grown

    decoder = params['decoder'] | {
        name: resize(params['decoder'][name]) for name in ('embedding', 'head') if name in params['decoder']
    }
    return {**params, 'decoder': decoder}, resized
