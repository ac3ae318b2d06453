"""Attention in plain JAX that never has the scores of whole rows: an online softmax over blocks of keys.

For a block of queries, blocks of keys are read one after the other. With s_j the scores of block j, a running maximum
m, a running sum z and a running mix o are corrected for each new maximum (Milakov & Gimelshein 2018, arXiv:1805.02867;
Rabe & Staats 2021, arXiv:2112.05682):

    m' = max(m, max s_j)     z' = z exp(m - m') + sum exp(s_j - m')     o' = o exp(m - m') + exp(s_j - m') v_j

and attention is o / z. The backward pass needs the log-sum-exp l = m + log z of each query, and computes the scores of
each pair of blocks anew (Dao et al. 2022, arXiv:2205.14135). With p = exp(s - l) and g the gradient of the result:

    dv = p^T g     dp = g v^T     ds = p (dp - sum(g o / z))     dq = ds k     dk = ds^T q

So memory is linear in the length of a row. Blocks of keys past a block of queries, about half of all, are skipped.

Besides the letters of `transformer.py`: C positions of a block, M blocks of a row.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

RESULT = 'attention'  # checkpoint name of what `causal` keeps for its backward pass besides its arguments


def block_size(time: int, largest: int, multiple: int = 16) -> int:
    """The size of equal blocks, up to `largest` and at least half of it, that cover `time` with the least padding."""
    largest = min(largest, -(-time // multiple) * multiple)
    return min(range(largest, largest // 2, -multiple), key=lambda size: -(-time // size) * size)


def _split(x: jax.Array, size: int) -> jax.Array:
    """Splits `[B, T, heads, H]` into blocks `[M, B, heads, C, H]`, padded with zeros."""
    batch, time, heads, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -time % size), (0, 0), (0, 0)))
    return x.reshape(batch, -1, size, heads, head_dim).transpose(1, 0, 3, 2, 4)


def _join(blocks: jax.Array, time: int) -> jax.Array:
    """Undoes `_split`."""
    _, batch, heads, _, head_dim = blocks.shape
    return blocks.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)[:, :time]


def _grouped(blocks: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes blocks `[M, B, N, C, H]` to `[M, B, K, G C, H]`: a key/value head's queries are rows of one product."""
    number, batch, _, _, head_dim = blocks.shape
    return blocks.reshape(number, batch, kv_heads, -1, head_dim)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _masked(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Sets scores `[B, K, G C, C']` to -inf where `visible`, bool `[B, C, C']` or `[1, C, C']`, is False."""
    time, size = visible.shape[1:]
    grouped = scores.reshape(*scores.shape[:2], -1, time, size)
    return jnp.where(visible[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def _empty(rows: tuple[int, ...], head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The running mix, maximum and sum before the first block of keys."""
    return (
        jnp.zeros((*rows, head_dim), jnp.float32),
        jnp.full((*rows, 1), -jnp.inf, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
    )


def _online(running: tuple[jax.Array, ...], scores: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    """Adds a block of keys to the running mix, maximum and sum. Each query sees a key of the first block."""
    mixed, maximum, total = running
    new = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
    weights, correction = jnp.exp(scores - new), jnp.exp(maximum - new)
    total = total * correction + jnp.sum(weights, axis=-1, keepdims=True)
    return mixed * correction + _product(weights.astype(value.dtype), value), new, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal(query: jax.Array, key: jax.Array, value: jax.Array, chunk: int) -> jax.Array:
    """Causal attention over whole left-aligned rows, with a float32 softmax.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, T, K, H]`.
        chunk: about how many positions a block has.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    return _forward(query, key, value, chunk)[0]


def _causal_mask(i: jax.Array, j: jax.Array, size: int) -> jax.Array:
    """True where a query of block i sees a key of block j, bool `[1, C, C]`."""
    index = jnp.arange(size)
    return (j * size + index <= (i * size + index)[:, None])[None]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Computes the result, and the log-sum-exp of each query's scores, float32 `[M, B, K, G C, 1]`."""
    time, head_dim = query.shape[1], query.shape[3]
    size = block_size(time, chunk)
    queries = _grouped(_split(query, size), key.shape[2])
    keys, values = _split(key, size).swapaxes(-1, -2), _split(value, size)

    def one_block(i: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(j: jax.Array, running: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            scores = _product(rows, keys[j]) / math.sqrt(head_dim)
            return _online(running, _masked(scores, _causal_mask(i, j, size)), values[j])

        mixed, maximum, total = jax.lax.fori_loop(0, i + 1, step, _empty(rows.shape[:-1], head_dim))
        return (mixed / total).astype(query.dtype), maximum + jnp.log(total)

    blocks = (jnp.arange(len(queries)), queries)
    mixed, normalizer = jax.lax.map(lambda block: one_block(*block), blocks)
    mixed = mixed.reshape(*mixed.shape[:2], -1, size, head_dim)
    return _join(mixed, time), normalizer


def _causal_forward(query: jax.Array, key: jax.Array, value: jax.Array, chunk: int) -> tuple[jax.Array, Any]:
    mixed, normalizer = (checkpoint_name(x, RESULT) for x in _forward(query, key, value, chunk))
    return mixed, (query, key, value, mixed, normalizer)


def _causal_backward(chunk: int, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, mixed, normalizer = kept
    time, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[2]
    size, scale = block_size(time, chunk), 1 / math.sqrt(head_dim)
    dtype = query.dtype
    queries = _grouped(_split(query, size), kv_heads)
    gradients = _grouped(_split(gradient, size), kv_heads)
    inner = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    inners = _grouped(_split(inner, size), kv_heads)
    keys, values = _split(key, size), _split(value, size)

    def one_block(sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        i, rows, grad_rows, inner, normalizer = block

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            grad_query, grad_keys, grad_values = carry
            scores = _product(rows, keys[j].swapaxes(-1, -2)) * scale
            prob = jnp.exp(_masked(scores, _causal_mask(i, j, size)) - normalizer)
            grad_prob = _product(grad_rows, values[j].swapaxes(-1, -2))
            grad_scores = (prob * (grad_prob - inner) * scale).astype(dtype)
            grad_value = _product(prob.astype(dtype).swapaxes(-1, -2), grad_rows)
            grad_key = _product(grad_scores.swapaxes(-1, -2), rows)
            return (
                grad_query + _product(grad_scores, keys[j]),
                grad_keys.at[j].add(grad_key),
                grad_values.at[j].add(grad_value),
            )

        start = (jnp.zeros(rows.shape, jnp.float32), *sums)
        grad_query, *sums = jax.lax.fori_loop(0, i + 1, step, start)
        return tuple(sums), grad_query.astype(dtype)

    zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    blocks = (jnp.arange(len(queries)), queries, gradients, inners, normalizer)
    (grad_keys, grad_values), grad_queries = jax.lax.scan(one_block, zeros, blocks)
    grad_queries = grad_queries.reshape(*grad_queries.shape[:2], -1, size, head_dim)
    return (
        _join(grad_queries, time),
        _join(grad_keys.astype(key.dtype), time),
        _join(grad_values.astype(value.dtype), time),
    )


causal.defvjp(_causal_forward, _causal_backward)


def cached(query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, chunk: int) -> jax.Array:
    """Attention of given tokens to a cache that has them, with a float32 softmax. It has no reverse derivative.

    Blocks of keys past the last position are not read, so time grows with the longest row and not with the capacity.

    Args:
        query: `[B, T, N, H]`.
        keys: `[B, K, H, S]`.
        values: `[B, K, S, H]`.
        positions: int32 `[B, T]`. A query attends to the positions up to its own; from S on its result is unspecified.
        chunk: positions of a block, if the cache has as many.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, capacity = values.shape[1:3]
    size = min(chunk, capacity)
    rows = query.reshape(batch, time, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, -1, head_dim)  # [B, K, G T, H]
    last = jnp.max(jnp.where(positions < capacity, positions, 0))

    def step(j: jax.Array, running: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = jnp.minimum(j * size, capacity - size)  # the last block overlaps the one before: padding would copy
        index = start + jnp.arange(size)
        visible = (index >= j * size) & (index <= positions[:, :, None])
        scores = _product(rows, jax.lax.dynamic_slice_in_dim(keys, start, size, axis=3)) / math.sqrt(head_dim)
        return _online(running, _masked(scores, visible), jax.lax.dynamic_slice_in_dim(values, start, size, axis=2))

    mixed, _, total = jax.lax.fori_loop(0, last // size + 1, step, _empty(rows.shape[:-1], head_dim))
    mixed = (mixed / total).astype(query.dtype).reshape(batch, kv_heads, -1, time, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, head_dim)
