"""Intervals cover as they say, and cluster as they should; win rates count ties one half."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import (
    Estimate,
    cluster_bootstraps,
    cluster_ratio,
    fewest_clusters,
    percentile_interval,
    resampled_means,
    spearman,
)
from simrl.evaluation.win_rate import preferences


def cluster_bootstrap(values, clusters, **options) -> Estimate:
    return cluster_bootstraps([values], clusters, **options)[0]


def test_covers_the_mean_at_the_nominal_rate_where_observations_come_in_clusters():
    """1,000 data sets of 40 clusters of 5 that share most of their variance."""
    random = np.random.default_rng(0)
    values = (random.normal(size=(1000, 40, 1)) + 0.3 * random.normal(size=(1000, 40, 5))).reshape(1000, -1)
    by_cluster = cluster_bootstraps(values, np.repeat(np.arange(40), 5).tolist(), resamples=1000)
    alone = cluster_bootstraps(values, range(200), resamples=200)
    assert np.mean([x.low <= 0 <= x.high for x in by_cluster]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([x.low <= 0 <= x.high for x in alone]) < 0.7, (
        'observations taken one by one would claim far too much'
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 8)), min_size=1, max_size=20))
def test_holds_the_mean_and_does_not_depend_on_names_of_clusters(rows):
    values, clusters = [value for value, _ in rows], [cluster for _, cluster in rows]
    estimate = cluster_bootstrap(values, clusters, resamples=50)
    assert estimate.mean == pytest.approx(np.mean(values))
    if estimate.low is not None:
        assert estimate.low <= estimate.high
        if estimate.num_clusters >= 6:  # percentiles of means
            assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9
    assert (estimate.num_observations, estimate.num_clusters) == (len(rows), len(set(clusters)))
    assert cluster_bootstrap(values, [f'person {cluster}' for cluster in clusters], resamples=50) == estimate


@pytest.mark.parametrize('clusters', [3, 6, 12])
def test_covers_also_of_few_clusters(clusters):
    """800 data sets of normal clusters; plain percentiles cover 74% to 91% of them."""
    means = np.random.default_rng(clusters).normal(size=(800, clusters))
    found = cluster_bootstraps(means, range(clusters), resamples=1000)
    assert np.mean([x.low <= 0 <= x.high for x in found]) == pytest.approx(0.95, abs=0.03)
    draws = resampled_means(means, range(clusters), resamples=500, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975], axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.92


@pytest.mark.parametrize(('level', 'fewest'), [(0.5, 2), (0.75, 3), (0.9, 5), (0.95, 6), (0.99, 8)])
def test_fewer_clusters_than_a_range_can_hold_the_median_of_have_no_percentile_interval(level, fewest):
    assert fewest_clusters(level) == fewest
    assert 2 / 2**fewest <= 1 - level + 1e-12
    assert fewest == 2 or 2 / 2 ** (fewest - 1) > 1 - level
    draws = np.linspace(0, 1, 101)
    assert percentile_interval(draws, fewest - 1, level=level) == (None, None)
    assert percentile_interval(draws, fewest, level=level)[0] < 0.25


def test_many_clusters_have_plain_percentiles():
    draws = np.random.default_rng(0).normal(size=20_000)
    assert percentile_interval(draws, 2_000, level=0.95) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


@pytest.mark.parametrize(
    ('values', 'clusters', 'message'),
    [
        ([], [], 'at least one observation'),
        ([1.0], [0, 1], r'expected 2 values of each measure, found \[1, 2\]'),
        ([1.0, float('nan')], [0, 1], 'finite values, found nan'),
    ],
)
def test_bad_input(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(values, clusters)
    with pytest.raises(ValueError, match='resamples: expected at least 1, found 0'):
        cluster_bootstraps([[1.0, 2.0]], range(2), resamples=0)


@pytest.mark.parametrize(
    ('values', 'clusters'),
    [
        ([0.03], ['one person']),
        ([1.0, 0.0, 1.0, 1.0], ['one opening'] * 4),
        ([0.3, 0.3, 0.3], range(3)),
        ([0.1 + 0.2, 0.3, 0.3], range(3)),  # but for rounding
        ([0.1 + 0.2 - 0.3, 0.0, 0.0], range(3)),  # nor do differences
        ([0.0, 1.0, 1.0, 0.0], ['a', 'a', 'b', 'b']),  # no cluster differs from another
    ],
)
def test_one_cluster_or_clusters_that_do_not_differ_have_no_interval(values, clusters):
    estimate = cluster_bootstrap(values, clusters, resamples=100)
    assert (estimate.low, estimate.high, estimate.sign) == (None, None, None)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert 'no interval' in str(estimate)
    nats = cluster_ratio(np.array([2.0, 4.0]), np.array([1, 2]), resamples=100)
    assert (nats.mean, nats.low, nats.high) == (2.0, None, None)


def test_shares_of_textbooks():
    """Clopper & Pearson's intervals, where each cluster is one yes or no."""
    bounds = {(50, 50): (0.9289, 1.0), (0, 50): (0.0, 0.0711), (2, 2): (0.1581, 1.0), (49, 50): (0.8935, 0.9995)}
    for (right, number), expected in bounds.items():
        values = [1.0] * right + [0.0] * (number - right)
        (found,) = cluster_shares([values], range(number))
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-3)
        assert (found.mean, found.num_observations, found.num_clusters) == (right / number, number, number)


