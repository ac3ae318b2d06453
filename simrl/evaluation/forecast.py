"""Forecasts of a simulator's utility, before anything is trained against it.

1. `gradient_cosine`: the direction in which training against the simulator moves the initial assistant, beside the one
   in which people themselves would move it.
2. `best_of_n`: what people make of the reply that the simulator would choose out of n.
3. `rank_correlation`: how well such a forecast orders simulators by the utility that came out.

The first two are over examples: they are of one simulator. The last is over arms.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np

from simrl.evaluation.statistics import (
    Estimate,
    Vector,
    check_level,
    checked_measures,
    cluster_bootstraps,
    cluster_numbers,
    differ,
    mean_over_seeds,
    percentile_interval,
    t_quantile,
)

MAX_EXACT_ARMS = 8  # up to 40,320 orders are enumerated, more are sampled
MIN_ARMS = 3  # of a rank correlation


def gradient_cosine(
    own: Sequence[np.ndarray],
    cross: Sequence[np.ndarray],
    people: np.ndarray,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
) -> tuple[Estimate | None, str | None]:
    """The cosine <g, h> / (|g| |h|) of two mean gradients, from the gradients g_i and h_i of single examples.

    The plain cosine of two sample means is too small: noise lengthens both. Here <g, h>, |g|^2 and |h|^2 are each the
    sum of inner products over pairs of *different* clusters (U-statistics, Hoeffding 1948), which is unbiased: it is
    the mean over all ways to take the two factors from disjoint halves of the examples. So what an example has in
    common under both (its intent, its random numbers) does not count as agreement either. Their ratio is consistent,
    and may exceed 1. The t-interval is of the jackknife that leaves out one cluster at a time (Efron & Stein 1981). It
    is somewhat too wide where noise is much of the gradients; a bootstrap, whose resamples have fewer pairs than the
    data, is wider still.

    Args:
        own, cross: [simulators] of [N, N], the inner products <g_i, g_j> and <g_i, h_j>; zeros for an example without
            a gradient. With several simulators, an arm's own for each training seed, the estimate is their mean.
        people: [N, N], <h_i, h_j>.
        clusters: [N].
        level: nominal coverage, in (0, 1).

    Returns:
        The estimate, or None; and why there is none: an estimate of a squared norm is not above 0, with all clusters or
        without one of them, so that its gradient is not told from noise. (A norm barely above 0 gives any cosine: in a
        simulation with 32 examples and a cosine of 0.9, 5% of those with such a cluster were above 5.)

    Raises:
        ValueError: no simulator, shapes that differ, a product that is not finite, or fewer than three clusters.
    """
    check_level('gradient_cosine', level)
    number, simulators = len(clusters), len(own)
    if not simulators or len(cross) != simulators:
        raise ValueError(f'gradient_cosine: expected products of each simulator, found {simulators} and {len(cross)}')
    for products in (*own, *cross, people):
        if products.shape != (number, number) or not np.isfinite(products).all():
            raise ValueError(
                f'gradient_cosine: expected finite products [{number}, {number}], found {list(products.shape)}'
                f'{"" if np.isfinite(products).all() else ", not all finite"}'
            )
    member = cluster_numbers(clusters) if number else np.zeros(0, int)
    size = len(set(member.tolist()))
    if size < 3:
        raise ValueError(f'gradient_cosine: expected at least 3 clusters of examples, found {size}')
    of_cluster = np.eye(size)[member]
    tables = np.stack([of_cluster.T @ products.astype(np.float64) @ of_cluster for products in (*cross, *own, people)])

    def cosines(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[R, clusters] -> [R], the mean over simulators; and the squared norms [simulators + 1, R]."""
        sums = np.stack([((weights @ x) * weights).sum(1) - np.square(weights) @ np.diag(x) for x in tables])
        inner, norms = sums[:simulators], sums[simulators:]
        with np.errstate(invalid='ignore', divide='ignore'):
            return (inner / np.sqrt(norms[:-1] * norms[-1])).mean(0), norms

    (mean,), norms = cosines(np.ones((1, size)))
    for who, norm in zip((*['the simulator'] * simulators, 'people'), norms[:, 0], strict=True):
        if not norm > 0:
            return None, (
                f'the squared norm of the gradient under {who}, without its noise, is {norm / size / (size - 1):.3g} '
                f'over {number} examples, not above 0: more of them may tell it from noise'
            )
    without, norms = cosines(1 - np.eye(size))
    if not (norms > 0).all():
        lost = int((norms <= 0).any(0).sum())
        return None, (
            f'without one of {lost} of the {size} clusters of examples the squared norm of a gradient, without its '
            'noise, is not above 0: more of them may tell it from noise'
        )
    estimate = Estimate(float(mean), None, None, num_observations=number, num_clusters=size, level=level)
    if not differ(without):
        return estimate, None
    error = math.sqrt((size - 1) / size * float(np.square(without - without.mean()).sum()))
    half = t_quantile(size - 1, level) * error
    return dataclasses.replace(estimate, low=float(mean) - half, high=float(mean) + half), None


