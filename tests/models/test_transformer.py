"""The decoder: cached against full passes, causality and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.models import lora
from simrl.models.layouts import MATRICES
from simrl.models.transformer import (
    Execution,
    RopeScaling,
    TransformerConfig,
    apply,
    apply_head,
    init_cache,
    init_head,
    project,
    rope_frequencies,
)
from tests.models.scene import CONFIG, ROWS, TIME, TOKENS, numbers_kept, random_params

EXECUTION = Execution()


@pytest.fixture(scope='module')
def params():
    return random_params()


@pytest.fixture(scope='module')
def tokens():
    return TOKENS


@jax.jit
def full(params, tokens):
    return apply(params, CONFIG, EXECUTION, tokens)[0]


@jax.jit
def extend(params, tokens, positions, cache):
    return apply(params, CONFIG, EXECUTION, tokens, positions, cache)


# Cached = full.


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_cached_chunks_equal_the_full_pass(params, tokens, data):
    """Rows of different lengths are fed in chunks of random sizes, each row with its own; the rest are dropped."""
    lengths = [data.draw(st.integers(1, TIME)) for _ in range(ROWS)]
    width = 4  # of every call, so that one program serves all chunk sizes
    expected = np.asarray(full(params, tokens))
    # Whatever an unused slot holds must not matter.
    cache = jax.tree.map(lambda x: x + 7.0, init_cache(CONFIG, ROWS, TIME, 'float32'))
    fed = np.zeros(ROWS, int)
    found = np.full(expected.shape, np.nan)
    while (fed < lengths).any():
        sizes = [data.draw(st.integers(0, min(width, n - f))) for n, f in zip(lengths, fed, strict=True)]
        if not any(sizes):
            sizes = [min(1, n - f) for n, f in zip(lengths, fed, strict=True)]
        chunk = np.full((ROWS, width), 99, np.int32)
        positions = np.full((ROWS, width), TIME, np.int32)  # at the capacity: not written
        for row, size in enumerate(sizes):
            span = slice(fed[row], fed[row] + size)
            chunk[row, :size] = tokens[row, span]
            positions[row, :size] = np.arange(TIME)[span]
        hidden, cache = extend(params, jnp.asarray(chunk), jnp.asarray(positions), cache)
        for row, size in enumerate(sizes):
            found[row, fed[row] : fed[row] + size] = hidden[row, :size]
        fed += sizes
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=2e-5)


def test_positions_at_the_capacity_write_nothing(params, tokens):
    cache = init_cache(CONFIG, ROWS, TIME, 'float32')
    positions = jnp.full((ROWS, 4), TIME)
    _, after = extend(params, tokens[:, :4], positions, cache)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after))
    _, after = extend(params, tokens[:, :4], jnp.broadcast_to(jnp.arange(4), (ROWS, 4)), cache)
    expected = np.broadcast_to(np.arange(TIME) < 4, (ROWS, TIME))
    for key, value in zip(after.key, after.value, strict=True):
        np.testing.assert_array_equal(np.any(np.asarray(key) != 0, axis=(1, 2)), expected)
        np.testing.assert_array_equal(np.any(np.asarray(value) != 0, axis=(1, 3)), expected)


def test_bfloat16_computes_the_same_roughly(params, tokens):
    half = jax.jit(lambda params: apply(params, CONFIG, Execution(dtype='bfloat16'), tokens)[0])(params)
    assert half.dtype == jnp.bfloat16
    assert project(params, half).dtype == jnp.float32
    whole = np.asarray(full(params, tokens))
    assert np.max(np.abs(np.asarray(half, np.float32) - whole)) < 0.1 * np.max(np.abs(whole))


# Causality.


def test_causality_by_gradient(params, tokens):
    """The hidden state of a position depends on the tokens up to it, on each of them, and on no later one."""

    @jax.jit
    def influence(embedding):
        # A row of the embedding per position: token t of row 0 reads row t.
        def hidden(embedding):
            changed = params | {'decoder': params['decoder'] | {'embedding': embedding}}
            # A random projection: a plain sum could cancel.
            weights = jax.random.normal(jax.random.key(5), (CONFIG.model_dim,))
            return apply(changed, CONFIG, EXECUTION, jnp.arange(TIME)[None])[0][0] @ weights

        return jnp.abs(jax.jacrev(hidden)(embedding)).sum(-1)[:, :TIME]  # [position, token]

    touched = np.asarray(influence(params['decoder']['embedding'])) > 0
    np.testing.assert_array_equal(touched, np.tril(np.ones((TIME, TIME), bool)))


# Remat.


def mean_square(params, tokens, execution):
    return jnp.mean(jnp.square(apply(params, CONFIG, execution, tokens)[0]))


def differentiate(execution):
    return jax.jit(jax.value_and_grad(functools.partial(mean_square, execution=execution)))


@pytest.fixture(scope='module')
def without_remat(params, tokens):
    return differentiate(EXECUTION)(params, tokens)


@pytest.mark.parametrize('policy', ['full', 'dots'])
def test_remat_changes_how_and_not_what(params, tokens, policy, without_remat):
    execution = Execution(remat=policy)
    remat = differentiate(execution)
    value, gradient = remat(params, tokens)
    np.testing.assert_allclose(value, without_remat[0], rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient, without_remat[1])
    # It is really on: the backward pass has the recomputation, and less is kept between the passes.
    assert 'remat' not in str(jax.make_jaxpr(differentiate(EXECUTION))(params, tokens))
    assert 'remat' in str(jax.make_jaxpr(remat)(params, tokens))
    assert kept(params, execution) < kept(params, EXECUTION)


def kept(params, execution):
    leading = (CONFIG.num_layers, ROWS, TIME)
    return numbers_kept(lambda changed: mean_square(changed, TOKENS, execution), params, leading)


def test_dots_keeps_what_matrices_give(params):
    """Of each token and layer what query, key, value, output, gate and up give; nothing reads what down gives again."""
    c = CONFIG
    given = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.model_dim + 2 * c.mlp_dim
    more = kept(params, Execution(remat='dots')) - kept(params, Execution(remat='full'))
    assert more == c.num_layers * ROWS * TIME * given


# Another structure: OLMo 2's norms, and all biases.


def test_norms_after_and_over_all_heads_decode_train_and_take_adapters():
    config = dataclasses.replace(CONFIG, norm_placement='after', qk_norm='all_heads', biases=tuple(MATRICES))
    params = random_params(config)
    layers = params['decoder']['layers']
    assert (layers['query_norm'].shape, layers['key_norm'].shape) == ((2, 4, 8), (2, 2, 8))
    assert {f'{name}_bias' for name in MATRICES} <= layers.keys()
    adapters = lora.init(jax.random.key(0), config, lora.LoRASettings(rank=2, alpha=2.0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    params = params | {'adapters': adapters, 'adapter_scale': jnp.float32(1.0)}

    def loss(params, execution):
        return jnp.mean(jnp.square(project(params, apply(params, config, execution, TOKENS)[0])))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    found, expected = gradient(params, Execution(remat='full')), gradient(params, EXECUTION)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found, expected)
    for path, leaf in jax.tree_util.tree_flatten_with_path(expected['decoder']['layers'])[0]:
        assert np.all(np.any(leaf, axis=tuple(range(1, leaf.ndim)))), path

    hidden = jax.jit(lambda params: apply(params, config, EXECUTION, TOKENS)[0])(params)
    merged = lora.merged(params, 'float32')
    decode = jax.jit(functools.partial(apply, config=config, execution=EXECUTION))
    cache, parts = init_cache(config, ROWS, TIME, 'float32'), []
    for start in range(0, TIME, 4):
        positions = jnp.broadcast_to(jnp.arange(start, start + 4), (ROWS, 4))
        part, cache = decode(merged, tokens=TOKENS[:, start : start + 4], positions=positions, cache=cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), hidden, atol=2e-5)


# Parts.


def test_heads_start_at_zero_and_are_float32(params, tokens):
    hidden = full(params, tokens).astype(jnp.bfloat16)
    assert not np.any(apply_head(init_head(CONFIG), hidden))
    head = {'kernel': jnp.arange(16.0), 'bias': jnp.float32(2.0)}
    values = apply_head(head, hidden)
    assert (values.shape, values.dtype) == ((ROWS, TIME), jnp.float32)
    np.testing.assert_allclose(values, np.asarray(hidden, np.float32) @ np.arange(16.0) + 2.0, rtol=1e-4)


def test_llama3_frequencies_at_both_ends():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    plain = TransformerConfig(**{**CONFIG.__dict__, 'head_dim': 64})
    scaled = TransformerConfig(**{**plain.__dict__, 'rope_scaling': scaling})
    ratio = np.asarray(rope_frequencies(scaled) / rope_frequencies(plain))
    turns = 64 * np.asarray(rope_frequencies(plain)) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns >= 4], 1.0)
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 2
    assert np.all((ratio[between] > 1 / 8) & (ratio[between] < 1))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'num_heads': 3}, 'num_heads: expected a multiple of num_kv_heads=2, found 3'),
        ({'head_dim': 7}, 'head_dim: expected an even number'),
        ({'num_layers': 0}, 'num_layers: expected at least 1, found 0'),
        ({'biases': ('up', 'query')}, 'biases: expected names of query, .*, in this order, found up, query'),
        ({'biases': ('head',)}, 'biases: expected names of query, .*, found head'),
        ({'sliding_window': 0}, 'sliding_window: expected at least 1, or None, found 0'),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**CONFIG.__dict__, **change})


def test_cudnn_needs_bfloat16():
    with pytest.raises(ValueError, match="'cudnn' needs dtype 'bfloat16'"):
        Execution(attention='cudnn')
