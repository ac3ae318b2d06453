"""AdamW with schedules and clipping: gradients in, the next training state out.

1. A non-finite loss or gradient skips the update; only the counters change.
2. The gradient is clipped by its global norm.
3. The update is Adam's direction plus decoupled weight decay, times the learning rate of this step.

Everything here is float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from simrl.models import placement, sharding
from simrl.models.transformer import Params, TransformerConfig

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight), float32 scalars; divided where they are shown
P = ParamSpec('P')


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and its learning rate over the steps."""

    learning_rate: float  # peak learning rate
    schedule: Literal['constant', 'cosine', 'linear'] = 'constant'  # shape of the learning rate after the warm-up
    warmup_steps: int = 0  # steps of linear warm-up; the last of them has the peak learning rate
    end_fraction: float = 0.0  # last step's learning rate, as a share of the peak; read by cosine and linear
    b1: float = 0.9  # decay of the first moment, per step
    b2: float = 0.999  # decay of the second moment, per step
    epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # per step, times the learning rate; norm scales and biases are never decayed
    clip_norm: float | None = 1.0  # max global norm of a gradient; None: no clipping

    def __post_init__(self) -> None:
        name = 'OptimizerSettings'
        if self.schedule not in ('constant', 'cosine', 'linear'):
            raise ValueError(f"{name}.schedule: expected 'constant', 'cosine' or 'linear', found {self.schedule!r}")
        for field, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f'{name}.{field}: expected a finite number, found {value}')
        if not self.learning_rate > 0:
            raise ValueError(f'{name}.learning_rate: expected a number above 0, found {self.learning_rate}')
        for field in ('warmup_steps', 'weight_decay'):
            if not getattr(self, field) >= 0:
                raise ValueError(f'{name}.{field}: expected at least 0, found {getattr(self, field)}')
        for field in ('b1', 'b2'):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f'{name}.{field}: expected a number in [0, 1), found {getattr(self, field)}')
        if not 0 <= self.end_fraction <= 1:
            raise ValueError(f'{name}.end_fraction: expected a number in [0, 1], found {self.end_fraction}')
        if not self.epsilon > 0:
            raise ValueError(f'{name}.epsilon: expected a number above 0, found {self.epsilon}')
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f'{name}.clip_norm: expected None or a number above 0, found {self.clip_norm}')


class Optimizer(NamedTuple):
    """AdamW for one run. Hashable, so a jitted function can take it as a static argument."""

    settings: OptimizerSettings
    schedule: Callable[[jax.Array], jax.Array]  # step -> learning rate


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
        params: float32 tree of the trained parameters; see `partition`.
        opt_state: optax's AdamW state without a learning rate, for each part of the params ('decoder' or 'adapters',
            heads): Adam's moments, float32, and the number of updates.
        step: int32, number of updates so far, skipped ones included; the learning rate is a function of it.
        nonfinite: int32, number of consecutive updates up to now that were skipped for a non-finite loss or gradient.
    """

    params: Params
    opt_state: dict[str, Any]
    step: jax.Array
    nonfinite: jax.Array


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the step, an int32 scalar counted from 0.

    The rate first reaches its maximum at step `warmup_steps - 1`. From step `total_steps - 1` on it is `end_fraction`
    of the maximum (cosine and linear).

    Raises:
        ValueError: the warm-up is not shorter than `total_steps`.
    """
    if total_steps <= settings.warmup_steps:
        raise ValueError(
            f'OptimizerSettings.warmup_steps: expected fewer than the {total_steps} steps of the run, '
            f'found {settings.warmup_steps}'
        )

    def schedule(step: jax.Array) -> jax.Array:
        warm = jnp.minimum(1.0, (step + 1) / max(settings.warmup_steps, 1))
        first = max(settings.warmup_steps - 1, 0)  # the decay starts from here
        progress = jnp.clip((step - first) / max(total_steps - 1 - first, 1), 0.0, 1.0)
        if settings.schedule == 'cosine':
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif settings.schedule == 'linear':
            left = 1 - progress
        else:
            left = jnp.ones_like(progress)
        decay = left if settings.schedule == 'constant' else settings.end_fraction + (1 - settings.end_fraction) * left
        return jnp.asarray(settings.learning_rate * warm * decay, jnp.float32)

    return schedule


