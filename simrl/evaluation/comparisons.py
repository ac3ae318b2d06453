"""Comparisons of arms, with the training run as the unit.

`compare_arms`: each arm over its training seeds against the initial assistant; every pair of arms over the seeds that
both have; the recovered share of the oracle's gain.

A difference is over the examples on which both sides have an outcome in the same seed, which are counted; of several
seeds an example's difference is the mean over those in which it has one.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from simrl.evaluation.blocks import BlockSpread, Spread, block_spread, pooled_interval
from simrl.evaluation.crossed import crossed_mean
from simrl.evaluation.gap_recovered import gaps_recovered
from simrl.evaluation.multiplicity import holm
from simrl.evaluation.outcomes import Compared, Outcomes, failed_as
from simrl.evaluation.results.measures import INITIAL, ArmResult, Difference, OtherIntervals, SeedBounds
from simrl.evaluation.seeds import SeedEstimate, t_interval
from simrl.evaluation.statistics import cluster_bootstraps, mean_over_seeds, present_mean

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

    In a pair the arm that is listed later comes first: listed from weak to strong, gains are positive. The p-values of
    all pairs' scores are one family for Holm's correction.

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
    gains = {name: x.gain for name, x in compared.items()}
    preferred = {name: x.preferred for name, x in compared.items()}
    higher = {name: x.higher for name, x in compared.items() if x.higher is not None}

    def over_seeds(arm: str, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [values[name] for name in runs[arm].values()]

    def mean(values: Iterable[np.ndarray], null: float | None = None) -> SeedEstimate:
        return t_interval([present_mean(x) for x in values], level=level, null=null)

    shared = pairs_of(runs)

    def differences_of(values: Mapping[str, np.ndarray]) -> dict[tuple[str, str], list[np.ndarray]]:
        """By pair, the first arm minus the second, [seeds][N]."""
        return {
            pair: [paired(*((runs[arm][x], values[runs[arm][x]]) for arm in pair)) for x in seeds]
            for pair, seeds in shared.items()
        }

    by_score, by_preference = differences_of(scores), differences_of(preferred)
    gaps = [mean_over_seeds(x) for x in (*(over_seeds(arm, gains) for arm in runs), *by_score.values())]
    bootstrapped = cluster_bootstraps(gaps, clusters, level=level, resamples=resamples, seed=seed, nan='missing')
    recovered = {}
    if oracle is not None and oracle in runs:
        by_arm = {arm: np.stack(over_seeds(arm, scores)) for arm in runs}
        recovered = gaps_recovered(by_arm, initial, oracle, clusters, level=level, resamples=resamples, seed=seed)
    of_gain, of_win_rate = run_spread(runs, gains), run_spread(runs, preferred)
    results = {}
    for arm, checkpoint_gain in zip(runs, bootstrapped[: len(runs)], strict=True):
        gain, win_rate = mean(over_seeds(arm, gains), 0.0), mean(over_seeds(arm, preferred), 0.5)
        results[arm] = ArmResult(
            seeds=tuple(runs[arm]),
            score=mean(over_seeds(arm, scores)),
            parts={
                part: mean(outcomes[name].parts[part] for name in runs[arm].values())
                for part in outcomes[INITIAL].parts
            },
            gain=gain,
            win_rate=win_rate,
            strict_win_rate=mean(over_seeds(arm, higher), 0.5) if higher else None,
            checkpoint_gain=checkpoint_gain,
            gap_recovered=recovered.get(arm),
            compared=tuple(int(np.isfinite(x).sum()) for x in over_seeds(arm, gains)),
            win_rate_bounds=seed_bounds(over_seeds(arm, preferred), level=level),
            strict_win_rate_bounds=seed_bounds(over_seeds(arm, higher), level=level) if higher else None,
            gain_intervals=other_intervals(gain, of_gain.run, over_seeds(arm, gains), clusters),
            win_rate_intervals=other_intervals(win_rate, of_win_rate.run, over_seeds(arm, preferred), clusters),
        )
    found = {pair: mean(values, 0.0) for pair, values in by_score.items()}
    adjusted = holm({pair: x.p_value for pair, x in found.items() if x.p_value is not None})
    differences = []
    for (pair, seeds), checkpoint_score in zip(shared.items(), bootstrapped[len(runs) :], strict=True):
        win_rate = mean(by_preference[pair], 0.0)
        differences.append(
            Difference(
                *pair,
                seeds=tuple(seeds),
                score=found[pair],
                win_rate=win_rate,
                checkpoint_score=checkpoint_score,
                compared=tuple(np.isfinite(by_score[pair]).sum(1).tolist()),
                adjusted_p=adjusted.get(pair),
                score_intervals=other_intervals(found[pair], of_gain.difference, by_score[pair], clusters),
                win_rate_intervals=other_intervals(win_rate, of_win_rate.difference, by_preference[pair], clusters),
            )
        )
    return results, tuple(differences)


def run_spread(runs: Runs, values: Mapping[str, np.ndarray]) -> BlockSpread:
    """The spreads of arms' means over training seeds (`blocks.block_spread`), from each run's values."""
    seeds = sorted({seed for of_arm in runs.values() for seed in of_arm})
    layout = [
        [present_mean(values[of_arm[seed]]) if seed in of_arm else np.nan for seed in seeds] for of_arm in runs.values()
    ]
    return (block_spread(layout) if layout else None) or BlockSpread(None, None)


def seed_bounds(preferred: Sequence[np.ndarray], *, level: float) -> SeedBounds | None:
    """An arm's win rates, [seeds][N], with what has no outcome (NaN) lost, and won; None if all have one."""
    if not np.isnan(preferred).any():
        return None
    lost, won = (
        t_interval([float(failed_as(x, value).mean()) for x in preferred], level=level, null=0.5)
        for value in (0.0, 1.0)
    )
    return SeedBounds(lost, won)


def other_intervals(
    own: SeedEstimate, spread: Spread | None, values: np.ndarray | Sequence[np.ndarray], clusters: Sequence[Hashable]
) -> OtherIntervals:
    """The pooled and the crossed interval beside the t-interval `own` of values [seeds][N]."""
    in_all = ~np.isnan(values).any(axis=0)
    return OtherIntervals(
        pooled=None if spread is None else pooled_interval(own.values, spread, level=own.level),
        crossed=crossed_mean(values, clusters, level=own.level, nan='missing') if in_all.any() else None,
    )


def pairs_of(runs: Runs) -> dict[tuple[str, str], list[int]]:
    """The pairs of arms that share training seeds, the arm that is listed later first, and these seeds, ascending."""
    arms = tuple(runs)
    pairs = [(second, first) for number, second in enumerate(arms) for first in arms[:number]]
    shared = {(first, second): sorted(runs[first].keys() & runs[second].keys()) for first, second in pairs}
    return {pair: seeds for pair, seeds in shared.items() if seeds}


def paired(one: tuple[str, np.ndarray], other: tuple[str, np.ndarray]) -> np.ndarray:
    """One measure [N] minus another, NaN where either is missing; each with the name of what it is of.

    Raises:
        ValueError: they have no observation in common.
    """
    difference = one[1] - other[1]
    if np.isnan(difference).all():
        raise ValueError(
            f'{one[0]} and {other[0]}: expected an example with an outcome of both, found none among {len(difference)}'
        )
    return difference
