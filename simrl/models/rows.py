"""Rows of a batch, sharded over the mesh axis `data`: gathers, scatters and microbatches that keep them there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
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


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """R rows that go through the model together.

    Attributes:
        rows: int32 `[R]`, row numbers in the batch.
        width: number of tokens per row; all later tokens are padding.
    """

    rows: np.ndarray
    width: int


def split_by_length(
    rows: np.ndarray, length: np.ndarray, widths: Sequence[int], num_microbatches: int
) -> list[Microbatch]:
    """Splits some rows of a batch into microbatches of equal size and similar lengths, on the host.

    Args:
        rows: int, row numbers; `num_microbatches` divides their number.
        length: int `[B]`, number of tokens of each row of the batch.
        widths: ascending bucket widths, from `bucket_widths`; a microbatch has the shortest that fits its longest row.

    Raises:
        ValueError: a row is longer than the last width.
    """
    by_length = rows[np.argsort(length[rows], kind='stable')].astype(np.int32)
    # Shuffled within a microbatch: on a mesh neighbours share a device, and the longest rows should not share one.
    order = np.random.default_rng(0).permutation(len(rows) // num_microbatches)
    split = np.split(by_length, num_microbatches)
    return [Microbatch(part[order], _width(int(length[part[-1]]), widths)) for part in split]


def bucket_widths(buckets: Sequence[int], width: int) -> tuple[int, ...]:
    """Widths for microbatches of a batch of `width` tokens: the shorter buckets, and `width` itself."""
    return (*(bucket for bucket in buckets if bucket < width), width)


def _width(longest: int, widths: Sequence[int]) -> int:
    if longest > widths[-1]:
        raise ValueError(f'rows: expected at most {widths[-1]} tokens, found {longest}')
    return next(width for width in widths if width >= longest)


def gather_rows(tree: Any, rows: jax.Array, width: int) -> Any:
    """Gathers rows of leaves `[B, T]`: `[R, width]`, sharded by rows."""
    return jax.tree.map(lambda x: shard_rows(x[rows, :width]), tree)


def scatter_rows(tree: Any, rows: jax.Array, part: Any) -> Any:
    """Writes leaves `[R, width]` to their rows of leaves `[B, T]`."""
    return jax.tree.map(lambda x, new: shard_rows(x.at[rows, : new.shape[1]].set(new)), tree, part)
