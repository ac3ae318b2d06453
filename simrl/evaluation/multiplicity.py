"""Corrections for several tests of one family."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

K = TypeVar('K', bound=Hashable)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Adjusted p-values of a family by Holm's step-down procedure (Holm 1979).

    With p-values in ascending order, adjusted[i] = max over j <= i of min(1, (n - j) p[j]), j from 0. To reject what is
    at most `alpha` keeps the probability of any false rejection in the family at or below `alpha`, however the tests
    depend on each other. The family is all tests that are read together, also those that are not shown.

    Args:
        p_values: by test, each in [0, 1]; all tests of the family.

    Returns:
        By test, in the order given.

    Raises:
        ValueError: a p-value is not in [0, 1], or is NaN.
    """
    for test, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f'holm: expected a p-value in [0, 1] of {test!r}, found {p}')
    adjusted: dict[K, float] = {}
    largest = 0.0
    for number, test in enumerate(sorted(p_values, key=lambda test: p_values[test])):
        largest = max(largest, min(1.0, (len(p_values) - number) * p_values[test]))
        adjusted[test] = largest
    return {test: adjusted[test] for test in p_values}
