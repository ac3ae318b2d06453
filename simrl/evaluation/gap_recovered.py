"""An arm's gain as a share of the gain of the oracle, the arm that trains against people themselves."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from itertools import compress

import numpy as np

from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import (
    check_level,
    cluster_sums,
    fewest_clusters,
    mean_interval,
    mean_over_seeds,
    percentile_interval,
    present_mean,
    resampled_means,
)


@dataclasses.dataclass(frozen=True)
class GapRecovered:
    """(U_arm - U_initial) / (U_oracle - U_initial), where U is the mean score. It may exceed 1.

    Attributes:
        mean: the share; None where it is undefined.
        low, high: the bounds of its interval over clusters: of these checkpoints only. None for the oracle itself,
            whose share is 1 by definition, where all resamples have the same share, and of few clusters.
        reason: why the share, or else its interval, is undefined.
        num_examples: how many examples the means are over.
        level: the nominal coverage of the interval.
        undefined_draws: share of bootstrap draws in which the oracle's gain is not above 0; the interval leaves them
            out (`statistics.percentile_interval`).
    """

    mean: float | None
    low: float | None
    high: float | None
    reason: str | None
    num_examples: int
    level: float
    undefined_draws: float = 0.0


def gaps_recovered(
    arms: Mapping[str, np.ndarray],
    initial: np.ndarray,
    oracle: str,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, GapRecovered]:
    """The gap recovered by each arm, with a percentile interval from resampling clusters (Efron & Tibshirani 1993).

    All arms share the draws, so differences between clusters cancel. Seeds are averaged first, over those that have a
    score (NaN is none): the interval leaves out the variance between training runs. The share is undefined where an
    interval of the oracle's gain, over clusters or (from two seeds on) over training seeds, is not above 0, or where
    there is neither. Examples on which an arm has a score in no seed, or the initial assistant has none, are left out
    of all.

    Args:
        arms: scores by arm, [examples] of one run or [seeds, examples].
        initial: [examples].
        oracle: the name of the oracle arm.
        clusters: [examples].
        level: nominal coverage, in (0, 1).
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no examples, numbers of examples that differ, an infinite score, or an oracle that is no arm.
    """
    check_level('gaps_recovered', level)
    number = len(clusters)
    if not number:
        raise ValueError('gaps_recovered: expected at least one example, found none')
    if oracle not in arms:
        raise ValueError(f'gaps_recovered: expected the oracle among the arms {", ".join(arms)}, found {oracle!r}')
    base = _over_seeds('initial', initial, number)
    best = _over_seeds(oracle, arms[oracle], number)
    gains = np.stack([best - base, *(_over_seeds(arm, scores, number) - base for arm, scores in arms.items())])
    of_all = ~np.isnan(gains).any(axis=0)
    if not of_all.any():
        none = f'none of {number} examples has a score of all arms'
        return dict.fromkeys(arms, GapRecovered(None, None, None, none, 0, level))
    gains, clusters, number = np.compress(of_all, gains, axis=1), list(compress(clusters, of_all)), int(of_all.sum())
    oracle_draws, *arm_draws = resampled_means(gains, clusters, resamples=resamples, seed=seed)
    by_seed = t_interval([present_mean(x - base) for x in np.atleast_2d(arms[oracle])], level=level)
    totals, counts = (sums[:, 0] for sums in cluster_sums(gains[:1], clusters))
    intervals = {
        'examples': mean_interval(totals, counts, oracle_draws, level=level),
        'training seeds': (by_seed.low, by_seed.high),
    }
    reasons = [
        f"the oracle's gain {gains[0].mean():+.3f} [{low:+.3f}, {high:+.3f}] over {unit} is not above 0"
        for unit, (low, high) in intervals.items()
        if low is not None and high is not None and low <= 0
    ]
    if all(low is None for low, _ in intervals.values()):
        reasons = [f"the oracle's gain {gains[0].mean():+.3f} has no interval: one example, or all are alike"]
    if reasons:
        return dict.fromkeys(arms, GapRecovered(None, None, None, reasons[0], number, level))
    defined = np.where(oracle_draws > 0, oracle_draws, np.nan)
    undefined, fewest = float(np.isnan(defined).mean()), fewest_clusters(level)
    no_interval = 'the share is the same whichever examples are drawn'
    if len(totals) < fewest:
        no_interval = f'an interval of a share needs {fewest} clusters of examples, there are {len(totals)}'
    shares = {}
    for arm, gain, draws in zip(arms, gains[1:], arm_draws, strict=True):
        low, high = percentile_interval(draws / defined, len(totals), level=level)
        reason = no_interval if low is None else None
        shares[arm] = GapRecovered(float(gain.mean() / gains[0].mean()), low, high, reason, number, level, undefined)
    return shares | {oracle: GapRecovered(1.0, None, None, None, number, level)}


def _over_seeds(name: str, scores: np.ndarray, number: int) -> np.ndarray:
    """[examples] or [seeds, examples] -> [examples], the mean over the seeds that have a score."""
    means = mean_over_seeds(np.atleast_2d(scores))
    if means.shape != (number,):
        raise ValueError(f'gaps_recovered: expected {number} examples of {name!r}, found {means.shape[0]}')
    if np.isinf(means).any():
        raise ValueError(f'gaps_recovered: expected finite scores of {name!r}, found {means.sum()}')
    return means
