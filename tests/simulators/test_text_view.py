"""The same simulator on the device and through its texts: equal tokens, for equal seeds and weights."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, TERMINAL_TEXT, USER
from simrl.conversations.records import Example, Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models import transformer
from simrl.models.sharding import make_mesh
from simrl.models.transformer import Execution
from simrl.rollouts.agents import Agent, HostConversation, Limits, ModelAgent, Resampling, assistant
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.host import agent_seeds
from simrl.rollouts.state import EndReason, example_hash, row_keys
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import transcripts
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned, told_intent
from simrl.simulators.next_turns import next_turns
from simrl.simulators.role_play import RolePlaySettings, role_play
from simrl.simulators.text_view import text_agent, text_view
from tests.tiny import CHATML, byte_tokenizer, tiny_config

CHAT = chat_from_huggingface(byte_tokenizer(template='<|endoftext|>' + CHATML))
MESH = make_mesh(1, 1, jax.devices()[:1])
LIMITS = Limits(turns=3, prompt_tokens=64, assistant_tokens=5, user_tokens=6)
EXAMPLES = [Example(f'e{i}', text, f'goal {i}', i, 'test', 'train') for i, text in enumerate(['ab', 'b a'])]
SAMPLES, SEED, STEP = 4, 3, 1
SIGNAL = 'bb'
COMMON = {'max_new_tokens': LIMITS.user_tokens}
RULE = Resampling(tries=2, temperature_step=0.5, max_temperature=3.0)


def params_of(seed: int) -> Any:
    decoder = transformer.init_params(jax.random.key(seed), CONFIG)['decoder']
    return {'decoder': {**decoder, 'head': decoder['head'] * 8, 'embedding': decoder['embedding'] * 50}}


CONFIG = tiny_config(CHAT.size, max_positions=256)


def few_tokens(agent: ModelAgent) -> ModelAgent:
    """The agent, which says few kinds of tokens: all are text, and ends and repeats are frequent."""
    allowed = [*CHAT.encode('ab '), *CHAT.end_of_turn.values(), *([] if agent.resampling else [CHAT.terminal])]
    mask = np.asarray(agent.policy.token_mask) & np.isin(np.arange(CONFIG.padded_vocab_size), allowed)
    return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, token_mask=mask))


def simulator(name: str) -> ModelAgent:
    parts = (CHAT, CONFIG, params_of(1), Execution())
    if name.startswith('fine_tuned'):
        resampling = RULE if name == 'fine_tuned, repeats' else None
        settings = FineTunedSettings(Sampling(1.2, top_k=50))
        agent = fine_tuned(*parts, **COMMON, settings=settings, system=told_intent, resampling=resampling)
    else:
        opening: Any = 'written' if name == 'role_play, opening' else 'given'
        fields = '{signal} {person}' if opening == 'written' else '{signal} {person} {opening}'
        settings = RolePlaySettings(Sampling(1.2), SIGNAL, fields)
        agent = role_play(*parts, **COMMON, settings=settings, person=lambda x: x.intent, opening=opening)
    return for_sampling(few_tokens(agent), MESH)


@functools.cache
def helper() -> ModelAgent:
    return for_sampling(
        few_tokens(assistant(CHAT, CONFIG, params_of(2), Execution(), max_new_tokens=5, sampling=Sampling(1.2))), MESH
    )


def conversations(user: Agent) -> Any:
    batch, failures = collect(
        user,
        helper(),
        EXAMPLES,
        chat=CHAT,
        limits=LIMITS,
        seed=SEED,
        step=STEP,
        view=ASSISTANT,
        mesh=MESH,
        samples=SAMPLES,
    )
    assert not failures
    return jax.device_get(batch)


def rollout_keys(conversations: Sequence[HostConversation], seeds: np.ndarray) -> jax.Array:
    """The keys that the same conversations have on the device."""
    hashes = np.array([example_hash(conversation.example.id) for conversation in conversations], np.uint32)
    return row_keys(SEED, STEP, hashes, np.array([conversation.sample for conversation in conversations], np.int32))


@pytest.mark.parametrize(
    'name',
    ['fine_tuned, repeats', *(pytest.param(x, marks=pytest.mark.long) for x in ('role_play, opening', 'role_play'))],
)
def test_a_simulator_says_the_same_on_the_device_and_through_its_texts(name: str) -> None:
    user = simulator(name)
    expected = conversations(user)
    found = conversations(text_agent(user, CHAT, MESH, keys=rollout_keys))
    rows = (transcripts(batch, CHAT.decode) for batch in (expected, found))
    for mine, theirs in zip(*rows, strict=True):
        assert mine['end_reason'] == theirs['end_reason']
        said = [[(m['role'], m['content']) for m in row['messages']] for row in (mine, theirs)]
        if mine['end_reason'] == 'signal':  # the terminal token stands for the signal of an agent off the device
            ends = [messages.pop()[1] for messages in said]
            assert ends[0].partition(user.stop_text)[0] == ends[1].removesuffix(TERMINAL_TEXT)
        assert said[0] == said[1]
    for field in ('num_messages', 'end_reason', 'truncated', 'resamples', 'length', 'tokens', 'role'):
        np.testing.assert_array_equal(getattr(expected, field), getattr(found, field), field)
    if name == 'fine_tuned, repeats':
        assert expected.resamples.sum()
    else:
        assert EndReason.SIGNAL in expected.end_reason


@pytest.mark.parametrize('name', ['fine_tuned', 'role_play', 'role_play, opening'])
def test_the_view_of_texts_is_the_rendering_of_the_conversation(name: str) -> None:
    user = simulator(name)
    said = (('user', 'ab'), ('assistant', 'b'), ('user', '<|im_end|>'), ('assistant', ''))
    swapped = name != 'fine_tuned'
    for number in range(1, 3):
        talk = HostConversation(EXAMPLES[0], 0, said[: 2 * number])
        view = text_view(user, CHAT, talk)
        assert user.system is not None
        messages = [Message('user' if role == 'user' else 'assistant', text) for role, text in talk.messages]
        row = render(
            CHAT,
            messages,
            system=user.system(EXAMPLES[0]),
            view='swapped' if swapped else 'natural',
            openings=user.opening,
        )
        header = CHAT.header('assistant' if swapped else 'user')
        assert view.tokens == [*row.tokens.tolist(), *header]
        assert view.role[: len(row)] == row.role.tolist()
        assert view.message == [*row.message.tolist(), *[2 * number] * len(header)]
        assert view.number == 2 * number


def test_a_tokenizer_of_its_own() -> None:
    """The simulator reads and writes other ids than the assistant; the assistant hears the same text."""
    tokenizer = byte_tokenizer(merges=[('a', 'b')], template='<|endoftext|>' + CHATML)
    chat = chat_from_huggingface(tokenizer)
    assert chat.encode('ab') != CHAT.encode('ab')
    config = tiny_config(chat.size, max_positions=256)
    agent = fine_tuned(
        chat,
        config,
        transformer.init_params(jax.random.key(3), config),
        Execution(),
        max_new_tokens=6,
        settings=FineTunedSettings(Sampling()),
        system=told_intent,
    )
    allowed = [*chat.encode('ab'), *chat.encode('ba '), chat.end_of_turn['user']]
    mask = np.isin(np.arange(config.padded_vocab_size), allowed)
    agent = dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, token_mask=mask))
    host = text_agent(for_sampling(agent, MESH), chat, MESH)
    batch = conversations(host)
    spoken = [m for row in transcripts(batch, CHAT.decode) for m in row['messages'] if m['role'] == 'user']
    assert set(''.join(m['content'] for m in spoken)) <= set('ab ')
    assert len({m['content'] for m in spoken}) > 3
    assert agent.role == USER
    # A character that its tokenizer lacks fails the conversation in which it is said, alone.
    talks = [HostConversation(EXAMPLES[0], 0, (('user', 'ab'), ('assistant', text))) for text in ('\ud800', 'a')]
    lost, other = host.reply(talks, np.arange(2, dtype=np.uint32))
    assert 'no token for' in str(lost.failure)
    assert [other] == host.reply(talks[1:], np.ones(1, np.uint32))
    assert other.failure is None
    assert host.reply(talks[:1], np.zeros(1, np.uint32)) == [lost]


def test_next_turns_are_what_the_simulator_says_whatever_their_order_and_batch() -> None:
    user = simulator('fine_tuned, repeats')
    said = (('user', 'ab'), ('assistant', 'b'), ('user', 'b a'), ('assistant', 'a'))
    talks = [
        HostConversation(EXAMPLES[i % 2], sample, said[: 2 * (1 + i // 2)]) for sample in (0, 1) for i in (3, 0, 2, 1)
    ]
    asked = {'chat': CHAT, 'mesh': MESH, 'batch_size': 8, 'step': STEP, 'name': 'turns'}
    found = next_turns(user, talks, seed=1, **asked)
    hashes = np.array([example_hash(talk.example.id) for talk in talks], np.uint32)
    seeds = np.asarray(agent_seeds(row_keys(1, STEP, hashes, np.repeat(np.arange(2, dtype=np.int32), 4))))
    assert found == text_agent(user, CHAT, MESH).reply(talks, seeds)
    assert next_turns(user, talks[::-1], seed=1, **asked) == found[::-1]
    assert next_turns(user, talks, seed=2, **asked) != found
    assert len({reply.text for reply in found}) > 2
