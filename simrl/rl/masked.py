"""Reductions over the entries that a mask selects.

They select with `where` and never multiply: 0 * nan is nan, while `where` keeps what is masked out of the result and
out of the gradient. Over no entries at all each of them is 0.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def count(mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """The number of selected entries, float32 (exact up to 2^24)."""
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)


def total(x: jax.Array, mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """The sum of the selected entries of `x`, in float32."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims, dtype=jnp.float32)


def mean(x: jax.Array, mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """The mean of the selected entries of `x`, float32."""
    number = count(mask, axis, keepdims=keepdims)
    return total(x, mask, axis, keepdims=keepdims) / jnp.maximum(number, 1)


def variance(x: jax.Array, mask: jax.Array, axis: Axis = None, *, ddof: int = 0, keepdims: bool = False) -> jax.Array:
    """The variance of the selected entries of `x`, float32; 0 over `ddof` entries or fewer.

    Args:
        ddof: 0 divides by the number of entries, 1 by one less (the unbiased estimate).
    """
    # Selected before squaring: the gradient of a square is 2 x times 0 where masked, and NaN times 0 is NaN.
    deviation = jnp.where(mask, x - mean(x, mask, axis, keepdims=True), 0.0)
    degrees = count(mask, axis, keepdims=keepdims) - ddof
    squares = total(jnp.square(deviation), mask, axis, keepdims=keepdims)
    return jnp.where(degrees > 0, squares / jnp.maximum(degrees, 1), 0.0)


def maximum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """The largest selected entry of a nonnegative `x`."""
    return jnp.max(jnp.where(mask, x, 0), axis=axis)
