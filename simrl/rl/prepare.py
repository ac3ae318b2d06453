"""Prepares conversations and rewards for the update, for either trained role.

1. Score the sampled tokens with the parameters that sampled them, by the training graph, and with the reference. The
   sampler's own log-probabilities differ by rounding, which would use up part of the clip range.
2. Mask conversations without a valid reward.
3. Compute advantages, and returns for a critic.

Shapes: B rows, T tokens. Everything outside the decoder is float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models.rows import Microbatch, gather_rows, scatter_rows, shard_rows
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import CAUSES, INCOMPLETE, Rewards
from simrl.rl import advantages, losses, masked
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rollouts.trajectories import Trajectories
from simrl.training.optimizer import Metrics
from simrl.training.scoring import Scores, score, trained_tokens

Episode = Literal['conversation', 'turn']


@flax.struct.dataclass
class Batch:
    """Inputs of the update; float32 `[B, T]` unless stated otherwise.

    Attributes:
        tokens: int32 `[B, T]`.
        trained: bool `[B, T]`, trained tokens: sampled by the trained role in a row with a valid reward.
        sampler_log_prob: from the sampler.
        old_log_prob: from the training graph before the update; unused with one update per batch.
        ref_log_prob: from the reference; None without one.
        old_value, returns: None without a critic.
        advantage: 0 at untrained tokens.
    """

    tokens: jax.Array
    trained: jax.Array
    sampler_log_prob: jax.Array
    old_log_prob: jax.Array
    ref_log_prob: jax.Array | None
    old_value: jax.Array | None
    returns: jax.Array | None
    advantage: jax.Array


@flax.struct.dataclass
class Passes:
    """Scores of the sampled tokens; float32 `[B, T]`, 0 at other tokens, unless stated otherwise.

    Attributes:
        sampled: bool `[B, T]`, from `trained_tokens`.
        sampler_log_prob: from the sampler.
        old: from the training graph before the update; None if nothing reads it.
        ref_log_prob: from the reference; None without one.
    """

    sampled: jax.Array
    sampler_log_prob: jax.Array
    old: Scores | None
    ref_log_prob: jax.Array | None


def mask_incomplete(
    rewards: Rewards, trajectories: Trajectories, *, trained_role: int, settings: AlgorithmSettings
) -> Rewards:
    """Masks all rewards of a conversation that `gae` cannot use since one of its turns has none."""
    if settings.advantage != 'gae' or rewards.valid.ndim == 1:
        return rewards
    sampled = trained_tokens(trajectories.role, trajectories.length, trained_role)
    whole = advantages.valid_rows(rewards.valid, sampled, trajectories.turn)
    return dataclasses.replace(
        rewards,
        valid=rewards.valid & whole[:, None],
        value=jnp.where(whole[:, None], rewards.value, 0.0),
        cause=jnp.where(jnp.any(rewards.valid, axis=1) & ~whole, CAUSES.index(INCOMPLETE), rewards.cause),
    )


def check_params(params: Params, settings: AlgorithmSettings) -> None:
    if settings.advantage == 'gae' and 'value_head' not in params:
        raise ValueError(
            f"advantage 'gae' needs params['value_head'] (transformer.init_head), found {sorted(params)} only"
        )


def start_passes(
    role: jax.Array,
    length: jax.Array,
    sampler_log_prob: jax.Array,
    *,
    trained_role: int,
    settings: AlgorithmSettings,
    value: bool,
    reference: bool,
) -> Passes:
    """Initialises the scores, with zeros where `add_passes` writes.

    Args:
        value, reference: True if there is a value head, a reference.
    """
    sampled = trained_tokens(role, length, trained_role)
    zeros = shard_rows(jnp.zeros(role.shape, jnp.float32))
    return Passes(
        sampled=shard_rows(sampled),
        sampler_log_prob=shard_rows(jnp.where(sampled, sampler_log_prob, 0.0).astype(jnp.float32)),
        old=Scores(log_prob=zeros, entropy=zeros, value=zeros if value else None) if settings.reads_old else None,
        ref_log_prob=zeros if reference else None,
    )


@jax.named_scope('passes')
def add_passes(
    passes: Passes,
    params: Params,
    reference: Params | None,
    tokens: jax.Array,
    rows: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
    *,
    width: int,
    config: TransformerConfig,
    execution: Execution,
) -> Passes:
    """Scores one microbatch, with the parameters before the update and the reference, and writes it into `passes`.

    Args:
        rows: int32 `[R]` and width: of a `Microbatch`.
    """
    own_tokens, sampled = gather_rows((tokens, passes.sampled), rows, width)

    def scores(of: Params) -> Scores:
        return score(of, config, execution, own_tokens, sampled, token_mask, temperature)

    old, ref_log_prob = passes.old, passes.ref_log_prob
    if old is not None:
        old = scatter_rows(old, rows, scores(params))
    if ref_log_prob is not None:
        assert reference is not None
        ref_log_prob = scatter_rows(ref_log_prob, rows, scores({'decoder': reference['decoder']}).log_prob)
    return dataclasses.replace(passes, old=old, ref_log_prob=ref_log_prob)


class PreparePrograms(NamedTuple):
    """The programs of `prepare`, jitted; see `jit_prepare`."""

    start: Any  # `start_passes`
    add: Any  # `add_passes`
    finish: Any  # `assemble`


@functools.cache  # runs of equal settings share programs: tracing takes seconds
def prepare_programs(
    *,
    trained_role: int,
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    episode: Episode = 'conversation',
) -> PreparePrograms:
    """Makes the programs that `prepare` dispatches; arguments as of `jit_prepare`."""
    return PreparePrograms(
        start=jax.jit(
            functools.partial(start_passes, trained_role=trained_role, settings=settings),
            static_argnames=('value', 'reference'),
        ),
        add=jax.jit(
            functools.partial(add_passes, config=config, execution=execution), static_argnames='width', donate_argnums=0
        ),
        finish=jax.jit(functools.partial(assemble, settings=settings, episode=episode)),
    )


@functools.cache  # runs of equal settings share programs: tracing takes seconds
def jit_prepare(
    *,
    trained_role: int,
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    episode: Episode = 'conversation',
) -> Callable[..., tuple[Batch, Metrics]]:
    """Compiles `prepare` for a trained role, settings and model: two programs, and one for each width.

    Args:
        trained_role: role id of the trained tokens.
        episode: what returns of `gae` add up over. 'turn' is for rewards `[B, turns]` each of which says already what
            all that follows is worth. The other estimators give a conversation one advantage, from the mean of its
            rewards.
    """
    start, add, finish = prepare_programs(
        trained_role=trained_role, config=config, execution=execution, settings=settings, episode=episode
    )

    def prepare(
        params: Params,
        reference: Params | None,
        trajectories: Trajectories,
        rewards: Rewards,
        microbatches: Sequence[Microbatch],
        *,
        token_mask: jax.Array,
        temperature: jax.Array | float,
    ) -> tuple[Batch, Metrics]:
        """Computes all inputs of the update that do not change during it.

        Args:
            params: the parameters that sampled the conversations.
            reference: frozen reference parameters, with `decoder`. None skips their pass; any kl but `none` needs
                them.
            trajectories: in the trained role's view; 0 is the length of padding rows.
            rewards: of the trained role, `[B]` or `[B, turns]`.
            microbatches: from `split_by_length`, covering all rows; the models score one at a time, which bounds
                memory.
            token_mask: bool `[V]` and temperature: the sampler's.

        Returns:
            The batch, and metrics: advantages and returns (before whitening), the critic's explained variance, the gap
            between the log-probabilities of sampler and training graph, and counts: `masked_rows` without a valid
            reward, `unplaced_rewards` without a token, `empty_rows` with a reward but no trained token. With one update
            per batch the update measures the gap, since it makes the same pass.
        """
        check_params(params, settings)
        if settings.kl != 'none' and reference is None:
            raise ValueError(f'AlgorithmSettings.kl: {settings.kl!r} needs reference parameters, found None')
        rows = trajectories
        passes = start(
            rows.role, rows.length, rows.log_prob, value='value_head' in params, reference=reference is not None
        )
        if passes.old is not None or passes.ref_log_prob is not None:
            for part in microbatches:
                passes = add(
                    passes, params, reference, rows.tokens, part.rows, token_mask, temperature, width=part.width
                )
        return finish(passes, trajectories, rewards)

    return prepare


def assemble(
    passes: Passes,
    trajectories: Trajectories,
    rewards: Rewards,
    *,
    settings: AlgorithmSettings,
    episode: Episode = 'conversation',
) -> tuple[Batch, Metrics]:
    """Computes the batch after the models' passes; arguments and results as in `prepare` and `jit_prepare`."""
    tokens, turn, length, group = trajectories.tokens, trajectories.turn, trajectories.length, trajectories.group
    sampled, old = passes.sampled, passes.old
    penalty = jnp.zeros(tokens.shape, jnp.float32)
    if settings.kl == 'k1':
        assert old is not None
        assert passes.ref_log_prob is not None
        penalty = settings.kl_coef * losses.kl_estimate(old.log_prob, passes.ref_log_prob, 'k1')
    present = length > 0
    metrics: dict[str, tuple[Any, Any]] = {}
    old_value = returns = None
    if settings.advantage == 'gae':
        assert old is not None
        assert old.value is not None
        judged = used = advantages.valid_rows(rewards.valid, sampled, turn) & present
        trained = sampled & used[:, None]
        valid = rewards.valid & used.reshape(-1, *[1] * (rewards.valid.ndim - 1))
        placed, unplaced = advantages.place_rewards(rewards.value, valid, trained, turn)
        old_value = old.value
        estimate_gae = advantages.gae
        if episode == 'turn':
            turns = rewards.value.shape[1]
            estimate_gae = functools.partial(advantages.gae_of_turns, turn=turn, turns=turns)
        advantage, returns = estimate_gae(placed - penalty, old_value, trained, settings.gamma, settings.lam)
        metrics['unplaced_rewards'] = (unplaced, 1.0)
        metrics |= _critic_metrics(old_value, returns, trained) | _moments('advantage', advantage, trained)
        if settings.whiten:
            advantage = advantages.whiten(advantage, trained)
    else:
        reward, judged = advantages.conversation_rewards(rewards.value, rewards.valid)
        judged = judged & present
        # A conversation's penalty is the sum over its tokens, its log-ratio (Ahmadian et al. 2024).
        reward = reward - masked.total(penalty, sampled, axis=1)
        if settings.advantage == 'reinforce_pp':
            row_advantage, used = advantages.reinforce_pp(reward, judged)
        else:
            estimate = {'grpo': advantages.grpo, 'dr_grpo': advantages.dr_grpo, 'rloo': advantages.rloo}
            row_advantage, used = estimate[settings.advantage](reward, judged, group)
            counts = advantages.group_counts(reward, judged, present, group)
            metrics |= {name: (number, 1.0) for name, number in counts.items()}
        trained = sampled & used[:, None]
        advantage = jnp.where(trained, row_advantage[:, None], 0.0)
        metrics |= _moments('advantage', advantage, trained)

    metrics['rows'] = (masked.count(present), 1.0)
    metrics['masked_rows'] = (masked.count(present & ~judged), 1.0)
    metrics['empty_rows'] = (masked.count(judged & ~jnp.any(sampled, axis=1)), 1.0)
    metrics['trained_tokens'] = (masked.count(trained), 1.0)
    if old is not None and settings.updates_per_batch > 1:
        gap = jnp.abs(passes.sampler_log_prob - old.log_prob)
        metrics['sampler_gap_mean'] = (masked.total(gap, trained), masked.count(trained))
        metrics['sampler_gap_max'] = (masked.maximum(gap, trained), 1.0)
    batch = Batch(
        tokens=tokens,
        trained=trained,
        sampler_log_prob=passes.sampler_log_prob,
        old_log_prob=passes.sampler_log_prob if old is None else old.log_prob,
        ref_log_prob=passes.ref_log_prob,
        old_value=old_value,
        returns=returns,
        advantage=advantage,
    )
    return batch, _as_float32(metrics)


def _moments(name: str, x: jax.Array, trained: jax.Array) -> dict[str, tuple[Any, Any]]:
    return {
        f'{name}_mean': (masked.total(x, trained), masked.count(trained)),
        f'{name}_std': (jnp.sqrt(masked.variance(x, trained)), jnp.any(trained)),
    }


def _critic_metrics(value: jax.Array, returns: jax.Array, trained: jax.Array) -> dict[str, tuple[Any, Any]]:
    """Explained variance is 1 - Var(returns - value) / Var(returns), with weight 0 if the returns do not vary."""
    variance = masked.variance(returns, trained)
    explained = 1 - masked.variance(returns - value, trained) / jnp.where(variance > 0, variance, 1.0)
    return {
        **_moments('return', returns, trained),
        'value_mean': (masked.total(value, trained), masked.count(trained)),
        'explained_variance': (jnp.where(variance > 0, explained, 0.0), variance > 0),
    }


def _as_float32(metrics: dict[str, tuple[Any, Any]]) -> Metrics:
    return {name: (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)) for name, (x, w) in metrics.items()}
