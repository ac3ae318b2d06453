"""Pairwise comparison of two assistants on the same examples."""

from collections.abc import Callable, Sequence

Prefer = Callable[[float, float], float]  # two scores -> the probability that the first is preferred


def prefer_higher(score: float, other: float) -> float:
    """1 for the higher score, 0 for the lower one, 1/2 for a tie."""
    return 0.5 if score == other else float(score > other)


def preferences(scores: Sequence[float], baseline: Sequence[float], prefer: Prefer = prefer_higher) -> list[float]:
    """The probability that each score is preferred to the baseline's on the same example; their mean is the win rate.

    Raises:
        ValueError: lengths that differ.
    """
    if len(scores) != len(baseline):
        raise ValueError(f'preferences: expected paired scores, found {len(scores)} and {len(baseline)}')
    return [prefer(score, other) for score, other in zip(scores, baseline, strict=True)]
