"""The programs of conversations at their own pace: of `window`, for each `Level` and size of caches, each on its mesh.

See `programs`, of which they are a part.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from simrl.models.abstract import with_room, with_rows
from simrl.models.cache import Cache
from simrl.rollouts.agents import Limits, ModelAgent, OneAgent, Policy
from simrl.rollouts.context import capacities_from, extend_cache
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.histories import Histories
from simrl.rollouts.schedule import MOST_STEPS, Level, levels
from simrl.rollouts.sizes import prompt_width
from simrl.rollouts.window import Caches, decode_block, empty_cache, feed_rows, idle_rows, move_rows, take_rows
from simrl.run.compiles import Program, abstract, lowered_with_results, program_of


def window_programs(
    agents: tuple[OneAgent, OneAgent],
    limits: Limits,
    meshes: tuple[Mesh, Mesh],
    h: Callable[[], Histories],
    size: int,
    shards: int,
) -> Iterator[Program]:
    """Each conversation at its own pace: for each level and size of caches, each side on its mesh."""
    yield from map(Program, ('row_keys', 'key_data'))
    sizes = levels(size, shards, sum(isinstance(agent, ModelAgent) for agent in agents))
    for side, (agent, mesh) in enumerate(zip(agents, meshes, strict=True)):
        if not isinstance(agent, ModelAgent):
            continue
        policy, most_fed = abstract(agent.policy), functools.partial(_most_fed, h, side)
        room = capacity(policy.spec, agents[1 - side].max_new_tokens, limits.prompt_tokens, limits.turns)
        rooms = capacities_from(prompt_width(policy.spec, agents[0], limits), room)
        for program in _side_programs(policy, rooms, sizes, shards, most_fed):
            yield dataclasses.replace(program, mesh=mesh)


def _most_fed(h: Callable[[], Histories], side: int) -> int:
    return h().view(side).most_fed


def _side_programs(
    policy: Policy,
    rooms: Sequence[int],
    sizes: Sequence[Level],
    shards: int,
    most_fed: Callable[[], int],
) -> Iterator[Program]:
    spec, steps = policy.spec, min(MOST_STEPS, policy.spec.max_new_tokens)
    one = functools.cache(lambda: lowered_with_results(empty_cache.trace(spec, shards, rooms[0]))[1])  # in all's shards

    def empty(rows: int, room: int) -> tuple[Any, ...]:
        return spec, shards * rows, room

    def cache(rows: int, room: int) -> Cache:
        return with_rows(with_room(one(), room), shards * rows)

    def caches(level: Level, room: int) -> Caches:
        parked = cache(level.parked, room) if level.parked else None
        return Caches(cache(level.window, room), parked, cache(level.entering, room))

    def decoding(level: Level, room: int) -> tuple[Any, ...]:
        return policy, caches(level, room), idle_rows(spec, shards * level.window)

    def feeding(level: Level, room: int) -> tuple[Any, ...]:
        rows = np.zeros(shards * level.entering, np.int32)
        tokens = np.zeros((rows.size, most_fed()), np.int32)
        return policy, cache(level.entering, room), tokens, rows, rows

    def moving(level: Level, into: int, source: int, room: int) -> tuple[Any, ...]:
        rows = np.zeros((shards, level.entering), np.int32)
        return cache(into, room), cache(source, room), rows, rows, rows[:, 0]

    def growing(rows: int, room: int, larger: int) -> tuple[Any, ...]:
        return cache(rows, room).layers()[0], larger

    def taking(level: Level, room: int, rows: int) -> tuple[Any, ...]:
        parked = cache(level.parked, room).layers()[0] if level.parked else None
        return cache(level.window, room).layers()[0], parked, np.zeros((shards, rows), np.int32)

    # Of any level, as conversations may be over before a side begins; and of one row, for `one`.
    for rows in dict.fromkeys((1, *(x for level in sizes for x in (level.window, level.parked) if x))):
        yield program_of(empty_cache, functools.partial(empty, rows, rooms[0]))
    for number, level in enumerate(sizes):
        window, parked, entering = level.window, level.parked, level.entering
        for i, room in enumerate(rooms):
            yield program_of(decode_block, functools.partial(decoding, level, room), steps=steps)
            yield program_of(feed_rows, functools.partial(feeding, level, room))
            yield program_of(empty_cache, functools.partial(empty, entering, room))
            between = [(entering, window), (window, entering)]
            for into, source in [*between, (entering, parked), (parked, window)] if parked else between:
                yield program_of(move_rows, functools.partial(moving, level, into, source, room))
            for rows, larger in itertools.product(filter(None, (window, parked)), rooms[i + 1 : i + 2]):
                yield program_of(extend_cache, functools.partial(growing, rows, room, larger))
            for smaller in sizes[number + 1 :]:
                for rows in filter(None, (smaller.window, smaller.parked)):
                    yield program_of(take_rows, functools.partial(taking, level, room, rows))
