"""The conversation loop: two agents and their prompts in, whole conversations out, whichever agents are on the device.

1. `add_message` samples one message into the sender's view and appends it to the receiver's; `add_reply` appends the
   reply of an agent off the device.
2. `conversing` alternates: the user's message, then the assistant's, until `turns` are over or no row is running.
   While a reply of an agent off the device is awaited, the caller may continue other conversations.

`add_message` is a compiled program, and `conversing` a Python loop over it, so that between two messages the shapes may
change: finished rows leave the batch (`compaction`), and caches have little more room than they need (`grow_cache`).
No single program could do that. It costs one wait for the device per message, for a few numbers of each row: little
beside the many decode steps of a message.

Both models read the tokens that were sampled: content is never decoded and encoded again, so both share a tokenizer.
Finished rows write nothing more. A row's conversation depends on its own contexts and its own key, not on other rows,
their number, the capacity, or the devices.

Letters: B rows, S capacity of a context, M messages of a conversation, L tokens of a message.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.rollouts.agents import Agent, GenerationSpec, Limits, MixedAgent, ModelAgent, Policy
from simrl.rollouts.compaction import all_active, compact, restore, shard_tree
from simrl.rollouts.context import capacity_for, grow_cache, round_up
from simrl.rollouts.generate import SampledMessage
from simrl.rollouts.host import ROLE_NAMES, HostMessage, HostReplies
from simrl.rollouts.messages import (
    can_receive,
    can_send,
    header_lengths,
    receive,
    room_to_receive,
    room_to_send,
    send,
)
from simrl.rollouts.repeats import Repeats, resample_repeats, waiting_user
from simrl.rollouts.state import Dialogue, EndReason, Status, append_message, waiting_for

Side = Policy | HostReplies  # an agent in a batch of conversations
_Tree = TypeVar('_Tree')


@functools.partial(jax.jit, static_argnames='role', donate_argnames='dialogue')
def add_message(
    user: Policy | None, assistant: Policy | None, dialogue: Dialogue, row_keys: jax.Array, *, role: int
) -> Dialogue:
    """One message by `role` (USER or ASSISTANT) in the rows that wait for it; other rows stay as they are.

    Args:
        user, assistant: None for an agent off the device; the sender is on it.
        dialogue: donated.
        row_keys: typed keys `[B]`.
    """
    sender, receiver = (user, assistant) if role == USER else (assistant, user)
    context, other = dialogue.view(role), dialogue.view(_other(role))
    assert sender is not None
    assert context is not None
    number = dialogue.num_messages
    waiting = waiting_for(dialogue, role)
    active = waiting & can_send(sender.spec, context)
    if receiver is not None and other is not None:
        active &= can_receive(receiver.spec, other, sender.max_new_tokens)
    context, message = send(sender, context, row_keys, number, active)
    if receiver is not None and other is not None:
        other = receive(receiver, other, message, number, active & ~message.stopped)
    dialogue = dialogue.with_view(role, context).with_view(_other(role), other)
    return shard_tree(append_message(dialogue, message, waiting, active))


@functools.partial(jax.jit, static_argnames='role', donate_argnames='dialogue')
def add_reply(receiver: Policy, dialogue: Dialogue, reply: HostMessage, *, role: int) -> Dialogue:
    """One message by `role`, an agent off the device, in the rows in which it replied or failed.

    Args:
        receiver: the other agent's.
        dialogue: donated.
    """
    context = dialogue.view(_other(role))
    assert context is not None
    replied = jnp.asarray(reply.replied)
    active = replied & can_receive(receiver.spec, context, reply.tokens.shape[1] - 1)
    ends, content_length = jnp.asarray(reply.ends), jnp.asarray(reply.content_length)
    zeros = jnp.zeros(replied.shape, jnp.int32)
    message = SampledMessage(
        tokens=jnp.asarray(reply.tokens),
        length=content_length + ~ends,
        content_length=content_length,
        stopped=ends & active,
        truncated=jnp.asarray(reply.truncated),
        decoded_steps=zeros,
        loop_steps=zeros,
    )
    context = receive(receiver, context, message, dialogue.num_messages, active & ~ends)
    dialogue = append_message(dialogue.with_view(_other(role), context), message, replied, active)
    reason = jnp.where(reply.failed, jnp.int8(EndReason.FAILURE), dialogue.end_reason)
    resamples = dialogue.resamples + jnp.asarray(reply.resamples)
    return shard_tree(dataclasses.replace(dialogue, end_reason=reason, resamples=resamples))


def conversing(
    user: Side,
    assistant: Side,
    dialogue: Dialogue,
    row_keys: jax.Array,
    *,
    turns: int,
    repeats: Repeats | None = None,
) -> Generator[None, None, Dialogue]:
    """Whole conversations, or what is left of them: `dialogue` may also be between the two messages of a turn.

    In each turn the rows that wait for the user get its message, then those that wait for the assistant. So given and
    written openings mix, and a message that no row waits for costs nothing. `add_message` is compiled once for each
    role, batch size (`compaction.batch_sizes`) and cache size (`context.cache_capacities`) that occurs. The batch only
    shrinks and the caches only grow, so one call meets at most the sum of both numbers for each role.

    Args:
        user, assistant: at least one of them on the device. The models may differ in everything but the tokenizer.
        dialogue: where to start. It is donated: its arrays are not to be read again.
        row_keys: typed keys `[B]`; token i of message m of a row is drawn with its key, m and i folded in.
        turns: how many turns to run. Conversations end as TURNS when `dialogue.messages` is full; rows that have not
            ended after `turns` turns stay RUNNING.
        repeats: of a user on the device; None leaves its repeats as they are.

    Yields:
        Nothing, each time that an agent off the device was asked; what follows waits for its replies.

    Returns:
        The dialogue without caches: it cannot be continued.
    """
    policies = tuple(side if isinstance(side, Policy) else None for side in (user, assistant))
    batch = all_active(dialogue, row_keys, dialogue.num_messages.shape[0])
    for number in range(2 * turns):
        role = (USER, ASSISTANT)[number % 2]
        # The one wait for the device per message: it decides the shapes of the next program.
        status, lengths = fetch_status(batch.active)
        running = np.asarray(status.end_reason) == EndReason.RUNNING
        if not running.any():
            break
        if not waiting_for(status, role).any():
            continue
        batch = compact(batch, running)
        longest = [None if length is None else int(length[running].max()) for length in lengths]
        dialogue = grow_caches(user, assistant, batch.active, longest, role)
        sender, receiver = (user, assistant) if role == USER else (assistant, user)
        if isinstance(sender, Policy):
            watched = repeats if role == USER else None
            waited = None if watched is None else waiting_user(Status(dialogue.num_messages, dialogue.end_reason))
            dialogue = add_message(*policies, dialogue, batch.inputs, role=role)
            if watched is not None and waited is not None:
                dialogue = resample_repeats(sender, policies[1], dialogue, batch.inputs, waited, watched)
        else:
            assert isinstance(receiver, Policy)
            wait = sender.start(dialogue, batch.rows, role)
            yield
            dialogue = add_reply(receiver, dialogue, wait(), role=role)
        batch = dataclasses.replace(batch, active=dialogue)
    return restore(batch)


def grow_caches(user: Side, assistant: Side, dialogue: Dialogue, longest: Sequence[int | None], role: int) -> Dialogue:
    """The dialogue, its caches large enough for a message by `role` in rows of up to these lengths of each view."""
    sides = {USER: user, ASSISTANT: assistant}
    views, needed = {}, 0
    for view, length in zip(sides, longest, strict=True):
        context, side = dialogue.view(view), sides[view]
        if context is None or length is None:
            continue
        assert isinstance(side, Policy)
        views[view] = context
        room = room_to_send(side.spec) if view == role else room_to_receive(side.spec, sides[role].max_new_tokens)
        needed = max(needed, length + room)
    # Both views have about the same length: with one size for both there are fewer programs.
    size = capacity_for(needed, max(context.capacity for context in views.values()))
    for view, context in views.items():
        dialogue = dialogue.with_view(view, grow_cache(context, size))
    return dialogue


def _other(role: int) -> int:
    return ASSISTANT if role == USER else USER


def fetch_status(dialogue: Dialogue) -> tuple[Status, tuple[np.ndarray | None, np.ndarray | None]]:
    """On the host: the status, and the lengths of the user's and the assistant's view."""
    status = Status(dialogue.num_messages, dialogue.end_reason)
    lengths = [None if view is None else view.length for view in (dialogue.user, dialogue.assistant)]
    return jax.device_get(replicated((status, tuple(lengths))))


@jax.jit
def replicated(rows: _Tree) -> _Tree:
    """Arrays whole on every device, and so in every process."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), rows)


