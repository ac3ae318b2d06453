"""Calls of the store from one event loop: in a thread of its own, and writes that come together stored together."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from simrl.study.events import Stored
from simrl.study.store import Arrival, ConflictError, Entry, Store

T = TypeVar('T')
_Group = list[tuple[Entry | Arrival, asyncio.Future[tuple[Stored, ...]]]]


class Writer:
    """A store's thread, and what waits to be stored."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: _Group = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='store')

    def stop(self) -> None:
        """Ends the thread after its last call; further ones are refused."""
        self._thread.shutdown()

    async def call(self, call: Callable[..., T], *args: Any) -> T:
        """The result of a call of the store; calls are one after the other, in the order in which they were made."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def write(self, what: Entry | Arrival) -> tuple[Stored, ...]:
        """Stores an entry or an arrival together with others that wait.

        Raises:
            ConflictError: of this one.
            StoreError: nothing is stored.
        """
        stored: asyncio.Future[tuple[Stored, ...]] = asyncio.get_running_loop().create_future()
        self._queue.append((what, stored))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_queue())
        return await stored

    async def _write_queue(self) -> None:
        while self._queue:
            group, self._queue = self._queue, []
            await self._write_group(self._store.enter_all, [one for one in group if isinstance(one[0], Arrival)])
            await self._write_group(self._store.append, [one for one in group if isinstance(one[0], Entry)])

    async def _write_group(self, write: Callable[..., list[tuple[Stored, ...] | ConflictError]], group: _Group) -> None:
        """Ends the futures of a group with what was stored of each, or why it was not."""
        if not group:
            return
        outcomes: Sequence[tuple[Stored, ...] | Exception]
        try:
            outcomes = await self.call(write, [what for what, _ in group])
        except Exception as error:
            if len(group) > 1:  # the fault may be of one alone
                for one in group:
                    await self._write_group(write, [one])
                return
            outcomes = [error]
        for (_, stored), outcome in zip(group, outcomes, strict=True):
            if stored.cancelled():
                continue
            if isinstance(outcome, Exception):
                stored.set_exception(outcome)
            else:
                stored.set_result(outcome)
