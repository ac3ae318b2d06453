"""Logits and a uniform number in, a token out; a context and a model in, the context with one more message out.

1. `sample_token` draws one token per row by inverse CDF.
2. `generate` appends one sampled message: one `while_loop` that stops when every row is done.

Letters as in `transformer.py`: B rows, S capacity of a row in tokens, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models import transformer
from simrl.models.rows import gather_per_row
from simrl.models.transformer import Cache, Execution, Params, TransformerConfig
from simrl.rollouts.context import Context, append, last_token

BLOCK = 128  # tokens whose probabilities are summed before the blocks are; it divides the padded vocabulary
NO_TOKEN = -1  # equals no token id


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which tokens are left to draw from. Static: a filter that is off costs nothing.

    Attributes:
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: of what top_k keeps, keep the fewest most probable tokens whose share reaches this (Holtzman et al. 2020,
            arXiv:1904.09751); 1 keeps all.
        min_p: keep tokens at least this many times as probable as the most probable (Nguyen et al. 2024,
            arXiv:2407.01082); 0 keeps all.

    Tokens exactly as probable as the last one kept are kept too, so that what is kept depends on no order.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f'Filters.top_k: expected 0 (off) or more, found {self.top_k}')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'Filters.top_p: expected more than 0 and at most 1 (off), found {self.top_p}')
        if not 0 <= self.min_p <= 1:
            raise ValueError(f'Filters.min_p: expected 0 (off) to 1, found {self.min_p}')


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a model is sampled, as a config says it. `temperature` 0 is greedy; the rest is as in `Filters`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f'Sampling.temperature: expected 0 (greedy) or more, found {self.temperature}')
        _ = self.filters  # its own checks

    @property
    def filters(self) -> Filters:
        return Filters(self.top_k, self.top_p, self.min_p)


def _prefix_sum(x: jax.Array) -> jax.Array:
    """Inclusive sums along the last axis, by doubling (Hillis & Steele 1986).

    The sum at index i is one fixed tree over the entries up to i: later entries, and how many there are, do not matter.
    """
    shift = 1
    while shift < x.shape[-1]:
        x = x + jnp.pad(x[..., :-shift], [(0, 0)] * (x.ndim - 1) + [(shift, 0)])
        shift *= 2
    return x


def _total(x: jax.Array) -> jax.Array:
    """Sums along the last axis by halving, in an order that zeros at the end do not change."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def _last_positive(x: jax.Array) -> jax.Array:
    """Index of the last positive entry along the last axis (the last index where there is none)."""
    return x.shape[-1] - 1 - jnp.argmax(x[..., ::-1] > 0, axis=-1)


