"""The rows of a served model on the device, and the programs that change them: a frozen state in, the next one out.

Each row has a cache of S tokens: of all its tokens but the last, the pending one, as in `rollouts.context`. A row that
no request has keeps its cache. `feed` writes given tokens of some rows. `take` copies the start of some rows' caches,
`decode` samples a few tokens of these rows again and again, and `put_back` writes their caches back. `copy` gives one
row another's cache.

A program's shapes are its number of rows and how much of their caches it reads. Tokens of a row depend on its own
prompt, settings and seed.

Letters as in `transformer.py`: B rows, S capacity of a row in tokens, V padded vocabulary. In a call b are the rows of
the call, T given tokens of a row, N sampled ones, K `MAX_TOP`.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.cache import Cache, cache_prefix, with_cache_prefix
from simrl.models.rows import gather_per_row
from simrl.rollouts.agents import Policy
from simrl.rollouts.token_sampling import most_probable, sample_rows, unpack_bits
from simrl.serving.generation import MAX_TOP
from simrl.serving.shapes import Shapes

NO_ID = -1
Numbers = Any  # an array: of numpy on the host, of JAX in a program


@flax.struct.dataclass
class Progress:
    """The place of all rows in their answers.

    Attributes:
        pending: int32 `[B]`, each row's last token, which its cache does not have.
        length: int32 `[B]`, tokens, the pending one included.
        sampled: int32 `[B]`, those that its request sampled.
        done: bool `[B]`, whether it has sampled its last one.
    """

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
        begins: bool `[b]`, whether these are the prompt's last tokens but one: the row may sample next.
        pending, length: int32 `[b]`, of a row that begins: the prompt's last token, and its number of tokens.
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
    """Requests for a block of sampled tokens; fields are `[b]`, settings as of `Sampling`.

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


def init_rows(policy: Policy, shapes: Shapes) -> tuple[Cache, Progress]:
    """Empty rows."""
    # One buffer each: a program takes over those that it is given.
    pending, length, sampled = (jnp.zeros(shapes.rows, jnp.int32) for _ in range(3))
    cache = transformer.init_cache(policy.spec.config, shapes.rows, shapes.context, policy.spec.execution.dtype)
    return cache, Progress(pending, length, sampled, done=jnp.ones(shapes.rows, bool))


def _has_all(cache: Cache, rows: jax.Array) -> bool:
    """Returns True if a call has all rows; they are in the order of the cache then."""
    return len(rows) == cache.value[0].shape[0]


def take(cache: Cache, rows: jax.Array, *, size: int) -> Cache:
    """The first `size` tokens of some rows' caches."""
    first = cache_prefix(cache, size)
    return first if _has_all(cache, rows) else jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode='clip'), first)


def put_back(cache: Cache, taken: Cache, rows: jax.Array) -> Cache:
    """Writes caches that `take` took back to their rows."""
    if _has_all(cache, rows):
        return with_cache_prefix(cache, taken)

    # Copies of whole rows: a CPU scatters an element at a time.
    def one_row(number: jax.Array, cache: Cache) -> Cache:
        def copied(whole: jax.Array, part: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(part, number, 1)
            return jax.lax.dynamic_update_slice(whole, row, [rows[number], 0, 0, 0])

        return jax.tree.map(copied, cache, taken)

    return jax.lax.fori_loop(0, len(rows), one_row, cache)


def feed(
    policy: Policy, masks: jax.Array, cache: Cache, progress: Progress, given: Given, *, size: int
) -> tuple[Cache, Progress, Scores]:
    """Feeds given tokens; the scores are of their targets, over the whole vocabulary at temperature 1, or zeros."""
    spec, (rows, width) = policy.spec, given.tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    positions = jnp.where(index < given.count[:, None], given.start[:, None] + index, size)
    hidden, taken = transformer.apply(
        policy.params, spec.config, spec.execution, given.tokens, positions, take(cache, given.rows, size=size)
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

    def begun(of_rows: jax.Array, values: jax.Array) -> jax.Array:
        return of_rows.at[given.rows].set(jnp.where(given.begins, values, of_rows[given.rows]))

    progress = Progress(
        pending=begun(progress.pending, given.pending),
        length=begun(progress.length, given.length),
        sampled=begun(progress.sampled, jnp.zeros(rows, jnp.int32)),
        done=begun(progress.done, jnp.zeros(rows, bool)),
    )
    return put_back(cache, taken, given.rows), progress, scores


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
    policy: Policy, masks: jax.Array, ends: jax.Array, cache: Cache, progress: Progress, asked: Asked, *, block: int
) -> tuple[Cache, Progress, Block]:
    """Samples up to `block` tokens of each row, until all have theirs.

    Args:
        cache: of the rows, from `take`.
        masks: bool `[2, V]`, the ids that may be sampled, by vocabulary. Bits of constrained rows hold for all tokens
            of the block: they have a quota of one.
        ends: int32 `[E]`, ids that end an answer.
    """
    spec, rows = policy.spec, asked.rows
    keys = jax.vmap(_key)(asked.seed, asked.sample)
    before = progress.length[rows]
    allowed = jax.lax.cond(
        jnp.any(asked.constrained),
        lambda: masks[asked.vocabulary] & (unpack_bits(asked.bits) | ~asked.constrained[:, None]),
        lambda: masks[asked.vocabulary],
    )

    def wanting(state: _Decoding) -> jax.Array:
        return ~state.done & (state.step < asked.quota)

    def step(state: _Decoding) -> _Decoding:
        sampling = wanting(state)
        position = jnp.where(sampling, state.length - 1, cache.capacity)[:, None]
        hidden, written = transformer.apply(
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
            cache=written,  # type: ignore[arg-type]  # a cache went in
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
        cache=cache,
        pending=progress.pending[rows],
        length=before,
        sampled=progress.sampled[rows],
        done=progress.done[rows],
        tokens=jnp.zeros((len(rows), block), jnp.int32),
        scores=_no_scores(len(rows), block),
    )
    last = jax.lax.while_loop(lambda state: jnp.any(wanting(state)), step, first)
    progress = Progress(
        pending=progress.pending.at[rows].set(last.pending),
        length=progress.length.at[rows].set(last.length),
        sampled=progress.sampled.at[rows].set(last.sampled),
        done=progress.done.at[rows].set(last.done),
    )
    return last.cache, progress, Block(last.tokens, last.length - before, last.done, last.scores)


def _key(seed: jax.Array, sample: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for number in (seed[0], seed[1], sample):
        key = jax.random.fold_in(key, number)
    return key


def copy(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """Gives the row `target` the cache of `source`."""

    def copied(x: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=0)

    return jax.tree.map(copied, cache)
