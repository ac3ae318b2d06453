"""A user's message that repeats its last one word for word is discarded and sampled again.

1. After each message of the user, texts are compared on the host, without outer white space.
2. `resample_message` rewinds the rows that repeat, in both views, to the message's header, and samples once more with
   another key and a higher temperature; other rows stay as they are.

It is done at most `Resampling.tries` times for a message; a repeat that is left then stays. A row's tokens depend on
its own messages only: attempt a of message m is drawn with the row's key, m and -a folded in.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.models import placement
from simrl.models.rows import gather_per_row
from simrl.rollouts.agents import ModelAgent, OneAgent, Policy, Resampling
from simrl.rollouts.compaction import shard_tree, without_caches
from simrl.rollouts.context import rewind
from simrl.rollouts.generate import generate
from simrl.rollouts.messages import receive
from simrl.rollouts.state import Dialogue, EndReason, Status, append_message, waiting_for


@dataclasses.dataclass(frozen=True)
class Repeats:
    """The rule and the tools by which repeats of a user on the device are found and sampled again.

    Attributes:
        rule: the user's.
        temperature: of its first attempts.
        decode: content ids -> text.
    """

    rule: Resampling
    temperature: float
    decode: Callable[[Sequence[int]], str]


def repeats_of(user: OneAgent, chat: Chat) -> Repeats | None:
    """The rule of a user on the device, if it has one."""
    if not isinstance(user, ModelAgent) or user.resampling is None:
        return None
    return Repeats(user.resampling, float(user.policy.temperature), chat.decode)


def resample_repeats(
    user: Policy,
    assistant: Policy | None,
    dialogue: Dialogue,
    row_keys: jax.Array,
    waited: jax.Array,
    repeats: Repeats,
) -> Dialogue:
    """The dialogue after a message of the user, its repeats sampled again.

    Args:
        assistant: None for one off the device.
        dialogue: donated.
        row_keys: typed keys `[B]`.
        waited: bool `[B]`, the rows that waited for the message.
    """
    for attempt in range(1, repeats.rule.tries + 1):
        repeated = _repeated(dialogue, waited, repeats.decode)
        if not repeated.any():
            break
        temperature = jnp.float32(repeats.rule.temperature(repeats.temperature, attempt))
        dialogue = resample_message(
            user, assistant, dialogue, row_keys, repeated, np.uint32(2**32 - attempt), temperature
        )
    return dialogue


@jax.jit
def waiting_user(status: Status) -> jax.Array:
    """True where a row waits for the user, bool `[B]`, on the device."""
    waiting: jax.Array = waiting_for(status, USER)
    return waiting


def _repeated(dialogue: Dialogue, waited: jax.Array, decode: Callable[[Sequence[int]], str]) -> np.ndarray:
    """True where the message that a row waited for repeats the user's message before it; bool `[B]`."""
    tokens, length, candidate = placement.to_host(last_two(without_caches(dialogue), waited))
    texts = [
        [decode(tokens[row, i, : length[row, i]].tolist()).strip() for i in (0, 1)] if candidate[row] else ['', 'a']
        for row in range(len(candidate))
    ]
    return np.array([last == before for last, before in texts])


@jax.jit
def last_two(dialogue: Dialogue, waited: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The user's last two messages, int32 `[B, 2, L]`, their lengths `[B, 2]`, and whether they may be compared.

    The message that ends a conversation is not: it holds a stop sequence, and the one before does not.
    """
    number = dialogue.num_messages - 1
    index = jnp.maximum(jnp.stack([number, number - 2], axis=1), 0)
    candidate = waited & (dialogue.end_reason == EndReason.RUNNING) & (number >= 2)
    return (
        gather_per_row(dialogue.messages, index),
        gather_per_row(dialogue.message_length, index),
        candidate,
    )


@functools.partial(jax.jit, donate_argnames='dialogue')
def resample_message(
    user: Policy,
    assistant: Policy | None,
    dialogue: Dialogue,
    row_keys: jax.Array,
    repeated: jax.Array | np.ndarray,
    attempt: jax.Array | np.ndarray,
    temperature: jax.Array,
) -> Dialogue:
    """The dialogue with another last message of the user in the rows that are `repeated`, bool `[B]`.

    Args:
        dialogue: donated. Those rows wait for the assistant, and had a message of the user before.
        attempt: uint32, folded into the message's keys; no token's index.
        temperature: of this attempt.
    """
    repeated = jnp.asarray(repeated)
    number = dialogue.num_messages - 1
    length = gather_per_row(dialogue.message_length, jnp.maximum(number, 0))
    context, other = dialogue.view(USER), dialogue.view(ASSISTANT)
    assert context is not None
    context = rewind(context, jnp.where(repeated, length + 1, 0))  # content and end-of-turn
    keys = jax.vmap(jax.random.fold_in)(row_keys, number)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, attempt)
    policy = dataclasses.replace(user, temperature=temperature)
    context, message = generate(policy, context, keys, repeated, number)
    if assistant is not None and other is not None:
        heard = len(assistant.spec.partner_header) + length + 1
        other = rewind(other, jnp.where(repeated, heard, 0))
        other = receive(assistant, other, message, number, repeated & ~message.stopped)
    dialogue = dialogue.with_view(USER, context).with_view(ASSISTANT, other)
    rest = dataclasses.replace(
        dialogue, num_messages=dialogue.num_messages - repeated, resamples=dialogue.resamples + repeated
    )
    return shard_tree(append_message(rest, message, repeated, repeated))
