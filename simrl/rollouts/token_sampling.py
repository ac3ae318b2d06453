"""Logits and a uniform number in, a token out, by inverse CDF.

1. `sample_token` draws one token per row; all rows have the same settings, and filters that are off cost nothing.
2. `sample_rows` draws the same tokens where each row has settings of its own, in one program.

Letters: B rows, V padded vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.models.rows import gather_per_row
from simrl.rollouts.vocabulary import BLOCK, Part, on_own_tokens, total


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


def _last_positive(x: jax.Array) -> jax.Array:
    """Index of the last positive entry along the last axis (the last index where there is none)."""
    return x.shape[-1] - 1 - jnp.argmax(x[..., ::-1] > 0, axis=-1)


def _largest_threshold(holds: Callable[[jax.Array], jax.Array], batch: int, part: Part) -> jax.Array:
    """The largest float32 `[B, 1]` in [0, 1] for which `holds` is true, by a search through its bits.

    The bits of floats that are not negative are ordered as the floats are, and those up to 1.0 are less than 2^30;
    sorting a vocabulary costs far more on a CPU. If devices have parts of the vocabulary they wait for each other in
    every round: then three bits are found at once.

    Args:
        holds: of thresholds `[B, n]`. It is true of 0, and of anything smaller than what it is true of.
    """
    bits = 1 if part.shards == 1 else 3

    def find_digit(number: jax.Array, low: jax.Array) -> jax.Array:
        digit = jnp.left_shift(1, 30 - bits * (number + 1))
        held = holds(jax.lax.bitcast_convert_type(low + digit * jnp.arange(1, 1 << bits), jnp.float32))
        return low + digit * jnp.sum(held, axis=1, keepdims=True, dtype=jnp.int32)

    low = jax.lax.fori_loop(0, 30 // bits, find_digit, jnp.zeros((batch, 1), jnp.int32))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _smallest_of_top_k(weight: jax.Array, top_k: jax.Array | int, part: Part) -> jax.Array:
    """The smallest weight `[B, 1]` among the largest `top_k` of a row, a number or int `[B, 1]`; 0 for more than V."""

    def holds(threshold: jax.Array) -> jax.Array:
        return part.sum(jnp.sum(weight[:, None] >= threshold[:, :, None], axis=-1)) >= top_k

    return _largest_threshold(holds, weight.shape[0], part)


def _smallest_of_top_p(weight: jax.Array, top_p: jax.Array | float, part: Part) -> jax.Array:
    """The smallest weight `[B, 1]` among the largest with a share of `top_p`, a number or float32 `[B, 1]`.

    It is 0 for infinity, and not for 1: the smallest weights may be too small to change the sum.
    """
    needed = top_p * part.sum(total(weight))[:, None]

    def holds(threshold: jax.Array) -> jax.Array:
        kept = jnp.where(weight[:, None] >= threshold[:, :, None], weight[:, None], 0.0)
        return part.sum(total(kept)) >= needed

    return _largest_threshold(holds, weight.shape[0], part)


def _at_least(weight: jax.Array, smallest: jax.Array | float) -> jax.Array:
    return jnp.where(weight >= smallest, weight, 0.0)


def _filtered(weight: jax.Array, part: Part, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """Zeroes the weights `[B, V]` that the filters remove. Weights are relative: the largest of each row is 1."""
    if top_k:
        weight = _at_least(weight, _smallest_of_top_k(weight, min(top_k, weight.shape[1] * part.shards), part))
    if top_p < 1:
        weight = _at_least(weight, _smallest_of_top_p(weight, top_p, part))
    if min_p:
        weight = _at_least(weight, min_p)
    return weight


def _filtered_rows(weight: jax.Array, part: Part, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The same with settings `[B, 1]`. The search of a filter that is off in all rows is left out."""
    batch, size = weight.shape[0], weight.shape[1] * part.shards

    def nothing(*_: jax.Array) -> jax.Array:
        return jnp.zeros((batch, 1), jnp.float32)

    smallest_of_top_k, smallest_of_top_p = (
        functools.partial(smallest, part=part) for smallest in (_smallest_of_top_k, _smallest_of_top_p)
    )
    k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size + 1)
    weight = _at_least(weight, jax.lax.cond(jnp.any(top_k > 0), smallest_of_top_k, nothing, weight, k))
    p = jnp.where(top_p < 1, top_p, jnp.inf)
    weight = _at_least(weight, jax.lax.cond(jnp.any(top_p < 1), smallest_of_top_p, nothing, weight, p))
    return _at_least(weight, min_p)


