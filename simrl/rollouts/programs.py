"""A bound on the programs that conversations compile, from sizes that are known before any is compiled.

A program is compiled for each set of sizes of its arguments. Prompts, messages and contexts have the sizes of the
config. Two vary while conversations are held: the rows in the decode batch (`compaction.batch_sizes`) and the room of
the caches (`context.cache_capacities`). All others are fixed, so that a bound is a product of a few small numbers.
"""

import collections
import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER
from simrl.rollouts.agents import Agent, GenerationSpec, HostAgent, Limits, MixedAgent, ModelAgent, OneAgent, mesh_of
from simrl.rollouts.collect import asked_about_many
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.context import cache_capacities, capacity_for, round_up
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.flight import parts_of
from simrl.rollouts.messages import header_lengths, room_to_receive, room_to_send
from simrl.rollouts.schedule import MOST_STEPS, Batching, levels
from simrl.run.compiles import Programs

Rooms = tuple[int | None, int | None]  # of the user's and the assistant's caches, in tokens; None: off the device
ROLES = (USER, ASSISTANT)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that conversations of two agents meet.

    Attributes:
        rows: of the decode batch, on all devices, falling.
        caches: rising; caches only grow, so that conversations meet some of these in this order.
        least: the index in `caches` of the smallest for a message by the user, and by the assistant.
    """

    rows: tuple[int, ...]
    caches: tuple[Rooms, ...]
    least: tuple[int, int]

    def of_message(self, role: int) -> tuple[Rooms, ...]:
        """Caches for which a message by a role is compiled."""
        return self.caches[self.least[ROLES.index(role)] :]

    def of_view(self, side: int) -> list[int]:
        """The room of one side's caches, rising; 0 is the user's."""
        return sorted({room for caches in self.caches if (room := caches[side]) is not None})


def sizes_of(user: OneAgent, assistant: OneAgent, limits: Limits, *, rows: int, shards: int) -> Sizes:
    """The sizes of conversations that alternate message by message.

    Args:
        rows: conversations in the device's batch.
        shards: equal parts of them on the devices.
    """
    specs, budgets = _specs(user, assistant), (user.max_new_tokens, assistant.max_new_tokens)
    rooms = [
        None if spec is None else capacity(spec, budgets[1 - side], limits.prompt_tokens, limits.turns)
        for side, spec in enumerate(specs)
    ]
    first = [
        None if room is None else min(round_up(prompt_width(spec, user, limits)), room)
        for spec, room in zip(specs, rooms, strict=True)
    ]
    most = max(room for room in rooms if room is not None)

    def grown(size: int) -> Rooms:
        one, other = (
            None if room is None or begun is None else max(begun, min(size, room))
            for room, begun in zip(rooms, first, strict=True)
        )
        return one, other

    sizes = [0, *cache_capacities(most)]  # 0: as prompts left them
    caches = sorted({grown(size) for size in sizes}, key=lambda x: [room or 0 for room in x])

    def least(sender: int) -> int:
        needed = [
            room_to_send(spec) if side == sender else room_to_receive(spec, budgets[sender])
            for side, spec in enumerate(specs)
            if spec is not None
        ]
        return caches.index(grown(capacity_for(1 + max(needed), most)))  # a prompt has a token

    batches = tuple(size * shards for size in batch_sizes(rows, shards))
    return Sizes(batches, tuple(caches), (least(0), least(1)))


def prompt_width(spec: GenerationSpec | None, user: OneAgent, limits: Limits) -> int:
    """Columns of a view's prompts, with the opening in them where the user writes one; 0 off the device."""
    if spec is None:
        return 0
    opening = max(header_lengths(spec)) + user.max_new_tokens + 1 if user.opening == 'written' else 0
    return limits.prompt_tokens + opening


def conversation_programs(
    user: Agent, assistant: OneAgent, limits: Limits, *, rows: int, size: int, mesh: Mesh, batching: Batching
) -> Programs:
    """Bounds of the programs of `collect`, by function; those of casts of parameters are among them.

    Args:
        rows: conversations of a step, of which `size` are in the device's batch.
    """
    users = user.members if isinstance(user, MixedAgent) else (user,)
    total = collections.Counter[str]()
    for member in users:
        total.update(_programs(member, assistant, limits, size=size, mesh=mesh, batching=batching))
    pieces = rows // size
    total['cast'] = sum(isinstance(agent, ModelAgent) for agent in (*users, assistant))
    total['_joined'] = int(pieces > 1)
    if len(users) > 1:
        total.update({'_selected': 1, '_rows': pieces})
    return {name: number for name, number in total.items() if number}


