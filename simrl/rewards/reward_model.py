"""A trained reward model as the judge of whole conversations.

The model is a decoder with a scalar head. The score of a reply is the head's value at the reply's end-of-turn, where
the model has seen the conversation so far and the whole reply. Attention is causal, so one forward pass over a
conversation scores every reply in it:

1. `assemble` writes the messages into rows as an assistant sees them: never with the simulator's prompt, and without a
   message that ended the conversation, which no assistant saw.
2. `reply_scores` reads the head at each reply's end-of-turn.
3. `conversation_rewards` averages a conversation's replies, in units of the initial assistant's own replies;
   `turn_rewards` keeps them apart.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from simrl.conversations.chat import Chat
from simrl.models import transformer
from simrl.models.rows import join_microbatches, num_shards, scatter_per_row, split_microbatches
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import CAUSES, NO_REPLY, Rewards
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories


@dataclasses.dataclass(frozen=True)
class Frame:
    """The constant token runs around messages in the reward model's view; static, from `frame_of`."""

    prefix: tuple[int, ...]
    first_header: tuple[int, ...]
    user_header: tuple[int, ...]
    assistant_header: tuple[int, ...]
    user_end: int
    assistant_end: int

    def header(self, message: int) -> tuple[int, ...]:
        if message == 0:
            return self.first_header
        return self.assistant_header if message % 2 else self.user_header

    def end(self, message: int) -> int:
        return self.assistant_end if message % 2 else self.user_end

    def row_length(self, num_messages: int, opening_tokens: int, later_tokens: int) -> int:
        """Tokens of a conversation whose opening and later messages have so many tokens each."""
        headers = sum(len(self.header(m)) + 1 for m in range(num_messages))
        return len(self.prefix) + headers + opening_tokens + (num_messages - 1) * later_tokens


def frame_of(chat: Chat) -> Frame:
    """The frame of the chat's own template, with its default system text."""
    return Frame(
        prefix=chat.system_prefix(),
        first_header=chat.first_header('user'),
        user_header=chat.header('user'),
        assistant_header=chat.header('assistant'),
        user_end=chat.end_of_turn['user'],
        assistant_end=chat.end_of_turn['assistant'],
    )


@flax.struct.dataclass
class RewardScale:
    """Mean and standard deviation of the initial assistant's reply scores: the zero and the unit of the reward.

    They are of single replies to openings, so that they depend on no simulator; means of several replies vary
    less.
    """

    mean: jax.Array
    std: jax.Array


