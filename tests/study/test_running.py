"""A study in this process: each action counts once, nothing is known before it is stored, and a kill loses nothing."""

import asyncio
import collections
import dataclasses
import gc
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from simrl.conversations.records import Message
from simrl.run.config import ConfigError, differences
from simrl.study import running as running_module
from simrl.study.assignment import kept_of_tie
from simrl.study.events import (
    Asked,
    Excluded,
    Looked,
    Opened,
    PlanFrozen,
    Preferred,
    Replied,
    TurnedAway,
    Voided,
    Withdrew,
    to_row,
)
from simrl.study.participant import Participant, fold_all
from simrl.study.running import Running
from simrl.study.settings import PlanSettings, TaskSettings, hashed, plan_of
from simrl.study.steps import BadInputError, OutOfDateError
from simrl.study.store import Entry, Identity, Store, StoreError
from simrl.study.texts import DocumentType, Task, Tasks
from simrl.study.turns import Answer, ModelError
from simrl.study.views import view
from tests.study.studies import (
    RIGHT,
    TASKS,
    TEXTS,
    WORDS,
    MemoryStore,
    arrive,
    echo,
    events_of,
    exchange,
    kinds,
    replied,
    run,
    settings,
    study,
    ticking,
    to_conversation,
    to_end,
    to_task,
    to_training,
)

WRONG = (RIGHT[0] + 1, *RIGHT[1:])
TURN = ['Asked', 'Replied', 'Preferred']
WAY = [
    *['Arrived', 'Consented', 'Instructed', 'Checked', 'TypeAssigned', 'Prepared', 'PairAssigned'],
    *[*TURN, 'PairAssigned', *TURN, *TURN, 'Concluded', 'Wrote'],
]


