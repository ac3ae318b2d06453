"""The state of B conversations: status, transcript, and the views of both agents.

Letters: B rows, M messages of a conversation, L tokens of a message.
"""

import dataclasses
import enum
import hashlib
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from simrl.conversations.chat import USER
from simrl.models.rows import scatter_per_row
from simrl.rollouts.context import Context
from simrl.rollouts.generate import SampledMessage


class EndReason(enum.IntEnum):
    """Reason for the end of a conversation."""

    RUNNING = 0
    SIGNAL = 1  # an agent ended it
    TURNS = 2  # the transcript is full
    BUDGET = 3  # the next message might not fit into a context, which `dialogue.capacity` rules out beforehand
    FAILURE = 4  # a prompt is empty, or an agent off the device failed


@flax.struct.dataclass
class Status:
    """The progress of B conversations.

    Attributes:
        num_messages: int32 `[B]`, messages so far. A message with a stop sequence is recorded in the transcript and
            appended to the sender's context, but not to the receiver's.
        end_reason: int8 `[B]`, an `EndReason`.
    """

    num_messages: jax.Array
    end_reason: jax.Array


@flax.struct.dataclass
class Transcript(Status):
    """All messages of B conversations, independent of any view.

    Attributes:
        messages: int32 `[B, M, L]`, content without headers and ends of turn, 0 after it. Even messages are the
            user's, odd ones the assistant's; a row whose `num_messages` is odd waits for the assistant.
        message_length: int32 `[B, M]`.
        truncated: bool `[B, M]`, whether a message was cut by its budget.
        num_given: int32 `[B]`, the number of messages before the first sampled one: 1 with an opening that the example
            has, or that the user wrote for all of its conversations.
        decoded_steps: int32 `[B]`, steps of the decode loops in which the row sampled a token.
        loop_steps: int32 `[B]`, steps of the decode loops while the row was in the batch. The ratio of both sums is the
            share of decoding that was useful.
        resamples: int32 `[B]`, the user's messages that were discarded as repeats of the one before, see `repeats`; of
            an agent off the device, `Reply.resamples`.
    """

    messages: jax.Array
    message_length: jax.Array
    truncated: jax.Array
    num_given: jax.Array
    decoded_steps: jax.Array
    loop_steps: jax.Array
    resamples: jax.Array


@flax.struct.dataclass
class Dialogue(Transcript):
    """B conversations of two agents: the transcript, and the views of those on the device, None for one that is not."""

    user: Context | None
    assistant: Context | None

    def view(self, role: int) -> Context | None:
        return self.user if role == USER else self.assistant

    def with_view(self, role: int, context: Context | None) -> 'Dialogue':
        if role == USER:
            return dataclasses.replace(self, user=context)
        return dataclasses.replace(self, assistant=context)


_Transcript = TypeVar('_Transcript', bound=Transcript)


def init_dialogue(
    user: Context | None,
    assistant: Context | None,
    opening: jax.Array,
    opening_length: jax.Array,
    given: jax.Array,
    *,
    turns: int,
    max_new_tokens: tuple[int, int],
    truncated: jax.Array | None = None,
    end_reason: jax.Array | None = None,
) -> Dialogue:
    """Conversations before their first sampled message.

    Args:
        user, assistant: contexts of the prompts. A given opening is in the assistant's, under the user header and with
            its end-of-turn; it is in the user's too where that is the natural view.
        opening, opening_length, given, turns, max_new_tokens, truncated, end_reason: as in `init_transcript`.

    Rows with an empty context end as FAILURE at once.
    """
    empty = jnp.zeros(given.shape, bool)
    for context in (user, assistant):
        if context is not None:
            empty |= context.length == 0
    transcript = init_transcript(
        *(opening, opening_length, given, empty),
        turns=turns,
        max_new_tokens=max_new_tokens,
        truncated=truncated,
        end_reason=end_reason,
    )
    return Dialogue(user=user, assistant=assistant, **vars(transcript))


