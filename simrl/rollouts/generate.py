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
from simrl.models.transformer import Cache, Params
from simrl.rollouts.agents import GenerationSpec
from simrl.rollouts.context import Context, append, last_token
from simrl.rollouts.token_sampling import sample_token

NO_TOKEN = -1  # equals no token id


@flax.struct.dataclass
class Message:
    """What `generate` appended, left-aligned.

    Attributes:
        tokens: int32 `[B, max_new_tokens + 1]`: content, then an end-of-turn unless a signal ended it; 0 after that.
        length: int32 `[B]`, tokens appended; 0 for rows that were not active.
        content_length: int32 `[B]`, the same without the end-of-turn.
        signalled: bool `[B]`, whether the message ends with an end signal.
        truncated: bool `[B]`, whether its end-of-turn was forced by the budget.
        decoded_steps: int32 `[B]`, steps of the decode loop that a row took part in.
        loop_steps: int32 `[B]`, steps of the decode loop; equal for all rows.
    """

    tokens: jax.Array
    length: jax.Array
    content_length: jax.Array
    signalled: jax.Array
    truncated: jax.Array
    decoded_steps: jax.Array
    loop_steps: jax.Array


@flax.struct.dataclass
class _Decoding:
    """The carry of the decode loop: `step` columns of `tokens` and `log_prob` are written."""

    step: jax.Array
    cache: Cache
    pending: jax.Array  # int32 [B]
    tokens: jax.Array  # int32 [B, budget + 1]
    log_prob: jax.Array  # float32 [B, budget + 1]
    length: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    signalled: jax.Array  # bool [B]


def _ends_with(tail: jax.Array, runs: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Whether the last tokens `[B, W]` of each row end with one of the runs, bool `[B]`."""
    width = tail.shape[1]
    table = np.full((len(runs), width), NO_TOKEN, np.int32)
    for row, run in enumerate(runs):
        table[row, width - len(run) :] = run
    return jnp.any(jnp.all((tail[:, None] == table) | (table == NO_TOKEN), axis=-1), axis=-1)


def beginnings(capacity: int, max_new_tokens: int) -> tuple[int, ...]:
    """Lengths of the beginnings of a cache over which the first tokens of a message are decoded, rising.

    A message of many tokens would else attend to all that the cache has room for from its first token on. Each length
    is one more loop in the compiled program and one more copy of that part of the cache, so they are few, and messages
    that are short beside the cache have none.

    Args:
        capacity: of the cache, which has room for the longest message and little more.
        max_new_tokens: tokens of the longest message.
    """
    lengths: list[int] = []
    length = capacity * 3 // 4 // 16 * 16
    while len(lengths) < 3 and max_new_tokens >= 64 and length >= max(capacity - max_new_tokens, 0) + 32:
        lengths.append(length)
        length = length * 3 // 4 // 16 * 16
    return tuple(reversed(lengths))


def generate(
    params: Params,
    spec: GenerationSpec,
    context: Context,
    keys: jax.Array,
    active: jax.Array,
    message: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
) -> tuple[Context, Message]:
    """Samples one message per active row and appends it; other rows stay as they are.

    A message ends with a sampled end-of-turn or an end signal. After `spec.max_new_tokens` sampled tokens without
    either, an end-of-turn is forced, with role TEMPLATE as it was not sampled.

    Args:
        params, spec: the model that speaks.
        context: its view, up to and including the message's header; active rows need room for budget + 1 tokens, in the
            cache too.
        keys: typed keys `[B]` of this message; token i is drawn with `fold_in(key, i)`.
        active: bool `[B]`.
        message: int `[B]`, the number of the message in its conversation.
        token_mask: bool `[V]`, the tokens that may be sampled; the end-of-turn must be one.
        temperature: float32, a scalar or `[B]`.
    """
    batch, width = active.shape[0], spec.max_new_tokens + 1
    longest = max((len(run) for run in spec.stop_sequences), default=0)

    def running(state: _Decoding) -> jax.Array:
        """Whether a row goes on, and all that do have room in the cache of this state."""
        last = jnp.max(jnp.where(state.done, -1, context.length - 1 + state.step))
        return (last >= 0) & (last < state.cache.capacity)

    def decode(state: _Decoding) -> _Decoding:
        going = ~state.done
        position = jnp.where(going, context.length - 1 + state.step, context.capacity)[:, None]
        hidden, cache = transformer.apply(
            params, spec.config, spec.execution, state.pending[:, None], position, state.cache
        )
        with jax.named_scope('logits'):
            logits = transformer.project(params, hidden[:, 0])
        with jax.named_scope('sample'):
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
            uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(step_keys)
            token, log_prob = sample_token(logits, token_mask, uniform, temperature, spec.filters)
        # The forced end-of-turn is one more step of the loop, which feeds the last sampled token as any step does.
        forced = state.step == spec.max_new_tokens
        token = jnp.where(forced, spec.end_of_turn, token)
        tokens = state.tokens.at[:, state.step].set(jnp.where(going, token, 0))
        signalled = state.signalled
        if spec.stop_sequences:
            index = state.step + 1 - longest + jnp.arange(longest)
            tail = jnp.where(index >= 0, tokens[:, jnp.maximum(index, 0)], NO_TOKEN - 1)
            signalled |= going & ~forced & _ends_with(tail, spec.stop_sequences)
        return _Decoding(
            step=state.step + 1,
            cache=cache,  # type: ignore[arg-type]  # a cache went in
            pending=token,
            tokens=tokens,
            log_prob=state.log_prob.at[:, state.step].set(jnp.where(going & ~forced, log_prob, 0.0)),
            length=state.length + going,
            done=state.done | signalled | (token == spec.end_of_turn),
            signalled=signalled,
        )

    zeros = jnp.zeros((batch,), jnp.int32)
    state = _Decoding(
        step=jnp.zeros((), jnp.int32),
        cache=context.cache,
        pending=last_token(context.tokens, context.length),
        tokens=jnp.zeros((batch, width), jnp.int32),
        log_prob=jnp.zeros((batch, width), jnp.float32),
        length=zeros,
        done=~active,
        signalled=jnp.zeros((batch,), bool),
    )
    with jax.named_scope('decode'):
        for capacity in beginnings(context.cache.capacity, spec.max_new_tokens):
            first = dataclasses.replace(state, cache=transformer.beginning(state.cache, capacity))
            first = jax.lax.while_loop(running, decode, first)
            state = dataclasses.replace(first, cache=transformer.with_beginning(state.cache, first.cache))
        state = jax.lax.while_loop(running, decode, state)

    truncated = state.length == width
    role = jnp.where(truncated[:, None] & (jnp.arange(width) == spec.max_new_tokens), TEMPLATE, spec.role)
    context = append(context, state.cache, state.tokens, role, message, state.log_prob, state.length)
    return context, Message(
        tokens=state.tokens,
        length=state.length,
        content_length=state.length - (active & ~state.signalled),
        signalled=state.signalled,
        truncated=truncated,
        decoded_steps=state.length,
        loop_steps=zeros + state.step,
    )
