"""The schedule of conversations that decode at their own pace: numbers of rows in, places of rows out, on the host.

The R conversations in flight are rows; a row waits for one message, of the user or the assistant, at a time. Each side
has a cache of every row, `window` of them in its window, the others parked. A block of decode steps is computed over
one side's window, so it is useful as far as the rows in it wait for that side.

1. `choose_side`: the side whose window would be fuller. One of the two has at least half of the rows that run, and a
   window has two fifths: it is full, and remains full for a while, so that rows enter several at a time.
2. `exchanges`: rows that wait for this side enter its window, in the place of those that do not.
3. `rows_left`: where the rows that run would fit a smaller `Level`, the others leave.

With a mesh each device has equal parts of the rows and of the windows, and a row never leaves its device. D are the
devices of the axis `data`.
"""

import dataclasses
from typing import Literal

import numpy as np

from simrl.rollouts.compaction import batch_sizes

# How conversations share the decode batch: 'static', message by message, each as long as the longest of the batch; or
# 'continuous', each conversation at its own pace. No token depends on it.
Batching = Literal['static', 'continuous']

ENDED = 8  # a block ends once one in so many rows of the window has ended its message
LEAST_STEPS = 4  # of a block in which rows are decoding, however many end: the host is waited for after each
MOST_STEPS = 32  # of a block


@dataclasses.dataclass(frozen=True)
class Level:
    """Sizes of the programs while enough conversations run, of each device.

    Attributes:
        rows: conversations in flight.
        window: rows of a side that decode at once.
        entering: rows that enter a window in one call.
    """

    rows: int
    window: int

    @property
    def entering(self) -> int:
        return -(-self.window // 4)

    @property
    def parked(self) -> int:
        return self.rows - self.window


def levels(rows: int, shards: int, sides: int) -> list[Level]:
    """From all rows down, as `batch_sizes`; with one side on the device (`sides`) all rows are in its window."""
    sizes = batch_sizes(rows, shards)
    return [Level(size, size if sides == 1 else -(-2 * size // 5)) for size in sizes]


def choose_side(waiting: np.ndarray, window: int, current: int) -> int:
    """The side that decodes next, 0 or 1: the current one unless the other's window would be fuller.

    Args:
        waiting: int `[2, D]`, the rows that wait for each side.
        window: of each device.
    """
    filled = np.minimum(waiting, window).sum(axis=1)
    return current if filled[current] >= filled[1 - current] else 1 - current


def exchanges(place: np.ndarray, wanted: np.ndarray, said: np.ndarray, window: int) -> list[tuple[int, int]]:
    """Rows that enter a window and the rows whose places they take, of one device.

    Conversations with the fewest messages enter first, so that all come to their ends at about the same time.

    Args:
        place: int `[rows]`, a permutation: the place of each row's cache; the first `window` places are the window.
        wanted: bool `[rows]`, the rows that wait for this side.
        said: int `[rows]`, messages of each.
    """
    inside = place < window
    incoming = np.flatnonzero(wanted & ~inside)
    outgoing = np.flatnonzero(~wanted & inside)
    order = np.argsort(said[incoming], kind='stable')[: len(outgoing)]
    return list(zip(incoming[order].tolist(), outgoing.tolist(), strict=False))


def level_for(running: np.ndarray, sizes: list[Level]) -> Level:
    """The smallest level with room for the running rows; `running` is int `[D]`, those of each device."""
    return min((level for level in sizes if level.rows >= running.max()), key=lambda level: level.rows)


def rows_left(running: np.ndarray, size: int) -> np.ndarray:
    """The rows that remain, int `[size]`, rising: those that run (bool `[rows]`), and others that fill up."""
    return np.sort(np.argsort(~running, kind='stable')[:size])
