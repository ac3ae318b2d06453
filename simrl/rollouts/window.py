"""One model's caches of conversations that each proceed at their own pace, and the programs that change them.

Of R rows the model has all caches. The first W are its window, the others are parked; which row has which place is the
host's to know (`schedule`), as are all tokens (`histories`).

1. `enter`: parked rows change places with rows of the window, and tokens that rows have not fed yet are fed.
2. `decode_block`: a few steps of the decode loop over the window. Each row is at a step of its own message.
3. Between them, `grow` lets the caches grow and `regroup` makes them fewer.

Shapes are those of a `schedule.Level` and a size of caches, so there are few programs. The host waits once a block.

Letters: R rows, W of them in the window, E of them entering in one call, T tokens given to a row in one call, N steps
of a block; D devices of the mesh axis `data`, of which each has its part of the rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.models import attention_kernels, transformer
from simrl.models.cache import Cache, stacked
from simrl.models.rows import gather_per_row, num_shards, scatter_per_row
from simrl.rollouts.agents import GenerationSpec, Policy
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.context import feed, larger_cache
from simrl.rollouts.dialogue import replicated
from simrl.rollouts.generate import ends_with, sample_next
from simrl.rollouts.schedule import Level

# Tokens fed at once by a device, about: with fewer it waits for the weights, with more most are past a message's end.
FED_AT_ONCE = {'cpu': 128, 'tpu': 512, 'gpu': 512}

Numbers = Any  # an array: of numpy on the host, of JAX in a program


@flax.struct.dataclass
class Caches:
    """Caches of one model.

    Attributes:
        window: of W rows.
        parked: of R - W rows; None where there are no others.
        entering: of E rows, where they are fed.
    """

    window: Cache
    parked: Cache | None
    entering: Cache

    @property
    def capacity(self) -> int:
        return self.window.capacity


@flax.struct.dataclass
class Given:
    """Rows that enter a window, or are in it, and the tokens that they are fed.

    Attributes:
        places: int32 `[D, E]`, in the device's window.
        outside: bool `[D, E]`, whether the row is parked, and changes places with the one in the window.
        parked: int32 `[D, E]`, its place among the device's parked rows then; else 0.
        rows: int32 `[D]`, how many rows there are.
        tokens: int32 `[D E, T]`, what is fed to these rows, one after the other.
        start: int32 `[D E]`, the position of the first.
        count: int32 `[D E]`, how many there are; 0 after the last row.
    """

    places: Numbers
    outside: Numbers
    parked: Numbers
    rows: Numbers
    tokens: Numbers
    start: Numbers
    count: Numbers


@flax.struct.dataclass
class Asked:
    """Rows of a window before a block, `[W]`.

    Attributes:
        active: bool, whether the row is to sample.
        pending: int32, its last token.
        position: int32, of that token.
        step: int32, tokens of its message so far.
        tail: int32 `[W, longest stop sequence - 1]`, the last of these, `NO_TOKEN` where there are fewer.
        key: uint32 `[W, 2]`, data of the conversation's key.
        message: int32, the number of its message.
        attempt: uint32, at this message: 0 the first, else as of `repeats.resample_message`.
        temperature: float32.
        limit: int32, a scalar: once so many rows have ended, and `least` steps are over, the block ends.
        least: int32, a scalar.
    """

    active: Numbers
    pending: Numbers
    position: Numbers
    step: Numbers
    tail: Numbers
    key: Numbers
    message: Numbers
    attempt: Numbers
    temperature: Numbers
    limit: Numbers
    least: Numbers


@flax.struct.dataclass
class Block:
    """Tokens that rows sampled in a block.

    Attributes:
        tokens: int32 `[W, N]`, 0 after the row's last.
        log_prob: float32 `[W, N]`.
        count: int32 `[W]`, how many.
        done: bool `[W]`, whether the last one ended the message: by an end, or as the last that it may have.
        stopped: bool `[W]`, whether a stop sequence did.
        steps: int32, a scalar, of the loop.
    """

    tokens: jax.Array
    log_prob: jax.Array
    count: jax.Array
    done: jax.Array
    stopped: jax.Array
    steps: jax.Array


def idle_rows(spec: GenerationSpec, rows: int) -> Asked:
    """Rows of a window on the host, none of which samples."""
    longest = max((len(run) for run in spec.stop_sequences), default=1)
    numbers = dict.fromkeys(('pending', 'position', 'step', 'message'), np.zeros(rows, np.int32))
    return Asked(
        active=np.zeros(rows, np.bool_),
        tail=np.zeros((rows, longest - 1), np.int32),
        key=np.zeros((rows, 2), np.uint32),
        attempt=np.zeros(rows, np.uint32),
        temperature=np.zeros(rows, np.float32),
        limit=np.int32(0),
        least=np.int32(0),
        **numbers,
    )


def new_caches(spec: GenerationSpec, level: Level, shards: int, capacity: int) -> Caches:
    """Empty caches."""
    window, entering = (empty_cache(spec, shards * rows, capacity) for rows in (level.window, level.entering))
    return Caches(window, empty_cache(spec, shards * level.parked, capacity) if level.parked else None, entering)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(spec: GenerationSpec, rows: int, capacity: int) -> Cache:
    return shard_tree(transformer.init_cache(spec.config, rows, capacity, spec.execution.dtype))


def _apart(tree: Any, shards: int) -> Any:
    """Arrays `[rows, ...]` as `[D, rows / D, ...]`."""
    return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def _together(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def enter(policy: Policy, caches: Caches, given: Given) -> Caches:
    """Exchanges rows and feeds tokens. Not for use inside a jit: in one program XLA would copy whole caches.

    Args:
        caches: donated.
        given: on the host.
    """
    window, parked, entering = caches.window, caches.parked, caches.entering
    number = np.broadcast_to(np.arange(given.places.shape[1], dtype=np.int32), given.places.shape)
    present = number < given.rows[:, None]
    inside = present & ~given.outside
    if inside.any():
        entering = move_rows(entering, window, *_first(inside, given.places, number))
    if given.outside.any():
        assert parked is not None
        entering = move_rows(entering, parked, *_first(given.outside, given.parked, number))
        parked = move_rows(parked, window, *_first(given.outside, given.places, given.parked))
    entering = feed_rows(policy, entering, given.tokens, given.start, given.count)
    return Caches(move_rows(window, entering, *_first(present, number, given.places)), parked, entering)


def _first(chosen: np.ndarray, *numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbers `[D, E]`, the chosen first, and how many these are on each device."""
    order = np.argsort(~chosen, axis=1, kind='stable')
    return *(np.take_along_axis(x, order, axis=1) for x in numbers), chosen.sum(axis=1, dtype=np.int32)


