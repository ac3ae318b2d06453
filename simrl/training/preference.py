"""Reward models from pairs of replies (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

The loss of a pair is -log sigmoid(score of the chosen reply - score of the rejected reply). A score is the reward
head's value at the reply's end-of-turn.
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

from simrl.conversations.batches import Batch, Batches, BatchSettings, stack_preferences
from simrl.conversations.records import Preference
from simrl.conversations.views import PreferenceRow
from simrl.models import placement, transformer
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.reward_model import score_rows
from simrl.run import compiles
from simrl.run.progress import Progress
from simrl.training import supervised
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import Metrics, TrainState
from simrl.training.supervised import FitSettings


@dataclasses.dataclass(frozen=True)
class PreferenceSettings(FitSettings):
    """Settings of a reward model's training run; `batch.batch_size` counts pairs."""


def pair_margins(
    params: Params, config: TransformerConfig, execution: Execution, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Scores each pair: score of chosen - score of rejected, float32 `[P]`, and a mask of real pairs, bool `[P]`.

    Args:
        batch: from `stack_preferences`: rows 2p and 2p + 1 are the chosen and the rejected reply of pair p.
    """
    length = jnp.asarray(batch.length)
    last = jnp.maximum(length - 1, 0)[:, None]
    score = score_rows(params, config, execution, jnp.asarray(batch.tokens), last)[:, 0]
    return score[0::2] - score[1::2], length[0::2] > 0


def pair_losses(params: Params, batch: Batch, *, config: TransformerConfig, execution: Execution) -> Metrics:
    """`loss` (nats), `accuracy` (a tie counts 0.5) and `margin` of a batch, each (sum, number of pairs)."""
    margin, real = pair_margins(params, config, execution, batch)
    count = jnp.sum(real, dtype=jnp.float32)
    correct = jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32))
    parts = {'loss': -jax.nn.log_sigmoid(margin), 'accuracy': correct, 'margin': margin}
    return {name: (jnp.sum(part, where=real), count) for name, part in parts.items()}


@functools.partial(jax.jit, static_argnames=('config', 'execution'))
def eval_step(params: Params, batch: Batch, *, config: TransformerConfig, execution: Execution) -> jax.Array:
    """Margins of a batch's pairs, float32 `[P]`."""
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
    """Margins of all rows, float32 `[len(rows)]`, in the order of `rows`."""
    batches = Batches(rows, settings, stack_preferences)
    out = np.full(len(rows), np.nan, np.float32)
    print(f'held-out pairs: {compiles.stated({"eval_step": len(batches.lengths)})}', flush=True)
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
    load: Callable[[], Params],
    rows: Sequence[PreferenceRow],
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: PreferenceSettings,
    loop_settings: LoopSettings,
    mesh: Mesh,
    compile_threads: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains a reward model `{'decoder', 'reward_head'}` from a decoder. The head starts at zero.

    Args:
        folder: of the run; see `loop.run`, also for errors.
        load: makes float32 `{'decoder'}`, the parameters before the first step; see `sft.fine_tune`.
        rows: from `views.preference_rows`, no longer than the longest of `settings.batch.lengths`.
        compile_threads: see `supervised.fit`.

    Returns:
        The state after the last step.
    """
    return supervised.fit(
        folder,
        lambda: ({'decoder': load()['decoder'], 'reward_head': transformer.init_head(config)}, {}),
        Batches(rows, settings.batch, stack_preferences),
        functools.partial(pair_losses, config=config, execution=execution),
        config=config,
        settings=settings,
        loop_settings=loop_settings,
        mesh=mesh,
        name='reward_model',
        compile_threads=compile_threads,
        hyperparameters=hyperparameters,
    )


def longer_wins(pairs: Sequence[Preference]) -> list[float]:
    """Length baseline per pair: 1.0 where the chosen reply has more characters, 0.0 where fewer, 0.5 at a tie.

    A reward model that is no more accurate than this has learnt length.
    """
    return [
        0.5 if len(pair.chosen) == len(pair.rejected) else float(len(pair.chosen) > len(pair.rejected))
        for pair in pairs
    ]
