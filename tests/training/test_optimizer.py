"""AdamW by hand, schedules by their numbers, and updates that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simrl.training import optimizer
from simrl.training.optimizer import OptimizerSettings

SETTINGS = OptimizerSettings(
    learning_rate=0.1, schedule='constant', b1=0.9, b2=0.99, epsilon=1e-8, weight_decay=0.5, clip_norm=1.0
)
jit_apply = jax.jit(optimizer.apply_gradients, static_argnames='optimizer')


def make_params():
    return {
        'decoder': {
            'embedding': jnp.array([[1.0, -2.0]]),
            'final_norm': jnp.array([3.0]),
            'key_bias': jnp.array([1.0]),
        },
        'value_head': {'kernel': jnp.array([0.5]), 'bias': jnp.array(2.0)},
    }


def constant_like(params, x):
    return jax.tree.map(lambda p: jnp.full_like(p, x), params)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_two_steps_equal_adamw_by_hand():
    adamw = optimizer.make_optimizer(SETTINGS, 10)
    state = optimizer.init_state(make_params(), adamw)
    decays = flat({name: jax.tree.map(lambda x: x * 0 + 1, tree) for name, tree in make_params().items()})
    decays[[2, 3, 4]] = 0  # final_norm, key_bias and the head's bias, in the order of the leaves (see the assert)
    assert [str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(make_params())] == [
        'embedding', 'final_norm', 'key_bias', 'bias', 'kernel',
    ]  # fmt: skip
    params, m, v = flat(make_params()).astype(float), 0.0, 0.0
    for t, g in enumerate([3.0, -0.1], start=1):  # the first is clipped, the second is not
        state, metrics = jit_apply(state, constant_like(state.params, g), adamw, loss=jnp.array(0.5))
        gradient = np.full(6, g)
        norm = np.linalg.norm(gradient)
        assert metrics['grad_norm'][0] == pytest.approx(norm, rel=1e-6)
        gradient /= max(norm, 1.0)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        step = 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.5 * decays * params)
        params = params - step
        np.testing.assert_allclose(flat(state.params), params, rtol=1e-5)
        assert metrics['update_norm'][0] == pytest.approx(np.linalg.norm(step), rel=1e-5)
        assert metrics['param_norm'][0] == pytest.approx(np.linalg.norm(params), rel=1e-5)
        assert metrics['learning_rate'] == (pytest.approx(0.1), 1)
        assert metrics['skipped'] == (0, 1)
        assert state.step == t


def random_like(params, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)


def test_steps_are_those_of_optax():
    settings = dataclasses.replace(SETTINGS, schedule='cosine', warmup_steps=2)
    adamw = optimizer.make_optimizer(settings, 10)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.99, 1e-8),
        optax.add_decayed_weights(0.5, mask=optimizer.decayed),
        optax.scale_by_learning_rate(adamw.schedule),
    )
    state, params = optimizer.init_state(make_params(), adamw), make_params()
    chain_state = chain.init(params)
    for step in range(5):
        gradients = jax.tree.map(lambda x, step=step: x * 10.0 ** (step - 2), random_like(params, step))
        updates, chain_state = chain.update(gradients, chain_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = jit_apply(state, gradients, adamw, loss=jnp.array(0.5))
        np.testing.assert_allclose(flat(state.params), flat(params), rtol=1e-6)
        assert metrics['update_norm'][0] == pytest.approx(float(optimizer.global_norm(updates)), rel=1e-5)
    for part in ('decoder', 'value_head'):
        for name in ('mu', 'nu'):
            ours = getattr(state.opt_state[part][0], name)[part]
            np.testing.assert_allclose(flat(ours), flat(getattr(chain_state[1], name)[part]), rtol=1e-6)


def test_memory_is_the_gradients_and_that_of_one_parameter():
    """The new state lies in the old one's place."""
    adamw = optimizer.make_optimizer(SETTINGS, 10)
    weights = {name: jax.ShapeDtypeStruct((512, 512), jnp.float32) for name in 'abcdefgh'}
    state = jax.eval_shape(lambda p: optimizer.init_state(p, adamw), {'decoder': weights})
    flag, loss = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((), jnp.float32)

    def step(state, gradients, loss, active, hold):
        return optimizer.apply_gradients(state, gradients, adamw, loss=loss, active=active, hold_decoder=hold)

    compiled = jax.jit(step, donate_argnums=0).lower(state, state.params, loss, flag, flag).compile()
    memory, one = compiled.memory_analysis(), 4 * 512**2
    assert memory.alias_size_in_bytes >= 3 * 8 * one
    assert memory.temp_size_in_bytes < 1.1 * one


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_a_non_finite_update_is_skipped_and_counted(where, bad):
    adamw = optimizer.make_optimizer(SETTINGS, 10)
    state = optimizer.init_state(make_params(), adamw)
    state, _ = jit_apply(state, constant_like(state.params, 1.0), adamw, loss=jnp.array(0.5))
    gradients = constant_like(state.params, 1.0)
    if where == 'gradient':
        gradients['decoder']['embedding'] = gradients['decoder']['embedding'].at[0, 1].set(bad)
    loss = jnp.array(bad if where == 'loss' else 0.5)
    after = state
    for number in (1, 2):
        after, metrics = jit_apply(after, gradients, adamw, loss=loss)
        for old, new in zip(jax.tree.leaves((state.params, state.opt_state)),
                            jax.tree.leaves((after.params, after.opt_state)), strict=True):  # fmt: skip
            np.testing.assert_array_equal(old, new)
        assert (after.step, after.nonfinite) == (1 + number, number)
        assert metrics['skipped'] == (1, 1)
        assert all(np.isfinite(x) for pair in metrics.values() for x in pair)
        assert metrics['grad_norm'][1] == 0
    after, _ = jit_apply(after, constant_like(state.params, 1.0), adamw, loss=jnp.array(0.5))
    assert after.nonfinite == 0  # only skips in a row count
    assert (flat(after.params) != flat(state.params)).all()


