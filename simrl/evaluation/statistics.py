"""Intervals over clusters of observations (people, openings); those over training seeds are in `seeds`.

The two units are never mixed. A cluster bootstrap resamples people: it is of the checkpoints at hand ("this checkpoint
only").

A missing value, one that could not be measured, is NaN where `nan='missing'` is asked for: its observation is left out
of that measure alone, so that a measure of differences is over the pairs that are there. Elsewhere NaN is refused.

From one cluster, or from several that are all alike, nothing is known of how others would differ: there is no interval,
and no conclusion to draw.

Percentile intervals of few clusters are too short, as a resample varies less than other clusters would: their tails are
Hesterberg's (2015), which make up for that as Student's t does. Below 6 clusters (at 95%) no percentile does, as even
the range of the clusters' values misses the median with probability 2 / 2^n: a mean then has Student's t-interval with
its cluster-robust standard error, another statistic none. Coverage of 95% intervals of a win rate in 2,000 studies each
of four kinds (means over several votes or single votes, win rates near .56 and .8), lowest and highest:

    participants         4             5             6             10            15            30
    these intervals      .915 .998     .917 .999     .909 .996     .928 .998     .934 .956     .939 .956
    percentiles alone    .770 .964     .823 .971     .826 .959     .852 .908     .907 .936     .919 .942
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import scipy.special  # whose import takes a quarter of the time of that of scipy.stats

Vector = np.ndarray | Sequence[float]
NaN = Literal['refused', 'missing']

_COUNTS_AT_ONCE = 2**20  # bootstrap draws, times clusters, in memory at a time
_NOTHING = 1e-12  # differences of scores are not smaller but for rounding
_ROUNDING = 1e-9  # numbers that differ by less than this share of the largest are equal but for rounding


class Bounded:
    """An interval, or none."""

    low: float | None
    high: float | None

    @property
    def sign(self) -> int | None:
        """1 or -1 where the whole interval is above or below 0, else 0; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return int(self.low > 0) - int(self.high < 0)

    def bounds_text(self, digits: int = 3) -> str:
        return 'no interval' if self.low is None else f'[{self.low:.{digits}f}, {self.high:.{digits}f}]'


@dataclasses.dataclass(frozen=True)
class Estimate(Bounded):
    """A mean with its interval.

    Attributes:
        mean: the mean over observations.
        low, high: the bounds of the interval; None with one cluster, where clusters do not differ, or with too many
            undefined draws.
        num_observations, num_clusters: sizes of the sample.
        level: the nominal coverage of the interval.
        undefined_draws: share of bootstrap draws without a value, as all of their values are missing. The interval
            leaves them out; where they are more than (1 - level) / 2 there is none.
    """

    mean: float
    low: float | None
    high: float | None
    num_observations: int
    num_clusters: int
    level: float
    undefined_draws: float = 0.0

    def __str__(self) -> str:
        return f'{self.mean:.3f} {self.bounds_text()} (n={self.num_observations})'


def cluster_bootstraps(
    measures: Sequence[Vector],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    nan: NaN = 'refused',
) -> list[Estimate]:
    """The means of measures with percentile intervals from resampling whole clusters (Efron & Tibshirani 1993, ch. 8).

    All measures share their resamples. There is no interval where all resamples have the same mean. Of few clusters the
    interval is `mean_interval`'s.

    Args:
        measures: [K][N] numbers.
        clusters: [N], the cluster of each observation; observations of one cluster stay together.
        level: nominal coverage, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the random draws.
        nan: what NaN is.

    Raises:
        ValueError: no observation, a measure without a value, a value that is not finite, lengths that differ, or no
            resample.
    """
    data = checked_measures('cluster_bootstraps', measures, len(clusters), nan)
    check_level('cluster_bootstraps', level)
    means = resampled_means(data, clusters, resamples=resamples, seed=seed)
    estimates = []
    for values, draws, total, count in zip(
        data, means, *(sums.T for sums in cluster_sums(data, clusters)), strict=True
    ):
        there = count > 0
        low, high = mean_interval(total[there], count[there], draws, level=level)
        undefined = float(np.isnan(draws).mean())
        sizes = int(count.sum()), int(there.sum())
        estimates.append(Estimate(present_mean(values), low, high, *sizes, level, undefined))
    return estimates


def present_mean(values: np.ndarray) -> float:
    """The mean of the values that are not missing (NaN)."""
    return float(values[~np.isnan(values)].mean())


