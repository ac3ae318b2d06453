"""The programs of conversations, lowered from shapes before a conversation is held.

1. `start_dialogue` is compiled at once: its results say in which shards all others have their arguments.
2. One message by either agent, for each size of the batch and of the caches (`programs.Sizes`).
3. What lets caches grow, and what takes rows out of the batch and puts them back.
4. The conversations as training reads them, compiled at once as well.

With continuous batching 1 to 3 are the programs of the windows (`window`), for each level and size of caches. All are
those that `collect` calls for one batch, with the arguments that it gives.
"""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.models.cache import Cache, extended
from simrl.rollouts.agents import Limits, ModelAgent, OneAgent, Policy, mesh_of
from simrl.rollouts.compaction import _gather_rows, _scatter_rows, without_caches
from simrl.rollouts.context import Context, _grown
from simrl.rollouts.dialogue import add_message, add_reply, replicated
from simrl.rollouts.histories import Histories, HostView, dialogue_of, start_histories
from simrl.rollouts.host import no_message
from simrl.rollouts.programs import ROLES, Rooms, Sizes, batching_of, sizes_of, window_rooms
from simrl.rollouts.prompts import WrittenOpening, prompts_of, start_dialogue
from simrl.rollouts.repeats import _last_two, resample_message, waiting_user
from simrl.rollouts.schedule import MOST_STEPS, Batching, Level, levels
from simrl.rollouts.state import Dialogue, EndReason, Status
from simrl.rollouts.trajectories import Trajectories, jit_trajectories
from simrl.rollouts.window import Asked, Caches, _empty, _fed, _moved, _taken, decode_block
from simrl.rollouts.window import _grown as window_grown
from simrl.run.compiles import abstract, results

Programs = Generator[Lowered, None, Trajectories]  # returns abstract conversations
_Tree = TypeVar('_Tree')


def lowered_conversations(
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
) -> Programs:
    """The programs of `collect`; arguments as there.

    Args:
        examples: any that fit; nothing is said.
        size: conversations in the device's batch.
    """
    written = [WrittenOpening((), end_reason=EndReason.FAILURE)] * size if user.opening == 'written' else None
    chosen = list(itertools.islice(itertools.cycle(examples), size))
    rows = prompts_of(chosen, user, assistant, chat, samples=1, prompt_tokens=limits.prompt_tokens, written=written)
    prompts = abstract(placement.shard_batch(rows, mesh))
    policies = [abstract(agent.policy) if isinstance(agent, ModelAgent) else None for agent in (user, assistant)]
    lengths: dict[str, Any] = {'limits': limits, 'max_new_tokens': (user.max_new_tokens, assistant.max_new_tokens)}
    batching, shards = batching_of(user, assistant, size, mesh, batching)
    if batching == 'static':
        traced = start_dialogue.trace(*policies, prompts, 0, 0, **lengths)
        start = traced.lower()
        yield start
        dialogue, keys = results(traced, start.compile().output_shardings)
        sizes = sizes_of(user, assistant, limits, rows=size, shards=shards)
        for number in sizes.rows:
            yield from _messages((user, assistant), policies, *with_rows((dialogue, keys), number), sizes)
        yield from _between_messages(dialogue, keys, sizes, shards)
        if isinstance(user, ModelAgent) and user.resampling is not None:
            for number in sizes.rows:
                said = with_rows(without_caches(dialogue), number)
                traced = waiting_user.trace(Status(said.num_messages, said.end_reason))
                yield traced.lower()
                yield _last_two.lower(said, results(traced, said.end_reason.sharding))
    else:
        h = start_histories([policy and policy.spec for policy in policies], rows, **lengths)
        yield from _windows(policies, (mesh_of(user, mesh), mesh_of(assistant, mesh)), h, size, shards)
        dialogue = abstract(placement.shard_batch(dialogue_of(h, slice(None), ROLES.index(view)), mesh))
    over = jit_trajectories.trace(without_caches(dialogue), view, prompts.example, prompts.group)
    ended = over.lower()
    yield ended
    return results(over, ended.compile().output_shardings)


def _messages(
    agents: tuple[OneAgent, OneAgent], policies: Sequence[Policy | None], dialogue: Dialogue, keys: Any, sizes: Sizes
) -> Generator[Lowered, None, None]:
    """One message by either agent in batches of a size, for all sizes of caches."""
    number, (user, assistant) = dialogue.num_messages.shape[0], policies
    for caches in sizes.caches:
        grown = with_caches(dialogue, caches)
        for role, agent, policy, other in zip(ROLES, agents, policies, policies[::-1], strict=True):
            if caches not in sizes.of_message(role):
                continue
            if policy is None:
                message = no_message(number, agent.max_new_tokens)
                yield add_reply.lower(other, grown, message, role=role)
                continue
            yield add_message.lower(user, assistant, grown, keys, role=role)
            if role == USER and isinstance(agent, ModelAgent) and agent.resampling is not None:
                repeated, again = np.zeros(number, np.bool_), (np.uint32(0), jnp.float32(1))
                yield resample_message.lower(policy, assistant, grown, keys, repeated, *again)


