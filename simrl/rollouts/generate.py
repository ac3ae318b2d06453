"""A context and a policy in, the context with one sampled message more out: one `while_loop` that stops when every row
is done.

Letters as in `transformer.py`: B rows, S capacity of a row in tokens, V padded vocabulary.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import TEMPLATE
from simrl.models import transformer
from simrl.models.cache import Cache, cache_prefix, with_cache_prefix
from simrl.rollouts.agents import Policy
from simrl.rollouts.context import Context, append, last_token
from simrl.rollouts.token_sampling import sample_token

NO_TOKEN = -1  # equals no token id


@flax.struct.dataclass
class SampledMessage:
    """The tokens that `generate` appended, left-aligned.

    Attributes:
        tokens: int32 `[B, max_new_tokens + 1]`: content, then an end-of-turn unless a stop sequence ended it; 0 after.
        length: int32 `[B]`, tokens appended; 0 for rows that were not active.
        content_length: int32 `[B]`, the same without the end-of-turn.
        stopped: bool `[B]`, whether a stop sequence ended it, and with it the conversation.
        truncated: bool `[B]`, whether its end-of-turn was forced, after `max_new_tokens`.
        decoded_steps: int32 `[B]`, steps of the decode loop in which the row sampled a token.
        loop_steps: int32 `[B]`, steps of the decode loop; equal for all rows.
    """

    tokens: jax.Array
    length: jax.Array
    content_length: jax.Array
    stopped: jax.Array
    truncated: jax.Array
    decoded_steps: jax.Array
    loop_steps: jax.Array


@flax.struct.dataclass
class Decoding:
    """Messages while they are sampled, the carry of the decode loop: `step` columns of `tokens` are written."""

    start: jax.Array  # int32 [B], tokens of the context
    step: jax.Array
    cache: Cache
    pending: jax.Array  # int32 [B]
    tokens: jax.Array  # int32 [B, max_new_tokens + 1]
    log_prob: jax.Array  # float32 [B, max_new_tokens + 1]
    length: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    stopped: jax.Array  # bool [B]


def ends_with(tail: jax.Array, runs: tuple[tuple[int, ...], ...]) -> jax.Array:
    """True where the last tokens `[B, W]` of a row end with one of the runs, bool `[B]`."""
    width = tail.shape[1]
    table = np.full((len(runs), width), NO_TOKEN, np.int32)
    for row, run in enumerate(runs):
        table[row, width - len(run) :] = run
    return jnp.any(jnp.all((tail[:, None] == table) | (table == NO_TOKEN), axis=-1), axis=-1)


def sample_next(
    policy: Policy,
    cache: Cache,
    pending: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    number: jax.Array,
    temperature: jax.Array | float,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Feeds each row's last token and samples the next: one step of a decode loop.

    Args:
        cache: of all tokens but the last.
        pending: int32 `[B]`, the last token.
        position: int32 `[B]`, its position; the capacity for a row that samples nothing.
        keys: `[B]`, of the rows' messages.
        number: int32 `[B]`, the token's number in its message.
        temperature: a number, or float32 `[B]`.

    Returns:
        cache: with the last token.
        token: int32 `[B]`.
        log_prob: float32 `[B]`, see `sample_token`.
    """
    spec = policy.spec
    hidden, written = transformer.apply(
        policy.params, spec.config, spec.execution, pending[:, None], position[:, None], cache
    )
    assert written is not None
    with jax.named_scope('logits'):
        logits = transformer.project(policy.params, hidden[:, 0])
    with jax.named_scope('sample'):
        step_keys = jax.vmap(jax.random.fold_in)(keys, number)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(step_keys)
        token, log_prob = sample_token(
            logits, policy.token_mask, uniform, temperature, top_k=spec.top_k, top_p=spec.top_p, min_p=spec.min_p
        )
    return written, token, log_prob


def prefix_lengths(capacity: int, max_new_tokens: int) -> tuple[int, ...]:
    """Lengths of the cache prefixes over which the first tokens of a message are decoded, rising.

    A long message would else attend to all of the cache's room from its first token on. Each length is one more loop in
    the compiled program and one more copy of that part of the cache, so they are few. Messages that are short beside
    the cache have none.

    Args:
        capacity: of the cache, which has room for the longest message and little more.
        max_new_tokens: max tokens of a message.
    """
    lengths: list[int] = []
    length = capacity * 3 // 4 // 16 * 16
    while len(lengths) < 3 and max_new_tokens >= 64 and length >= max(capacity - max_new_tokens, 0) + 32:
        lengths.append(length)
        length = length * 3 // 4 // 16 * 16
    return tuple(reversed(lengths))


