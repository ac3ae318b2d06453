"""Policy gradients of single examples, as vectors small enough to keep: for forecasts, which take no step.

1. The conversations of an example are a group. Each has its reward, less the mean of the others, as its advantage
   (RLOO), and every token counts alike. So the gradient is an unbiased estimate of that of the expected reward itself,
   whatever estimator training uses: the normalisations of others, by a group's spread or a batch's tokens, would make
   examples depend on each other.
2. One backward pass for each example; its gradient is sketched in the same program.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE
from simrl.models import placement
from simrl.models.rows import bucket_widths, split_by_length
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import Rewards
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.prepare import jit_prepare
from simrl.rl.update import add_gradients
from simrl.rollouts.trajectories import Trajectories

ALGORITHM = AlgorithmSettings('rloo', aggregation='constant', aggregation_constant=1.0)
SKETCH_SIZE = 2**16  # numbers of a gradient that are kept; a power of 2
SKETCH_SEED = 0  # the same for all gradients, which are compared


def example_gradients(
    trained: Params,
    frozen: Params,
    batch: Trajectories,
    rewards: Rewards,
    *,
    samples: int,
    row_buckets: Sequence[int],
    config: TransformerConfig,
    execution: Execution,
    token_mask: jax.Array,
    temperature: jax.Array | float,
) -> np.ndarray:
    """Sketches of the gradients of the policy's loss, one for each example: minus the gradient of its expected reward.

    Args:
        trained, frozen: from `partition.trained_and_frozen`, of the assistant that sampled the conversations.
        batch: conversations in the assistant's view, `samples` neighbouring rows of each example.
        rewards: `[B]` or `[B, turns]`; conversations without one are left out of their group.
        row_buckets: tokens; rows are cut to the shortest that fits the longest of them.
        token_mask: bool `[V]` and temperature: the sampler's.

    Returns:
        float32 `[B / samples, D]`, of at most `SKETCH_SIZE` numbers; zeros where an example has fewer than two rewards,
        or all its rewards are equal.
    """
    prepare = jit_prepare(trained_role=ASSISTANT, config=config, execution=execution, settings=ALGORITHM)
    prepared, _ = prepare(
        {**frozen, **trained}, None, batch, rewards, (), token_mask=token_mask, temperature=temperature
    )
    length = np.asarray(placement.to_host(batch.length))
    widths = bucket_widths(row_buckets, batch.tokens.shape[1])
    (whole,) = split_by_length(np.arange(len(length)), length, widths, 1)
    gradient = _jit_gradient(config, execution)
    sketches = []
    for first in range(0, len(length), samples):
        rows = np.arange(first, first + samples, dtype=np.int32)
        members = np.zeros(len(length), bool)
        members[rows] = True
        found = gradient(trained, prepared, members, rows, token_mask, temperature, frozen, width=whole.width)
        sketches.append(placement.to_host(found))
    return np.stack(sketches)


@functools.cache
def _jit_gradient(config: TransformerConfig, execution: Execution) -> Callable[..., jax.Array]:
    """Compiles the sketch of the gradient of one example's rows; a program for each width and number of rows."""

    def gradient(
        params: Params,
        batch: Any,
        members: jax.Array,
        rows: jax.Array,
        token_mask: jax.Array,
        temperature: jax.Array | float,
        frozen: Params,
        *,
        width: int,
    ) -> jax.Array:
        gradients, _ = add_gradients(
            *(params, None, batch, members, rows, jnp.int32(0), token_mask, temperature, frozen),
            width=width,
            config=config,
            execution=execution,
            settings=ALGORITHM,
        )
        return sketch(gradients, SKETCH_SIZE)

    return jax.jit(gradient, static_argnames='width')


def sketch(tree: Any, size: int) -> jax.Array:
    """The numbers of a tree as one vector, float32 `[size]`; those of a tree of at most `size` as they are.

    A count sketch (Charikar et al. 2002): each number is added, with a random sign, to one of `size` sums. Inner
    products of sketches are unbiased estimates of those of the trees, with a standard error of about
    |a| |b| / sqrt(size). Trees of equal shapes share the draws.

    Args:
        size: a power of 2.
    """
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    if sum(leaf.size for leaf in leaves) <= size:
        return jnp.concatenate([leaf.ravel() for leaf in leaves])
    sums = jnp.zeros(size, jnp.float32)
    for number, leaf in enumerate(leaves):
        bits = jax.random.bits(jax.random.fold_in(jax.random.key(SKETCH_SEED), number), leaf.shape, jnp.uint32)
        sums = sums.at[bits % size].add(jnp.where(bits >> 31 == 1, leaf, -leaf))
    return sums


def only_turn(batch: Trajectories, turn: int) -> Trajectories:
    """The conversations with one of the assistant's messages to train on: its number `turn`."""
    other = (batch.role == ASSISTANT) & (batch.turn != turn)
    return dataclasses.replace(batch, role=jnp.where(other, jnp.int8(TEMPLATE), batch.role))