def init_transcript(
    opening: jax.Array,
    opening_length: jax.Array,
    given: jax.Array,
    empty: jax.Array,
    *,
    turns: int,
    max_new_tokens: tuple[int, int],
    truncated: jax.Array | None = None,
    end_reason: jax.Array | None = None,
) -> Transcript:
    """The messages before the first sampled one.

    Args:
        opening: int32 `[B, L]`, the content of the given openings.
        opening_length: int32 `[B]`.
        given: bool `[B]`; elsewhere the user writes the opening.
        empty: bool `[B]`, rows without a prompt, which end as FAILURE.
        turns: max turns, each a user message and an assistant message; M is twice that.
        max_new_tokens: max tokens per message of the user and of the assistant.
        truncated: bool `[B]`, whether the opening was cut by its budget; None: none was.
        end_reason: int8 `[B]`, of conversations that are over before they start; None: none is.
    """
    batch, width = opening.shape
    longest = max(width, *max_new_tokens)
    length = jnp.where(given, opening_length, 0).astype(jnp.int32)
    first = jnp.where(jnp.arange(width) < length[:, None], opening, 0).astype(jnp.int32)
    num_given = given.astype(jnp.int32)
    zeros = jnp.zeros((batch,), jnp.int32)
    cut = jnp.zeros((batch, 2 * turns), bool)
    reason = jnp.zeros((batch,), jnp.int8) if end_reason is None else end_reason  # 0: RUNNING
    return Transcript(
        messages=jnp.zeros((batch, 2 * turns, longest), jnp.int32).at[:, 0, :width].set(first),
        message_length=jnp.zeros((batch, 2 * turns), jnp.int32).at[:, 0].set(length),
        truncated=cut if truncated is None else cut.at[:, 0].set(truncated),
        num_messages=num_given,
        num_given=num_given,
        end_reason=jnp.where(empty & (reason == EndReason.RUNNING), EndReason.FAILURE, reason).astype(jnp.int8),
        decoded_steps=zeros,
        loop_steps=zeros,
        resamples=zeros,
    )


def append_message(
    transcript: _Transcript, message: SampledMessage, waiting: jax.Array, active: jax.Array
) -> _Transcript:
    """The transcript with one more message, and the end reasons of conversations that it ends.

    Args:
        transcript: its `messages` are at least as wide as the message's content may be.
        message: the next one of the active rows.
        waiting: bool `[B]`, the rows that wait for this message.
        active: bool `[B]`, those of them with room for it.
    """
    number = transcript.num_messages
    max_messages = transcript.messages.shape[1]
    max_new_tokens, longest = message.tokens.shape[1] - 1, transcript.messages.shape[2]
    if longest < max_new_tokens:
        raise ValueError(f'Transcript.messages: expected room for max_new_tokens={max_new_tokens}, found {longest}')
    slot = jnp.where(active, number, max_messages)  # dropped where not active
    content = jnp.where(
        jnp.arange(max_new_tokens) < message.content_length[:, None], message.tokens[:, :max_new_tokens], 0
    )
    content = jnp.pad(content, ((0, 0), (0, longest - max_new_tokens)))
    num_messages = number + active
    end_reason = jnp.select(
        [waiting & ~active, message.stopped, active & (num_messages == max_messages)],
        [jnp.int8(EndReason.BUDGET), jnp.int8(EndReason.SIGNAL), jnp.int8(EndReason.TURNS)],
        transcript.end_reason,
    )
    return dataclasses.replace(
        transcript,
        messages=scatter_per_row(transcript.messages, slot, content),
        message_length=scatter_per_row(transcript.message_length, slot, message.content_length),
        truncated=scatter_per_row(transcript.truncated, slot, message.truncated),
        num_messages=num_messages,
        end_reason=end_reason,
        decoded_steps=transcript.decoded_steps + message.decoded_steps,
        loop_steps=transcript.loop_steps + message.loop_steps,
    )


def waiting_for(status: Status, role: int) -> jax.Array:
    """True where a conversation continues with a message of `role` (USER or ASSISTANT), bool `[B]`."""
    return (status.end_reason == EndReason.RUNNING) & (status.num_messages % 2 == (0 if role == USER else 1))


def example_hash(example_id: str) -> int:
    """A number of 32 bits for an example's id, the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:4], 'big')


def row_keys(seed: int, step: jax.Array | int, example: jax.Array, sample: jax.Array) -> jax.Array:
    """The keys `[B]` of conversations: equal for equal arguments, whatever the row, the batch or the simulator.

    Args:
        seed: of the training run. Arms of one experiment share it, so that they draw the same numbers.
        step: of the training run.
        example: uint32 `[B]`, `example_hash` of each row's example.
        sample: int `[B]`, which of the example's conversations in this step.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(example, jnp.uint32))
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(sample))