def mean_over_seeds(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each observation, float64 `[N]`, over the seeds `[S][N]` that have it; NaN where none has."""
    data = np.asarray(values, np.float64)
    there = ~np.isnan(data)
    number, total = there.sum(0), np.where(there, data, 0.0).sum(0)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def cluster_ratio(
    totals: np.ndarray, counts: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean over observations, from their sum in each cluster: sum(totals) / sum(counts).

    Its interval is the same as that of `cluster_bootstraps` of the observations themselves.

    Args:
        totals, counts: [clusters], the sum over each cluster's observations, and their number.
        level, resamples, seed: as for `cluster_bootstraps`.

    Raises:
        ValueError: as `cluster_bootstraps`, or a cluster without observations.
    """
    data = _finite('cluster_ratio', [totals, counts], len(totals))
    check_level('cluster_ratio', level)
    if data[1].min() < 1:
        raise ValueError(f'cluster_ratio: expected at least 1 observation in each cluster, found {data[1].min():g}')
    sums, numbers = resampled_means(data, range(len(totals)), resamples=resamples, seed=seed)
    low, high = mean_interval(data[0], data[1], sums / numbers, level=level)
    mean = float(data[0].sum() / data[1].sum())
    return Estimate(mean, low, high, int(data[1].sum()), len(totals), level)


def fewest_clusters(level: float) -> int:
    """The fewest clusters whose values' range holds their median with probability `level`: 2 / 2^n <= 1 - level."""
    return max(2, math.ceil(1 - math.log2(1 - level) - _ROUNDING))


def percentile_interval(
    draws: np.ndarray, num_clusters: int, *, level: float
) -> tuple[float, float] | tuple[None, None]:
    """The percentiles of bootstrap draws that bound an interval, by Hesterberg's expanded tails.

    With n clusters the tails are Phi(-sqrt(n / (n - 1)) t), where t bounds Student's t with n - 1 degrees of freedom
    (Hesterberg 2015): a draw's variance is (n - 1) / n of the sample's, and a sample's is itself uncertain.

    Args:
        draws: [R], NaN where undefined.
        num_clusters: number of clusters that are resampled.
        level: nominal coverage, in (0, 1).

    Returns:
        None of fewer than `fewest_clusters`, where all draws are equal, and where more than (1 - level) / 2 of them are
        undefined; fewer are left out.
    """
    known = draws[~np.isnan(draws)]
    if num_clusters < fewest_clusters(level) or not len(known) or not differ(known):
        return None, None
    if len(draws) - len(known) > (1 - level) / 2 * len(draws):
        return None, None
    wider = math.sqrt(num_clusters / (num_clusters - 1)) * t_quantile(num_clusters - 1, level)
    tail = float(scipy.special.ndtr(-wider))
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(
    totals: np.ndarray, counts: np.ndarray, draws: np.ndarray, *, level: float
) -> tuple[float, float] | tuple[None, None]:
    """The interval of a mean over observations: `percentile_interval`, or `cluster_t_interval` of few clusters.

    Args:
        totals, counts: [clusters], the sum over each cluster's observations, and their number, at least 1.
        draws: [R], the mean in each resample, NaN where undefined.
        level: nominal coverage, in (0, 1).
    """
    if len(totals) < fewest_clusters(level):
        return cluster_t_interval(totals, counts, level=level)
    return percentile_interval(draws, len(totals), level=level)


def cluster_t_interval(
    totals: np.ndarray, counts: np.ndarray, *, level: float
) -> tuple[float, float] | tuple[None, None]:
    """The interval of a mean over observations by its cluster-robust standard error (Liang & Zeger 1986).

    With G clusters, N observations and r_g the sum of cluster g's deviations from the mean, the variance of the mean is
    G / (G - 1) x sum_g r_g^2 / N^2, and the interval is Student's with G - 1 degrees of freedom (Cameron & Miller
    2015).

    Args:
        totals, counts: [clusters], the sum over each cluster's observations, and their number.
        level: nominal coverage, in (0, 1).

    Returns:
        None with one cluster, or where no cluster differs from the mean.
    """
    number, mean = len(totals), float(totals.sum() / counts.sum())
    residual = totals - mean * counts
    if number == 1 or not differ(np.append(residual, 0.0), float(np.abs(totals).max())):
        return None, None
    error = math.sqrt(number / (number - 1) * float(np.square(residual).sum())) / float(counts.sum())
    half = t_quantile(number - 1, level) * error
    return mean - half, mean + half


def resampled_means(measures: np.ndarray, clusters: Sequence[Hashable], *, resamples: int, seed: int) -> np.ndarray:
    """The mean of each measure in each of `resamples` draws of the clusters with replacement.

    Args:
        measures: [K, N] numbers, NaN where missing.
        clusters: [N], the cluster of each observation.
        resamples: number of draws, R.
        seed: of the draws.

    Returns:
        [K, R]; draw r is the same for all measures, so differences and ratios of rows are paired. NaN where a draw has
        missing values only.

    Raises:
        ValueError: no resample.
    """
    if resamples < 1:
        raise ValueError(f'resamples: expected at least 1, found {resamples}')
    total, count = cluster_sums(measures, clusters)
    random = np.random.default_rng(seed)
    means, at_once = np.empty((resamples, len(measures))), max(1, _COUNTS_AT_ONCE // len(count))
    for start in range(0, resamples, at_once):
        draws = drawn_times(random, len(count), min(at_once, resamples - start)).astype(np.float64)
        with np.errstate(invalid='ignore'):  # 0 / 0 of a draw without a value
            means[start : start + len(draws)] = (draws @ total) / (draws @ count)
    return means.T


def drawn_times(random: np.random.Generator, number: int, draws: int) -> np.ndarray:
    """Draws as many of `number` things, with replacement: how often each is drawn, int [draws, number].

    Counted, as that takes a fifth of the time of numpy's multinomial.
    """
    drawn = random.integers(0, number, (draws, number)) + number * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def cluster_numbers(clusters: Sequence[Hashable]) -> np.ndarray:
    """The number of each observation's cluster, int [N], counted from 0 in the order in which clusters first appear."""
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(cluster, len(index)) for cluster in clusters])