@functools.partial(jax.jit, donate_argnames='cache')
def move_rows(cache: Cache, source: Cache, rows: Numbers, places: Numbers, count: Numbers) -> Cache:
    """The cache with the first `count` `[D]` of the `rows` `[D, E]` of another at `places` `[D, E]`, of each device."""
    rows, places, shards = jnp.asarray(rows), jnp.asarray(places), rows.shape[0]
    if shards == 1:  # a CPU writes slices in place, and scatters element by element

        def one(number: jax.Array, cache: Cache) -> Cache:
            def written(x: jax.Array, other: jax.Array) -> jax.Array:
                row = jax.lax.dynamic_slice_in_dim(other, rows[0, number], 1)
                return jax.lax.dynamic_update_slice_in_dim(x, row, places[0, number], axis=0)

            return jax.tree.map(written, cache, source)

        return jax.lax.fori_loop(0, count[0], one, cache)

    def scattered(x: jax.Array, other: jax.Array) -> jax.Array:
        parts, others = _apart(x, shards), _apart(other, shards)
        at = jnp.where(jnp.arange(rows.shape[1]) < count[:, None], places, parts.shape[1])
        return _together(scatter_per_row(parts, at, gather_per_row(others, rows)))

    return shard_tree(jax.tree.map(scattered, cache, source))


