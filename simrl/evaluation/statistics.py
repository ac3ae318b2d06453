"""Intervals for means of observations that come in clusters (people, openings, conversations)."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: the mean over observations.
        low, high: the bounds of the interval.
        num_observations, num_clusters: what it rests on.
        level: the nominal coverage of the interval.
    """

    mean: float
    low: float
    high: float
    num_observations: int
    num_clusters: int
    level: float

    def __str__(self) -> str:
        return f'{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.num_observations})'


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The mean of `values` with a percentile interval from resampling whole clusters (Efron & Tibshirani 1993, ch. 8).

    Args:
        values: one finite number per observation.
        clusters: the cluster of each observation; observations of one cluster stay together.
        level: nominal coverage, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: with no observation, a value that is not finite, or lengths that differ.
    """
    if len(values) != len(clusters):
        raise ValueError(f'cluster_bootstrap: expected one cluster per value, found {len(clusters)} for {len(values)}')
    if not len(values):
        raise ValueError('cluster_bootstrap: expected at least one observation, found none')
    data = np.asarray(values, np.float64)
    if not np.isfinite(data).all():
        raise ValueError(f'cluster_bootstrap: expected finite values, found {data[~np.isfinite(data)][0]}')
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    total = np.bincount(member, weights=data)
    count = np.bincount(member).astype(np.float64)
    num_clusters = len(index)
    draws = np.random.default_rng(seed).multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), resamples)
    means = (draws @ total) / (draws @ count)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(
        mean=float(data.mean()),
        low=float(low),
        high=float(high),
        num_observations=len(data),
        num_clusters=num_clusters,
        level=level,
    )
