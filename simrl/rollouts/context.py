"""Prompts and a policy in, a `Context` out: one model's view of many conversations, with its KV cache.

1. `prefill` makes a context of prompts.
2. `extend` appends given tokens to it; `generate.generate` appends sampled ones.
3. Between programs, `grow_cache` lets the cache grow: attention and memory cost as much as the cache has room for.

Two rules make this one mechanism, with no special first step and nothing fed twice. Rows are left-aligned, so `length`
is the only pointer: a token's position is its index, and a write to index S is dropped (`mode='drop'`). The cache has
every token of a row but its last, the pending one: `extend` and `generate` both start by feeding it.

Letters as in `transformer.py`: B rows, T tokens given at once, S capacity of a row in tokens.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.attention_kernels import SPLASH_BLOCK
from simrl.models.cache import Cache, by_layer, extended
from simrl.models.rows import gather_per_row
from simrl.rollouts.agents import Policy
from simrl.rollouts.compaction import shard_tree

PREFIX = -1  # `Context.message` of tokens before the first message
SMALLEST_CACHE = 64  # tokens; with fewer a decode step is hardly cheaper


@flax.struct.dataclass
class Context:
    """One model's view of B conversations.

    Attributes:
        tokens: int32 `[B, S]`, 0 from `length` on.
        role: int8 `[B, S]`, who wrote each token: PAD (from `length` on), TEMPLATE, USER or ASSISTANT of `chat.py`.
        message: int16 `[B, S]`, which message of the conversation each token belongs to: PREFIX before the first one,
            0 from `length` on. A header belongs to the message that it opens.
        log_prob: float32 `[B, S]`, of the tokens that this model sampled; 0 elsewhere.
        length: int32 `[B]`.
        cache: keys and values of all tokens but each row's last, which is pending. It may have less room than the
            context. Callers that append tokens grow it first, since tokens without room are dropped.
    """

    tokens: jax.Array
    role: jax.Array
    message: jax.Array
    log_prob: jax.Array
    length: jax.Array
    cache: Cache

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]


def last_token(x: jax.Array, length: jax.Array) -> jax.Array:
    """The entry of `[B, S]` that belongs to each row's last token, `[B]`; its first one where a row is empty."""
    return gather_per_row(x, jnp.maximum(length - 1, 0))


