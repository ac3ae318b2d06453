"""Gradient steps on a fixed data set: the one fit behind fine-tuning (`sft`) and reward models (`preference`).

1. Place the trained parameters, with the optimizer's moments, in training shards.
2. Each step takes the next batch and steps on the mean loss of its entries (tokens or pairs).
3. `loop.run` logs, evaluates, saves and resumes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from simrl.conversations.batches import Batch, Batches, BatchSettings
from simrl.models import placement
from simrl.models.transformer import Params, TransformerConfig
from simrl.run import compiles
from simrl.run.compiles import Program, abstract
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


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics between steps.

    Attributes:
        measure: all parameters -> metrics.
        programs: all parameters -> the programs of `measure`.
    """

    measure: Callable[[Params], Metrics]
    programs: Callable[[Params], Iterator[Program]]


def bucket_programs(
    name: str, batches: Batches[Any, Batch], mesh: Mesh, lower: Callable[[Batch], Lowered]
) -> Iterator[Program]:
    """The programs of a function of batches: one for each length bucket that has rows."""

    def of_length(length: int) -> Lowered:
        return lower(abstract(placement.shard_batch(batches.empty(length), mesh)))

    for length in batches.lengths:
        yield Program(name, functools.partial(of_length, length))


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
    evaluation: Evaluation | None = None,
    compile_threads: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Minimises the mean loss over `batches`.

    Once the first step begins, nothing here holds the trained parameters that were loaded: the state has its own.

    Args:
        folder: of the run; see `loop.run`, also for errors.
        load: makes the trained and the frozen parameters before the first step.
        loss_sums: hashable; `inputs` are its arguments after the batch.
        name: of the training in progress bars and profiles.
        evaluation: every `loop_settings.evaluate_every` steps.
        compile_threads: threads that compile the programs before the first step; 0: each is compiled once it is called.

    Returns:
        The state after the last step.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    trained, frozen = load()
    state, state_sharding = place_state(trained, config, optimizer, mesh)
    del trained
    update: Any = jit_step(functools.partial(train_step, loss_sums=loss_sums, optimizer=optimizer), state_sharding)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        batch = batches.batch(step)
        state, measured = update(state, frozen, placement.shard_batch(batch, mesh), *inputs)
        return state, StepResult(measured, tokens=int(np.sum(batch.length)))

    def walk() -> Iterator[Program]:
        if evaluation is not None:
            yield from evaluation.programs({**frozen, **state.params})
        yield from bucket_programs(
            'train_step', batches, mesh, lambda batch: update.lower(state, frozen, batch, *inputs)
        )

    bound = compiles.counted(walk())
    print(f'{name}: {compiles.stated(bound)}', flush=True)
    evaluate_fn = None if evaluation is None else lambda state, _: evaluation.measure({**frozen, **state.params})
    with compiles.compilations() as compiled, jax.set_mesh(mesh):
        if compile_threads:
            compiles.compile_ahead(name, walk(), compile_threads)
        last = loop.run(
            folder,
            state,
            step_fn,
            loop_settings,
            num_steps=settings.steps,
            name=name,
            evaluate_fn=evaluate_fn,
            hyperparameters={**(hyperparameters or {}), 'programs_at_most': sum(bound.values())},
        )
    print(f'{name}: {compiles.compared(bound, compiled)}', flush=True)
    return last
