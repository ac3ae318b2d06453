"""The KV cache: keys and values of processed tokens, in the layout that the backend reads and writes in place.

Dimension letters as in `transformer.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models.attention_kernels import platform

# Layout of a layer's cache: keys and values `[B, K, H, S]` and `[B, K, S, H]`, or both `[B, S, K, H]`.
CacheLayout = Literal['heads_first', 'time_first']

# Products read keys and values in place if heads are first. A TPU writes a token in place if time is first: of another
# layout each program would make a copy, with the whole cache, and copy it back.
CACHE_LAYOUTS: dict[str, CacheLayout] = {'cpu': 'heads_first', 'tpu': 'time_first', 'gpu': 'heads_first'}


def heads_axis(layout: CacheLayout) -> int:
    """The dimension K of a layer's keys and of its values."""
    return 1 if layout == 'heads_first' else 2


@flax.struct.dataclass
class Cache:
    """Keys and values of processed tokens, one array per layer, in the compute dtype.

    Each layer has its own arrays, which are updated in place. On a mesh heads may be repeated (`heads_of_cache`).

    Attributes:
        key: L arrays `[B, K, H, S]`, or `[B, S, K, H]` if time is first.
        value: L arrays `[B, K, S, H]`, or `[B, S, K, H]`.
        layout: static.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    layout: CacheLayout = flax.struct.field(pytree_node=False, default='heads_first')

    @property
    def capacity(self) -> int:
        return self.value[0].shape[self._time_axes[1]]

    def layers(self) -> list['Cache']:
        """Caches of a layer each, with its arrays."""
        pairs = zip(self.key, self.value, strict=True)
        return [dataclasses.replace(self, key=(key,), value=(value,)) for key, value in pairs]

    def delete(self) -> None:
        """Frees its memory; not for use inside a jit."""
        for array in (*self.key, *self.value):
            array.delete()

    @property
    def heads_axis(self) -> int:
        """The dimension K of keys and of values."""
        return heads_axis(self.layout)

    @property
    def _time_axes(self) -> tuple[int, int]:
        """The dimensions S of keys and of values."""
        return (3, 2) if self.layout == 'heads_first' else (1, 1)

    def map(self, function: Callable[[jax.Array, int], jax.Array]) -> 'Cache':
        """Applies a function of an array and its dimension S to all arrays."""
        of_key, of_value = self._time_axes
        return dataclasses.replace(
            self,
            key=tuple(function(x, of_key) for x in self.key),
            value=tuple(function(x, of_value) for x in self.value),
        )


def empty_cache(num_layers: int, batch_size: int, capacity: int, heads: int, head_dim: int, dtype: str) -> Cache:
    """Makes a cache of zeros in the layout of the backend; see `transformer.init_cache`."""
    layout = CACHE_LAYOUTS[platform()]
    shapes = [(batch_size, capacity, heads, head_dim)] * 2
    if layout == 'heads_first':
        shapes = [(batch_size, heads, head_dim, capacity), (batch_size, heads, capacity, head_dim)]
    key, value = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for shape in shapes)
    return Cache(key, value, layout)


def heads_of_cache(num_heads: int, num_kv_heads: int, devices: int) -> int:
    """The number of key/value heads of a cache: each once, or several times in a row.

    If the `devices` of the mesh's axis `model` are more than the key/value heads, or do not divide them, these are
    repeated as often as gives each device the same number, those that its query heads read. Whole, they would take
    more room on each device, and XLA would split them, and gather them again at the end of each program.
    """
    heads = math.lcm(num_kv_heads, devices)
    return heads if num_heads % heads == 0 else num_kv_heads


def repeat_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """Repeats each head of `[B, T, K, H]` until there are as many as a cache has."""
    return x if x.shape[2] == num_heads else jnp.repeat(x, num_heads // x.shape[2], axis=2)


def extended(cache: Cache, capacity: int) -> Cache:
    """Pads the cache to `capacity` tokens, at least its present capacity."""
    more = capacity - cache.capacity

    def padded(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, more)
        return jnp.pad(x, widths)

    return cache.map(padded)


def cache_prefix(cache: Cache, capacity: int) -> Cache:
    """Slices the cache to its first `capacity` positions, which makes attention over it cheaper."""
    return cache.map(lambda x, axis: jax.lax.slice_in_dim(x, 0, capacity, axis=axis))


def with_cache_prefix(cache: Cache, first: Cache) -> Cache:
    """Undoes `cache_prefix`: writes `first` over the first positions of the cache."""
    origin = (0, 0, 0, 0)
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, origin), cache, first)


def write_cache(
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    value: jax.Array,
    layout: CacheLayout = 'heads_first',
) -> tuple[jax.Array, jax.Array]:
    """Writes `[B, T, K, H]` keys and values to a layer's cache; positions at or past the capacity are dropped."""

    def write(
        keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if layout == 'time_first':
            return keys.at[positions].set(key, mode='drop'), values.at[positions].set(value, mode='drop')
        return (
            keys.at[:, :, positions].set(key.transpose(1, 2, 0), mode='drop'),
            values.at[:, positions].set(value.swapaxes(0, 1), mode='drop'),
        )

    # Mapped over rows, the writes are local to each device. With an index of rows XLA would gather all keys everywhere.
    return jax.vmap(write)(keys, values, positions, key, value)


def in_both_layouts(
    keys: jax.Array, values: jax.Array, layout: CacheLayout
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Keys and values with heads first, and with time first."""
    if layout == 'heads_first':
        return (keys, values), (keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2))
    return (keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2)), (keys, values)


def stacked(layers: Sequence[Cache]) -> Cache:
    """The cache of all these layers, of one or more each."""
    key, value = (tuple(x for layer in layers for x in getattr(layer, name)) for name in ('key', 'value'))
    return dataclasses.replace(layers[0], key=key, value=value)


def by_layer(change: Callable[[Cache], Cache], cache: Cache) -> Cache:
    """The cache as `change` makes it of each layer, which is then deleted: there need be no room for two caches.

    Args:
        change: a jitted function, so that all layers are one program. Not for use inside a jit.
    """
    changed = []
    for layer in cache.layers():
        changed.append(change(layer))
        layer.delete()
    return stacked(changed)
