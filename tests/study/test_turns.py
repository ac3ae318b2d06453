"""A message becomes two replies on their sides, or a void turn with its cause; never one, and never an empty one."""

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from simrl.conversations.records import Message
from simrl.remote.settings import EndpointSettings
from simrl.study.assignment import first_is_left
from simrl.study.events import Arrived, Preferred, Replied, Stored, Voided
from simrl.study.participant import Participant, Talk, Turn, apply
from simrl.study.settings import StudyModel
from simrl.study.turns import Answer, Ask, ModelError, names_of, reply
from tests.study.studies import echo

JUDGED = Turn(
    'one',
    conduct=Preferred('left', 'left', '').conduct,
    asked_at=0.0,
    status='judged',
    replies=Replied('a', 'b', 'A', 'B', 1.0, 1.0),
    preferred=Preferred('right', 'right', ''),
)
ASKED = dataclasses.replace(JUDGED, message='two', status='waiting', replies=None, preferred=None)

KEY = b'of draws'


def waiting(id: str = 'p1', judged: int = 1) -> Participant:
    """One whose message waits for replies, after some judged turns."""
    state = apply(None, Stored(1, id, 1, 0.0, Arrived('live')))
    return dataclasses.replace(state, step='conversation', main=Talk(('a', 'b'), 0.0, (*[JUDGED] * judged, ASKED)))


def test_both_models_are_told_the_same_and_answer_on_their_sides() -> None:
    asked: list[tuple[str, list[tuple[str, str]]]] = []

    async def ask(model: str, conversation: Sequence[Message]) -> Answer:
        asked.append((model, [(message.role, message.content) for message in conversation]))
        return Answer(f'I am {model}', {'a': 1.0, 'b': 2.0}[model], model == 'b')

    lefts = set()
    for id in ('p1', 'p2', 'p3', 'p4', 'p5'):
        found = asyncio.run(reply(waiting(id), KEY, ask, None))
        assert isinstance(found, Replied)
        lefts.add(found.left)
        is_first = first_is_left(KEY, id, 'main', 1)
        assert (found.left, found.right) == (('a', 'b') if is_first else ('b', 'a'))
        assert (found.left_text, found.right_text) == (f'I am {found.left}', f'I am {found.right}')
        assert (found.left_seconds, found.right_seconds) == ((1.0, 2.0) if is_first else (2.0, 1.0))
        assert (found.left_cut, found.right_cut) == ((False, True) if is_first else (True, False))
    assert lefts == {'a', 'b'}
    conversation = [('user', 'one'), ('assistant', 'B'), ('user', 'two')]
    assert sorted(asked)[::5] == [('a', conversation), ('b', conversation)]


def test_the_models_answer_at_the_same_time() -> None:
    """And one that fails ends the other: nobody waits for a reply that nobody will see."""

    async def measured(ask: Ask) -> Replied | Voided:
        async with asyncio.timeout(10):
            found = await reply(waiting(), KEY, ask, None)
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1
            return found

    met = asyncio.Barrier(2)
    cancelled = []

    async def meeting(model: str, _: Sequence[Message]) -> Answer:
        await met.wait()  # of both
        return Answer(model, 0.1, False)

    async def failing(model: str, _: Sequence[Message]) -> Answer:
        if model == 'b':
            raise ModelError('server: status 500')
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(model)
            raise
        raise AssertionError('it was waited for')

    assert isinstance(asyncio.run(measured(meeting)), Replied)
    assert asyncio.run(measured(failing)) == Voided('b: server: status 500', kind='no answer')
    assert cancelled == ['a']


@pytest.mark.parametrize('text', ['', ' \n\t'])
def test_an_empty_reply_is_none(text: str) -> None:
    async def ask(model: str, _: Sequence[Message]) -> Answer:
        return Answer(text if model == 'a' else 'words', 0.1, False)

    assert asyncio.run(reply(waiting(), KEY, ask, None)) == Voided(
        'a: expected a reply, found an empty one', kind='empty reply'
    )


def test_a_fault_of_the_program_makes_a_void_turn() -> None:
    async def ask(model: str, _: Sequence[Message]) -> Answer:
        raise KeyError(model)

    found = asyncio.run(reply(waiting(), KEY, ask, None))
    assert isinstance(found, Voided)
    assert found.cause.startswith('KeyError: ')
    assert not found.refused


def test_a_message_that_is_not_let_pass_reaches_no_model() -> None:
    asked, seen = [], []

    async def ask(model: str, _: Sequence[Message]) -> Answer:
        asked.append(model)
        return await echo(model, ())

    async def moderate(message: str) -> str | None:
        seen.append(message)
        if len(seen) == 2:
            raise ModelError('moderation: status 500')
        return 'violence' if len(seen) == 1 else None

    assert asyncio.run(reply(waiting(), KEY, ask, moderate)) == Voided(
        'moderation: violence', refused=True, kind='refused by moderation'
    )
    assert asyncio.run(reply(waiting(), KEY, ask, moderate)) == Voided(
        'moderation: status 500', kind='no answer'
    )  # it fails closed
    assert not asked
    assert isinstance(asyncio.run(reply(waiting(), KEY, ask, moderate)), Replied)
    assert sorted(asked) == ['a', 'b']
    assert seen == ['two', 'two', 'two']


def test_a_model_that_names_itself_is_flagged() -> None:
    def named(names: Sequence[str], **texts: str) -> Replied:
        async def ask(model: str, _: Sequence[Message]) -> Answer:
            return Answer(texts[model], 0.1, False)

        found = asyncio.run(reply(waiting(), KEY, ask, None, names))
        assert isinstance(found, Replied)
        return found

    plain = named(['arm-1'], a='A story.', b='Another.')
    assert plain.named == ()
    found = named(['arm-1'], a='A story.', b='I am arm-1, your helper.')
    assert [getattr(found, side) for side in found.named] == ['b']
    assert len(named([], a='I am ChatGPT.', b='I am Qwen, made by Alibaba Cloud.').named) == 2


def test_names_are_those_of_the_config_and_of_what_serves_them() -> None:
    found = names_of(
        {
            'arm-1': StudyModel(source='runs/paper/persona/seed-0'),
            'arm-2': StudyModel(endpoint=EndpointSettings('http://127.0.0.1:9/v1', 'OWNER/Tiny-1B')),
        }
    )
    assert found == {'arm-1', 'arm-2', 'runs/paper/persona/seed-0', 'seed-0', 'OWNER/Tiny-1B', 'Tiny-1B'}
