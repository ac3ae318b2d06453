"""The update: new parameters from a prepared batch, for either trained role.

1. `schedule_microbatches` assigns rows to optimizer steps, on the host.
2. The gradients of a minibatch's microbatches are summed, by one compiled program per width. Token weights are
   normalised over the whole minibatch; microbatches only bound memory and save padding.
3. Each minibatch makes one optimizer step.

The policy's loss is PPO's clipped surrogate, whatever the advantage estimator. With one update per batch nothing is
clipped, and its gradient is the plain policy gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from simrl.models.rows import Microbatch, gather_rows
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rl import losses, masked
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.prepare import Batch, check_params
from simrl.training.optimizer import Metrics, Optimizer, TrainState, apply_gradients, jit_step
from simrl.training.scoring import score


def loss_and_sums(
    params: Params,
    batch: Batch,
    weight: jax.Array,
    warming: jax.Array | bool,
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    token_mask: jax.Array,
    temperature: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes a microbatch's share of its minibatch's loss and of the sums for metrics.

    Args:
        batch: the microbatch, R rows.
        weight: float32 `[R, T]`, these rows of the minibatch's `losses.aggregation_weights`.
        warming: bool scalar; True leaves out the policy's terms and trains only the value head.

    Returns:
        The loss, a scalar, and float32 scalars by name: sums over the microbatch's tokens. Names under `loss/` are
        weighted sums, names under `max/` are maxima.
    """
    critic = settings.advantage == 'gae'
    trained = batch.trained
    detach = True if settings.value_stop_gradient or not critic else warming
    new = score(params, config, execution, batch.tokens, trained, token_mask, temperature, detach_value=detach)
    single = settings.updates_per_batch == 1
    old_log_prob = jax.lax.stop_gradient(new.log_prob) if single else batch.old_log_prob
    surrogate, ratio = losses.policy_loss(
        new.log_prob, old_log_prob, batch.advantage, settings.clip_low, settings.clip_high
    )
    terms = {'policy': losses.weigh(surrogate, weight)}
    policy = terms['policy']
    if settings.kl not in ('none', 'k1'):  # k1 is in the reward
        assert batch.ref_log_prob is not None
        terms['kl'] = losses.weigh(losses.kl_estimate(new.log_prob, batch.ref_log_prob, settings.kl), weight)
        policy += settings.kl_coef * terms['kl']
    if settings.entropy_coef:
        policy -= settings.entropy_coef * losses.weigh(new.entropy, weight)
    loss = jnp.where(warming, 0.0, policy)
    if critic:
        assert new.value is not None
        assert batch.old_value is not None
        assert batch.returns is not None
        error = losses.value_loss(new.value, batch.old_value, batch.returns, settings.value_clip)
        terms['value'] = losses.weigh(error, weight)
        loss += settings.value_coef * terms['value']

    difference = losses.log_ratio(new.log_prob, old_log_prob)
    sums = {
        'ratio': ratio,
        'clip_fraction': (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high),
        'approx_kl': jnp.exp(difference) - difference - 1,  # KL(old || new): k3 at tokens drawn from old
        'entropy': new.entropy,
    }
    if batch.ref_log_prob is not None:
        sums['kl_k1'] = losses.kl_estimate(new.log_prob, batch.ref_log_prob, 'k1')
        sums['kl_k3'] = losses.kl_estimate(new.log_prob, batch.ref_log_prob, 'k3')
    gap = jnp.abs(new.log_prob - batch.sampler_log_prob)
    if single:
        sums['sampler_gap_mean'] = gap
    reduced = {name: masked.total(x, trained) for name, x in sums.items()}
    reduced |= {f'loss/{name}': x for name, x in terms.items()} | {'max/sampler_gap_max': masked.maximum(gap, trained)}
    return loss, jax.lax.stop_gradient(reduced)


@flax.struct.dataclass
class Part:
    """Results of one microbatch besides its gradients; see `loss_and_sums`."""

    loss: jax.Array
    sums: dict[str, jax.Array]
    tokens: jax.Array  # number of trained tokens, float32


def add_gradients(
    params: Params,
    so_far: Params | None,
    batch: Batch,
    members: jax.Array,
    rows: jax.Array,
    step: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
    frozen: Params,
    *,
    width: int,
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
) -> tuple[Params, Part]:
    """Adds one microbatch's gradients of its minibatch's loss to the gradients so far.

    Args:
        params: the trained parameters, by which the loss is differentiated.
        so_far: gradients so far, a tree like `params`; None: no gradients yet.
        batch: the whole batch, from `prepare`.
        members: bool `[B]`, rows of the minibatch, over which token weights are normalised.
        rows: int32 `[R]` and width: of the `Microbatch`.
        step: int32 scalar, number of optimizer steps of the run up to now.
        token_mask: bool `[V]` and temperature: the sampler's.
        frozen: from `partition.trained_and_frozen`.
    """
    warming = step < settings.critic_warmup_steps if settings.critic_warmup_steps else False
    weight = losses.aggregation_weights(
        batch.trained & members[:, None], settings.aggregation, settings.aggregation_constant
    )
    own, own_weight = gather_rows((batch, weight), rows, width)

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_and_sums(
            {**frozen, **params},
            own,
            own_weight,
            warming,
            config=config,
            execution=execution,
            settings=settings,
            token_mask=token_mask,
            temperature=temperature,
        )

    with jax.named_scope('update'):
        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    if so_far is not None:
        gradients = jax.tree.map(jnp.add, so_far, gradients)
    return gradients, Part(value, sums, masked.count(own.trained))


