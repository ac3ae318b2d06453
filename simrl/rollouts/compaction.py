"""Conversations in which some have ended; out comes a smaller batch of those that go on, and in the end all of them.

A decode step costs what the rows cost that are held, not what those cost that still speak. So between two messages,
where the running rows fit a smaller size, the others leave:

1. `crowd_of` makes a crowd in which every row is held.
2. `compact` puts away what was said in the held rows, and both views without their caches, in their own places among
   all rows. Then it holds the running rows alone, filled up with ended ones, which write nothing.
3. `everyone` puts away what is still held and returns all rows, in their first order.

No token depends on this, as none depends on a row's neighbours. Every size is a program of its own to compile, so there
are at most `MOST_HALVINGS` + 1 of them: all rows, and halves of halves of them.

On a mesh each device keeps rows of its own: B rows are `parts` equal parts, one on each device of the axis `data`, of
which the same number is held. So no cache goes from device to device, and the fullest part decides the size.
"""

import dataclasses
import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from simrl.models.rows import gather_per_row, rows_are_sharded, scatter_per_row
from simrl.models.transformer import Cache

LEAST_ROWS = 8  # under which a decode step is hardly cheaper with fewer rows
MOST_HALVINGS = 2

_Tree = TypeVar('_Tree')
_Dialogue = TypeVar('_Dialogue')


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)


def keep_split(tree: _Tree) -> _Tree:
    """Keeps arrays with rows split by them over `data`, as `models.rows.shard_rows` does, caches also by their heads.

    What goes from program to program lies the same way after each of them, so that none is compiled for two.
    """

    def split(x: jax.Array, rest: Any) -> jax.Array:
        if not rows_are_sharded(x.shape[0]):
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec('data', *[rest] * (x.ndim - 1)))

    def mapped(x: jax.Array | Cache) -> jax.Array | Cache:
        if isinstance(x, Cache):
            return jax.tree.map(lambda y: split(y, PartitionSpec.UNCONSTRAINED), x)
        return split(x, None)

    return jax.tree.map(mapped, tree, is_leaf=_is_cache)


def take_rows(tree: _Tree, index: jax.Array | np.ndarray) -> _Tree:
    """The rows at `index` of all arrays of a tree, caches included; copies, whatever the index.

    Args:
        index: int `[rows]`; repeat indices to continue a conversation several times. Or int `[parts, rows / parts]`:
            of each of so many equal parts of the rows, the indices within it.
    """
    index = jnp.asarray(index)
    index = index if index.ndim == 2 else index[None]

    def taken(x: jax.Array) -> jax.Array:
        parts = x.reshape(index.shape[0], -1, *x.shape[1:])
        return gather_per_row(parts, index).reshape(-1, *x.shape[1:])

    return keep_split(jax.tree.map(taken, tree))


def without_caches(tree: _Tree) -> _Tree:
    """The same tree with None in the place of each cache."""
    return jax.tree.map(lambda x: None if _is_cache(x) else x, tree, is_leaf=_is_cache)


@dataclasses.dataclass(frozen=True, eq=False)
class Crowd(Generic[_Dialogue]):
    """B conversations, of which H are held.

    Attributes:
        held: a tree of arrays, H rows each, caches among them.
        inputs: the same of what goes into each message beside it.
        index: int `[parts, H / parts]`, where in its own part of all rows each held row belongs.
        num_rows: B.
        put_away: as `held` without caches, B rows, of which those that are not held are up to date; None while all are.
    """

    held: _Dialogue
    inputs: Any
    index: np.ndarray
    num_rows: int
    put_away: _Dialogue | None

    @property
    def rows(self) -> np.ndarray:
        """Which of all rows each held row is, int `[H]`."""
        parts = self.index.shape[0]
        return (self.index + np.arange(parts)[:, None] * (self.num_rows // parts)).reshape(-1)


def crowd_of(dialogue: _Dialogue, inputs: Any, num_rows: int) -> Crowd[_Dialogue]:
    """A crowd that holds all rows. Its arrays are used up by what is done with the crowd: do not read them again."""
    parts = jax.sharding.get_abstract_mesh().shape['data'] if rows_are_sharded(num_rows) else 1
    index = np.broadcast_to(np.arange(num_rows // parts), (parts, num_rows // parts))
    return Crowd(dialogue, inputs, index, num_rows, None)


def held_sizes(num_rows: int, parts: int) -> list[int]:
    """How many rows of each part may be held, falling from all of them. Halves are rounded up."""
    sizes = [num_rows // parts]
    while len(sizes) <= MOST_HALVINGS and sizes[-1] > 1 and (half := -(-sizes[-1] // 2)) * parts >= LEAST_ROWS:
        sizes.append(half)
    return sizes


def compact(crowd: Crowd[_Dialogue], running: np.ndarray) -> Crowd[_Dialogue]:
    """The crowd, held in the smallest size that has room for the `running` rows (bool `[H]`).

    Views are taken one after the other and the old cache is freed each time: beside both old caches there is never more
    than the new one of one view.
    """
    parts, size = crowd.index.shape
    running = running.reshape(parts, size)
    most = running.sum(axis=1).max()
    smallest = min(s for s in held_sizes(crowd.num_rows, parts) if s >= most)
    if smallest >= size:
        return crowd
    put_away = everyone(crowd)
    kept = np.sort(np.argsort(~running, axis=1, kind='stable')[:, :smallest], axis=1)
    leaves, structure = jax.tree.flatten((crowd.held, crowd.inputs), is_leaf=_is_cache)
    others = iter(_take([leaf for leaf in leaves if not _is_cache(leaf)], kept))
    held, inputs = jax.tree.unflatten(
        structure, [_taken_cache(leaf, kept) if _is_cache(leaf) else next(others) for leaf in leaves]
    )
    return Crowd(held, inputs, np.take_along_axis(crowd.index, kept, axis=1), crowd.num_rows, put_away)


def everyone(crowd: Crowd[_Dialogue]) -> _Dialogue:
    """All rows in their first order, without caches."""
    held = without_caches(crowd.held)
    return held if crowd.put_away is None else _put_rows(crowd.put_away, held, crowd.index)


_take = jax.jit(take_rows)


def _taken_cache(cache: Cache, index: np.ndarray) -> Cache:
    taken = _take(cache, index)
    for array in jax.tree.leaves(cache):
        array.delete()
    return taken


@functools.partial(jax.jit, donate_argnames='into')
def _put_rows(into: _Tree, tree: _Tree, index: jax.Array | np.ndarray) -> _Tree:
    """Writes rows over those at `index` (int `[parts, rows / parts]`, as in `take_rows`); there are no caches."""
    index = jnp.asarray(index)

    def put(whole: jax.Array, rows: jax.Array) -> jax.Array:
        parts, new = (x.reshape(index.shape[0], -1, *x.shape[1:]) for x in (whole, rows))
        return scatter_per_row(parts, index, new).reshape(whole.shape)

    return keep_split(jax.tree.map(put, into, tree))