def best_of_n(
    rewards: Sequence[np.ndarray],
    values: np.ndarray,
    n: int,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate | None:
    """The worth to people of the best of n replies by the simulator's reward, less that of a reply on average.

    Args:
        rewards: [simulators] of [N, samples], of each example's replies under the simulator; NaN without one. With
            several simulators, an arm's own for each training seed, an example's gain is their mean.
        values: [N, samples], what people make of the same replies; NaN where that is not known.
        n: how many replies the simulator chooses from.
        clusters: [N], the cluster of each example.
        level, resamples, seed: as for `cluster_bootstraps`.

    Returns:
        The mean gain over the examples that have n replies with both numbers; None if none has.

    Raises:
        ValueError: no simulator, shapes that differ, n below 1 or above the number of samples, or an infinite number.
    """
    shapes = {np.shape(x) for x in (*rewards, values)}
    if not len(rewards):
        raise ValueError('best_of_n: expected rewards of at least one simulator, found none')
    if len(shapes) != 1 or values.ndim != 2 or len(values) != len(clusters):
        raise ValueError(f'best_of_n: expected rewards and values [{len(clusters)}, samples], found {sorted(shapes)}')
    if not 1 <= n <= values.shape[1]:
        raise ValueError(f'best_of_n: expected n from 1 to the {values.shape[1]} samples, found {n}')
    if any(np.isinf(x).any() for x in (*rewards, values)):
        raise ValueError('best_of_n: expected finite rewards and values, found an infinite one')
    of_simulators = [[_gain(*of_example, n) for of_example in zip(x, values, strict=True)] for x in rewards]
    gains = mean_over_seeds([np.array(x) for x in of_simulators])
    if np.isnan(gains).all():
        return None
    return cluster_bootstraps([gains], clusters, level=level, resamples=resamples, seed=seed, nan='missing')[0]


def _gain(reward: np.ndarray, value: np.ndarray, n: int) -> float:
    there = ~(np.isnan(reward) | np.isnan(value))
    if there.sum() < n:
        return math.nan
    return float((best_of_n_weights(reward[there], n) - 1 / there.sum()) @ value[there])


def best_of_n_weights(reward: np.ndarray, n: int) -> np.ndarray:
    """The probability of each of m replies to be the best of n that are drawn from them without replacement, `[m]`.

    C(k - 1, n - 1) / C(m, n) for the k-th lowest (Nakano et al. 2021, arXiv:2112.09332, appendix I), in the mean over
    the orders of equal ones. With them the mean of m values is an unbiased estimate for the best of n *new* replies.
    """
    m = len(reward)
    by_rank = np.array([math.comb(k, n - 1) for k in range(m)]) / math.comb(m, n)
    _, group, sizes = np.unique(reward, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    of_group = np.array([by_rank[end - count : end].mean() for end, count in zip(ends, sizes, strict=True)])
    return of_group[group]


@dataclasses.dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation (1904) of a forecast with the utility after training, over arms.

    Attributes:
        forecast: name of the forecast, 'cosine' or 'best_of_n'.
        utility: name of the utility, 'gain' or 'win_rate' of an `ArmResult`, its mean over training seeds.
        num_arms: arms that have both.
        mean: the correlation; None with fewer than three arms, or where either is the same for all.
        low, high: percentiles of the correlation over resampled arms; None of few arms. The arms of an experiment were
            chosen: the interval is of such a choice, and leaves the noise of each arm's own numbers in.
        p_value: of the two-sided permutation test that the orders have nothing to do with each other.
        level: the nominal coverage of the interval.
    """

    forecast: str
    utility: str
    num_arms: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    level: float


def rank_correlation(
    forecast: str,
    utility: str,
    forecasts: Vector,
    utilities: Vector,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    permutations: int = 99_999,
    seed: int = 0,
) -> RankCorrelation:
    """Correlates the ranks of arms by a forecast and by their utility; equal numbers have the mean of their ranks.

    The p-value is the share of orders whose correlation is at least as far from 0 (Fisher 1935). Up to
    `MAX_EXACT_ARMS` all are enumerated. Beyond, it is (1 + hits) / (1 + draws) of random ones (Phipson & Smyth 2010).

    Args:
        forecast, utility: their names.
        forecasts, utilities: [arms].
        level: nominal coverage, in (0, 1).
        resamples, permutations, seed: of the interval and the test.

    Raises:
        ValueError: lengths that differ, or a number that is not finite.
    """
    check_level('rank_correlation', level)
    number = len(forecasts)
    none = RankCorrelation(forecast, utility, number, None, None, None, None, level)
    if not number and not len(utilities):
        return none
    data = checked_measures('rank_correlation', [forecasts, utilities], number, 'refused')
    if number < MIN_ARMS or not all(differ(x) for x in data):
        return none
    random = np.random.default_rng(seed)
    found = float(_correlations(*map(_ranks, data)))
    drawn = data[:, random.integers(0, number, (resamples, number))]
    draws = _correlations(*map(_ranks, drawn))
    low, high = percentile_interval(draws, number, level=level)
    first, second = map(_ranks, data)
    exact = number <= MAX_EXACT_ARMS
    if exact:
        orders = np.array(list(itertools.permutations(second)))
    else:
        orders = random.permuted(np.tile(second, (permutations, 1)), axis=1)
    hits = int((np.abs(_correlations(first, orders)) >= abs(found) - 1e-9).sum())
    p_value = hits / len(orders) if exact else (1 + hits) / (1 + len(orders))
    return RankCorrelation(forecast, utility, number, found, low, high, p_value, level)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis from 1, equal numbers with the mean of theirs."""
    below = (x[..., :, None] > x[..., None, :]).sum(-1)
    equal = (x[..., :, None] == x[..., None, :]).sum(-1)
    return below + (equal + 1) / 2


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlations along the last axis; NaN where either is constant."""
    first, second = (x - x.mean(-1, keepdims=True) for x in (first, second))
    with np.errstate(invalid='ignore'):
        return (first * second).sum(-1) / np.sqrt(np.square(first).sum(-1) * np.square(second).sum(-1))
