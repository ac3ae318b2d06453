"""Examples and two agents in, trajectories out.

1. A user that writes one opening for each example does so (`write_openings`).
2. `prompts_of` renders examples for both agents, on the host.
3. `collect` lets two agents converse from examples.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.models.rows import shard_rows
from simrl.rollouts.agents import (
    PIECES_AT_ONCE,
    Agent,
    HostAgent,
    HostConversation,
    Limits,
    MixedAgent,
    ModelAgent,
    OneAgent,
    Policy,
    mesh_of,
)
from simrl.rollouts.continuous import conversations
from simrl.rollouts.dialogue import conversing
from simrl.rollouts.host import HostReplies, OnWait
from simrl.rollouts.interleave import Threads, interleave
from simrl.rollouts.openings import write_openings
from simrl.rollouts.prompts import Prompts, prompts_of, start_dialogue
from simrl.rollouts.repeats import repeats_of
from simrl.rollouts.replay import Replay, end_running, recorded_openings, replay_messages
from simrl.rollouts.schedule import Batching
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories, jit_trajectories

OnPiece = Callable[[Trajectories, Sequence[Example]], None]
_Agent = TypeVar('_Agent', bound=Agent)
_cast = functools.lru_cache(placement.for_sampling)


class ConversationError(RuntimeError):
    """Conversations failed, or were not scored: too many for a step of training, a validation or an evaluation."""


def for_sampling(agent: _Agent, mesh: Mesh) -> _Agent:
    """The agent with its parameters in the sampler's dtype and shards, and its mask on the devices.

    One whose parameters are the sampler's already is returned as it is.

    Args:
        mesh: of agents that have none of their own.
    """
    if isinstance(agent, MixedAgent):
        return dataclasses.replace(agent, members=tuple(for_sampling(member, mesh) for member in agent.members))
    if not isinstance(agent, ModelAgent):
        return agent
    spec = agent.policy.spec
    if isinstance(agent.policy.params['decoder']['layers'], tuple):
        return agent
    params = _cast(spec.config, spec.execution.dtype, mesh_of(agent, mesh))(agent.policy.params)
    token_mask = jnp.asarray(agent.policy.token_mask)
    return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, params=params, token_mask=token_mask))


def collect(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    seed: int,
    step: int,
    view: int,
    mesh: Mesh,
    samples: int = 1,
    padding: int = 0,
    rows_in_flight: int | None = None,
    batching: Batching = 'static',
    on_piece: OnPiece | None = None,
    on_wait: OnWait | None = None,
    replay: Replay | None = None,
) -> tuple[Trajectories, Mapping[int, str]]:
    """Conversations from each example.

    Args:
        user, assistant: from `for_sampling`. With a `MixedAgent` each member's conversations are held in turn, the rows
            of the others left out of the batch.
        seed, step: with the example and the sample they decide every draw.
        view: USER or ASSISTANT, the agent in whose view they are returned; it is on the device, and on `mesh`.
        mesh: of the conversations. The partner may have its own (`ModelAgent.mesh`), of the same devices or of none of
            them: only tokens pass between the two, through the host.
        samples: conversations of each example, which are neighbouring rows.
        padding: examples after these that only fill up the batch: their conversations are over before they start.
        rows_in_flight: conversations in the device's batch at once; the others wait. It bounds the caches, and changes
            no token. None: all of them. With an agent off the device there are caches of `PIECES_AT_ONCE` such pieces:
            one is sampled while another waits for replies, unless `HostAgent.calls_at_once` is 0.
        batching: 'continuous' changes the steps of decoding, and no token: see `continuous`. An agent off the device
            that is called in threads, or by all processes, is asked about many conversations at once: with it,
            batching is static. With a mesh for each side it is continuous.
        on_piece: called with the conversations of each `rows_in_flight` rows, and each row's example, once these and
            all before them are over; those of a `MixedAgent` after the last.
        on_wait: called with the seconds of each wait for replies of an agent off the device.
        replay: conversations that are continued; None: new ones.

    Returns:
        The conversations, and by row the reason why an agent off the device failed.

    Raises:
        ValueError: `rows_in_flight` does not divide the conversations, the agent of `view` is off the device or `mesh`,
            the partner's mesh has some of its devices and others, or there is no such batching.
    """
    if batching not in get_args(Batching):
        raise ValueError(f"batching: expected 'static' or 'continuous', found {batching!r}")
    if not isinstance(user if view == USER else assistant, ModelAgent):
        raise ValueError(
            f'view: expected an agent on the device, found a {type(user if view == USER else assistant).__name__}'
        )
    assert not isinstance(assistant, MixedAgent)
    for member in user.members if isinstance(user, MixedAgent) else (user,):
        check_meshes(member, assistant, view, mesh)
    idle = [False] * len(examples) + [True] * padding
    examples = [*examples, *[examples[-1]] * padding]
    size = rows_at_once(len(examples) * samples, rows_in_flight)
    collect_one = functools.partial(
        _collect,
        chat=chat,
        limits=limits,
        seed=seed,
        step=step,
        view=view,
        mesh=mesh,
        batching=batching,
        on_wait=on_wait,
        replay=replay,
    )
    with jax.set_mesh(mesh):
        if not isinstance(user, MixedAgent):
            return collect_one(user, assistant, examples, idle, samples, rows_in_flight, on_piece=on_piece)
        whole: Trajectories | None = None
        failures: dict[int, str] = {}
        chosen = [user.choose(example) for example in examples]
        for number in sorted(set(chosen)):
            own = examples[chosen.index(number)]  # stands in for the examples of others
            played = [example if of == number else own for example, of in zip(examples, chosen, strict=True)]
            left_out = [of != number or over for of, over in zip(chosen, idle, strict=True)]
            batch, failed = collect_one(
                user.members[number], assistant, played, left_out, samples, rows_in_flight, on_piece=None
            )
            mine = placement.shard_batch(~np.repeat(left_out, samples), mesh)
            whole = batch if whole is None else selected(mine, batch, whole)
            failures |= failed
        assert whole is not None
        for start in range(0, len(examples) * samples, size) if on_piece is not None else ():
            assert on_piece is not None
            of_rows = [examples[row // samples] for row in range(start, start + size)]
            on_piece(rows_of(whole, start, size), of_rows)
        return whole, failures


def _collect(
    user: OneAgent,
    assistant: OneAgent,
    examples: Sequence[Example],
    idle: Sequence[bool],
    samples: int,
    rows_in_flight: int | None,
    *,
    chat: Chat,
    limits: Limits,
    seed: int,
    step: int,
    view: int,
    mesh: Mesh,
    batching: Batching,
    on_piece: OnPiece | None,
    on_wait: OnWait | None,
    replay: Replay | None,
) -> tuple[Trajectories, dict[int, str]]:
    """`collect` of one user; conversations of `idle` examples are over before they start."""
    example_of_row = [example for example in examples for _ in range(samples)]
    size = rows_at_once(len(example_of_row), rows_in_flight)
    batches: list[Trajectories] = []
    failures: dict[int, str] = {}
    written = None
    if user.opening == 'written' and replay is not None:
        written = recorded_openings(replay.record, idle)
    elif user.opening == 'written':
        own = mesh_of(user, mesh)
        with jax.set_mesh(own):
            written, failed = write_openings(
                user, examples, idle, chat=chat, limits=limits, seed=seed, step=step, mesh=own, on_wait=on_wait
            )
        failures |= {i * samples + sample: reason for i, reason in failed.items() for sample in range(samples)}
    prompts = prompts_of(
        *(examples, user, assistant, chat), samples=samples, prompt_tokens=limits.prompt_tokens, written=written
    )
    over, sample = np.repeat(idle, samples), prompts.sample
    if replay is not None:
        over, sample = over | ~replay.present, sample + np.int32(replay.sample)
    reason = np.where(over, np.int8(EndReason.TURNS), prompts.end_reason)
    prompts = dataclasses.replace(prompts, end_reason=reason, sample=sample)
    pieces = [slice(i, i + size) for i in range(0, len(example_of_row), size)]
    partner = assistant if view == USER else user
    if mesh_of(partner, mesh) != mesh:
        batching = 'continuous'
    if batching == 'continuous' and not (isinstance(partner, HostAgent) and asked_about_many(partner)):
        told = conversations(
            *(user, assistant, prompts, example_of_row, chat, seed, step),
            limits=limits,
            view=view,
            mesh=mesh,
            size=size,
            failures=failures,
            on_wait=on_wait,
            replay=replay,
        )
        for piece, batch in zip(pieces, told, strict=True):
            batches.append(batch)
            if on_piece is not None:
                on_piece(batch, example_of_row[piece])
        return batches[0] if len(batches) == 1 else joined(batches), failures
    calls = partner.calls_at_once if isinstance(partner, HostAgent) and len(pieces) > 1 else 0
    threads = Threads(calls) if calls else None

    def hold(piece: slice) -> Generator[None, None, tuple[Trajectories, Mapping[int, str]]]:
        rows = jax.tree.map(operator.itemgetter(piece), prompts)
        starts = [
            HostConversation(*start, ()) for start in zip(example_of_row[piece], rows.sample.tolist(), strict=True)
        ]
        placed, own = placement.shard_batch(rows, mesh), replay
        if replay is not None:
            record = jax.tree.map(operator.itemgetter(piece), replay.record)
            own = dataclasses.replace(replay, record=placement.shard_batch(record, mesh))
        return (
            yield from _conversing(
                *(user, assistant, placed, starts, chat, seed, step),
                limits=limits,
                view=view,
                threads=threads,
                on_wait=on_wait,
                replay=own,
            )
        )

    try:
        held = interleave(map(hold, pieces), PIECES_AT_ONCE if calls else 1)
        for piece, (batch, failed_rows) in zip(pieces, held, strict=True):
            failures |= {piece.start + row: reason for row, reason in failed_rows.items()}
            batches.append(batch)
            if on_piece is not None:
                on_piece(batch, example_of_row[piece])
    finally:
        if threads is not None:
            threads.close()
    return batches[0] if len(batches) == 1 else joined(batches), failures


def check_meshes(user: OneAgent, assistant: OneAgent, view: int, mesh: Mesh) -> None:
    """Refuses two agents that cannot converse on `mesh`, one of them in whose view conversations are returned there."""
    own, partner = (user, assistant) if view == USER else (assistant, user)
    if mesh_of(own, mesh) != mesh:
        raise ValueError(f'view: expected an agent on the mesh {dict(mesh.shape)} of the conversations, found another')
    theirs, devices = set(mesh_of(partner, mesh).devices.flat), set(mesh.devices.flat)
    if theirs != devices and theirs & devices:
        raise ValueError(
            f'ModelAgent.mesh: expected the {len(devices)} devices of the conversations, or none of them, found '
            f'{len(theirs)}, {len(theirs & devices)} of which are among them'
        )


def asked_about_many(agent: HostAgent) -> bool:
    """True for an agent off the device that replies to many conversations in about the time that one takes."""
    return agent.calls_at_once > 0 or agent.asked == 'all'


@functools.partial(jax.jit, static_argnums=(1, 2))
def rows_of(batch: Trajectories, start: int, size: int) -> Trajectories:
    """`size` rows of a batch."""
    return jax.tree.map(lambda x: shard_rows(x[start : start + size]), batch)


@jax.jit
def selected(mine: jax.Array, new: Trajectories, old: Trajectories) -> Trajectories:
    """The rows of `new` where `mine`, bool `[B]`, and of `old` elsewhere."""

    def select(x: jax.Array, y: jax.Array) -> jax.Array:
        return shard_rows(jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, y))

    return jax.tree.map(select, new, old)


def rows_at_once(rows: int, rows_in_flight: int | None) -> int:
    """The number of conversations in the device's batch at once, of `rows` in all.

    Raises:
        ValueError: `rows_in_flight` does not divide them.
    """
    if rows_in_flight is not None and (rows_in_flight < 1 or rows % rows_in_flight):
        raise ValueError(
            f'rows_in_flight: expected None or a divisor of the {rows} rows of a step, found {rows_in_flight}'
        )
    return rows if rows_in_flight is None else rows_in_flight


@jax.jit
def joined(batches: Sequence[Trajectories]) -> Trajectories:
    """One batch of the rows of all of them, in their order."""
    return jax.tree.map(lambda *pieces: shard_rows(jnp.concatenate(pieces)), *batches)


def _conversing(
    user: OneAgent,
    assistant: OneAgent,
    prompts: Prompts,
    starts: Sequence[HostConversation],
    chat: Chat,
    seed: int,
    step: int,
    *,
    limits: Limits,
    view: int,
    threads: Threads | None,
    on_wait: OnWait | None,
    replay: Replay | None,
) -> Generator[None, None, tuple[Trajectories, Mapping[int, str]]]:
    """The conversations of the prompts' rows, and failures by row.

    Args:
        starts: each row as a host agent reads it.
        replay: its record on the devices, of the same rows.
    """
    policies = tuple(agent.policy if isinstance(agent, ModelAgent) else None for agent in (user, assistant))
    max_new_tokens = (user.max_new_tokens, assistant.max_new_tokens)
    dialogue, keys = start_dialogue(*policies, prompts, seed, step, limits=limits, max_new_tokens=max_new_tokens)
    failures: dict[int, str] = {}

    def side(agent: OneAgent) -> Policy | HostReplies:
        if isinstance(agent, ModelAgent):
            return agent.policy
        return HostReplies(agent, list(starts), keys, chat, failures, threads, on_wait)

    repeats = repeats_of(user, chat)
    sides, turns = (side(user), side(assistant)), limits.turns
    if replay is not None:
        dialogue = replay_messages(*sides, dialogue, replay.record, messages=replay.messages)
        turns = replay.more
    dialogue = yield from conversing(*sides, dialogue, keys, turns=turns, repeats=repeats)
    if replay is not None:
        dialogue = dataclasses.replace(dialogue, end_reason=end_running(dialogue.end_reason))
    return jit_trajectories(dialogue, view, prompts.example, prompts.group), failures
