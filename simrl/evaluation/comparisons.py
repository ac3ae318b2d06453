"""Comparisons of arms, with the training run as the unit.

`compare_arms`: each arm over its training seeds against the initial assistant; every pair of arms over the seeds that
both have; the recovered share of the oracle's gain.

A difference is over the examples on which both sides have an outcome; of several seeds an example's outcome is the mean
over those that have one.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from simrl.evaluation.gap_recovered import gaps_recovered
from simrl.evaluation.outcomes import Compared, Outcomes
from simrl.evaluation.results import INITIAL, ArmResult, Difference
from simrl.evaluation.statistics import (
    SeedEstimate,
    cluster_bootstraps,
    mean_over_seeds,
    paired_difference,
    present_mean,
    t_interval,
)

T = TypeVar('T')
Runs = Mapping[str, Mapping[int, str]]  # arm, in the order of the config -> training seed, ascending -> assistant


def compare_arms(
    outcomes: Mapping[str, Outcomes],
    compared: Mapping[str, Compared],
    runs: Runs,
    oracle: str | None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[dict[str, ArmResult], tuple[Difference, ...]]:
    """Each arm over its training seeds, and the difference of each pair of arms that share a seed.

    In a pair the arm that is listed later comes first: listed from weak to strong, gains are positive.

    Args:
        outcomes: of 'initial' and each run, on the same examples.
        compared: of each run, from `outcomes.compare`.
        runs: the runs of each arm.
        oracle: the arm that trains against people themselves; None: there is none, and no gap to recover.
        level: of all intervals.
        resamples, seed: of the bootstraps over clusters.
    """
    clusters = outcomes[INITIAL].clusters
    initial = outcomes[INITIAL].score
    scores = {name: outcomes[name].score for name in compared}
    score = {name: present_mean(x) for name, x in scores.items()}
    gain = {name: present_mean(x.gain) for name, x in compared.items()}
    preferred = {name: x.preferred for name, x in compared.items()}
    win_rate = {name: present_mean(x) for name, x in preferred.items()}
    higher = {name: present_mean(x.higher) for name, x in compared.items() if x.higher is not None}

    def over_seeds(arm: str, values: Mapping[str, T]) -> list[T]:
        return [values[name] for name in runs[arm].values()]

    shared = pairs_of(runs)

    def of_pair(pair: tuple[str, str], values: Mapping[str, T]) -> tuple[list[T], list[T]]:
        first, second = ([values[runs[arm][number]] for number in shared[pair]] for arm in pair)
        return first, second

    def difference(pair: tuple[str, str], values: Mapping[str, np.ndarray]) -> SeedEstimate:
        means = [paired_means(*of_seed) for of_seed in zip(*of_pair(pair, values), strict=True)]
        return paired_difference(*zip(*means, strict=True), level=level)

    gaps = [mean_over_seeds(over_seeds(arm, scores)) - initial for arm in runs]
    gaps.extend(np.subtract(*map(mean_over_seeds, of_pair(pair, scores))) for pair in shared)
    bootstrapped = cluster_bootstraps(gaps, clusters, level=level, resamples=resamples, seed=seed, nan='missing')
    recovered = {}
    if oracle is not None and oracle in runs:
        by_arm = {arm: np.stack(over_seeds(arm, scores)) for arm in runs}
        recovered = gaps_recovered(by_arm, initial, oracle, clusters, level=level, resamples=resamples, seed=seed)
    results = {
        arm: ArmResult(
            seeds=tuple(runs[arm]),
            score=t_interval(over_seeds(arm, score), level=level),
            parts={
                part: t_interval([present_mean(outcomes[name].parts[part]) for name in runs[arm].values()], level=level)
                for part in outcomes[INITIAL].parts
            },
            gain=t_interval(over_seeds(arm, gain), level=level, null=0.0),
            win_rate=t_interval(over_seeds(arm, win_rate), level=level, null=0.5),
            strict_win_rate=t_interval(over_seeds(arm, higher), level=level, null=0.5) if higher else None,
            checkpoint_gain=checkpoint_gain,
            gap_recovered=recovered.get(arm),
        )
        for arm, checkpoint_gain in zip(runs, bootstrapped[: len(runs)], strict=True)
    }
    differences = tuple(
        Difference(
            *pair,
            seeds=tuple(seeds),
            score=difference(pair, scores),
            win_rate=difference(pair, preferred),
            checkpoint_score=checkpoint_score,
        )
        for (pair, seeds), checkpoint_score in zip(shared.items(), bootstrapped[len(runs) :], strict=True)
    )
    return results, differences


def pairs_of(runs: Runs) -> dict[tuple[str, str], list[int]]:
    """The pairs of arms that share training seeds, the arm that is listed later first, and these seeds, ascending."""
    arms = tuple(runs)
    pairs = [(second, first) for number, second in enumerate(arms) for first in arms[:number]]
    shared = {(first, second): sorted(runs[first].keys() & runs[second].keys()) for first, second in pairs}
    return {pair: seeds for pair, seeds in shared.items() if seeds}


def paired_means(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The means of two measures over the observations that both have.

    Raises:
        ValueError: there is none.
    """
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise ValueError(f'paired_means: expected an example with an outcome of both, found none among {len(both)}')
    return float(first[both].mean()), float(second[both].mean())
