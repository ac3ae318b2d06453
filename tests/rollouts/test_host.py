"""Conversations with partners off the device: the same as on it, and what a partner's text may and may not do."""

import dataclasses
import functools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, TERMINAL_TEXT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement, sharding, transformer
from simrl.models.transformer import Execution
from simrl.rollouts import collect as collect_lib
from simrl.rollouts import dialogue as dialogue_lib
from simrl.rollouts.agents import Agent, HostAgent, HostConversation, Limits, ModelAgent, Reply, model_agent
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.dialogue import Side, add_message, add_reply, check_agents
from simrl.rollouts.host import agent_seeds
from simrl.rollouts.prompts import Prompts, start_dialogue
from simrl.rollouts.state import Dialogue, EndReason, row_keys
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories, jit_trajectories, rollout_metrics, transcripts
from simrl.simulators.text_view import text_agent
from tests import many_devices
from tests.tiny import tiny_config

UNKNOWN, END_USER, END_ASSISTANT, BEGIN = 0, 1, 2, 3
CONTENT = range(10, 18)
LIMITS = Limits(turns=3, prompt_tokens=8, assistant_tokens=4, user_tokens=5)
SAMPLES = 4
SEED, STEP = 5, 3
EXAMPLES = [
    Example(f'example-{i}', opening, None, i, 'test', 'train')
    for i, opening in enumerate([None, '10 11', None, '12', None, None])
]
ROWS = SAMPLES * len(EXAMPLES)
PROGRAMS = (start_dialogue, add_message, add_reply, jit_trajectories)
ROLES = {'user': USER, 'assistant': ASSISTANT}


class Numbers:
    """A tokenizer of ids written out: every sequence of ids is the text of itself."""

    size = 60

    def encode(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else UNKNOWN for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return ' '.join(map(str, ids))


CHAT = Chat(
    tokenizer=Numbers(),
    end_of_turn={'user': END_USER, 'assistant': END_ASSISTANT},
    headers={'user': (4, 5), 'assistant': (4, 6, 7)},
    first_headers={'user': (5,), 'assistant': (6, 7)},
    default_prefix=(BEGIN,),
    system_header=None,
    system_end=END_USER,
    no_system_reason='none here',
    reserved=frozenset(range(8)),
)


@functools.cache
def agent_of(role: int) -> ModelAgent:
    """A tiny random model that says a few kinds of tokens, so that ends of turn and of conversations are frequent."""
    config = tiny_config(CHAT.size, max_positions=128)
    decoder = jax.tree.map(np.asarray, transformer.init_params(jax.random.key(role), config))['decoder']
    strong = {**decoder, 'head': decoder['head'] * 8, 'embedding': decoder['embedding'] * 50}
    token_mask = np.zeros(config.padded_vocab_size, bool)
    token_mask[[*CONTENT, END_USER if role == USER else END_ASSISTANT]] = True
    token_mask[CHAT.terminal] = role == USER
    agent = model_agent(
        CHAT,
        config,
        {'decoder': strong},
        Execution(),
        role=role,
        max_new_tokens=LIMITS.user_tokens if role == USER else LIMITS.assistant_tokens,
        sampling=Sampling(),
        stop_text=TERMINAL_TEXT if role == USER else '',
    )
    return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, token_mask=token_mask))


def conversations_of(
    user: Agent,
    assistant: Agent,
    view: int,
    examples: Sequence[Example] = EXAMPLES,
    seed: int = SEED,
    samples: int | None = None,
    **settings: Any,
) -> tuple[Trajectories, Mapping[int, str]]:
    """On the host; in all `ROWS` of them unless `samples` of each example are wanted."""
    batch, failures = collect(
        user,
        assistant,
        examples,
        chat=CHAT,
        limits=LIMITS,
        seed=seed,
        step=STEP,
        view=view,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
        samples=samples or ROWS // len(examples),
        **settings,
    )
    return jax.device_get(batch), failures


@functools.cache
def on_device(role: int) -> Trajectories:
    return conversations_of(agent_of(USER), agent_of(ASSISTANT), role)[0]


def talk(
    role: int, partner: HostAgent, examples: Sequence[Example] = EXAMPLES, seed: int = SEED
) -> tuple[Trajectories, Mapping[int, str]]:
    """`role` on the device with a partner off it."""
    own = agent_of(role)
    return conversations_of(*((own, partner) if role == USER else (partner, own)), role, examples, seed)


