"""Distances between halves of conversations: formulas against slow ones, no excess without a difference."""

import math

import numpy as np
import pytest
import scipy.spatial.distance

from simrl.evaluation.fidelity import distances as lib
from simrl.evaluation.fidelity.distances import count_distance, distance, distance_sums, energy_distance, halves

RANDOM = np.random.default_rng(0)


def test_jensen_shannon_is_that_of_scipy_and_nothing_of_nothing():
    p, q = RANDOM.integers(0, 5, (2, 6, 4)).astype(float)
    p[:, 0], q[:, 1] = 1, 1
    expected = [scipy.spatial.distance.jensenshannon(x, y, base=2) ** 2 for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(lib.jensen_shannon(p, q), expected, atol=1e-12)
    assert lib.jensen_shannon(np.eye(2)[:1], np.eye(2)[1:])[0] == 1.0
    assert math.isnan(lib.jensen_shannon(np.zeros((1, 3)), np.ones((1, 3)))[0])


def test_energy_distance_is_that_of_all_pairs():
    x, y = RANDOM.normal(size=(2, 9, 3))
    rows = np.array([0, 2, 1, 1, 3, 0, 2, 2, 3])
    sums = [distance_sums(*pair, rows) for pair in ((x, y), (x, x), (y, y))]
    between = energy_distance(*sums, np.bincount(rows))
    a, b = np.array([[1.0, 0, 2, 0]]), np.array([[0.0, 1, 0, 1]])
    left, right = (np.repeat(np.arange(9), w[0].astype(int)[rows]) for w in (a, b))

    def mean(p, q):
        return np.mean([np.linalg.norm(u - v) for u in p for v in q])

    expected = 2 * mean(x[left], y[right]) - mean(x[left], x[left]) - mean(y[right], y[right])
    assert between(a, b)[0] == pytest.approx(expected, abs=1e-6)
    assert between(np.ones((1, 4)), np.ones((1, 4)))[0] > 0


def test_halves_are_disjoint_whole_and_even_in_every_stratum():
    strata, weights = np.array([0] * 6 + [1] * 3), np.array([2.0, 1, 1, 0, 1, 1, 1, 1, 1])
    a, b = halves(strata, weights, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(a + b, np.tile(weights, (500, 1)))
    assert not (a * b).any()
    sizes = [(a[:, strata == stratum] > 0).sum(axis=1) for stratum in (0, 1)]
    assert set(sizes[0].tolist()) == {2, 3}, 'five have a weight'
    assert set(sizes[1].tolist()) == {1, 2}
    assert 0.4 < np.mean(a[:, 8] > 0) < 0.6
    assert len(np.unique(a > 0, axis=0)) > 30


def counts_of(shares: np.ndarray, conversations: int) -> np.ndarray:
    """Counts of conversations, each of a person with shares of their own."""
    own = RANDOM.dirichlet(20 * shares, conversations)
    return np.array([RANDOM.multinomial(12, p) for p in own], float)


def test_a_simulator_that_says_what_people_say_has_no_excess_and_another_has_its_distance(monkeypatch):
    monkeypatch.setattr(lib, 'DRAWS', 60)
    monkeypatch.setattr(lib, 'SPLITS', 40)
    shares, others = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.3, 0.15, 0.35])
    truth = lib.jensen_shannon(shares[None], others[None])[0]
    found, covered, floor = [], 0, []
    for _ in range(40):
        people, same, other = (counts_of(p, 60) for p in (shares, shares, others))
        within = count_distance('distribution', people, people)
        strata = ['s'] * 60
        excess = distance(within, count_distance('distribution', same, people), strata).excess
        far = distance(within, count_distance('distribution', other, people), strata)
        found.append((excess.mean, far.excess.mean))
        floor.append(far.people)
        covered += excess.low <= 0 <= excess.high
        assert far.excess.low > 0
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(40)
    assert abs(mean[0]) < 3 * error[0]
    assert abs(mean[1] - truth) < 3 * error[1] + 0.002
    assert np.mean(floor) > 3 * abs(mean[0]), 'without halves, noise would pass for distance'
    assert covered >= 35


def test_a_mean_is_compared_by_its_difference_and_one_conversation_not_at_all():
    first, second = np.array([[6.0, 2], [9, 3]]), np.array([[4.0, 1], [8, 2]])
    between = count_distance('mean', first, second)
    np.testing.assert_allclose(between(np.array([[1.0, 1]]), np.array([[1.0, 1]])), [1.0])
    with pytest.raises(ValueError, match='expected at least 2 conversations, found 1'):
        distance(between, between, ['s'])
    alone = distance(between, None, ['s', 's'])
    assert (alone.people, alone.simulated, alone.excess) == (1.0, None, None)
