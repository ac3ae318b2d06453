"""Pairwise comparison of assistants that answered the same people."""

from collections.abc import Callable, Hashable, Sequence

from simrl.evaluation.statistics import Estimate, cluster_bootstrap

Prefer = Callable[[float, float], float]  # two scores -> the probability that the first is preferred


def wins(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Per pair 1.0 for a win, 0.0 for a loss, 0.5 for a tie."""
    if len(scores) != len(baseline):
        raise ValueError(f'wins: expected paired scores, found {len(scores)} and {len(baseline)}')
    return [0.5 if score == other else float(score > other) for score, other in zip(scores, baseline, strict=True)]


def win_rate(scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The share of pairs that `scores` wins against `baseline`, with a 95% interval over clusters."""
    return cluster_bootstrap(wins(scores, baseline), clusters)
