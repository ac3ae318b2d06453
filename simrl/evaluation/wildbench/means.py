"""Means over tasks, with what is not known of those that are not judged."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
        mean: None without a task.
        sem: standard error, s / sqrt(n) with s of n - 1 degrees of freedom; None with fewer than 2 tasks.
        n: tasks.
    """

    mean: float | None
    sem: float | None
    n: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of a number for each task."""
    n = len(values)
    sem = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Mean(float(np.mean(values)) if n else None, sem, n)


def bounds(values: Sequence[float], failed: int, lowest: float, highest: float) -> tuple[float, float]:
    """The means of values if all that failed have the lowest value, and if all have the highest."""
    total, n = sum(values), len(values) + failed
    return (total + failed * lowest) / n, (total + failed * highest) / n
