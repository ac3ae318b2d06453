"""Layouts of weights change no result, and make a CPU's products fast."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.models.cache import CACHE_LAYOUTS
from simrl.models.layouts import FEW_TOKENS, MATRICES, Flat, OutputMajor, dense, flat, layers_apart, output_major
from simrl.models.log_probs import token_log_probs
from simrl.models.transformer import Execution, apply, init_cache, project
from tests.models.scene import CONFIG, ROWS, TIME, TOKENS, random_params

OUTPUTS_FIRST = {
    'query': (4, 8, 16),
    'key': (2, 8, 16),
    'value': (2, 8, 16),
    'output': (16, 4, 8),
    'gate': (24, 16),
    'up': (24, 16),
    'down': (16, 24),
}


@pytest.fixture(scope='module', params=[True, False], ids=['tied', 'head'])
def model(request):
    """A config, and a decoder of it."""
    config = dataclasses.replace(CONFIG, tied_embedding=request.param)
    return config, random_params(config)['decoder']


def logits(decoder, config, dtype):
    """Of a pass through a cache, as in sampling."""
    execution, params = Execution(dtype), {'decoder': decoder}
    hidden, _ = apply(params, config, execution, TOKENS, cache=init_cache(config, ROWS, TIME, dtype))
    assert hidden.dtype == dtype
    found = project(params, hidden)
    assert found.dtype == jnp.float32
    assert found.shape == (ROWS, TIME, config.padded_vocab_size)
    return found


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.1)])
@pytest.mark.parametrize('lie', [lambda decoder: decoder, output_major, flat], ids=['apart', 'outputs first', 'flat'])
def test_decoding_gives_what_the_stacked_layers_give(model, lie, dtype, tolerance, monkeypatch):
    """On a TPU, too, with flat weights and a cache whose time is first."""
    config, decoder = model
    expected = logits(decoder, config, 'float32')
    if lie is flat:
        monkeypatch.setitem(CACHE_LAYOUTS, 'cpu', 'time_first')
    found = logits(lie(layers_apart(decoder)), config, dtype)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_all_that_is_multiplied_has_its_outputs_first_and_nothing_is_held_twice(model):
    config, decoder = model
    lying = output_major(layers_apart(decoder))
    assert set(lying) == set(decoder)
    for layer in lying['layers']:
        matrices = {name: weights for name, weights in layer.items() if isinstance(weights, OutputMajor)}
        assert {name: weights.array.shape for name, weights in matrices.items()} == OUTPUTS_FIRST
    assert set(OUTPUTS_FIRST) == set(MATRICES)
    output = lying['embedding' if config.tied_embedding else 'head']
    assert isinstance(output, OutputMajor)
    assert output.array is decoder['embedding' if config.tied_embedding else 'head']


def test_flat_weights_are_matrices(model):
    _, decoder = model
    for layer in flat(layers_apart(decoder))['layers']:
        shapes = {name: weights.array.shape for name, weights in layer.items() if isinstance(weights, Flat)}
        assert shapes == {'query': (32, 16), 'key': (16, 16), 'value': (16, 16)}


def test_rows_can_be_scored_by_what_decoding_reads(model):
    config, decoder = model
    hidden, _ = apply({'decoder': decoder}, config, Execution(), TOKENS)
    arguments = hidden, TOKENS, TOKENS >= 0, jnp.arange(config.padded_vocab_size) < config.vocab_size
    expected = token_log_probs({'decoder': decoder}, *arguments)
    found = token_log_probs({'decoder': output_major(layers_apart(decoder))}, *arguments)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(('tokens', 'shape'), [(3, '48,3'), (FEW_TOKENS + 1, f'{FEW_TOKENS + 1},48')])
def test_the_compiled_product_of_few_tokens_has_weights_on_the_left(tokens, shape):
    """The reason for the layout. Without the barrier XLA swaps the operands."""
    random = np.random.default_rng(2)
    x, weights = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((1, tokens, 40), (40, 48)))
    product = jax.jit(dense)
    turned = OutputMajor(weights.T)
    for lying, expected in ((turned, shape), (weights, f'{tokens},48')):
        compiled = product.lower(x, lying).compile()
        assert re.findall(r' = f32\[([\d,]+)\]\S* dot\(', compiled.as_text()) == [expected]
    np.testing.assert_allclose(product(x, turned), product(x, weights), atol=1e-5)
