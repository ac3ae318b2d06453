"""Supervised fine-tuning of either side of a conversation: maximum likelihood of the trained tokens.

Which tokens are trained is data (a mask per token), so the same step fits a user simulator on people's turns and an
assistant on assistants' turns. The softmax runs over the tokens that the sampler may draw, so that training and
sampling speak of the same distribution.
"""

import functools

import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.training.optimizer import Optimizer, TrainState, apply_gradients


def token_losses(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    trained: jax.Array,
    allowed: jax.Array,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums over the trained tokens of a batch.

    Args:
        tokens: int32 `[B, T]`, left-aligned.
        trained: bool `[B, T]`; a row's first token has no prediction and is never trained.
        allowed: bool `[V]`, the tokens that the trained role may sample.

    Returns:
        `loss`, the negative log-likelihood, and `entropy`, in nats: each (sum, number of trained tokens).
    """
    mask = trained[:, 1:]
    hidden, _ = transformer.apply(params, config, execution, tokens)
    # Untrained targets (headers, padding) may be tokens that are not allowed, whose log-probability is -inf.
    targets = jnp.where(mask, tokens[:, 1:], jnp.argmax(allowed))
    log_prob, entropy = transformer.token_log_probs(
        params, hidden[:, :-1], targets, allowed, chunk=execution.log_prob_chunk
    )
    count = jnp.sum(mask).astype(jnp.float32)
    return {
        'loss': (-jnp.sum(log_prob, where=mask), count),
        'entropy': (jnp.sum(entropy, where=mask), count),
    }


@functools.partial(jax.jit, static_argnames=('config', 'execution', 'optimizer'), donate_argnames='state')
def train_step(
    state: TrainState,
    tokens: jax.Array,
    trained: jax.Array,
    allowed: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    optimizer: Optimizer,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """One gradient step on the mean loss per trained token of a batch; see `token_losses` for the shapes."""

    def loss_fn(params: Params) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        metrics = token_losses(params, config, execution, tokens, trained, allowed)
        total, count = metrics['loss']
        return total / jnp.maximum(count, 1), metrics

    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, update_metrics = apply_gradients(state, gradients, loss, optimizer)
    return state, metrics | update_metrics


@functools.partial(jax.jit, static_argnames=('config', 'execution'))
def eval_step(
    params: Params,
    tokens: jax.Array,
    trained: jax.Array,
    allowed: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The metrics of `token_losses` without a gradient."""
    return token_losses(params, config, execution, tokens, trained, allowed)
