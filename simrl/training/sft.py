"""Supervised fine-tuning of either side of a conversation: maximum likelihood of the trained tokens.

Which tokens are trained is data (a mask per token), so the same code fits a user simulator on people's turns and an
assistant on assistants' turns. The softmax runs over the tokens that the sampler may draw, so that training and
sampling speak of the same distribution.
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

from simrl.conversations.batches import Batch, Batches, BatchSettings, stack
from simrl.conversations.views import Rendered
from simrl.models import placement
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.run import metrics
from simrl.run.progress import Progress
from simrl.training import loop, partition, scoring
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
class SFTSettings:
    """A fine-tuning run."""

    steps: int  # optimizer steps
    batch: BatchSettings  # batch.seed is also the seed of the adapters' initial values
    optimizer: OptimizerSettings
    lora: LoRASettings | None = None  # None: every weight is trained

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f'SFTSettings.steps: expected at least 1, found {self.steps}')


def token_losses(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    batch: Batch,
    token_mask: jax.Array,
) -> Metrics:
    """Sums over the trained tokens of a batch. A row's first token has no prediction and is never trained.

    Args:
        batch: `[B, T]` rows.
        token_mask: bool `[V]`, the tokens that the trained role may sample.

    Returns:
        `loss`, the negative log-likelihood, and `entropy`, in nats: each (sum, number of trained tokens).
    """
    tokens = jnp.asarray(batch.tokens)
    trained = jnp.asarray(batch.trained) & (jnp.arange(tokens.shape[1]) > 0)
    scores = scoring.score(params, config, execution, tokens, trained, token_mask, 1.0)
    count = jnp.sum(trained, dtype=jnp.float32)
    return {'loss': (-jnp.sum(scores.log_prob), count), 'entropy': (jnp.sum(scores.entropy), count)}


def train_step(
    state: TrainState,
    batch: Batch,
    token_mask: jax.Array,
    frozen: Params,
    *,
    config: TransformerConfig,
    execution: Execution,
    optimizer: Optimizer,
) -> tuple[TrainState, Metrics]:
    """One gradient step on the mean loss per trained token of a batch. Pure; `jit_step` compiles it.

    Args:
        frozen: of `partition.trained_and_frozen`.
    """

    def loss_fn(trained: Params) -> tuple[jax.Array, Metrics]:
        sums = token_losses({**frozen, **trained}, config, execution, batch, token_mask)
        total, count = sums['loss']
        return total / jnp.maximum(count, 1), sums

    (loss, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, update_metrics = apply_gradients(state, gradients, optimizer, loss=loss)
    return state, sums | update_metrics


@functools.partial(jax.jit, static_argnames=('config', 'execution', 'ends'))
def eval_step(
    params: Params,
    batch: Batch,
    token_mask: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    ends: tuple[int, ...],
) -> Metrics:
    """The metrics of `token_losses` without a gradient, and `content_loss`, the loss of what is none of `ends`."""
    content: Any = jnp.asarray(batch.trained) & ~jnp.isin(jnp.asarray(batch.tokens), jnp.array(ends, jnp.int32))
    content_loss = token_losses(params, config, execution, dataclasses.replace(batch, trained=content), token_mask)[
        'loss'
    ]
    return token_losses(params, config, execution, batch, token_mask) | {'content_loss': content_loss}


def held_out_loss(
    params: Params,
    batches: Batches[Rendered, Batch],
    token_mask: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    mesh: Mesh,
    ends: tuple[int, ...],
) -> Metrics:
    """The metrics of `eval_step` over all rows of `batches`, under the prefix `held_out/`."""
    total: Mapping[str, Any] = {}
    with Progress('held out', batches.batches_per_epoch) as progress:
        for i in range(batches.batches_per_epoch):
            batch = batches.batch(i)
            placed = placement.shard_batch(batch, mesh)
            measured = eval_step(params, placed, token_mask, config=config, execution=execution, ends=ends)
            total = metrics.add(total, metrics.fetch(measured))
            progress.update(tokens=int(np.sum(batch.length)))
    return {f'held_out/{name}': pair for name, pair in total.items()}


def fine_tune(
    folder: pathlib.Path,
    params: Params,
    rows: Sequence[Rendered],
    held_out: Sequence[Rendered],
    *,
    config: TransformerConfig,
    token_mask: np.ndarray,
    execution: Execution,
    settings: SFTSettings,
    loop_settings: LoopSettings,
    mesh: Mesh,
    ends: tuple[int, ...] = (),
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Fits `params`, or adapters to them, to the trained tokens of `rows`.

    Args:
        folder: of the run; see `loop.run`, also for what is raised.
        params: float32 `{'decoder'}`, where to start.
        rows, held_out: from `conversations.views`, no longer than the longest of `settings.batch.lengths`. The held-out
            loss is measured before, after, and every `loop_settings.evaluate_every` steps.
        token_mask: bool `[V]`, the tokens that the trained role may sample.
        ends: tokens that end messages and conversations. The held-out loss is measured without them as well: a terminal
            token that starts as a copy of end-of-turn takes half of its probability, so that the first steps lower the
            loss of every end whatever is learnt.

    Returns:
        The state after the last step; `partition.whole_decoder` makes one model of it.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    batches = Batches(rows, settings.batch, stack)
    held_out_batches = Batches(held_out, settings.batch, stack)
    trained, frozen = partition.trained_and_frozen(
        params, config, settings.lora, seed=settings.batch.seed, dtype=execution.dtype, mesh=mesh
    )
    state, state_sharding = place_state(trained, config, optimizer, mesh)
    mask = jnp.asarray(token_mask)
    update = jit_step(
        functools.partial(train_step, config=config, execution=execution, optimizer=optimizer), state_sharding
    )

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        batch = batches.batch(step)
        tokens = int(np.sum(batch.length))
        state, measured = update(state, placement.shard_batch(batch, mesh), mask, frozen)
        return state, StepResult(measured, tokens=tokens)

    def evaluate_fn(state: TrainState, _: int) -> Metrics:
        params = {**frozen, **state.params}
        return held_out_loss(params, held_out_batches, mask, config=config, execution=execution, mesh=mesh, ends=ends)

    with jax.set_mesh(mesh):
        return loop.run(
            folder,
            state,
            step_fn,
            loop_settings,
            num_steps=settings.steps,
            name='sft',
            evaluate_fn=evaluate_fn,
            hyperparameters=hyperparameters,
        )
