"""Reductions over the entries that a mask selects.

They select with `where` instead of multiplying: 0 * nan is nan, while `where` keeps masked entries out of the result
and the gradient. Over no entries each of them is 0.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def count(mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """Number of selected entries, float32 (exact up to 2^24)."""
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)


def total(x: jax.Array, mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """Sum of the selected entries of `x`, float32."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims, dtype=jnp.float32)


def mean(x: jax.Array, mask: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """Mean of the selected entries of `x`, float32."""
    number = count(mask, axis, keepdims=keepdims)
    return total(x, mask, axis, keepdims=keepdims) / jnp.maximum(number, 1)


def variance(x: jax.Array, mask: jax.Array, axis: Axis = None, *, ddof: int = 0, keepdims: bool = False) -> jax.Array:
    """Variance of the selected entries of `x`, float32; 0 over `ddof` entries or fewer.

    Args:
        ddof: 0 divides by the number of entries, 1 by one less (the unbiased estimate).
    """
    # Selected before squaring: the gradient of a masked square would be 2 x * 0, and NaN * 0 is NaN.
    deviation = jnp.where(mask, x - mean(x, mask, axis, keepdims=True), 0.0)
    degrees = count(mask, axis, keepdims=keepdims) - ddof
    squares = total(jnp.square(deviation), mask, axis, keepdims=keepdims)
    return jnp.where(degrees > 0, squares / jnp.maximum(degrees, 1), 0.0)


def maximum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Largest selected entry of a nonnegative `x`."""
    return jnp.max(jnp.where(mask, x, 0), axis=axis)
