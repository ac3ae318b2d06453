"""Length-controlled win rates: what a judge would prefer were the responses of both assistants equally long.

1. `instruction_difficulty`: how much better than on the mean instruction all assistants do on each one. The name is
   AlpacaEval's; high values are easy instructions.
2. `length_controlled`: the judge's preferences by length difference and difficulty; prediction without a difference.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.special

from simrl.evaluation.preferences import checked
from simrl.evaluation.statistics import Vector

FOLDS = 5
_STEPS = 200  # of Newton's method, and of coordinate descent within each; fits need fewer
_PRIOR = 1e-6  # precision (1 / variance) of quality and length slope: assistants that always lose have a fit
PENALTIES = tuple(float(c) for c in np.logspace(-4, 4, 10))  # inverse strengths that cross-validation chooses from


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """A win rate without the effect of length, from 0 to 1.

    Attributes:
        win_rate: the mean preference.
        controlled: the mean predicted preference at equal lengths.
        model, length, difficulty: coefficients of the logistic regression, shrunk by its penalty: the assistant's
            quality in log-odds against the baseline, and the slopes of the length term and of the difficulty.
        penalty: the chosen inverse strength of the L1 penalty, one of `PENALTIES`.
    """

    win_rate: float
    controlled: float
    model: float
    length: float
    difficulty: float
    penalty: float


@dataclasses.dataclass(frozen=True)
class Reference:
    """Judged responses of the baseline itself at other lengths, asked to be brief or to be verbose.

    Their quality is taken for equal, so that they show the judge's length slope alone.

    Attributes:
        preferences: [R], from 0 to 1, for the response at another length over the baseline's usual one.
        terms: [R], from `length_term`, of each such set of responses.
        difficulty: [R], of their instructions.
        weight: of each row beside one of the assistant; AlpacaEval's is 0.1, for 0.2 over two sets.
    """

    preferences: Vector
    terms: Vector
    difficulty: Vector
    weight: float = 0.1


def length_term(lengths: Vector, baseline_lengths: Vector) -> np.ndarray:
    """tanh of the length difference, the first's less the second's, in its standard deviations; float64 [N].

    Args:
        lengths, baseline_lengths: [N], characters of the assistant's and the baseline's responses.

    Raises:
        ValueError: lengths of vectors that differ, a length that is not finite, or length differences that are all
            alike, which no model tells apart from the assistant's quality.
    """
    if len(lengths) != len(baseline_lengths):
        raise ValueError(f'length_term: expected paired lengths, found {len(lengths)} and {len(baseline_lengths)}')
    difference = np.asarray(lengths, np.float64) - np.asarray(baseline_lengths, np.float64)
    if not np.isfinite(difference).all():
        raise ValueError('length_term: expected finite lengths, found one that is not')
    if len(difference) < 2 or not np.ptp(difference) > 0:
        raise ValueError(f'length_term: expected length differences that vary, found {len(difference)} alike')
    return np.tanh(difference / difference.std(ddof=1))


def length_controlled(
    preferences: Vector,
    lengths: Vector,
    baseline_lengths: Vector,
    difficulty: Vector | None = None,
    reference: Reference | None = None,
) -> LengthControlled:
    """AlpacaEval's length-controlled win rate (Dubois et al. 2024, arXiv:2404.04475).

    The logit of the preference is m + l tanh(difference of lengths / its standard deviation) + d difficulty, fitted to
    the judge's graded preferences by logistic regression: the least sum of log-loss + (|m| + |l| + |d|) / penalty.
    5-fold cross-validation chooses the penalty by log-loss; fold k holds out every fifth row from the k-th, those of a
    reference after the assistant's, and of equal losses the strongest penalty is taken. The controlled win rate is the
    mean prediction with the length term at 0 and the difficulties as they are.

    The published numbers take the difficulty from a fit of all models on the leaderboard, and a `reference` of brief
    and verbose responses of the baseline, whose rows have no m. Both are arguments; AlpacaEval's are in its data set.

    Args:
        preferences: [N], from 0 to 1, for the assistant over the baseline.
        lengths, baseline_lengths: [N], characters of each one's responses.
        difficulty: [N], from `instruction_difficulty` of other assistants; None: instructions are alike.
        reference: rows that the length slope and the slope of the difficulty are fitted to, too.

    Raises:
        ValueError: numbers of instructions that differ, fewer than `FOLDS`, a preference that is not from 0 to 1, a
            difficulty that is not finite, length differences that are all alike, or a reference with a fault of these.
    """
    data = checked('length_controlled', preferences)
    hardness = np.zeros(len(data)) if difficulty is None else np.asarray(difficulty, np.float64)
    length = length_term(lengths, baseline_lengths)
    if not len(data) == len(length) == len(hardness):
        raise ValueError(
            'length_controlled: expected lengths and a difficulty of each preference, found '
            f'{len(length)} and {len(hardness)} of {len(data)}'
        )
    if len(data) < FOLDS:
        raise ValueError(f'length_controlled: expected at least {FOLDS} instructions, found {len(data)}')
    features, targets = np.column_stack([np.ones(len(data)), length, hardness]), data
    weights = np.ones(len(data))
    if reference is not None:
        extra = checked('length_controlled', reference.preferences)
        if not len(extra) == len(reference.terms) == len(reference.difficulty) or reference.weight < 0:
            raise ValueError(
                'length_controlled: expected a reference with a term and a difficulty of each preference and a weight '
                f'of at least 0, found {len(reference.terms)} and {len(reference.difficulty)} of {len(extra)}, and the '
                f'weight {reference.weight:g}'
            )
        features = np.concatenate(
            [features, np.column_stack([np.zeros(len(extra)), reference.terms, reference.difficulty])]
        )
        targets = np.concatenate([data, extra])
        weights = np.concatenate([weights, np.full(len(extra), reference.weight)])
    if not np.isfinite(features).all():
        raise ValueError('length_controlled: expected finite terms and difficulties, found one that is not')
    fold = np.arange(len(targets)) % FOLDS
    losses = np.zeros(len(PENALTIES))
    for held_out in range(FOLDS):
        train, test = fold != held_out, fold == held_out
        found = np.zeros(3)
        for number, penalty in enumerate(PENALTIES):
            found = _lasso(features[train], targets[train], weights[train], penalty, found)
            losses[number] += _loss(features[test] @ found, targets[test], weights[test])
    penalty = PENALTIES[int(losses.argmin())]
    model, slope, hard = (float(x) for x in _lasso(features, targets, weights, penalty, np.zeros(3)))
    controlled = float(scipy.special.expit(model + hard * hardness).mean())
    return LengthControlled(float(data.mean()), controlled, model, slope, hard, penalty)


def instruction_difficulty(preferences: np.ndarray, terms: np.ndarray, *, spread: float = 10.0) -> np.ndarray:
    """The common part of several assistants' log-odds on each instruction, float64 [N], shifted to mean 0.

    The logit of assistant k's preference on instruction n is m_k + l_k term_kn + g_n: a Rasch model with length slopes.
    All are fitted at once, at the mode under normal priors around 0: of standard deviation `spread` for g, and 1,000
    for m and l. High values are instructions on which all assistants do well against the baseline. AlpacaEval's come
    from a fit of all models on its leaderboard.

    Args:
        preferences: [assistants, N], from 0 to 1.
        terms: [assistants, N], from `length_term`.
        spread: the prior standard deviation of g, in log-odds; wide, it only keeps instructions finite on which all
            lose or all win.

    Raises:
        ValueError: shapes that differ, or a preference that is not from 0 to 1.
    """
    if preferences.ndim != 2 or preferences.shape != terms.shape:
        raise ValueError(
            'instruction_difficulty: expected preferences and terms [assistants, N], found '
            f'{preferences.shape} and {terms.shape}'
        )
    data = checked('instruction_difficulty', preferences.ravel()).reshape(preferences.shape)
    number = len(data)
    columns = np.stack([np.ones_like(terms), terms], axis=1)  # [assistants, 2, N]
    precision = np.append(np.full(2 * number, _PRIOR), np.full(data[0].size, 1 / spread**2))

    def logit(theta: np.ndarray) -> np.ndarray:
        return np.einsum('kcn,kc->kn', columns, theta[: 2 * number].reshape(number, 2)) + theta[2 * number :]

    def loss(theta: np.ndarray) -> float:
        return _loss(logit(theta), data, np.ones_like(data)) + float(precision @ np.square(theta)) / 2

    def target(theta: np.ndarray) -> np.ndarray:
        share = scipy.special.expit(logit(theta))
        error, variance = share - data, share * (1 - share)
        slope = np.concatenate([(columns * error[:, None]).sum(2).ravel(), error.sum(0)]) + precision * theta
        own, common = slope[: 2 * number], slope[2 * number :]
        diagonal = variance.sum(0) + 1 / spread**2  # the block of g; that of m and l is solved for first
        mixed = (columns * variance[:, None]).reshape(2 * number, -1)
        blocks = np.einsum('kcn,kdn->kcd', columns * variance[:, None], columns)
        whole = scipy.linalg.block_diag(*blocks) + _PRIOR * np.eye(2 * number) - (mixed / diagonal) @ mixed.T
        step = np.linalg.solve(whole, own - mixed @ (common / diagonal))
        return theta - np.concatenate([step, (common - step @ mixed) / diagonal])

    common = _newton('instruction_difficulty', loss, target, np.zeros(len(precision)))[2 * number :]
    return common - common.mean()


def _loss(logit: np.ndarray, data: np.ndarray, weights: np.ndarray) -> float:
    """The weighted sum of the log-loss of preferences."""
    return float((weights * (np.logaddexp(0.0, logit) - data * logit)).sum())


def _lasso(
    features: np.ndarray, data: np.ndarray, weights: np.ndarray, penalty: float, start: np.ndarray
) -> np.ndarray:
    """The coefficients [K] that minimise log-loss + sum |coefficients| / penalty.

    Each step goes to the minimum of the quadratic form at hand and the penalty, by coordinate descent (Friedman et al.
    2010).
    """

    def loss(coefficients: np.ndarray) -> float:
        return _loss(features @ coefficients, data, weights) + float(np.abs(coefficients).sum()) / penalty

    def target(coefficients: np.ndarray) -> np.ndarray:
        share = scipy.special.expit(features @ coefficients)
        slope = features.T @ (weights * (share - data))
        curvature = (features.T * (weights * share * (1 - share))) @ features
        return _minimum(slope - curvature @ coefficients, curvature, 1 / penalty, coefficients)

    return _newton('length_controlled', loss, target, start)


def _newton(
    caller: str, loss: Callable[[np.ndarray], float], target: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> np.ndarray:
    """The minimum of a convex loss: steps to `target` are halved until the loss falls; errors name `caller`."""
    found, least = start, loss(start)
    for _ in range(_STEPS):
        step, size = target(found) - found, 1.0
        while loss(found + size * step) > least and size > 1e-10:
            size /= 2
        found = found + size * step
        previous, least = least, loss(found)
        if previous - least <= 1e-13 * abs(least):
            return found
    raise ValueError(f'{caller}: expected a fit within {_STEPS} steps, found none')


def _minimum(linear: np.ndarray, curvature: np.ndarray, threshold: float, start: np.ndarray) -> np.ndarray:
    """The x [K] that minimises linear x + x curvature x / 2 + threshold sum |x|, by coordinate descent."""
    x = start.copy()
    for _ in range(_STEPS):
        before = x.copy()
        for k, diagonal in enumerate(np.diagonal(curvature)):
            rest = linear[k] + curvature[k] @ x - diagonal * x[k]
            x[k] = -math.copysign(max(abs(rest) - threshold, 0.0), rest) / diagonal if diagonal > 0 else 0.0
        if np.abs(x - before).max() <= 1e-12 * (1 + np.abs(x).max()):
            break
    return x
