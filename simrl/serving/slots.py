"""The rows of a served model on the device, and the programs that change them: a frozen state in, the next one out.

Each row has a cache of `S` tokens. `feed` writes given tokens of some rows, `decode` samples a few tokens of some rows,
`copy` gives one row another's cache. A row's cache has every token but its last, the pending one, as in
`rollouts.context`; a row that no request has keeps its cache.

A program's shapes are its number of rows and how much of their caches it reads. `compile_programs` compiles all there
are, so that none is compiled while requests wait. Tokens of a row depend on its own prompt, settings and seed.

Letters as in `transformer.py`: B rows, S capacity of a row in tokens, V padded vocabulary. In a call b are the rows of
the call, T given tokens of a row, N sampled ones, K `MAX_TOP`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.rows import gather_per_row
from simrl.models.transformer import Cache
from simrl.rollouts.agents import GenerationSpec, Policy
from simrl.rollouts.token_sampling import most_probable, sample_rows, unpack_bits
from simrl.serving.generation import MAX_TOP
from simrl.serving.shapes import Shapes

MAX_STOP_IDS = 16  # of a request
NO_ID = -1
Numbers = Any  # an array: of numpy on the host, of JAX in a program


@flax.struct.dataclass
class Slots:
    """The rows of a model.

    Attributes:
        cache: B rows of S tokens.
        pending: int32 `[B]`, each row's last token, which its cache does not have.
        length: int32 `[B]`, tokens, the pending one included.
        sampled: int32 `[B]`, those that its request sampled.
        done: bool `[B]`, whether it has sampled its last one.
    """

    cache: Cache
    pending: jax.Array
    length: jax.Array
    sampled: jax.Array
    done: jax.Array


@flax.struct.dataclass
class Given:
    """Tokens to feed.

    Attributes:
        rows: int32 `[b]`, different ones.
        tokens: int32 `[b, T]`.
        start: int32 `[b]`, the position of the first.
        count: int32 `[b]`, how many there are; 0 for a row that fills the call.
        targets: int32 `[b, T]`, the token after each.
        begins: bool `[b]`, whether the row then samples, from `pending`, its token number `length` - 1.
        pending, length: int32 `[b]`.
        scored: whether log-probabilities of the targets are wanted.
    """

    rows: Numbers
    tokens: Numbers
    start: Numbers
    count: Numbers
    targets: Numbers
    begins: Numbers
    pending: Numbers
    length: Numbers
    scored: Numbers


@flax.struct.dataclass
class Asked:
    """What requests ask of a block of sampled tokens; fields are `[b]`, settings as of `Sampling`.

    Attributes:
        rows: int32, different ones.
        quota: int32, max tokens that the row samples in this block; 0 for a row that fills the call.
        max_tokens: int32, of the request.
        seed: uint32 `[b, 2]`, low and high half.
        sample: int32.
        temperature, top_p, min_p: float32.
        top_k: int32.
        vocabulary: int32, row of the masks.
        stop_ids: int32 `[b, MAX_STOP_IDS]`, `NO_ID` after the last.
        top: whether alternatives are wanted by any row.
        constrained: bool, whether `bits` say what the row's next token may be.
        bits: uint32 `[b, V / 32]`, as of `Constraint`.
    """

    rows: Numbers
    quota: Numbers
    max_tokens: Numbers
    seed: Numbers
    sample: Numbers
    temperature: Numbers
    top_k: Numbers
    top_p: Numbers
    min_p: Numbers
    vocabulary: Numbers
    stop_ids: Numbers
    top: Numbers
    constrained: Numbers
    bits: Numbers


@flax.struct.dataclass
class Scores:
    """Log-probabilities of tokens, float32 `[b, N]`; the K most probable ids int32 `[b, N, K]`, and theirs."""

    log_prob: jax.Array
    top: jax.Array
    top_log_prob: jax.Array


@flax.struct.dataclass
class Block:
    """Tokens that rows sampled.

    Attributes:
        tokens: int32 `[b, N]`.
        count: int32 `[b]`, how many.
        done: bool `[b]`, whether the last one ended the answer: by an end, or as the last that the request may have.
        scores: of `tokens`; no alternatives unless asked for.
    """

    tokens: jax.Array
    count: jax.Array
    done: jax.Array
    scores: Scores


def init_slots(policy: Policy, shapes: Shapes) -> Slots:
    """Empty rows."""
    config, dtype = policy.spec.config, policy.spec.execution.dtype
    # One buffer each: a program takes over those of the state that it is given.
    pending, length, sampled = (jnp.zeros(shapes.rows, jnp.int32) for _ in range(3))
    cache = transformer.init_cache(config, shapes.rows, shapes.context, dtype)
    return Slots(cache, pending, length, sampled, done=jnp.ones(shapes.rows, bool))


def _in_order(cache: Cache, rows: jax.Array) -> bool:
    """Whether a call has all rows; they are in the order of the cache then."""
    return len(rows) == cache.value[0].shape[0]


def _taken(spec: GenerationSpec, cache: Cache, rows: jax.Array, size: int) -> Cache:
    """The first `size` tokens of some rows."""
    if _in_order(cache, rows):
        return transformer.cache_prefix(cache, size)

    # Copies of whole rows: a CPU gathers an element at a time.
    def one_row(number: jax.Array, taken: Cache) -> Cache:
        def copied(part: jax.Array, whole: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice(whole, [rows[number], 0, 0, 0], [1, *part.shape[1:]])
            return jax.lax.dynamic_update_slice(part, row, [number, 0, 0, 0])

        return jax.tree.map(copied, taken, cache)

    empty = transformer.init_cache(spec.config, len(rows), size, spec.execution.dtype)
    return jax.lax.fori_loop(0, len(rows), one_row, empty)


def _returned(cache: Cache, taken: Cache, rows: jax.Array, start: jax.Array, width: int) -> Cache:
    """The cache with `width` tokens of each row of `taken` from `start` on.

    They may be more than were written: what was in their places before is in both.
    """
    size = taken.capacity
    if _in_order(cache, rows) and size == cache.capacity:
        return taken
    start = jnp.clip(start, 0, size - width)  # `dynamic_slice` would clip it to the end of either

    def one_row(number: jax.Array, cache: Cache) -> Cache:
        row, first = rows[number], start[number]

        def moved(whole: jax.Array, part: jax.Array, axis: int) -> jax.Array:
            sizes = [1, *part.shape[1:]]
            sizes[axis] = width
            at = [first if i == axis else 0 for i in range(1, 4)]
            window = jax.lax.dynamic_slice(part, [number, *at], sizes)
            return jax.lax.dynamic_update_slice(whole, window, [row, *at])

        return Cache(
            key=tuple(moved(x, y, 3) for x, y in zip(cache.key, taken.key, strict=True)),
            value=tuple(moved(x, y, 2) for x, y in zip(cache.value, taken.value, strict=True)),
        )

    return jax.lax.fori_loop(0, len(rows), one_row, cache)


def feed(policy: Policy, masks: jax.Array, slots: Slots, given: Given, *, size: int) -> tuple[Slots, Scores]:
    """Feeds given tokens; the scores are of their targets, over the whole vocabulary at temperature 1, or zeros."""
    spec, (rows, width) = policy.spec, given.tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    positions = jnp.where(index < given.count[:, None], given.start[:, None] + index, size)
    hidden, taken = transformer.apply(
        policy.params,
        spec.config,
        spec.execution,
        given.tokens,
        positions,
        _taken(spec, slots.cache, given.rows, size),
    )
    assert taken is not None

    def score() -> Scores:
        # A row at a time bounds the memory: T V numbers.
        def of_row(pair: tuple[jax.Array, jax.Array]) -> Scores:
            hidden, targets = pair
            logits = jnp.where(masks[1], transformer.project(policy.params, hidden), -jnp.inf)
            log_probs = jax.nn.log_softmax(logits)
            top_log_prob, top = jax.lax.top_k(log_probs, MAX_TOP)
            return Scores(gather_per_row(log_probs, targets), top, top_log_prob)

        return jax.lax.map(of_row, (hidden, given.targets))

    none = _no_scores(rows, width)
    scores = jax.lax.cond(given.scored, score, lambda: none)

    def begun(of_slots: jax.Array, values: jax.Array) -> jax.Array:
        return of_slots.at[given.rows].set(jnp.where(given.begins, values, of_slots[given.rows]))

    slots = Slots(
        cache=_returned(slots.cache, taken, given.rows, given.start, width),
        pending=begun(slots.pending, given.pending),
        length=begun(slots.length, given.length),
        sampled=begun(slots.sampled, jnp.zeros(rows, jnp.int32)),
        done=begun(slots.done, jnp.zeros(rows, bool)),
    )
    return slots, scores


def _no_scores(rows: int, width: int) -> Scores:
    top = (rows, width, MAX_TOP)
    return Scores(jnp.zeros((rows, width)), jnp.zeros(top, jnp.int32), jnp.zeros(top))


@flax.struct.dataclass
class _Decoding:
    """The carry of the decode loop."""

    step: jax.Array
    cache: Cache
    pending: jax.Array
    length: jax.Array
    sampled: jax.Array
    done: jax.Array
    tokens: jax.Array
    scores: Scores


def decode(
    policy: Policy, masks: jax.Array, ends: jax.Array, slots: Slots, asked: Asked, *, size: int, block: int
) -> tuple[Slots, Block]:
    """Samples up to `block` tokens of each row, until all have theirs.

    Args:
        masks: bool `[2, V]`, the ids that may be sampled, by vocabulary. Bits of constrained rows hold for all tokens
            of the block: they have a quota of one.
        ends: int32 `[E]`, ids that end an answer.
    """
    spec, rows = policy.spec, asked.rows
    keys = jax.vmap(_key)(asked.seed, asked.sample)
    before = slots.length[rows]
    allowed = jax.lax.cond(
        jnp.any(asked.constrained),
        lambda: masks[asked.vocabulary] & (unpack_bits(asked.bits) | ~asked.constrained[:, None]),
        lambda: masks[asked.vocabulary],
    )

    def wanting(state: _Decoding) -> jax.Array:
        return ~state.done & (state.step < asked.quota)

    def step(state: _Decoding) -> _Decoding:
        sampling = wanting(state)
        position = jnp.where(sampling, state.length - 1, size)[:, None]
        hidden, cache = transformer.apply(
            policy.params, spec.config, spec.execution, state.pending[:, None], position, state.cache
        )
        logits = transformer.project(policy.params, hidden[:, 0])
        uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, state.sampled)
        draw = sample_rows(logits, allowed, uniform, asked.temperature, asked.top_k, asked.top_p, asked.min_p)
        top, top_log_prob = jax.lax.cond(
            asked.top,
            lambda: most_probable(draw, MAX_TOP),
            lambda: (jnp.zeros((len(rows), MAX_TOP), jnp.int32), jnp.zeros((len(rows), MAX_TOP))),
        )
        sampled = state.sampled + sampling
        token = draw.token
        ended = jnp.isin(token, ends) | jnp.any(token[:, None] == asked.stop_ids, axis=1)
        old = state.scores
        return _Decoding(
            step=state.step + 1,
            cache=cache,  # type: ignore[arg-type]  # a cache went in
            pending=jnp.where(sampling, token, state.pending),
            length=state.length + sampling,
            sampled=sampled,
            done=state.done | sampling & (ended | (sampled >= asked.max_tokens)),
            tokens=state.tokens.at[:, state.step].set(jnp.where(sampling, token, 0)),
            scores=Scores(
                old.log_prob.at[:, state.step].set(draw.log_prob),
                old.top.at[:, state.step].set(top),
                old.top_log_prob.at[:, state.step].set(top_log_prob),
            ),
        )

    first = _Decoding(
        step=jnp.zeros((), jnp.int32),
        cache=_taken(spec, slots.cache, rows, size),
        pending=slots.pending[rows],
        length=before,
        sampled=slots.sampled[rows],
        done=slots.done[rows],
        tokens=jnp.zeros((len(rows), block), jnp.int32),
        scores=_no_scores(len(rows), block),
    )
    last = jax.lax.while_loop(lambda state: jnp.any(wanting(state)), step, first)
    slots = Slots(
        cache=_returned(slots.cache, last.cache, rows, before - 1, block),
        pending=slots.pending.at[rows].set(last.pending),
        length=slots.length.at[rows].set(last.length),
        sampled=slots.sampled.at[rows].set(last.sampled),
        done=slots.done.at[rows].set(last.done),
    )
    return slots, Block(last.tokens, last.length - before, last.done, last.scores)


def _key(seed: jax.Array, sample: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for number in (seed[0], seed[1], sample):
        key = jax.random.fold_in(key, number)
    return key


def copy(slots: Slots, source: jax.Array, target: jax.Array) -> Slots:
    """Gives the row `target` the cache of `source`."""

    def copied(x: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=0)

    return dataclasses.replace(slots, cache=jax.tree.map(copied, slots.cache))