def partner_of(reply: Callable[[HostConversation, int], Reply], max_new_tokens: int = LIMITS.user_tokens) -> HostAgent:
    def replies(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        return [reply(conversation, int(seed)) for conversation, seed in zip(conversations, seeds, strict=True)]

    return HostAgent(replies, max_new_tokens)


# The same as on the device.


@pytest.mark.parametrize('name', ['user', 'assistant'])
def test_a_partner_that_plays_back_a_model_is_that_model(name: str) -> None:
    """The side `name` is on the device; the host replays its partner's messages of the jitted rollout."""
    expected = on_device(ROLES[name])
    row_of = {(e.id, s): i * SAMPLES + s for i, e in enumerate(EXAMPLES) for s in range(SAMPLES)}

    def reply(conversation: HostConversation, seed: int) -> Reply:
        row, number = row_of[conversation.example.id, conversation.sample], len(conversation.messages)
        messages = transcripts(expected, CHAT.decode)[row]['messages'][: number + 1]
        assert conversation.messages == tuple((m['role'], m['content']) for m in messages[:number])
        text = messages[number]['content']
        return Reply(text.removesuffix(TERMINAL_TEXT), ends=text.endswith(TERMINAL_TEXT))

    partner = partner_of(reply, LIMITS.assistant_tokens if name == 'user' else LIMITS.user_tokens)
    batch, failures = talk(ROLES[name], partner)
    assert not failures
    for field in dataclasses.fields(Trajectories):
        mine, theirs = getattr(batch, field.name), getattr(expected, field.name)
        if field.name == 'log_prob':
            np.testing.assert_allclose(mine, theirs, atol=2e-5)
        elif field.name not in ('decoded_steps', 'loop_steps'):  # of the partner's model too
            np.testing.assert_array_equal(mine, theirs, field.name)
    assert np.all(batch.decoded_steps <= expected.decoded_steps)


def test_the_played_conversations_hold_every_case() -> None:
    batch = on_device(ASSISTANT)
    last = batch.message_length[np.arange(ROWS), batch.num_messages - 1]
    signalled = batch.end_reason == EndReason.SIGNAL
    assert np.any(signalled & (last == 1))
    assert np.any(signalled & (last > 1))
    assert np.any(batch.end_reason == EndReason.TURNS)
    written = np.arange(2 * LIMITS.turns) < batch.num_messages[:, None]
    for side in (0, 1):
        assert {True, False} == set(batch.truncated[:, side::2][written[:, side::2]].tolist())
        assert np.any(written[:, side::2] & (batch.message_length[:, side::2] == 0))


def chatty(conversation: HostConversation, seed: int) -> Reply:
    """Says numbers drawn from its seed and what it has heard."""
    random = np.random.default_rng([seed, *''.join(text for _, text in conversation.messages).encode()])
    ids = random.choice(np.array(CONTENT), random.integers(0, 5))
    return Reply(' '.join(map(str, ids)), ends=bool(random.random() < 0.2))


def test_other_rows_do_not_matter_and_only_sizes_are_compiled_again() -> None:
    before = [program._cache_size() for program in PROGRAMS]
    batch, _ = talk(ASSISTANT, partner_of(chatty))
    sizes = len(batch_sizes(ROWS, 1))
    assert sizes == 2
    order = [4, 1, 5]  # other neighbours, other places, and twice as many samples
    other, _ = talk(ASSISTANT, partner_of(chatty), [EXAMPLES[i] for i in order])
    compiled = [program._cache_size() - count for program, count in zip(PROGRAMS, before, strict=True)]
    assert all(found <= most for found, most in zip(compiled, (1, sizes, sizes, 1), strict=True))
    for place, i in enumerate(order):
        rows, other_rows = np.arange(SAMPLES) + i * SAMPLES, np.arange(SAMPLES) + place * 2 * SAMPLES
        for name in ('tokens', 'role', 'turn', 'length', 'end_reason', 'messages', 'num_messages', 'truncated'):
            np.testing.assert_array_equal(getattr(batch, name)[rows], getattr(other, name)[other_rows], name)
        np.testing.assert_allclose(batch.log_prob[rows], other.log_prob[other_rows], atol=2e-5)
    changed, _ = talk(ASSISTANT, partner_of(chatty), seed=SEED + 1)
    assert not np.array_equal(batch.tokens, changed.tokens)


def test_a_partner_keeps_its_seed_and_is_asked_only_while_its_conversation_goes_on() -> None:
    asked: list[tuple[str, int, int, int]] = []

    def reply(conversation: HostConversation, seed: int) -> Reply:
        number = len(conversation.messages)
        asked.append((conversation.example.id, conversation.sample, number, seed))
        return Reply('10', ends=conversation.sample == 1 and number >= 2)

    batch, _ = talk(ASSISTANT, partner_of(reply))
    seeds = {(example, sample): seed for example, sample, _, seed in asked}
    assert {(example, sample, seed) for example, sample, _, seed in asked} == {(*k, v) for k, v in seeds.items()}
    assert len(set(seeds.values())) == len(seeds) == ROWS
    for i, example in enumerate(EXAMPLES):
        for sample in range(SAMPLES):
            numbers = [number for e, s, number, _ in asked if (e, s) == (example.id, sample)]
            first = 0 if example.opening is None else 2
            assert numbers == list(range(first, 3 if sample == 1 else 6, 2))
            assert batch.num_messages[i * SAMPLES + sample] == (3 if sample == 1 else 6)


def test_seeds_of_partners_are_the_same_with_64_bits() -> None:
    keys = row_keys(SEED, STEP, jnp.arange(3, dtype=jnp.uint32), jnp.zeros(3, jnp.int32))
    expected = agent_seeds(keys)
    with jax.enable_x64(True):
        found = agent_seeds(keys)
    assert found.dtype == expected.dtype == jnp.uint32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('off_device', [False, True])
def test_messages_donate_the_dialogue_and_nothing_else(monkeypatch: pytest.MonkeyPatch, off_device: bool) -> None:
    """The caches are donated from message to message; prompts and parameters never, though they are on the device."""
    placed: list[Prompts] = []
    dialogues: list[Dialogue] = []

    def shard_batch(rows: Prompts, mesh: Mesh) -> Prompts:
        placed.append(placement.shard_batch(rows, mesh))
        return placed[-1]

    def conversing(
        user: Side, assistant: Side, dialogue: Dialogue, *args: Any, **kwargs: Any
    ) -> Generator[None, None, Dialogue]:
        dialogues.append(dialogue)
        return dialogue_lib.conversing(user, assistant, dialogue, *args, **kwargs)

    monkeypatch.setattr(collect_lib, 'placement', SimpleNamespace(**vars(placement) | {'shard_batch': shard_batch}))
    monkeypatch.setattr(collect_lib, 'conversing', conversing)
    user = partner_of(chatty) if off_device else agent_of(USER)
    params = jax.tree.map(jnp.array, agent_of(ASSISTANT).policy.params)
    for _ in range(2):
        found, _ = conversations_of(user, agent_of(ASSISTANT).with_params(params), ASSISTANT)
        if not off_device:
            np.testing.assert_array_equal(found.tokens, on_device(ASSISTANT).tokens)
    assert not any(x.is_deleted() for x in jax.tree.leaves((placed, params)) if isinstance(x, jax.Array))
    assert [x for x in jax.tree.leaves(placed) if isinstance(x, jax.Array)]
    np.testing.assert_array_equal(placed[0].assistant.tokens, placed[1].assistant.tokens)
    for dialogue in dialogues:
        assert all(x.is_deleted() for x in jax.tree.leaves(dialogue.assistant.cache))


@pytest.mark.parametrize('on_both', [False, pytest.param(True, marks=pytest.mark.long)])
def test_processes_do_not_matter(on_both: bool) -> None:
    """In two processes each row's first turn is that of one process, and each process asks for other replies.

    So it is with an agent that computes on the devices of both, which is asked for all replies in each.
    """
    from tests.rollouts import two_processes  # which imports this scene

    variables = {'XLA_FLAGS': '--xla_backend_optimization_level=0'} | ({two_processes.ON_BOTH: '1'} if on_both else {})
    printed = many_devices.run_processes(two_processes.__name__, 2, **variables)
    first, second = (json.loads(lines.splitlines()[-1]) for lines in printed)  # after what Gloo prints
    found = first['alike']
    assert found == second['alike']
    given = np.repeat([example.opening is not None for example in EXAMPLES], SAMPLES)

    def first_turn(batch: Trajectories) -> np.ndarray:
        return np.where(np.arange(2)[:, None] < batch.num_messages[:, None, None], batch.messages[:, :2], 0)

    batch, failures = talk(ASSISTANT, partner_of(two_processes.failing))
    messages, reasons = found['host']
    np.testing.assert_array_equal(messages, first_turn(batch))
    if on_both:
        mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
        batch, _ = talk(ASSISTANT, text_agent(for_sampling(agent_of(USER), mesh), CHAT, mesh))
        np.testing.assert_array_equal(found['text'][0], first_turn(batch))
        assert len({str(message) for message in found['text'][0]}) > 3
        np.testing.assert_array_equal(found['continuous'][0], first_turn(on_device(ASSISTANT)))
        assert found['continuous host'] == found['host']
    written = ~given
    assert reasons == {str(row): reason for row, reason in failures.items() if written[row]}
    assert len(first['asked']) == len(second['asked']) == written.sum() / 2
    assert {tuple(x) for x in first['asked']}.isdisjoint(tuple(x) for x in second['asked'])
    assert found['error'] == 'HostAgent.reply: an error in a process of 2: OSError: no line'


# What a partner may say.


def scripted(conversation: HostConversation, seed: int) -> Reply:
    """Of each example the samples 1 to 3 do something else in their second message."""
    if len(conversation.messages) < 2:
        return Reply('10 11')
    cases = {
        ('example-0', 1): Reply('', failure='the line is dead', resamples=4),
        ('example-0', 2): Reply('12 what 13'),
        ('example-0', 3): Reply(None),  # type: ignore[arg-type]  # of an interface without an answer
        ('example-1', 1): Reply('12 13', truncated=True),
        ('example-2', 0): Reply('12 \ud83c'),  # half of an emoji
        ('example-4', 0): Reply('', failure='no answer: \ud83c'),
        ('example-2', 1): Reply('12 13', ends=True),
        ('example-2', 2): Reply('12 13 14 15 16 17', ends=True),
        ('example-2', 3): Reply('', ends=True),
        ('example-4', 1): Reply('12 13 14 15 16 17', resamples=1),
        ('example-4', 2): Reply('12 13 14 15'),
        ('example-4', 3): Reply(''),
    }
    return cases.get((conversation.example.id, conversation.sample), Reply('17'))


@functools.cache
def scripted_talk() -> tuple[Trajectories, Mapping[int, str]]:
    return talk(ASSISTANT, partner_of(scripted))


def ids_of(batch: Trajectories, row: int, number: int) -> list[int]:
    return batch.messages[row, number, : batch.message_length[row, number]].tolist()


def view(batch: Trajectories, row: int) -> list[int]:
    return batch.tokens[row, : batch.length[row]].tolist()


def heard(number: int, content: Sequence[int]) -> list[int]:
    return [*(CHAT.first_header('user') if number == 0 else CHAT.header('user')), *content, END_USER]


def test_failures_end_their_conversations_and_no_others() -> None:
    batch, failures = scripted_talk()
    assert failures == {
        1: 'the line is dead',
        2: "the tokenizer has no token for '1' (U+0031)",  # of these ids a lone 1 is none
        3: 'expected text, found None',
        8: "the tokenizer has no token for '\\ud83c' (U+D83C)",
        16: r'no answer: \ud83c',
    }
    assert all(reason.isascii() for reason in failures.values()), 'they can be printed'
    failed = batch.end_reason == EndReason.FAILURE
    assert np.flatnonzero(failed).tolist() == list(failures)
    assert batch.num_messages[failed].tolist() == [2] * len(failures)
    assert batch.end_reason[0] == EndReason.TURNS
    assert {row: batch.resamples[row] for row in np.flatnonzero(batch.resamples).tolist()} == {1: 4, 17: 1 + 1}
    total, rows = rollout_metrics(batch)['rollout/end_failure']
    assert (float(total), float(rows)) == (len(failures), ROWS)
    for row in failures:  # earlier messages are there, and nothing after them
        reply = ids_of(batch, row, 1)
        cut = bool(batch.truncated[row, 1])
        own = [*CHAT.header('assistant'), *reply, END_ASSISTANT]
        assert view(batch, row) == [BEGIN, *heard(0, [10, 11]), *own]
        assert (batch.role[row] == ASSISTANT).sum() == len(reply) + (not cut)


@pytest.mark.parametrize(
    ('row', 'content', 'truncated'),
    [
        (9, [12, 13], False),
        (10, [12, 13, 14, 15], True),
        (11, [], False),
    ],
)
def test_the_message_that_ends_a_conversation_is_said_and_not_heard(row: int, content: list, truncated: bool) -> None:
    batch, _ = scripted_talk()
    assert batch.end_reason[row] == EndReason.SIGNAL
    assert batch.num_messages[row] == 3
    assert ids_of(batch, row, 2) == [*content, CHAT.terminal]  # within the budget of 5, as where it is sampled
    assert batch.truncated[row, 2] == truncated
    assert batch.role[row, batch.length[row] - 1] != USER
    assert CHAT.terminal not in view(batch, row)
    text = transcripts(batch, CHAT.decode)[row]['messages'][-1]['content']
    assert text == CHAT.tokenizer.decode(content) + TERMINAL_TEXT


@pytest.mark.parametrize(
    ('row', 'content', 'truncated'),
    [
        (17, [12, 13, 14, 15, 16], True),
        (18, [12, 13, 14, 15], False),
        (19, [], False),
    ],
)
def test_texts_are_cut_to_the_budget_with_an_end_that_nobody_meant(row: int, content: list, truncated: bool) -> None:
    batch, _ = scripted_talk()
    assert ids_of(batch, row, 2) == content
    assert batch.truncated[row, 2] == truncated
    run = heard(2, content)
    own = [*CHAT.header('assistant'), *ids_of(batch, row, 1), END_ASSISTANT]
    start = 1 + len(heard(0, [10, 11])) + len(own)
    assert view(batch, row)[start : start + len(run)] == run
    roles = batch.role[row, start : start + len(run)].tolist()
    assert roles == [1, 1, *[USER] * len(content), 1 if truncated else USER]
    assert np.all(batch.log_prob[row, start : start + len(run)] == 0)


def test_a_text_that_its_agent_cut_is_marked_and_has_an_end_that_nobody_meant() -> None:
    """Though the budget here has room for more."""
    batch, _ = scripted_talk()
    row, run = 5, heard(2, [12, 13])
    assert ids_of(batch, row, 2) == [12, 13]
    assert batch.truncated[row, ::2].tolist() == [False, True, True]
    tokens = view(batch, row)
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(run)] == run)
    assert batch.role[row, start : start + len(run)].tolist() == [1, 1, USER, USER, 1]


