"""The bound of programs holds: what conversations of drawn lengths meet, message by message on the host."""

import collections
import dataclasses
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models.transformer import Execution
from simrl.rollouts import window, window_programs
from simrl.rollouts.agents import (
    Agent,
    GenerationSpec,
    HostAgent,
    Limits,
    MixedAgent,
    ModelAgent,
    OneAgent,
    Policy,
    Resampling,
)
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.context import capacity_for, round_up
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.messages import room_to_receive, room_to_send
from simrl.rollouts.programs import conversation_programs
from simrl.rollouts.schedule import Batching, levels
from simrl.rollouts.sizes import sizes_of
from simrl.run.compiles import counted
from tests.tiny import tiny_config

SIDES = (USER, ASSISTANT)


def model(role: int, max_new_tokens: int, header: int, opening: str = 'given') -> ModelAgent:
    """An agent without parameters, with headers of so many tokens."""
    spec = GenerationSpec(
        config=tiny_config(60, max_positions=2**16),
        execution=Execution(),
        role=role,
        own_header=(3,) * header,
        partner_header=(4,) * (header + 1),
        own_first_header=(3,),
        partner_first_header=(4,),
        end_of_turn=1,
        partner_end_of_turn=1,
        max_new_tokens=max_new_tokens,
    )
    return ModelAgent(Policy({}, np.ones(128, bool), 1.0, spec), lambda _: None, opening=opening)  # type: ignore[arg-type, return-value]


def mesh_of(data: int) -> Any:
    """As much of a mesh as the bound reads."""
    return SimpleNamespace(shape={'data': data})


def bound(
    user: Agent,
    assistant: OneAgent,
    limits: Limits,
    *,
    rows: int,
    size: int | None = None,
    shards: int = 1,
    batching: Batching = 'static',
    replays: bool = False,
) -> dict[str, int]:
    """The number of programs by function; none is traced, for which there is no example."""
    programs = conversation_programs(
        *(user, assistant, []),
        chat=None,  # type: ignore[arg-type]
        limits=limits,
        view=ASSISTANT,
        mesh=mesh_of(shards),
        rows=rows,
        size=size or rows,
        batching=batching,
        replays=replays,
    )
    return dict(counted(programs))


def off_device(max_new_tokens: int) -> HostAgent:
    return HostAgent(lambda conversations, seeds: [], max_new_tokens)


def met(
    user: OneAgent, assistant: OneAgent, limits: Limits, rows: int, shards: int, random: np.random.Generator
) -> collections.Counter[str]:
    """The different programs of a batch of conversations whose messages have drawn lengths, by function."""
    agents = (user, assistant)
    specs = {side: agent.policy.spec for side, agent in enumerate(agents) if isinstance(agent, ModelAgent)}
    opening = user.max_new_tokens + 1 if user.opening == 'written' else 0
    room = {i: capacity(s, agents[1 - i].max_new_tokens, limits.prompt_tokens, limits.turns) for i, s in specs.items()}
    length = {i: random.integers(1, limits.prompt_tokens + 1, rows) + opening for i in specs}
    headers = {i: max(len(s.own_header), len(s.partner_header)) for i, s in specs.items()}
    widths = {i: limits.prompt_tokens + (headers[i] + opening if opening else 0) for i in specs}
    cache = {i: min(round_up(widths[i]), room[i]) for i in specs}
    running, batch, programs = np.ones(rows, bool), rows, set[tuple]()
    for number in range(2 * limits.turns):
        sender = number % 2
        programs.add(('replicated', batch))
        most = running.reshape(shards, -1).sum(axis=1).max()
        smaller = shards * min(size for size in batch_sizes(rows, shards) if size >= most)
        if smaller < batch:
            programs |= {
                ('gather_rows', batch, smaller),
                *(('gather_rows', batch, smaller, i, cache[i]) for i in specs),
            }
            programs |= {('scatter_rows', batch)} if batch < rows else set()
            batch = smaller
        budget = agents[sender].max_new_tokens
        rooms = {i: room_to_send(s) if i == sender else room_to_receive(s, budget) for i, s in specs.items()}
        size = capacity_for(int(max((length[i][running] + rooms[i]).max() for i in specs)), max(room.values()))
        for i in specs:
            if (grown := min(size, room[i])) > cache[i]:
                programs.add(('extend_cache', i, batch, cache[i], grown))
                cache[i] = grown
        programs.add(('add_message' if sender in specs else 'add_reply', sender, batch, *cache.values()))
        said = random.integers(0, budget + 1, rows)
        for i, spec in specs.items():
            header = spec.own_header if i == sender else spec.partner_header
            length[i] = length[i] + np.where(running, said + len(header) + 1, 0)
        running &= random.random(rows) > random.random() ** 3
        if not running.any():
            break
    if batch < rows:
        programs.add(('scatter_rows', batch))
    return collections.Counter(name for name, *_ in programs)


budgets = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.tuples(budgets, budgets),
    prompt=st.integers(1, 400),
    turns=st.integers(1, 6),
    shards=st.sampled_from([1, 2, 4]),
    per_shard=st.integers(1, 24),
    sides=st.sampled_from(['both', 'both', 'user', 'assistant', 'written']),
    seed=st.integers(0, 2**32 - 1),
)
def test_conversations_meet_no_more_programs_than_stated(tokens, prompt, turns, shards, per_shard, sides, seed) -> None:
    limits = Limits(turns, prompt, tokens[1], tokens[0])
    opening = 'written' if sides == 'written' else 'given'
    user = off_device(tokens[0]) if sides == 'assistant' else model(USER, tokens[0], 2, opening)
    assistant = off_device(tokens[1]) if sides == 'user' else model(ASSISTANT, tokens[1], 4)
    rows = shards * per_shard
    stated = bound(user, assistant, limits, rows=rows, shards=shards)
    random = np.random.default_rng(seed)
    for _ in range(3):
        for name, number in met(user, assistant, limits, rows, shards, random).items():
            assert number <= stated.get(name, 0), name


