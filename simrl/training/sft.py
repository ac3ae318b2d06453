"""Supervised fine-tuning of either side of a conversation: maximum likelihood of the trained tokens.

A mask per token says which tokens are trained, so the same code fits a user simulator to people's messages and an
assistant to assistants' messages. The softmax runs over the tokens that the sampler may draw: training and sampling
use the same distribution.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import Batch, Batches, stack
from simrl.conversations.views import Rendered
from simrl.models import placement
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.run import metrics
from simrl.run.progress import Progress
from simrl.training import partition, scoring, supervised
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import Metrics, TrainState
from simrl.training.supervised import FitSettings


@dataclasses.dataclass(frozen=True)
class SFTSettings(FitSettings):
    """Settings of a fine-tuning run. The batches' seed also initialises the adapters."""

    lora: LoRASettings | None = None  # None trains every weight


def token_losses(
    params: Params,
    batch: Batch,
    token_mask: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
) -> Metrics:
    """Sums over the trained tokens of a batch. A row's first token has no prediction and is never trained.

    Args:
        batch: `[B, T]` rows.
        token_mask: bool `[V]`, tokens that the trained role may sample.

    Returns:
        `loss` (negative log-likelihood) and `entropy` in nats, each (sum, number of trained tokens).
    """
    tokens = jnp.asarray(batch.tokens)
    trained = jnp.asarray(batch.trained) & (jnp.arange(tokens.shape[1]) > 0)
    scores = scoring.score(params, config, execution, tokens, trained, token_mask, 1.0)
    count = jnp.sum(trained, dtype=jnp.float32)
    return {'loss': (-jnp.sum(scores.log_prob), count), 'entropy': (jnp.sum(scores.entropy), count)}


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
    """Computes `token_losses`, and `content_loss`: the loss of the trained tokens that are not in `ends`."""
    losses = functools.partial(token_losses, config=config, execution=execution)
    content: Any = jnp.asarray(batch.trained) & ~jnp.isin(jnp.asarray(batch.tokens), jnp.array(ends, jnp.int32))
    content_loss = losses(params, dataclasses.replace(batch, trained=content), token_mask)['loss']
    return losses(params, batch, token_mask) | {'content_loss': content_loss}


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
    """Sums the metrics of `eval_step` over all rows of `batches`; names get the prefix `held_out/`."""
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
    load: Callable[[], Params],
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
    compile_threads: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Fits a model, or adapters to it, to the trained tokens of `rows`.

    Args:
        folder: of the run; see `loop.run`, also for errors.
        load: makes float32 `{'decoder'}`, the parameters before the first step. It is called once, and nothing here
            keeps them beside the state.
        rows, held_out: from `conversations.views`, no longer than the longest of `settings.batch.lengths`. The held-out
            loss is measured before, after, and every `loop_settings.evaluate_every` steps.
        token_mask: bool `[V]`, tokens that the trained role may sample.
        ends: tokens that end messages and conversations. The held-out loss is also measured without them: a terminal
            token that starts as a copy of end-of-turn takes half of its probability, so the first steps lower the loss
            of every end whatever the model learns.
        compile_threads: see `supervised.fit`.

    Returns:
        The state after the last step; `partition.whole_decoder` makes one model of it.
    """

    def split() -> tuple[Params, Params]:
        seed, dtype = settings.batch.seed, execution.dtype
        return partition.trained_and_frozen(load(), config, settings.lora, seed=seed, dtype=dtype, mesh=mesh)

    mask = jnp.asarray(token_mask)
    static: dict[str, Any] = {'config': config, 'execution': execution, 'ends': ends}
    held_out_batches = Batches(held_out, settings.batch, stack)
    return supervised.fit(
        folder,
        split,
        Batches(rows, settings.batch, stack),
        functools.partial(token_losses, config=config, execution=execution),
        mask,
        config=config,
        settings=settings,
        loop_settings=loop_settings,
        mesh=mesh,
        name='sft',
        evaluation=supervised.Evaluation(
            lambda params: held_out_loss(params, held_out_batches, mask, mesh=mesh, **static),
            lambda params: supervised.bucket_programs(
                'eval_step', held_out_batches, mesh, lambda batch: eval_step.lower(params, batch, mask, **static)
            ),
        ),
        compile_threads=compile_threads,
        hyperparameters=hyperparameters,
    )
