"""Intervals of shares over clusters of observations, which hold their level where almost all, or almost none, are 1."""

from collections.abc import Hashable, Sequence

import numpy as np
import scipy.special

from simrl.evaluation.statistics import (
    Estimate,
    NaN,
    Vector,
    check_level,
    checked_measures,
    cluster_sums,
    differ,
    present_mean,
)


def cluster_shares(
    measures: Sequence[Vector], clusters: Sequence[Hashable], *, level: float = 0.95, nan: NaN = 'refused'
) -> list[Estimate]:
    """The means of values from 0 to 1 with intervals that hold their level near 0 and 1 (Korn & Graubard 1998).

    A percentile interval has no width where all observations are 1, and too little nearby. This one is Clopper &
    Pearson's (1934) of as many independent yes-or-no observations as would have the variance that the clusters show:
    more than there are clusters where values are graded, or differ within a cluster. The evidence for that is weighed
    against z^2 clusters of yes or no alone, so that values which happen to be all alike are not taken for certain.

    Args:
        measures: [K][N] numbers from 0 to 1.
        clusters: [N], the cluster of each observation.
        level: nominal coverage, in (0, 1).
        nan: what NaN is.

    Raises:
        ValueError: as `cluster_bootstraps`, or a value is not from 0 to 1.
    """
    data = checked_measures('cluster_shares', measures, len(clusters), nan)
    check_level('cluster_shares', level)
    if data.size and not (np.nanmin(data) >= 0 and np.nanmax(data) <= 1):
        raise ValueError(
            f'cluster_shares: expected values from 0 to 1, found {np.nanmin(data):g} to {np.nanmax(data):g}'
        )
    estimates = []
    for values, total, count in zip(data, *(sums.T for sums in cluster_sums(data, clusters)), strict=True):
        there, share = count > 0, present_mean(values)
        low, high = _share_interval(share, total[there], count[there], level)
        estimates.append(Estimate(share, low, high, int(count.sum()), int(there.sum()), level))
    return estimates


def _share_interval(
    share: float, totals: np.ndarray, counts: np.ndarray, level: float
) -> tuple[float, float] | tuple[None, None]:
    """The interval of `cluster_shares`, from the sum and the number of each cluster's observations."""
    number, inside = len(counts), 0 < share < 1
    if number == 1 or (inside and not differ(totals / counts)):
        return None, None
    found = np.square((totals - share * counts) / counts.mean()).sum()  # of cluster means, times their number
    expected = number * share * (1 - share)  # the same where each cluster is one yes or no
    squared = float(scipy.special.ndtri((1 + level) / 2)) ** 2
    middle = (number * share + squared / 2) / (number + squared)
    alone = squared * middle * (1 - middle)
    size = number * (expected + alone) / (found + alone)
    low = scipy.special.betaincinv(size * share, size * (1 - share) + 1, (1 - level) / 2) if share > 0 else 0.0
    high = scipy.special.betaincinv(size * share + 1, size * (1 - share), (1 + level) / 2) if share < 1 else 1.0
    return float(low), float(high)
