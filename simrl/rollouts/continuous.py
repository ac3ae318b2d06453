"""Continuous batching of conversations: no row waits for the longest message of the others.

`dialogue.conversing` alternates messages of all rows, so that a message takes as many steps as its longest row: with
messages of a third of that in the mean, two thirds of the row-steps compute nothing that is kept. Here each row is at
its own message:

1. Rows in flight have a cache in each view (`flight`). When a conversation ends, the next one enters its row.
2. Of the two sides that whose window is fuller decodes next (`schedule`). Rows that wait for it change places with rows
   that do not, and are fed what they have heard meanwhile, a few rows at a time (`window.enter`).
3. A block of steps is decoded (`window.decode_block`), until one in eight rows has ended its message.
4. The host reads the block, writes down what was said (`histories`), and what each row waits for next.

The tokens are those of `conversing`: each is drawn with the conversation's key, its message's number and its own, from
logits that depend on the row's own tokens. Only the rounding of float32 sums differs, as between any two batches.

A conversation waits for one side at a time, so a window has two fifths of the rows in flight: a step reads and computes
.4 of what a step of all rows does. Where caches and products decide what a step costs, as on a CPU, decoding takes less
by the row-steps that are saved; rows that change places are copied, which is much only where messages are short beside
the caches. Where reading the weights decides, with few rows on an accelerator, steps count: there are about as many as
of `conversing` where messages have .28 of the longest in the mean, or .35 if most conversations enter others' rows.

Each side may have a mesh of its own: its programs run there, and what it hears comes through the host. Where the two
have no device in common both sides decode at the same time.

Programs: for each side one that decodes, one that feeds and a few that move rows, for each `Level` and size of caches.
Caches begin with room for prompts, and grow from each size to the next. Levels only fall, so one call meets fewer of
each kind than the sum of both numbers.
"""

import itertools
from collections.abc import Generator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rollouts import histories, schedule
from simrl.rollouts.agents import HostConversation, Limits, ModelAgent, OneAgent, Policy, mesh_of
from simrl.rollouts.dialogue import Side
from simrl.rollouts.flight import Flight, admit, fill_window, shrink, start_flight
from simrl.rollouts.generate import NO_TOKEN
from simrl.rollouts.histories import Histories, Messages
from simrl.rollouts.host import HostReplies, OnWait
from simrl.rollouts.prompts import Prompts
from simrl.rollouts.repeats import Repeats, repeats_of
from simrl.rollouts.replay import Replay
from simrl.rollouts.state import EndReason, row_keys
from simrl.rollouts.trajectories import Trajectories, jit_trajectories
from simrl.rollouts.window import Asked, Block, decode_block


