"""Attention by blocks and by kernels against attention with all scores at once, and against loops in NumPy."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from simrl.models import attention, attention_kernels, chunked_attention, transformer
from simrl.models.attention import attend, cached_attention, causal_attention, choose
from simrl.models.cache import CACHE_LAYOUTS, cache_prefix, extended, with_cache_prefix, write_cache
from simrl.models.transformer import Execution, apply, init_cache
from tests.models.scene import CONFIG, random_params


def slow(query, key, value, visible):
    """Attention by its definition, one query of one head at a time, in float64; `visible` is bool `[B, T, S]`."""
    batch, time, heads, head_dim = query.shape
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    found = np.zeros(query.shape)
    for b in range(batch):
        for head in range(heads):
            own = head // (heads // key.shape[2])
            for t in range(time):
                seen = np.flatnonzero(visible[b, t])
                if len(seen):
                    scores = key[b, seen, own] @ query[b, t, head] / math.sqrt(head_dim)
                    weights = np.exp(scores - scores.max())
                    found[b, t, head] = weights @ value[b, seen, own] / weights.sum()
    return found


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, shape), jnp.float32)


# Blocks.


def gradients(function):
    """A program: result and gradients of query, key and value, for arrays and a gradient of the result."""

    @jax.jit
    def both(query, key, value, gradient):
        found, backward = jax.vjp(function, query, key, value)
        return found, backward(gradient)

    return both


BLOCKS = {  # rows, time, query heads, key/value heads, about how many positions of a block
    'all heads read one, the last of three blocks is padded': (3, 37, 4, 1, 16),
    'a row is less than a block': (2, 9, 6, 3, 32),
}


@pytest.mark.parametrize('sizes', BLOCKS.values(), ids=BLOCKS)
def test_blocks_compute_what_whole_rows_do(sizes):
    """Values and gradients, of rows that end anywhere in a block; what follows a row's end changes neither."""
    batch, time, heads, kv_heads, chunk = sizes
    whole = gradients(functools.partial(causal_attention, implementation='xla'))
    chunked = gradients(functools.partial(chunked_attention.causal, chunk=chunk))
    causal = np.broadcast_to(np.tril(np.ones((time, time), bool)), (batch, time, time))

    @settings(max_examples=10, deadline=None)
    @given(lengths=st.lists(st.integers(1, time), min_size=batch, max_size=batch), seed=st.integers(0, 99))
    def check(lengths, seed):
        arrays = [normal(seed + i, batch, time, n, 4) for i, n in enumerate((heads, kv_heads, kv_heads, heads))]
        real = np.arange(time) < np.array(lengths)[:, None]
        query, key, value, gradient = (jnp.where(real[..., None, None], x, 0) for x in arrays)
        junk = [jnp.where(real[..., None, None], x, 7.0) for x in arrays[:3]]
        expected, expected_gradients = whole(query, key, value, gradient)
        found, found_gradients = chunked(*junk, gradient)
        np.testing.assert_allclose(found[real], expected[real], atol=2e-5)
        np.testing.assert_allclose(found[real], slow(*junk, causal)[real], atol=2e-5)
        for part, whole_part in zip(found_gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(part, whole_part, atol=1e-4)

    check()


CAPACITY, TIME, HEADS, KV_HEADS = 37, 6, 6, 2


@functools.partial(jax.jit, static_argnums=4)
def chunked_cache(query, keys, values, positions, chunk):
    return chunked_attention.cached(query, keys, values, positions, chunk)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([5, 8, 37, 99]), seed=st.integers(0, 99))
