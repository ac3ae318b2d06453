"""Adapters against what the paper says of them, in float64 and layer by layer; and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.models import lora, transformer
from simrl.models.files.export import export
from simrl.models.files.huggingface import load_config, load_params
from simrl.models.lora import TARGETS, LoRASettings
from simrl.models.transformer import Execution, Params, TransformerConfig, apply, project
from simrl.run.config import ConfigError, from_config_dict
from tests.models.scene import numbers_kept

CONFIG = TransformerConfig(
    vocab_size=100,
    model_dim=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    max_positions=32,
    biases=('query', 'key', 'value'),
    tied_embedding=True,
)
EXECUTION = Execution()
ALL = LoRASettings(rank=3, alpha=12.0, targets=tuple(TARGETS))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 9)), jnp.int32)


def with_adapters(settings: LoRASettings = ALL, size: float = 0.3) -> Params:
    """A random model whose adapters add something."""
    params = transformer.init_params(jax.random.key(0), CONFIG)
    adapters = lora.init(jax.random.key(1), CONFIG, settings)
    for i, adapter in enumerate(adapters.values()):
        adapter['b'] = size * jax.random.normal(jax.random.key(2 + i), adapter['b'].shape)
    return params | {'adapters': adapters, 'adapter_scale': jnp.float32(settings.scale)}


@functools.partial(jax.jit, static_argnums=1)
def logits(params: Params, execution: Execution = EXECUTION) -> jax.Array:
    return project(params, apply(params, CONFIG, execution, TOKENS)[0])


def matrices(params: Params, name: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each layer W `[in, out]`, A `[in, rank]` and B `[rank, out]`, float64."""
    adapter = params['adapters'][name]
    rank = adapter['b'].shape[1]
    found = []
    for layer in range(CONFIG.num_layers):
        a = np.asarray(adapter['a'][layer], np.float64).reshape(-1, rank)
        b = np.asarray(adapter['b'][layer], np.float64).reshape(rank, -1)
        weights = np.asarray(params['decoder']['layers'][name][layer], np.float64)
        found.append((weights.reshape(len(a), -1), a, b))
    return found


def summed(params: Params, settings: LoRASettings = ALL) -> Params:
    """The decoder with its adapters added, matrix by matrix in float64."""
    layers = dict(params['decoder']['layers'])
    for name in params['adapters']:
        sums = [w + settings.alpha / settings.rank * a @ b for w, a, b in matrices(params, name)]
        layers[name] = jnp.asarray(np.stack(sums).reshape(layers[name].shape), jnp.float32)
    return {'decoder': params['decoder'] | {'layers': layers}}


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_what_was_not_trained_is_the_base_model_exactly(remat):
    base = transformer.init_params(jax.random.key(0), CONFIG)
    adapters = lora.init(jax.random.key(1), CONFIG, ALL)
    params = base | {'adapters': adapters, 'adapter_scale': jnp.float32(ALL.scale)}
    execution = Execution(remat=remat)
    np.testing.assert_array_equal(logits(params, execution), logits(base, execution))
    for name, adapter in adapters.items():
        assert not np.any(adapter['b'])
        deviation = np.std(adapter['a']) * np.sqrt(np.prod(adapter['a'].shape[1:-1]))
        assert 0.8 < deviation < 1.2, name  # of x A, for an x of deviation 1


@pytest.mark.parametrize('targets', [tuple(TARGETS), *((name,) for name in TARGETS)])
def test_the_model_and_the_merged_model_are_the_sum(targets):
    settings = dataclasses.replace(ALL, targets=targets)
    params = with_adapters(settings)
    expected = logits(summed(params, settings))
    np.testing.assert_allclose(logits(params), expected, atol=1e-5)
    np.testing.assert_allclose(logits(lora.merged(params, 'float32')), expected, atol=1e-5)
    base = logits({'decoder': params['decoder']})
    assert np.max(np.abs(expected - base)) > 0.05
    untouched = lora.merged(params, 'float32')['decoder']['layers']
    for name, weights in params['decoder']['layers'].items():
        assert np.array_equal(untouched[name], weights) == (name not in targets)