def decayed(params: Params) -> Params:
    """Mask of `params`: True where weight decay applies, which is everywhere but norm scales and biases (by name)."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        name = str(path[-1].key)
        return not (name.endswith('norm') or name.endswith('bias'))

    return jax.tree_util.tree_map_with_path(is_decayed, params)


@functools.cache  # equal ones are one, and so are the programs made of them
def make_optimizer(settings: OptimizerSettings, total_steps: int) -> Optimizer:
    """Makes AdamW for a run of `total_steps` updates."""
    return Optimizer(settings, learning_rate_schedule(settings, total_steps))


def _transform(settings: OptimizerSettings) -> optax.GradientTransformation:
    """optax's AdamW without the learning rate."""
    return optax.chain(
        optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    )


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """Makes the state before the first step.

    Raises:
        TypeError: a parameter is not float32. Small updates would vanish in a narrower type.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise TypeError(f'params{jax.tree_util.keystr(path)}: expected float32, found {leaf.dtype}')
    # A weakly typed leaf (from a Python number) comes back strongly typed, and the second step would compile again.
    params = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.float32) if x.weak_type else x, params)
    opt_state = {part: _transform(optimizer.settings).init({part: tree}) for part, tree in params.items()}
    # Two arrays: one buffer in two leaves cannot be donated.
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def global_norm(tree: Params) -> jax.Array:
    """Euclidean norm over all leaves of a tree, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


@jax.named_scope('optimizer')
def apply_gradients(
    state: TrainState,
    gradients: Params,
    optimizer: Optimizer,
    *,
    loss: jax.Array,
    active: jax.Array | bool = True,
    hold_decoder: jax.Array | bool = False,
) -> tuple[TrainState, Metrics]:
    """Applies one update.

    A non-finite loss or gradient skips it: parameters and optimizer state do not change, `step` and `nonfinite` rise
    by one. The caller stops the run when `nonfinite` becomes too large.

    Args:
        gradients: a tree like `state.params`.
        loss: a scalar, checked for finiteness only.
        active: bool scalar. False also leaves parameters and optimizer state unchanged, but counts no fault: the batch
            had nothing to learn from, and Adam's momentum alone must not change the parameters.
        hold_decoder: bool scalar. True updates the heads only. The decoder (or its adapters), its moments and their
            count do not change, so its first update is that of a fresh Adam.

    Returns:
        The new state, and metrics: `grad_norm` (before clipping), `update_norm`, `param_norm` (after the update),
        `learning_rate`, and `skipped`, 1 for a non-finite update. Norms and learning rate of skipped and inactive
        updates have weight 0.
    """
    grad_norm = global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    happens = finite & active
    scale = _clipping(optimizer.settings, grad_norm)
    learning_rate = optimizer.schedule(state.step)
    params, opt_state, squares = {}, {}, jnp.zeros(2)
    for part, old in state.params.items():
        moves = happens if part.endswith('_head') else happens & jnp.logical_not(hold_decoder)
        params[part], opt_state[part], part_squares = _adamw(
            {part: old}, {part: gradients[part]}, state.opt_state[part], optimizer.settings, scale, learning_rate, moves
        )
        squares += part_squares
    new_state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    )
    weight = happens.astype(jnp.float32)
    update_norm, param_norm = jnp.sqrt(squares)
    measured = {
        'grad_norm': grad_norm,
        'update_norm': update_norm,
        'param_norm': param_norm,
        'learning_rate': learning_rate,
    }
    metrics: Metrics = {name: (jnp.where(happens, value, 0.0), weight) for name, value in measured.items()}
    metrics['skipped'] = (1 - finite.astype(jnp.float32), jnp.ones((), jnp.float32))
    return new_state, metrics


