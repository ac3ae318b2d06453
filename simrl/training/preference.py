"""Training a reward model on pairs of replies (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

A batch holds each pair as two neighbouring rows, the chosen reply first. The loss of a pair is
-log sigmoid(score of chosen - score of rejected), a score being the head's value at the reply's end-of-turn.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simrl.conversations.records import Preference
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.reward_model import score_rows
from simrl.training.optimizer import Optimizer, TrainState, apply_gradients


def pair_losses(
    params: Params, config: TransformerConfig, execution: Execution, tokens: jax.Array, length: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums over a batch of pairs.

    Args:
        tokens: int32 `[2 P, T]`; rows 2p and 2p + 1 are the chosen and the rejected reply of pair p.
        length: int32 `[2 P]`, 0 in both rows of a pair that only fills the batch.

    Returns:
        `loss` (nats), `accuracy` (a tie counts one half) and `margin`, each (sum, number of pairs).
    """
    score = score_rows(params, config, execution, tokens, jnp.maximum(length - 1, 0)[:, None])[:, 0]
    margin = score[0::2] - score[1::2]
    real = length[0::2] > 0
    count = jnp.sum(real).astype(jnp.float32)
    correct = jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32))
    parts = {'loss': -jax.nn.log_sigmoid(margin), 'accuracy': correct, 'margin': margin}
    return {name: (jnp.sum(part, where=real), count) for name, part in parts.items()}


@functools.partial(jax.jit, static_argnames=('config', 'execution', 'optimizer'), donate_argnames='state')
def train_step(
    state: TrainState,
    tokens: jax.Array,
    length: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    optimizer: Optimizer,
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """One gradient step on a batch of pairs; see `pair_losses` for the shapes."""

    def loss_fn(params: Params) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        metrics = pair_losses(params, config, execution, tokens, length)
        total, count = metrics['loss']
        return total / jnp.maximum(count, 1), metrics

    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, update_metrics = apply_gradients(state, gradients, loss, optimizer)
    return state, metrics | update_metrics


@functools.partial(jax.jit, static_argnames=('config', 'execution'))
def eval_step(
    params: Params, tokens: jax.Array, length: jax.Array, *, config: TransformerConfig, execution: Execution
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The metrics of `pair_losses` without a gradient."""
    return pair_losses(params, config, execution, tokens, length)


def longer_wins(pairs: Sequence[Preference]) -> list[float]:
    """Per pair 1.0 where the chosen reply has more characters, 0.0 where it has fewer, 0.5 at a tie.

    The column that a reward model's accuracy is read against: a model that does no better has learnt length.
    """
    return [
        0.5 if len(pair.chosen) == len(pair.rejected) else float(len(pair.chosen) > len(pair.rejected))
        for pair in pairs
    ]
