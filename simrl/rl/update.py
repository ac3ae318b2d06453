"""The update: a prepared batch to new parameters, for whichever role is trained.

1. `schedule_microbatches` says on the host which rows meet.
2. The gradients of a minibatch's microbatches are added up, by a compiled program for each width. The weight of each
   token in the loss is computed over the whole minibatch; microbatches only bound memory and save padding.
3. One optimizer step.

The policy's loss is PPO's clipped surrogate, whatever the advantage estimator. With one update per batch nothing is
clipped, and its gradient is the plain policy gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rl import losses, masked
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.microbatches import Microbatch, gather_rows
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
    """A microbatch's part of its minibatch's loss, and of the sums that the metrics are made of.

    Args:
        batch: the microbatch, R rows.
        weight: float32 `[R, T]`, its rows of the minibatch's `losses.aggregation_weights`.
        warming: bool scalar; True: the policy's terms are left out, and the critic's loss stays in its head.

    Returns:
        The loss, a scalar, and float32 scalars by name, each a sum over the microbatch's tokens; names that start with
        `loss/` are already weighted; `max/` are maxima.
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
    if settings.kl in ('k2', 'k3'):
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
        'approx_kl': jnp.exp(difference) - difference - 1,  # of old to new: k3 at tokens drawn from old
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
    """What one microbatch has to tell besides its gradients; see `loss_and_sums`."""

    loss: jax.Array
    sums: dict[str, jax.Array]
    tokens: jax.Array  # trained ones, float32


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
    """The gradients of a minibatch's loss, as far as they come from one microbatch, added to those of others.

    Args:
        params: the trained parts, by which the loss is differentiated.
        so_far: a tree like it; None: nothing yet.
        batch: all of it, from `prepare`.
        members: bool `[B]`, the rows of the minibatch, over which the weights of tokens are computed.
        rows: int32 `[R]` and width: of the `Microbatch`.
        step: int32 scalar, optimizer steps of the run up to now.
        token_mask: bool `[V]` and temperature: the sampler's.
        frozen: the other parts, of `parts.trained_and_frozen`.
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
    """One optimizer step, by what the microbatches of a minibatch added up to."""
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
    """(sum, weight) of one optimizer step; all 0 where it was skipped (`kept` is 0), as one NaN would hide the rest."""
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


def jit_update(
    config: TransformerConfig,
    execution: Execution,
    settings: AlgorithmSettings,
    optimizer: Optimizer,
    *,
    state_sharding: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update as a loop over compiled programs: one for each width, one optimizer step and two small ones.

    Args:
        state_sharding: see `jit_step`.
    """
    of_params = None if state_sharding is None else state_sharding.params
    zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=of_params)
    add = jax.jit(
        functools.partial(add_gradients, config=config, execution=execution, settings=settings),
        static_argnames='width',
        donate_argnums=1,
        out_shardings=(of_params, None),
    )
    take_step = jit_step(functools.partial(minibatch_step, settings=settings, optimizer=optimizer), state_sharding)

    def update(
        state: TrainState,
        batch: Batch,
        steps: Sequence[Sequence[Microbatch]],
        token_mask: jax.Array,
        temperature: jax.Array | float,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """All updates of one batch, dispatched and not waited for. The state is donated.

        The weights of each minibatch's tokens are computed over the whole minibatch, so the microbatches change no
        result beyond rounding. A minibatch without any trained token changes nothing.

        Args:
            batch: from `prepare`.
            steps: from `schedule_microbatches`: the microbatches of each optimizer step.
            token_mask: bool `[V]` and temperature: the sampler's.
            frozen: see `add_gradients`; None where there are none.

        Returns:
            The new state; metrics summed over all optimizer steps. Losses and norms are means over the steps that
            happened, `skipped` (not finite) and `empty_updates` (nothing to learn from) shares of all steps, the others
            means over the trained tokens of the steps that happened.

        Raises:
            ValueError: `gae` has no value head.
        """
        check_params(state.params, settings)
        measured = []
        for microbatches in steps:
            members = np.zeros(batch.tokens.shape[0], bool)
            members[np.concatenate([piece.rows for piece in microbatches])] = True
            # The gradients of one microbatch are the minibatch's; adding them to zeros would take their memory twice.
            gradients = zeros(state.params) if len(microbatches) > 1 else None
            found = []
            for piece in microbatches:
                gradients, part = add(
                    state.params,
                    gradients,
                    batch,
                    members,
                    piece.rows,
                    state.step,
                    token_mask,
                    temperature,
                    frozen or {},
                    width=piece.width,
                )
                found.append(part)
            state, metrics = take_step(state, gradients, found)
            del gradients  # before the next ones are made
            measured.append(metrics)
        return state, _summed(measured)

    return update


@jax.jit
def _summed(metrics: Sequence[Metrics]) -> Metrics:
    return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *metrics)
