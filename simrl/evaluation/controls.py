"""Negative controls: where the instrument must find nothing, does it?

Two arms with the same simulator differ by their training seeds alone, so a test at level .05 may tell them apart in one
case of twenty. The seeds of one arm, split into two halves in every way, are such pairs of arms.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class SameTwice:
    """How often halves of the seeds of one arm are told apart.

    Attributes:
        splits: how many ways there are to halve the seeds, over all arms.
        told_apart: share of these in which the test rejects; None without a split.
        largest: the largest absolute difference between the means of two halves.
        level: of the test, and so what `told_apart` should be about; splits of the same seeds are not independent.
    """

    splits: int
    told_apart: float | None
    largest: float | None
    level: float


def same_simulator_twice(runs: Mapping[str, Sequence[float]], *, level: float = 0.05) -> SameTwice:
    """Student's two-sample t-test (1908) between the halves of each arm's seeds.

    Args:
        runs: each arm's mean satisfaction by training seed; an arm of fewer than four seeds has no split, and of an odd
            number the last one is left out.
        level: of the test.

    Raises:
        ValueError: a value is not finite.
    """
    told_apart, gaps = [], []
    for arm, values in runs.items():
        if not np.isfinite(values).all():
            raise ValueError(f'same_simulator_twice: expected finite values of {arm!r}, found {list(values)}')
        for first, second in _halves(list(values)):
            gap = float(np.mean(first) - np.mean(second))
            spread = float(np.std(first + second, ddof=1))
            told_apart.append(bool(spread) and float(stats.ttest_ind(first, second).pvalue) < level)
            gaps.append(abs(gap))
    if not gaps:
        return SameTwice(0, None, None, level)
    return SameTwice(len(gaps), float(np.mean(told_apart)), max(gaps), level)


def _halves(values: list[float]) -> Iterator[tuple[list[float], list[float]]]:
    """Every way to split an even number of values, at least four, into two halves; each once."""
    even = values[: len(values) // 2 * 2]
    if len(even) < 4:
        return
    for rest in itertools.combinations(range(1, len(even)), len(even) // 2 - 1):
        chosen = {0, *rest}  # the first value is always in the first half
        yield [even[i] for i in sorted(chosen)], [value for i, value in enumerate(even) if i not in chosen]
