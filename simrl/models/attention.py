"""Attention of one layer: rotary positions, grouped-query attention, and writes to the KV cache.

Dimension letters as in `transformer.py`.
"""

import math

import jax
import jax.numpy as jnp


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


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str) -> jax.Array:
    """Causal attention over whole left-aligned rows; arguments and result are `[B, T, heads, H]`."""
    if implementation == 'cudnn':
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
    time = query.shape[1]
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    return attend(query, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), causal)


def write_cache(
    keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes `[B, T, K, H]` keys and values to a layer's cache; positions at or past the capacity are dropped."""

    def write(
        keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return (
            keys.at[:, :, positions].set(key.transpose(1, 2, 0), mode='drop'),
            values.at[:, positions].set(value.swapaxes(0, 1), mode='drop'),
        )

    # Mapped over rows, the writes are local to each device. With an index of rows XLA would gather all keys everywhere.
    return jax.vmap(write)(keys, values, positions, key, value)
