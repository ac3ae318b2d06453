"""Events of the study itself in this process: each is stored first, and known after that."""

import asyncio
from collections.abc import Callable

from simrl.study.events import STUDY, Looked, Paused, PlanFrozen, Stored, StudyEvent
from simrl.study.looks import frozen_plan, recruitment_end
from simrl.study.steps import OutOfDateError
from simrl.study.store import ConflictError, Entry, Store
from simrl.study.writer import Writer


class History:
    """The events of a study itself. What is known of it is read from them, and kept in no second place.

    Attributes:
        events: in their order.
    """

    def __init__(self, store: Store, writer: Writer, clock: Callable[[], float]) -> None:
        self.events: tuple[Stored, ...] = ()
        self._store, self._writer, self._clock = store, writer, clock
        self._lock = asyncio.Lock()

    @property
    def paused(self) -> bool:
        """True while nobody new is let in."""
        said = [stored.event.paused for stored in self.events if isinstance(stored.event, Paused)]
        return bool(said) and said[-1]

    @property
    def is_over(self) -> bool:
        """True once recruitment has ended: nobody new is let in any more."""
        return recruitment_end(self.events) is not None

    @property
    def plan(self) -> PlanFrozen | None:
        """The plan that was frozen at the first consent; None before."""
        return frozen_plan(self.events)

    @property
    def looks(self) -> tuple[Looked, ...]:
        """At results by model."""
        return tuple(stored.event for stored in self.events if isinstance(stored.event, Looked))

    def know(self, stored: Stored) -> None:
        """Takes an event of the store, unless it is known."""
        if stored.version > self._version:  # else it was read from the store once more
            self.events += (stored,)

    async def say(self, event: StudyEvent) -> None:
        """Stores an event, then knows it."""
        async with self._lock:
            await self._say(event)

    async def freeze(self, plan: PlanFrozen) -> None:
        """Stores the analysis plan, unless one is stored."""
        async with self._lock:
            if self.plan is None:
                await self._say(plan)

    async def _say(self, event: StudyEvent) -> None:
        try:
            stored = await self._writer.write(Entry(STUDY, self._version + 1, self._clock(), (event,)))
        except ConflictError:  # an earlier write had an error, and was done all the same
            for known in await self._writer.call(self._store.events):
                if known.participant == STUDY:
                    self.know(known)
            raise OutOfDateError('the study changed meanwhile') from None
        for new in stored:
            self.know(new)

    @property
    def _version(self) -> int:
        return self.events[-1].version if self.events else 0