def test_shares_of_clusters():
    person = [0, 0, 1, 1, 2, 2]
    alone, twice = (cluster_shares([[1.0] * n], c)[0] for n, c in ((3, range(3)), (6, person)))
    assert (twice.low, twice.high) == (alone.low, alone.high), 'the same person again may say the same again'
    ties, one = cluster_shares([[0.5] * 6], person)[0], cluster_shares([[1.0] * 4], ['x'] * 4)[0]
    assert (ties.sign, one.sign) == (None, None)
    with pytest.raises(ValueError, match=r'cluster_shares: expected values from 0 to 1, found 0 to 1.5'):
        cluster_shares([[0.0, 1.5]], range(2))


@pytest.mark.parametrize(('share', 'graded'), [(0.5, False), (0.97, False), (0.99, False), (0.98, True)])
def test_shares_hold_their_level_near_the_ends(share, graded):
    """Of 50 people, also where all but a few are nearly sure; a percentile interval covers .99 in 4 of 10 samples."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        values = np.where(random.random(50) < share, random.uniform(0.99, 1, 50) if graded else 1.0, 0.0)
        (found,) = cluster_shares([values], range(50))
        covered += found.low <= share * (0.995 if graded else 1.0) <= found.high
    assert covered / 600 >= 0.94


def test_shares_of_many_people_have_the_interval_of_their_variance():
    values = np.clip(np.random.default_rng(0).normal(0.55, 0.2, 2000), 0, 1)
    (found,) = cluster_shares([values], range(2000))
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.04)


def test_wins_losses_and_ties():
    assert preferences([1.0, 0.0, 0.5], [0.0, 1.0, 0.5]) == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match='paired scores, found 1 and 2'):
        preferences([1.0], [1.0, 2.0])


def test_a_ratio_of_sums_is_the_mean_of_the_observations():
    random = np.random.default_rng(0)
    counts = random.integers(1, 6, 30)
    values = [random.normal(size=count) for count in counts]
    whole = cluster_bootstrap(np.concatenate(values), np.repeat(np.arange(30), counts).tolist(), resamples=200)
    sums = cluster_ratio(np.array([x.sum() for x in values]), counts, resamples=200)
    assert (sums.mean, sums.low, sums.high) == pytest.approx((whole.mean, whole.low, whole.high))
    assert (sums.num_observations, sums.num_clusters) == (whole.num_observations, whole.num_clusters)
    with pytest.raises(ValueError, match='at least 1 observation in each cluster, found 0'):
        cluster_ratio(np.ones(2), np.array([1, 0]))


def test_spearman_is_that_of_scipy():
    random = np.random.default_rng(0)
    for size in (2, 3, 50):
        first, second = random.integers(0, 6, (2, size)).astype(float)  # with ties
        second[:2], first[:2] = (0, 9), (9, 0)
        expected = scipy.stats.spearmanr(first, second).statistic
        assert spearman(first, second) == pytest.approx(expected)
        assert spearman(np.exp(first), -second) == pytest.approx(-expected), 'of ranks alone'
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([1.0], [2.0]) is None
    with pytest.raises(ValueError, match='spearman: expected finite values, found nan'):
        spearman([1.0, float('nan')], [1.0, 2.0])
