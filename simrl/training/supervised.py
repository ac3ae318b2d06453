"""Gradient steps on a fixed data set: the one fit behind fine-tuning (`sft`) and reward models (`preference`).

1. Place the trained parameters, with the optimizer's moments, in training shards.
2. Each step takes the next batch and steps on the mean loss of its entries (tokens or pairs).
3. `loop.run` logs, evaluates, saves and resumes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import Batch, Batches, BatchSettings
from simrl.models import placement
from simrl.models.transformer import Params, TransformerConfig
from simrl.run import compiles
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

LossSums = Callable[..., Metrics]  # (params, batch, *inputs) -> (sum, number) by name, 'loss' among them


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Steps, batches and optimizer of a fit."""

    steps: int  # optimizer steps
    batch: BatchSettings
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f'{type(self).__name__}.steps: expected at least 1, found {self.steps}')


def train_step(
    state: TrainState, frozen: Params, batch: Batch, *inputs: jax.Array, loss_sums: LossSums, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
    """Takes one gradient step on the mean loss of a batch. Pure; `jit_step` compiles it.

    Args:
        frozen: parameters that the loss reads and the step leaves unchanged; see `partition.trained_and_frozen`.
        inputs: further arguments of `loss_sums`.
    """

    def mean_loss(trained: Params) -> tuple[jax.Array, Metrics]:
        sums = loss_sums({**frozen, **trained}, batch, *inputs)
        total, number = sums['loss']
        return total / jnp.maximum(number, 1), sums

    (loss, sums), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    state, update_metrics = apply_gradients(state, gradients, optimizer, loss=loss)
    return state, sums | update_metrics


def fit(
    folder: pathlib.Path,
    load: Callable[[], tuple[Params, Params]],
    batches: Batches[Any, Batch],
    loss_sums: LossSums,
    *inputs: jax.Array,
    config: TransformerConfig,
    settings: FitSettings,
    loop_settings: LoopSettings,
    mesh: Mesh,
    name: str,
    evaluate: Callable[[Params], Metrics] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Minimises the mean loss over `batches`.

    Once the first step begins, nothing here holds the trained parameters that were loaded: the state has its own.

    Args:
        folder: of the run; see `loop.run`, also for errors.
        load: makes the trained and the frozen parameters before the first step.
        loss_sums: hashable; `inputs` are its arguments after the batch.
        name: of the training in progress bars and profiles.
        evaluate: metrics of all parameters, every `loop_settings.evaluate_every` steps.

    Returns:
        The state after the last step.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    trained, frozen = load()
    state, state_sharding = place_state(trained, config, optimizer, mesh)
    del trained
    update = jit_step(functools.partial(train_step, loss_sums=loss_sums, optimizer=optimizer), state_sharding)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        batch = batches.batch(step)
        state, measured = update(state, frozen, placement.shard_batch(batch, mesh), *inputs)
        return state, StepResult(measured, tokens=int(np.sum(batch.length)))

    lengths = len(settings.batch.lengths)
    bound = {'train_step': lengths} if evaluate is None else {'train_step': lengths, 'eval_step': lengths}
    print(f'{name}: {compiles.stated(bound)}', flush=True)
    evaluate_fn = None if evaluate is None else lambda state, _: evaluate({**frozen, **state.params})
    with jax.set_mesh(mesh):
        return loop.run(
            folder,
            state,
            step_fn,
            loop_settings,
            num_steps=settings.steps,
            name=name,
            evaluate_fn=evaluate_fn,
            hyperparameters={**(hyperparameters or {}), 'programs_at_most': sum(bound.values())},
        )
