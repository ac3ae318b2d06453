"""Terms of the policy's and the critic's loss, one number per token, and the weights that sum them.

Log-probabilities are in nats. Terms are elementwise; `weigh` selects with `where`, so masked tokens never reach a sum.
Log-ratios are clamped to +-`MAX_LOG_RATIO` before `exp`, so that no token overflows; beyond it the gradient is 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from simrl.rl import masked

Aggregation = Literal['token_mean', 'seq_mean_token_mean', 'constant']
KL = Literal['none', 'k1', 'k2', 'k3']

MAX_LOG_RATIO = 20.0


def aggregation_weights(trained: jax.Array, aggregation: str, constant: float | None) -> jax.Array:
    """Computes the weight of each token in the loss of a minibatch.

    Weights are normalised over the whole minibatch, so the losses of its microbatches add up to its loss for any split.

    Args:
        trained: bool `[B, T]`, trained tokens of the whole minibatch.
        aggregation: `token_mean`: equal weight for tokens. `seq_mean_token_mean`: equal weight for rows, and for tokens
            within a row; tokens of long rows weigh less. `constant`: 1 / (rows x `constant`) per token, with the number
            of rows that have trained tokens; a row's weight grows with its length.
        constant: in tokens; read by `constant` only.

    Returns:
        float32 `[B, T]`, 0 at untrained tokens. The sum is 1, except with `constant`; 0 if nothing is trained.
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
    """Weighted sum of `per_token` `[B, T]`, a float32 scalar; tokens of weight 0 are left out, even NaN."""
    return jnp.sum(jnp.where(weight > 0, per_token * weight, 0.0))


def log_ratio(log_prob: jax.Array, other: jax.Array) -> jax.Array:
    """`log_prob - other`, clamped to +-`MAX_LOG_RATIO`."""
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
    """Estimates KL(pi || ref) at one token sampled from pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log ref at the sampled token:

    `k1` is d. It is unbiased. As a *loss* it has no effect on average: its gradient, grad log pi, has expectation 0
        under pi. In the *reward* it is correct: the policy gradient of the penalty -d is that of -KL(pi || ref).
        `AlgorithmSettings` therefore uses k1 in the reward only.
    `k2` is d^2 / 2. It is biased. The expectation under pi of its gradient, d grad log pi, is exactly
        grad KL(pi || ref), the reverse KL.
    `k3` is exp(-d) + d - 1. It is unbiased and never negative. The expectation under pi of its gradient,
        (1 - ref / pi) grad log pi, is -E_ref[grad log pi] = grad KL(ref || pi), the *forward* KL. The two gradients
        agree to first order in d only.

    "Under pi" means tokens drawn from pi itself: exact in a batch's first update, approximate in later ones. All
    statements are per token given its prefix. Only k1 in the reward includes a token's effect on later tokens' KL.
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
    """Half the squared error of the critic; with `clip`, the larger of this and the error of the clipped value.

    Args:
        clip: largest change from `old_value`, in reward, before the gradient stops; None: no limit.
    """
    error = jnp.square(value - returns)
    if clip is not None:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error
