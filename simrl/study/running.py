"""The study in this process: what happens is stored first, and known after that.

1. `start` folds all events of the store and asks again for replies that a stopped server left waiting.
2. An action of a participant is judged by `steps` under a lock of the participant, stored, and only then known
   (`register`). Until the store has it, others who are assigned count its outcome as if it were there.
3. Writes that come while another is under way are stored together, in one transaction (`writer`).
4. A message that waits for replies has a task, from `turns`. It ends with the participant's withdrawal, and at `stop`,
   after which the message waits in the store.

An action goes on to its end though the browser that asked for it is gone.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from absl import logging

import simrl
from simrl.run.config import ConfigError, to_dict
from simrl.run.config import identity as identity_of
from simrl.study import steps
from simrl.study.assignment import counts, draw_key
from simrl.study.events import (
    STUDY,
    Conduct,
    Consented,
    Event,
    Excluded,
    Flagged,
    Looked,
    Mode,
    Opened,
    PanelStatus,
    Paused,
    PlanFrozen,
    RecruitmentEnded,
    Replied,
    Returned,
    TurnedAway,
    Voided,
    Withdrew,
)
from simrl.study.history import History
from simrl.study.participant import Participant
from simrl.study.register import Register
from simrl.study.settings import StudySettings, hashed, plan_of
from simrl.study.steps import OtherStudyError, OutOfDateError, Rules
from simrl.study.store import Identity, Store, StoreError
from simrl.study.texts import Tasks, Texts
from simrl.study.turns import Ask, Moderate, names_of, reply
from simrl.study.writer import Writer

T = TypeVar('T')
STORE_RETRY_SECONDS = (1.0, 30.0)  # between two tries to store replies: first, and at most


class Running:
    """A study, in one event loop.

    Attributes:
        participants: by id, in the order in which they came.
        history: events of the study itself.
    """

    def __init__(
        self,
        settings: StudySettings,
        store: Store,
        tasks: Tasks,
        texts: Texts,
        ask: Ask,
        moderate: Moderate | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings, self.store, self.tasks, self.texts = settings, store, tasks, texts
        self.rules = Rules(settings, tasks, texts, draw_key(store.secret, settings.seed))
        self.plan_hash = hashed(plan_of(settings))
        config = identity_of(settings) | {'tasks': to_dict(tasks), 'texts': to_dict(texts)}
        self.config_hash = hashed(config)
        self.config = config | {name: hashed(config[name]) for name in ('tasks', 'texts', 'panel')}
        self._ask, self._moderate, self._clock = ask, moderate, clock
        self._names = names_of(settings.models)
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._actions: set[asyncio.Task[Any]] = set()
        self._writer = Writer(store)
        self.history = History(store, self._writer, clock)
        self._register = Register(store, self._writer, clock, self._follow)

    @property
    def participants(self) -> Mapping[str, Participant]:
        return self._register.known

    @property
    def is_full(self) -> bool:
        """True once as many as planned completed the study or, having agreed, are under way, see `assignment.counts`.

        Those who were let in may end it.
        """
        now = self._clock()
        filled = sum(
            state.agreed_at is not None and counts(state, now, self.settings.gone_seconds)
            for state in self._register.expected.values()
            if state.mode == self.settings.mode
        )
        return filled >= self.settings.plan.participants

    async def start(self) -> None:
        """Reads the store, says that the study is open, and asks for the replies that are waited for.

        Raises:
            StoreError, OutOfPlaceError: a row of the store is damaged, or of a newer version.
            ConfigError: people are under way, and were seen within `gone_seconds`, with models, types or tasks that the
                config no longer has.
        """
        events = await self._writer.call(self.store.events)
        for stored in events:
            if stored.participant == STUDY:
                self.history.know(stored)
        self._register.know(events)
        now = self._clock()
        under_way = [state for state in self.participants.values() if state.step != 'over' and state.mode != 'preview']
        here = [state for state in under_way if now - state.seen_at <= self.settings.gone_seconds]
        if missing := steps.lacking(self.rules, here):
            raise ConfigError(missing)
        if missing := steps.lacking(self.rules, under_way):
            logging.warning(
                '%s; all of these left a while ago, and cannot talk with assistants if they return', missing
            )
        models = tuple(self.settings.models)
        await self._whole(self.history.say(Opened(simrl.__version__, self.config_hash, models, self.config)))
        for state in self.participants.values():
            self._follow(state)

    async def stop(self) -> None:
        """Waits for replies under way, at most `drain_seconds`, and for all writes; the store stays open."""
        if self._turns:
            await asyncio.wait(list(self._turns.values()), timeout=self.settings.web.drain_seconds)
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)
        while self._actions:
            await asyncio.gather(*self._actions, return_exceptions=True)
        self._writer.stop()

    # Actions of participants. Each returns the participant as they are after it, and raises
    # OutOfDateError: the page's version is an older one, or the action is not of where they are;
    # BadInputError: what they sent must be changed;
    # StoreError: it could not be stored, and so did not happen.

    async def enter(self, identity: Identity, mode: Mode) -> tuple[Participant, bool]:
        """A new participant, or the one who came by this panel id before; and whether the session is their first one's.

        Raises:
            OtherStudyError: the panel's study is not that of the first time.
        """
        if mode not in (self.settings.mode, 'preview'):
            raise ValueError(f'expected the mode {self.settings.mode} or preview, found {mode}')
        return await self._whole(self._enter(identity, mode))

    async def come_back(self, id: str) -> Participant:
        """A participant who entered once more, known by their browser."""
        return await self._act(id, None, lambda state: self._returned(state, True))

    async def consent(self, id: str, version: int, agreed: bool) -> Participant:
        return await self._whole(self._consent(id, version, agreed))

    async def visit(self, id: str) -> Participant:
        """The participant whose page is asked for; see `steps.sent_on` for one who lacks something of the config."""
        if not steps.is_stuck(self.rules, self.participants[id]):
            return self.participants[id]
        return await self._act(id, None, lambda state: steps.sent_on(self.rules, state))

    async def instruct(self, id: str, version: int) -> Participant:
        return await self._act(id, version, steps.instructed)

    async def check(self, id: str, version: int, answers: Sequence[int]) -> Participant:
        return await self._step(
            id, version, lambda state: steps.checked(self.rules, state, answers, self._others(state), self._clock())
        )

    async def prepare(
        self, id: str, version: int, task: str, notes: Sequence[str], conduct: Conduct = Conduct()
    ) -> Participant:
        return await self._step(id, version, lambda state: steps.prepared(self.rules, state, task, notes, conduct))

    async def send(self, id: str, version: int, message: str, conduct: Conduct = Conduct()) -> Participant:
        return await self._step(id, version, lambda state: steps.asked(self.rules, state, message, conduct))

    async def retry(self, id: str, version: int) -> Participant:
        return await self._step(id, version, lambda state: steps.retried(self.rules, state))

    async def vote(self, id: str, version: int, choice: str, reason: str, conduct: Conduct = Conduct()) -> Participant:
        """Votes for `a` (the left reply), `tie` or `b` (the right one)."""
        return await self._step(
            id,
            version,
            lambda state: steps.preferred(
                self.rules, state, choice, reason, conduct, self._others(state), self._clock()
            ),
        )

    async def conclude(self, id: str, version: int) -> Participant:
        return await self._step(id, version, lambda state: steps.concluded(self.rules, state))

    async def write(
        self, id: str, version: int, text: str, attention: int, conduct: Conduct = Conduct()
    ) -> Participant:
        return await self._step(id, version, lambda state: steps.wrote(self.rules, state, text, attention, conduct))

    async def withdraw(self, id: str, version: int, reason: str) -> Participant:
        """Ends a participation at any moment: from an older page, too."""

        def decide(state: Participant) -> list[Event]:
            if state.step == 'over':
                raise OutOfDateError('the participation is over')
            return [Withdrew(self.rules.text('reason', reason, self.settings.task.reason_chars, empty=''))]

        return await self._act(id, None, decide)

    async def delete(self, id: str, version: int) -> Participant:
        """Deletes a participant's data at any moment: from an older page, and after the end, too."""
        return await self._whole(self._delete(id))

    # Actions of administrators.

    async def pause(self, paused: bool, reason: str) -> None:
        await self._whole(self.history.say(Paused(paused, reason)))

    async def end_recruitment(self, reason: str) -> None:
        await self._whole(self.history.say(RecruitmentEnded(reason)))

    async def look(self, looked: Looked) -> None:
        await self._whole(self.history.say(looked))

    async def exclude(self, id: str, excluded: bool, reason: str) -> Participant:
        return await self._act(id, None, lambda state: steps.noted(state, Excluded(excluded, reason)))

    async def note_status(self, id: str, status: str) -> Participant:
        """The status of a submission on the panel."""
        return await self._act(id, None, lambda state: steps.noted(state, PanelStatus(status)))

    async def flag(self, id: str, flag: str, reason: str) -> Participant:
        return await self._act(id, None, lambda state: steps.noted(state, Flagged(flag, reason)))

    # How it is done.

    async def _whole(self, action: Coroutine[Any, Any, T]) -> T:
        """The result of an action, which goes on to its end though its caller is cancelled."""
        task = asyncio.create_task(action)
        self._actions.add(task)
        task.add_done_callback(self._actions.discard)
        return await asyncio.shield(task)

    async def _step(self, id: str, version: int, decide: Callable[[Participant], list[Event]]) -> Participant:
        """An action that goes on with the study."""
        return await self._act(id, version, lambda state: steps.sent_on(self.rules, state) or decide(state))

    async def _act(self, id: str, version: int | None, decide: Callable[[Participant], list[Event]]) -> Participant:
        async def act() -> Participant:
            async with self._register.current(id, version) as state:
                return await self._register.write(state, decide(state))

        return await self._whole(act())

    async def _enter(self, identity: Identity, mode: Mode) -> tuple[Participant, bool]:
        id, first = await self._register.arrive(identity, mode)
        if first is not None and first.study_id not in ('', identity.study_id):
            raise OtherStudyError(f'expected the study {first.study_id}, found {identity.study_id}')
        is_first_session = first is None or identity == first
        async with self._register.current(id) as state:
            if first is not None:
                events = self._returned(state, is_first_session)
            else:
                events = [TurnedAway()] if self._is_closed_to(state) else []
            return await self._register.write(state, events), is_first_session

    async def _consent(self, id: str, version: int, agreed: bool) -> Participant:
        async with self._register.current(id, version) as state:
            steps.expect(state, 'consent')
            if agreed and state.mode == self.settings.mode and not self._is_closed_to(state):
                await self.history.freeze(PlanFrozen(plan_of(self.settings), self.plan_hash, self.config_hash))
            if agreed and self._is_closed_to(state):  # others may have come meanwhile
                return await self._register.write(state, [TurnedAway()])
            return await self._register.write(state, [Consented(agreed, self.plan_hash)])

    async def _delete(self, id: str) -> Participant:
        async with self._register.current(id) as state:
            if state.outcome == 'deleted':
                raise OutOfDateError('the data is deleted already')
            return await self._register.delete(state)

    def _returned(self, state: Participant, same_session: bool) -> list[Event]:
        if state.outcome == 'deleted':
            return []
        still_closed = state.was_turned_away and self._is_closed_to(state)
        return [Returned(same_session), TurnedAway()] if still_closed else [Returned(same_session)]

    def _is_closed_to(self, state: Participant) -> bool:
        return state.mode == self.settings.mode and (self.history.paused or self.history.is_over or self.is_full)

    def _others(self, state: Participant) -> list[Participant]:
        """All other participants, those of writes under way as they will be after them."""
        return [other for id, other in self._register.expected.items() if id != state.id]

    def _follow(self, state: Participant) -> None:
        """Begins or ends the task of a message that waits for replies."""
        is_waiting = state.turn is not None and state.turn.status == 'waiting' and not steps.is_stuck(self.rules, state)
        task = self._turns.get(state.id)
        if is_waiting and task is None:
            task = asyncio.create_task(self._turn(state))
            self._turns[state.id] = task
        elif not is_waiting and task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _turn(self, state: Participant) -> None:
        """Asks for the replies to a message, and stores them."""
        try:
            event = await reply(state, self.rules.key, self._ask, self._moderate, self._names)
            wait, longest = STORE_RETRY_SECONDS
            while not await self._whole(self._reply(state.id, event)):
                await asyncio.sleep(wait)  # the replies are not lost for a disk that is full for a while
                wait = min(2 * wait, longest)
        finally:
            del self._turns[state.id]

    async def _reply(self, id: str, event: Replied | Voided) -> bool:
        """Stores the end of a turn, unless the participant left; False: it must be tried again."""
        async with self._register.current(id) as state:
            if state.turn is None or state.turn.status != 'waiting':
                return True
            try:
                await self._register.write(state, [event])
            except StoreError as error:
                logging.error('the replies to %s cannot be stored yet: %s', id, error)
                return False
            except OutOfDateError:  # which `write` has read from the store
                pass
            return True
