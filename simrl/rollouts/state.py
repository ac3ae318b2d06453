"""What is known of B conversations.

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
from simrl.rollouts.generate import Message


class EndReason(enum.IntEnum):
    """Why a conversation ended."""

    RUNNING = 0
    SIGNAL = 1  # a model sampled an end signal
    TURNS = 2  # the last message there is room for was said
    BUDGET = 3  # the next message might not fit into a context, which `capacity` rules out beforehand
    FAILURE = 4  # there was nothing to start from, or a partner off the device failed


@flax.struct.dataclass
class Standing:
    """How far B conversations have come.

    Attributes:
        num_messages: int32 `[B]`, messages said so far. One that holds an end signal is said, but not heard: it is in
            `Record.messages` and in the speaker's view, and not in the partner's.
        end_reason: int8 `[B]`, an `EndReason`.
    """

    num_messages: jax.Array
    end_reason: jax.Array


@flax.struct.dataclass
class Record(Standing):
    """What was said in B conversations, whoever saw it.

    Attributes:
        messages: int32 `[B, M, L]`, content without headers and ends of turn, 0 after it. Even messages are the
            user's, odd ones the assistant's; a row whose `num_messages` is odd waits for the assistant.
        message_length: int32 `[B, M]`.
        truncated: bool `[B, M]`, whether the message was cut by its budget.
        num_given: int32 `[B]`, how many of these nobody sampled.
        decoded_steps, loop_steps: int32 `[B]`, steps of the decode loops that the row took part in, and of all loops
            that it was held in; their sums' ratio is the share of decoding that was useful.
    """

    messages: jax.Array
    message_length: jax.Array
    truncated: jax.Array
    num_given: jax.Array
    decoded_steps: jax.Array
    loop_steps: jax.Array


@flax.struct.dataclass
class Dialogue(Record):
    """B conversations of two models: what was said, and both models' views."""

    user: Context
    assistant: Context


_Record = TypeVar('_Record', bound=Record)


def begin_record(
    opening: jax.Array,
    opening_length: jax.Array,
    given: jax.Array,
    empty: jax.Array,
    *,
    turns: int,
    max_new_tokens: tuple[int, int],
) -> Record:
    """What was said before the first sampled message.

    Args:
        opening: int32 `[B, L]`, the content of the given openings.
        opening_length: int32 `[B]`.
        given: bool `[B]`; the user opens the conversation where not.
        empty: bool `[B]`, rows without a prompt; they end as FAILURE.
        turns: most turns, each a user message and an assistant message; M is twice that.
        max_new_tokens: of the user's and the assistant's messages, tokens.
    """
    batch, width = opening.shape
    longest = max(width, *max_new_tokens)
    length = jnp.where(given, opening_length, 0).astype(jnp.int32)
    first = jnp.where(jnp.arange(width) < length[:, None], opening, 0).astype(jnp.int32)
    num_given = given.astype(jnp.int32)
    zeros = jnp.zeros((batch,), jnp.int32)
    return Record(
        messages=jnp.zeros((batch, 2 * turns, longest), jnp.int32).at[:, 0, :width].set(first),
        message_length=jnp.zeros((batch, 2 * turns), jnp.int32).at[:, 0].set(length),
        truncated=jnp.zeros((batch, 2 * turns), bool),
        num_messages=num_given,
        num_given=num_given,
        end_reason=jnp.where(empty, EndReason.FAILURE, EndReason.RUNNING).astype(jnp.int8),
        decoded_steps=zeros,
        loop_steps=zeros,
    )


def record(said: _Record, message: Message, waiting: jax.Array, active: jax.Array) -> _Record:
    """What was said, with one message more, and how it leaves the conversations.

    Args:
        said: of `messages` as wide as the message's content may be, or wider.
        message: in the active rows, the next one.
        waiting: bool `[B]`, the rows whose turn it is to speak.
        active: bool `[B]`, those of them that have room for it.
    """
    number = said.num_messages
    most_messages = said.messages.shape[1]
    max_new_tokens, longest = message.tokens.shape[1] - 1, said.messages.shape[2]
    if longest < max_new_tokens:
        raise ValueError(
            f'Dialogue.messages: expected room for GenerationSpec.max_new_tokens={max_new_tokens}, found {longest}'
        )
    slot = jnp.where(active, number, most_messages)  # dropped where not active
    content = jnp.where(
        jnp.arange(max_new_tokens) < message.content_length[:, None], message.tokens[:, :max_new_tokens], 0
    )
    content = jnp.pad(content, ((0, 0), (0, longest - max_new_tokens)))
    num_messages = number + active
    end_reason = jnp.select(
        [waiting & ~active, message.signalled, active & (num_messages == most_messages)],
        [jnp.int8(EndReason.BUDGET), jnp.int8(EndReason.SIGNAL), jnp.int8(EndReason.TURNS)],
        said.end_reason,
    )
    return dataclasses.replace(
        said,
        messages=scatter_per_row(said.messages, slot, content),
        message_length=scatter_per_row(said.message_length, slot, message.content_length),
        truncated=scatter_per_row(said.truncated, slot, message.truncated),
        num_messages=num_messages,
        end_reason=end_reason,
        decoded_steps=said.decoded_steps + message.decoded_steps,
        loop_steps=said.loop_steps + message.loop_steps,
    )


def waiting_for(said: Standing, role: int) -> jax.Array:
    """The rows that go on with a message of `role` (USER or ASSISTANT), bool `[B]`."""
    return (said.end_reason == EndReason.RUNNING) & (said.num_messages % 2 == (0 if role == USER else 1))


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