# What cannot be.


def test_bad_partners_and_prompts() -> None:
    with pytest.raises(ValueError, match=r'HostAgent.max_new_tokens: expected at least 1, found 0'):
        HostAgent(lambda conversations, seeds: [], 0)
    with pytest.raises(ValueError, match=rf'HostAgent.reply: expected {ROWS - 2 * SAMPLES} replies, found 0'):
        talk(ASSISTANT, HostAgent(lambda conversations, seeds: [], LIMITS.user_tokens))
    with pytest.raises(TypeError, match=r"HostAgent.reply: expected a list of Reply, found str: 'fine'"):
        talk(ASSISTANT, HostAgent(lambda conversations, seeds: ['fine'] * len(conversations), LIMITS.user_tokens))
    own = agent_of(ASSISTANT)
    with pytest.raises(ValueError, match='view: expected an agent on the device, found a HostAgent'):
        conversations_of(partner_of(chatty), own, USER)


def test_agents_that_cannot_converse() -> None:
    user, assistant = agent_of(USER), agent_of(ASSISTANT)

    def changed(agent: ModelAgent, token_mask: np.ndarray | None = None, **config: int) -> ModelAgent:
        policy = agent.policy
        spec = dataclasses.replace(policy.spec, config=dataclasses.replace(policy.spec.config, **config))
        mask = policy.token_mask if token_mask is None else token_mask
        return dataclasses.replace(agent, policy=dataclasses.replace(policy, spec=spec, token_mask=mask))

    check_agents(user, assistant, CHAT, LIMITS)
    check_agents(partner_of(chatty), assistant, CHAT, LIMITS)
    all_ids = np.ones(assistant.policy.token_mask.shape, bool)
    cases = {
        'user: expected an agent of role 2, found one of role 3': (assistant, user),
        'expected at least one agent on the device': (partner_of(chatty), partner_of(chatty)),
        'a tokenizer of at most the 59 ids of the model, found 60': (
            partner_of(chatty),
            changed(assistant, vocab_size=CHAT.tokenizer.size - 1),
        ),
        'the assistant may sample id 61, which the smaller vocabulary of 61': (user, changed(assistant, all_ids)),
        'assistant: expected conversations of at most max_positions=20 tokens': (
            partner_of(chatty),
            changed(assistant, max_positions=20),
        ),
    }
    for message, agents in cases.items():
        with pytest.raises(ValueError, match=message):
            check_agents(*agents, CHAT, LIMITS)
