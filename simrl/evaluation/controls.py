"""Negative controls: where the instrument must find nothing, does it; and does a gap open where one is made?

1. `same_simulator_twice`: two arms with one simulator differ by their training seeds alone. Halves of one arm's seeds,
   renumbered, are such pairs of arms. An interval over people, which takes a checkpoint for a simulator, tells them
   apart as often as checkpoints of one simulator differ.
2. `opening`: the gap between two arms along a dial, from where there is nothing to be gained.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from simrl.evaluation.statistics import SeedEstimate, cluster_bootstraps, paired_difference, t_interval

LEAST_SEEDS = 4  # that can be halved into two arms of at least two


@dataclasses.dataclass(frozen=True)
class SameTwice:
    """How often the intervals of claims tell one arm from itself.

    Attributes:
        splits: how many ways there are to halve the arm's seeds.
        over_seeds: share of these in which the interval over training seeds misses 0. Halves of exchangeable numbers
            make it about 1 - `level` on average over arms, by construction: it can show that the shape of the seeds'
            distribution does not suit a t-interval, and nothing of seeds that depend on each other, were each there
            twice, or share a simulator. Splits of the same seeds are not independent: that of one arm scatters widely.
        over_people: the same of the interval over people: how often one would claim a difference that is none who
            takes a checkpoint for a simulator. This is what the control measures.
        largest: the largest absolute difference in mean satisfaction between two halves.
        level: the nominal coverage of both intervals.
    """

    splits: int
    over_seeds: float
    over_people: float
    largest: float
    level: float


def same_simulator_twice(
    satisfaction: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> SameTwice:
    """Halves of an arm's seeds as two arms: the differences that `claims_over_seeds` would claim of them.

    Args:
        satisfaction: [seeds, people] of one arm, at least four seeds; of an odd number the last is left out.
        level: of the intervals.
        resamples, seed: of the bootstrap over people.

    Raises:
        ValueError: fewer than four seeds, or a value is not finite.
    """
    if len(satisfaction) < LEAST_SEEDS:
        raise ValueError(
            f'same_simulator_twice: expected at least {LEAST_SEEDS} training seeds, found {len(satisfaction)}'
        )
    splits = list(_halves(len(satisfaction)))
    means = satisfaction.mean(1)
    over_seeds = [paired_difference(means[first], means[second], level=level) for first, second in splits]
    over_people = cluster_bootstraps(
        [satisfaction[first].mean(0) - satisfaction[second].mean(0) for first, second in splits],
        range(satisfaction.shape[1]),
        level=level,
        resamples=resamples,
        seed=seed,
    )
    return SameTwice(
        splits=len(splits),
        over_seeds=float(np.mean([_misses_zero(found.low, found.high) for found in over_seeds])),
        over_people=float(np.mean([_misses_zero(found.low, found.high) for found in over_people])),
        largest=max(abs(found.mean) for found in over_seeds),
        level=level,
    )


@dataclasses.dataclass(frozen=True)
class Opening:
    """A gap along a dial, in differences paired by training seed.

    Attributes:
        steps: from each dial to the next: how much wider the gap is.
        slope: of each seed's least-squares line of gap on dial.
        monotone: no step is certainly narrower, and the slope is certainly positive (by intervals over seeds).
        first: the gap at the first dial, where nothing is to be gained.
        closed: no gain is told apart from 0 there: the interval is not above 0. With few seeds a small gain is not, and
            `at_most` is what can be said.
        at_most: the upper bound of that gap, no less than 0, as a share of the mean gap at the last dial; None where
            the last is not above 0.
    """

    first: SeedEstimate
    steps: tuple[SeedEstimate, ...]
    slope: SeedEstimate
    monotone: bool
    closed: bool
    at_most: float | None


def opening(dials: Sequence[float], gaps: np.ndarray, *, level: float = 0.95) -> Opening:
    """What gaps by dial and seed say of a dial that should open them.

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
    low, high = _bounds(first)
    return Opening(
        first=first,
        steps=steps,
        slope=slope,
        monotone=_bounds(slope)[0] > 0 and all(_bounds(step)[1] >= 0 for step in steps),
        closed=low <= 0,
        at_most=max(high, 0.0) / last if last > 0 else None,
    )


def _bounds(estimate: SeedEstimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        raise ValueError(f'expected an interval over at least 2 seeds, found {estimate}')
    return estimate.low, estimate.high


def _misses_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)


def _halves(number: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every way to split an even number of seeds into two halves, each once; the first is always in the first half."""
    even = range(number // 2 * 2)
    for rest in itertools.combinations(even[1:], len(even) // 2 - 1):
        chosen = {0, *rest}
        yield sorted(chosen), [i for i in even if i not in chosen]
