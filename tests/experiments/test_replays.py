"""People's conversations replayed to a simulator off the device: which turns it takes, what it reads, what is kept."""

import json
import pathlib
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest

from simrl.conversations.records import Conversation, Message, example_of
from simrl.conversations.templates import chat_from_huggingface
from simrl.evaluation.fidelity.turns import read_turns
from simrl.experiments import replays
from simrl.experiments.settings import Compute, EvaluationSettings, MeshSettings
from simrl.rollouts.agents import HostAgent, HostConversation, MixedAgent, Reply
from simrl.rollouts.collect import ConversationError
from tests.tiny import byte_tokenizer

CHAT = chat_from_huggingface(byte_tokenizer())


def conversation(name: str, number: int, end: str = 'unknown') -> Conversation:
    messages = tuple(Message(('user', 'assistant')[i % 2], f'{name}{i}') for i in range(number))
    return Conversation(name, 'made up', 'test', messages, end)


PEOPLE = [conversation('a', 5), conversation('b', 4, 'natural'), conversation('c', 1), conversation('d', 8)]


def replied(reply: Callable[[HostConversation], Reply], **changes) -> HostAgent:
    def replies(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        assert len(set(seeds.tolist())) == len({talk.example.id for talk in conversations})
        return [reply(talk) for talk in conversations]

    return HostAgent(replies, **{'max_new_tokens': 12, **changes})


def replay(folder: pathlib.Path, user, **settings):
    changed = EvaluationSettings(replayed=4, batch_size=3, **settings)
    scene = mock.Mock(chat=CHAT, compute=Compute(mesh=MeshSettings(1)), example_of=example_of)
    scene.settings.evaluation = changed
    scene.simulator.return_value = user
    scene.people_to_replay.side_effect = lambda number: PEOPLE[:number]
    replays.replay_people(folder, scene=scene, arm='mine', seed=0)
    return read_turns(folder / replays.TURNS_FILE), json.loads((folder / 'result.json').read_text())


def echo(talk: HostConversation) -> Reply:
    return Reply(f'{talk.messages[-1][1]} {len(talk.messages)}' if talk.messages else 'hello')


def test_every_turn_after_the_opening_is_said_after_what_was_really_said(tmp_path):
    turns, found = replay(tmp_path, replied(echo))
    assert [(turn.conversation, turn.turn, turn.real, turn.simulated) for turn in turns] == [
        ('a', 1, 'a2', 'a1 2'),
        ('a', 2, 'a4', 'a3 4'),
        ('b', 1, 'b2', 'b1 2'),
        ('b', 2, None, 'b3 4'),
        ('d', 1, 'd2', 'd1 2'),
        ('d', 2, 'd4', 'd3 4'),
        ('d', 3, 'd6', 'd5 6'),
    ]
    assert [turn.real_end for turn in turns] == [False, None, False, True, False, False, False]
    assert found == {'conversations': 4, 'turns': 7, 'left_out': {}, 'failed': {}}


def test_a_simulator_that_opens_says_the_openings_and_late_turns_are_left_out_and_counted(tmp_path):
    user = replied(echo, opening='written')
    turns, found = replay(tmp_path, user, replayed_turns=3, replayed_tokens=8)
    assert [(turn.conversation, turn.turn) for turn in turns] == [
        *(('a', t) for t in range(3)),
        *(('b', t) for t in range(3)),
        ('c', 0),
        *(('d', t) for t in range(3)),
    ]
    assert turns[0].simulated == 'hello'
    assert found['left_out'] == {'turns after the first 3 of a person': 1}
    _, found = replay(tmp_path, user, replayed_tokens=7)
    assert found['left_out'] == {'turns after more than 7 tokens': 4}
    with pytest.raises(ConversationError, match=r"mine: expected turns .*none; .*first 1 of a person': 7"):
        replay(tmp_path, replied(echo), replayed_turns=1)


def test_messages_are_cut_and_ends_kept_as_in_a_rollout_and_a_mixture_meets_each_example_once(tmp_path):
    ends = replied(lambda talk: Reply('thanks' if talk.example.id == 'b' else '', ends=True))
    user = MixedAgent((ends, replied(lambda talk: Reply('x' * 20))), lambda example: int(example.id == 'd'))
    turns, _ = replay(tmp_path, user)
    found = {(turn.conversation, turn.simulated, turn.ended, turn.truncated) for turn in turns}
    assert found == {('a', None, True, False), ('b', 'thanks', True, False), ('d', 'x' * 12, False, True)}


def test_failures_are_counted_and_too_many_stop_the_stage(tmp_path):
    lost = replied(lambda talk: Reply('', failure='no line') if talk.example.id == 'b' else Reply('x'))
    turns, found = replay(tmp_path, lost)
    assert found['failed'] == {'no line': 2}
    assert [turn.failure for turn in turns if turn.conversation == 'b'] == ['no line'] * 2
    assert not any(turn.replayed for turn in turns if turn.failure)
    with pytest.raises(ConversationError, match=r'replay of mine: 7 of 7 .*no token for|not Unicode|surrogate'):
        replay(tmp_path, replied(lambda talk: Reply('\ud800')))