def test_blocks_of_a_cache_are_the_whole_cache(data, chunk, seed):
    """Rows with prefixes of different lengths are given different numbers of tokens; some none."""
    batch, head_dim = 3, 4
    counts = np.array([data.draw(st.integers(0, TIME)) for _ in range(batch)])
    prefix = np.array([data.draw(st.integers(0, CAPACITY - count)) for count in counts.tolist()])
    index = np.arange(TIME)
    positions = np.where(index < counts[:, None], prefix[:, None] + index, CAPACITY)
    query = normal(seed, batch, TIME, HEADS, head_dim)
    key, value = (normal(seed + i, batch, CAPACITY, KV_HEADS, head_dim) for i in (1, 2))
    unused = (np.arange(CAPACITY) >= (prefix + counts)[:, None])[..., None, None]
    key, value = (jnp.where(unused, 7.0, x) for x in (key, value))
    found = chunked_cache(query, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), jnp.asarray(positions), chunk)
    assert np.all(np.isfinite(found))  # padding, too: it goes through the layers that follow
    real = index < counts[:, None]
    visible = np.arange(CAPACITY) <= positions[..., None]
    np.testing.assert_allclose(found[real], slow(query, key, value, visible)[real], atol=2e-5)


@pytest.mark.parametrize('implementation', ['xla', 'chunked'])
def test_layouts_of_a_cache_hold_the_same(implementation, monkeypatch):
    """Tokens are written and attended to in either, also past the capacity, with heads that are repeated."""
    config, batch, capacity = CONFIG, 3, 24
    positions = jnp.asarray([[0, 1, 2, 3], [19, 20, 21, 22], [22, 23, 24, 25]])
    query = normal(0, batch, 4, config.num_heads, config.head_dim)
    key, value = (normal(i, batch, 4, 2 * config.num_kv_heads, config.head_dim) for i in (1, 2))
    monkeypatch.setattr(transformer, 'heads_of_cache', lambda *_: 2 * config.num_kv_heads)
    found = {}
    for layout in ('heads_first', 'time_first'):
        monkeypatch.setitem(CACHE_LAYOUTS, 'cpu', layout)
        cache = extended(init_cache(config, batch, 16, 'float32'), capacity)
        assert cache.capacity == capacity
        assert cache_prefix(cache, 16).capacity == 16
        written = with_cache_prefix(cache, jax.tree.map(lambda x: x + 1, cache_prefix(cache, 16)))
        in_prefix = written.map(lambda x, axis: jnp.moveaxis(x, axis, 0)).value[0]
        assert np.array_equal(
            in_prefix, np.broadcast_to((np.arange(capacity) < 16)[:, None, None, None], in_prefix.shape)
        )
        filled = jax.tree.map(lambda x: x + 0.5, (cache.key[0], cache.value[0]))
        keys, values = write_cache(*filled, positions, key, value, layout)
        mixed = cached_attention(query, key, value, keys, values, positions, implementation, layout)
        if layout == 'heads_first':
            keys, values = keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2)
        found[layout] = keys, values, mixed[:2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *found.values())
    keys, _, _ = found['time_first']
    expected = np.full((batch, capacity, 4, config.head_dim), 0.5, np.float32)
    for row in range(batch):
        for i, position in enumerate(positions[row].tolist()):
            if position < capacity:
                expected[row, position] = key[row, i]
    np.testing.assert_array_equal(keys, expected)


def test_bfloat16_rounds_no_more_than_whole_rows_do():
    shapes = [(2, 40, heads, 8) for heads in (4, 2, 2)]
    query, key, value = (normal(i, *shape) for i, shape in enumerate(shapes))
    exact = causal_attention(query, key, value, 'xla')
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    whole, chunked = causal_attention(*half, 'xla'), chunked_attention.causal(*half, 16)
    assert chunked.dtype == jnp.bfloat16
    error, allowed = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (chunked, whole))
    assert error < 1.5 * allowed


# The decoder.


def test_the_decoder_learns_the_same_by_blocks(monkeypatch):
    """With remat, which computes each layer anew."""
    monkeypatch.setitem(attention.CHUNK, 'cpu', 16)
    params = random_params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 40)), jnp.int32)

    def loss(params, execution):
        return jnp.mean(jnp.square(apply(params, CONFIG, execution, tokens)[0]))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, found = gradient(params, Execution(attention='chunked', remat='full'))
    whole, expected = gradient(params, Execution(attention='xla'))
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)


