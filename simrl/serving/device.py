"""The rows of `slots.py` on the device: their state, the calls that change it, and the results that are not read yet.

Calls are launched and not waited for. A block of a few rows works on a copy of their caches (`_Taken`), which is
written back before anything else needs one of them.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np

from simrl.models.cache import Cache
from simrl.rollouts.agents import Policy
from simrl.serving.programs import compile_programs
from simrl.serving.rows import DecodeCall, FeedCall, Row, decode_call, feed_call
from simrl.serving.shapes import Shapes
from simrl.serving.slots import Block, Scores, init_rows


@dataclasses.dataclass(frozen=True, eq=False)
class _Taken:
    """A working copy of rows' caches: the rows, the tokens of each that were taken, and the copy."""

    rows: tuple[int, ...]
    size: int
    cache: Cache


class DeviceRows:
    """The state of a model's rows on the device. One thread calls it."""

    def __init__(
        self,
        policy: Policy,
        vocabulary: np.ndarray,
        ends: Collection[int],
        shapes: Shapes,
        on_program: Callable[[], None],
    ) -> None:
        """Compiles the programs.

        Args:
            policy: ready to sample; its mask is that of chats.
            vocabulary: bool `[V]`, the ids of the whole vocabulary.
            ends: ids that end an answer.
            on_program: called after each compiled program.
        """
        self._policy, self._shapes = policy, shapes
        self._masks = jax.numpy.asarray(np.stack([np.asarray(policy.token_mask), vocabulary]))
        self._ends = jax.numpy.asarray(sorted(ends), np.int32)
        self._cache, self._progress = init_rows(policy, shapes)
        self._taken: _Taken | None = None
        self._programs = compile_programs(
            policy, self._masks, self._ends, self._cache, self._progress, shapes, on_program
        )
        self._launched = list[tuple[FeedCall | DecodeCall, Block | Scores]]()  # calls whose results are not read

    @property
    def busy(self) -> bool:
        """True if there are results that are not read."""
        return bool(self._launched)

    def reset(self) -> None:
        """Empties all rows after a fault."""
        self._launched.clear()
        # A program that failed may have taken its buffers over. There may be no room for those and new ones.
        self._taken = None
        del self._cache, self._progress
        self._cache, self._progress = init_rows(self._policy, self._shapes)

    def copy(self, source: Row, row: Row) -> None:
        """Launches a copy of a row's cache into another row."""
        self._put_back([source, row])
        self._cache = self._programs.copy(self._cache, np.int32(source.index), np.int32(row.index))

    def read(self) -> Iterator[tuple[FeedCall | DecodeCall, Block | Scores]]:
        """Reads the results of what was launched, one after another, and waits for each."""
        launched, self._launched = self._launched, []
        for call, result in launched:
            yield call, jax.device_get(result)

    def feed(self, rows: Sequence[Row], all_rows: Sequence[Row]) -> None:
        """Launches the next chunk of the prompts of some rows."""
        call = feed_call(rows, all_rows, self._shapes)
        self._put_back(rows)
        program = self._programs.feed[len(call.given.rows), call.size]
        self._cache, self._progress, scores = program(
            self._policy, self._masks, self._cache, self._progress, call.given
        )
        if call.given.scored:
            self._launched.append((call, scores))

    def decode(self, all_rows: Sequence[Row]) -> None:
        """Launches a block, if any row can sample."""
        call = decode_call(all_rows, self._shapes, self._policy.spec.config.padded_vocab_size, self._taken_rows)
        if call is None:
            return
        key = len(call.requests), call.size
        program = self._programs.decode[key]
        arguments = self._policy, self._masks, self._ends
        if key == (self._shapes.rows, self._shapes.context):
            self._put_back(all_rows)
            self._cache, self._progress, block = program(*arguments, self._cache, self._progress, call.asked)
        else:
            rows = tuple(call.asked.rows.tolist())
            if self._taken is None or self._taken_rows != (rows, call.size):
                self._put_back(all_rows)
                self._taken = _Taken(rows, call.size, self._programs.take[key](self._cache, call.asked.rows))
            cache, self._progress, block = program(*arguments, self._taken.cache, self._progress, call.asked)
            self._taken = dataclasses.replace(self._taken, cache=cache)
        self._launched.append((call, block))

    @property
    def _taken_rows(self) -> tuple[tuple[int, ...], int]:
        return ((), 0) if self._taken is None else (self._taken.rows, self._taken.size)

    def _put_back(self, rows: Sequence[Row]) -> None:
        """Writes taken caches back before something else reads or writes one of these rows."""
        if self._taken is not None and any(row.index in self._taken.rows for row in rows):
            program = self._programs.put_back[len(self._taken.rows), self._taken.size]
            self._cache = program(self._cache, self._taken.cache, np.array(self._taken.rows, np.int32))
            self._taken = None
