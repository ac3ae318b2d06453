"""Participants in this process: each of their events is stored first, and known after that."""

import asyncio
import collections
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from simrl.study.events import Event, Mode, Stored
from simrl.study.participant import Participant, apply, fold, fold_all
from simrl.study.steps import OutOfDateError
from simrl.study.store import Arrival, ConflictError, Entry, Identity, Store
from simrl.study.writer import Writer


class Register:
    """The participants of a study.

    Args:
        changed: is called with each participant as they are after an event.
    """

    def __init__(
        self, store: Store, writer: Writer, clock: Callable[[], float], changed: Callable[[Participant], None]
    ) -> None:
        self._store, self._writer, self._clock, self._changed = store, writer, clock, changed
        self._known: dict[str, Participant] = {}
        self._expected: dict[str, Participant] = {}  # as they will be once the write under way is done
        self._locks: collections.defaultdict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)

    @property
    def known(self) -> Mapping[str, Participant]:
        """By id, in the order in which they came."""
        return self._known

    @property
    def expected(self) -> Mapping[str, Participant]:
        """As `known`, those of writes under way as they will be after them."""
        return self._known | self._expected

    def know(self, events: Iterable[Stored]) -> None:
        """Takes all events of the store, of which it knows none."""
        self._known |= fold_all(events)

    @contextlib.asynccontextmanager
    async def current(self, id: str, version: int | None = None) -> AsyncIterator[Participant]:
        """The participant, whom nobody else changes meanwhile.

        Args:
            version: of the page, which must be of no earlier event than the last that changed it; None: any.

        Raises:
            KeyError: there is no such participant.
            OutOfDateError: the version is an older one.
        """
        if id not in self._known:
            raise KeyError(id)
        async with self._locks[id]:
            state = self._known[id]
            if version is not None and not state.page <= version <= state.version:
                raise OutOfDateError(f'expected version {state.page}, found {version}')
            yield state

    async def arrive(self, identity: Identity, mode: Mode) -> tuple[str, Identity | None]:
        """The id of a new participant, and None; or of the one who came by this panel id before, and how they did."""
        id = secrets.token_hex(8)
        try:
            stored = await self._writer.write(Arrival(identity, id, self._clock(), mode))
        except ConflictError:
            found = await self._writer.call(self._store.find, identity, mode)
            if found is None:
                raise
        else:
            self._known |= fold_all(stored)
            return id, None
        id, first = found
        async with self._locks[id]:
            if id not in self._known:  # stored by a write whose end this process did not learn of
                await self._read_again(id)
        return id, first

    async def write(self, state: Participant, events: Sequence[Event]) -> Participant:
        """Stores what an action of the `current` participant came to, then folds it.

        Raises:
            OutOfDateError: other events were stored before.
            StoreError: nothing is stored.
        """
        if not events:
            return state
        at, after = self._clock(), state
        for event in events:  # one that could not be folded is never stored
            after = apply(after, Stored(0, state.id, after.version + 1, at, event))
        self._expected[state.id] = after
        try:
            await self._writer.write(Entry(state.id, state.version + 1, at, tuple(events)))
        except ConflictError:
            await self._read_again(state.id)
            raise OutOfDateError('it was stored before') from None
        finally:
            del self._expected[state.id]
        return self._learn(after)

    async def delete(self, state: Participant) -> Participant:
        """Deletes the data of the `current` participant. Raises as `write`."""
        try:
            stored = await self._writer.call(self._store.delete, state.id, state.version + 1, self._clock())
        except ConflictError:
            await self._read_again(state.id)
            raise OutOfDateError('it was stored before') from None
        for event in stored:
            state = apply(state, event)
        return self._learn(state)

    def _learn(self, state: Participant) -> Participant:
        self._known[state.id] = state
        self._changed(state)
        return state

    async def _read_again(self, id: str) -> None:
        """Folds a participant's events of the store anew: a write had an error, and was done all the same."""
        events = await self._writer.call(self._store.events)
        state = fold([stored for stored in events if stored.participant == id])
        if state is not None:
            self._learn(state)