def feed(
    policy: Policy, cache: Cache, tokens: jax.Array, positions: jax.Array, num: jax.Array, chunk: int | None = None
) -> Cache:
    """Writes keys and values of `tokens[:, :num]` (int32 `[B, T]`, `num` a scalar), `chunk` columns at a time.

    Columns past the longest row cost nothing: most messages are far shorter than `max_new_tokens`.

    Args:
        chunk: None: `feed_chunk`.
    """
    spec = policy.spec
    time = tokens.shape[1]
    chunk = min(spec.feed_chunk if chunk is None else chunk, time)
    pad = ((0, 0), (0, -time % chunk))
    tokens = jnp.pad(tokens, pad)
    positions = jnp.pad(positions, pad, constant_values=cache.capacity)  # dropped

    def step(carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        start, cache = carry
        part = [jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (tokens, positions)]
        _, new_cache = transformer.apply(policy.params, spec.config, spec.execution, part[0], part[1], cache)
        assert new_cache is not None
        return start + chunk, new_cache

    start = jnp.zeros((), jnp.int32)
    with jax.named_scope('feed'):
        return jax.lax.while_loop(lambda carry: carry[0] < num, step, (start, cache))[1]


def prefill(
    policy: Policy,
    tokens: jax.Array,
    role: jax.Array,
    message: jax.Array,
    length: jax.Array,
    *,
    capacity: int,
) -> Context:
    """A context of prompts, with room for `capacity` tokens; its cache has room for hardly more than the prompts.

    Args:
        tokens, role, message: `[B, T]` as in `Context`; entries from `length` on are ignored.
        length: int32 `[B]`. A row of length 0 stays empty, and cannot be generated from.
        capacity: S, at least T.
    """
    width = tokens.shape[1]
    if width > capacity:
        raise ValueError(f'prefill: expected prompts of at most capacity={capacity} tokens, found width {width}')
    index = jnp.arange(width, dtype=jnp.int32)
    real = index < length[:, None]

    def padded(x: jax.Array, dtype: str) -> jax.Array:
        return jnp.pad(jnp.where(real, x, 0).astype(dtype), ((0, 0), (0, capacity - width)))

    # Queries need not look at the room that follows.
    cache = transformer.init_cache(
        policy.spec.config, tokens.shape[0], min(round_up(width), capacity), policy.spec.execution.dtype
    )
    positions = jnp.where(index < length[:, None] - 1, index, cache.capacity)
    fed = jnp.where(real, tokens, 0)
    cache = feed(policy, cache, fed, positions, jnp.max(length) - 1)
    return Context(
        tokens=padded(tokens, 'int32'),
        role=padded(role, 'int8'),
        message=padded(message, 'int16'),
        log_prob=jnp.zeros((tokens.shape[0], capacity), jnp.float32),
        length=length.astype(jnp.int32),
        cache=cache,
    )


def round_up(tokens: int) -> int:
    """Rounds up to a multiple of 16: a CPU multiplies by keys of 263 tokens in twice the time that 272 take.

    From 4,096 on it is a multiple of 512, as a TPU reads a cache in such blocks (`attention_kernels.splash_cached`) and
    would copy another to fill the last one.
    """
    multiple = 16 if tokens < 4096 else SPLASH_BLOCK
    return -(-tokens // multiple) * multiple


def cache_capacities(capacity: int) -> list[int]:
    """The sizes of caches of contexts of up to `capacity` tokens: 64, 128, 256 tokens, and then two sizes an octave.

    They are few, as each is a program of its own to compile. Small ones are the fewest: to attend to 200 tokens costs
    little beside the rest of a decode step. The last is `capacity`.
    """
    sizes, size = [], SMALLEST_CACHE
    while size < capacity:
        sizes.append(size)
        size += size if size < 256 else (1 << (size.bit_length() - 1)) // 2
    return [*sizes, capacity]


def capacities_from(least: int, capacity: int) -> tuple[int, ...]:
    """Those of the `cache_capacities` with room for `least` tokens."""
    return tuple(size for size in cache_capacities(capacity) if size >= min(least, capacity))


def capacity_for(needed: int, capacity: int) -> int:
    """The smallest of the `cache_capacities` with room for `needed` tokens, or the largest."""
    return next((size for size in cache_capacities(capacity) if size >= needed), capacity)


def grow_cache(context: Context, tokens: int) -> Context:
    """The context, its cache with room for `tokens` or all that the context has room for. Not for use inside a jit.

    A cache that has to grow is deleted; see `larger_cache`.
    """
    needed = min(tokens, context.capacity)
    if needed <= context.cache.capacity:
        return context
    return dataclasses.replace(context, cache=larger_cache(context.cache, needed))


def larger_cache(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens; the old one is deleted. Not for use inside a jit."""
    return by_layer(lambda layer: extend_cache(layer, capacity), cache)


@functools.partial(jax.jit, static_argnums=1)
def extend_cache(cache: Cache, capacity: int) -> Cache:
    """The cache, of a layer, with room for `capacity` tokens."""
    return shard_tree(extended(cache, capacity))


def append(
    context: Context,
    cache: Cache,
    tokens: jax.Array,
    role: jax.Array,
    message: jax.Array,
    log_prob: jax.Array,
    count: jax.Array,
) -> Context:
    """Writes the first `count` `[B]` of `[B, T]` tokens after each row's last one; `message` is `[B]`."""
    # Each place reads its token, where one belongs to it: a scatter takes about twice as long to compile.
    at = jnp.arange(context.capacity) - context.length[:, None]
    new = (at >= 0) & (at < count[:, None])
    at = jnp.clip(at, 0, tokens.shape[1] - 1)

    def written(x: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.where(new, jnp.take_along_axis(values.astype(x.dtype), at, axis=1, mode='promise_in_bounds'), x)

    return Context(
        tokens=written(context.tokens, tokens),
        role=written(context.role, role),
        message=jnp.where(new, message[:, None].astype(context.message.dtype), context.message),
        log_prob=written(context.log_prob, log_prob),
        length=context.length + count,
        cache=cache,
    )


def rewind(context: Context, count: jax.Array) -> Context:
    """Removes the last `count` (int32 `[B]`) tokens of each row; the cache's entries of removed tokens are never read.

    Args:
        count: fewer than a row has.
    """
    length = context.length - count
    kept = jnp.arange(context.capacity) < length[:, None]

    def cut(x: jax.Array) -> jax.Array:
        return jnp.where(kept, x, jnp.zeros((), x.dtype))

    return Context(
        tokens=cut(context.tokens),
        role=cut(context.role),
        message=cut(context.message),
        log_prob=cut(context.log_prob),
        length=length,
        cache=context.cache,
    )


def extend(
    policy: Policy,
    context: Context,
    tokens: jax.Array,
    role: jax.Array,
    message: jax.Array,
    count: jax.Array,
) -> Context:
    """Appends given tokens: feeds the pending one and all new ones but the last.

    Args:
        context: what to extend; rows must have room for `count` more tokens.
        tokens, role: `[B, T]`.
        message: `[B]`, the message that the tokens belong to.
        count: int32 `[B]`, how many of a row's tokens to append; 0 leaves the row as it is.
    """
    if tokens.shape[1] == 0:
        return context
    pending = last_token(context.tokens, context.length)
    fed = jnp.concatenate([pending[:, None], tokens[:, :-1]], axis=1)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(index < count[:, None], context.length[:, None] - 1 + index, context.capacity)
    cache = feed(policy, context.cache, fed, positions, jnp.max(count))
    return append(context, cache, tokens, role, message, jnp.zeros(tokens.shape, jnp.float32), count)
