"""Intervals and tests over training seeds: one number per run.

A t-interval is of the simulator that the runs trained against. All runs meet the same people, so it leaves out the
variance between draws of people. `crossed` is of both.

From one seed, or from several that are all alike, nothing is known of how others would differ: there is no interval,
and no conclusion to draw.
"""

import dataclasses
import math

import numpy as np

from simrl.evaluation.statistics import Bounded, Vector, check_level, checked_measures, differ, t_quantile

MAX_EXACT_SEEDS = 16  # up to 65,536 sign patterns are enumerated, more are sampled


@dataclasses.dataclass(frozen=True)
class SeedEstimate(Bounded):
    """A mean over training seeds with its interval.

    Attributes:
        mean: the mean over seeds.
        low, high: the bounds of the t-interval; None with one seed, or where seeds do not differ.
        values: one number per seed.
        p_value: of the two-sided sign-flip test that there is no effect; None with one seed, or where no value without
            an effect was given.
        level: the nominal coverage of the interval.
        df: degrees of freedom of the interval; None without an interval.
        alone: the two bounds of these seeds' own t-interval, where `low` and `high` pool the spread over arms
            (`blocks`); None where they do not, or without one.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]
    p_value: float | None
    level: float
    df: float | None = None
    alone: tuple[float, ...] | None = None

    @property
    def num_seeds(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        return f'{self.mean:.3f} {self.bounds_text()} (seeds={self.num_seeds})'


def t_interval(values: Vector, *, level: float = 0.95, null: float | None = None) -> SeedEstimate:
    """The mean of one number per training seed with Student's t-interval: mean +- t_{n-1} s / sqrt(n) (Student 1908).

    Args:
        values: [seeds], finite; of one seed, or of seeds that do not differ, there is a mean, and no interval.
        level: nominal coverage, in (0, 1).
        null: the mean without an effect (0 for a difference, 0.5 for a win rate); it adds the p-value of
            `sign_flip_test` to the estimate.

    Raises:
        ValueError: with no seed, a value that is not finite, or a level outside (0, 1).
    """
    data = checked_measures('t_interval', [values], len(values), 'refused')[0]
    check_level('t_interval', level)
    mean, each = float(data.mean()), tuple(data.tolist())
    p_value = None if null is None or len(data) == 1 else sign_flip_test(data - null)
    if not differ(data):
        return SeedEstimate(mean, low=None, high=None, values=each, p_value=p_value, level=level)
    df = len(data) - 1
    half = t_quantile(df, level) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return SeedEstimate(mean, mean - half, mean + half, values=each, p_value=p_value, level=level, df=df)


def paired_difference(first: Vector, second: Vector, *, level: float = 0.95) -> SeedEstimate:
    """`first` minus `second`, seed by seed: its mean, t-interval and sign-flip test.

    Args:
        first, second: [seeds], in the same order of seeds. All that a seed fixes for both arms (the initial assistant,
            the people, the order of the data) cancels.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: lengths that differ, or as `t_interval`.
    """
    if len(first) != len(second):
        raise ValueError(f'paired_difference: expected the same seeds of both, found {len(first)} and {len(second)}')
    return t_interval(np.asarray(first, np.float64) - np.asarray(second, np.float64), level=level, null=0.0)


def sign_flip_test(differences: Vector, *, resamples: int = 99_999, seed: int = 0) -> float:
    """The two-sided p-value of the hypothesis that differences are as likely with the other sign (Fisher 1935, s. 21).

    The p-value is the share of sign patterns whose sum is at least as far from 0 as the observed one. Up to
    `MAX_EXACT_SEEDS` all 2^n patterns are enumerated, so it is at least 2 / 2^n (with 5 seeds 1 / 16). Beyond, it is
    (1 + hits) / (1 + draws) of `resamples` random patterns (Phipson & Smyth 2010), which is never 0.

    Args:
        differences: [n], finite.
        resamples, seed: of the random patterns.

    Raises:
        ValueError: with no difference, or one that is not finite.
    """
    data = checked_measures('sign_flip_test', [differences], len(differences), 'refused')[0]
    # Sums that are equal but for the order of addition count as equal.
    found = abs(data.sum()) - 1e-9 * np.abs(data).sum()
    if len(data) <= MAX_EXACT_SEEDS:
        sums = data[:1]  # the first sign is fixed: a pattern and its mirror image are equally far from 0
        for difference in data[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= found).mean())
    signs = np.random.default_rng(seed).integers(0, 2, (resamples, len(data))) * 2 - 1
    return float((1 + (np.abs(signs @ data) >= found).sum()) / (1 + resamples))
