"""Messages that are streamed: the same as those of a rollout, in text that never changes once it is shown."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, TERMINAL_TEXT, USER
from simrl.conversations.records import Example
from simrl.conversations.templates import chat_from_huggingface
from simrl.models import sharding, transformer
from simrl.models.transformer import Execution
from simrl.rollouts.agents import HostAgent, Limits, ModelAgent, Reply, model_agent
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.token_sampling import Sampling
from simrl.serving import stream
from simrl.serving.stream import ModelView, TooLongError, view_of
from tests.tiny import CHATML, byte_tokenizer, tiny_config

# A rollout cannot begin with nothing: the template writes something before the first header.
CHAT = chat_from_huggingface(byte_tokenizer(template='<|endoftext|>' + CHATML))
LIMITS = Limits(turns=3, prompt_tokens=64, assistant_tokens=9, user_tokens=11)
EXAMPLES = [Example(f'example-{i}', opening, None, i, 'test', 'train') for i, opening in enumerate(['Hi!', None, 'bb'])]
SEED = 5
STOP = '[['


@functools.cache
def agent(role: int, view: str = 'natural', temperature: float = 1.0, positions: int = 256) -> ModelAgent:
    """A tiny random model that writes few kinds of bytes, so that ends of messages and conversations are frequent."""
    config = tiny_config(CHAT.size, max_positions=positions)
    decoder = transformer.init_params(jax.random.key(role), config)['decoder']
    made = model_agent(
        CHAT,
        config,
        {'decoder': {**decoder, 'head': decoder['head'] * 8, 'embedding': decoder['embedding'] * 50}},
        Execution(),
        role=role,
        max_new_tokens=LIMITS.user_tokens if role == USER else LIMITS.assistant_tokens,
        sampling=Sampling(temperature),
        view=view,
        system=(lambda example: f'Play: {example.opening}') if view == 'swapped' else None,
        stop_text='' if role == ASSISTANT else TERMINAL_TEXT if view == 'natural' else STOP,
    )
    allowed = [*CHAT.encode('ab[E]'), CHAT.end_of_turn['user'], *([CHAT.terminal] if role == USER else [])]
    token_mask = np.asarray(made.policy.token_mask) & np.isin(np.arange(config.padded_vocab_size), allowed)
    made = dataclasses.replace(made, policy=dataclasses.replace(made.policy, token_mask=token_mask))
    return for_sampling(made, sharding.make_mesh(1, 1, jax.devices()[:1]))


def streamed(user, assistant, example: Example, sample: int) -> tuple[list[list[int]], list[bool], list[str]]:
    """The messages of a conversation, which of them were cut, and their texts joined from pieces."""
    views = [
        view_of(of, CHAT, example, role, seed=SEED, sample=sample)
        for of, role in ((user, USER), (assistant, ASSISTANT))
    ]
    opening = [] if example.opening is None else [CHAT.encode(example.opening)]
    messages, truncated, texts = opening, [False] * len(opening), [CHAT.decode(ids) for ids in opening]
    while len(messages) < 2 * LIMITS.turns:
        view = views[len(messages) % 2]
        texts.append(''.join(view.stream()))
        assert texts[-1] == view.sent.text
        messages.append(list(view.sent.ids))
        truncated.append(view.sent.truncated)
        if view.sent.ends:
            break
        views[len(messages) % 2].receive(view.sent.ids)
    return messages, truncated, texts


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('view', ['natural', pytest.param('swapped', marks=pytest.mark.long)])
def test_messages_are_those_of_a_rollout(view: str, temperature: float) -> None:
    user, assistant = agent(USER, view, temperature), agent(ASSISTANT, temperature=temperature)
    examples = [example for example in EXAMPLES if example.opening or view == 'natural']
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    batch, _ = collect(
        user, assistant, examples, chat=CHAT, limits=LIMITS, seed=SEED, step=0, view=ASSISTANT, mesh=mesh, samples=2
    )
    batch = jax.device_get(batch)
    ends = set()
    for row in range(2 * len(examples)):
        messages, truncated, texts = streamed(user, assistant, examples[row // 2], row % 2)
        number = len(messages)
        expected = [
            ids[:length].tolist() for ids, length in zip(batch.messages[row], batch.message_length[row], strict=True)
        ]
        assert messages == expected[:number]
        assert not batch.message_length[row, number:].any()
        assert truncated == batch.truncated[row, :number].tolist()
        assert not any(text.endswith(TERMINAL_TEXT if view == 'natural' else STOP) for text in texts[::2])
        ends.add(number < 2 * LIMITS.turns)
    assert temperature == 0 or ends == {True, False}


def test_what_a_reader_stops_is_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as one that is cut by its max tokens does, and the conversation continues."""
    monkeypatch.setattr(stream, 'BLOCK', 1)
    example = EXAMPLES[1]
    view = ModelView(agent(ASSISTANT), CHAT, example, seed=SEED)
    view.receive(CHAT.encode('aaa'))
    pieces = view.stream()
    first = next(pieces)
    pieces.close()
    assert view.sent == stream.Sent(tuple(CHAT.encode(first)), first, False, True)
    assert len(view.sent.ids) == 1
    told = np.asarray(view._context.tokens[0, : view.length]).tolist()
    end = CHAT.end_of_turn['assistant']
    assert told[-2:] == [*view.sent.ids, end]
    view.receive(CHAT.encode('b'))
    assert ''.join(view.stream()) == view.sent.text


