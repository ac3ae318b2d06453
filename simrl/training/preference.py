"""Training a reward model on pairs of replies (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

The loss of a pair is -log sigmoid(score of the chosen reply - score of the rejected one), a score being the reward
head's value at the reply's end-of-turn.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import Batch, Batches, BatchSettings, stack_preferences
from simrl.conversations.records import Preference
from simrl.conversations.views import PreferenceRow
from simrl.models import placement, transformer
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.reward_model import score_rows
from simrl.run.progress import Progress
from simrl.training import loop
from simrl.training.loop import LoopSettings, StepResult
from simrl.training.optimizer import (
    Metrics,
    Optimizer,
    OptimizerSettings,
    TrainState,
    apply_gradients,
    jit_step,
    make_optimizer,
    place_state,
)


@dataclasses.dataclass(frozen=True)
class PreferenceSettings:
    """A reward model's training run."""

    steps: int  # optimizer steps
    batch: BatchSettings  # batch.batch_size counts pairs
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f'PreferenceSettings.steps: expected at least 1, found {self.steps}')


def pair_margins(
    params: Params, config: TransformerConfig, execution: Execution, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Score of chosen less score of rejected, float32 `[P]`, and whether a pair is there, bool `[P]`.

    Args:
        batch: from `stack_preferences`: rows 2p and 2p + 1 are the chosen and the rejected reply of pair p.
    """
    length = jnp.asarray(batch.length)
    last = jnp.maximum(length - 1, 0)[:, None]
    score = score_rows(params, config, execution, jnp.asarray(batch.tokens), last)[:, 0]
    return score[0::2] - score[1::2], length[0::2] > 0


def pair_losses(margin: jax.Array, real: jax.Array) -> Metrics:
    """`loss` (nats), `accuracy` (a tie counts one half) and `margin` of `[P]` pairs, each (sum, number of pairs)."""
    count = jnp.sum(real, dtype=jnp.float32)
    correct = jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32))
    parts = {'loss': -jax.nn.log_sigmoid(margin), 'accuracy': correct, 'margin': margin}
    return {name: (jnp.sum(part, where=real), count) for name, part in parts.items()}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: TransformerConfig,
    execution: Execution,
    optimizer: Optimizer,
) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean loss of a batch's pairs. Pure; `jit_step` compiles it."""

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        sums = pair_losses(*pair_margins(params, config, execution, batch))
        total, count = sums['loss']
        return total / jnp.maximum(count, 1), sums

    (loss, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, update_metrics = apply_gradients(state, gradients, optimizer, loss=loss)
    return state, sums | update_metrics


@functools.partial(jax.jit, static_argnames=('config', 'execution'))
def eval_step(params: Params, batch: Batch, *, config: TransformerConfig, execution: Execution) -> jax.Array:
    """The margins of a batch's pairs, float32 `[P]`."""
    return pair_margins(params, config, execution, batch)[0]


def margins(
    params: Params,
    rows: Sequence[PreferenceRow],
    settings: BatchSettings,
    *,
    config: TransformerConfig,
    execution: Execution,
    mesh: Mesh,
) -> np.ndarray:
    """The margin of every row, float32 `[len(rows)]`, in their order."""
    batches = Batches(rows, settings, stack_preferences)
    out = np.full(len(rows), np.nan, np.float32)
    with jax.set_mesh(mesh), Progress('held-out pairs', batches.batches_per_epoch) as progress:
        for i in range(batches.batches_per_epoch):
            batch = batches.batch(i)
            margin = eval_step(params, placement.shard_batch(batch, mesh), config=config, execution=execution)
            index = batch.index[0::2]
            out[index[index >= 0]] = placement.to_host(margin)[index >= 0]
            progress.update(tokens=int(np.sum(batch.length)))
    return out


def fit(
    folder: pathlib.Path,
    params: Params,
    rows: Sequence[PreferenceRow],
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: PreferenceSettings,
    loop_settings: LoopSettings,
    mesh: Mesh,
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains a reward model `{'decoder', 'reward_head'}` from a decoder; its head starts at zero.

    Args:
        folder: of the run; see `loop.run`, also for what is raised.
        params: float32 `{'decoder'}`, where to start.
        rows: from `views.preference_rows`, no longer than the longest of `settings.batch.lengths`.

    Returns:
        The state after the last step.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    batches = Batches(rows, settings.batch, stack_preferences)
    start = {'decoder': params['decoder'], 'reward_head': transformer.init_head(config)}
    state, state_sharding = place_state(start, config, optimizer, mesh)
    update = jit_step(
        functools.partial(train_step, config=config, execution=execution, optimizer=optimizer), state_sharding
    )

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        batch = batches.batch(step)
        tokens = int(np.sum(batch.length))
        state, measured = update(state, placement.shard_batch(batch, mesh))
        return state, StepResult(measured, tokens=tokens)

    with jax.set_mesh(mesh):
        return loop.run(
            folder,
            state,
            step_fn,
            loop_settings,
            num_steps=settings.steps,
            name='reward_model',
            hyperparameters=hyperparameters,
        )


def longer_wins(pairs: Sequence[Preference]) -> list[float]:
    """Per pair 1.0 where the chosen reply has more characters, 0.0 where it has fewer, 0.5 at a tie.

    The column that a reward model's accuracy is read against: a model that does no better has learnt length.
    """
    return [
        0.5 if len(pair.chosen) == len(pair.rejected) else float(len(pair.chosen) > len(pair.rejected))
        for pair in pairs
    ]
