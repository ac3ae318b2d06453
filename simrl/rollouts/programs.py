"""The programs of conversations, by the sizes that they may meet: counted before any is held, or compiled ahead.

With static batching:

1. `start_dialogue`, whose results say in which shards all others have their arguments.
2. One message by either agent, for each size of the batch and of the caches (`sizes.Sizes`), all rows first.
3. What lets caches grow, and what takes rows out of the batch and puts them back.
4. The conversations as training reads them.

With continuous batching 1 to 3 are those of `window_programs`. All are those that `collect` calls, with the arguments
that it gives; openings that a user writes, and what is replayed, have some of their own. What has one size may be left
to its first call: the choice among conversations of several users, and the seeds of agents off the device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.models.abstract import by_rows, with_room, with_rows
from simrl.models.cache import Cache
from simrl.rollouts.agents import (
    Agent,
    HostAgent,
    Limits,
    MixedAgent,
    ModelAgent,
    OneAgent,
    Policy,
    agent_for,
    mesh_of,
)
from simrl.rollouts.collect import joined
from simrl.rollouts.compaction import jit_gather_rows, scatter_rows, without_caches
from simrl.rollouts.context import Context, extend_cache
from simrl.rollouts.dialogue import add_message, add_reply, replicated
from simrl.rollouts.histories import dialogue_of, start_histories
from simrl.rollouts.host import no_message
from simrl.rollouts.openings import opening_prompts, opening_rooms
from simrl.rollouts.prompts import Prompts, WrittenOpening, prompts_of, start_dialogue
from simrl.rollouts.repeats import last_two, resample_message, waiting_user
from simrl.rollouts.replay import add_recorded, end_running
from simrl.rollouts.schedule import Batching
from simrl.rollouts.sizes import ROLES, Rooms, Sizes, batching_of, sizes_of, specs_of
from simrl.rollouts.state import Dialogue, EndReason, Status
from simrl.rollouts.trajectories import Trajectories, jit_trajectories, transcript_of
from simrl.rollouts.window_programs import window_programs
from simrl.run.compiles import Program, abstract, lowered_with_results, program_of, results

Conversations = Callable[[], Trajectories]  # makes abstract ones


def conversation_programs(
    user: Agent,
    assistant: OneAgent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    view: int,
    mesh: Mesh,
    rows: int,
    size: int,
    batching: Batching,
    openings: Sequence[int] = (),
    replays: bool = False,
) -> Generator[Program, None, Conversations]:
    """The programs of `collect`; arguments as there. Returns the abstract conversations of a step.

    Args:
        user, assistant: to be lowered, from `for_sampling`.
        examples: any that fit, each the user that it meets; nothing is said.
        rows: conversations of a step, of which `size` are in the device's batch.
        openings: numbers of examples for which a user writes openings at once.
        replays: True for those of replays as well.
    """
    users = user.members if isinstance(user, MixedAgent) else (user,)
    for member in users:
        met = [example for example in examples if agent_for(user, example) is member] or examples
        for number in dict.fromkeys(openings) if member.opening == 'written' else ():
            own = mesh_of(member, mesh)
            for program in _opening_programs(member, _some(met, number), chat, limits, own):
                yield dataclasses.replace(program, mesh=own)
        batch = yield from _held(
            *(member, assistant, met),
            chat=chat,
            limits=limits,
            view=view,
            mesh=mesh,
            size=size,
            batching=batching,
            replays=replays,
        )
    for agent in (*users, assistant):
        if isinstance(agent, ModelAgent):
            yield Program('cast')  # by `for_sampling`
    if rows > size:
        yield program_of(joined, lambda: ([batch()] * (rows // size),))
    if len(users) > 1:
        yield from map(Program, ('selected', *['rows_of'] * (rows // size)))
    return lambda: with_rows(batch(), rows)


def _held(
    user: OneAgent,
    assistant: OneAgent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    view: int,
    mesh: Mesh,
    size: int,
    batching: Batching,
    replays: bool,
) -> Generator[Program, None, Conversations]:
    """The programs of one user's conversations."""
    agents = (user, assistant)
    batching, shards = batching_of(user, assistant, size, mesh, batching)
    lengths: dict[str, Any] = {'limits': limits, 'max_new_tokens': (user.max_new_tokens, assistant.max_new_tokens)}

    @functools.cache
    def prompts() -> Prompts:
        """On the host."""
        written = [WrittenOpening((), end_reason=EndReason.FAILURE)] * size if user.opening == 'written' else None
        rows = _some(examples, size)
        return prompts_of(rows, user, assistant, chat, samples=1, prompt_tokens=limits.prompt_tokens, written=written)

    placed = functools.cache(lambda: abstract(placement.shard_batch(prompts(), mesh)))
    for agent in agents:
        if isinstance(agent, HostAgent):
            yield Program('agent_seeds')
    if batching == 'static':
        start = functools.cache(
            lambda: lowered_with_results(start_dialogue.trace(*_policies(agents), placed(), 0, 0, **lengths))
        )
        sizes = sizes_of(*agents, limits, rows=size, shards=shards)
        yield from _static_programs(agents, start, sizes, shards)
        if replays:
            yield from _replay_programs(agents, start, sizes, mesh)
        dialogue = functools.cache(lambda: without_caches(start()[1][0]))
    else:
        h = functools.cache(lambda: start_histories(specs_of(*agents), prompts(), **lengths))
        yield from window_programs(agents, limits, (mesh_of(user, mesh), mesh_of(assistant, mesh)), h, size, shards)

        @functools.cache
        def dialogue() -> Dialogue:
            found: Dialogue = abstract(placement.shard_batch(dialogue_of(h(), slice(None), ROLES.index(view)), mesh))
            return found

    ended = functools.cache(
        lambda: lowered_with_results(jit_trajectories.trace(dialogue(), view, placed().example, placed().group))
    )
    yield Program('trajectories', lambda: ended()[0])
    return lambda: ended()[1]


