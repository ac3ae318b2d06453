"""Drawing tokens: the right distribution, in id order, the same whatever else there is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.models import transformer
from simrl.models.cache import extended
from simrl.models.log_probs import token_log_probs
from simrl.rollouts import generate as sampler
from simrl.rollouts.agents import Policy
from simrl.rollouts.context import Context, prefill
from simrl.rollouts.generate import SampledMessage, generate, prefix_lengths
from simrl.rollouts.token_sampling import Draw, Sampling, most_probable, sample_rows, sample_token, unpack_bits
from tests.rollouts import scene, slow

V = 256
TOKEN_MASK = np.zeros(V, bool)
TOKEN_MASK[3:200:2] = True
_sample = jax.jit(sample_token, static_argnames=('top_k', 'top_p', 'min_p'))


def _logits(rows: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32)


def _prob(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    tempered = np.where(TOKEN_MASK, logits.astype(np.float64) / temperature, -np.inf)
    prob = np.exp(tempered - tempered.max(-1, keepdims=True))
    return prob / prob.sum(-1, keepdims=True)


@functools.cache
def _grid_draws(temperature: float = 1.0, **filters: float) -> tuple[np.ndarray, np.ndarray]:
    """One row of logits, drawn from at 4,096 evenly spaced numbers."""
    uniform = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
    logits = np.repeat(_logits(1), len(uniform), axis=0)
    token, log_prob = _sample(logits, TOKEN_MASK, uniform, temperature, **filters)
    return np.asarray(token), np.asarray(log_prob)


def test_tokens_come_in_id_order_each_as_often_as_it_is_probable() -> None:
    for temperature in (1.0, 0.5):
        token, _ = _grid_draws(temperature)
        assert np.all(np.diff(token) >= 0)
        counts = np.bincount(token, minlength=V)
        assert np.abs(counts - 4096 * _prob(_logits(1), temperature)[0]).max() < 1.01


def test_random_keys_give_the_distribution() -> None:
    keys = jax.random.split(jax.random.key(1), 4096)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
    token, _ = _sample(np.repeat(_logits(1), 4096, axis=0), TOKEN_MASK, uniform, 1.0)
    prob = _prob(_logits(1))[0]
    counts = np.bincount(np.asarray(token), minlength=V)
    common = prob * 4096 >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = 4096 * np.append(prob[common], prob[~common].sum())
    chi_square = np.sum((observed - expected) ** 2 / expected)
    degrees = len(observed) - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_padding_the_vocabulary_changes_no_token() -> None:
    """Also at numbers on the borders between tokens, where the last bit of a sum decides."""
    random = np.random.default_rng(2)
    rows, base = 512, 700
    logits = 3 * random.standard_normal((rows, base)).astype(np.float32)
    prob = np.exp(logits.astype(np.float64))
    borders = np.cumsum(prob, axis=1) / prob.sum(1, keepdims=True)
    uniform = np.clip(borders[np.arange(rows), random.integers(0, base - 1, rows)], 0, 1 - 2**-24).astype(np.float32)
    for filters in ({}, {'top_k': 200, 'top_p': 0.9}):
        draws = []
        for size in (768, 1408):
            padded = np.full((rows, size), 50, np.float32)  # padding would win if it were not masked
            padded[:, :base] = logits
            token, _ = _sample(padded, np.arange(size) < base, uniform, 1.0, **filters)
            draws.append(np.asarray(token))
        assert np.array_equal(*draws)


def test_a_row_does_not_see_its_batch_mates() -> None:
    logits, uniform = _logits(4096, 3), np.random.default_rng(3).random(4096, np.float32)
    order = np.random.default_rng(4).permutation(4096)
    token, log_prob = _sample(logits, TOKEN_MASK, uniform, 1.0)
    shuffled, shuffled_log_prob = _sample(logits[order], TOKEN_MASK, uniform[order], 1.0)
    assert np.array_equal(np.asarray(token)[order], shuffled)
    assert np.array_equal(np.asarray(log_prob)[order], shuffled_log_prob)


def test_only_allowed_tokens_come_even_at_the_ends_of_the_unit_interval() -> None:
    uniform = np.tile(np.array([0, 1e-45, 2**-24, 1 - 2**-24], np.float32), 1024)
    logits = 20 * _logits(4096, 5)  # most probabilities underflow to 0
    token, log_prob = _sample(logits, TOKEN_MASK, uniform, 1.0)
    assert TOKEN_MASK[np.asarray(token)].all()
    assert np.isfinite(np.asarray(log_prob)).all()


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits, uniform = _logits(4096, 6), np.random.default_rng(6).random(4096, np.float32)
    token, log_prob = (np.asarray(x) for x in _sample(logits, TOKEN_MASK, uniform, 0.0))
    best = np.argmax(np.where(TOKEN_MASK, logits, -np.inf), axis=1)
    assert np.array_equal(token, best)
    assert np.all(log_prob == 0)
    assert not np.array_equal(_sample(logits, TOKEN_MASK, uniform, 1.0)[0], best)


@pytest.mark.parametrize('filters', [{'top_k': 5}, {'top_p': 0.6}, {'top_k': 20, 'top_p': 0.9, 'min_p': 0.05}])
def test_filters_leave_what_they_should(filters: dict[str, float]) -> None:
    token, log_prob = _grid_draws(**filters)
    prob = _prob(_logits(1))[0]
    kept = slow.kept(prob, **filters) & TOKEN_MASK
    assert 1 < kept.sum() < TOKEN_MASK.sum()
    counts = np.bincount(token, minlength=V)
    assert np.abs(counts - 4096 * np.where(kept, prob, 0) / prob[kept].sum()).max() < 1.01
    np.testing.assert_allclose(log_prob, np.log(prob[token]), atol=1e-5)  # of the unfiltered distribution


def test_filters_keep_all_that_tie() -> None:
    logits = np.zeros((4096, V), np.float32)
    logits[:, 3:23] = 4  # ten allowed tokens, of which five or seven would do
    uniform = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
    for filters in ({'top_k': 5}, {'top_p': 0.6}):
        token, _ = _sample(logits, TOKEN_MASK, uniform, 1.0, **filters)
        assert np.array_equal(np.unique(token), np.arange(3, 23, 2))


def test_log_prob_is_that_of_token_log_probs() -> None:
    random = np.random.default_rng(8)
    hidden = random.standard_normal((16, 1, 24)).astype(np.float32)
    params = {'decoder': {'embedding': random.standard_normal((V, 24)).astype(np.float32)}}
    logits = np.repeat(transformer.project(params, hidden[:, 0]), 256, axis=0)
    uniform = random.random(4096, np.float32)
    everywhere = np.ones((16, 1), bool)
    for temperature in (0.5, 2.0):
        drawn = _sample(logits, TOKEN_MASK, uniform, temperature, top_k=5)
        token, log_prob = (np.asarray(x)[::256] for x in drawn)
        expected, _ = token_log_probs(params, hidden, token[:, None], everywhere, TOKEN_MASK, temperature)
        np.testing.assert_allclose(log_prob, expected[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ('field', 'value'), [('top_k', -1), ('top_p', 0.0), ('top_p', 1.5), ('min_p', -0.1), ('temperature', -1.0)]
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f'{field}: expected .* found {value}'):
        Sampling(**{field: value})


# Settings per row.

OFF = {'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}
FILTERS = [{}, {'top_k': 5}, {'top_p': 0.6}, {'top_k': 20, 'top_p': 0.9, 'min_p': 0.05}]
TEMPERATURES = (1.0, 0.0, 0.5, 2.0)
_rows = jax.jit(sample_rows)


def _drawn(logits: np.ndarray, allowed: np.ndarray, uniform: np.ndarray, settings: list[dict[str, float]]) -> Draw:
    """Rows drawn with settings that are dealt to them in turn; all tests share one program."""
    number = np.arange(len(logits)) % len(settings)
    columns = {
        name: np.array([(OFF | {'temperature': 1.0} | of)[name] for of in settings], dtype)[number]
        for name, dtype in (
            ('temperature', np.float32),
            ('top_k', np.int32),
            ('top_p', np.float32),
            ('min_p', np.float32),
        )
    }
    draw = jax.device_get(_rows(logits, np.broadcast_to(allowed, logits.shape), uniform, **columns))
    assert _rows._cache_size() == 1
    return draw


def test_rows_of_any_settings_are_drawn_as_batches_of_them() -> None:
    """Also where all rows have the same filters or none."""
    logits, uniform = _logits(4096, 9), np.random.default_rng(9).random(4096, np.float32)
    grid = [{'temperature': temperature} | filters for temperature in TEMPERATURES for filters in FILTERS]
    expected = np.empty((len(grid), 4096), np.int32)
    for i, of in enumerate(grid):
        expected[i], _ = _sample(logits, TOKEN_MASK, uniform, **of)
    assert len(np.unique(expected, axis=0)) == len(grid) - 3  # greedy rows have no filters
    draw = _drawn(logits, TOKEN_MASK, uniform, grid)
    number = np.arange(4096) % len(grid)
    np.testing.assert_array_equal(draw.token, expected[number, np.arange(4096)])
    for alone in (0, 2):
        np.testing.assert_array_equal(_drawn(logits, TOKEN_MASK, uniform, [grid[alone]]).token, expected[alone])

    top, top_log_prob = jax.device_get(jax.jit(most_probable, static_argnums=1)(draw, 20))
    for row in range(160):
        temperature = grid[number[row]]['temperature']
        filters = FILTERS[number[row] % len(FILTERS)] if temperature else {}
        prob = _prob(logits[row], temperature or 1.0)
        prob = np.where(slow.kept(prob, **filters) & TOKEN_MASK, prob, 0)
        with np.errstate(divide='ignore'):
            log_prob = np.log(prob / prob.sum())
        assert draw.log_prob[row] == pytest.approx(log_prob[draw.token[row]], abs=1e-5)
        order = np.argsort(-log_prob, kind='stable')[:20]
        np.testing.assert_allclose(top_log_prob[row], log_prob[order], atol=1e-5)
        may_come = np.isfinite(log_prob[order])
        assert np.array_equal(top[row][may_come], order[may_come])


def test_a_token_that_alone_is_allowed_is_certain() -> None:
    logits = 20 * _logits(4096, 10)
    only = np.random.default_rng(10).integers(0, V, 4096)
    uniform = np.tile(np.array([0, 1e-45, 2**-24, 1 - 2**-24], np.float32), 1024)
    settings = [{'temperature': temperature} | filters for filters in FILTERS for temperature in (0.0, 0.1, 1.0)]
    draw = _drawn(logits, np.arange(V) == only[:, None], uniform, settings)
    assert np.array_equal(draw.token, only)
    assert np.all(draw.log_prob == 0)
    top, log_prob = jax.device_get(most_probable(draw, 3))
    assert np.array_equal(top[:, 0], only)
    assert np.array_equal(log_prob, np.broadcast_to([0, -np.inf, -np.inf], (4096, 3)))


def test_rows_keep_all_that_tie() -> None:
    logits = np.zeros((4096, V), np.float32)
    logits[:, 3:23] = 4
    uniform = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
    draw = _drawn(logits, TOKEN_MASK, uniform, [{'top_k': 5}, {'top_p': 0.6}])
    for start in (0, 1):
        assert np.array_equal(np.unique(draw.token[start::2]), np.arange(3, 23, 2))
    np.testing.assert_allclose(draw.log_prob, -np.log(10), atol=1e-6)
    top, _ = jax.device_get(most_probable(draw, 4))
    assert np.array_equal(top, np.broadcast_to([3, 5, 7, 9], top.shape))


def test_bits_are_unpacked_from_the_lowest() -> None:
    words = np.random.default_rng(11).integers(0, 2**32, (3, 8), np.uint32)
    expected = [[bool(int(row[i // 32]) >> i % 32 & 1) for i in range(V)] for row in words]
    assert np.array_equal(unpack_bits(words), expected)


# Prefixes of the cache.


def test_prefixes_are_few_and_leave_room() -> None:
    assert prefix_lengths(256, 63) == ()  # a short message has none
    assert prefix_lengths(271, 133) == (192,)
    assert prefix_lengths(2048, 1920) == (864, 1152, 1536)
    for capacity in range(70, 3000, 37):
        for max_new_tokens in (64, 200, 1000):
            lengths = prefix_lengths(capacity, max_new_tokens)
            assert list(lengths) == sorted(set(lengths))
            assert len(lengths) <= 3
            assert all(max(capacity - max_new_tokens, 0) + 32 <= length <= capacity * 3 // 4 for length in lengths)


def test_long_messages_are_the_same_over_prefixes_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose prompts differ by many tokens cross the ends of prefixes at different steps, some end before."""
    max_new_tokens, length = 90, np.array([3, 21, 40, 8], np.int32)
    spec = dataclasses.replace(scene.ASSISTANT_SPEC, max_new_tokens=max_new_tokens)
    prompts = np.random.default_rng(0).integers(0, 100, (4, 40)).astype(np.int32)
    same = np.zeros(prompts.shape, np.int8)
    mask = scene.TOKEN_MASKS[1].copy()
    mask[spec.end_of_turn] = False

    def generated() -> list[tuple[Context, SampledMessage]]:
        """Where messages may end, and where they may not."""

        @jax.jit
        def run(policy: Policy) -> tuple[Context, SampledMessage]:
            context = prefill(policy, prompts, same, same, length, capacity=131)
            context = dataclasses.replace(context, cache=extended(context.cache, context.capacity))
            zeros = jnp.zeros(4, jnp.int32)
            return generate(policy, context, scene.keys(range(4)), zeros == 0, zeros)

        policy = dataclasses.replace(scene.policies()[1], spec=spec)
        masks = (scene.TOKEN_MASKS[1], mask)
        return [jax.device_get(run(dataclasses.replace(policy, token_mask=jnp.asarray(x)))) for x in masks]

    assert prefix_lengths(131, max_new_tokens) == (96,)
    expected = generated()
    monkeypatch.setattr(sampler, 'prefix_lengths', lambda *_: ())
    for (context, message), (plain_context, plain_message), ends in zip(
        expected, generated(), (True, False), strict=True
    ):
        assert (np.max(message.length) == max_new_tokens + 1) == (not ends)
        jax.tree.map(np.testing.assert_array_equal, message, plain_message)
        exact = ('tokens', 'role', 'message', 'length')
        for name in exact:
            np.testing.assert_array_equal(getattr(context, name), getattr(plain_context, name))
        close = [(view.log_prob, view.cache) for view in (context, plain_context)]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), *close)