def test_decoding_with_a_cache_goes_by_the_adapters_too():
    params = with_adapters()
    cache = transformer.init_cache(CONFIG, 2, 9, 'float32')
    for position in range(9):
        at = jnp.full((2, 1), position, jnp.int32)
        hidden, cache = apply(params, CONFIG, Execution(), TOKENS[:, position : position + 1], at, cache)
    np.testing.assert_allclose(project(params, hidden)[:, 0], logits(params)[:, -1], atol=1e-5)


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_adapters_keep_no_more_for_gradients_than_weights_do(remat):
    """Of a sum x W + x A B one array is kept by 'dots', and not both; and x A is not."""
    params = with_adapters()

    def kept(trained: str) -> int:
        rest = {part: tree for part, tree in params.items() if trained == 'adapters' or part == 'decoder'}
        return numbers_kept(
            lambda x: jnp.sum(apply(rest | {trained: x}, CONFIG, Execution(remat=remat), TOKENS)[0]),
            params[trained],
            (CONFIG.num_layers, *TOKENS.shape),
        )

    assert kept('adapters') == kept('decoder') > 0


def test_gradients_are_those_through_the_merged_weights():
    """By the chain rule dA = s dW B', dB = s A' dW; and rematerialised layers have the same."""

    def loss(params: Params, execution: Execution = EXECUTION) -> jax.Array:
        return jnp.mean(jnp.square(jax.nn.log_softmax(logits(params, execution)[..., :100])))

    params = with_adapters()
    frozen = {part: params[part] for part in ('decoder', 'adapter_scale')}
    of_weights = jax.grad(loss)(summed(params))['decoder']['layers']
    for remat in ('none', 'full', 'dots'):
        found = jax.grad(lambda x, remat=remat: loss(frozen | {'adapters': x}, Execution(remat=remat)))(
            params['adapters']
        )
        for name in TARGETS:
            for layer, (w, a, b) in enumerate(matrices(params, name)):
                gradient = np.asarray(of_weights[name][layer], np.float64).reshape(w.shape)
                for part, expected in (('a', gradient @ b.T), ('b', a.T @ gradient)):
                    expected = (ALL.scale * expected).reshape(found[name][part][layer].shape)
                    np.testing.assert_allclose(found[name][part][layer], expected, atol=5e-5 * np.max(abs(expected)))


def test_a_merged_model_is_exported_and_read_back(tmp_path):
    params = with_adapters()
    export(lora.merged(params, 'float32'), CONFIG, None, tmp_path / 'model')
    config = load_config(tmp_path / 'model')
    read = load_params(tmp_path / 'model', config)
    hidden, _ = apply(read, config, Execution(), TOKENS)
    np.testing.assert_allclose(project(read, hidden)[..., :100], logits(params)[..., :100], atol=1e-5)


def test_the_sum_is_rounded_once():
    """Not first the weights and the addition, each to bfloat16."""
    params = with_adapters(size=0.01)
    merged, sums = lora.merged(params, 'bfloat16'), summed(params)
    for leaf, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(sums), strict=True):
        assert leaf.dtype == jnp.bfloat16
        different = np.mean(np.asarray(leaf != expected.astype(jnp.bfloat16)))
        assert different < 1e-2  # a float32 sum may lie on the other side of a tie


def test_an_adapter_starts_the_same_whatever_else_is_adapted():
    alone = lora.init(jax.random.key(1), CONFIG, dataclasses.replace(ALL, targets=('up',)))
    assert list(alone) == ['up']
    np.testing.assert_array_equal(alone['up']['a'], lora.init(jax.random.key(1), CONFIG, ALL)['up']['a'])


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('targets', ('query', 'q_proj'), "expected at least one of query, key, value, output, .*, found 'q_proj'"),
        ('targets', ('query', 'query'), "expected .* none twice, found 'query'"),
        ('targets', (), r'expected at least one of query, key, .* found \(\)'),
        ('rank', 0, 'expected at least 1, found 0'),
        ('alpha', 0.0, 'expected a number above 0, found 0.0'),
        ('alpha', float('nan'), 'expected a finite number, found nan'),
        ('alpha', None, 'expected float, found None'),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value, message):
    fields = {'rank': 2, 'alpha': 4.0, 'targets': ('query',)} | {field: value}
    with pytest.raises(ConfigError, match=rf'^config\.rl\.lora\.{field}: {message}'):
        from_config_dict(LoRASettings, fields, 'config.rl.lora')
