"""The programs of a training, lowered from shapes before its first step.

Those of conversations are listed by `rollouts.ahead`. `prepare` and the update have one for each width of a microbatch,
and a few of one size. What the conversations were worth decides the values of their arguments, and not their shapes.
All are those that `rl.train` calls, with the arguments that it gives.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example
from simrl.models.rows import bucket_widths
from simrl.models.transformer import Params
from simrl.rewards.rewards import Rewards
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.prepare import PreparePrograms
from simrl.rl.update import UpdatePrograms
from simrl.rollouts.agents import Agent, Limits, MixedAgent
from simrl.rollouts.programs import conversation_programs
from simrl.rollouts.schedule import Batching
from simrl.rollouts.trajectories import Trajectories
from simrl.run.compiles import Program, abstract, results
from simrl.training.optimizer import TrainState


def lowered_training(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    view: int,
    mesh: Mesh,
    rows: int,
    size: int,
    batching: Batching,
    update: Callable[[Trajectories], Iterator[Lowered]],
) -> Iterator[Program]:
    """The programs of conversations with each user, then those of the update.

    Args:
        user, assistant: from `for_sampling`; others as of `collect`.
        rows: conversations of a step, of which `size` are in the device's batch.
        update: abstract conversations of a step -> `lowered_update`.
    """
    assert not isinstance(assistant, MixedAgent)
    batch = yield from conversation_programs(
        *(user, assistant, examples),
        chat=chat,
        limits=limits,
        view=view,
        mesh=mesh,
        rows=rows,
        size=size,
        batching=batching,
    )
    for lowered in update(batch()):
        yield Program('', functools.partial(lambda lowered: lowered, lowered))


def lowered_update(
    state: TrainState,
    frozen: Params,
    reference: Params | None,
    batch: Trajectories,
    prepare: PreparePrograms,
    update: UpdatePrograms,
    *,
    settings: AlgorithmSettings,
    row_buckets: Sequence[int],
    token_mask: jax.Array,
    temperature: jax.Array | float,
    mesh: Mesh,
) -> Iterator[Lowered]:
    """The programs of `prepare` and of the update; arguments as there.

    Args:
        batch: conversations of a step, abstract.
    """
    rows = batch.tokens.shape[0]
    own = np.zeros(settings.rows_per_microbatch(rows), np.int32)
    widths = bucket_widths(row_buckets, batch.tokens.shape[1])
    whole = {**frozen, **state.params}
    flags = {'value': 'value_head' in whole, 'reference': reference is not None}
    traced = prepare.start.trace(batch.role, batch.length, batch.log_prob, **flags)
    start = traced.lower()
    yield start
    passes = results(traced, start.compile().output_shardings)
    if passes.old is not None or passes.ref_log_prob is not None:
        for width in widths:
            yield prepare.add.lower(
                *(passes, whole, reference, batch.tokens, own, token_mask, temperature), width=width
            )
    prepared, _ = jax.eval_shape(prepare.finish, passes, batch, _rewards(rows))
    prepared = _sharded(prepared, mesh)
    so_far = abstract(state.params) if settings.microbatches > 1 else None
    if so_far is not None:
        yield update.zeros.lower(state.params)
    part = None
    for width in widths:
        traced = update.add.trace(
            *(state.params, so_far, prepared, np.zeros(rows, np.bool_), own, state.step, token_mask, temperature),
            frozen,
            width=width,
        )
        _, part = traced.out_info
        yield traced.lower()
    parts = [_sharded(part, mesh)] * settings.microbatches
    yield update.take_step.lower(state, abstract(state.params), parts)


def _rewards(rows: int) -> Rewards:
    """Rewards of whole conversations, abstract. No shape of the update depends on their kind."""
    one: Any = functools.partial(jax.ShapeDtypeStruct, (rows,))
    return Rewards(value=one(np.float32), valid=one(np.bool_), parts={}, cause=one(np.int32))


def _sharded(tree: Any, mesh: Mesh) -> Any:
    """Abstract results of a program, in the shards that they have: those of rows, and single numbers whole."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec('data') if x.shape else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec), weak_type=x.weak_type)

    return jax.tree.map(one, tree)
