"""Attention of one layer: rotary positions, and grouped-query attention by one of its implementations.

All implementations compute the same, with a float32 softmax. They differ in speed, memory and rounding:

- `xla` has the scores of whole rows, `[B, N, T, S]`: the fastest for short rows.
- `chunked` has the scores of one pair of blocks at a time (`chunked_attention.py`), on every backend.
- `splash` and `cudnn` are the same as kernels for a TPU and for an NVIDIA GPU (`attention_kernels.py`).
- `auto` is a kernel where there is one, else `chunked` for long rows and `xla` for short ones.

Dimension letters as in `transformer.py`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from simrl.models import attention_kernels, chunked_attention
from simrl.models.cache import CacheLayout, in_both_layouts

Implementation = Literal['auto', 'xla', 'chunked', 'splash', 'cudnn']

# Tokens of a row, and a cache's capacity, from which on `auto` computes by blocks. A GPU's loops wait for the host in
# every round.
LONG_ROW = {'cpu': 256, 'tpu': 256, 'gpu': 1024}
LONG_CACHE = {'cpu': 512, 'tpu': 512, 'gpu': 4096}
FEW_TOKENS = 32  # fed to a cache at once: fewer have few scores
CHUNK = {'cpu': 96, 'tpu': 512, 'gpu': 512}  # positions of a block; a CPU is fastest if its own caches hold the scores


def rotate(x: jax.Array, positions: jax.Array, frequency: jax.Array) -> jax.Array:
    """Applies half-split RoPE (Su et al. 2021, arXiv:2104.09864): dimension i is paired with i + H/2.

    Args:
        x: `[B, T, heads, H]`.
        positions: int32 `[B, T]`.
        frequency: float32 `[H / 2]`.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    The query heads of one key/value head are rows of one batched matrix product, which is fast on every backend.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, K, H, S]`.
        value: `[B, K, S, H]`.
        mask: bool `[B, T, S]` or `[1, T, S]`, True where a query attends.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, size = value.shape[1:3]
    grouped = query.reshape(batch, time, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)  # [B, K, G T, H]
    scores = jnp.matmul(rows, key, preferred_element_type=jnp.float32).reshape(batch, kv_heads, -1, time, size)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.matmul(weights.reshape(batch, kv_heads, -1, size), value)
    mixed = mixed.reshape(batch, kv_heads, -1, time, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, time, heads, head_dim)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: Implementation) -> jax.Array:
    """Causal attention over whole left-aligned rows.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, T, K, H]`.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.

    Raises:
        ValueError: the backend does not have the implementation.
    """
    platform = attention_kernels.platform()
    chosen = choose(implementation, platform, query)
    if chosen == 'xla':
        time = query.shape[1]
        causal = jnp.tril(jnp.ones((1, time, time), bool))
        return attend(query, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), causal)
    functions = {
        'chunked': lambda *arrays: chunked_attention.causal(*arrays, CHUNK[platform]),
        'splash': attention_kernels.splash,
        'cudnn': attention_kernels.cudnn,
    }
    return attention_kernels.on_own_heads(functions[chosen], query, key, value, kv_heads_at=(2, 2))


def choose(implementation: Implementation, platform: str, query: jax.Array) -> str:
    """The implementation of causal attention that a backend computes `auto` with, or the given one, checked."""
    needed = {'splash': 'tpu', 'cudnn': 'gpu'}.get(implementation, platform)
    if platform != needed:
        raise ValueError(f'Execution.attention: {implementation!r} needs a {needed.upper()}, found {platform}')
    if implementation != 'auto':
        return implementation
    if platform == 'gpu' and attention_kernels.cudnn_takes(query):
        return 'cudnn'
    if query.shape[1] < LONG_ROW[platform]:
        return 'xla'
    return 'splash' if platform == 'tpu' else 'chunked'


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    implementation: Implementation,
    layout: CacheLayout = 'heads_first',
) -> jax.Array:
    """Attention of given tokens to a cache that has them already; a query attends to the positions up to its own.

    Few tokens, as in decoding, have few scores. Many attend to a long cache by blocks, on a TPU by a kernel.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, T, K, H]`, of the given tokens, with the heads of the cache.
        keys, values: in the layout.
        positions: int32 `[B, T]`, as of `transformer.apply`.
        implementation: `xla` and `chunked` as they say; the others by the backend, T and S.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    heads_first, time_first = in_both_layouts(keys, values, layout)
    time, capacity, platform = query.shape[1], heads_first[1].shape[2], attention_kernels.platform()
    short = time < FEW_TOKENS or capacity < LONG_CACHE[platform]
    if implementation == 'xla' or (implementation != 'chunked' and short) or time == 1:
        return attend(query, *heads_first, jnp.arange(capacity) <= positions[:, :, None])
    if implementation != 'chunked' and platform == 'tpu':
        given = (key, value, *time_first, positions)
        return attention_kernels.on_own_heads(
            attention_kernels.splash_cached, query, *given, kv_heads_at=(2, 2, 2, 2, None)
        )
    return chunked_attention.cached(query, *heads_first, positions, CHUNK[platform])
