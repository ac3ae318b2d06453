"""The sizes that conversations meet, from settings alone.

A program is compiled for each set of sizes of its arguments. Prompts, messages and contexts have the sizes of the
config. Two vary while conversations are held: the rows in the decode batch (`compaction.batch_sizes`) and the room of
the caches (`context.cache_capacities`).
"""

import dataclasses

from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER
from simrl.rollouts.agents import GenerationSpec, HostAgent, Limits, ModelAgent, OneAgent, mesh_of
from simrl.rollouts.collect import asked_about_many
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.context import cache_capacities, capacity_for, round_up
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.flight import parts_of
from simrl.rollouts.messages import header_lengths, room_to_receive, room_to_send
from simrl.rollouts.schedule import Batching

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
    specs, budgets = specs_of(user, assistant), (user.max_new_tokens, assistant.max_new_tokens)
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


def batching_of(user: OneAgent, assistant: OneAgent, size: int, mesh: Mesh, batching: Batching) -> tuple[Batching, int]:
    """The batching of `size` conversations of two agents by `collect`, and the equal parts of them on the devices."""
    meshes = mesh_of(user, mesh), mesh_of(assistant, mesh)
    if meshes[0] != meshes[1]:
        batching = 'continuous'
    if any(isinstance(agent, HostAgent) and asked_about_many(agent) for agent in (user, assistant)):
        batching = 'static'
    return batching, parts_of(size, meshes)


def specs_of(user: OneAgent, assistant: OneAgent) -> tuple[GenerationSpec | None, GenerationSpec | None]:
    one, other = (agent.policy.spec if isinstance(agent, ModelAgent) else None for agent in (user, assistant))
    return one, other
