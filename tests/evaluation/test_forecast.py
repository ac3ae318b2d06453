"""Forecasts: cosines that noise does not shorten, the best of n by all subsets, rank correlations beside scipy's."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from simrl.evaluation.forecast import (
    MAX_EXACT_ARMS,
    best_of_n,
    best_of_n_weights,
    gradient_cosine,
    rank_correlation,
)

# Gradients.


def cosine_of(own, people, clusters=None):
    """Of gradients [N, D] of each simulator, and of people."""
    owns = own if own.ndim == 3 else own[None]
    return gradient_cosine(
        [x @ x.T for x in owns],
        [x @ people.T for x in owns],
        people @ people.T,
        range(len(people)) if clusters is None else clusters,
    )


def study(random, *, cosine, examples=40, dimensions=60, noise=2.0, shared=0.0):
    """Gradients of examples under a simulator and under people, whose means have this cosine.

    `shared`: noise of an example that is the same under both.
    """
    people = np.eye(dimensions)[0]
    own = cosine * people + math.sqrt(1 - cosine**2) * np.eye(dimensions)[1]
    common = shared * random.normal(size=(examples, dimensions))
    return tuple(mean + common + noise / 4 * random.normal(size=(examples, dimensions)) for mean in (own, people))


def plain(own, people):
    first, second = own.mean(0), people.mean(0)
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


@pytest.mark.parametrize(('cosine', 'shared'), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 0.4)])
def test_neither_noise_nor_what_examples_have_in_common_moves_the_cosine(cosine, shared):
    random = np.random.default_rng(0)
    found, plainly, covered = [], [], []
    for _ in range(200):
        gradients = study(random, cosine=cosine, shared=shared)
        estimate, reason = cosine_of(*gradients)
        assert reason is None
        found.append(estimate.mean)
        plainly.append(plain(*gradients))
        covered.append(estimate.low <= cosine <= estimate.high)
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - cosine) < max(4 * error, 0.02)
    assert abs(np.mean(plainly) - cosine) > 0.1 or (cosine, shared) == (0.0, 0.0), 'the plain cosine is off'
    assert np.mean(covered) >= 0.92
    assert np.std(found) < 0.2, 'an interval that holds all would prove nothing'


def test_the_cosine_is_the_mean_over_all_pairs_of_examples_by_a_slow_loop():
    own, people = study(np.random.default_rng(1), cosine=0.6, examples=9)
    (inner, first, second) = (
        np.mean([a[i] @ b[j] for i, j in itertools.permutations(range(9), 2)])
        for a, b in ((own, people), (own, own), (people, people))
    )
    estimate, _ = cosine_of(own, people)
    assert estimate.mean == pytest.approx(inner / math.sqrt(first * second))


def test_examples_of_one_cluster_are_no_pair():
    own, people = study(np.random.default_rng(2), cosine=0.6, examples=12)
    clusters = [i // 2 for i in range(12)]
    summed = [x.reshape(6, 2, -1).sum(1) for x in (own, people)]
    estimate, _ = cosine_of(own, people, clusters)
    expected, _ = cosine_of(*summed)
    assert (estimate.num_observations, estimate.num_clusters) == (12, 6)
    for field in ('mean', 'low', 'high'):
        assert getattr(estimate, field) == pytest.approx(getattr(expected, field))


def test_of_several_simulators_it_is_the_mean_with_one_interval():
    random = np.random.default_rng(3)
    own, people = study(random, cosine=0.9)
    other, _ = study(random, cosine=0.1)
    both, _ = cosine_of(np.stack([own, other]), people)
    alone = [cosine_of(x, people)[0].mean for x in (own, other)]
    assert both.mean == pytest.approx(np.mean(alone))
    assert both.low < both.mean < both.high


def test_a_gradient_that_noise_hides_has_no_cosine_and_says_why():
    random = np.random.default_rng(4)
    own, people = study(random, cosine=1.0)
    opposed = np.concatenate([people[:20], -people[:20]])  # their mean is 0
    estimate, reason = cosine_of(own, opposed)
    assert estimate is None
    assert 'the gradient under people, without its noise, is -' in reason
    estimate, reason = cosine_of(np.zeros_like(own), people)
    assert estimate is None
    assert 'under the simulator' in reason
    two = np.zeros_like(own)
    two[:2] = people.mean(0)  # all that is known of this gradient is that these two agree
    estimate, reason = cosine_of(two, people)
    assert estimate is None
    assert 'without one of 2 of the 40 clusters of examples the squared norm' in reason


def test_products_that_are_none_are_refused():
    one = np.ones((2, 2))
    with pytest.raises(ValueError, match='expected products of each simulator, found 1 and 0'):
        gradient_cosine([one], [], one, 'ab')
    with pytest.raises(ValueError, match=r'expected finite products \[3, 3\], found \[2, 2\]'):
        gradient_cosine([one], [one], one, 'abc')
    with pytest.raises(ValueError, match='not all finite'):
        gradient_cosine([one], [one * np.nan], one, 'ab')
    with pytest.raises(ValueError, match='expected at least 3 clusters of examples, found 1'):
        gradient_cosine([one], [one], one, 'aa')


# The best of n.


@pytest.mark.parametrize('rewards', [[0.3, -1.0, 2.0, 0.5, 0.1], [1.0, 0.0, 1.0, 1.0, 0.0], [2.0] * 5])
@pytest.mark.parametrize('n', [1, 2, 4, 5])
def test_the_weights_are_those_of_all_subsets_with_ties_drawn(rewards, n):
    expected = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for chosen in subsets:
        best = [i for i in chosen if rewards[i] == max(rewards[j] for j in chosen)]
        expected[best] += 1 / len(best) / len(subsets)
    np.testing.assert_allclose(best_of_n_weights(np.array(rewards), n), expected)


def test_the_gain_is_that_of_new_replies():
    """Whatever the number of samples: the best of 3 of many new replies is worth what the estimate says."""
    random = np.random.default_rng(5)

    def replies(*shape):
        value = random.normal(size=shape)
        return value + random.normal(size=shape), value  # the reward is the value with as much noise again

    rewards, values = replies(200_000, 3)
    expected = np.take_along_axis(values, rewards.argmax(1)[:, None], 1).mean()
    for samples in (3, 8):
        rewards, values = replies(1000, samples)
        found = best_of_n([rewards], values, 3, range(1000), resamples=200)
        assert found.mean == pytest.approx(expected, abs=0.03)
    unrelated = best_of_n([replies(1000, 8)[0]], replies(1000, 8)[1], 3, range(1000), resamples=200)
    assert abs(unrelated.mean) < 0.04


def test_replies_without_a_number_are_left_out_and_examples_with_too_few():
    rewards = np.array([[1.0, 2.0, np.nan], [1.0, np.nan, 3.0], [np.nan, np.nan, 1.0]])
    values = np.array([[0.0, 1.0, 9.0], [0.0, 9.0, np.nan], [1.0, 2.0, 3.0]])
    found = best_of_n([rewards], values, 2, 'abc')
    assert (found.mean, found.num_observations, found.low) == (0.5, 1, None)
    assert best_of_n([rewards], values * np.nan, 2, 'abc') is None
    both = best_of_n([rewards, -rewards], values, 2, 'abc')
    assert both.mean == 0, 'the mean over simulators of opposite choices'
    for refused, message in (
        (lambda: best_of_n([rewards], values, 4, 'abc'), 'expected n from 1 to the 3 samples, found 4'),
        (lambda: best_of_n([rewards], values, 2, 'ab'), r'expected rewards and values \[2, samples\]'),
        (lambda: best_of_n([rewards / 0], values, 2, 'abc'), 'found an infinite one'),
        (lambda: best_of_n([], values, 2, 'abc'), 'expected rewards of at least one simulator, found none'),
    ):
        with np.errstate(divide='ignore'), pytest.raises(ValueError, match=message):
            refused()


# Rank correlations.


@pytest.mark.parametrize('number', [3, 5, 12])
@pytest.mark.parametrize('ties', [False, True])
def test_rank_correlations_are_those_of_scipy(number, ties):
    random = np.random.default_rng(number)
    first, second = random.normal(size=(2, number))
    second += first
    if ties:
        first = np.round(first)
        first[:2] = first[0], first[0] + 1  # not all equal
    found = rank_correlation('cosine', 'gain', first, second, resamples=500, permutations=20_000)
    expected = scipy.stats.spearmanr(first, second).statistic
    assert found.mean == pytest.approx(expected)
    assert (found.forecast, found.utility, found.num_arms) == ('cosine', 'gain', number)
    tested = scipy.stats.permutation_test(
        (first,),
        lambda x: scipy.stats.spearmanr(x, second).statistic,
        permutation_type='pairings',
        n_resamples=math.factorial(number) if number <= 5 else 500,
        rng=0,
    ).pvalue
    assert found.p_value == pytest.approx(tested, abs=1e-9 if number <= 5 else 0.06)
    if found.low is not None:
        assert -1 <= found.low <= found.high <= 1


def test_orders_are_enumerated_while_they_are_few():
    exact = [rank_correlation('cosine', 'gain', range(k), range(k), resamples=50) for k in (4, MAX_EXACT_ARMS)]
    assert [x.p_value for x in exact] == [2 / math.factorial(4), 2 / math.factorial(MAX_EXACT_ARMS)]
    sampled = rank_correlation('cosine', 'gain', range(12), range(12), resamples=50, permutations=999)
    assert (sampled.mean, sampled.p_value) == (1.0, 1 / 1000)


def test_without_an_order_there_is_no_correlation():
    for first, second in (([], []), ([1.0, 2.0], [1.0, 2.0]), ([1.0] * 4, range(4))):
        found = rank_correlation('best_of_n', 'win_rate', first, second)
        assert (found.mean, found.low, found.p_value, found.num_arms) == (None, None, None, len(first))
    with pytest.raises(ValueError, match='expected 3 values of each measure'):
        rank_correlation('cosine', 'gain', range(3), range(4))
    with pytest.raises(ValueError, match='expected finite values, found nan'):
        rank_correlation('cosine', 'gain', [1.0, np.nan, 2.0], range(3))
