"""The vocabulary, whole on each device or split over the mesh's axis `model`, and sums over it in an order of its own.

The rows of the output matrix are split over `model`, and so are the logits that it gives. Devices do not gather them:
they exchange sums and single blocks.

Letters: B rows, V tokens of the vocabulary, padded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from simrl.models.rows import gather_per_row, rows_are_sharded

BLOCK = 128  # tokens that are summed before their blocks are; a TPU's registers are as wide

_Result = TypeVar('_Result')


def halved(x: jax.Array, axis: int) -> jax.Array:
    """Sums along an axis, whose size is a power of two, by adding its second half to its first until one is left.

    XLA sums in an order that depends on the other dimensions.
    """
    while (size := x.shape[axis] // 2) > 0:
        x = jax.lax.slice_in_dim(x, 0, size, axis=axis) + jax.lax.slice_in_dim(x, size, 2 * size, axis=axis)
    return jnp.squeeze(x, axis)


def total(x: jax.Array) -> jax.Array:
    """Sums along the last axis, in an order that zeros at the end do not change.

    Whole blocks are added by halving, then the numbers of the block that is left. If these were halved too, a TPU would
    store rows side by side, in registers with room for 128 of them, from the weights on.
    """
    num_blocks = 1 << (-(-x.shape[-1] // BLOCK) - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_blocks * BLOCK - x.shape[-1])])
    return jnp.sum(halved(x.reshape(*x.shape[:-1], num_blocks, BLOCK), axis=x.ndim - 1), axis=-1)


@dataclasses.dataclass(frozen=True)
class Part:
    """A device's part of the vocabulary: V / `shards` tokens.

    With more than one, its methods are of a program that runs on each device (`on_own_tokens`). Sums over the parts,
    and maxima, are equal on all devices of the axis.
    """

    shards: int

    @property
    def number(self) -> jax.Array | int:
        """The part's place in the vocabulary, from 0."""
        return 0 if self.shards == 1 else jax.lax.axis_index('model')

    def sum(self, x: jax.Array) -> jax.Array:
        return x if self.shards == 1 else jax.lax.psum(x, 'model')

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.shards == 1 else jax.lax.pmax(x, 'model')

    def entry(self, x: jax.Array, token: jax.Array) -> jax.Array:
        """The entry of each row of `[B, V / shards]` for its token, an id of the whole vocabulary, int `[B]`."""
        return self.sum_of_own(lambda index: gather_per_row(x, index), token - self.number * x.shape[1], x.shape[1])

    def blocks(self, weight: jax.Array) -> 'Blocks':
        """Splits weights `[B, V / shards]` into blocks. The end of one may be the next device's, and is fetched."""
        size = weight.shape[1]
        num_blocks = -(-size // BLOCK)
        skipped: jax.Array | int = 0
        outside = BLOCK - math.gcd(size, BLOCK) if self.shards > 1 else 0
        if outside:
            skipped = -self.number * size % BLOCK  # tokens of a block that begins in the part before
            pairs = [(number, number - 1) for number in range(1, self.shards)]
            following = jax.lax.ppermute(weight[:, :outside], 'model', pairs)
            weight = jnp.pad(jnp.concatenate([weight, following], axis=1), ((0, 0), (0, BLOCK)))
            weight = jax.lax.dynamic_slice_in_dim(weight, skipped, num_blocks * BLOCK, axis=1)
            start = skipped + jnp.arange(num_blocks * BLOCK) // BLOCK * BLOCK
            weight = jnp.where(start < size, weight, 0.0)
        else:
            weight = jnp.pad(weight, ((0, 0), (0, -size % BLOCK)))
        return Blocks(
            part=self,
            weight=weight.T.reshape(num_blocks, BLOCK, weight.shape[0]),
            first=(self.number * size + skipped) // BLOCK,
            total=-(-size * self.shards // BLOCK),
        )

    def sum_of_own(self, gather: Callable[[jax.Array], jax.Array], index: jax.Array, size: int) -> jax.Array:
        """Returns what `gather` finds for each row's index, int `[B]`, on the device that has it: one of `size`."""
        own = (index >= 0) & (index < size)
        found = gather(jnp.clip(index, 0, size - 1))
        return self.sum(jnp.where(own.reshape(-1, *[1] * (found.ndim - 1)), found, 0.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Weights of the blocks that begin in a device's part of the vocabulary.

    Attributes:
        weight: `[N, BLOCK, B]`: rows are last in the products of a CPU (`layouts.OutputMajor`). A device may have one
            block less: its last one has weight 0.
        first: the number of the first one among the blocks of the whole vocabulary.
        total: the number of these.
    """

    part: Part
    weight: jax.Array
    first: jax.Array | int
    total: int

    def sums(self) -> jax.Array:
        """The sums of all blocks of the vocabulary, `[B, total]`, each in the same order on any number of devices."""
        own = halved(self.weight, axis=1).T
        if self.part.shards == 1:
            return own
        blank = jnp.zeros((own.shape[0], self.total + 1), own.dtype)
        return self.part.sum(jax.lax.dynamic_update_slice_in_dim(blank, own, self.first, axis=1))[:, : self.total]

    def one(self, number: jax.Array) -> jax.Array:
        """The weights `[B, BLOCK]` of a block of each row, by its number in the vocabulary, int `[B]`."""
        gather = jax.vmap(lambda blocks, index: blocks[index], (2, 0))
        return self.part.sum_of_own(lambda index: gather(self.weight, index), number - self.first, len(self.weight))


def on_own_tokens(
    function: Callable[..., _Result], logits: jax.Array, token_mask: Any, *others: jax.Array, split: Any
) -> _Result:
    """Calls a function of a `Part`, its logits and its mask, once for the whole vocabulary or on each device.

    Args:
        function: of a part, `logits`, `token_mask` and `others`.
        logits: `[B, V]`.
        token_mask: `[V]` or `[B, V]`.
        others: a scalar or an array of B rows each.
        split: a tree like the function's result, which is of B rows: True for arrays `[B, V]`, False for others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape.get('model', 1)
    if logits.shape[1] % shards:  # an output matrix that is not split
        shards = 1
    if shards == 1:
        return function(Part(1), logits, token_mask, *others)
    rows = 'data' if rows_are_sharded(logits.shape[0]) else None
    own_tokens = PartitionSpec(rows, 'model')
    mask = own_tokens if jnp.ndim(token_mask) == 2 else PartitionSpec('model')
    mapped = jax.shard_map(
        lambda *arrays: function(Part(shards), *arrays),
        in_specs=(own_tokens, mask, *(PartitionSpec(rows) if jnp.ndim(x) else PartitionSpec() for x in others)),
        out_specs=jax.tree.map(lambda of_tokens: own_tokens if of_tokens else PartitionSpec(rows), split),
        check_vma=False,  # loops start with numbers that are equal on all devices
    )
    result: _Result = mapped(logits, jnp.asarray(token_mask), *others)
    return result