def _largest_threshold(holds: Callable[[jax.Array], jax.Array], batch: int) -> jax.Array:
    """The largest float32 `[B, 1]` in [0, 1] for which `holds` (bool `[B, 1]`) does, by bisection of its bits.

    `holds` must be true of 0, and of anything smaller than what it is true of. The bits of floats that are not negative
    are ordered as the floats are, and those up to 1.0 take 30 halvings; sorting a vocabulary costs far more on a CPU.
    """
    low = jnp.zeros((batch, 1), jnp.int32)
    high = low + (int(np.float32(1).view(np.int32)) + 1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        held = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _filtered(weight: jax.Array, filters: Filters) -> jax.Array:
    """Zeroes the weights `[B, V]` that the filters remove. Weights are relative: the largest of each row is 1."""
    batch, size = weight.shape
    if filters.top_k:
        k = min(filters.top_k, size)
        smallest = _largest_threshold(lambda t: jnp.sum(weight >= t, axis=-1, keepdims=True) >= k, batch)
        weight = jnp.where(weight >= smallest, weight, 0.0)
    if filters.top_p < 1:
        kept = weight
        needed = filters.top_p * _total(kept)[:, None]
        smallest = _largest_threshold(lambda t: _total(jnp.where(kept >= t, kept, 0.0))[:, None] >= needed, batch)
        weight = jnp.where(weight >= smallest, weight, 0.0)
    if filters.min_p:
        weight = jnp.where(weight >= filters.min_p, weight, 0.0)
    return weight


def _first_past(weight: jax.Array, summed: jax.Array, target: jax.Array) -> jax.Array:
    """The first index with a positive weight whose prefix sum exceeds the target; else the last positive one."""
    past = (summed > target[:, None]) & (weight > 0)
    return jnp.where(jnp.any(past, axis=-1), jnp.argmax(past, axis=-1), _last_positive(weight))


def _inverse_cdf(weight: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the cumulated weights `[B, V]` pass `uniform` times their total.

    First a block of `BLOCK` tokens is found, then the token in it. Everything that decides about index i is computed
    from indices <= i in an order that their number does not change: a block's sum halves in a fixed order,
    `_prefix_sum` is a tree that depends on i alone, and the total is the prefix sum at the last positive block and not
    at the last one. So zeros appended to the vocabulary change nothing, to the last bit.

    Prefix sums of this kind need not rise with the index by the last bit, so that a weight of 0 is excluded by itself.
    """
    batch, size = weight.shape
    blocks = jnp.pad(weight, ((0, 0), (0, -size % BLOCK))).reshape(batch, -1, BLOCK)
    sums = _total(blocks)
    summed = _prefix_sum(sums)
    target = uniform * gather_per_row(summed, _last_positive(sums))
    block = _first_past(sums, summed, target)
    before = jnp.where(block > 0, gather_per_row(summed, jnp.maximum(block - 1, 0)), 0.0)
    chosen = gather_per_row(blocks, block)
    return block * BLOCK + _first_past(chosen, _prefix_sum(chosen), target - before)


def sample_token(
    logits: jax.Array, token_mask: jax.Array, uniform: jax.Array, temperature: jax.Array | float, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row by inverse CDF in token-id order, in float32, from one uniform number per row.

    A row's token depends on its own logits and number only. The number has 23 random bits, so that probabilities are
    exact to about 1e-7, which is also what float32 sums are good for.

    Args:
        logits: float32 `[B, V]`.
        token_mask: bool `[V]` or `[B, V]`; at least one token of a row must be allowed.
        uniform: float32 `[B]` in [0, 1).
        temperature: float32, a scalar or `[B]`; rows at 0 take the most probable token.
        filters: what to draw from.

    Returns:
        token: int32 `[B]`.
        log_prob: float32 `[B]`, in nats, of the tempered and *unfiltered* distribution over the allowed tokens, as
            `models.log_probs.token_log_probs` gives it for the same logits; 0 for greedy rows, the limit.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), uniform.shape)
    greedy = temperature == 0
    logits = jnp.where(token_mask, logits / jnp.where(greedy, 1.0, temperature)[:, None], -jnp.inf)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits)
    token = _inverse_cdf(_filtered(weight, filters), uniform)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), token).astype(jnp.int32)
    log_prob = gather_per_row(logits, token) - jnp.log(jnp.sum(weight, axis=-1))
    return token, jnp.where(greedy, 0.0, log_prob)


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """One side of a conversation as its own model sees it: everything about it that a compiled program fixes.

    Attributes:
        config, execution: of the model that speaks.
        role: USER or ASSISTANT.
        own_header: tokens between the end of the partner's message and this spec's next content, footer included.
        partner_header: the same before the partner's messages, in this spec's view.
        own_first_header, partner_first_header: the same where the context holds no message yet.
        end_of_turn: what ends this spec's messages in its own view.
        partner_end_of_turn: what ends the partner's messages in this spec's view.
        max_new_tokens: most tokens sampled for a message, its end-of-turn included.
        stop_sequences: token runs of which each, once sampled, ends the conversation. An assistant has none.
        filters: what to draw tokens from.
        feed_chunk: most given tokens that are fed at once, which bounds the `[B, N, chunk, S]` attention scores.
    """

    config: TransformerConfig
    execution: Execution
    role: int
    own_header: tuple[int, ...]
    partner_header: tuple[int, ...]
    own_first_header: tuple[int, ...]
    partner_first_header: tuple[int, ...]
    end_of_turn: int
    partner_end_of_turn: int
    max_new_tokens: int
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    filters: Filters = Filters()
    feed_chunk: int = 128

    def __post_init__(self) -> None:
        if self.role not in (USER, ASSISTANT):
            raise ValueError(f'GenerationSpec.role: expected USER={USER} or ASSISTANT={ASSISTANT}, found {self.role}')
        for field in ('max_new_tokens', 'feed_chunk'):
            if getattr(self, field) < 1:
                raise ValueError(f'GenerationSpec.{field}: expected at least 1, found {getattr(self, field)}')
        for run in self.stop_sequences:
            if not 0 < len(run) <= self.max_new_tokens:
                raise ValueError(
                    f'GenerationSpec.stop_sequences: expected runs of 1 to budget={self.max_new_tokens} tokens, '
                    f'found {len(run)}: {run}'
                )


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

    A message ends with a sampled end-of-turn or an end signal. After `spec.max_new_tokens` sampled tokens without either,
    an     end-of-turn is forced, with role TEMPLATE as it was not sampled.

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