def capacity(
    spec: GenerationSpec, partner_max_new_tokens: int, prompt_length: int, turns: int, name: str = 'spec'
) -> int:
    """A context's room, in tokens, so that every conversation fits, checked against the model's longest row.

    It is what they take, rounded up, which may be a little more than there are positions; the surplus is never written.
    A turn takes at most both headers, both messages, and both forced ends of turn, which `max_new_tokens` leaves out.

    Args:
        spec: of the context's model.
        partner_max_new_tokens: the partner's max tokens per message.
        prompt_length: tokens of the longest prompt in this view.
        turns: of the conversation.
        name: of the agent, for errors.
    """
    own_header, partner_header = header_lengths(spec)
    per_turn = room_to_send(spec) + room_to_receive(spec, partner_max_new_tokens)
    needed = prompt_length + turns * per_turn
    if needed > spec.config.max_row_tokens:
        raise ValueError(
            f'{name}: expected conversations of at most {spec.config.row_limit} tokens, found that '
            f'one may take {needed}: prompt_length={prompt_length} + turns={turns} x {per_turn}, a turn being own '
            f'header {own_header} + own message {spec.max_new_tokens} + 1 + partner header {partner_header} + its '
            f'message {partner_max_new_tokens} + 1'
        )
    return round_up(needed)


