"""Arms over training seeds, from comparisons of their runs with one other assistant: the run as the unit.

The assistants 'ARM/seed-K' are runs of an arm. An interval of one run resamples people: it is of that checkpoint only.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from simrl.evaluation.comparisons import other_intervals, run_spread
from simrl.evaluation.multiplicity import holm
from simrl.evaluation.outcomes import failed_as
from simrl.evaluation.pairwise.responses import Pair
from simrl.evaluation.results import OtherIntervals, SeedBounds
from simrl.evaluation.statistics import SeedEstimate, cluster_sums, present_mean, t_interval

RUN = re.compile(r'(.+)/seed-(\d+)')


@dataclasses.dataclass(frozen=True)
class ArmWinRate:
    """The win rate of an arm over another assistant.

    Attributes:
        seeds: of training, ascending; a run without any verdict is in none of the numbers.
        win_rate: the mean over seeds of each run's mean over clusters, by t-interval and sign-flip test.
        intervals: with the spread pooled over arms, and over seeds and clusters at once.
        bounds: with failures lost, and won; None without any.
        adjusted: the p-value by Holm over all arms against that assistant; None with one seed.
    """

    arm: str
    other: str
    seeds: tuple[int, ...]
    win_rate: SeedEstimate
    intervals: OtherIntervals
    bounds: SeedBounds | None
    adjusted: float | None


def over_seeds(found: Mapping[tuple[str, str], tuple[Sequence[Pair], np.ndarray]]) -> tuple[ArmWinRate, ...]:
    """The win rate of each arm over each assistant that is no run, over its training seeds.

    Args:
        found: by first and second assistant, their pairs and the preferences for the first, [N], NaN a failure.
    """
    # By the other assistant, the arm and the seed: preferences for the run by id.
    runs: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    cluster_of: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for (first, second), (pairs, values) in found.items():
        run, other = (RUN.fullmatch(name) for name in (first, second))
        if (run is None) == (other is None):
            continue
        baseline, own = (second, values) if run is not None else (first, 1 - values)
        match = run or other
        assert match is not None
        of_arm = runs.setdefault(baseline, {}).setdefault(match[1], {})
        of_arm[int(match[2])] = {pair.id: float(value) for pair, value in zip(pairs, own, strict=True)}
        cluster_of[baseline] |= {pair.id: pair.cluster for pair in pairs}
    return tuple(of for baseline, arms in runs.items() for of in _against(baseline, arms, cluster_of[baseline]))


def _against(
    other: str, arms: Mapping[str, Mapping[int, Mapping[str, float]]], cluster_of: Mapping[str, str]
) -> list[ArmWinRate]:
    clusters = list(cluster_of.values())
    values = {
        (arm, seed): np.array([of_run.get(name, np.nan) for name in cluster_of])
        for arm, of_arm in arms.items()
        for seed, of_run in sorted(of_arm.items())
    }
    judged = {run: own for run, own in values.items() if not np.isnan(own).all()}
    by_run = {run: _cluster_means(own, clusters) for run, own in judged.items()}
    names = {arm: {seed: f'{arm}/seed-{seed}' for of, seed in judged if of == arm} for arm in arms}
    spread = run_spread(names, {f'{arm}/seed-{seed}': own for (arm, seed), own in by_run.items()})
    rows = []
    for arm, seeds in names.items():
        if not seeds:
            continue
        own = [by_run[arm, seed] for seed in seeds]
        win_rate = t_interval([present_mean(x) for x in own], null=0.5)
        failed = any(np.isnan(judged[arm, seed]).any() for seed in seeds)
        lost, won = (
            t_interval([_cluster_means(failed_as(judged[arm, seed], to), clusters).mean() for seed in seeds], null=0.5)
            for to in (0.0, 1.0)
        )
        rows.append(
            ArmWinRate(
                arm=arm,
                other=other,
                seeds=tuple(seeds),
                win_rate=win_rate,
                intervals=other_intervals(win_rate, spread.run, own, range(len(own[0]))),
                bounds=SeedBounds(lost, won) if failed else None,
                adjusted=None,
            )
        )
    adjusted = holm({row.arm: row.win_rate.p_value for row in rows if row.win_rate.p_value is not None})
    return [dataclasses.replace(row, adjusted=adjusted.get(row.arm)) for row in rows]


def _cluster_means(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """The mean of each cluster's values that are there, [clusters]; NaN of one without any."""
    totals, counts = (sums[:, 0] for sums in cluster_sums(values[None], clusters))
    return np.divide(totals, counts, out=np.full(len(totals), np.nan), where=counts > 0)
