"""Arms over training seeds, from comparisons of their runs with one other assistant: the run as the unit.

The assistants 'ARM/seed-K' are runs of an arm. An interval of one run resamples people: it is of that checkpoint only.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from simrl.evaluation.comparisons import other_intervals, run_spread
from simrl.evaluation.multiplicity import holm
from simrl.evaluation.outcomes import failed_as
from simrl.evaluation.pairwise.responses import Pair
from simrl.evaluation.results.judges import ArmWinRate
from simrl.evaluation.results.measures import SeedBounds
from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import cluster_sums, present_mean

RUN = re.compile(r'(.+)/seed-(\d+)')


def over_seeds(found: Mapping[tuple[str, str], tuple[Sequence[Pair], np.ndarray]]) -> tuple[ArmWinRate, ...]:
    """The win rate of each arm over each assistant that is no run, over its training seeds.

    Args:
        found: by first and second assistant, their pairs and the preferences for the first, [N], NaN a failure.
    """
    runs: dict[str, dict[tuple[str, int], tuple[Sequence[Pair], np.ndarray]]] = {}  # by the other one, arm and seed
    for (first, second), (pairs, values) in found.items():
        run, other = (RUN.fullmatch(name) for name in (first, second))
        match = run or other
        if match is None or (run and other):
            continue
        baseline, own = (second, values) if run else (first, 1 - values)
        runs.setdefault(baseline, {})[match[1], int(match[2])] = pairs, own
    return tuple(of for baseline, own in runs.items() for of in _against(baseline, own))


def _against(other: str, runs: Mapping[tuple[str, int], tuple[Sequence[Pair], np.ndarray]]) -> list[ArmWinRate]:
    cluster_of = {pair.id: pair.cluster for pairs, _ in runs.values() for pair in pairs}
    clusters, place = list(cluster_of.values()), {name: number for number, name in enumerate(cluster_of)}
    judged: dict[tuple[str, int], np.ndarray] = {}
    for run, (pairs, values) in sorted(runs.items(), key=lambda item: item[0][1]):
        judged[run] = np.full(len(place), np.nan)
        judged[run][[place[pair.id] for pair in pairs]] = values
    by_run = {run: _cluster_means(own, clusters) for run, own in judged.items() if not np.isnan(own).all()}
    names = {arm: {seed: f'{arm}/seed-{seed}' for of, seed in by_run if of == arm} for arm, _ in runs}
    spread = run_spread(names, {f'{arm}/seed-{seed}': own for (arm, seed), own in by_run.items()})
    rows = []
    for arm, seeds in names.items():
        if not seeds:
            continue
        own = [by_run[arm, seed] for seed in seeds]
        win_rate = t_interval([present_mean(x) for x in own], null=0.5)
        every = [values for (of, _), values in judged.items() if of == arm]
        lost, won = (
            t_interval([_cluster_means(failed_as(values, to), clusters).mean() for values in every], null=0.5)
            for to in (0.0, 1.0)
        )
        rows.append(
            ArmWinRate(
                arm=arm,
                other=other,
                seeds=tuple(seeds),
                win_rate=win_rate,
                intervals=other_intervals(win_rate, spread.run, own, range(len(own[0]))),
                bounds=SeedBounds(lost, won) if np.isnan(every).any() else None,
                adjusted=None,
            )
        )
    adjusted = holm({row.arm: row.win_rate.p_value for row in rows if row.win_rate.p_value is not None})
    return [dataclasses.replace(row, adjusted=adjusted.get(row.arm)) for row in rows]


def _cluster_means(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """The mean of each cluster's values that are there, [clusters]; NaN of one without any."""
    totals, counts = (sums[:, 0] for sums in cluster_sums(values[None], clusters))
    return np.divide(totals, counts, out=np.full(len(totals), np.nan), where=counts > 0)