def _some(examples: Sequence[Example], number: int) -> list[Example]:
    return list(itertools.islice(itertools.cycle(examples), number))


def _opening_programs(
    user: OneAgent, examples: Sequence[Example], chat: Chat, limits: Limits, mesh: Mesh
) -> Iterator[Program]:
    """Those that write one for each example."""

    @functools.cache
    def start() -> tuple[Lowered, Any]:
        prompts = opening_prompts(user, examples, [False] * len(examples), chat=chat, limits=limits, mesh=mesh)
        lengths: dict[str, Any] = {
            'limits': dataclasses.replace(limits, turns=1),
            'max_new_tokens': (user.max_new_tokens, 1),
        }
        placed = abstract(placement.shard_batch(prompts, mesh))
        return lowered_with_results(start_dialogue.trace(*_policies([user]), None, placed, 0, 0, **lengths))

    def message(room: int) -> tuple[Any, ...]:
        dialogue, keys = start()[1]
        return *_policies([user]), None, with_caches(dialogue, (room, None)), keys

    yield Program('start_dialogue', lambda: start()[0])
    if not isinstance(user, ModelAgent):
        yield Program('agent_seeds')
        return
    first, room = opening_rooms(user.policy.spec, limits)
    if room > first:
        yield program_of(extend_cache, lambda: (start()[1][0].user.cache.layers()[0], room))
    yield program_of(add_message, functools.partial(message, room), role=USER)


def _replay_programs(
    agents: tuple[OneAgent, OneAgent],
    start: Callable[[], tuple[Lowered, tuple[Dialogue, jax.Array]]],
    sizes: Sizes,
    mesh: Mesh,
) -> Iterator[Program]:
    """Messages of a record, beside what is called without; all rows stay in the batch."""

    def recorded(caches: Rooms) -> tuple[Any, ...]:
        dialogue = start()[1][0]
        return *_policies(agents), with_caches(dialogue, caches), by_rows(transcript_of(dialogue), mesh)

    for role, agent in zip(ROLES, agents, strict=True):
        for caches in sizes.of_message(role):
            arguments = functools.partial(recorded, caches)
            yield program_of(add_recorded, arguments, role=role, max_new_tokens=agent.max_new_tokens)
    yield program_of(end_running, lambda: (start()[1][0].end_reason,))


