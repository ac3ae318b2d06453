"""Log-probabilities at trained positions against the plain formula: values, gradients, memory and cost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.models.log_probs import _Positions, token_log_probs
from simrl.models.transformer import Params, project

ROWS, TIME, DIM, VOCABULARY = 3, 16, 16, 128
RANDOM = np.random.default_rng(0)
TOKEN_MASK = (np.arange(VOCABULARY) % 3 != 0) & (np.arange(VOCABULARY) < 100)
TARGETS = RANDOM.choice(np.flatnonzero(TOKEN_MASK), (ROWS, TIME)).astype(np.int32)
HIDDEN = RANDOM.normal(size=(ROWS, TIME, DIM)).astype(np.float32)
WEIGHTS = RANDOM.normal(size=(VOCABULARY, DIM)).astype(np.float32)
SOME = RANDOM.random((ROWS, TIME)) < 0.4
MASKS = {'none': SOME & False, 'some': SOME, 'all': SOME | True}
# What a loss makes of log-probabilities and entropies.
FACTORS = RANDOM.normal(size=(2, ROWS, TIME)).astype(np.float32)


def model(weights: Any = WEIGHTS, tied: bool = True) -> Params:
    return {'decoder': {'embedding': weights} if tied else {'embedding': weights * 0, 'head': weights}}


def plain(params: Params, hidden: Any, targets: Any, trained: Any, token_mask: Any, temperature: Any) -> Any:
    logits = jnp.where(token_mask, project(params, hidden) / jnp.asarray(temperature).reshape(-1, 1, 1), -jnp.inf)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.where(token_mask, jnp.exp(log_probs) * jnp.where(token_mask, log_probs, 0.0), 0.0), axis=-1)
    log_prob = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return jnp.where(trained, log_prob, 0.0), jnp.where(trained, entropy, 0.0)


def loss(
    function: Any, factors: Any, params: Params, hidden: Any, trained: Any, temperature: Any
) -> tuple[jax.Array, Any]:
    found = function(params, hidden, TARGETS, trained, TOKEN_MASK, temperature)
    return factors[0] @ found[0].ravel() + factors[1] @ found[1].ravel(), found


@functools.cache
def differentiated(chunk: int | None) -> Any:
    """Of the plain formula where `chunk` is None."""
    function = plain if chunk is None else functools.partial(token_log_probs, chunk=chunk)
    return jax.jit(jax.value_and_grad(functools.partial(loss, function), argnums=(1, 2), has_aux=True))


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    ((_, values), gradients), ((_, plain_values), plain_gradients) = found, expected
    for x in values:
        assert (x.shape, x.dtype) == ((ROWS, TIME), jnp.float32)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance), values, plain_values)

    def close(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))

    jax.tree.map(close, gradients, plain_gradients)


@pytest.mark.parametrize('chunk', [1, 5, TIME, 1000])  # 5 does not divide the time
@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'head'])
def test_values_and_gradients_are_the_plain_ones(chunk: int, mask: str, tied: bool) -> None:
    temperature = np.array([0.5, 1.0, 2.0], np.float32)
    arguments = FACTORS.reshape(2, -1), model(tied=tied), HIDDEN, MASKS[mask], temperature
    found = differentiated(chunk)(*arguments)
    assert_same(found, differentiated(None)(*arguments))
    weights = np.asarray(found[1][0]['decoder']['embedding' if tied else 'head'])
    assert not weights[~TOKEN_MASK].any()  # masked rows learn nothing
    assert weights[TOKEN_MASK].any() == (mask != 'none')


@pytest.mark.parametrize('factors', [(1, 0), (0, 1)], ids=['log_prob', 'entropy'])
def test_each_of_the_two_has_its_own_gradient(factors: tuple[int, int]) -> None:
    """At one temperature for all rows."""
    arguments = np.array(factors)[:, None] * FACTORS.reshape(2, -1), model(), HIDDEN, SOME, np.float32(0.7)
    assert_same(differentiated(5)(*arguments), differentiated(None)(*arguments))


def test_an_entropy_that_nothing_reads_is_not_computed() -> None:
    """The gradient is that of a loss in which its factor is 0, of fewer exponentials."""

    def gradient(used: bool) -> Any:
        def total(params: Params, hidden: Any, factor: Any) -> jax.Array:
            log_prob, entropy = token_log_probs(params, hidden, TARGETS, SOME, TOKEN_MASK, chunk=5)
            return FACTORS[0].ravel() @ log_prob.ravel() + (factor * jnp.sum(entropy) if used else 0.0)

        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(model(), HIDDEN, 0.0).compile()

    with_it, without = gradient(used=True), gradient(used=False)
    jax.tree.map(np.testing.assert_array_equal, with_it(model(), HIDDEN, 0.0), without(model(), HIDDEN, 0.0))
    exponentials = [program.as_text().count(' exponential(') for program in (with_it, without)]
    assert exponentials[0] == exponentials[1] + 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=ROWS * TIME, max_size=ROWS * TIME))
def test_any_mask(mask: list[bool]) -> None:
    arguments = FACTORS.reshape(2, -1), model(), HIDDEN, np.array(mask).reshape(ROWS, TIME), np.ones(ROWS, np.float32)
    assert_same(differentiated(5)(*arguments), differentiated(None)(*arguments))


def test_narrow_hidden_states() -> None:
    """bfloat16 products; the gradient of float32 weights is summed up in float32."""
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    arguments = FACTORS.reshape(2, -1), model(), hidden, SOME, np.float32(0.7)
    found, expected = differentiated(5)(*arguments), differentiated(None)(*arguments)
    assert found[1][0]['decoder']['embedding'].dtype == jnp.float32
    assert_same(found, expected, 2e-2)


def test_what_is_not_trained_does_not_matter() -> None:
    arguments = FACTORS.reshape(2, -1), model(), HIDDEN, SOME, np.float32(1.0)
    expected = differentiated(5)(*arguments)
    hidden = np.where(SOME[..., None], HIDDEN, np.nan)
    found = differentiated(5)(*arguments[:2], hidden, *arguments[3:])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_masked_tokens_have_no_probability() -> None:
    @jax.jit
    def prob_of(token: Any) -> Any:
        everywhere = MASKS['all']
        return jnp.exp(token_log_probs(model(), HIDDEN, jnp.full_like(TARGETS, token), everywhere, TOKEN_MASK)[0])

    assert not any(np.any(prob_of(token)) for token in (0, 3, 100, 127))
    np.testing.assert_allclose(sum(np.asarray(prob_of(token)) for token in np.flatnonzero(TOKEN_MASK)), 1.0, rtol=1e-5)


def compiled(vocabulary: int, time: int, chunk: int, *, frozen: bool = False, dim: int = 64) -> Any:
    """The gradient of a loss by the hidden states, and by the weights where they are not frozen."""
    rows = 4

    def total(hidden: Any, weights: Any, targets: Any, trained: Any) -> Any:
        token_mask = jnp.ones(vocabulary, bool)
        log_prob, entropy = token_log_probs(model(weights), hidden, targets, trained, token_mask, chunk=chunk)
        return jnp.sum(log_prob + 0.1 * entropy)

    shapes = [
        jax.ShapeDtypeStruct((rows, time, dim), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, time), jnp.int32),
        jax.ShapeDtypeStruct((rows, time), bool),
    ]
    return jax.jit(jax.grad(total, argnums=0 if frozen else (0, 1))).lower(*shapes).compile()


def temp_bytes(*args: int, **kwargs: Any) -> int:
    return int(compiled(*args, **kwargs).memory_analysis().temp_size_in_bytes)


def test_memory_holds_logits_of_a_chunk_only() -> None:
    """Twice the time adds hidden states; twice the vocabulary a chunk's logits; neither their product."""
    vocabulary, time, chunk, rows, dim = 2048, 512, 32, 4, 64
    base = temp_bytes(vocabulary, time, chunk)
    assert base < 4 * rows * time * vocabulary  # less than all logits once
    longer = temp_bytes(vocabulary, 2 * time, chunk) - base
    assert longer <= 4 * rows * time * (2 * dim + 32)
    wider = temp_bytes(2 * vocabulary, time, chunk) - base
    assert wider <= 4 * vocabulary * (4 * chunk + 2 * dim)
    assert abs(temp_bytes(2 * vocabulary, 2 * time, chunk) - base - longer - wider) < 0.1 * base


def test_frozen_weights_get_no_gradient() -> None:
    vocabulary, dim = 4096, 256
    both, frozen = (temp_bytes(vocabulary, 16, 4, dim=dim, frozen=x) for x in (False, True))
    assert frozen < 4 * vocabulary * dim <= both


@pytest.mark.parametrize('trained', [0, 1, 127, 128, 129, 2048])
def test_logits_are_made_as_often_as_trained_positions_need(trained: int) -> None:
    """Whatever the rows are: `chunk` positions a round, and no round for positions that are not trained."""
    mask = np.zeros(2048, bool)
    mask[np.random.default_rng(0).permutation(2048)[:trained]] = True
    for rows in (2, 16, 128):
        positions = _Positions.of(jnp.asarray(mask.reshape(rows, -1)), 128, None)
        assert positions.num_chunks == -(-trained // 128)
        assert positions.chunk == 128
        np.testing.assert_array_equal(positions.indices[:trained], np.flatnonzero(mask))