def minibatch_step(
    state: TrainState, gradients: Params, parts: Sequence[Part], *, settings: AlgorithmSettings, optimizer: Optimizer
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step with the summed gradients of a minibatch."""
    warming = state.step < settings.critic_warmup_steps if settings.critic_warmup_steps else False
    loss, tokens = (
        functools.reduce(jnp.add, x) for x in zip(*((part.loss, part.tokens) for part in parts), strict=True)
    )
    sums = {
        name: functools.reduce(jnp.maximum if name.startswith('max/') else jnp.add, [part.sums[name] for part in parts])
        for name in parts[0].sums
    }
    new_state, metrics = apply_gradients(
        state, gradients, optimizer, loss=loss, active=tokens > 0, hold_decoder=warming
    )
    kept = (1 - metrics['skipped'][0]) * (tokens > 0)
    return new_state, metrics | _step_metrics(loss, sums, tokens, kept)


def _step_metrics(loss: jax.Array, sums: dict[str, jax.Array], tokens: jax.Array, kept: jax.Array) -> Metrics:
    """Metrics of one optimizer step, (sum, weight); all 0 if it was skipped (`kept` is 0), so no NaN spreads."""
    metrics: dict[str, tuple[Any, Any]] = {'loss': (loss, 1.0)}
    for name, value in sums.items():
        if name.startswith('loss/'):
            metrics[f'{name.removeprefix("loss/")}_loss'] = (value, 1.0)
        elif name.startswith('max/'):
            if 'sampler_gap_mean' in sums:
                metrics[name.removeprefix('max/')] = (value, 1.0)
        else:
            metrics[name] = (value, tokens)
    step = {name: (jnp.where(kept > 0, x, 0.0), jnp.asarray(w * kept)) for name, (x, w) in metrics.items()}
    return step | {'empty_updates': (jnp.asarray(tokens == 0, jnp.float32), jnp.ones((), jnp.float32))}


class UpdatePrograms(NamedTuple):
    """The programs of an update, jitted; see `jit_update`."""

    zeros: Any  # params -> gradients so far
    add: Any  # `add_gradients`
    take_step: Any  # `minibatch_step`


def zero_gradients(params: Params) -> Params:
    """No gradients yet: zeros, a tree like `params`."""
    return jax.tree.map(jnp.zeros_like, params)


def update_programs(
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    optimizer: Optimizer,
    *,
    state_sharding: TrainState | None = None,
) -> UpdatePrograms:
    """Makes the programs that `jit_update` dispatches; arguments as there."""
    leaves, tree = jax.tree.flatten(state_sharding)
    return _update_programs(config, execution, settings, optimizer, tuple(leaves), tree)


@functools.cache  # runs of equal settings share programs: tracing takes seconds
def _update_programs(
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    optimizer: Optimizer,
    shardings: tuple[Sharding, ...],
    state_tree: jax.tree_util.PyTreeDef,
) -> UpdatePrograms:
    """Makes the programs from the leaves and the tree of the state's shardings."""
    state_sharding: TrainState | None = jax.tree.unflatten(state_tree, shardings)
    params_sharding = None if state_sharding is None else state_sharding.params
    return UpdatePrograms(
        zeros=jax.jit(zero_gradients, out_shardings=params_sharding),
        add=jax.jit(
            functools.partial(add_gradients, config=config, execution=execution, settings=settings),
            static_argnames='width',
            donate_argnums=1,
            out_shardings=(params_sharding, None),
        ),
        take_step=jit_step(functools.partial(minibatch_step, settings=settings, optimizer=optimizer), state_sharding),
    )


def jit_update(
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    optimizer: Optimizer,
    *,
    state_sharding: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes the update, a loop over compiled programs: one per width, one optimizer step and two small ones.

    Args:
        state_sharding: see `jit_step`.
    """
    zeros, add, take_step = update_programs(config, execution, settings, optimizer, state_sharding=state_sharding)

    def update(
        state: TrainState,
        batch: Batch,
        steps: Sequence[Sequence[Microbatch]],
        token_mask: jax.Array,
        temperature: jax.Array | float,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Dispatches all updates of one batch, without waiting for them. The state is donated.

        Microbatches change no result beyond rounding. A minibatch without a trained token changes nothing.

        Args:
            batch: from `prepare`.
            steps: from `schedule_microbatches`: the microbatches of each optimizer step.
            token_mask: bool `[V]` and temperature: the sampler's.
            frozen: see `add_gradients`; None if there are none.

        Returns:
            The new state, and metrics summed over optimizer steps. Losses and norms are means over the steps taken,
            `skipped` (not finite) and `empty_updates` (no trained token) are shares of all steps, and the others are
            means over the trained tokens of the steps taken.

        Raises:
            ValueError: advantage 'gae' without a value head.
        """
        check_params(state.params, settings)
        measured = []
        for microbatches in steps:
            members = np.zeros(batch.tokens.shape[0], bool)
            members[np.concatenate([microbatch.rows for microbatch in microbatches])] = True
            # With one microbatch, adding its gradients to zeros would take their memory twice.
            gradients = zeros(state.params) if len(microbatches) > 1 else None
            parts = []
            for microbatch in microbatches:
                gradients, part = add(
                    state.params,
                    gradients,
                    batch,
                    members,
                    microbatch.rows,
                    state.step,
                    token_mask,
                    temperature,
                    frozen or {},
                    width=microbatch.width,
                )
                parts.append(part)
            state, metrics = take_step(state, gradients, parts)
            del gradients  # free their memory before the next minibatch
            measured.append(metrics)
        return state, _summed(measured)

    return update


@jax.jit
def _summed(metrics: Sequence[Metrics]) -> Metrics:
    return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *metrics)