def _first_past(weight: jax.Array, summed: jax.Array, target: jax.Array) -> jax.Array:
    """The first index with a positive weight whose prefix sum exceeds the target; else the last positive one."""
    past = (summed > target[:, None]) & (weight > 0)
    return jnp.where(jnp.any(past, axis=-1), jnp.argmax(past, axis=-1), _last_positive(weight))


def _inverse_cdf(weight: jax.Array, uniform: jax.Array, part: Part) -> jax.Array:
    """The token at which the cumulated weights `[B, V]` pass `uniform` times their total.

    First a block of `BLOCK` tokens is found, then the token in it. Everything that decides about token i is computed
    from tokens <= i in an order that their number does not change: a block has 128 tokens in any vocabulary,
    `_prefix_sum` is a tree that depends on i alone, and the total is the prefix sum at the last positive block and not
    at the last one. So zeros appended to the vocabulary, and devices that it is split over, change nothing, to the last
    bit.

    Prefix sums of this kind need not rise with the index by the last bit, so that a weight of 0 is excluded by itself.
    """
    blocks = part.blocks(weight)
    sums = blocks.sums()
    summed = _prefix_sum(sums)
    target = uniform * gather_per_row(summed, _last_positive(sums))
    block = _first_past(sums, summed, target)
    before = jnp.where(block > 0, gather_per_row(summed, jnp.maximum(block - 1, 0)), 0.0)
    chosen = blocks.one(block)
    return block * BLOCK + _first_past(chosen, _prefix_sum(chosen), target - before)


def _tempered(logits: jax.Array, token_mask: np.ndarray | jax.Array, temperature: jax.Array, part: Part) -> jax.Array:
    """Tempered logits `[B, V]` of the allowed tokens, the largest of each row 0; a temperature of 0 leaves them."""
    logits = jnp.where(token_mask, logits / jnp.where(temperature == 0, 1.0, temperature), -jnp.inf)
    return logits - part.max(jnp.max(logits, axis=-1, keepdims=True))


def _drawn(logits: jax.Array, weight: jax.Array, uniform: jax.Array, greedy: jax.Array, part: Part) -> jax.Array:
    """Tokens int32 `[B]` by the weights; if `greedy`, a scalar or `[B]`, the first one whose logit is largest, 0."""
    columns = greedy[..., None]
    weight = jnp.where(columns, jnp.where(logits == 0, 1.0, 0.0), weight)
    return _inverse_cdf(weight, jnp.where(greedy, 0.0, uniform), part).astype(jnp.int32)


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
        temperature: a scalar or `[B]`; 0 takes the most probable token.
        top_k, top_p, min_p: static, as in `Sampling`.

    Returns:
        token: int32 `[B]`.
        log_prob: float32 `[B]`, in nats, of the tempered and *unfiltered* distribution over the allowed tokens, as
            `models.log_probs.token_log_probs` gives it for the same logits; 0 if greedy, the limit.
    """

    def sample(
        part: Part, logits: jax.Array, token_mask: jax.Array, uniform: jax.Array, temperature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        greedy = temperature == 0
        logits = _tempered(logits, token_mask, temperature[..., None], part)
        weight = jnp.exp(logits)
        token = _drawn(logits, _filtered(weight, part, top_k, top_p, min_p), uniform, greedy, part)
        log_prob = part.entry(logits, token) - jnp.log(part.sum(jnp.sum(weight, axis=-1)))
        return token, jnp.where(greedy, 0.0, log_prob)

    temperature = jnp.asarray(temperature, jnp.float32)
    return on_own_tokens(sample, logits, token_mask, uniform, temperature, split=(False, False))


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

    def sample(
        part: Part,
        logits: jax.Array,
        allowed: jax.Array,
        uniform: jax.Array,
        temperature: jax.Array,
        *settings: jax.Array,
    ) -> Draw:
        greedy, off = temperature == 0, Sampling()
        logits = _tempered(logits, allowed, temperature[:, None], part)
        weight = _filtered_rows(
            jnp.exp(logits),
            part,
            *(
                jnp.where(greedy, without, setting)[:, None]
                for setting, without in zip(settings, (off.top_k, off.top_p, off.min_p), strict=True)
            ),
        )
        token = _drawn(logits, weight, uniform, greedy, part)
        log_total = jnp.log(part.sum(jnp.sum(weight, axis=-1)))
        return Draw(token, part.entry(logits, token) - log_total, weight, log_total)

    split = Draw(token=False, log_prob=False, weight=True, log_total=False)  # type: ignore[arg-type]
    return on_own_tokens(sample, logits, allowed, uniform, temperature, top_k, top_p, min_p, split=split)


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
