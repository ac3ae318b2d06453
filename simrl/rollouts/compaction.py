"""Batch compaction: finished conversations leave the decode batch; at the end all rows return in their first order.

A decode step costs what all rows of the batch cost, finished ones included. So between two messages, where the running
rows fit a smaller batch, the others leave it:

1. `all_active` makes a batch of all rows.
2. `compact` stores all rows without their caches. Then it gathers the running rows, padded with finished ones, which
   write nothing, into a smaller batch.
3. `restore` returns all rows in their first order.

No token depends on this, since none depends on a row's neighbours. Every batch size is a program of its own to compile,
so there are at most `MAX_HALVINGS` + 1 of them: all rows, a half and a quarter.

On a mesh each device keeps its own rows: B rows are `shards` equal parts, one on each device of the axis `data`, and
every part has the same number of active rows. So no cache goes from device to device, and the part with the most
running rows decides the size.
"""

import dataclasses
import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from simrl.models.cache import Cache, by_layer
from simrl.models.rows import gather_per_row, num_shards, rows_are_sharded, scatter_per_row

MIN_ROWS = 8  # with fewer rows a decode step is hardly cheaper
MAX_HALVINGS = 2

_Tree = TypeVar('_Tree')
_Dialogue = TypeVar('_Dialogue')


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)


def shard_tree(tree: _Tree) -> _Tree:
    """Shards all arrays of a tree by their rows over `data`, as `models.rows.shard_rows` does, caches also by heads.

    Each program returns its arrays in the same shards, so that the next one is not compiled twice.
    """

    def shard(x: jax.Array, heads_axis: int | None) -> jax.Array:
        if not rows_are_sharded(x.shape[0]):
            return x
        axes: list[Any] = ['data', *[None] * (x.ndim - 1)]
        if heads_axis is not None:
            parts = jax.sharding.get_abstract_mesh().shape.get('model')
            axes[heads_axis] = 'model' if parts and x.shape[heads_axis] % parts == 0 else PartitionSpec.UNCONSTRAINED
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

    def sharded(x: jax.Array | Cache) -> jax.Array | Cache:
        if isinstance(x, Cache):
            axis = x.heads_axis
            return jax.tree.map(lambda y: shard(y, axis), x)
        return shard(x, None)

    return jax.tree.map(sharded, tree, is_leaf=_is_cache)


def gather_rows(tree: _Tree, index: jax.Array | np.ndarray) -> _Tree:
    """The rows at `index` of all arrays of a tree, caches included; copies, whatever the index.

    Args:
        index: int `[rows]`; repeat indices to continue a conversation several times. Or int `[shards, rows / shards]`:
            indices within each of so many equal parts of the rows.
    """
    index = jnp.asarray(index)
    index = index if index.ndim == 2 else index[None]

    def gathered(x: jax.Array) -> jax.Array:
        shards = x.reshape(index.shape[0], -1, *x.shape[1:])
        return gather_per_row(shards, index).reshape(-1, *x.shape[1:])

    return shard_tree(jax.tree.map(gathered, tree))


def without_caches(tree: _Tree) -> _Tree:
    """The same tree with None in the place of each cache."""
    return jax.tree.map(lambda x: None if _is_cache(x) else x, tree, is_leaf=_is_cache)


@dataclasses.dataclass(frozen=True, eq=False)
class ActiveBatch(Generic[_Dialogue]):
    """B conversations, A of which are in the decode batch.

    Attributes:
        active: a tree of arrays with A rows, caches among them.
        inputs: a tree of the other arrays that a message depends on, A rows.
        index: int `[shards, A / shards]`, the index of each active row in its part of all rows.
        num_rows: B.
        stored: as `active` without caches, B rows, the inactive ones up to date; None while all are active.
    """

    active: _Dialogue
    inputs: Any
    index: np.ndarray
    num_rows: int
    stored: _Dialogue | None

    @property
    def rows(self) -> np.ndarray:
        """The index of each active row among all rows, int `[A]`."""
        shards = self.index.shape[0]
        return (self.index + np.arange(shards)[:, None] * (self.num_rows // shards)).reshape(-1)


def all_active(dialogue: _Dialogue, inputs: Any, num_rows: int) -> ActiveBatch[_Dialogue]:
    """A batch of all rows. Its arrays are donated by what follows: do not read them again."""
    shards = num_shards(num_rows)
    index = np.broadcast_to(np.arange(num_rows // shards), (shards, num_rows // shards))
    return ActiveBatch(dialogue, inputs, index, num_rows, None)


def batch_sizes(num_rows: int, shards: int) -> list[int]:
    """The sizes of each shard's part of the batch, from all of its rows down. Halves are rounded up."""
    sizes = [num_rows // shards]
    while len(sizes) <= MAX_HALVINGS and sizes[-1] > 1 and (half := -(-sizes[-1] // 2)) * shards >= MIN_ROWS:
        sizes.append(half)
    return sizes


def compact(batch: ActiveBatch[_Dialogue], running: np.ndarray) -> ActiveBatch[_Dialogue]:
    """The batch in the smallest size that has room for the `running` rows (bool `[A]`).

    Views are gathered one after the other, layer by layer, and each old layer is freed: beside both caches there is
    never more than one of them.
    """
    shards, size = batch.index.shape
    running = running.reshape(shards, size)
    most = running.sum(axis=1).max()
    smallest = min(s for s in batch_sizes(batch.num_rows, shards) if s >= most)
    if smallest >= size:
        return batch
    stored = restore(batch)
    kept = np.sort(np.argsort(~running, axis=1, kind='stable')[:, :smallest], axis=1)
    leaves, structure = jax.tree.flatten((batch.active, batch.inputs), is_leaf=_is_cache)
    others = iter(jit_gather_rows([leaf for leaf in leaves if not _is_cache(leaf)], kept))
    active, inputs = jax.tree.unflatten(
        structure,
        [
            by_layer(lambda layer: jit_gather_rows(layer, kept), leaf) if _is_cache(leaf) else next(others)
            for leaf in leaves
        ],
    )
    return ActiveBatch(active, inputs, np.take_along_axis(batch.index, kept, axis=1), batch.num_rows, stored)


def restore(batch: ActiveBatch[_Dialogue]) -> _Dialogue:
    """All rows in their first order, without caches."""
    active = without_caches(batch.active)
    return active if batch.stored is None else scatter_rows(batch.stored, active, batch.index)


jit_gather_rows = jax.jit(gather_rows)


@functools.partial(jax.jit, donate_argnames='into')
def scatter_rows(into: _Tree, tree: _Tree, index: jax.Array | np.ndarray) -> _Tree:
    """Writes rows over those at `index` (int `[shards, rows / shards]`, as in `gather_rows`); there are no caches."""
    index = jnp.asarray(index)

    def scattered(whole: jax.Array, rows: jax.Array) -> jax.Array:
        shards, new = (x.reshape(index.shape[0], -1, *x.shape[1:]) for x in (whole, rows))
        return scatter_per_row(shards, index, new).reshape(whole.shape)

    return shard_tree(jax.tree.map(scattered, into, tree))
