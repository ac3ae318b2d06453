"""Negative controls: no difference where there is none, and a gap that opens where one is made.

1. `same_simulator_twice`: two arms with one simulator differ by their training seeds alone. Halves of one arm's seeds,
   renumbered, are such pairs of arms. An interval over people treats a checkpoint as if it were its simulator: it
   separates them as often as checkpoints of one simulator differ.
2. `opening`: the gap between two arms along a dial that starts where nothing can be gained.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from simrl.evaluation.seeds import SeedEstimate, paired_difference, t_interval
from simrl.evaluation.statistics import cluster_bootstraps

MIN_SEEDS = 4  # training seeds that can be halved into two arms of at least two


@dataclasses.dataclass(frozen=True)
class SameTwice:
    """False positives: the rate at which intervals separate one arm from itself.

    Attributes:
        splits: number of ways to halve the arm's seeds.
        over_seeds: share of splits in which the interval over training seeds misses 0. It is about 1 - `level` on
            average over arms by construction, as the halves are exchangeable. It can show that a t-interval does not
            suit the seeds' distribution. It cannot show that seeds depend on each other. Splits of the same seeds are
            not independent, so the share of one arm scatters widely.
        over_people: the same for the interval over people: the rate of false positives where a checkpoint is treated
            as its simulator. The control measures this.
        largest: the largest absolute difference in mean score between two halves.
        level: the nominal coverage of both intervals.
    """

    splits: int
    over_seeds: float
    over_people: float
    largest: float
    level: float


def same_simulator_twice(scores: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> SameTwice:
    """Halves of an arm's seeds as two arms, compared as `comparisons.compare_arms` does.

    Args:
        scores: [seeds, people] of one arm, at least four seeds; of an odd number the last is left out.
        level: of the intervals.
        resamples, seed: of the bootstrap over people.

    Raises:
        ValueError: fewer than four seeds, no people, or a value is not finite.
    """
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f'same_simulator_twice: expected scores [seeds, people], found {list(scores.shape)}')
    if len(scores) < MIN_SEEDS:
        raise ValueError(f'same_simulator_twice: expected at least {MIN_SEEDS} training seeds, found {len(scores)}')
    splits = list(_halves(len(scores)))
    means = scores.mean(1)
    over_seeds = [paired_difference(means[first], means[second], level=level) for first, second in splits]
    over_people = cluster_bootstraps(
        [scores[first].mean(0) - scores[second].mean(0) for first, second in splits],
        range(scores.shape[1]),
        level=level,
        resamples=resamples,
        seed=seed,
    )
    return SameTwice(
        splits=len(splits),
        over_seeds=float(np.mean([bool(found.sign) for found in over_seeds])),
        over_people=float(np.mean([bool(found.sign) for found in over_people])),
        largest=max(abs(found.mean) for found in over_seeds),
        level=level,
    )


@dataclasses.dataclass(frozen=True)
class Opening:
    """A gap along a dial, in differences paired by training seed.

    Attributes:
        first: the gap at the first dial, where nothing can be gained.
        steps: the change of the gap from each dial to the next.
        slope: of each seed's least-squares line of gap on dial.
        monotone: no step is significantly negative, and the slope is significantly positive (intervals over seeds);
            None where one of them has no interval.
        closed: the interval of the first gap is not above 0; None without an interval. With few seeds a small gain is
            not significant: `at_most` bounds it.
        at_most: the upper bound of the first gap, at least 0, as a share of the mean gap at the last dial; None where
            the last is not above 0, or without an interval.
    """

    first: SeedEstimate
    steps: tuple[SeedEstimate, ...]
    slope: SeedEstimate
    monotone: bool | None
    closed: bool | None
    at_most: float | None


def opening(dials: Sequence[float], gaps: np.ndarray, *, level: float = 0.95) -> Opening:
    """Tests whether gaps by dial and seed open along the dial.

    Args:
        dials: ascending, at least two.
        gaps: [dials, seeds], at least two seeds.
        level: of the intervals.

    Raises:
        ValueError: dials that do not ascend, too few dials or seeds, or a value is not finite.
    """
    if len(dials) < 2 or list(dials) != sorted(set(dials)):
        raise ValueError(f'opening: expected at least two ascending dials, found {list(dials)}')
    if gaps.shape[0] != len(dials) or gaps.shape[1] < 2:
        raise ValueError(f'opening: expected gaps of {len(dials)} dials and at least 2 seeds, found {gaps.shape}')
    steps = tuple(paired_difference(after, before, level=level) for before, after in itertools.pairwise(gaps))
    slope = t_interval(np.polyfit(dials, gaps, 1)[0], level=level, null=0.0)
    first, last = t_interval(gaps[0], level=level), float(gaps[-1].mean())
    known = all(estimate.low is not None for estimate in (slope, *steps))
    return Opening(
        first=first,
        steps=steps,
        slope=slope,
        monotone=(slope.sign == 1 and all(step.sign != -1 for step in steps)) if known else None,
        closed=None if first.sign is None else first.sign < 1,
        at_most=max(first.high, 0.0) / last if first.high is not None and last > 0 else None,
    )


def _halves(number: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every split of an even number of seeds into two halves, each once; the first seed is in the first half."""
    even = range(number // 2 * 2)
    for rest in itertools.combinations(even[1:], len(even) // 2 - 1):
        chosen = {0, *rest}
        yield sorted(chosen), [i for i in even if i not in chosen]