def batching_of(user: OneAgent, assistant: OneAgent, size: int, mesh: Mesh, batching: Batching) -> tuple[Batching, int]:
    """The batching of `size` conversations of two agents by `collect`, and the equal parts of them on the devices."""
    meshes = mesh_of(user, mesh), mesh_of(assistant, mesh)
    if meshes[0] != meshes[1]:
        batching = 'continuous'
    if any(isinstance(agent, HostAgent) and asked_about_many(agent) for agent in (user, assistant)):
        batching = 'static'
    return batching, parts_of(size, meshes)


def _programs(
    user: OneAgent, assistant: OneAgent, limits: Limits, *, size: int, mesh: Mesh, batching: Batching
) -> collections.Counter[str]:
    """Those of one user."""
    specs = _specs(user, assistant)
    total = collections.Counter(trajectories=1, agent_seeds=sum(isinstance(x, HostAgent) for x in (user, assistant)))
    batching, shards = batching_of(user, assistant, size, mesh, batching)
    if batching == 'continuous':
        total += _continuous_programs(specs, limits, (user, assistant), size=size, shards=shards)
    else:
        total += _static_programs(user, assistant, limits, size=size, shards=shards)
    if user.opening == 'written':
        total.update(start_dialogue=1, add_message=int(specs[0] is not None), _grown=int(specs[0] is not None))
        total['agent_seeds'] += int(specs[0] is None)
    return total


def _static_programs(
    user: OneAgent, assistant: OneAgent, limits: Limits, *, size: int, shards: int
) -> collections.Counter[str]:
    sizes, specs = sizes_of(user, assistant, limits, rows=size, shards=shards), _specs(user, assistant)
    batches, views = len(sizes.rows), [len(sizes.of_view(side)) for side in (0, 1)]
    total = collections.Counter(start_dialogue=1, replicated=batches)
    for role, spec in zip(ROLES, specs, strict=True):
        messages = batches * len(sizes.of_message(role))
        total['add_message' if spec is not None else 'add_reply'] += messages
        if role == USER and isinstance(user, ModelAgent) and user.resampling is not None:
            total.update(resample_message=messages, _last_two=batches, waiting_user=batches)
    total['_grown'] = batches * sum(map(_pairs, views))
    total['gather_rows'] = _pairs(batches) * (1 + sum(views))  # each cache by itself
    total['_scatter_rows'] = batches - 1
    return total


def _continuous_programs(
    specs: Sequence[GenerationSpec | None],
    limits: Limits,
    agents: tuple[OneAgent, OneAgent],
    *,
    size: int,
    shards: int,
) -> collections.Counter[str]:
    """A window has a program for each level and size of caches; see `window` for their parts."""
    number = len(levels(size, shards, sum(spec is not None for spec in specs)))
    total = collections.Counter(row_keys=1, key_data=1)
    for side, spec in enumerate(specs):
        if spec is None:
            continue
        room = capacity(spec, agents[1 - side].max_new_tokens, limits.prompt_tokens, limits.turns)
        caches = len(window_rooms(spec, room))
        total.update(decode_block=number * caches, _fed=number * caches)
        total.update(_moved=4 * number * caches, _empty=3 * number * caches)
        total.update(_grown=3 * number * _pairs(caches), _taken=2 * _pairs(number) * caches)
    return total


def window_rooms(spec: GenerationSpec, room: int) -> list[int]:
    """The room that caches of a window may have, rising, where contexts have `room` tokens."""
    least = capacity_for(1 + min(MOST_STEPS, spec.max_new_tokens), room)
    return [size for size in cache_capacities(room) if size >= least]


def replay_programs(
    user: Agent, assistant: OneAgent, limits: Limits, *, size: int, mesh: Mesh, batching: Batching
) -> Programs:
    """Bounds of the programs of `collect` with a replay, beside those without; arguments as there."""
    total = collections.Counter[str]()
    for member in user.members if isinstance(user, MixedAgent) else (user,):
        own, shards = batching_of(member, assistant, size, mesh, batching)
        if own == 'continuous':
            continue
        sizes = sizes_of(member, assistant, limits, rows=size, shards=shards)
        total.update(add_recorded=sum(len(sizes.of_message(role)) for role in ROLES), end_running=1)
    return total


def _specs(user: OneAgent, assistant: OneAgent) -> tuple[GenerationSpec | None, GenerationSpec | None]:
    one, other = (agent.policy.spec if isinstance(agent, ModelAgent) else None for agent in (user, assistant))
    return one, other


def _pairs(number: int) -> int:
    """The number of pairs of different sizes: from one a cache grows, or a batch shrinks, to the other."""
    return number * (number - 1) // 2
