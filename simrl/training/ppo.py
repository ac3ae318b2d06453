"""The update: a prepared batch to new parameters, for whichever role is trained.

`update` is epochs of minibatches of microbatches, one jitted nest of scans:

1. An epoch deals the rows out to minibatches, shuffled; tokens are never shuffled, and rows never cut.
2. A minibatch is one optimizer step. The weight of each token in its loss is computed over the whole minibatch.
3. Microbatches only bound memory: their losses and gradients are parts, which are added.

Whatever the estimator, the policy's loss is PPO's clipped surrogate; with one update per batch nothing is clipped and
its gradient is the plain policy gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simrl.models.rows import deal_rows
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.training import losses, masked
from simrl.training.optimizer import Metrics, Optimizer, TrainState, apply_gradients, jit_step
from simrl.training.prepare import Batch, check_params
from simrl.training.scoring import score
from simrl.training.update_settings import UpdateSettings


def loss_and_sums(
    params: Params,
    batch: Batch,
    weight: jax.Array,
    warming: jax.Array | bool,
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: UpdateSettings,
    allowed: jax.Array,
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
    critic = settings.estimator == 'gae'
    trained = batch.trained
    detach = True if settings.value_stop_gradient or not critic else warming
    new = score(params, config, execution, batch.tokens, trained, allowed, temperature, detach_value=detach)
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


def minibatch_gradients(
    params: Params,
    minibatch: Batch,
    warming: jax.Array | bool,
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: UpdateSettings,
    allowed: jax.Array,
    temperature: jax.Array | float,
    frozen: Params | None = None,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    """A minibatch's loss, sums and gradients, added up over its microbatches; see `loss_and_sums`.

    Args:
        params: the trained parts, by which the loss is differentiated, and
        frozen: the others, of `parts.trained_and_frozen`; None where there are none.
    """
    weight = losses.aggregation_weights(minibatch.trained, settings.aggregation, settings.aggregation_constant)

    def loss(params: Params, microbatch: Batch, weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_and_sums(
            {**(frozen or {}), **params},
            microbatch,
            weight,
            warming,
            config=config,
            execution=execution,
            settings=settings,
            allowed=allowed,
            temperature=temperature,
        )

    def part(microbatch: Batch, weight: jax.Array) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
        return jax.value_and_grad(loss, has_aux=True)(params, microbatch, weight)

    def microbatch_step(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return _accumulate(total, part(*piece)), None

    pieces = deal_rows((minibatch, weight), settings.microbatches)
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(microbatch_step, zeros, pieces)
    return total


def update(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    config: TransformerConfig,
    execution: Execution,
    settings: UpdateSettings,
    optimizer: Optimizer,
    allowed: jax.Array,
    temperature: jax.Array | float,
    frozen: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """All updates of one batch: `epochs` x `minibatches` optimizer steps. Pure; `jit_update` compiles it.

    The weights of each minibatch's tokens are computed over the whole minibatch, so the number of microbatches changes
    no result beyond rounding. A minibatch without any trained token changes nothing.

    Args:
        batch: from `prepare`.
        key: decides which rows meet in a minibatch, epoch by epoch; not read with one minibatch.
        optimizer: from `make_optimizer`.
        allowed: bool `[V]` and temperature: the sampler's.
        frozen: see `minibatch_gradients`.

    Returns:
        The new state; metrics summed over all optimizer steps. Losses and norms are means over the steps that happened,
        `skipped` (not finite) and `empty_updates` (nothing to learn from) shares of all steps, the others means over
        the trained tokens of the steps that happened.

    Raises:
        ValueError: the rows cannot be cut evenly, or `gae` has no value head.
    """
    check_params(state.params, settings)
    settings.rows_per_microbatch(batch.tokens.shape[0])

    def minibatch_step(state: TrainState, minibatch: Batch) -> tuple[TrainState, Metrics]:
        warming = state.step < settings.critic_warmup_steps if settings.critic_warmup_steps else False
        (loss, sums), gradients = minibatch_gradients(
            state.params,
            minibatch,
            warming,
            config=config,
            execution=execution,
            settings=settings,
            allowed=allowed,
            temperature=temperature,
            frozen=frozen,
        )
        tokens = masked.count(minibatch.trained)
        new_state, metrics = apply_gradients(
            state, gradients, optimizer, loss=loss, active=tokens > 0, hold_decoder=warming
        )
        kept = (1 - metrics['skipped'][0]) * (tokens > 0)
        return new_state, metrics | _step_metrics(loss, sums, tokens, kept)

    def epoch_step(state: TrainState, key: jax.Array) -> tuple[TrainState, Metrics]:
        rows = batch
        if settings.minibatches > 1:
            order = jax.random.permutation(key, batch.tokens.shape[0])
            rows = jax.tree.map(lambda x: x[order], batch)
        state, metrics = jax.lax.scan(minibatch_step, state, deal_rows(rows, settings.minibatches))
        return state, jax.tree.map(jnp.sum, metrics)

    state, metrics = jax.lax.scan(epoch_step, state, jax.random.split(key, settings.epochs))
    return state, jax.tree.map(jnp.sum, metrics)


def _accumulate(total: Any, part: Any) -> Any:
    """Adds what microbatches give, leaf by leaf; the sums named `max/` take the larger."""

    def merge(path: tuple[Any, ...], first: jax.Array, second: jax.Array) -> jax.Array:
        is_maximum = any(str(getattr(entry, 'key', '')).startswith('max/') for entry in path)
        return jnp.maximum(first, second) if is_maximum else first + second

    return jax.tree_util.tree_map_with_path(merge, total, part)


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
    settings: UpdateSettings,
    optimizer: Optimizer,
    *,
    state_sharding: TrainState | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`update` as one compiled function of (state, batch, key, allowed, temperature, frozen); see `jit_step`."""

    def update_batch(
        state: TrainState,
        batch: Batch,
        key: jax.Array,
        allowed: jax.Array,
        temperature: jax.Array | float,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        return update(
            state,
            batch,
            key,
            config=config,
            execution=execution,
            settings=settings,
            optimizer=optimizer,
            allowed=allowed,
            temperature=temperature,
            frozen=frozen,
        )

    return jit_step(update_batch, state_sharding)