@functools.partial(jax.jit, donate_argnames='cache')
def feed_rows(policy: Policy, cache: Cache, tokens: Numbers, start: Numbers, count: Numbers) -> Cache:
    """The cache of E rows of each device with their tokens; see `Given`."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(index < count[:, None], start[:, None] + index, cache.capacity)
    rows = tokens.shape[0] // num_shards(tokens.shape[0])
    chunk = min(policy.spec.feed_chunk, max(16, FED_AT_ONCE[attention_kernels.platform()] // rows))
    return shard_tree(feed(policy, cache, tokens, positions, jnp.max(count), chunk))


@flax.struct.dataclass
class _Decoding:
    """The carry of the decode loop."""

    step: jax.Array
    cache: Cache
    pending: jax.Array
    count: jax.Array
    done: jax.Array
    stopped: jax.Array
    tokens: jax.Array  # with the message's tail before it
    log_prob: jax.Array


@functools.partial(jax.jit, static_argnames='steps', donate_argnames='caches')
def decode_block(policy: Policy, caches: Caches, asked: Asked, *, steps: int) -> tuple[Caches, Block]:
    """Samples up to `steps` tokens of each active row.

    Token i of message m of a conversation is drawn with its key, m and i folded in, as by `generate`, so that it does
    not depend on which rows decode together, or on where blocks begin.

    Args:
        caches: donated. Active rows have fed all of their tokens but the last, and their caches have room for `steps`
            more.
    """
    spec, rows = policy.spec, asked.active.shape[0]
    longest = max((len(run) for run in spec.stop_sequences), default=1)
    limit, least = asked.limit, asked.least
    asked = shard_tree(dataclasses.replace(asked, limit=None, least=None))
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(asked.key), asked.message)
    again = jax.vmap(jax.random.fold_in)(keys, asked.attempt)
    keys = jnp.where(asked.attempt > 0, again, keys)

    def sampling(state: _Decoding) -> jax.Array:
        return asked.active & ~state.done

    def running(state: _Decoding) -> jax.Array:
        enough = (jnp.sum(state.done) >= limit) & (state.step >= least)
        return (state.step < steps) & jnp.any(sampling(state)) & ~enough

    def step(state: _Decoding) -> _Decoding:
        on = sampling(state)
        position = jnp.where(on, asked.position + state.step, state.cache.capacity)
        cache, token, log_prob = sample_next(
            policy, state.cache, state.pending, position, keys, asked.step + state.step, asked.temperature
        )
        at = longest - 1 + state.step
        tokens = state.tokens.at[:, at].set(jnp.where(on, token, 0))
        stopped = state.stopped
        if spec.stop_sequences:
            tail = jax.lax.dynamic_slice_in_dim(tokens, state.step, longest, axis=1)
            stopped |= on & ends_with(tail, spec.stop_sequences)
        last = asked.step + state.step + 1 == spec.max_new_tokens
        return _Decoding(
            step=state.step + 1,
            cache=cache,
            pending=jnp.where(on, token, state.pending),
            count=state.count + on,
            done=state.done | on & (stopped | (token == spec.end_of_turn) | last),
            stopped=stopped,
            tokens=tokens,
            log_prob=state.log_prob.at[:, state.step].set(jnp.where(on, log_prob, 0.0)),
        )

    first = _Decoding(
        step=jnp.zeros((), jnp.int32),
        cache=caches.window,
        pending=asked.pending,
        count=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        stopped=jnp.zeros((rows,), bool),
        tokens=jnp.concatenate([asked.tail, jnp.zeros((rows, steps), jnp.int32)], axis=1),
        log_prob=jnp.zeros((rows, steps), jnp.float32),
    )
    with jax.named_scope('decode'):
        last = jax.lax.while_loop(running, step, first)
    block = Block(last.tokens[:, longest - 1 :], last.log_prob, last.count, last.done, last.stopped, last.step)
    return shard_tree(dataclasses.replace(caches, window=last.cache)), replicated(block)


def grow(spec: GenerationSpec, caches: Caches, sizes: Sequence[int]) -> Caches:
    """Caches with room for as many tokens as the last of the sizes, by way of all.

    A step from each size to the next is a program, and not one from each to each: most blocks need one step or none.
    Those that have to grow are deleted, one after the other.

    Args:
        sizes: rising.
    """
    for size in (size for size in sizes if size > caches.capacity):
        rows = caches.entering.key[0].shape[0]
        caches.entering.delete()  # nothing in it is needed between two calls of `enter`
        parked = None if caches.parked is None else larger_cache(caches.parked, size)
        caches = Caches(larger_cache(caches.window, size), parked, empty_cache(spec, rows, size))
    return caches


def regroup(spec: GenerationSpec, caches: Caches, index: np.ndarray, level: Level) -> Caches:
    """The caches of fewer rows. Old ones are deleted, layer by layer: beside one there need be no room for another.

    Args:
        index: int `[D, rows]`, the place of each device's rows, in the order of their new places.
        level: the new one.
    """
    window, parked = list[Cache](), list[Cache]()
    capacity = caches.capacity
    caches.entering.delete()
    outside = [None] * len(caches.window.key) if caches.parked is None else caches.parked.layers()
    for inside, others in zip(caches.window.layers(), outside, strict=True):
        window.append(take_rows(inside, others, index[:, : level.window]))
        if level.parked:
            parked.append(take_rows(inside, others, index[:, level.window :]))
        inside.delete()
        if others is not None:
            others.delete()
    entering = empty_cache(spec, len(index) * level.entering, capacity)
    return Caches(stacked(window), stacked(parked) if parked else None, entering)


@jax.jit
def take_rows(window: Cache, parked: Cache | None, index: jax.Array | np.ndarray) -> Cache:
    """Rows `[D, rows]` of the window and those after it, of a layer."""
    index = jnp.asarray(index)
    shards = index.shape[0]

    def taken(inside: jax.Array, outside: jax.Array | None) -> jax.Array:
        inside = _apart(inside, shards)
        size = inside.shape[1]
        rows = gather_per_row(inside, jnp.minimum(index, size - 1))
        if outside is not None:
            others = gather_per_row(_apart(outside, shards), jnp.maximum(index - size, 0))
            rows = jnp.where((index < size).reshape(*index.shape, *[1] * (rows.ndim - 2)), rows, others)
        return _together(rows)

    if parked is None:
        return shard_tree(jax.tree.map(lambda x: taken(x, None), window))
    return shard_tree(jax.tree.map(taken, window, parked))
