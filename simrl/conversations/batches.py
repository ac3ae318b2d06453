"""Batches of rows in length buckets, seeded and resumable.

1. Every row goes to the shortest bucket that it fits into.
2. An epoch permutes each bucket, splits it into batches and permutes the batches. The order is a function of (seed,
   epoch), so a batch is a function of its step and a checkpoint needs the step only.
3. A bucket's last batch is padded with rows of length 0.

Every process has the whole batch; `models.placement.shard_batch` gives each device its rows.
"""

import dataclasses
from collections.abc import Callable, Sequence, Sized
from typing import Generic, TypeVar

import flax.struct
import numpy as np

from simrl.conversations.views import PreferenceRow, Rendered


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Batches of rows of similar length."""

    batch_size: int  # rows (pairs, for preferences) of a batch, over all processes
    lengths: tuple[int, ...]  # bucket lengths, tokens of a row, ascending; one compiled program each
    seed: int = 0  # seed of the order of rows

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f'BatchSettings.batch_size: expected at least 1, found {self.batch_size}')
        if self.seed < 0:
            raise ValueError(f'BatchSettings.seed: expected at least 0, found {self.seed}')
        if not self.lengths or self.lengths[0] < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f'BatchSettings.lengths: expected ascending positive lengths, found {self.lengths}')


@flax.struct.dataclass
class Batch:
    """Left-aligned rows; fields as in `Rendered`.

    Attributes:
        tokens: int32 `[B, T]`, 0 past the length.
        role: int8 `[B, T]`, PAD past the length.
        message: int16 `[B, T]`, -1 past the length.
        trained: bool `[B, T]`, False past the length.
        length: int32 `[B]`, 0 in a padding row.
        index: int32 `[B]`, number of the row (pair) in the data, -1 in a padding row.
    """

    tokens: np.ndarray
    role: np.ndarray
    message: np.ndarray
    trained: np.ndarray
    length: np.ndarray
    index: np.ndarray


def stack(rows: Sequence[Rendered], length: int, num_rows: int, index: Sequence[int] | None = None) -> Batch:
    """Pads rows to `[num_rows, length]`. A longer row, or more rows, is an error.

    Args:
        index: number of each row in the data; None numbers them from 0.
    """
    if len(rows) > num_rows:
        raise ValueError(f'expected at most {num_rows} rows, found {len(rows)}')
    tokens = np.zeros((num_rows, length), np.int32)
    role = np.zeros((num_rows, length), np.int8)
    message = np.full((num_rows, length), -1, np.int16)
    trained = np.zeros((num_rows, length), np.bool_)
    lengths = np.zeros(num_rows, np.int32)
    indices = np.full(num_rows, -1, np.int32)
    indices[: len(rows)] = np.arange(len(rows)) if index is None else index
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f'row {indices[i]}: expected at most {length} tokens, found {len(row)}')
        tokens[i, : len(row)] = row.tokens
        role[i, : len(row)] = row.role
        message[i, : len(row)] = row.message
        trained[i, : len(row)] = row.trained
        lengths[i] = len(row)
    return Batch(tokens=tokens, role=role, message=message, trained=trained, length=lengths, index=indices)


def stack_preferences(
    rows: Sequence[PreferenceRow], length: int, num_rows: int, index: Sequence[int] | None = None
) -> Batch:
    """Pads pairs to `[2 * num_rows, length]`: rows 2p and 2p + 1 are the chosen and the rejected reply of pair p.

    Args:
        index: number of each pair in the data, used for both of its rows; None numbers them from 0.
    """
    numbers = range(len(rows)) if index is None else index
    replies = [reply for row in rows for reply in (row.chosen, row.rejected)]
    return stack(replies, length, 2 * num_rows, [number for number in numbers for _ in range(2)])


_Row = TypeVar('_Row', bound=Sized)
_Stacked = TypeVar('_Stacked')


class Batches(Generic[_Row, _Stacked]):
    """Batches by step. `batch(step)` returns the same batch on every call.

    Attributes:
        lengths: of the buckets that have rows, ascending.
        batches_per_epoch: their number.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        settings: BatchSettings,
        stack: Callable[[Sequence[_Row], int, int, Sequence[int]], _Stacked],
    ) -> None:
        """Sorts rows into buckets.

        Args:
            rows: `len(row)` is a row's number of tokens.
            stack: `(rows, length, num_rows, index) -> batch`, such as `stack` or `stack_preferences`.
        """
        if not rows:
            raise ValueError('expected at least one row, found none')
        lengths = np.array([len(row) for row in rows])
        for number in (int(np.argmin(lengths)), int(np.argmax(lengths))):
            if not 1 <= lengths[number] <= settings.lengths[-1]:
                raise ValueError(
                    f'row {number}: expected 1 to {settings.lengths[-1]} tokens (BatchSettings.lengths), '
                    f'found {lengths[number]}'
                )
        self._rows = rows
        self._settings = settings
        self._stack = stack
        bucket = np.searchsorted(settings.lengths, lengths)
        self._buckets = [np.flatnonzero(bucket == i) for i in range(len(settings.lengths))]
        self.lengths = [length for length, rows in zip(settings.lengths, self._buckets, strict=True) if len(rows)]
        self.batches_per_epoch = sum(-(-len(members) // settings.batch_size) for members in self._buckets)
        self._planned: tuple[int, list[tuple[int, np.ndarray]]] | None = None  # the epoch planned last

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return self.batches_per_epoch

    def batch(self, step: int) -> _Stacked:
        """Returns the batch of a step; step `n * batches_per_epoch` starts epoch n."""
        if step < 0:
            raise ValueError(f'step: expected at least 0, found {step}')
        length, members = self._plan(step // self.batches_per_epoch)[step % self.batches_per_epoch]
        numbers = members.tolist()
        return self._stack([self._rows[i] for i in numbers], length, self._settings.batch_size, numbers)

    def empty(self, length: int) -> _Stacked:
        """A batch of padding rows of so many tokens."""
        return self._stack([], length, self._settings.batch_size, [])

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Lists the batches of an epoch in order, each as (length, numbers of its rows)."""
        if self._planned is None or self._planned[0] != epoch:
            random = np.random.default_rng([self._settings.seed, epoch])
            size = self._settings.batch_size
            batches: list[tuple[int, np.ndarray]] = []
            for length, bucket in zip(self._settings.lengths, self._buckets, strict=True):
                shuffled = random.permutation(bucket)
                batches += [(length, shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
            self._planned = epoch, [batches[i] for i in random.permutation(len(batches))]
        return self._planned[1]
