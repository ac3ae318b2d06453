"""A model source -> config, params and tokenizer; and a vocabulary that grows by the terminal token.

A source is the name of a model on the Hugging Face hub, a local Hugging Face folder, or a `.gguf` file.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.models import sharding
from simrl.models.files import gguf, huggingface
from simrl.models.transformer import Params, TransformerConfig

# What is taken from the hub: no pickles, no code, and not the second copy of the weights that some models keep.
WEIGHTS = ('model.safetensors', 'model-*-of-*.safetensors', huggingface.HEADS_FILE)
HUB_FILES = ('*.json', '*.jinja', '*.txt', 'tokenizer.model', *WEIGHTS)


def load_model(
    source: str,
    *,
    dtype: str = 'float32',
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TRAINING_RULES,
    revision: str | None = None,
) -> tuple[TransformerConfig, Params, Any]:
    """Loads a model and its tokenizer. Code that comes with a model is never run.

    Args:
        source: a hub name ('HuggingFaceTB/SmolLM2-135M-Instruct'), a folder with `config.json`, safetensors and the
            tokenizer's files, or a file whose name ends in `.gguf`.
        dtype: of the params.
        mesh: where given, params are put onto it by `rules` (from a folder, read straight into their shards);
            otherwise they are host (numpy) arrays.
        revision: of a hub model; None for its main branch.

    Returns:
        config, params `{'decoder': ..., heads?}`, and a transformers tokenizer.

    Raises:
        FileNotFoundError: nothing at `source`, or a file missing in it.
        ValueError: what is there cannot be read as a model that this decoder computes.
    """
    path = Path(source)
    if path.suffix == '.gguf':
        if not path.is_file():
            raise FileNotFoundError(f'{source}: expected a GGUF file, found none')
        config, params, tokenizer = gguf.load(path)
        params = jax.tree.map(lambda x: x.astype(huggingface.dtype_of(dtype)), params)
        if mesh is not None:
            params = sharding.shard(params, sharding.param_shardings(config, mesh, rules))
        return config, params, tokenizer
    folder = find_folder(source, revision)
    config = huggingface.load_config(folder)
    shardings = None if mesh is None else functools.partial(sharding.param_shardings, config, mesh, rules)
    params = huggingface.load_params(folder, config, dtype=dtype, shardings=shardings)
    return config, params, load_tokenizer(folder)


def load_config(source: str, *, revision: str | None = None) -> tuple[TransformerConfig, Any]:
    """The config and the tokenizer of a model source, as `load_model` gives them, without reading its weights."""
    path = Path(source)
    if path.suffix == '.gguf':
        if not path.is_file():
            raise FileNotFoundError(f'{source}: expected a GGUF file, found none')
        return gguf.load_config(path)
    folder = find_folder(source, revision)
    return huggingface.load_config(folder), load_tokenizer(folder)


def find_folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a model source that is no GGUF file; a hub model is downloaded into the hub's cache."""
    path = Path(source)
    if path.is_dir():
        return path
    if source.count('/') != 1 or source.startswith(('.', '/', '~')):
        raise FileNotFoundError(f'{source}: expected a folder, a .gguf file or a hub name OWNER/MODEL, found none')
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES)))
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f'{source}: no such folder here, and the hub gave no model of this name: {error}'
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f'{folder}: expected the files of a tokenizer, found: {error}') from error


def resize_vocabulary(
    params: Params, config: TransformerConfig, num_rows: int, copy_from: int
) -> tuple[Params, TransformerConfig]:
    """Makes the embedding (and the head of an untied model) hold a last token of id `num_rows - 1`.

    That token's row becomes a copy of another's: the terminal token starts as end-of-turn. Rows between the old
    vocabulary and it are copies too. Where the embedding has spare rows (Qwen), only the one row is written. It is for
    a model that does not know the token yet: a trained row of that id would be overwritten.

    Args:
        params: of `config`; host or device arrays. Device arrays keep their sharding.
        num_rows: ids in use, the new token's included.
        copy_from: the id whose row is copied.

    Returns:
        New params (arrays that do not change are shared with the old) and their config, whose `vocab_size` is the
        larger of the old one and `num_rows`.
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