@pytest.mark.long
def test_cache_sizes_and_chunks_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [streamed(agent(USER), agent(ASSISTANT), example, 0) for example in EXAMPLES]
    monkeypatch.setattr(stream, 'LEAST_CACHE', 32)
    monkeypatch.setattr(stream, 'BLOCK', 3)
    assert [streamed(agent(USER), agent(ASSISTANT), example, 0) for example in EXAMPLES] == whole


def test_a_conversation_longer_than_the_positions_is_refused() -> None:
    view = ModelView(agent(ASSISTANT, positions=64), CHAT, EXAMPLES[1], seed=SEED)
    view.receive(CHAT.encode('ab'))
    list(view.stream())
    before = view.length
    expected = 'the conversation is too long: expected at most the model.s max_positions=64 tokens, found [0-9]+ with'
    with pytest.raises(TooLongError, match=f'^{expected} this message and the shortest reply$'):
        view.receive(CHAT.encode('a' * 60))
    assert view.length == before
    long = dataclasses.replace(EXAMPLES[0], opening='a' * 70)
    with pytest.raises(TooLongError, match=f'^{expected} the prompt$'):
        ModelView(agent(ASSISTANT, positions=64), CHAT, long, seed=SEED)


def test_the_last_message_takes_the_positions_that_are_left() -> None:
    view = ModelView(agent(ASSISTANT, positions=64), CHAT, EXAMPLES[1], seed=SEED)
    left = 64 - view.length - len(agent(ASSISTANT).policy.spec.partner_header) - 1
    header = len(agent(ASSISTANT).policy.spec.own_header)
    view.receive(CHAT.encode('a' * (left - header - 3)))  # two tokens and an end-of-turn have room
    list(view.stream())
    assert view.length <= 64
    assert len(view.sent.ids) <= 2


def test_an_agent_off_the_device() -> None:
    def reply(conversations, seeds):
        assert seeds.dtype == np.uint32
        (conversation,) = conversations
        return [Reply(f'{len(conversation.messages)}', ends=len(conversation.messages) >= 2)]

    example = EXAMPLES[1]
    messages, _, texts = streamed(HostAgent(reply, max_new_tokens=9), agent(ASSISTANT), example, 0)
    assert [texts[0], texts[2]] == ['0', '2']
    assert messages[0] == CHAT.encode('0')
    for reason, failure in (('tired', Reply('', failure='tired')), ('expected text, found None', Reply(None))):  # type: ignore[arg-type]
        failing = view_of(HostAgent(lambda c, s, failure=failure: [failure], 9), CHAT, example, USER, seed=0)
        with pytest.raises(RuntimeError, match=rf'^the agent failed: {reason}$'):
            list(failing.stream())