def conversations(
    user: OneAgent,
    assistant: OneAgent,
    prompts: Prompts,
    examples: Sequence[Example],
    chat: Chat,
    seed: int,
    step: int,
    *,
    limits: Limits,
    view: int,
    mesh: Mesh,
    size: int,
    failures: dict[int, str],
    on_wait: OnWait | None,
    replay: Replay | None,
) -> Generator[Trajectories, None, None]:
    """The conversations of the prompts' rows, `size` of them in flight; yields pieces of `size` rows, in their order.

    Args:
        prompts: on the host.
        examples: of each row.
        failures: by row, to be added to.
        replay: its record on the host.
    """
    specs = [agent.policy.spec if isinstance(agent, ModelAgent) else None for agent in (user, assistant)]
    max_new_tokens = (user.max_new_tokens, assistant.max_new_tokens)
    h = histories.start_histories(specs, prompts, limits=limits, max_new_tokens=max_new_tokens)
    if replay is not None:
        histories.replay_records(h, replay.record, replay.messages)
        h.max_messages[:] = np.minimum(h.max_messages, h.num_messages // 2 * 2 + 2 * replay.more)
    keys = _row_keys(seed, step, *placement.shard_batch((prompts.example, prompts.sample), mesh))
    starts = [HostConversation(*start, ()) for start in zip(examples, prompts.sample.tolist(), strict=True)]
    sides: list[Side] = [
        agent.policy
        if isinstance(agent, ModelAgent)
        else HostReplies(agent, starts, keys, chat, failures, on_wait=on_wait)
        for agent in (user, assistant)
    ]
    data, repeats = placement.to_host(_key_data(keys)), repeats_of(user, chat)
    first = 0
    # Once more after the last block: some conversations end without one.
    meshes = mesh_of(user, mesh), mesh_of(assistant, mesh)
    for _ in itertools.chain(holding(sides, h, data, meshes=meshes, in_flight=size, repeats=repeats), [None]):
        while first < len(examples) and not h.running[first : first + size].any():
            rows = slice(first, first + size)
            over = histories.dialogue_of(h, rows, histories.ROLES.index(view))
            arrays = (over, prompts.example[rows], prompts.group[rows])
            placed, example, group = placement.shard_batch(arrays, mesh)
            yield jit_trajectories(placed, view, example, group)
            first += size


_row_keys = jax.jit(row_keys)
_key_data = jax.jit(jax.random.key_data)


def holding(
    sides: Sequence[Side],
    h: Histories,
    keys: np.ndarray,
    *,
    meshes: tuple[Mesh, Mesh],
    in_flight: int,
    repeats: Repeats | None = None,
) -> Generator[None, None, None]:
    """Conversations from where they are to their ends.

    Args:
        sides: the user and the assistant, at least one of them on the device. One that is not is called while nothing
            else is done.
        h: changed in place; no message is open.
        keys: uint32 `[N, 2]`, data of the conversations' keys.
        meshes: of both sides.
        in_flight: conversations that have caches at once; the axis `data` of the meshes divides them.
        repeats: of a user on the device; None leaves its repeats as they are.

    Yields:
        Nothing, once for each block, or two of them, while the devices decode.
    """
    temperatures = [_temperatures(side, repeats if number == 0 else None) for number, side in enumerate(sides)]
    histories.open_messages(h, np.arange(len(h.end_reason)))
    flight = start_flight(h, in_flight, meshes)
    while True:
        admit(flight, h)
        running = h.running[flight.conversation]
        if not running.any():
            return
        if not flight.waiting:
            shrink(flight, h, running)
        running = h.running[flight.conversation]
        turn = h.num_messages[flight.conversation] % 2
        off = next((number for number, side in enumerate(sides) if isinstance(side, HostReplies)), None)
        if off is not None and (asked := running & (turn == off)).any():
            _reply(sides[off], h, off, np.sort(flight.conversation[asked]))
            continue
        waits = [running & (turn == number) for number in (0, 1)]
        waiting = np.stack([flight.of_devices(rows).sum(axis=1) for rows in waits])
        chosen = [schedule.choose_side(waiting, flight.level.window, flight.side)]
        if flight.apart:
            chosen = [number for number in (0, 1) if waits[number].any()]
        begun = []
        for flight.side in chosen:
            policy = sides[flight.side]
            assert isinstance(policy, Policy)
            begun.append(_begin(flight, h, policy, waits[flight.side], keys, temperatures[flight.side]))
        yield
        for side, (rows, active, block) in zip(chosen, begun, strict=True):
            _read(h, side, rows, active, jax.device_get(block), repeats if side == 0 else None)


def _begin(
    flight: Flight, h: Histories, policy: Policy, wanted: np.ndarray, keys: np.ndarray, temperatures: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Block]:
    """Begins a block of the flight's side: the window's conversations, which of them decode, and what they will say.

    Args:
        wanted: bool `[R]`, the rows that wait for this side.
    """
    side, steps = flight.side, min(schedule.MOST_STEPS, policy.spec.max_new_tokens)
    with jax.set_mesh(flight.meshes[side]):
        fill_window(flight, h, policy, wanted, steps)
        rows, active = flight.conversation[flight.window], wanted[flight.window]
        asked = _asked(h, side, rows, active, keys, temperatures)
        caches = flight.caches[side]
        assert caches is not None
        flight.caches[side], block = decode_block(policy, caches, asked, steps=steps)
    return rows, active, block


def _temperatures(side: Side, repeats: Repeats | None) -> np.ndarray:
    """The temperature of each attempt at a message, float32."""
    if not isinstance(side, Policy):
        return np.zeros(1, np.float32)
    usual = float(side.temperature)
    tries = 0 if repeats is None else repeats.rule.tries
    again = [repeats.rule.temperature(repeats.temperature, attempt) for attempt in range(1, tries + 1) if repeats]
    return np.array([usual, *again], np.float32)


def _asked(
    h: Histories, side: int, rows: np.ndarray, active: np.ndarray, keys: np.ndarray, temperatures: np.ndarray
) -> Asked:
    """The window's rows before a block, whose conversations are `rows`."""
    view = h.view(side)
    longest = max((len(run) for run in view.spec.stop_sequences), default=1)
    length, begun = view.length[rows], h.begun[rows]
    at = length[:, None] + np.arange(1 - longest, 0)
    tail = view.tokens[rows[:, None], np.maximum(at, 0)]
    attempt = np.where(active, h.attempt[rows], 0)
    return Asked(
        active=active,
        pending=view.tokens[rows, length - 1],
        position=length - 1,
        step=np.where(active, length - begun, 0).astype(np.int32),
        tail=np.where(at >= begun[:, None], tail, NO_TOKEN).astype(np.int32),
        key=keys[rows],
        message=h.num_messages[rows],
        attempt=(-attempt).astype(np.uint32),
        temperature=temperatures[attempt],
        limit=np.int32(-(-len(rows) // schedule.ENDED)),
        least=np.int32(schedule.LEAST_STEPS),
    )


def _read(h: Histories, side: int, rows: np.ndarray, active: np.ndarray, block: Block, repeats: Repeats | None) -> None:
    """Writes down a block, whose arrays are on the host."""
    h.loop_steps[rows] += block.steps
    own = rows[active]
    histories.add_sampled(h, side, own, *(np.asarray(x)[active] for x in (block.tokens, block.log_prob, block.count)))
    done = active & np.asarray(block.done)
    messages = histories.sampled_messages(h, side, rows[done], np.asarray(block.stopped)[done])
    if repeats is not None:
        repeated = _repeated(h, messages, repeats)
        histories.discard_messages(h, side, messages.rows[repeated])
        messages = messages.where(~repeated)
    histories.force_ends(h, side, messages)
    histories.end_messages(h, side, messages)
    histories.open_messages(h, messages.rows)


def _repeated(h: Histories, messages: Messages, repeats: Repeats) -> np.ndarray:
    """True where a message of the user repeats its last one, and may be sampled again; bool `[n]`."""
    rows, number = messages.rows, h.num_messages[messages.rows]
    candidate = ~messages.stopped & (number >= 2) & (h.attempt[rows] < repeats.rule.tries)
    found = np.zeros(len(rows), bool)
    for i in np.flatnonzero(candidate):
        before = h.messages[rows[i], number[i] - 2, : h.message_length[rows[i], number[i] - 2]]
        now = messages.content[i, : messages.length[i]]
        found[i] = repeats.decode(now.tolist()).strip() == repeats.decode(before.tolist()).strip()
    return found


def _reply(replies: Side, h: Histories, side: int, rows: np.ndarray) -> None:
    """An agent off the device replies in conversations that wait for it."""
    assert isinstance(replies, HostReplies)
    said = replies.ask(h.messages[rows], h.message_length[rows], h.num_messages[rows], rows, histories.ROLES[side])()
    h.resamples[rows] += np.asarray(said.resamples)
    failed = np.asarray(said.failed)
    h.end_reason[rows[failed]] = EndReason.FAILURE
    replied = np.asarray(said.replied)
    length, ends = np.asarray(said.content_length), np.asarray(said.ends)
    content = np.asarray(said.tokens)[:, : h.messages.shape[2]]
    messages = Messages(rows, content, length, ends, np.asarray(said.truncated)).where(replied)
    histories.end_messages(h, side, messages)
    histories.open_messages(h, rows)
