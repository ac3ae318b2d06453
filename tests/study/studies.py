"""A small study without a database or a model: a store in memory, tasks and texts, assistants by a script."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from simrl.conversations.records import Message
from simrl.remote.settings import EndpointSettings
from simrl.study.events import Arrived, Deleted, Event, Mode, Stored, from_row, to_row
from simrl.study.participant import Participant
from simrl.study.running import Running
from simrl.study.settings import PlanSettings, StudyModel, StudySettings, TaskSettings, WebSettings
from simrl.study.store import Arrival, ConflictError, Entry, Identity, Store, StoreError
from simrl.study.text_files import read_texts
from simrl.study.texts import DocumentType, Task, Tasks, Texts
from simrl.study.turns import Answer, Ask, Moderate

SOMEWHERE = StudyModel(endpoint=EndpointSettings('http://127.0.0.1:9', 'm'))
TEXTS: Texts = read_texts()
RIGHT = tuple(question.right for question in TEXTS.check)
TASKS = Tasks(
    tuple(
        DocumentType(kind, f'a {kind}', ('For whom?', 'Why?'), (Task(f'{kind}-1', f'A {kind}', 'Write.'),))
        for kind in ('story', 'post', 'letter')
    )
)
WORDS = 'Three words here'


def settings(models: Sequence[str] = ('first', 'second'), **fields: Any) -> StudySettings:
    """Two exchanges, at most three, and three words of final text."""
    fields.setdefault('task', TaskSettings(exchanges=2, max_exchanges=3, min_words=3))
    fields.setdefault('web', WebSettings(drain_seconds=2.0))
    fields.setdefault('plan', PlanSettings(participants=10_000))
    return StudySettings(models=dict.fromkeys(models, SOMEWHERE), **fields)


@dataclasses.dataclass
class MemoryStore:
    """A `Store` in a list, through the rows that a database would have.

    Attributes:
        rows: number, participant, version, at, name and body.
        groups: entries of each `append`.
        broken: all writes fail.
    """

    secret = b'of a store'
    rows: list[tuple[str, int, float, str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    known: dict[tuple[str, Mode], tuple[str, Identity]] = dataclasses.field(default_factory=dict)
    groups: list[int] = dataclasses.field(default_factory=list)
    broken: bool = False

    def events(self, after: int = 0) -> list[Stored]:
        return [
            Stored(number, id, version, at, from_row(kind, body))
            for number, (id, version, at, kind, body) in enumerate(self.rows, 1)
            if number > after
        ]

    def append(self, entries: Sequence[Entry]) -> list[tuple[Stored, ...] | ConflictError]:
        self.groups.append(len(entries))
        self._check()
        return [self._append(entry) for entry in entries]

    def find(self, identity: Identity, mode: Mode) -> tuple[str, Identity] | None:
        return self.known.get((identity.panel_id, mode)) if identity.panel_id else None

    def enter_all(self, arrivals: Sequence[Arrival]) -> list[tuple[Stored, ...] | ConflictError]:
        self.groups.append(len(arrivals))
        self._check()
        return [self._enter(arrival) for arrival in arrivals]

    def delete(self, participant: str, version: int, at: float) -> tuple[Stored, ...]:
        self._check()
        stored = self._append(Entry(participant, version, at, (Deleted(),)))
        if isinstance(stored, ConflictError):
            raise stored
        kept = [row for row in self.rows if row[0] != participant or row[1] in (1, version)]
        self.rows[:] = kept
        return stored

    def _check(self) -> None:
        if self.broken:
            raise StoreError('the disk is full')

    def _enter(self, arrival: Arrival) -> tuple[Stored, ...] | ConflictError:
        identity, mode = arrival.identity, arrival.mode
        if self.find(identity, mode) is not None:
            return ConflictError(identity.panel_id)
        self.known[identity.panel_id, mode] = arrival.participant, identity
        return self._append(Entry(arrival.participant, 1, arrival.at, (Arrived(mode),)))

    def _append(self, entry: Entry) -> tuple[Stored, ...] | ConflictError:
        last = max((version for id, version, *_ in self.rows if id == entry.participant), default=0)
        if entry.version != last + 1:
            return ConflictError(f'{entry.participant}: {entry.version}')
        for version, event in enumerate(entry.events, entry.version):
            self.rows.append((entry.participant, version, entry.at, *to_row(event)))
        return tuple(self.events(len(self.rows) - len(entry.events)))


def enter(store: Store, identity: Identity, id: str, at: float, mode: Mode) -> tuple[Stored, ...]:
    """Stores somebody new; ConflictError: they are known, or another has the id."""
    [stored] = store.enter_all([Arrival(identity, id, at, mode)])
    if isinstance(stored, ConflictError):
        raise stored
    return stored


async def echo(model: str, conversation: Sequence[Message]) -> Answer:
    """Says its name and how much it was told."""
    return Answer(f'{model} after {len(conversation)}', 0.5, False)


def ticking() -> Callable[[], float]:
    """A clock that is a second later at each look."""
    return itertools.count(1000.0).__next__


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a test, within a minute."""
    return asyncio.run(asyncio.wait_for(work, 60))


@contextlib.asynccontextmanager
async def study(
    store: MemoryStore | None = None, ask: Ask = echo, moderate: Moderate | None = None, **fields: Any
) -> AsyncIterator[Running]:
    """A study that runs; the fields are of `settings`."""
    clock = fields.pop('clock', None) or ticking()
    running = Running(settings(**fields), store or MemoryStore(), TASKS, TEXTS, ask, moderate, clock)  # type: ignore[arg-type]
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


async def replied(running: Running, id: str) -> Participant:
    """The participant once no reply is waited for."""
    for _ in range(5000):
        state = running.participants[id]
        if state.turn is None or state.turn.status != 'waiting':
            return state
        await asyncio.sleep(0.001)
    raise AssertionError(f'{id} waits for ever')


async def arrive(running: Running, name: str = '', mode: Mode | None = None) -> Participant:
    state, _ = await running.enter(Identity(name, '', name and 's1'), mode or running.settings.mode)
    return state


async def to_task(running: Running, name: str = '', mode: Mode | None = None) -> Participant:
    """A new participant who passed the check."""
    state = await arrive(running, name, mode)
    state = await running.consent(state.id, state.version, True)
    state = await running.instruct(state.id, state.version)
    return await running.check(state.id, state.version, RIGHT)


async def to_training(running: Running, name: str = '', mode: Mode | None = None) -> Participant:
    state = await to_task(running, name, mode)
    return await running.prepare(state.id, state.version, f'{state.document_type}-1', ('me', 'because'))


async def exchange(running: Running, state: Participant, choice: str = 'a', message: str = 'Hello') -> Participant:
    state = await running.send(state.id, state.version, message)
    state = await replied(running, state.id)
    return await running.vote(state.id, state.version, choice, 'It is better.')


async def to_conversation(running: Running, name: str = '', mode: Mode | None = None) -> Participant:
    return await exchange(running, await to_training(running, name, mode))


async def to_end(running: Running, name: str = '', mode: Mode | None = None) -> Participant:
    state = await to_conversation(running, name, mode)
    for choice in ('a', 'tie'):
        state = await exchange(running, state, choice)
    state = await running.conclude(state.id, state.version)
    return await running.write(state.id, state.version, WORDS, TEXTS.attention.right)


def kinds(store: MemoryStore, id: str) -> list[str]:
    """Names of a participant's events."""
    return [row[3] for row in store.rows if row[0] == id]


def events_of(store: MemoryStore, kind: type[Event]) -> list[Any]:
    return [stored.event for stored in store.events() if isinstance(stored.event, kind)]
