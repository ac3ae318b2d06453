"""Openings that a user writes once for each example: every conversation of a group starts from the same one."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.conversations.records import Example
from simrl.rollouts.agents import HostConversation, Reply
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories
from tests.rollouts.test_host import (
    CHAT,
    CONTENT,
    EXAMPLES,
    SAMPLES,
    agent_of,
    chatty,
    conversations_of,
    partner_of,
)

WRITER = dataclasses.replace(
    agent_of(USER),
    opening='written',
    prompt=lambda example: agent_of(USER).prompt(dataclasses.replace(example, opening=None)),
)
NONE_GIVEN = [dataclasses.replace(example, opening=None) for example in EXAMPLES]


def conversations(
    user, examples: Sequence[Example], view: int, rows_in_flight: int | None = None, samples: int = SAMPLES
) -> tuple[Trajectories, Mapping[int, str]]:
    return conversations_of(user, agent_of(ASSISTANT), view, examples, samples=samples, rows_in_flight=rows_in_flight)


@functools.cache
def written(view: int) -> Trajectories:
    return conversations(WRITER, EXAMPLES, view)[0]


@functools.cache
def written_each(view: int) -> Trajectories:
    """The same user, which writes an opening for each conversation."""
    return conversations(agent_of(USER), NONE_GIVEN, view)[0]


def messages(batch: Trajectories, row: int) -> list[list[int]]:
    return [batch.messages[row, i, : batch.message_length[row, i]].tolist() for i in range(batch.num_messages[row])]


@pytest.mark.parametrize('view', [USER, ASSISTANT], ids=['user', 'assistant'])
def test_the_opening_of_a_group_is_that_of_its_first_conversation(view: int) -> None:
    """And the first conversation is the one that it is without a group, in both views, to the token."""
    batch, each = written(view), written_each(view)
    for row in range(0, len(EXAMPLES) * SAMPLES, SAMPLES):
        first = messages(each, row)
        assert messages(batch, row) == first
        assert {tuple(messages(batch, other)[0]) for other in range(row, row + SAMPLES)} == {tuple(first[0])}
        np.testing.assert_array_equal(batch.tokens[row], each.tokens[row])
        assert batch.length[row] == each.length[row]
        assert batch.end_reason[row] == each.end_reason[row]
        assert batch.truncated[row].tolist() == each.truncated[row].tolist()
    openings = [messages(each, row)[0] for row in range(len(EXAMPLES) * SAMPLES)]
    assert any(openings[row] != openings[row // SAMPLES * SAMPLES] for row in range(len(openings)))


def test_the_opening_is_heard_and_not_trained_on() -> None:
    user, assistant = written(USER), written(ASSISTANT)
    for batch, each in ((user, written_each(USER)), (assistant, written_each(ASSISTANT))):
        for row in range(0, len(EXAMPLES) * SAMPLES, SAMPLES):
            own = batch is user
            opening = (each.turn[row] == 0) if own else np.zeros(batch.role[row].shape, bool)
            expected = np.where(opening, TEMPLATE, each.role[row])
            np.testing.assert_array_equal(batch.role[row], expected)
    assert np.all(user.log_prob[(user.turn < 0)] == 0)
    assert not np.any(user.turn == 0)


@pytest.mark.long
def test_openings_do_not_depend_on_how_the_rows_are_cut_or_on_their_neighbours() -> None:
    whole = written(ASSISTANT)
    pieces, _ = conversations(WRITER, EXAMPLES, ASSISTANT, rows_in_flight=6)  # cuts through a group
    order = [3, 0, 5]
    fewer, _ = conversations(WRITER, [EXAMPLES[i] for i in order], ASSISTANT)
    for name in ('tokens', 'role', 'length', 'end_reason', 'messages', 'num_messages'):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name), name)
        for place, i in enumerate(order):
            rows, others = np.arange(SAMPLES) + i * SAMPLES, np.arange(SAMPLES) + place * SAMPLES
            np.testing.assert_array_equal(getattr(whole, name)[rows], getattr(fewer, name)[others], name)


def test_an_agent_off_the_device_is_asked_once_for_each_opening() -> None:
    asked: list[tuple[str, int]] = []

    def reply(conversation: HostConversation, seed: int) -> Reply:
        if not conversation.messages:
            asked.append((conversation.example.id, conversation.sample))
        return chatty(conversation, seed)

    partner = dataclasses.replace(partner_of(reply), opening='written')
    batch, failures = conversations(partner, EXAMPLES, ASSISTANT)
    assert not failures
    assert asked == [(example.id, 0) for example in EXAMPLES]
    each, _ = conversations(partner_of(chatty), NONE_GIVEN, ASSISTANT)
    for row in range(len(EXAMPLES) * SAMPLES):
        assert messages(batch, row)[0] == messages(each, row // SAMPLES * SAMPLES)[0]
        if row % SAMPLES == 0:
            assert messages(batch, row) == messages(each, row)


def test_an_opening_that_fails_or_ends_is_not_handed_to_the_assistant() -> None:
    def reply(conversation: HostConversation, seed: int) -> Reply:
        cases = {
            'example-0': Reply('', failure='no opening', resamples=3),
            'example-1': Reply('', ends=True),
            'example-2': Reply('10', ends=True),
            'example-3': Reply('10 11 12 13 14 15', resamples=2),
        }
        opens = not conversation.messages
        return cases.get(conversation.example.id, Reply('12')) if opens else Reply('13')

    partner = dataclasses.replace(partner_of(reply), opening='written')
    batch, failures = conversations(partner, EXAMPLES, ASSISTANT)
    assert failures == dict.fromkeys(range(SAMPLES), 'no opening')
    resampled = {0: 3, 3 * SAMPLES: 2}  # openings count once for their example
    assert batch.resamples.tolist() == [resampled.get(row, 0) for row in range(len(EXAMPLES) * SAMPLES)]
    for row in range(len(EXAMPLES) * SAMPLES):
        found, reason = messages(batch, row), EndReason(batch.end_reason[row])
        match row // SAMPLES:
            case 0:
                assert (found, reason) == ([], EndReason.FAILURE)
            case 1:
                assert (found, reason) == ([[CHAT.terminal]], EndReason.SIGNAL)
            case 2:
                assert (found, reason) == ([[10, CHAT.terminal]], EndReason.SIGNAL)
            case 3:
                assert (found[0], reason) == ([10, 11, 12, 13, 14], EndReason.TURNS)
                assert batch.truncated[row, 0]
            case _:
                assert (found[0], reason) == ([12], EndReason.TURNS)
        if row < 3 * SAMPLES:
            assert not np.any(batch.role[row] == ASSISTANT)
            assert set(batch.tokens[row].tolist()).isdisjoint(CONTENT)
