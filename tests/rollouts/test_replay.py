"""Recorded conversations, replayed and continued: as if unbroken with their own keys, and others with other keys."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, USER
from simrl.conversations.records import Example
from simrl.rollouts.agents import Agent, HostConversation, Reply
from simrl.rollouts.replay import Replay, replay_messages
from simrl.rollouts.state import Dialogue, EndReason, Transcript
from simrl.rollouts.trajectories import Trajectories, transcript_of
from tests.rollouts import scene
from tests.rollouts.test_host import CHAT as NUMBERS
from tests.rollouts.test_host import (
    EXAMPLES,
    LIMITS,
    ROWS,
    SAMPLES,
    agent_of,
    chatty,
    conversations_of,
    partner_of,
)
from tests.rollouts.test_mixed import mixed
from tests.rollouts.test_openings import WRITER

ALL = list(range(scene.ROWS))
SAID = ('messages', 'message_length', 'truncated', 'num_messages', 'num_given', 'end_reason')


def converse_all(dialogue: Dialogue) -> Dialogue:
    return scene.without_caches(scene.converse(*scene.policies(), dialogue, scene.keys(), turns=scene.TURNS))


@functools.cache
def unbroken() -> Dialogue:
    return converse_all(scene.start(ALL))


@pytest.mark.parametrize('messages', range(1, 2 * scene.TURNS + 1))
def test_replayed_messages_and_what_follows_are_the_unbroken_conversation(messages: int) -> None:
    """The user's view is swapped, the assistant's natural; from the middle of a turn as well."""
    expected = unbroken()
    dialogue = replay_messages(
        *scene.policies(), scene.start(ALL, room=False), transcript_of(expected), messages=messages
    )
    replayed = np.minimum(messages, expected.num_messages)
    np.testing.assert_array_equal(dialogue.num_messages, replayed)
    assert not np.any(dialogue.decoded_steps)
    found = converse_all(dialogue)
    for field in SAID:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), field)
    for name in ('user', 'assistant'):
        mine, theirs = getattr(found, name), getattr(expected, name)
        for field in ('tokens', 'role', 'message', 'length'):
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field), f'{name}.{field}')
        sampled = theirs.message >= np.maximum(replayed, expected.num_given)[:, None]
        np.testing.assert_allclose(mine.log_prob, np.where(sampled, theirs.log_prob, 0.0), atol=2e-5)


def test_the_record_holds_every_case() -> None:
    """Without them the other tests here would prove less."""
    record = unbroken()
    written = np.arange(2 * scene.TURNS) < record.num_messages[:, None]
    assert {EndReason.SIGNAL, EndReason.TURNS} == set(record.end_reason.tolist())
    assert {0, 1} == set(record.num_given.tolist())
    assert {True, False} == set(record.truncated[written].tolist())
    assert np.any(written & (record.message_length == 0))


# Whole batches, whoever the user is.

USERS = ('device', 'host', 'writer', 'writer off the device', 'mixed')


@functools.cache
def user_of(name: str) -> Agent:
    users: Mapping[str, Callable[[], Agent]] = {
        'device': lambda: agent_of(USER),
        'host': lambda: partner_of(chatty),
        'writer': lambda: WRITER,
        'writer off the device': lambda: dataclasses.replace(partner_of(chatty), opening='written'),
        'mixed': mixed,
    }
    return users[name]()


def talk(
    user: Agent,
    replay: Replay | None = None,
    examples: Sequence[Example] = EXAMPLES,
    rows_in_flight: int | None = None,
) -> tuple[Trajectories, Mapping[int, str]]:
    return conversations_of(
        *(user, agent_of(ASSISTANT), ASSISTANT, examples),
        samples=SAMPLES,
        rows_in_flight=rows_in_flight,
        replay=replay,
    )


@functools.cache
def recorded(name: str) -> Trajectories:
    return talk(user_of(name))[0]


@pytest.mark.parametrize('name', USERS)
def test_with_the_keys_of_the_record_its_rest_is_said_again(name: str) -> None:
    expected = recorded(name)
    for turns in range(1, LIMITS.turns + 1):
        replay = Replay(transcript_of(expected), turns, LIMITS.turns - turns, 0)
        found, failures = talk(user_of(name), replay, rows_in_flight=ROWS // 2 if turns == 1 else None)
        assert not failures
        rows = replay.present
        np.testing.assert_array_equal(rows, expected.num_messages >= 2 * turns)
        assert rows.any()
        for field in (*SAID, 'tokens', 'role', 'turn', 'length', 'example_id', 'group'):
            np.testing.assert_array_equal(getattr(found, field)[rows], getattr(expected, field)[rows], field)
        assert np.all(found.num_messages[~rows] < 2)
        assert not np.any(found.end_reason == EndReason.RUNNING)


@pytest.mark.parametrize('name', ['device', 'host'])
def test_other_samples_begin_with_the_record_and_go_on_in_their_own_way(name: str) -> None:
    """They end with their window, and depend on no other row."""
    record = transcript_of(recorded(name))
    found = {number: talk(user_of(name), Replay(record, 1, 1, number * SAMPLES))[0] for number in (1, 2)}
    rows = np.flatnonzero(record.num_messages >= 2)
    for future in found.values():
        np.testing.assert_array_equal(future.messages[rows, :2], record.messages[rows, :2])
        np.testing.assert_array_equal(future.truncated[rows, :2], record.truncated[rows, :2])
        ended = future.end_reason[rows]
        assert set(ended.tolist()) == {EndReason.SIGNAL, EndReason.TURNS}
        np.testing.assert_array_equal(future.num_messages[rows], np.where(ended == EndReason.SIGNAL, 3, 4))
    later = [batch.messages[rows, 2] for batch in (record, found[1], found[2])]
    assert not any(np.array_equal(later[i], later[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    order = [4, 1, 5]
    own = np.concatenate([np.arange(SAMPLES) + i * SAMPLES for i in order])
    fewer = Replay(jax.tree.map(lambda x: x[own], record), 1, 1, SAMPLES)
    other, _ = talk(user_of(name), fewer, [EXAMPLES[i] for i in order])
    for field in (*SAID, 'tokens', 'role', 'turn', 'length'):
        np.testing.assert_array_equal(getattr(other, field), getattr(found[1], field)[own], field)


def test_a_partner_off_the_device_reads_what_was_replayed_once() -> None:
    record = transcript_of(recorded('host'))
    asked: list[tuple[str, int, int]] = []

    def reply(conversation: HostConversation, seed: int) -> Reply:
        asked.append((conversation.example.id, conversation.sample, len(conversation.messages)))
        row = [example.id for example in EXAMPLES].index(conversation.example.id) * SAMPLES + conversation.sample - 8
        texts = [NUMBERS.decode(record.messages[row, i, : record.message_length[row, i]].tolist()) for i in range(2)]
        assert [text for _, text in conversation.messages[:2]] == texts
        return Reply('10 11')

    batch, _ = talk(partner_of(reply), Replay(record, 1, LIMITS.turns - 1, 8))
    rows = np.flatnonzero(record.num_messages >= 2)
    assert sorted(asked) == sorted(
        (EXAMPLES[row // SAMPLES].id, row % SAMPLES + 8, number) for row in rows.tolist() for number in (2, 4)
    )
    assert np.all(batch.num_messages[rows] == 6)


def test_what_failed_is_over_from_the_start() -> None:
    record: Transcript = transcript_of(recorded('device'))
    failed = record.end_reason.copy()
    failed[5] = EndReason.FAILURE
    replay = Replay(dataclasses.replace(record, end_reason=failed), 1, 1, SAMPLES)
    assert record.num_messages[5] >= 2
    assert not replay.present[5]
    batch, _ = talk(user_of('device'), replay)
    assert batch.num_messages[5] == batch.num_given[5]
    assert batch.end_reason[5] == EndReason.TURNS


def test_what_the_user_says_next_may_be_replayed_too() -> None:
    """The assistant replies to it; a conversation in which it heard nothing more is over from the start."""
    record = transcript_of(recorded('device'))
    replay = Replay(record, 1, 1, SAMPLES, heard=1)
    ended = (record.num_messages == 3) & (record.end_reason == EndReason.SIGNAL)
    assert ended.any()
    np.testing.assert_array_equal(replay.present, (record.num_messages >= 3) & ~ended)
    batch, failures = talk(user_of('device'), replay)
    assert not failures
    rows = np.flatnonzero(replay.present)
    np.testing.assert_array_equal(batch.num_messages[rows], 4)
    np.testing.assert_array_equal(batch.messages[rows, :3], record.messages[rows, :3])
    assert not np.array_equal(batch.messages[rows, 3], record.messages[rows, 3])
    assert np.all(batch.num_messages[~replay.present] < 2)