def _clipping(settings: OptimizerSettings, grad_norm: jax.Array) -> jax.Array:
    """Factor that clips the gradient to a norm of at most `clip_norm`, a float32 scalar."""
    if settings.clip_norm is None:
        return jnp.float32(1)
    return jnp.minimum(1.0, settings.clip_norm / jnp.maximum(grad_norm, 1e-30))


def _adamw(
    params: Params,
    gradients: Params,
    opt_state: Any,
    settings: OptimizerSettings,
    scale: jax.Array,
    learning_rate: jax.Array,
    moves: jax.Array,
) -> tuple[Params, Any, jax.Array]:
    """Updates one part of the params, one parameter after another, with temporary memory for one parameter.

    It computes the same as `_transform`. optax would store the clipped gradients and directions of all parameters.

    Args:
        params, gradients: `{part: tree}`.
        scale: clipping factor of the gradient.
        moves: bool scalar; False changes nothing, whatever the gradient is.

    Returns:
        The part's new tree and state, and float32 `[2]`: sums of squares of its update and of its new params.
    """
    adam, decay = opt_state
    count = optax.safe_increment(adam.count)
    bias = [1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (settings.b1, settings.b2)]
    squares = jnp.zeros(2)

    def step(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, decays: bool) -> tuple[jax.Array, ...]:
        nonlocal squares
        # A data dependency XLA cannot fold: parameters are updated one after another, which bounds memory.
        g = g.astype(jnp.float32) * jnp.where(squares[1] < 0, 0.0, scale)
        m = jnp.where(moves, settings.b1 * m + (1 - settings.b1) * g, m)
        v = jnp.where(moves, settings.b2 * v + (1 - settings.b2) * jnp.square(g), v)
        # Without the barrier XLA recomputes the moments from the old ones, which could then not be donated.
        m, v = jax.lax.optimization_barrier((m, v))
        direction = (m / bias[0]) / (jnp.sqrt(v / bias[1]) + settings.epsilon)
        if decays:
            direction += settings.weight_decay * p
        p = jnp.where(moves, p - learning_rate * direction, p)
        squared_update = jnp.where(moves, jnp.square(learning_rate) * jnp.sum(jnp.square(direction)), 0.0)
        squares += jnp.stack([squared_update, jnp.sum(jnp.square(p))])
        return p, m, v

    new = jax.tree.map(step, params, gradients, adam.mu, adam.nu, decayed(params))
    new_params, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), new)
    new_adam = adam._replace(count=jnp.where(moves, count, adam.count), mu=mu, nu=nu)
    (tree,) = new_params.values()
    return tree, (new_adam, decay), squares


def jit_step(
    step: Callable[P, tuple[TrainState, Metrics]], state_sharding: TrainState | None
) -> Callable[P, tuple[TrainState, Metrics]]:
    """Compiles a training step: (state, ...) -> (next state, metrics). The state is donated.

    Args:
        state_sharding: shardings of the state, from `place_state`. They fix the layout of the new state. The compiler
            might otherwise return replicated parameters, which need not fit and would compile the second step again.
            None leaves the layout to the compiler.
    """
    out_shardings = None if state_sharding is None else (state_sharding, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def place_state(
    params: Params, config: TransformerConfig, optimizer: Optimizer, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Makes the state before the first step, in its training shards, and the tree of its shardings."""
    placed = placement.shard_params(params, config, mesh, sharding.TRAINING_RULES)
    shardings = placement.shardings_of(params, config, mesh, sharding.TRAINING_RULES)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), placed)
    state_shardings = sharding.state_shardings(abstract, placed, shardings)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=state_shardings, donate_argnums=0)(placed)
    return state, state_shardings
