"""Several users in one batch: each example meets one, and its conversations are those of that user alone."""

import collections
import dataclasses
import functools

import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, USER
from simrl.conversations.records import Example
from simrl.rollouts.agents import HostConversation, MixedAgent, Reply, agent_for, told
from simrl.rollouts.trajectories import Trajectories
from tests.rollouts.test_host import EXAMPLES, LIMITS, SAMPLES, agent_of, chatty, conversations_of, partner_of


def member(example: Example) -> int:
    return int(example.id[-1]) % 2


@functools.cache
def mixed() -> MixedAgent:
    host = dataclasses.replace(partner_of(chatty), system=lambda example: f'chat {example.id}')
    return MixedAgent((agent_of(USER), host), member)


@functools.cache
def alone(number: int) -> Trajectories:
    return conversations_of(mixed().members[number], agent_of(ASSISTANT), ASSISTANT)[0]


def test_an_examples_conversations_are_those_of_its_member() -> None:
    batch, failures = conversations_of(mixed(), agent_of(ASSISTANT), ASSISTANT)
    assert not failures
    for i, example in enumerate(EXAMPLES):
        rows = np.arange(SAMPLES) + i * SAMPLES
        expected = alone(member(example))
        for name in (
            'tokens',
            'role',
            'turn',
            'length',
            'end_reason',
            'messages',
            'num_messages',
            'example_id',
            'group',
        ):
            np.testing.assert_array_equal(getattr(batch, name)[rows], getattr(expected, name)[rows], name)
        np.testing.assert_allclose(batch.log_prob[rows], expected.log_prob[rows], atol=2e-5)


def test_padding_is_asked_of_no_agent_and_changes_no_conversation() -> None:
    """Also where the copied example has a given opening, which the assistant would answer."""
    asked = collections.Counter[tuple[str, int, int]]()

    def counted(conversation: HostConversation, seed: int) -> Reply:
        asked[conversation.example.id, seed, len(conversation.messages)] += 1
        return chatty(conversation, seed)

    user = MixedAgent((agent_of(USER), partner_of(counted)), member)
    batch, failures = conversations_of(user, agent_of(ASSISTANT), ASSISTANT, EXAMPLES[:4], samples=SAMPLES, padding=2)
    whole, _ = conversations_of(mixed(), agent_of(ASSISTANT), ASSISTANT)
    assert not failures
    assert set(asked.values()) == {1}, 'a copy has the seeds of its example'
    real = 4 * SAMPLES
    for name in ('tokens', 'length', 'end_reason', 'messages', 'num_messages'):
        np.testing.assert_array_equal(getattr(batch, name)[:real], getattr(whole, name)[:real], name)
    assert batch.num_messages[real:].max() <= 1, 'at most a given opening'


def test_members_are_asked_and_quoted_by_example() -> None:
    assert [told(mixed(), example) for example in EXAMPLES[:2]] == [None, 'chat example-1']
    assert agent_for(mixed(), EXAMPLES[1]) is mixed().members[1]


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r'MixedAgent\.members: expected one max_new_tokens, found \[3, 5\]'):
        MixedAgent((mixed().members[0], partner_of(chatty, 3)), member)
    with pytest.raises(ValueError, match='view: expected an agent on the device, found a MixedAgent'):
        conversations_of(mixed(), agent_of(ASSISTANT), USER)
    assert LIMITS.user_tokens == 5