def equations(jaxpr):
    """All equations of a program, those within loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def sizes(jaxpr):
    return (variable.aval.size for equation in equations(jaxpr) for variable in equation.outvars)


def test_dots_computes_no_block_again():
    """The loops over blocks of keys are those of a gradient that keeps all."""
    params, tokens = random_params(), jnp.zeros((2, 40), jnp.int32)

    def loops(remat):
        execution = Execution(attention='chunked', remat=remat)
        gradient = jax.grad(lambda params: jnp.sum(apply(params, CONFIG, execution, tokens)[0]))
        return sum(equation.primitive.name == 'while' for equation in equations(jax.make_jaxpr(gradient)(params).jaxpr))

    assert 0 < loops('dots') == loops('none') < loops('full')


@pytest.mark.parametrize(('implementation', 'holds_them'), [('auto', False), ('xla', True)])
def test_no_pass_has_the_scores_of_whole_long_rows(implementation, holds_them):
    execution = Execution(attention=implementation)
    params, time = random_params(), 2048
    scores = CONFIG.num_heads * time * time

    def loss(params):
        tokens = jnp.zeros((1, time), jnp.int32)
        return jnp.sum(apply(params, CONFIG, execution, tokens)[0])

    def hear(params, cache):
        positions = jnp.arange(time)[None]
        return apply(params, CONFIG, execution, jnp.zeros((1, time), jnp.int32), positions, cache)

    cache = jax.eval_shape(lambda: init_cache(CONFIG, 1, time, 'float32'))
    for program in (jax.make_jaxpr(jax.grad(loss))(params), jax.make_jaxpr(hear)(params, cache)):
        assert (max(sizes(program.jaxpr)) >= scores) == holds_them


def test_short_rows_and_few_tokens_are_computed_whole():
    """As they always were: the results of short rows stay what they are to the last bit."""
    short, capacity, few = attention.LONG_ROW['cpu'] - 1, attention.LONG_CACHE['cpu'], attention.FEW_TOKENS - 1
    arrays = [normal(i, 1, short, heads, 4) for i, heads in enumerate((2, 1, 1))]
    auto, whole = (jax.jit(causal_attention, static_argnums=3)(*arrays, name) for name in ('auto', 'xla'))
    np.testing.assert_array_equal(auto, whole)
    cache = normal(4, 1, 1, 4, capacity), normal(5, 1, 1, capacity, 4)
    positions = capacity // 2 + jnp.arange(few)[None]
    query, key, value = (x[:, :few] for x in arrays)
    auto = cached_attention(query, key, value, *cache, positions, 'auto')
    np.testing.assert_array_equal(auto, attend(query, *cache, jnp.arange(capacity) <= positions[:, :, None]))


# Kernels, and which is chosen.


def shape(time, dtype='bfloat16', head_dim=128):
    return jax.ShapeDtypeStruct((1, time, 4, head_dim), dtype)


@pytest.mark.parametrize(
    ('platform', 'query', 'chosen'),
    [
        ('cpu', shape(255), 'xla'),
        ('cpu', shape(256), 'chunked'),
        ('tpu', shape(255), 'xla'),
        ('tpu', shape(256), 'splash'),
        ('tpu', shape(4096, 'float32', 64), 'splash'),
        ('gpu', shape(16), 'cudnn'),
        ('gpu', shape(1023, 'float32'), 'xla'),
        ('gpu', shape(1024, 'float32'), 'chunked'),
        ('gpu', shape(4096, head_dim=192), 'chunked'),
    ],
)
def test_auto(platform, query, chosen):
    assert choose('auto', platform, query) == chosen
    assert choose('xla', platform, query) == 'xla'


@pytest.mark.parametrize(
    ('capability', 'chosen'), [('9.0', 'cudnn'), ('12.0', 'cudnn'), ('7.5', 'chunked'), ('gfx90a', 'chunked')]
)
def test_gpus_without_cudnns_attention(monkeypatch, capability, chosen):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'local_devices', lambda: [SimpleNamespace(compute_capability=capability)] * 2)
    assert choose('auto', 'gpu', shape(2048)) == chosen


@pytest.mark.parametrize(('name', 'device'), [('splash', 'TPU'), ('cudnn', 'GPU')])
def test_a_kernel_without_its_device(name, device):
    query = normal(0, 1, 8, 2, 4)
    with pytest.raises(ValueError, match=f"Execution.attention: '{name}' needs a {device}, found cpu"):
        causal_attention(query, query, query, name)


def kernels_on_tpus(function, *arrays):
    """The calls of kernels in a program for 2 x 2 TPUs."""
    device = AbstractDevice(device_kind='TPU v5', num_cores=2, platform='tpu')
    mesh = AbstractMesh((2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=('tpu',)).as_text()
    return [line for line in text.splitlines() if 'tpu_custom_call' in line]


def test_absent_tpus_attend_by_splash():
    """For each device one kernel of its own row, and of its two heads: the key/value head is whole on both."""
    arrays = [jax.ShapeDtypeStruct((2, 300, heads, 128), jnp.bfloat16) for heads in (4, 1, 1)]
    (call,) = kernels_on_tpus(lambda *arrays: causal_attention(*arrays, 'auto'), *arrays)
    assert 'tensor<2x384x128xbf16>' in call
    assert 'tensor<1x384x128xbf16>' in call


def test_absent_tpus_hear_by_splash():
    """A kernel for the cache, one row and its two heads a device, and one for the given tokens."""
    cache = [jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16)] * 2
    given = [jax.ShapeDtypeStruct((2, 40, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    positions = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    calls = kernels_on_tpus(lambda *arrays: cached_attention(*arrays, 'auto', 'time_first'), *given, *cache, positions)
    assert len(calls) == 2
    assert 'tensor<1x1024x128xbf16>' in calls[0]
    assert 'tensor<2x128x128xbf16>' in calls[1]


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention, interpreted on the CPU."""
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, 'make_splash_mha_single_device', make)