def test_an_inactive_update_moves_nothing_and_is_no_fault():
    adamw = optimizer.make_optimizer(SETTINGS, 10)
    state = optimizer.init_state(make_params(), adamw)
    state, _ = jit_apply(state, constant_like(state.params, 1.0), adamw, loss=jnp.array(0.5))
    zeros = constant_like(state.params, 0.0)
    after, metrics = jit_apply(state, zeros, adamw, loss=jnp.array(0.0), active=jnp.array(False))
    np.testing.assert_array_equal(flat(after.params), flat(state.params))
    assert (after.nonfinite, metrics['skipped'][0]) == (0, 0)
    moved, _ = jit_apply(state, zeros, adamw, loss=jnp.array(0.0), active=jnp.array(True))
    assert (flat(moved.params) != flat(state.params)).all()  # momentum alone would have


@pytest.mark.parametrize('warmup_steps', [1, 20])
def test_a_held_decoder_starts_as_a_fresh_adam_would_and_heads_go_on(warmup_steps):
    adamw = optimizer.make_optimizer(dataclasses.replace(SETTINGS, clip_norm=None), 100)
    start = optimizer.init_state(make_params(), adamw)
    gradients = constant_like(start.params, 0.3)
    state = start
    for _ in range(warmup_steps):
        state, metrics = jit_apply(state, gradients, adamw, loss=jnp.array(0.5), hold_decoder=jnp.array(True))
        np.testing.assert_array_equal(flat(state.params['decoder']), flat(start.params['decoder']))
        moved = flat(state.params['value_head']) - flat(start.params['value_head'])
        assert (moved != 0).all()
    if warmup_steps == 1:
        assert metrics['update_norm'][0] == pytest.approx(np.linalg.norm(moved), rel=1e-5)  # of what moved
    after, _ = jit_apply(state, gradients, adamw, loss=jnp.array(0.5))
    fresh, _ = jit_apply(start, gradients, adamw, loss=jnp.array(0.5))
    np.testing.assert_array_equal(flat(after.params['decoder']), flat(fresh.params['decoder']))
    np.testing.assert_array_equal(flat(after.opt_state['decoder']), flat(fresh.opt_state['decoder']))
    assert (flat(after.params['value_head']) != flat(fresh.params['value_head'])).all()


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        ('constant', [0.5, 1, 1, 1, 1, 1, 1]),
        ('linear', [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ('cosine', [0.5, 1, 0.2 + 0.4 * (1 + np.cos(np.pi / 4)), 0.6, 0.2 + 0.4 * (1 - np.cos(np.pi / 4)), 0.2, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=2, end_fraction=0.2)
    rate = optimizer.learning_rate_schedule(settings, total_steps=6)
    np.testing.assert_allclose([rate(jnp.array(i)) for i in range(7)], 2 * np.array(expected), rtol=1e-6)


def test_without_warmup_the_first_step_has_the_highest_rate():
    rate = optimizer.learning_rate_schedule(OptimizerSettings(learning_rate=1.0, schedule='linear'), total_steps=3)
    np.testing.assert_allclose([rate(jnp.array(i)) for i in range(3)], [1, 0.5, 0])


@pytest.mark.parametrize(
    'change',
    [
        {'learning_rate': 0.2}, {'schedule': 'linear'}, {'warmup_steps': 3}, {'b1': 0.5}, {'b2': 0.5}, {'epsilon': 0.1},
        {'weight_decay': 0.1}, {'clip_norm': None}, {'schedule': 'linear', 'end_fraction': 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_changes_the_result(change):
    def run(settings):
        adamw = optimizer.make_optimizer(settings, 10)
        state = optimizer.init_state(make_params(), adamw)
        for g in (3.0, -0.1):
            state, _ = optimizer.apply_gradients(state, constant_like(state.params, g), adamw, loss=jnp.array(0.5))
        return flat(state.params)

    base = SETTINGS if 'end_fraction' not in change else dataclasses.replace(SETTINGS, schedule='linear')
    assert not np.allclose(run(base), run(dataclasses.replace(base, **change)), rtol=1e-4)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('learning_rate', -1.0), ('learning_rate', float('nan')), ('schedule', 'step'), ('warmup_steps', -1),
        ('end_fraction', 1.5), ('b1', 1.0), ('b2', -0.1), ('epsilon', 0.0), ('weight_decay', -0.1), ('clip_norm', 0.0),
        ('learning_rate', 0.0), ('learning_rate', float('inf')), ('epsilon', float('inf')), ('clip_norm', float('inf')),
    ],
)  # fmt: skip
def test_impossible_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f'OptimizerSettings.{field}: expected .*, found '):
        dataclasses.replace(SETTINGS, **{field: value})


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match='warmup_steps: expected fewer than the 5 steps of the run, found 5'):
        optimizer.make_optimizer(dataclasses.replace(SETTINGS, warmup_steps=5), 5)


def test_parameters_must_be_float32():
    params = make_params()
    params['decoder']['embedding'] = params['decoder']['embedding'].astype(jnp.bfloat16)
    with pytest.raises(TypeError, match=r"params\['decoder'\]\['embedding'\]: expected float32, found bfloat16"):
        optimizer.init_state(params, optimizer.make_optimizer(SETTINGS, 5))
