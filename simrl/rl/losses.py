"""The terms of the policy's and the critic's loss, each a number per token, and the weights that add them up.

Log-probabilities are in nats. The terms are elementwise; what is masked out never reaches a sum, because `weigh`
selects with `where`. Differences of log-probabilities that go into `exp` are clamped to +-`MAX_LOG_RATIO`, so that one
token cannot overflow; beyond it the gradient is 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from simrl.rl import masked

Aggregation = Literal['token_mean', 'seq_mean_token_mean', 'constant']
KL = Literal['none', 'k1', 'k2', 'k3']

MAX_LOG_RATIO = 20.0


def aggregation_weights(trained: jax.Array, aggregation: str, constant: float | None) -> jax.Array:
    """The weight of each token in the loss of a minibatch.

    Computed over the whole minibatch, before it is cut into microbatches: the losses of the microbatches then add up to
    that of the minibatch, however it is cut.

    Args:
        trained: bool `[B, T]`, the tokens of the whole minibatch that are learned from.
        aggregation: `token_mean`: each token the same. `seq_mean_token_mean`: each row the same, within it each token;
            a long reply's tokens count less. `constant`: a token counts 1 / (rows x `constant`), rows being those
            with trained tokens, so a row's weight grows with its length and a token's weight depends on no length.
        constant: tokens, read by `constant` only.

    Returns:
        float32 `[B, T]`, 0 at tokens not trained. It sums to 1, except with `constant`; to 0 where nothing is trained.
    """
    rows = masked.count(jnp.any(trained, axis=1))
    if aggregation == 'token_mean':
        weight = 1 / jnp.maximum(masked.count(trained), 1)
    elif aggregation == 'seq_mean_token_mean':
        weight = 1 / jnp.maximum(masked.count(trained, axis=1, keepdims=True) * rows, 1)
    elif aggregation == 'constant':
        assert constant is not None
        weight = 1 / (jnp.maximum(rows, 1) * constant)
    else:
        raise ValueError(f'aggregation: unknown name {aggregation!r}')
    return jnp.where(trained, weight, 0.0)


def weigh(per_token: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted sum of `per_token` `[B, T]`, a float32 scalar; tokens of weight 0 are left out, NaN or not."""
    return jnp.sum(jnp.where(weight > 0, per_token * weight, 0.0))


def log_ratio(log_prob: jax.Array, other: jax.Array) -> jax.Array:
    """`log_prob - other`, clamped."""
    return jnp.clip(log_prob - other, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347), with a lower and an upper clip range.

    Returns:
        loss: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old.
        ratio: r.
    """
    ratio = jnp.exp(log_ratio(log_prob, old_log_prob))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage), ratio


def kl_estimate(log_prob: jax.Array, ref_log_prob: jax.Array, kl: str) -> jax.Array:
    """An estimate of KL(pi || ref) at one token sampled from pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log ref at the sampled token:

    `k1` is d. Unbiased. As a *loss* it does nothing on average: the gradient of d is that of log pi, whose expectation
        under pi is 0. In the *reward* it is right: the policy gradient of the penalty -d is that of -KL(pi || ref).
        `AlgorithmSettings` therefore puts k1 in the reward and nowhere else.
    `k2` is d^2 / 2. Biased as a value; its gradient, d grad log pi, has under pi exactly the expectation
        grad KL(pi || ref), the reverse KL.
    `k3` is exp(-d) + d - 1. Unbiased and never negative as a value; its gradient, (1 - ref / pi) grad log pi, has under
        pi the expectation -E_ref[grad log pi] = grad KL(ref || pi), the *forward* KL. The two gradients agree only to
        first order in d.

    "Under pi" means tokens drawn from pi itself: exact in a batch's first update, approximate in later ones. And each
    statement is per token given its prefix: how a token changes the KL of later ones is in k1's reward only.
    """
    if kl == 'k1':
        return log_prob - ref_log_prob
    if kl == 'k2':
        return 0.5 * jnp.square(log_prob - ref_log_prob)
    if kl == 'k3':
        difference = log_ratio(log_prob, ref_log_prob)
        return jnp.exp(-difference) + difference - 1
    raise ValueError(f"kl: expected 'k1', 'k2' or 'k3', found {kl!r}")


def value_loss(value: jax.Array, old_value: jax.Array, returns: jax.Array, clip: float | None) -> jax.Array:
    """Half the squared error of the critic; with `clip`, the larger of it and that of a value held near the old one.

    Args:
        clip: how far, in units of reward, a value may move from `old_value` before its gradient stops; None: no limit.
    """
    error = jnp.square(value - returns)
    if clip is not None:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error