def test_every_size_is_one_that_the_longest_or_the_shortest_messages_meet() -> None:
    """The bound is not loose: its smallest and largest caches occur."""
    limits = Limits(turns=5, prompt_tokens=2048, assistant_tokens=1024, user_tokens=2048)
    user, assistant = model(USER, 2048, 3), model(ASSISTANT, 1024, 3)
    sizes = sizes_of(user, assistant, limits, rows=320, shards=8)
    assert sizes.rows == (320, 160, 80)
    assert [caches[0] for caches in sizes.caches] == sizes.of_view(0) == sizes.of_view(1)
    assert sizes.of_view(0)[0] == 2048
    assert sizes.of_view(0)[-1] == capacity(user.policy.spec, 1024, 2048, 5)
    assert sizes.of_message(USER)[0] == (3072, 3072)
    assert sizes.of_message(ASSISTANT)[0] == (2048, 2048)  # it fits beside prompts of half as much


def test_a_users_prompts_are_of_examples_that_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the other member may have longer prompts of it than fit (`agents.fitting`)."""
    rendered: list[tuple[Any, set[str]]] = []

    def prompts(rows: Any, user: Any, *_: Any, **__: Any) -> None:
        rendered.append((user, {example.id for example in rows}))
        raise LookupError

    monkeypatch.setattr('simrl.rollouts.programs.prompts_of', prompts)
    monkeypatch.setattr('simrl.rollouts.programs.opening_prompts', lambda user, rows, *_, **__: prompts(rows, user))
    limits = Limits(turns=2, prompt_tokens=64, assistant_tokens=16, user_tokens=16)
    users = model(USER, 16, 2), model(USER, 16, 2, 'written')
    examples: Any = [SimpleNamespace(id=str(number)) for number in range(8)]
    programs = conversation_programs(
        *(MixedAgent(users, lambda example: int(example.id) % 2), model(ASSISTANT, 16, 2), examples),
        chat=None,  # type: ignore[arg-type]
        limits=limits,
        view=ASSISTANT,
        mesh=mesh_of(1),
        rows=16,
        size=16,
        batching='static',
        openings=(8,),
    )
    for program in programs:
        if program.name == 'start_dialogue':
            assert program.lower is not None
            with pytest.raises(LookupError):
                program.lower()
    of = [{'0', '2', '4', '6'}, {'1', '3', '5', '7'}]
    assert [(users.index(user), ids) for user, ids in rendered] == [(0, of[0]), (1, of[1]), (1, of[1])]


def test_several_users_and_pieces_and_repeats_add_programs() -> None:
    limits = Limits(turns=2, prompt_tokens=64, assistant_tokens=16, user_tokens=16)
    assistant, user = model(ASSISTANT, 16, 2), model(USER, 16, 2)
    strict = dataclasses.replace(user, resampling=Resampling())

    held = functools.partial(bound, assistant=assistant, limits=limits, rows=16)
    one, two = held(user), held(MixedAgent((user, user), lambda _: 0))
    assert two['add_message'] == 2 * one['add_message']
    assert two['selected'] == 1
    assert one['cast'] == 2
    assert held(user, size=8)['joined'] == 1
    assert held(strict)['resample_message'] == one['add_message'] // 2
    assert 'decode_block' in held(user, batching='continuous')
    assert 'add_message' not in held(user, batching='continuous')
    replays = {name: n - one.get(name, 0) for name, n in held(user, replays=True).items() if n != one.get(name)}
    assert replays == {'add_recorded': one['add_message'] // 2, 'end_running': 1}


def test_a_side_may_begin_once_most_conversations_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a mixture's other members, and those that are not replayed, are before the first message."""
    limits = Limits(turns=2, prompt_tokens=64, assistant_tokens=16, user_tokens=16)
    user, assistant = model(USER, 16, 2), model(ASSISTANT, 16, 2)
    lowered: Any = SimpleNamespace(__name__='empty_cache', lower=lambda spec, rows, room: (spec.role, rows, room))
    monkeypatch.setattr(window_programs, 'empty_cache', lowered)
    mesh, shards, size = mesh_of(2), 2, 64
    sizes = levels(size, shards, sides=2)
    assert len(sizes) == 3
    programs = window_programs.window_programs((user, assistant), limits, (mesh, mesh), None, size, shards)  # type: ignore[arg-type]
    stated: list[Any] = [x.lower() for x in programs if x.name == 'empty_cache' and x.lower is not None]
    room = min(room for _, _, room in stated)
    for agent, level in itertools.product((user, assistant), sizes):
        with monkeypatch.context() as made:
            met: list[Any] = []
            made.setattr(window, 'empty_cache', lambda *sizes, met=met: met.append(sizes))
            window.new_caches(agent.policy.spec, level, shards, room)
        assert {(spec.role, *of) for spec, *of in met} <= set(stated), level
    # What tells the shards of all others is one of them.
    assert {(role, shards, room) for role in (USER, ASSISTANT)} <= set(stated)


def test_conversations_at_their_own_pace_have_programs_for_few_sizes() -> None:
    """The paper's: the bound says which ones compute, and which only move bytes."""
    limits = Limits(turns=5, prompt_tokens=2048, assistant_tokens=1024, user_tokens=2048)
    found = bound(model(USER, 2048, 3), model(ASSISTANT, 1024, 3), limits, rows=320, size=64, batching='continuous')
    assert found['decode_block'] == found['feed_rows'] == 48
    assert sum(found.values()) < 550