def cluster_sums(measures: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The sums of each cluster's observations that are not NaN, and their numbers, both float64 [clusters, K]."""
    member = cluster_numbers(clusters)
    total, count = np.zeros((2, int(member.max()) + 1, len(measures)))
    there = ~np.isnan(measures.T)
    np.add.at(total, member, np.where(there, measures.T, 0.0))
    np.add.at(count, member, there)
    return total, count


def t_quantile(df: float, level: float) -> float:
    """The bound t such that Student's t of `df` degrees of freedom is within +-t with probability `level`."""
    return float(scipy.special.stdtrit(df, (1 + level) / 2))


def spearman(first: Vector, second: Vector) -> float | None:
    """Spearman's (1904) correlation of two measures: Pearson's of their ranks, ties with their mean rank.

    Args:
        first, second: [N] finite numbers of the same observations.

    Returns:
        -1 to 1; None for fewer than two observations, or where a measure has one value only.

    Raises:
        ValueError: lengths that differ, no observation, or a value that is not finite.
    """
    data = _finite('spearman', [first, second], len(first))
    ranks = []
    for values in data:
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    centred = np.array(ranks) - (data.shape[1] + 1) / 2
    squares = (centred**2).sum(1)
    return float(centred[0] @ centred[1] / math.sqrt(squares.prod())) if squares.min() > 0 else None


def differ(values: np.ndarray, size: float = 0.0) -> bool:
    """True if some numbers differ by more than rounding; `size` is the largest of the numbers they were made of."""
    return bool(np.ptp(values) > max(_ROUNDING * max(np.abs(values).max(), size), _NOTHING))


def check_level(caller: str, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f'{caller}: expected a level in (0, 1), found {level}')


def _finite(caller: str, measures: Sequence[Vector], num_observations: int) -> np.ndarray:
    """[K][N] finite numbers as float64 [K, N]; errors name `caller`."""
    return checked_measures(caller, measures, num_observations, 'refused')


def checked_measures(caller: str, measures: Sequence[Vector], num_observations: int, nan: NaN) -> np.ndarray:
    """[K][N] numbers as float64 [K, N]; errors name `caller`."""
    if not num_observations:
        raise ValueError(f'{caller}: expected at least one observation, found none')
    lengths = sorted({len(measure) for measure in measures} | {num_observations})
    if len(lengths) > 1:
        raise ValueError(f'{caller}: expected {num_observations} values of each measure, found {lengths}')
    data = np.asarray(measures, np.float64).reshape(len(measures), num_observations)
    refused = np.isinf(data) if nan == 'missing' else ~np.isfinite(data)
    if refused.any():
        raise ValueError(f'{caller}: expected finite values, found {data[refused][0]}')
    if np.isnan(data).all(axis=1).any():
        raise ValueError(f'{caller}: expected a value in each measure, found one whose values are all missing')
    return data