def _static_programs(
    agents: tuple[OneAgent, OneAgent],
    start: Callable[[], tuple[Lowered, tuple[Dialogue, jax.Array]]],
    sizes: Sizes,
    shards: int,
) -> Iterator[Program]:
    """Message by message, all rows of the batch at once."""

    def begun(number: int, caches: Rooms | None = None) -> tuple[Dialogue, jax.Array]:
        """Conversations in a batch of so many rows, with caches of this room or without any."""
        dialogue, keys = with_rows(start()[1], number)
        return without_caches(dialogue) if caches is None else with_caches(dialogue, caches), keys

    def message(number: int, caches: Rooms) -> tuple[Any, ...]:
        return *_policies(agents), *begun(number, caches)

    def reply(number: int, caches: Rooms, role: int) -> tuple[Any, ...]:
        side = ROLES.index(role)
        return _policies(agents)[1 - side], begun(number, caches)[0], no_message(number, agents[side].max_new_tokens)

    def again(number: int, caches: Rooms) -> tuple[Any, ...]:
        return *message(number, caches), np.zeros(number, np.bool_), np.uint32(0), jnp.float32(1)

    def waiting(number: int) -> tuple[Any, ...]:
        dialogue = begun(number)[0]
        return (Status(dialogue.num_messages, dialogue.end_reason),)

    def said(number: int) -> tuple[Any, ...]:
        return begun(number)[0], results(waiting_user.trace(*waiting(number)), begun(number)[0].end_reason.sharding)

    def status(number: int) -> tuple[Any, ...]:
        views = map(begun(number)[0].view, ROLES)
        return ((*waiting(number), tuple(None if view is None else view.length for view in views)),)

    def growing(number: int, side: int, room: int, larger: int) -> tuple[Any, ...]:
        return cache(number, side, room).layers()[0], larger

    def cache(number: int, side: int, room: int) -> Cache:
        context = start()[1][0].view(ROLES[side])
        assert context is not None
        return with_rows(with_room(context.cache, room), number)

    def leaving(number: int, index: np.ndarray) -> tuple[Any, ...]:
        return jax.tree.leaves(begun(number)), index

    def caches_leaving(number: int, side: int, room: int, index: np.ndarray) -> tuple[Any, ...]:
        return cache(number, side, room).layers()[0], index

    def returning(number: int, fewer: int, index: np.ndarray) -> tuple[Any, ...]:
        return begun(number)[0], begun(fewer)[0], index

    yield Program('start_dialogue', lambda: start()[0])
    repeats = isinstance(agents[0], ModelAgent) and agents[0].resampling is not None
    for number in sizes.rows:
        yield program_of(replicated, functools.partial(status, number))
        for caches, (role, agent) in itertools.product(sizes.caches, zip(ROLES, agents, strict=True)):
            if caches not in sizes.of_message(role):
                continue
            if isinstance(agent, ModelAgent):
                yield program_of(add_message, functools.partial(message, number, caches), role=role)
            else:
                yield program_of(add_reply, functools.partial(reply, number, caches, role), role=role)
            if role == USER and repeats:
                yield program_of(resample_message, functools.partial(again, number, caches))
        for side in (0, 1):
            for rooms in itertools.combinations(sizes.of_view(side), 2):
                yield program_of(extend_cache, functools.partial(growing, number, side, *rooms))
        if repeats:
            yield program_of(waiting_user, functools.partial(waiting, number))
            yield program_of(last_two, functools.partial(said, number))
    for number, fewer in itertools.combinations(sizes.rows, 2):
        index = np.zeros((shards, fewer // shards), np.int64)
        yield program_of(jit_gather_rows, functools.partial(leaving, number, index))
        for side in (0, 1):
            for room in sizes.of_view(side):
                yield program_of(jit_gather_rows, functools.partial(caches_leaving, number, side, room, index))
        if number == sizes.rows[0]:
            yield program_of(scatter_rows, functools.partial(returning, number, fewer, index))


def with_caches(dialogue: Dialogue, rooms: Rooms) -> Dialogue:
    """The abstract dialogue with caches of these sizes."""

    def grown(context: Context | None, room: int | None) -> Context | None:
        if context is None or room is None:
            return context
        return dataclasses.replace(context, cache=with_room(context.cache, room))

    for role, room in zip(ROLES, rooms, strict=True):
        dialogue = dialogue.with_view(role, grown(dialogue.view(role), room))
    return dialogue


def _policies(agents: Sequence[OneAgent]) -> list[Policy | None]:
    return [abstract(agent.policy) if isinstance(agent, ModelAgent) else None for agent in agents]
