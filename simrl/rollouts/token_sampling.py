"""Logits and a uniform number in, a token out, by inverse CDF.

1. `sample_token` draws one token per row; all rows have the same settings, and filters that are off cost nothing.
2. `sample_rows` draws the same tokens where each row has settings of its own, in one program.

Letters: B rows, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.models.rows import gather_per_row

BLOCK = 128  # tokens whose probabilities are summed before the blocks are; it divides the padded vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of a model. Filters that are off cost nothing.

    Tokens exactly as probable as the last one kept are kept too, so that what is kept depends on no order.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    # Of what top_k keeps, keep the fewest most probable tokens whose share reaches this (Holtzman et al. 2020,
    # arXiv:1904.09751); 1 keeps all.
    top_p: float = 1.0
    # Keep tokens at least this many times as probable as the most probable (Nguyen et al. 2024, arXiv:2407.01082); 0
    # keeps all.
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f'Sampling.temperature: expected 0 (greedy) or more, found {self.temperature}')
        if self.top_k < 0:
            raise ValueError(f'Sampling.top_k: expected 0 (off) or more, found {self.top_k}')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'Sampling.top_p: expected more than 0 and at most 1 (off), found {self.top_p}')
        if not 0 <= self.min_p <= 1:
            raise ValueError(f'Sampling.min_p: expected 0 (off) to 1, found {self.min_p}')


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


def _smallest_of_top_k(weight: jax.Array, top_k: jax.Array | int) -> jax.Array:
    """The smallest weight `[B, 1]` among the largest `top_k` of a row, a number or int `[B, 1]`; 0 for more than V."""
    return _largest_threshold(lambda t: jnp.sum(weight >= t, axis=-1, keepdims=True) >= top_k, weight.shape[0])


def _smallest_of_top_p(weight: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The smallest weight `[B, 1]` among the largest with a share of `top_p`, a number or float32 `[B, 1]`.

    It is 0 for infinity, and not for 1: the smallest weights may be too small to change the sum.
    """
    needed = top_p * _total(weight)[:, None]
    return _largest_threshold(lambda t: _total(jnp.where(weight >= t, weight, 0.0))[:, None] >= needed, weight.shape[0])


def _at_least(weight: jax.Array, smallest: jax.Array | float) -> jax.Array:
    return jnp.where(weight >= smallest, weight, 0.0)


def _filtered(weight: jax.Array, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """Zeroes the weights `[B, V]` that the filters remove. Weights are relative: the largest of each row is 1."""
    if top_k:
        weight = _at_least(weight, _smallest_of_top_k(weight, min(top_k, weight.shape[1])))
    if top_p < 1:
        weight = _at_least(weight, _smallest_of_top_p(weight, top_p))
    if min_p:
        weight = _at_least(weight, min_p)
    return weight


def _filtered_rows(weight: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The same with settings `[B, 1]`. The search of a filter that is off in all rows is left out."""
    batch, size = weight.shape

    def nothing(*_: jax.Array) -> jax.Array:
        return jnp.zeros((batch, 1), jnp.float32)

    k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size + 1)
    weight = _at_least(weight, jax.lax.cond(jnp.any(top_k > 0), _smallest_of_top_k, nothing, weight, k))
    p = jnp.where(top_p < 1, top_p, jnp.inf)
    weight = _at_least(weight, jax.lax.cond(jnp.any(top_p < 1), _smallest_of_top_p, nothing, weight, p))
    return _at_least(weight, min_p)


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


def _tempered(logits: jax.Array, token_mask: np.ndarray | jax.Array, temperature: jax.Array) -> jax.Array:
    """Tempered logits `[B, V]` of the allowed tokens, the largest of each row 0; a temperature of 0 leaves them."""
    logits = jnp.where(token_mask, logits / jnp.where(temperature == 0, 1.0, temperature), -jnp.inf)
    return logits - jnp.max(logits, axis=-1, keepdims=True)


def sample_token(
    logits: jax.Array,
    token_mask: np.ndarray | jax.Array,
    uniform: jax.Array,
    temperature: jax.Array | float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row by inverse CDF in token-id order, in float32, from one uniform number per row.

    A row's token depends on its own logits and number only. The number has 23 random bits, so that probabilities are
    exact to about 1e-7, the precision of float32 sums.

    Args:
        logits: float32 `[B, V]`.
        token_mask: bool `[V]` or `[B, V]`; at least one token of a row must be allowed.
        uniform: float32 `[B]` in [0, 1).
        temperature: a scalar; 0 takes the most probable token.
        top_k, top_p, min_p: static, as in `Sampling`.

    Returns:
        token: int32 `[B]`.
        log_prob: float32 `[B]`, in nats, of the tempered and *unfiltered* distribution over the allowed tokens, as
            `models.log_probs.token_log_probs` gives it for the same logits; 0 if greedy, the limit.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    greedy = temperature == 0
    logits = _tempered(logits, token_mask, temperature)
    weight = jnp.exp(logits)
    token = _inverse_cdf(_filtered(weight, top_k, top_p, min_p), uniform)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), token).astype(jnp.int32)
    log_prob = gather_per_row(logits, token) - jnp.log(jnp.sum(weight, axis=-1))
    return token, jnp.where(greedy, 0.0, log_prob)


@flax.struct.dataclass
class Draw:
    """Tokens of `sample_rows`, and the distributions that they were drawn from.

    Attributes:
        token: int32 `[B]`.
        log_prob: float32 `[B]`, of the token, in nats.
        weight: float32 `[B, V]`, the probabilities of all tokens times `exp(log_total)`; the largest of each row is 1.
        log_total: float32 `[B]`.
    """

    token: jax.Array
    log_prob: jax.Array
    weight: jax.Array
    log_total: jax.Array


def sample_rows(
    logits: jax.Array,
    allowed: jax.Array,
    uniform: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> Draw:
    """Draws a token per row, as `sample_token` does, by the row's own settings: no setting is a program of its own.

    The distributions in the result are those that were drawn from: tempered, over the allowed tokens that the filters
    keep. Where the temperature is 0 they are of temperature 1, without filters.

    Args:
        logits: float32 `[B, V]`.
        allowed: bool `[B, V]`; at least one token of a row must be allowed.
        uniform: float32 `[B]` in [0, 1).
        temperature, top_k, top_p, min_p: float32 `[B]`, top_k int32, as in `Sampling`.
    """
    greedy = temperature == 0
    logits = _tempered(logits, allowed, temperature[:, None])
    off = Sampling()
    weight = _filtered_rows(
        jnp.exp(logits),
        *(
            jnp.where(greedy, without, setting)[:, None]
            for setting, without in ((top_k, off.top_k), (top_p, off.top_p), (min_p, off.min_p))
        ),
    )
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), _inverse_cdf(weight, uniform)).astype(jnp.int32)
    log_total = jnp.log(jnp.sum(weight, axis=-1))
    return Draw(token, gather_per_row(logits, token) - log_total, weight, log_total)


def most_probable(draw: Draw, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` most probable tokens of each row, ids int32 `[B, count]` and log-probs float32 `[B, count]`, falling.

    Of equally probable tokens the lower id comes first. Where fewer tokens may come the rest have -inf.
    """
    weight, token = jax.lax.top_k(draw.weight, count)
    return token, jnp.log(weight) - draw.log_total[:, None]


def unpack_bits(words: jax.Array) -> jax.Array:
    """Bits of uint32 `[B, V / 32]` as bool `[B, V]`: bit i of word w is entry 32 w + i."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1).astype(bool)