def check_agents(user: Agent, assistant: Agent, chat: Chat, limits: Limits) -> None:
    """Refuses agents that cannot converse: their roles, their vocabularies, or models with too few positions."""
    if isinstance(user, MixedAgent):
        for member in user.members:
            check_agents(member, assistant, chat, limits)
        return
    models = {}
    for agent, partner, role in ((user, assistant, USER), (assistant, user, ASSISTANT)):
        if isinstance(agent, ModelAgent):
            name, spec = ROLE_NAMES[role == ASSISTANT], agent.policy.spec
            if agent.role != role:
                raise ValueError(f'{name}: expected an agent of role {role}, found one of role {agent.role}')
            capacity(spec, partner.max_new_tokens, limits.prompt_tokens, limits.turns, name)
            mask = np.asarray(agent.policy.token_mask)
            if mask.shape != (spec.config.padded_vocab_size,):
                raise ValueError(
                    f'token_mask: expected one entry for each of the {spec.config.padded_vocab_size} ids of the '
                    f"{name}'s padded vocabulary, found shape {mask.shape}"
                )
            for run in spec.stop_sequences:
                if not mask[list(run)].all():
                    raise ValueError(f'token_mask: expected the {name} to be able to sample its stop sequence {run}')
            models[name] = agent
    if not models:
        raise ValueError('user, assistant: expected at least one agent on the device, found two HostAgents')
    smallest = min(agent.policy.spec.config.vocab_size for agent in models.values())
    if chat.tokenizer.size > smallest:
        raise ValueError(
            f'expected a tokenizer of at most the {smallest} ids of the model, found {chat.tokenizer.size}'
        )
    for name, agent in models.items():
        beyond = np.flatnonzero(np.asarray(agent.policy.token_mask)[smallest:])
        if beyond.size:
            raise ValueError(
                f'token_mask: the {name} may sample id {smallest + beyond[0]}, which the smaller vocabulary of '
                f'{smallest} does not have; both models must share a tokenizer'
            )