class Held:
    """Models that answer once they may."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.asked = self.ended = 0

    async def __call__(self, model: str, conversation: Sequence[Message]) -> Answer:
        self.asked += 1
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.ended += 1
            raise
        return await echo(model, conversation)


async def refused(action: Awaitable[Participant]) -> str:
    """The error for an action that comes too late."""
    with pytest.raises(OutOfDateError) as error:
        await action
    return str(error.value)


def test_the_whole_way() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            state = await to_end(running, 'p1')
            assert (state.step, state.outcome) == ('over', 'completed')
            assert kinds(store, state.id) == WAY
            assert running.participants == fold_all(store.events())
            assert state.main is not None
            assert [turn.preferred.choice for turn in state.main.turns if turn.preferred] == ['left', 'tie']
            assert state.wrote is not None
            assert state.wrote.attentive

    run(main())


def test_a_page_of_an_older_version_changes_nothing() -> None:
    """A double click, a second tab, Back: at each step the same form a second time."""

    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            state = await arrive(running, 'p1')
            id = state.id
            actions: list[Callable[[int], Awaitable[Participant]]] = [
                lambda version: running.consent(id, version, True),
                lambda version: running.instruct(id, version),
                lambda version: running.check(id, version, WRONG),
                lambda version: running.check(id, version, RIGHT),
                lambda version: running.prepare(
                    id, version, f'{running.participants[id].document_type}-1', ('me', 'because')
                ),
                lambda version: running.send(id, version, 'Hello'),
                lambda version: running.vote(id, version, 'b', 'It is better.'),
                lambda version: running.send(id, version, 'Hello'),
                lambda version: running.vote(id, version, 'tie', 'Both are.'),
                lambda version: running.send(id, version, 'Hello again'),
                lambda version: running.vote(id, version, 'a', 'It is better.'),
                lambda version: running.conclude(id, version),
                lambda version: running.write(id, version, WORDS, 0),
            ]
            for act in actions:
                both = await asyncio.gather(act(state.version), act(state.version), return_exceptions=True)
                assert sorted(type(one).__name__ for one in both) == ['OutOfDateError', 'Participant']
                await refused(act(state.version))
                state = await replied(running, id)
            assert state.outcome == 'completed'
            assert kinds(store, id) == [*WAY[:3], 'Checked', *WAY[3:]]

    run(main())


def test_what_does_not_change_the_page_makes_no_form_old() -> None:
    async def main() -> None:
        async with study() as running:
            state = await to_training(running, 'p1')
            again, is_first = await running.enter(
                Identity('p1', '', 's2'), 'live'
            )  # on another device, while they write
            assert (again.id, again.version, again.other_sessions) == (state.id, state.version + 1, 1)
            assert not is_first
            await running.flag(state.id, 'fast', 'by a screen')
            await running.exclude(state.id, True, 'a test')
            sent = await running.send(state.id, state.version, 'Hello')
            assert sent.turn is not None
            assert sent.is_excluded
            await refused(running.send(state.id, again.version, 'Hello'))

    run(main())


def test_actions_of_other_steps_are_refused() -> None:
    async def main() -> None:
        async with study() as running:
            states = [await arrive(running), await to_task(running), await to_conversation(running)]
            states.append(await to_end(running))
            for state in states:
                id, version = state.id, state.version
                actions = {
                    'consent': running.consent(id, version, True),
                    'instructions': running.instruct(id, version),
                    'check': running.check(id, version, RIGHT),
                    'task': running.prepare(id, version, 'story-1', ('a', 'b')),
                    'waiting': running.retry(id, version),
                    'shown': running.vote(id, version, 'a', 'Because.'),
                    'enough': running.conclude(id, version),
                    'final': running.write(id, version, WORDS, 0),
                }
                for step, action in actions.items():
                    if step == state.step:
                        action.close()  # type: ignore[attr-defined]
                    else:
                        await refused(action)
                assert running.participants[id] == state
            await refused(running.withdraw(states[-1].id, states[-1].version, ''))
            with pytest.raises(KeyError):
                await running.instruct('nobody', 1)
            with pytest.raises(ValueError, match='expected the mode live or preview, found rehearsal'):
                await arrive(running, mode='rehearsal')

    run(main())


@pytest.mark.parametrize(
    ('action', 'field', 'text'),
    [
        (lambda r, p: r.check(p.id, p.version, RIGHT[:-1]), f'answer_{len(RIGHT) - 1}', TEXTS.errors.unanswered),
        (lambda r, p: r.check(p.id, p.version, (99, *RIGHT[1:])), 'answer_0', TEXTS.errors.unanswered),
        (lambda r, p: r.check(p.id, p.version, (-1, *RIGHT[1:])), 'answer_0', TEXTS.errors.unanswered),
        (lambda r, p: r.prepare(p.id, p.version, 'other-1', ('a', 'b')), 'task', TEXTS.errors.no_task),
        (
            lambda r, p: r.prepare(p.id, p.version, f'{p.document_type}-1', ('a', ' ')),
            'note_1',
            TEXTS.errors.unanswered,
        ),
        (lambda r, p: r.prepare(p.id, p.version, f'{p.document_type}-1', ()), 'note_0', TEXTS.errors.unanswered),
        (lambda r, p: r.send(p.id, p.version, ' \r\n'), 'message', TEXTS.errors.empty),
        (lambda r, p: r.send(p.id, p.version, 'x' * 101), 'message', TEXTS.errors.too_long),
        (lambda r, p: r.vote(p.id, p.version, 'c', 'Because.'), 'choice', TEXTS.errors.no_choice),
        (lambda r, p: r.vote(p.id, p.version, '', 'Because.'), 'choice', TEXTS.errors.no_choice),
        (lambda r, p: r.vote(p.id, p.version, 'a', ' x '), 'reason', TEXTS.errors.reason_too_short),
        (lambda r, p: r.vote(p.id, p.version, 'a', 'x' * 2001), 'reason', TEXTS.errors.too_long),
        (lambda r, p: r.write(p.id, p.version, 'Two words', 0), 'text', TEXTS.errors.too_few_words),
        (lambda r, p: r.write(p.id, p.version, '', 0), 'text', TEXTS.errors.empty),
        (lambda r, p: r.write(p.id, p.version, WORDS, -1), 'attention', TEXTS.errors.unanswered),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    action: Callable[[Running, Participant], Awaitable[Participant]], field: str, text: str
) -> None:
    async def main() -> None:
        task = TaskSettings(exchanges=1, max_exchanges=3, min_words=3, message_chars=100)
        async with study(task=task) as running:
            state = await arrive(running)
            state = await running.consent(state.id, state.version, True)
            state = await running.instruct(state.id, state.version)
            if not field.startswith('answer'):
                state = await running.check(state.id, state.version, RIGHT)
            if field not in ('task', 'note_0', 'note_1') and state.step == 'task':
                state = await running.prepare(state.id, state.version, f'{state.document_type}-1', ('me', 'x'))
            if field in ('choice', 'reason'):
                state = await running.send(state.id, state.version, 'Hello')
                state = await replied(running, state.id)
            if field in ('text', 'attention'):
                state = await exchange(running, await exchange(running, state))
                state = await running.conclude(state.id, state.version)
            with pytest.raises(BadInputError) as error:
                await action(running, state)
            assert error.value.field == field
            assert str(error.value).split()[:2] == text.split()[:2]
            assert '{' not in str(error.value)
            assert running.participants[state.id] == state

    run(main())


def test_texts_are_stored_as_any_database_takes_them() -> None:
    async def main() -> None:
        async with study() as running:
            state = await to_training(running)
            sent = await running.send(state.id, state.version, ' a\r\nb\rc\0\ud800 \n')
            assert sent.turn is not None
            assert sent.turn.message == 'a\nb\nc\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}'

    run(main())


def test_the_check_has_so_many_tries() -> None:
    async def main() -> None:
        async with study() as running:
            state = await arrive(running)
            state = await running.consent(state.id, state.version, True)
            await refused(running.instruct(state.id, state.version + 1))  # of no event that happened
            state = await running.instruct(state.id, state.version)
            state = await running.check(state.id, state.version, WRONG)
            assert (state.step, [check.last for check in state.checks]) == ('check', [False])
            state = await running.check(state.id, state.version, WRONG)
            assert (state.step, state.outcome, state.document_type) == ('over', 'failed_check', None)

    run(main())


def test_the_last_exchange_ends_the_conversation() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            state = await to_conversation(running)
            state = await exchange(running, state)
            await refused(running.conclude(state.id, state.version))
            state = await exchange(running, await exchange(running, state))
            assert state.step == 'final'
            assert kinds(store, state.id)[-2:] == ['Preferred', 'Concluded']

    run(main())


def test_one_who_enters_again_goes_on() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            tabs = await asyncio.gather(*[arrive(running, 'p1') for _ in range(5)])  # at the same time
            assert len({state.id for state in tabs}) == 1
            assert sorted(kinds(store, tabs[0].id)) == ['Arrived', *['Returned'] * 4]
            state = await to_end(running, 'p2')
            assert (await arrive(running, 'p2')).outcome == 'completed'  # and not from the beginning
            preview = await arrive(running, 'p1', 'preview')
            assert preview.id not in {tabs[0].id, state.id}
            opened = [await arrive(running) for _ in range(2)]  # anyone may enter: each is somebody new
            assert len({state.id for state in opened}) == 2

    run(main())


def test_a_turn_that_failed_is_tried_again_or_given_up() -> None:
    async def main() -> None:
        store, failing = MemoryStore(), True

        async def ask(model: str, conversation: Sequence[Message]) -> Answer:
            if failing and model == 'first':
                raise ModelError('server: status 500')
            return await echo(model, conversation)

        async with study(store, ask) as running:
            state = await to_training(running)
            for n in range(3):
                await (running.retry if n else running.send)(state.id, state.version, *[] if n else ['Hello'])
                state = await replied(running, state.id)
                assert state.turn is not None
                assert (state.turn.status, state.turn.voids, state.turn.replies) == ('void', n + 1, None)
            await refused(running.retry(state.id, state.version))  # three tries; another message may still be sent
            await running.send(state.id, state.version, 'Hello')  # the same, sent anew, has as many tries
            state = await replied(running, state.id)
            failing = False
            await running.retry(state.id, state.version)
            state = await replied(running, state.id)
            assert state.turn is not None
            assert (state.turn.status, state.turn.voids) == ('shown', 4)
            assert [event.cause for event in events_of(store, Voided)] == ['first: server: status 500'] * 4

    run(main())


def test_a_refused_message_is_not_tried_again() -> None:
    async def main() -> None:
        async def moderate(message: str) -> str | None:
            return 'violence' if message == 'bad' else None

        async with study(moderate=moderate) as running:
            state = await to_training(running)
            await running.send(state.id, state.version, 'bad')
            state = await replied(running, state.id)
            assert state.turn is not None
            assert (state.turn.status, state.turn.refused) == ('void', True)
            await refused(running.retry(state.id, state.version))
            state = await exchange(running, state, message='good')
            assert state.step == 'conversation'

    run(main())


def test_nobody_new_while_paused_or_once_full() -> None:
    async def main() -> None:
        store = MemoryStore()
        plan, clock = PlanSettings(participants=2), [1000.0]
        async with study(store, plan=plan, clock=lambda: clock[0]) as running:
            early, late = await arrive(running, 'early'), await arrive(running, 'late')
            first = await to_task(running)
            await running.pause(True, 'a fault')
            assert (await arrive(running)).outcome == 'closed'
            assert (await arrive(running, mode='preview')).outcome is None
            assert (await running.consent(late.id, late.version, False)).outcome == 'declined'
            await running.pause(False, '')
            asked = [
                running.consent(state.id, state.version, True) for state in (early, await arrive(running, 'third'))
            ]
            outcomes = [state.outcome for state in await asyncio.gather(*asked)]
            assert outcomes == [None, 'closed']  # two agreed, and one place was left
            assert running.is_full
            assert (await arrive(running)).outcome == 'closed'
            assert (await running.exclude(early.id, True, 'a robot')).is_excluded
            assert not running.is_full
            await running.exclude(early.id, False, '')
            clock[0] += 7200.0
            assert not running.is_full  # both are gone
            second, third = await to_end(running), await to_end(running)
            assert second.outcome == third.outcome == 'completed'
            state = await running.prepare(first.id, first.version, f'{first.document_type}-1', ('me', 'x'))
            assert (await exchange(running, state)).step == 'conversation'  # whoever was let in may go on
        async with study(store, plan=plan) as running:
            await running.pause(True, 'for the night')
        async with study(store) as running:
            assert running.history.paused

    run(main())


def test_one_who_was_turned_away_may_come_back_once_there_is_a_place() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            reading = await arrive(running, 'p1')
            await running.pause(True, 'a minute')
            closed = await running.consent(reading.id, reading.version, True)
            assert closed.outcome == 'closed'
            assert running.history.plan is None
            again = await arrive(running, 'p1')  # too early
            assert (again.outcome, again.page) == ('closed', again.version)
            await running.pause(False, '')
            back = await arrive(running, 'p1')
            assert (back.step, back.outcome, back.page) == ('consent', None, back.version)
            await refused(running.consent(back.id, closed.version, True))
            agreed = await running.consent(back.id, back.version, True)
            assert agreed.step == 'instructions'
            assert (await running.come_back(back.id)).step == 'instructions'
            assert kinds(store, back.id) == [
                *['Arrived', 'TurnedAway', 'Returned', 'TurnedAway', 'Returned', 'Consented', 'Returned'],
            ]
            assert running.participants == fold_all(store.events())

    run(main())


def test_the_plan_is_frozen_at_the_first_consent() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            await to_task(running, mode='preview')
            decliner = await arrive(running)
            await running.consent(decliner.id, decliner.version, False)
            assert running.history.plan is None
            await asyncio.gather(*[to_task(running) for _ in range(5)])
            [frozen] = events_of(store, PlanFrozen)
            assert frozen == running.history.plan
            assert frozen.plan == plan_of(settings())
            assert frozen.plan_hash == hashed(frozen.plan)
        async with study(store, seed=1, plan=PlanSettings(participants=9)) as running:  # another plan: a departure
            state = await to_task(running)
            assert running.history.plan == frozen
            assert state.plan == running.plan_hash != frozen.plan_hash
            await running.look(Looked(1, 2, True, 0.01))
            assert running.history.looks == (Looked(1, 2, True, 0.01),)
        first, second = events_of(store, Opened)
        assert first.config_hash == frozen.config_hash != second.config_hash
        assert differences(first.config, second.config) == ['plan.participants: 10000 -> 9', 'seed: 0 -> 1']
        assert not re.search('http|sqlite|key|COMPLETED', str(first.config)), 'no address, no code'
        assert len(str(first.config)) < 8000

    run(main())


def test_withdrawal_ends_what_was_asked() -> None:
    async def main() -> None:
        store = MemoryStore()
        ask = Held()
        async with study(store, ask) as running:
            state = await to_training(running, 'p1')
            await running.send(state.id, state.version, 'Hello')
            while ask.asked < 2:
                await asyncio.sleep(0.001)
            left = await running.withdraw(state.id, state.version - 3, 'no time')  # from whichever page
            assert (left.outcome, left.withdrew) == ('withdrawn', Withdrew('no time'))
            await asyncio.sleep(0.01)
            assert ask.ended == 2  # no model works for one who left
            ask.may.set()
            await asyncio.sleep(0.01)
            assert kinds(store, state.id)[-2:] == ['Asked', 'Withdrew']
            await refused(running.withdraw(state.id, left.version, 'again'))

    run(main())


def test_replies_that_come_while_somebody_leaves_are_dropped() -> None:
    async def main() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        store, ask = MemoryStore(), Held()
        async with study(store, ask) as running:
            state = await to_training(running)
            state = await running.send(state.id, state.version, 'Hello')
            while ask.asked < 2:
                await asyncio.sleep(0.001)
            leaving = asyncio.create_task(running.withdraw(state.id, state.version, ''))
            ask.may.set()  # the replies wait for the end of that
            assert (await leaving).outcome == 'withdrawn'
        gc.collect()
        assert kinds(store, state.id)[-2:] == ['Asked', 'Withdrew']
        assert not faults

    run(main())


def test_what_is_deleted_is_gone_also_from_here() -> None:
    async def main() -> None:
        store = MemoryStore()
        ask = Held()
        async with study(store, ask) as running:
            state = await to_training(running, 'p1')
            await running.send(state.id, state.version, 'my secret')
            gone = await running.delete(state.id, state.version)
            assert (gone.outcome, gone.training, gone.prepared) == ('deleted', None, None)
            assert running.participants[state.id] == gone
            assert 'my secret' not in repr(store.rows)
            assert kinds(store, state.id) == ['Arrived', 'Deleted']
            assert fold_all(store.events())[state.id] == gone
            await refused(running.delete(state.id, gone.version))
            assert await arrive(running, 'p1') == gone
            await refused(running.flag(state.id, 'pasted', 'it says: my secret'))
            await refused(running.exclude(state.id, True, 'a robot'))
            ask.may.set()
            await asyncio.sleep(0.01)
            over = await to_end(running, 'p2')
            assert (await running.delete(over.id, 1)).outcome == 'deleted'

    run(main())


def test_nothing_is_known_that_is_not_stored() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            state = await to_conversation(running)
            before = dict(running.participants)
            store.broken = True
            for action in (
                running.send(state.id, state.version, 'Hello'),
                running.withdraw(state.id, state.version, ''),
                running.delete(state.id, state.version),
                running.exclude(state.id, True, ''),
                arrive(running),
            ):
                with pytest.raises(StoreError, match='the disk is full'):
                    await action
            with pytest.raises(StoreError):
                await running.pause(True, '')
            assert running.participants == before
            assert not running.history.paused
            store.broken = False
            assert (await exchange(running, state)).main is not None

    run(main())


def test_replies_wait_for_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_module, 'STORE_RETRY_SECONDS', (0.001, 0.002))

    async def main() -> None:
        store = MemoryStore()
        ask = Held()
        async with study(store, ask) as running:
            state = await to_training(running)
            await running.send(state.id, state.version, 'Hello')
            store.broken = True
            ask.may.set()
            writes = len(store.groups)
            while len(store.groups) < writes + 3:
                await asyncio.sleep(0.001)
            store.broken = False
            state = await replied(running, state.id)
            assert ask.asked == 2  # the models were asked once
            assert state.turn is not None
            assert state.turn.status == 'shown'

    run(main())


def test_a_write_that_was_done_though_it_failed_is_found_again() -> None:
    """The connection was lost after the commit: the participant sends the form again, and is where they are."""

    class Forgetful(MemoryStore):
        lost = False

        def append(self, entries: Sequence[Entry]) -> Any:
            found = super().append(entries)
            if self.lost:
                self.lost = False
                raise StoreError('the connection is lost')
            return found

    async def main() -> None:
        store = Forgetful()
        async with study(store) as running:
            state = await to_training(running)
            store.lost = True
            with pytest.raises(StoreError):
                await running.send(state.id, state.version, 'Hello')
            await refused(running.send(state.id, state.version, 'Hello'))  # once more, from the same page
            assert (await replied(running, state.id)).turn is not None
            assert len(events_of(store, Asked)) == 1
            store.lost = True
            with pytest.raises(StoreError):
                await running.pause(True, '')
            with pytest.raises(OutOfDateError):
                await running.pause(True, '')
            assert running.history.paused

    run(main())


def test_an_action_goes_on_though_the_browser_is_gone() -> None:
    async def main() -> None:
        async with study() as running:
            state = await to_training(running)
            request = asyncio.create_task(running.send(state.id, state.version, 'Hello'))
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await replied(running, state.id)
            state = running.participants[state.id]
            while state.turn is None or state.turn.status != 'shown':
                await asyncio.sleep(0.001)
                state = running.participants[state.id]
            assert request.cancelled()

    run(main())


def test_waiting_turns_go_on_after_a_kill() -> None:
    async def main() -> None:
        store = MemoryStore()
        web = dataclasses.replace(settings().web, drain_seconds=0.0)
        ask = Held()
        async with study(store, ask, web=web) as running:
            waiting = [await to_training(running, f'p{n}') for n in range(3)]
            for state in waiting:
                await running.send(state.id, state.version, f'Hello from {state.id}')
            gone = await to_training(running)
            await running.send(gone.id, gone.version, 'Hello')
            await running.withdraw(gone.id, gone.version, '')
        stored = MemoryStore(list(store.rows), dict(store.known))  # as a kill leaves it
        assert not events_of(stored, Replied)
        async with study(stored) as again:
            for state in waiting:
                state = await replied(again, state.id)
                assert state.turn is not None
                assert state.turn.status == 'shown'
                assert state.turn.message == f'Hello from {state.id}'
                assert (await again.vote(state.id, state.version, 'a', 'It is better.')).step == 'conversation'
            assert len(events_of(stored, Replied)) == 3
            assert again.participants == fold_all(stored.events())

    run(main())


async def on_to_the_end(running: Running, id: str) -> Participant:
    """Goes on from wherever a participant is."""
    state = running.participants[id]
    while state.step != 'over':
        version = state.version
        match state.step, state.turn and state.turn.status:
            case 'consent', _:
                state = await running.consent(id, version, True)
            case 'instructions', _:
                state = await running.instruct(id, version)
            case 'check', _:
                state = await running.check(id, version, RIGHT)
            case 'task', _:
                state = await running.prepare(id, version, f'{state.document_type}-1', ('me', 'x'))
            case 'final', _:
                state = await running.write(id, version, WORDS, 0)
            case _, 'waiting':
                state = await replied(running, id)
            case _, 'shown':
                state = await running.vote(id, version, 'b', 'It is better.')
            case 'conversation', 'judged' if len(state.main.judged if state.main else ()) == 2:
                state = await running.conclude(id, version)
            case _:
                state = await running.send(id, version, 'Hello')
    return state


def test_a_kill_at_any_moment_loses_and_doubles_nothing() -> None:
    """The study is started again from what was stored after each of its transactions: all go on to the end."""

    class Watched(MemoryStore):
        def append(self, entries: Sequence[Entry]) -> Any:
            found = super().append(entries)
            moments.append(MemoryStore(list(self.rows), dict(self.known)))
            return found

    async def main() -> None:
        async with study(Watched()) as running:
            await asyncio.gather(*[to_end(running, f'p{n}') for n in range(3)])
        for moment in moments[:: max(1, len(moments) // 12)]:
            stored = list(moment.rows)
            async with study(moment) as running:
                ends = await asyncio.gather(*[on_to_the_end(running, id) for id in running.participants])
                assert moment.rows[: len(stored)] == stored
                assert {state.outcome for state in ends} <= {'completed'}
                assert running.participants == fold_all(moment.events())
                for state in ends:
                    names = kinds(moment, state.id)
                    assert [name for name in names if name not in ('Voided', 'Retried')] == WAY

    moments: list[MemoryStore] = []
    run(main())
    assert len(moments) > 20


def test_a_config_must_have_what_people_are_under_way_with() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store, models=('a', 'b', 'c'), pairs=('a:b',)) as running:
            states = [await to_conversation(running), await to_task(running), await to_end(running)]
        with pytest.raises(ConfigError, match=r"^models: expected 'a', which 1 under way need, found b, c$"):
            async with study(store, models=('b', 'c')):
                pass
        fewer = Tasks((DocumentType('essay', 'an essay', ('Why?',), (Task('essay-1', 'An essay', 'Write.'),)),))
        again = Running(settings(('a', 'b')), store, fewer, TEXTS, echo, clock=ticking())  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as error:
            await again.start()
        types = sorted({str(state.document_type) for state in states[:2]})
        assert str(error.value).startswith(f"document types: expected '{types[0]}', which ")
        assert f"tasks: expected '{states[0].document_type}-1', which 1 under way need" in str(error.value)
        store.append([Entry(states[0].id, states[0].version + 1, 2000.0, (Excluded(True, 'a test'),))])
        with pytest.raises(ConfigError, match=r"^models: expected 'a', which 1 under way need, found b, c$"):
            async with study(store, models=('b', 'c')):  # who is excluded is still before a page of theirs
                pass
        async with study(store, models=('b', 'c'), clock=lambda: 1e9) as running:  # they are gone
            assert len(running.participants) == 3
        with pytest.raises(KeyError):
            await running.instruct('nobody', 1)

    run(main())


def test_one_whose_model_is_gone_after_enough_exchanges_may_still_complete_the_study() -> None:
    """The final text needs no model, and whoever has done the work is paid."""

    async def main() -> None:
        store = MemoryStore()
        async with study(store, clock=lambda: 1000.0) as running:
            done = [await to_conversation(running) for _ in range(4)]
            few = await to_conversation(running)
            for number, state in enumerate(done):
                for _ in range(2 if number < 3 else 1):
                    state = await exchange(running, state)
                done[number] = state
            shown = [await running.send(state.id, state.version, 'Hello') for state in (done[3], few)]
            shown = [await replied(running, state.id) for state in shown]
        web = dataclasses.replace(settings().web, drain_seconds=0.0)
        async with study(store, Held(), web=web, clock=lambda: 1100.0) as running:
            waiting = await running.send(done[0].id, done[0].version, 'Hello')
        async with study(store, models=('first', 'third'), clock=lambda: 1e9) as running:
            states = [await running.visit(waiting.id), await running.send(done[1].id, done[1].version, 'Hello?')]
            assert [state.step for state in states] == ['final', 'final']
            assert kinds(store, waiting.id)[-3:] == ['Asked', 'Voided', 'Concluded']
            [voided] = events_of(store, Voided)
            assert ('second' in voided.cause, voided.kind) == (True, 'model removed')
            assert view(states[0], running.settings, TASKS).is_full
            for state, ends_in in zip(shown, ('final', 'over'), strict=True):  # a vote needs no model, either
                assert await running.visit(state.id) == state
                state = await running.vote(state.id, state.version, 'a', 'It is better.')
                state = await running.visit(state.id)
                assert state.step == ends_in
                states.append(state)
            assert states[3].outcome == 'closed'
            assert view(states[3], running.settings, TASKS).cut_short
            for state in states[:3]:
                state = await running.write(state.id, state.version, WORDS, TEXTS.attention.right)
                assert (state.outcome, view(state, running.settings, TASKS).code) == ('completed', 'COMPLETED')

    run(main())


def test_one_whose_model_is_gone_is_at_the_end_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store, asked = MemoryStore(), []

        async def ask(model: str, conversation: Sequence[Message]) -> Answer:
            asked.append(model)
            return await echo(model, conversation)

        async with study(store) as running:
            states = [await to_conversation(running) for _ in range(4)]
        web = dataclasses.replace(settings().web, drain_seconds=0.0)
        async with study(store, Held(), web=web, clock=lambda: 1100.0) as running:
            waiting = await running.send(states[0].id, states[0].version, 'Hello')
        async with study(store, ask, models=('first', 'third'), clock=lambda: 1e9) as running:
            assert "models: expected 'second', which 4 under way need" in caplog.text
            assert running.participants[waiting.id] == waiting  # until they come
            for state in (waiting, states[1]):
                assert (await running.visit(state.id)).main == state.main
            sent = await running.send(states[2].id, states[2].version, 'Hello?')
            assert (sent.outcome, sent.main) == ('closed', states[2].main)
            assert len(events_of(store, TurnedAway)) == 3
            left = await running.withdraw(states[3].id, states[3].version, 'It is late')
            assert left.outcome == 'withdrawn'
            assert (await running.delete(states[2].id, 0)).outcome == 'deleted'
            assert not asked

    run(main())


def test_replies_under_way_end_before_the_server_does() -> None:
    async def main() -> None:
        store = MemoryStore()

        async def ask(model: str, conversation: Sequence[Message]) -> Answer:
            await asyncio.sleep(0.02)
            return await echo(model, conversation)

        async with study(store, ask) as running:
            state = await to_training(running)
            await running.send(state.id, state.version, 'Hello')
        assert kinds(store, state.id)[-1] == 'Replied'

    run(main())


def test_many_at_once_are_assigned_evenly_and_stored_together() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store, models=('a', 'b', 'c')) as running:
            states = await asyncio.gather(*[to_conversation(running, f'p{n}') for n in range(45)])
            cells = collections.Counter((state.document_type, state.main.pair) for state in states if state.main)
            assert len(cells) == 9
            assert set(cells.values()) == {5}
            assert max(store.groups) > 10
            assert sum(store.groups) > 3 * len(store.groups)

    run(main())


def test_one_bad_entry_of_a_group_leaves_the_others() -> None:
    class Picky(MemoryStore):
        def append(self, entries: Sequence[Entry]) -> Any:
            if any('unstorable' in repr(entry) for entry in entries):
                raise StoreError('it cannot be stored')
            return super().append(entries)

    async def main() -> None:
        async with study(Picky()) as running:
            states = [await to_training(running) for _ in range(4)]
            words = ['one', 'unstorable', 'two', 'three']
            sent = await asyncio.gather(
                *[running.send(state.id, state.version, word) for state, word in zip(states, words, strict=True)],
                return_exceptions=True,
            )
            assert [isinstance(one, Participant) for one in sent] == [True, False, True, True]
            assert isinstance(sent[1], StoreError)

    run(main())


def any_action(running: Running, id: str, draws: random.Random) -> Awaitable[Participant]:
    """Any form of any page, in any order, mostly filled in well, of the current version or another."""
    state = running.participants[id]
    version = draws.choice([state.version, state.version, state.version, state.page, state.version - 1, 1])
    kind = state.document_type or 'story'
    return draws.choice(
        [
            lambda: running.consent(id, version, draws.random() < 0.9),
            lambda: running.instruct(id, version),
            lambda: running.check(id, version, RIGHT if draws.random() < 0.7 else WRONG),
            lambda: running.prepare(id, version, f'{kind}-1', ('me', draws.choice(['because', '']))),
            *[lambda: running.send(id, version, draws.choice(['Hello', 'fail', 'bad', '']))] * 3,
            lambda: running.retry(id, version),
            *[lambda: running.vote(id, version, draws.choice(['a', 'tie', 'b', 'c']), 'Because.')] * 3,
            lambda: running.conclude(id, version),
            lambda: running.write(id, version, WORDS, 0),
            lambda: enter_again(running, id, draws.choice(['s1', 's2'])),
            *[lambda: running.flag(id, 'fast', 'r')] * (draws.random() < 0.2),
            *[lambda: running.withdraw(id, version, '')] * (draws.random() < 0.05),
            *[lambda: running.delete(id, version)] * (draws.random() < 0.02),
        ]
    )()


async def enter_again(running: Running, id: str, session: str) -> Participant:
    store: Any = running.store
    panel_id = next(panel for (panel, _), (known, _) in store.known.items() if known == id)
    state, _ = await running.enter(Identity(panel_id, '', session), 'live')
    return state


@hypothesis.given(st.integers(0, 2**32))
@hypothesis.settings(max_examples=8, deadline=None)
def test_any_actions_of_several_tabs_in_any_order(seed: int) -> None:
    """Each action happens whole or not at all, each event once; the store and what is known are always the same."""

    async def ask(model: str, conversation: Sequence[Message]) -> Answer:
        await asyncio.sleep(0.0005 * draws.random())
        if conversation[-1].content == 'fail' and draws.random() < 0.5:
            raise ModelError('down')
        return await echo(model, conversation)

    async def moderate(message: str) -> str | None:
        return 'bad' if message == 'bad' else None

    async def tab(running: Running, id: str) -> None:
        for _ in range(25):
            try:
                after = await any_action(running, id, draws)
            except (OutOfDateError, BadInputError):
                pass
            else:
                done[id] += 1
                assert running.participants[id].version >= after.version

    async def main() -> None:
        store = MemoryStore()
        async with study(store, ask, moderate) as running:
            people = [await arrive(running, f'p{n}') for n in range(4)]
            await asyncio.gather(*[tab(running, state.id) for state in people for _ in range(3)])
        assert running.participants == fold_all(store.events())
        for id, state in running.participants.items():
            versions = [row[1] for row in store.rows if row[0] == id]
            if state.outcome == 'deleted':
                assert kinds(store, id) == ['Arrived', 'Deleted']
                continue
            assert versions == list(range(1, len(versions) + 1))
            together = {'TypeAssigned', 'PairAssigned'}  # stored with another event of the same action
            own = [kind for kind in kinds(store, id)[1:] if kind not in {'Replied', 'Voided', *together}]
            was_last = state.main is not None and len(state.main.judged) == 3  # that vote ended the conversation
            assert len(own) - was_last == done[id]
        async with study(store, ask, moderate) as again:
            await asyncio.sleep(0.01)
            assert set(again.participants) == set(running.participants)

    draws = random.Random(seed)
    done = collections.Counter[str]()
    run(main())


def test_swapped_models_change_no_more_than_the_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same events, at the same times, but for the names of models and what they said."""

    async def rows(models: tuple[str, str]) -> list[Any]:
        ids = iter(f'{n:016x}' for n in range(100))
        monkeypatch.setattr('secrets.token_hex', lambda _: next(ids))
        store = MemoryStore()
        async with study(store, models=models, clock=lambda: 1000.0) as running:
            for _ in range(6):
                await to_end(running)
        return [row for row in store.rows if row[3] not in ('Opened', 'PlanFrozen', 'Consented')]

    def swapped(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace('first', '\0').replace('second', 'first').replace('\0', 'second')
        if isinstance(value, dict):
            return {name: swapped(own) for name, own in value.items()}
        return [swapped(own) for own in value] if isinstance(value, list | tuple) else value

    one, other = run(rows(('first', 'second'))), run(rows(('second', 'first')))
    assert one != other
    assert swapped(one) == swapped(swapped(other))


def test_a_study_on_sqlite_goes_on_where_it_was(tmp_path: Any) -> None:
    async def main() -> None:
        url = f'sqlite:///{tmp_path}/study.sqlite'
        ask = Held()
        web = dataclasses.replace(settings().web, drain_seconds=0.0)
        with Store(url, 'live') as store:
            async with study(store, ask, web=web) as running:  # type: ignore[arg-type]
                state = await to_training(running, 'p1')
                await running.send(state.id, state.version, 'Hello')
                known = dict(running.participants)
        with Store(url, 'live') as store:
            async with study(store, clock=ticking()) as running:  # type: ignore[arg-type]
                assert set(running.participants) == set(known)
                assert (await arrive(running, 'p1')).id == state.id
                state = await replied(running, state.id)
                state = await running.vote(state.id, state.version, 'a', 'It is better.')
                assert state.step == 'conversation'
                assert running.participants == fold_all(store.events())
                assert (await running.delete(state.id, state.version)).outcome == 'deleted'
                assert running.participants == fold_all(store.events())

    run(main())


def test_after_a_tie_a_drawn_reply_is_kept() -> None:
    async def main() -> None:
        async with study() as running:
            states = [await to_conversation(running) for _ in range(4)]
            for _ in range(3):
                states = [await exchange(running, state, 'tie') for state in states]
            kept = [
                [turn.preferred.kept for turn in state.main.judged if turn.preferred] for state in states if state.main
            ]
            assert kept == [
                [kept_of_tie(running.rules.key, state.id, 'main', turn) for turn in range(3)] for state in states
            ]

    run(main())


def test_the_attention_item_has_an_answer_that_it_asks_for() -> None:
    async def main() -> None:
        async with study() as running:
            for answer in (TEXTS.attention.right, (TEXTS.attention.right + 1) % len(TEXTS.attention.options)):
                state = await to_conversation(running)
                state = await exchange(running, await exchange(running, state))
                state = await running.conclude(state.id, state.version)
                state = await running.write(state.id, state.version, WORDS, answer)
                assert state.wrote is not None
                assert state.wrote.attentive == (answer == TEXTS.attention.right)

    run(main())


def test_a_vote_says_who_was_on_the_left() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with study(store) as running:
            for choice in ('a', 'tie', 'b'):
                await exchange(running, await to_training(running), choice)
            assert [event.choice for event in events_of(store, Preferred)] == ['left', 'tie', 'right']
            for event in events_of(store, Replied):
                assert event.left_text == f'{event.left} after 1'
                assert {event.left, event.right} == {'first', 'second'}
                assert to_row(event)[1]['left'] == event.left

    run(main())