def _between_messages(dialogue: Dialogue, keys: Any, sizes: Sizes, shards: int) -> Generator[Lowered, None, None]:
    """The status that the host reads, caches that grow, and batches that shrink."""
    bare = without_caches(dialogue)
    for number in sizes.rows:
        status = Status(dialogue.num_messages, dialogue.end_reason)
        lengths = [None if (view := dialogue.view(role)) is None else view.length for role in ROLES]
        yield replicated.lower(with_rows((status, tuple(lengths)), number))
        for side, role in enumerate(ROLES):
            if (context := dialogue.view(role)) is not None:
                for room, larger in itertools.combinations(sizes.of_view(side), 2):
                    yield _grown.lower(with_rows(with_room(context.cache, room), number), larger)
    for number, fewer in itertools.combinations(sizes.rows, 2):
        index = np.zeros((shards, fewer // shards), np.int64)
        yield _gather_rows.lower(jax.tree.leaves(with_rows((bare, keys), number)), index)
        for side, role in enumerate(ROLES):
            if (context := dialogue.view(role)) is not None:
                for room in sizes.of_view(side):
                    yield _gather_rows.lower(with_rows(with_room(context.cache, room), number), index)
        if number == sizes.rows[0]:
            yield _scatter_rows.lower(bare, with_rows(bare, fewer), index)


def _windows(
    policies: Sequence[Policy | None], meshes: tuple[Mesh, Mesh], h: Histories, size: int, shards: int
) -> Generator[Lowered, None, None]:
    """The programs of `continuous.holding`, for each level and size of caches, each on the mesh of its side."""
    sizes = levels(size, shards, sum(policy is not None for policy in policies))
    for side, (policy, mesh) in enumerate(zip(policies, meshes, strict=True)):
        if policy is not None:
            with jax.set_mesh(mesh):
                yield from _side(policy, h.view(side), sizes, shards)


def _side(policy: Policy, view: HostView, sizes: Sequence[Level], shards: int) -> Generator[Lowered, None, None]:
    rooms = window_rooms(policy.spec, view.capacity)
    traced = _empty.trace(policy.spec, shards, rooms[0])  # in the shards of all others
    one = results(traced, traced.lower().compile().output_shardings)
    for number, level in enumerate(sizes):
        window, entering = (with_rows(one, shards * rows) for rows in (level.window, level.entering))
        parked = with_rows(one, shards * level.parked) if level.parked else None
        for room in rooms:
            outside = None if parked is None else with_room(parked, room)
            caches = Caches(with_room(window, room), outside, with_room(entering, room))
            yield from _window(policy, caches, view, level, shards)
            for cache in (caches.window, caches.parked, caches.entering):
                if cache is not None:
                    yield _empty.lower(policy.spec, cache.key[0].shape[0], room)
                    for larger in rooms[rooms.index(room) + 1 :]:
                        yield window_grown.lower(cache, larger)
            for smaller in sizes[number + 1 :]:
                for rows in (smaller.window, smaller.parked):
                    if rows:
                        yield _taken.lower(caches, np.zeros((shards, rows), np.int32))


def _window(
    policy: Policy, caches: Caches, view: HostView, level: Level, shards: int
) -> Generator[Lowered, None, None]:
    """A block of decoding; what enters the window is moved and fed."""
    spec, rows = policy.spec, shards * level.window
    longest = max((len(run) for run in spec.stop_sequences), default=1)
    numbers = dict.fromkeys(('pending', 'position', 'step', 'message'), np.zeros(rows, np.int32))
    asked = Asked(
        active=np.zeros(rows, np.bool_),
        tail=np.zeros((rows, longest - 1), np.int32),
        key=np.zeros((rows, 2), np.uint32),
        attempt=np.zeros(rows, np.uint32),
        temperature=np.zeros(rows, np.float32),
        limit=np.int32(0),
        least=np.int32(0),
        **numbers,
    )
    yield decode_block.lower(policy, caches, asked, steps=min(MOST_STEPS, spec.max_new_tokens))
    entering = np.zeros((shards, level.entering), np.int32)
    fed = np.zeros((entering.size, view.most_fed), np.int32)
    yield _fed.lower(policy, caches.entering, fed, entering.reshape(-1), entering.reshape(-1))
    moved: list[tuple[Cache, Cache | None]] = [(caches.entering, caches.window), (caches.window, caches.entering)]
    if caches.parked is not None:
        moved += [(caches.entering, caches.parked), (caches.parked, caches.window)]
    for cache, source in moved:
        yield _moved.lower(cache, source, entering, entering, entering[:, 0])


def with_rows(tree: _Tree, number: int) -> _Tree:
    """Abstract arrays with another number of rows, in the same shards."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype, sharding=x.sharding, weak_type=x.weak_type),
        tree,
    )


def with_room(cache: Cache, room: int) -> Cache:
    """An abstract cache with room for so many tokens, in the same shards."""
    shapes = jax.eval_shape(functools.partial(extended, capacity=room), cache)
    return jax.tree.map(lambda x, old: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=old.sharding), shapes, cache)


def with_caches(dialogue: Dialogue, rooms: Rooms) -> Dialogue:
    """The abstract dialogue with caches of these sizes."""

    def grown(context: Context | None, room: int | None) -> Context | None:
        if context is None or room is None:
            return context
        return dataclasses.replace(context, cache=with_room(context.cache, room))

    for role, room in zip(ROLES, rooms, strict=True):
        dialogue = dialogue.with_view(role, grown(dialogue.view(role), room))
    return dialogue