def generate(
    policy: Policy, context: Context, keys: jax.Array, active: jax.Array, message: jax.Array
) -> tuple[Context, SampledMessage]:
    """Samples one message per active row and appends it; other rows stay as they are.

    A message ends with a sampled end-of-turn or a stop sequence. After `max_new_tokens` sampled tokens without either,
    an end-of-turn is forced, with role TEMPLATE as it was not sampled.

    Args:
        policy: the sender's; its mask must allow the end-of-turn, if messages are to end.
        context: its view, up to and including the message's header. Active rows need room for `max_new_tokens` + 1
            tokens, in the cache too.
        keys: typed keys `[B]` of this message; token i is drawn with `fold_in(key, i)`.
        active: bool `[B]`.
        message: int `[B]`, the number of the message in its conversation.
    """
    state = begin_message(policy, context, active)
    with jax.named_scope('decode'):
        for capacity in prefix_lengths(context.cache.capacity, policy.spec.max_new_tokens):
            prefix = cache_prefix(state.cache, capacity)
            first = decode(policy, dataclasses.replace(state, cache=prefix), keys)
            state = dataclasses.replace(first, cache=with_cache_prefix(state.cache, first.cache))
        state = decode(policy, state, keys)
    return end_message(policy, context, state, active, message)


def begin_message(policy: Policy, context: Context, active: jax.Array) -> Decoding:
    """The state of the decode loop before its first step; arguments as of `generate`."""
    batch, width = active.shape[0], policy.spec.max_new_tokens + 1
    return Decoding(
        start=context.length,
        step=jnp.zeros((), jnp.int32),
        cache=context.cache,
        pending=last_token(context.tokens, context.length),
        tokens=jnp.zeros((batch, width), jnp.int32),
        log_prob=jnp.zeros((batch, width), jnp.float32),
        length=jnp.zeros((batch,), jnp.int32),
        done=~active,
        stopped=jnp.zeros((batch,), bool),
    )


def decode(policy: Policy, state: Decoding, keys: jax.Array, until: jax.Array | None = None) -> Decoding:
    """Runs the decode loop until all rows are done, one has no room left in the cache, or before step `until`."""
    spec = policy.spec
    longest = max((len(run) for run in spec.stop_sequences), default=0)

    def running(state: Decoding) -> jax.Array:
        last = jnp.max(jnp.where(state.done, -1, state.start - 1 + state.step))
        has_room = (last >= 0) & (last < state.cache.capacity)
        return has_room if until is None else has_room & (state.step < until)

    def step(state: Decoding) -> Decoding:
        sampling = ~state.done
        position = jnp.where(sampling, state.start - 1 + state.step, state.cache.capacity)
        number = jnp.broadcast_to(state.step, sampling.shape)
        cache, token, log_prob = sample_next(
            policy, state.cache, state.pending, position, keys, number, policy.temperature
        )
        # The forced end-of-turn is one more step of the loop, which feeds the last sampled token as any step does.
        forced = state.step == spec.max_new_tokens
        token = jnp.where(forced, spec.end_of_turn, token)
        tokens = state.tokens.at[:, state.step].set(jnp.where(sampling, token, 0))
        stopped = state.stopped
        if spec.stop_sequences:
            index = state.step + 1 - longest + jnp.arange(longest)
            tail = jnp.where(index >= 0, tokens[:, jnp.maximum(index, 0)], NO_TOKEN - 1)
            stopped |= sampling & ~forced & ends_with(tail, spec.stop_sequences)
        return dataclasses.replace(
            state,
            step=state.step + 1,
            cache=cache,
            pending=token,
            tokens=tokens,
            log_prob=state.log_prob.at[:, state.step].set(jnp.where(sampling & ~forced, log_prob, 0.0)),
            length=state.length + sampling,
            done=state.done | stopped | (token == spec.end_of_turn),
            stopped=stopped,
        )

    return jax.lax.while_loop(running, step, state)


def end_message(
    policy: Policy, context: Context, state: Decoding, active: jax.Array, message: jax.Array
) -> tuple[Context, SampledMessage]:
    """Appends the sampled tokens of a finished decode loop; arguments as of `generate`."""
    spec, width = policy.spec, state.tokens.shape[1]
    truncated = state.length == width
    role = jnp.where(truncated[:, None] & (jnp.arange(width) == spec.max_new_tokens), TEMPLATE, spec.role)
    context = append(context, state.cache, state.tokens, role, message, state.log_prob, state.length)
    return context, SampledMessage(
        tokens=state.tokens,
        length=state.length,
        content_length=state.length - (active & ~state.stopped),
        stopped=state.stopped,
        truncated=truncated,
        decoded_steps=state.length,
        loop_steps=jnp.broadcast_to(state.step, active.shape),
    )
