"""Rows of a batch on a mesh: kept split over its axis `data`, also where a batch is taken in pieces."""

from typing import Any

import jax
from jax.sharding import PartitionSpec


def rows_are_split(num_rows: int) -> bool:
    """Whether a mesh is in use (`jax.set_mesh`) whose axis `data` divides so many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return 'data' in mesh.axis_names and num_rows % mesh.shape['data'] == 0


def split_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Keeps an array split by its rows, which lie along `axis`, over `data`, and whole on `model`.

    Without it XLA may split a product along the weights' dimension instead, and compute every row on every device.
    Outside `jax.set_mesh`, or where the mesh axis does not divide the rows, it does nothing.
    """
    if not rows_are_split(x.shape[axis]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, 'data'))


def at_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]` of `[B, ...]`, with one or more indices for each row, which should be in bounds.

    The gather says that rows are apart, and every device reads its own; of `x[arange(B), index]` XLA cannot tell, and
    has the devices exchange them.
    """
    return jax.vmap(lambda row, i: row[i])(x, index)


def set_at_rows(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """`[B, ...]` with `x[b, index[b]]` set to `new[b]`, where that is in bounds; as apart as in `at_rows`."""
    return jax.vmap(lambda row, i, entry: row.at[i].set(entry, mode='drop'))(x, index, new)


def deal_rows(tree: Any, pieces: int) -> Any:
    """Leaves `[B, ...]` -> `[pieces, B / pieces, ...]`; row i goes to piece i mod `pieces`.

    Dealing rows out, instead of cutting, leaves them on the device that holds them when rows are sharded.
    """
    return jax.tree.map(lambda x: split_rows(x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), axis=1), tree)


def gather_rows(tree: Any) -> Any:
    """Undoes `deal_rows`."""
    return jax.tree.map(lambda x: split_rows(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), tree)
