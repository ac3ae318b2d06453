"""Verdicts of judges on pairs shown in both orders -> preferences, position bias, and the worth of a panel.

A verdict is a preference for the first assistant of the pair, from 0 to 1, whichever order the judge saw; 1/2 is a tie,
NaN a failure. `a_first` are verdicts with that assistant shown first, `b_first` with the other one shown first.

A verdict's winner is the first assistant above 1/2, the second one below, and none at 1/2. A pair is a flip where its
two orders have different winners, a tie beside a win among them. Of graded verdicts a slight and a clear win of one
assistant are none.

1. `flips`, `both_orders`: one preference per pair.
2. `position_bias`: how often the order decides, and for which position.
3. `panel_agreement`: each judge against reference labels, and the number of independent votes that a panel is worth;
   `votes_of`: that number without labels.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from simrl.evaluation.preferences import checked, winners
from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import (
    Estimate,
    Vector,
    differ,
    percentile_interval,
    resampled_means,
)

Combine = Literal['mean', 'strict']
_CANCELLED = 1e-9  # a sum of correlations that is smaller is 0 but for rounding


@dataclasses.dataclass(frozen=True)
class PositionBias:
    """Effects of the order of a pair on a judge's verdicts.

    Attributes:
        consistent: share of pairs with the same winner in both orders; one less it is the share of flips.
        to_first, to_second: share of flips to the assistant shown first, or shown second, among all pairs.
        first_position: mean preference for the assistant shown first; 1/2 without a bias.
        failures: number of pairs without a verdict in both orders; they are in none of the shares.
    """

    consistent: Estimate
    to_first: Estimate
    to_second: Estimate
    first_position: Estimate
    failures: int


@dataclasses.dataclass(frozen=True)
class PanelAgreement:
    """Judges against reference labels on the same pairs.

    Attributes:
        judges: names, in the order of `correlations`.
        agreement: by judge, 1 less the mean distance between verdict and label: the share of equal ones without ties.
        panel: the same of the judges' mean verdict, a mean above 1/2 counted as 1 and one below as 0.
        correlations: Pearson correlation of the errors of each two judges; None where a judge makes the same error
            on every pair.
        mean_correlation, effective_votes: over all pairs of judges; None where a correlation is. Errors that cancel
            each other are worth any number of votes: that number is None, too.
        low, high: the bounds of the effective number of votes; None as in `statistics.percentile_interval`.
        undefined_draws: share of bootstrap draws without such a number, as a judge makes the same error on every pair,
            or errors cancel; None where the number itself is.
        failures: number of pairs without a verdict of every judge, or without a label; they count nowhere above.
    """

    judges: tuple[str, ...]
    agreement: dict[str, Estimate]
    panel: Estimate
    correlations: tuple[tuple[float | None, ...], ...]
    mean_correlation: float | None
    effective_votes: float | None
    low: float | None
    high: float | None
    undefined_draws: float | None
    failures: int


@dataclasses.dataclass(frozen=True)
class Votes:
    """Judges as votes.

    Attributes:
        mean_correlation: of the preferences of two judges; None where a judge's do not vary.
        effective, low, high: the number of independent judges whose mean preference would vary as much, with its
            interval; None where a correlation is.
    """

    mean_correlation: float | None
    effective: float | None
    low: float | None
    high: float | None


def flips(a_first: Vector, b_first: Vector) -> np.ndarray:
    """bool [pairs], True where both orders have a verdict, and different winners.

    Args:
        a_first, b_first: [pairs] verdicts, in the same order of pairs.

    Raises:
        ValueError: no pairs, lengths that differ, or a verdict that is not from 0 to 1.
    """
    first, second = winners(_verdicts('flips', {'a_first': a_first, 'b_first': b_first}))
    return np.asarray((first != second) & ~np.isnan(first + second))


def both_orders(a_first: Vector, b_first: Vector, *, combine: Combine = 'mean') -> np.ndarray:
    """The preference of each pair, float64 [pairs], from its verdicts in both orders.

    No pair is dropped: one without both verdicts is a failure (NaN), for `win_rates` to bound. 'strict' is the rule of
    Zheng et al. (2023, arXiv:2306.05685).

    Args:
        a_first, b_first: [pairs] verdicts, in the same order of pairs (`preferences.align`).
        combine: 'mean': of both verdicts. 'strict': the same, but a tie where the pair is a flip.

    Raises:
        ValueError: no pairs, lengths that differ, a verdict that is not from 0 to 1, or another `combine`.
    """
    if combine not in ('mean', 'strict'):
        raise ValueError(f"both_orders: expected to combine by 'mean' or 'strict', found {combine!r}")
    first, second = _verdicts('both_orders', {'a_first': a_first, 'b_first': b_first})
    mean = (first + second) / 2
    return mean if combine == 'mean' else np.where(flips(first, second), 0.5, mean)


def position_bias(
    a_first: Vector, b_first: Vector, clusters: Sequence[Hashable], *, level: float = 0.95
) -> PositionBias:
    """The position bias and self-consistency of a judge (Zheng et al. 2023), with intervals of shares.

    Args:
        a_first, b_first: [pairs] verdicts, in the same order of pairs.
        clusters: [pairs], what intervals resample: the prompt, the conversation or the person of each pair.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: no pair with both verdicts, lengths that differ, or a verdict that is not from 0 to 1.
    """
    verdicts = _verdicts('position_bias', {'a_first': a_first, 'b_first': b_first}, clusters)
    there = _complete('position_bias', verdicts)
    first, second = verdicts[:, there]
    shift = winners(first) - winners(second)
    measures = [shift == 0, shift > 0, shift < 0, (first + 1 - second) / 2]
    units = [cluster for cluster, both in zip(clusters, there, strict=True) if both]
    consistent, to_first, to_second, first_position = cluster_shares(
        [np.asarray(x, np.float64) for x in measures], units, level=level
    )
    return PositionBias(consistent, to_first, to_second, first_position, failures=int((~there).sum()))


def panel_agreement(
    verdicts: Mapping[str, Vector],
    labels: Vector,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> PanelAgreement:
    """Each judge's agreement with labels, and the number of independent votes that the panel is worth.

    A judge's error on a pair is its verdict less the label. With k judges whose errors correlate by r on average, the
    variance of their mean error is that of k / (1 + (k - 1) r) independent judges (Kish 1965, s. 5.4, the design
    effect): k votes where r is 0, one where it is 1. The interval resamples clusters.

    Args:
        verdicts: by judge, [pairs].
        labels: [pairs], preferences of people or known answers, from 0 to 1.
        clusters: [pairs], what intervals resample.
        level: nominal coverage, in (0, 1).
        resamples, seed: of the bootstrap of the effective number of votes.

    Raises:
        ValueError: fewer than two judges, no pair with a verdict of all and a label, lengths that differ, or a value
            that is not from 0 to 1.
    """
    if len(verdicts) < 2:
        raise ValueError(f'panel_agreement: expected at least two judges, found {sorted(verdicts)}')
    values = _verdicts('panel_agreement', {**verdicts, 'labels': labels}, clusters)
    there = _complete('panel_agreement', values)
    *judges, label = values[:, there]
    units = [cluster for cluster, whole in zip(clusters, there, strict=True) if whole]
    errors = np.stack(judges) - label
    majority = (winners(np.mean(judges, axis=0)) + 1) / 2
    agreement = cluster_shares([*(1 - np.abs(errors)), 1 - np.abs(majority - label)], units, level=level)
    vary = np.array([differ(error) for error in errors])
    number = len(errors)
    products = np.concatenate([errors, (errors[:, None] * errors[None]).reshape(number**2, -1)])
    correlations = _correlations(products.mean(1)[:, None])[0]
    correlations[~(vary[:, None] & vary[None])] = np.nan
    mean, votes, low, high, undefined = None, None, None, None, None
    if vary.all():
        mean = float(correlations[~np.eye(number, dtype=bool)].mean())
        of_all = float(_effective_votes(correlations[None])[0])
        if not math.isnan(of_all):
            votes = of_all
            draws = _effective_votes(_correlations(resampled_means(products, units, resamples=resamples, seed=seed)))
            undefined = float(np.isnan(draws).mean())
            low, high = percentile_interval(draws, len(set(units)), level=level)
    return PanelAgreement(
        judges=tuple(verdicts),
        agreement=dict(zip(verdicts, agreement[:-1], strict=True)),
        panel=agreement[-1],
        correlations=tuple(tuple(None if np.isnan(x) else float(x) for x in row) for row in correlations),
        mean_correlation=mean,
        effective_votes=votes,
        low=low,
        high=high,
        undefined_draws=undefined,
        failures=int((~there).sum()),
    )


def votes_of(preferences: Mapping[str, Vector], clusters: Sequence[Hashable]) -> Votes:
    """The number of independent votes that judges are worth by the correlation of their preferences.

    It is that of `panel_agreement` with one label for all pairs, from which errors are the preferences themselves but
    for a constant: what judges are right about together counts as what they share, so that it tends to be lower than by
    the correlation of errors.

    Args:
        preferences: by judge, [pairs], or scores, from 0 to 1; NaN is a failure.
        clusters: [pairs], what the interval resamples.

    Raises:
        ValueError: as `panel_agreement`.
    """
    same = panel_agreement(preferences, np.full(len(clusters), 0.5), clusters)
    return Votes(same.mean_correlation, same.effective_votes, same.low, same.high)


def _correlations(moments: np.ndarray) -> np.ndarray:
    """Pearson correlations [R, k, k] of k variables from means of them and of their products, [k + k^2, R].

    NaN of a variable that does not vary.
    """
    number = round((math.sqrt(1 + 4 * len(moments)) - 1) / 2)
    means, products = moments[:number].T, moments[number:].T.reshape(-1, number, number)
    covariance = products - means[:, :, None] * means[:, None, :]
    spread = np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0))
    with np.errstate(invalid='ignore', divide='ignore'):  # 0 / 0 of a draw in which a judge makes the same error
        return covariance / (spread[:, :, None] * spread[:, None, :])


def _effective_votes(correlations: np.ndarray) -> np.ndarray:
    """[R, k, k] -> k^2 over the sum of the correlations, which is k / (1 + (k - 1) r); NaN where they cancel."""
    total = correlations.sum((1, 2))
    return correlations.shape[-1] ** 2 / np.where(total > _CANCELLED, total, np.nan)


def _verdicts(caller: str, named: Mapping[str, Vector], clusters: Sequence[Hashable] | None = None) -> np.ndarray:
    """Verdicts as float64 [names, pairs], each from 0 to 1 or NaN; errors name `caller`."""
    lengths = {name: len(values) for name, values in named.items()}
    if clusters is not None:
        lengths['clusters'] = len(clusters)
    if len(set(lengths.values())) > 1:
        raise ValueError(f'{caller}: expected the same pairs in all, found {lengths}')
    data = np.stack([np.asarray(values, np.float64) for values in named.values()])
    for values in data:
        checked(caller, np.where(np.isnan(values), 0.5, values))
    return data


def _complete(caller: str, values: np.ndarray) -> np.ndarray:
    """bool [pairs], True where no value of [names, pairs] is missing."""
    there = ~np.isnan(values).any(axis=0)
    if not there.any():
        raise ValueError(f'{caller}: expected a pair with all verdicts, found none among {len(there)}')
    return there
