"""Schedules the rows of a batch for gradient steps, on the host, by their lengths.

1. Each epoch shuffles the rows and splits them into minibatches. One minibatch is one optimizer step.
2. The rows of a minibatch are sorted by length and split into microbatches of equal size.
3. A microbatch is padded to the shortest bucket that fits its longest row, so at most one program per bucket compiles.

Steps 2 and 3 change no result beyond rounding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from simrl.models.rows import shard_rows
from simrl.rl.algorithm import AlgorithmSettings


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """R rows that go through the model together.

    Attributes:
        rows: int32 `[R]`, row numbers in the batch.
        width: number of tokens per row; all later tokens are padding.
    """

    rows: np.ndarray
    width: int


def schedule_microbatches(
    length: np.ndarray, widths: Sequence[int], settings: AlgorithmSettings, random: np.random.Generator
) -> list[list[Microbatch]]:
    """Lists the microbatches of each of `epochs` x `minibatches` optimizer steps.

    Args:
        length: int `[B]`, number of tokens of each row.
        widths: ascending bucket widths; the last is the width of the batch.
        random: shuffles rows over minibatches; unused with one minibatch.

    Raises:
        ValueError: the rows cannot be split evenly, or one is longer than the last width.
    """
    settings.rows_per_microbatch(len(length))
    steps = []
    for _ in range(settings.epochs):
        order = np.arange(len(length)) if settings.minibatches == 1 else random.permutation(len(length))
        for rows in np.split(order, settings.minibatches):
            steps.append(split_by_length(rows, length, widths, settings.microbatches))
    return steps


def split_by_length(
    rows: np.ndarray, length: np.ndarray, widths: Sequence[int], num_microbatches: int
) -> list[Microbatch]:
    """Splits some rows of a batch into microbatches of similar lengths; arguments as in `schedule_microbatches`."""
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
