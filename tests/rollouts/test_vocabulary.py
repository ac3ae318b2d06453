"""Sums and draws by blocks against NumPy, over vocabularies of any size."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.rollouts.token_sampling import sample_token
from simrl.rollouts.vocabulary import BLOCK, Part, total
from tests.rollouts import slow

_total = jax.jit(total)
_blocks = jax.jit(lambda weight: Part(1).blocks(weight).sums())
_sample = jax.jit(sample_token, static_argnames=('top_k', 'top_p', 'min_p'))


@pytest.mark.parametrize('size', [1, 100, BLOCK, 385, 5 * BLOCK])
def test_no_sum_depends_on_zeros_that_follow(size: int) -> None:
    """To the last bit."""
    x = np.random.default_rng(size).random((4, size), np.float32)
    padded = np.pad(x, ((0, 0), (0, 300)))
    found, blocks = np.asarray(_total(x)), np.asarray(_blocks(x))
    np.testing.assert_allclose(found, x.sum(axis=1, dtype=np.float64), rtol=1e-6)
    assert np.array_equal(found, _total(padded))
    expected = np.pad(x, ((0, 0), (0, -size % BLOCK))).reshape(4, -1, BLOCK).sum(axis=-1, dtype=np.float64)
    np.testing.assert_allclose(blocks, expected, rtol=1e-6)
    assert np.array_equal(blocks, np.asarray(_blocks(padded))[:, : blocks.shape[1]])


ROWS, V = 64, 384
PEAKS = st.sampled_from([0.0, 1.0, 40.0])  # 40: all but one token may underflow


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=PEAKS, top_k=st.sampled_from([0, 7]), top_p=st.sampled_from([1.0, 0.5]))
def test_a_draw_is_the_inverse_cdf_of_what_the_filters_keep(seed: int, scale: float, top_k: int, top_p: float) -> None:
    """Of equal logits, too: ties are kept, and a share that is reached exactly is enough."""
    random = np.random.default_rng(seed)
    logits = (scale * random.standard_normal((ROWS, V))).astype(np.float32)
    mask = random.random(V) < 0.5
    mask[random.integers(V)] = True
    uniform = random.random(ROWS, np.float32)
    token, log_prob = (np.asarray(x) for x in _sample(logits, mask, uniform, 1.0, top_k=top_k, top_p=top_p))
    tempered = np.where(mask, logits.astype(np.float64), -np.inf)
    prob = np.exp(tempered - tempered.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    for row in range(ROWS):
        # All tokens that are as probable as the last one kept.
        last = prob[row][slow.kept(prob[row], top_k, top_p) & mask].min() if scale else prob[row].max()
        kept = np.where(prob[row] >= last, prob[row], 0)
        cumulated = np.cumsum(kept) / kept.sum()
        before = cumulated[token[row]] - kept[token[row]] / kept.sum()
        assert kept[token[row]] > 0
        assert before - 1e-6 <= uniform[row] <= cumulated[token[row]] + 1e-6
        assert log_prob[row] == pytest.approx(np.log(prob[row][token[row]]), abs=1e-5)


@pytest.mark.parametrize(('top_p', 'expected'), [(0.5, 1), (0.625, 2), (0.75, 2), (0.875, 3), (0.9, 6)])
def test_a_share_that_is_just_reached_keeps_no_more(top_p: float, expected: int) -> None:
    """Probabilities are 1/2, 1/4, 1/8 and three ties of 1/24."""
    logits = np.full((256, V), -np.inf, np.float32)
    logits[:, [200, 3, 130, 131, 132, 383]] = np.log(np.array([12, 6, 3, 1, 1, 1]) / 24)
    uniform = ((np.arange(256) + 0.5) / 256).astype(np.float32)
    token, _ = _sample(logits, np.ones(V, bool), uniform, 1.0, top_p=top_p)
    assert set(np.asarray(token).tolist()) == set([200, 3, 130, 131, 132, 383][:expected])


def test_the_first_of_the_most_probable_tokens_is_the_greedy_one() -> None:
    logits = np.zeros((3, V), np.float32)
    logits[0, [300, 130]] = 2
    logits[1] = -7
    logits[2, 383] = 1
    mask = np.arange(V) != 0
    for filters in ({}, {'top_k': 3, 'top_p': 0.5, 'min_p': 0.9}):
        token, log_prob = _sample(logits, mask, np.float32([0.9, 0.99, 0.5]), 0.0, **filters)
        assert np.asarray(token).tolist() == [130, 1, 383]
        assert not np.any(log_prob)