@pytest.mark.long
def test_splash_computes_what_whole_rows_do(interpreted):
    arrays = [normal(i, 2, 200, heads, 64) / 2 for i, heads in enumerate((4, 2, 2, 4))]
    expected, backward = jax.vjp(lambda *arrays: causal_attention(*arrays, 'xla'), *arrays[:3])
    found, splash_backward = jax.vjp(attention_kernels.splash, *arrays[:3])
    gradients = splash_backward(arrays[3])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for part, whole in zip(gradients, backward(arrays[3]), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize('capacity', [256, 200])
def test_splash_attends_to_a_cache_as_a_whole(capacity, interpreted):
    """Of rows with a prefix, without one, with few tokens and with none; blocks need not divide the cache."""
    time, heads, kv_heads, head_dim = 9, 6, 2, 16
    counts, prefix = np.array([9, 9, 3, 0]), np.array([150, 0, 64, 7])
    index = np.arange(time)
    positions = np.where(index < counts[:, None], prefix[:, None] + index, capacity)
    query = normal(0, 4, time, heads, head_dim) / 2
    whole = [normal(i, 4, capacity, kv_heads, head_dim) / 2 for i in (1, 2)]
    given = [jax.vmap(lambda row, at: row.at[at].get(mode='fill', fill_value=7.0))(x, positions) for x in whole]
    found = attention_kernels.splash_cached(query, *given, *whole, jnp.asarray(positions))
    assert np.all(np.isfinite(found))
    real = index < counts[:, None]
    expected = slow(query, *whole, np.arange(capacity) <= positions[..., None])
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