def assemble(
    messages: jax.Array, message_length: jax.Array, num_visible: jax.Array, frame: Frame, later_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Conversations as rows of tokens in an assistant's view.

    Args:
        messages: int32 `[B, M, L]` content ids; even messages are the user's, odd ones the assistant's.
        message_length: int32 `[B, M]`.
        num_visible: int32 `[B]`, how many messages the assistant's side of the conversation holds.
        later_tokens: most tokens of a message after the opening, which may be longer: it bounds T.

    Returns:
        tokens: int32 `[B, T]`, left-aligned, 0 past the end, with T the longest row possible.
        end_position: int32 `[B, M]`, the index of each message's end-of-turn; T for messages that are not there.
    """
    batch, num_messages, longest = messages.shape
    time = frame.row_length(num_messages, longest, later_tokens)
    tokens = jnp.zeros((batch, time), jnp.int32).at[:, : len(frame.prefix)].set(jnp.asarray(frame.prefix, jnp.int32))
    start = jnp.full((batch,), len(frame.prefix), jnp.int32)
    ends = []
    for m in range(num_messages):
        header, length = frame.header(m), message_length[:, m]
        width = longest if m == 0 else later_tokens
        there = m < num_visible
        offset = jnp.arange(len(header) + width + 1)
        content = jnp.pad(messages[:, m, :width], ((0, 0), (len(header), 1)))
        chunk = content.at[:, : len(header)].set(jnp.asarray(header, jnp.int32))
        end = len(header) + length
        chunk = jnp.where(offset == end[:, None], frame.end(m), chunk)
        write = there[:, None] & (offset <= end[:, None])
        tokens = scatter_per_row(tokens, jnp.where(write, start[:, None] + offset, time), chunk)
        ends.append(jnp.where(there, start + end, time))
        start = jnp.where(there, start + end + 1, start)
    return tokens, jnp.stack(ends, axis=1)


def score_rows(
    params: Params, config: TransformerConfig, execution: Execution, tokens: jax.Array, position: jax.Array
) -> jax.Array:
    """The reward head's value at given positions of rows.

    Args:
        params: `{'decoder', 'reward_head'}`.
        tokens: int32 `[B, T]`, left-aligned.
        position: int32 `[B, N]`; positions at or past T give an unspecified finite value.

    Returns:
        float32 `[B, N]`.
    """
    hidden, _ = transformer.apply(params, config, execution, tokens)
    position = jnp.minimum(position, tokens.shape[1] - 1)
    picked = jnp.take_along_axis(hidden, position[..., None], axis=1)
    return transformer.apply_head(params['reward_head'], picked)


def reply_scores(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    messages: jax.Array,
    message_length: jax.Array,
    num_visible: jax.Array,
    *,
    frame: Frame,
    later_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """The score of every assistant message given the conversation before it; arguments as of `assemble`.

    Returns:
        score: float32 `[B, M // 2]`; and valid: bool, True where there is such a message.
    """
    tokens, end_position = assemble(messages, message_length, num_visible, frame, later_tokens)
    score = score_rows(params, config, execution, tokens, end_position[:, 1::2])
    valid = jnp.arange(1, messages.shape[1], 2) < num_visible[:, None]
    return jnp.where(valid, score, 0.0), valid


@jax.jit
def conversation_rewards(score: jax.Array, valid: jax.Array, scale: RewardScale) -> Rewards:
    """The mean over a conversation's replies of their standardised scores, float32 `[B]`.

    Args:
        score, valid: `[B, replies]` of `score_conversations`.
    """
    count = jnp.sum(valid, axis=1)
    judged = count > 0
    mean = jnp.sum(jnp.where(valid, score, 0.0), axis=1) / jnp.maximum(count, 1)
    value = jnp.where(judged, (mean - scale.mean) / scale.std, 0.0)
    cause = jnp.where(judged, 0, CAUSES.index(NO_REPLY))
    return Rewards(value=value, valid=judged, parts={'score': mean}, cause=cause.astype(jnp.int32))


@jax.jit
def turn_rewards(score: jax.Array, valid: jax.Array, scale: RewardScale) -> Rewards:
    """The standardised score of each reply, float32 `[B, replies]`; arguments as of `conversation_rewards`."""
    value = jnp.where(valid, (score - scale.mean) / scale.std, 0.0)
    cause = jnp.where(jnp.any(valid, axis=1), 0, CAUSES.index(NO_REPLY))
    return Rewards(value=value, valid=valid, parts={'score': score}, cause=cause.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=('config', 'execution', 'frame', 'later_tokens', 'num_microbatches'))
def score_conversations(
    params: Params,
    batch: Trajectories,
    *,
    config: TransformerConfig,
    execution: Execution,
    frame: Frame,
    later_tokens: int,
    num_microbatches: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """`reply_scores` of rollouts, whichever view they are in.

    Args:
        later_tokens: max tokens of a message after the opening.
        num_microbatches: how many parts the rows are scored in, one after the other, which bounds the memory; fewer
            where they do not divide the rows, as those of a forecast.
    """
    # The assistant never reads the message that ends the conversation.
    visible = batch.num_messages - (batch.end_reason == EndReason.SIGNAL)

    def part(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return reply_scores(params, config, execution, *rows, frame=frame, later_tokens=later_tokens)

    rows = len(visible)
    parts = math.gcd(rows // num_shards(rows), num_microbatches)
    dealt = split_microbatches((batch.messages, batch.message_length, visible), parts)
    score, valid = join_microbatches(jax.lax.map(part, dealt))
    return score, valid
