"""The reward of a conversation: its rows are the chat template's own, its scores those of one reply at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.records import Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models import transformer
from simrl.models.transformer import Execution
from simrl.rewards import reward_model
from simrl.rewards.reward_model import (
    RewardScale,
    Scoring,
    assemble,
    conversation_rewards,
    frame_of,
    reply_scores,
    score_conversations,
    score_rows,
)
from simrl.rewards.rewards import CAUSES, NO_REPLY
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories
from tests.tiny import byte_tokenizer, tiny_config

WIDTH = 128
CONVERSATIONS = [
    ['hi', 'hello there', 'how?', 'so'],
    ['a longer opening', 'b', 'c', ''],
    ['only an opening', 'and a reply'],
    ['nobody answered'],
]


@pytest.fixture(scope='module')
def chat():
    return chat_from_huggingface(byte_tokenizer())


@pytest.fixture(scope='module')
def model(chat):
    config = tiny_config(chat.size, num_layers=2, mlp_dim=32)
    params = transformer.init_params(jax.random.key(0), config)
    head = {'kernel': jax.random.normal(jax.random.key(1), (config.model_dim,)), 'bias': jnp.float32(0.25)}
    return config, params | {'reward_head': head}


def arrays(chat, conversations, width=20):
    messages = np.zeros((len(conversations), 4, width), np.int32)
    length = np.zeros((len(conversations), 4), np.int32)
    for i, texts in enumerate(conversations):
        for j, text in enumerate(texts):
            ids = chat.encode(text)
            messages[i, j, : len(ids)] = ids
            length[i, j] = len(ids)
    return jnp.asarray(messages), jnp.asarray(length), jnp.array([len(texts) for texts in conversations])


def turns(texts):
    return [Message(('user', 'assistant')[j % 2], text) for j, text in enumerate(texts)]


def test_rows_are_the_templates_own(chat):
    messages, length, count = arrays(chat, CONVERSATIONS)
    tokens, end = assemble(messages, length, count, frame_of(chat), WIDTH)
    for i, texts in enumerate(CONVERSATIONS):
        rendered = render(chat, turns(texts), system=None)
        assert tokens[i, : len(rendered)].tolist() == rendered.tokens.tolist()
        assert not tokens[i, len(rendered) :].any()
        for j in range(4):
            last = np.flatnonzero(rendered.message == j)
            assert int(end[i, j]) == (last[-1] if j < len(texts) else tokens.shape[1])


def test_one_pass_scores_every_reply_as_if_it_were_the_last(chat, model):
    config, params = model
    messages, length, count = arrays(chat, CONVERSATIONS)
    frame = frame_of(chat)
    score, valid = reply_scores(params, config, Execution(), messages, length, count, frame=frame, width=WIDTH)
    assert valid.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    for i, texts in enumerate(CONVERSATIONS):
        for reply in range(len(texts) // 2):
            ids = render(chat, turns(texts[: 2 * reply + 2]), system=None).tokens
            row = np.zeros((1, 128), np.int32)  # of one shape, so that there is one program
            row[0, : len(ids)] = ids
            alone = score_rows(params, config, Execution(), jnp.asarray(row), jnp.array([[len(ids) - 1]]))[0, 0]
            np.testing.assert_allclose(score[i, reply], alone, rtol=1e-5, atol=1e-5)


def test_what_was_not_said_does_not_matter(chat, model):
    config, params = model
    messages, length, count = arrays(chat, CONVERSATIONS)
    frame = frame_of(chat)
    score, _ = reply_scores(params, config, Execution(), messages, length, count, frame=frame, width=WIDTH)
    noisy = jnp.where(jnp.arange(messages.shape[2]) < length[..., None], messages, 7)
    again, _ = reply_scores(params, config, Execution(), noisy, length, count, frame=frame, width=WIDTH)
    np.testing.assert_array_equal(score, again)


def test_rewards_are_standardised_means_and_fractions_survive():
    score = jnp.array([[1.5, 0.5], [0.75, 9.0], [4.0, 4.0]])
    valid = jnp.array([[True, True], [True, False], [False, False]])
    rewards = conversation_rewards(score, valid, RewardScale(mean=jnp.float32(0.5), std=jnp.float32(2.0)))
    np.testing.assert_allclose(rewards.value, [0.25, 0.125, 0.0])
    assert rewards.value.dtype == jnp.float32
    assert rewards.valid.tolist() == [True, True, False]
    assert [CAUSES[cause] for cause in rewards.cause.tolist()] == ['', '', NO_REPLY]


def rollouts(chat, conversations, end_reason=EndReason.TURNS):
    """The conversations as what a rollout leaves, as far as the reward model reads it."""
    messages, length, count = arrays(chat, conversations)
    rows = len(conversations)
    zeros = jnp.zeros(rows, jnp.int32)
    return Trajectories(
        **dict.fromkeys(('tokens', 'role', 'turn', 'log_prob'), jnp.zeros((rows, 1), jnp.int32)),
        **dict.fromkeys(
            ('length', 'example_id', 'group', 'num_given', 'decoded_steps', 'loop_steps', 'resamples'), zeros
        ),
        messages=messages,
        message_length=length,
        truncated=jnp.zeros_like(length, bool),
        num_messages=count,
        end_reason=jnp.broadcast_to(jnp.asarray(end_reason), rows),
    )


def score_all(chat, model, batch, **settings):
    config, params = model
    return score_conversations(params, batch, Scoring(config, Execution(), frame_of(chat), 12, **settings))


def test_the_message_that_ends_a_conversation_is_not_in_the_view(chat, model):
    """The same messages with other ends: after a signal the last message is not scored."""
    batch = rollouts(chat, [['hi', 'hello there', 'how?', 'so']] * 2, [EndReason.TURNS, EndReason.SIGNAL])
    score, valid = score_all(chat, model, batch, num_microbatches=4)  # of two rows: each is a part
    assert valid.tolist() == [[True, True], [True, False]]
    assert score[0, 0] == score[1, 0] != 0
    assert score[1, 1] == 0


def test_rows_are_as_wide_as_what_was_said(chat, model, monkeypatch):
    """Short conversations are scored apart from long ones, in their bucket; every row gets its own scores."""
    widths = []

    def recorded(*arguments, width, **settings):
        widths.append((len(arguments[3]), width))
        return reply_scores(*arguments, width=width, **settings)

    monkeypatch.setattr(reward_model, 'reply_scores', recorded)
    lengths = [len(render(chat, turns(texts), system=None)) for texts in CONVERSATIONS]
    short, long = sorted(lengths)[1], sorted(lengths)[-1]
    buckets = (short - 1, short, long, long + 1)
    score, valid = score_all(chat, model, rollouts(chat, CONVERSATIONS), row_buckets=buckets, num_microbatches=2)
    assert widths == [(2, short), (2, long)]  # in the order of their lengths
    config, params = model
    messages = arrays(chat, CONVERSATIONS)
    frame = frame_of(chat)
    expected, there = reply_scores(params, config, Execution(), *messages, frame=frame, width=WIDTH)
    np.testing.assert_array_equal(valid, there)
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)
