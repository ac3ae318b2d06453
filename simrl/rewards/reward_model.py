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
from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from simrl.conversations.chat import Chat
from simrl.models import placement, transformer
from simrl.models.rows import bucket_widths, num_shards, scatter_per_row, shard_rows, split_by_length
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import CAUSES, NO_REPLY, Rewards
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories
from simrl.run.compiles import Program, abstract, lowered_with_results


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
    messages: jax.Array, message_length: jax.Array, num_visible: jax.Array, frame: Frame, width: int
) -> tuple[jax.Array, jax.Array]:
    """Conversations as rows of tokens in an assistant's view.

    Args:
        messages: int32 `[B, M, L]` content ids; even messages are the user's, odd ones the assistant's.
        message_length: int32 `[B, M]`.
        num_visible: int32 `[B]`, how many messages the assistant's side of the conversation holds.
        width: T, at least the tokens of each row.

    Returns:
        tokens: int32 `[B, T]`, left-aligned, 0 past the end.
        end_position: int32 `[B, M]`, the index of each message's end-of-turn; T for messages that are not there.
    """
    batch, num_messages, longest = messages.shape
    tokens = jnp.zeros((batch, width), jnp.int32).at[:, : len(frame.prefix)].set(jnp.asarray(frame.prefix, jnp.int32))
    start = jnp.full((batch,), len(frame.prefix), jnp.int32)
    ends = []
    for m in range(num_messages):
        header, length = frame.header(m), message_length[:, m]
        there = m < num_visible
        offset = jnp.arange(len(header) + longest + 1)
        content = jnp.pad(messages[:, m], ((0, 0), (len(header), 1)))
        chunk = content.at[:, : len(header)].set(jnp.asarray(header, jnp.int32))
        end = len(header) + length
        chunk = jnp.where(offset == end[:, None], frame.end(m), chunk)
        write = there[:, None] & (offset <= end[:, None])
        tokens = scatter_per_row(tokens, jnp.where(write, start[:, None] + offset, width), chunk)
        ends.append(jnp.where(there, start + end, width))
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
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """The score of every assistant message given the conversation before it; arguments as of `assemble`.

    Returns:
        score: float32 `[B, M // 2]`; and valid: bool, True where there is such a message.
    """
    tokens, end_position = assemble(messages, message_length, num_visible, frame, width)
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


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings of scoring by a reward model. Rows of similar lengths are scored together.

    Attributes:
        config, execution: of the model.
        later_tokens: max tokens of a message after the opening.
        row_buckets: rising widths, in tokens; rows are padded to the shortest that fits, or else to the longest row
            possible.
        num_microbatches: how many parts the rows are scored in, one after the other, which bounds the memory; fewer
            where they do not divide the rows, as those of a forecast.
    """

    config: TransformerConfig
    execution: Execution
    frame: Frame
    later_tokens: int
    row_buckets: tuple[int, ...] = ()
    num_microbatches: int = 1

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The number of parts, and the widths that rows may have; of messages `[B, M, L]`."""
        num_rows, num_messages, longest = shape
        parts = math.gcd(num_rows // num_shards(num_rows), self.num_microbatches)
        return parts, bucket_widths(self.row_buckets, self.frame.row_length(num_messages, longest, self.later_tokens))


def score_conversations(params: Params, batch: Trajectories, scoring: Scoring) -> tuple[jax.Array, jax.Array]:
    """`reply_scores` of rollouts, whichever view they are in: a loop over compiled programs, one for each width.

    Time and memory are those of what was said, not of what could be.
    """
    visible, length, scored = start_scores(batch, frame=scoring.frame)
    parts, widths = scoring.sizes(batch.messages.shape)
    for part in split_by_length(np.arange(len(visible)), placement.to_host(length), widths, parts):
        scored = score_part(
            *(params, scored, batch.messages, batch.message_length, visible, part.rows),
            config=scoring.config,
            execution=scoring.execution,
            frame=scoring.frame,
            width=part.width,
        )
    return scored


def score_programs(
    params: Params, scoring: Scoring, batch: Callable[[], Trajectories], shape: tuple[int, int, int]
) -> Iterator[Program]:
    """The programs of `score_conversations`; see `ModelScore`."""
    params, (parts, widths) = abstract(params), scoring.sizes(shape)
    rows = np.zeros(shape[0] // parts, np.int32)
    start = functools.cache(lambda: lowered_with_results(start_scores.trace(batch(), frame=scoring.frame)))

    def lower(width: int) -> Lowered:
        visible, _, scored = start()[1]
        return score_part.lower(
            *(params, scored, batch().messages, batch().message_length, visible, rows),
            config=scoring.config,
            execution=scoring.execution,
            frame=scoring.frame,
            width=width,
        )

    yield Program('start_scores', lambda: start()[0])
    for width in widths:
        yield Program('score_part', functools.partial(lower, width))


@functools.partial(jax.jit, static_argnames='frame')
def start_scores(batch: Trajectories, *, frame: Frame) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Counts the messages that the assistant reads and their tokens, int32 `[B]` each; and makes scores of zeros."""
    # The assistant never reads the message that ends the conversation.
    visible = batch.num_messages - (batch.end_reason == EndReason.SIGNAL)
    number = np.arange(batch.messages.shape[1])
    around = np.array([len(frame.header(m)) + 1 for m in number.tolist()])
    tokens = jnp.where(number < visible[:, None], batch.message_length + around, 0)
    # In the shards of all rows, as `score_part` leaves them: it would be compiled a second time.
    score, valid = (shard_rows(jnp.zeros((len(visible), len(number) // 2), x)) for x in (jnp.float32, bool))
    return shard_rows(visible), len(frame.prefix) + jnp.sum(tokens, axis=1), (score, valid)


@functools.partial(jax.jit, static_argnames=('config', 'execution', 'frame', 'width'), donate_argnums=1)
def score_part(
    params: Params,
    scored: tuple[jax.Array, jax.Array],
    messages: jax.Array,
    message_length: jax.Array,
    visible: jax.Array,
    rows: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    frame: Frame,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Writes `reply_scores` of some rows to the scores of all."""
    own = (shard_rows(x[rows]) for x in (messages, message_length, visible))
    new = reply_scores(params, config, execution, *own, frame=frame, width=width)
    score, valid = (shard_rows(x.at[rows].set(part)) for x, part in zip(scored, new, strict=True))
    return score, valid
