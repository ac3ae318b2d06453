"""Rows of a batch, sharded over the mesh axis `data`: gathers, scatters and microbatches that keep them there."""

from typing import Any

import jax
from jax.sharding import PartitionSpec


def rows_are_sharded(num_rows: int) -> bool:
    """True if a mesh is set (`jax.set_mesh`) whose axis `data` divides `num_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 'data' in mesh.axis_names and num_rows % mesh.shape['data'] == 0


def num_shards(num_rows: int) -> int:
    """The number of equal parts of the rows on the devices of the mesh axis `data`; 1 if they are not sharded."""
    return jax.sharding.get_abstract_mesh().shape['data'] if rows_are_sharded(num_rows) else 1


def shard_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Constrains an array to be sharded by its rows (dimension `axis`) over `data` and replicated over `model`.

    Without the constraint XLA may shard a product along the weights' dimension and compute every row on every device.
    Outside `jax.set_mesh`, or if the mesh axis does not divide the rows, it does nothing.
    """
    if not rows_are_sharded(x.shape[axis]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, 'data'))


def shard_columns(x: jax.Array) -> jax.Array:
    """Constrains an array `[B, ..., D]` to be sharded by its last dimension over `data`, as training shards `D`.

    Between a lookup in the embedding and `shard_rows` it makes XLA exchange parts of rows, in the backward pass too.
    Without it some versions gather the gradients of all rows on every device.
    """
    shards = num_shards(x.shape[0])
    if shards == 1 or x.shape[-1] % shards:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * (x.ndim - 1), 'data'))


def gather_per_row(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers `x[b, index[b]]` from `[B, ...]`, with one or more indices per row, all in bounds.

    Mapped over rows, the gather is local to each device. For `x[arange(B), index]` XLA would exchange rows between
    devices.
    """
    return jax.vmap(lambda row, i: row[i])(x, index)


def scatter_per_row(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    """Sets `x[b, index[b]]` of `[B, ...]` to `new[b]`, dropping indices out of bounds; local like `gather_per_row`."""
    return jax.vmap(lambda row, i, entry: row.at[i].set(entry, mode='drop'))(x, index, new)


def split_microbatches(tree: Any, num_microbatches: int) -> Any:
    """Reshapes leaves `[B, ...]` to `[n, B / n, ...]`, n = `num_microbatches`; row i goes to microbatch i mod n.

    So each device keeps its rows where rows are sharded; contiguous microbatches would move them.
    """

    def split(x: jax.Array) -> jax.Array:
        return shard_rows(x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), axis=1)

    return jax.tree.map(split, tree)


def join_microbatches(tree: Any) -> Any:
    """Undoes `split_microbatches`."""
    return jax.tree.map(lambda x: shard_rows(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), tree)
