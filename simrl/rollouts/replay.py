"""Recorded conversations, replayed up to a turn so that new ones continue from there.

Ids are those of the record, never encoded again, and views and caches those that the conversations had: what follows is
what would have followed, if it is drawn with the same keys.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models.rows import gather_per_row
from simrl.rollouts.agents import Policy
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.dialogue import Side, fetch_status, grow_caches
from simrl.rollouts.generate import SampledMessage
from simrl.rollouts.messages import receive, resend
from simrl.rollouts.prompts import WrittenOpening
from simrl.rollouts.state import Dialogue, EndReason, Transcript, append_message, waiting_for


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """Recorded conversations, the first turns of which are replayed in the place of new ones.

    Attributes:
        record: conversations of the same examples and samples, on the host. Their messages fit these agents; those of
            another user may be among them.
        turns: turns that are replayed. Conversations with fewer, and those that a failure ended, are over from the
            start: they end as TURNS.
        more: max turns after them; with them a conversation has no more than `limits.turns` in all. What has not ended
            then ends as TURNS, as any conversation does whose turns are over.
        sample: added to the number of each conversation's sample, with which all that follows is drawn. 0 draws what
            the record drew.
        heard: messages of the user that are replayed after these turns: with 1 the assistant replies to what the record
            has next, and a conversation that has nothing the assistant heard there is over from the start.
    """

    record: Transcript
    turns: int
    more: int
    sample: int
    heard: Literal[0, 1] = 0

    @property
    def messages(self) -> int:
        """Messages that are replayed."""
        return 2 * self.turns + self.heard

    @property
    def present(self) -> np.ndarray:
        """True where the record has so many messages, bool `[B]`."""
        number, reason = np.asarray(self.record.num_messages), np.asarray(self.record.end_reason)
        unheard = (reason == EndReason.SIGNAL) & (number == self.messages) & (self.heard == 1)
        return (number >= self.messages) & (reason != EndReason.FAILURE) & ~unheard


def recorded_openings(record: Transcript, idle: Sequence[bool]) -> list[WrittenOpening]:
    """The openings that `write_openings` wrote, from the conversations that start with them.

    Args:
        record: on the host, equally many neighbouring conversations of each example.
        idle: the examples of which none is wanted; they get a failed one.
    """
    samples = len(record.num_messages) // len(idle)
    openings = []
    for row, unwanted in zip(range(0, len(record.num_messages), samples), idle, strict=True):
        if unwanted or record.num_messages[row] == 0:
            openings.append(WrittenOpening((), end_reason=EndReason.FAILURE))
            continue
        ends = record.num_messages[row] == 1 and record.end_reason[row] == EndReason.SIGNAL
        ids = record.messages[row, 0, : record.message_length[row, 0]].tolist()
        reason = EndReason.SIGNAL if ends else EndReason.RUNNING
        openings.append(WrittenOpening(tuple(ids), bool(record.truncated[row, 0]), reason))
    return openings


@functools.partial(jax.jit, static_argnames=('role', 'max_new_tokens'), donate_argnames='dialogue')
def add_recorded(
    user: Policy | None,
    assistant: Policy | None,
    dialogue: Dialogue,
    record: Transcript,
    *,
    role: int,
    max_new_tokens: int,
) -> Dialogue:
    """The next message of a record by `role` in the rows that wait for it and whose record has one.

    Args:
        user, assistant: None for an agent off the device.
        dialogue: donated.
        record: whole conversations, which begin as those of `dialogue`.
        max_new_tokens: max tokens per message of `role`.
    """
    sender, receiver, partner = (user, assistant, ASSISTANT) if role == USER else (assistant, user, USER)
    context, other = dialogue.view(role), dialogue.view(partner)
    number = dialogue.num_messages
    active = waiting_for(dialogue, role) & (number < record.num_messages)
    stopped = active & (record.end_reason == EndReason.SIGNAL) & (number == record.num_messages - 1)
    at = jnp.minimum(number, record.messages.shape[1] - 1)
    length, zeros = gather_per_row(record.message_length, at), jnp.zeros(number.shape, jnp.int32)
    message = SampledMessage(
        tokens=jnp.pad(gather_per_row(record.messages, at), ((0, 0), (0, 1)))[:, : max_new_tokens + 1],
        length=length + ~stopped,
        content_length=length,
        stopped=stopped,
        truncated=gather_per_row(record.truncated, at),
        decoded_steps=zeros,
        loop_steps=zeros,
    )
    if sender is not None and context is not None:
        context = resend(sender, context, message, number, active)
    if receiver is not None and other is not None:
        other = receive(receiver, other, message, number, active & ~stopped)
    dialogue = dialogue.with_view(role, context).with_view(partner, other)
    return shard_tree(append_message(dialogue, message, active, active))


def replay_messages(user: Side, assistant: Side, dialogue: Dialogue, record: Transcript, *, messages: int) -> Dialogue:
    """The dialogue with the first `messages` messages of each conversation of a record, or all that it has.

    `conversing` then continues as it would have without the record, if it draws with the same keys. Log-probabilities
    of replayed messages and their steps of decoding are 0. All rows stay in the batch, so it feeds what a prefill
    would.

    Args:
        dialogue: before its first sampled message. It is donated.
        record: of the same prompts and agents, sharded as `dialogue`. How a failure or a budget ended a conversation is
            not replayed: such rows stay RUNNING.
    """
    policies = tuple(side if isinstance(side, Policy) else None for side in (user, assistant))
    for number in range(messages):
        role, sender = ((USER, user), (ASSISTANT, assistant))[number % 2]
        status, lengths = fetch_status(dialogue)
        waiting = waiting_for(status, role)
        if not waiting.any():
            continue
        longest = [None if length is None else int(length[waiting].max()) for length in lengths]
        dialogue = grow_caches(user, assistant, dialogue, longest, role)
        dialogue = add_recorded(*policies, dialogue, record, role=role, max_new_tokens=sender.max_new_tokens)
    return dialogue


@jax.jit
def end_running(end_reason: jax.Array) -> jax.Array:
    """End reasons of conversations that nothing follows: what is RUNNING ends as TURNS."""
    return jnp.where(end_reason == EndReason.RUNNING, jnp.int8(EndReason.TURNS), end_reason)
