"""Votes for one of two assistants -> win rates with intervals.

A preference is a number from 0 to 1: 1 for the first assistant, 0 for the second, 1/2 for a tie. NaN is a failure, a
vote that could not be collected.

1. `align`: rows of several sources by id -> arrays in one order.
2. `independent_votes`, `trinomial`, `standard_error`: each vote taken for that of a participant of its own.
3. `cluster_robust`: the mean over votes, with an interval that allows for votes of one participant being alike.
4. `win_rates`: the primary estimand, the mean over participants, beside both, and with failures lost and won.
5. `majorities`: a sign test of the assistant that each participant prefers.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import scipy.special

from simrl.evaluation.statistics import (
    Estimate,
    Vector,
    check_level,
    cluster_bootstraps,
    cluster_sums,
    cluster_t_interval,
    differ,
)

_EVEN = 1e-9  # preferences nearer to 1/2 are 1/2 but for rounding


@dataclasses.dataclass(frozen=True)
class WinRate:
    """The share of preferences for the first assistant, ties counted one half, by three intervals.

    Attributes:
        by_participant: primary: the mean over participants of each one's mean preference, by cluster bootstrap, or by
            Student's t of fewer than 6 participants.
        by_vote: the mean over votes, in which participants weigh as much as they vote; cluster-robust t-interval.
        naive: the same mean, votes taken as independent. Too narrow where participants vote more than once.
    """

    by_participant: Estimate
    by_vote: Estimate
    naive: Estimate


@dataclasses.dataclass(frozen=True)
class WinRates:
    """A win rate and its bounds over the votes that could not be collected.

    Attributes:
        observed: over the votes that were collected.
        all_lost, all_won: with every failure counted as lost, or as won, by the first assistant.
        failures: number of votes that could not be collected.
    """

    observed: WinRate
    all_lost: WinRate
    all_won: WinRate
    failures: int


@dataclasses.dataclass(frozen=True)
class Majorities:
    """Participants by the assistant that they prefer on the mean.

    Attributes:
        first, second: number of participants who prefer the first, or the second assistant.
        neither: number of participants whose mean preference is 1/2.
        p_value: of the two-sided sign test that both are as likely; None where no participant prefers either.
    """

    first: int
    second: int
    neither: int
    p_value: float | None


def align(sources: Mapping[str, Iterable[tuple[Hashable, float]]]) -> tuple[tuple[Hashable, ...], np.ndarray]:
    """The values of several sources in the order of the first one's ids.

    Args:
        sources: by name, rows of (id, value).

    Returns:
        The ids, and the values, float64 [sources, ids].

    Raises:
        ValueError: no source, an id that is twice in a source, or sources whose ids differ.
    """
    if not sources:
        raise ValueError('align: expected at least one source, found none')
    tables: dict[str, dict[Hashable, float]] = {}
    for name, rows in sources.items():
        table = tables[name] = {}
        for key, value in rows:
            if key in table:
                raise ValueError(f'align: expected each id once in {name!r}, found {key!r} twice')
            table[key] = value
    first, *_ = tables
    for name in tables:
        for more, fewer in ((first, name), (name, first)):
            if alone := [key for key in tables[more] if key not in tables[fewer]]:
                raise ValueError(
                    f'align: expected the ids of {first!r} in {name!r}, found {alone[0]!r} in {more!r} alone '
                    f'(one of {len(alone)})'
                )
    ids = tuple(tables[first])
    return ids, np.array([[table[key] for key in ids] for table in tables.values()], np.float64)


def trinomial(wins: int, ties: int, losses: int, *, level: float = 0.95) -> Estimate:
    """The win rate of counts, with the interval of `independent_votes`.

    Raises:
        ValueError: no votes, or a negative count.
    """
    if min(wins, ties, losses) < 0:
        raise ValueError(f'trinomial: expected counts of at least 0, found {(wins, ties, losses)}')
    return independent_votes(np.repeat([1.0, 0.5, 0.0], [wins, ties, losses]), level=level)


def independent_votes(preferences: Vector, *, level: float = 0.95) -> Estimate:
    """The mean preference with the interval of independent votes, p +- z sqrt(var / n) (Wald 1943).

    Of w wins and t ties among n votes p = (w + t/2) / n and var = (w + t/4) / n - p^2: the variance of a trinomial
    variable with values 1, 1/2 and 0 (as in arXiv:2605.09808, appendix G). Of graded preferences var is their mean
    square less p^2. As all Wald intervals it may pass 0 or 1. There is none where all votes are alike.

    Args:
        preferences: [votes], from 0 to 1.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: no votes, or a preference that is not from 0 to 1.
    """
    data = checked('independent_votes', preferences)
    check_level('independent_votes', level)
    mean = float(data.mean())
    if not differ(data):
        return Estimate(mean, None, None, len(data), len(data), level)
    half = float(scipy.special.ndtri((1 + level) / 2)) * standard_error(data)
    return Estimate(mean, mean - half, mean + half, len(data), len(data), level)


def standard_error(preferences: Vector) -> float:
    """The standard error of the mean of independent votes, sqrt(var / n) with the var of `independent_votes`.

    Raises:
        ValueError: no votes, or a preference that is not from 0 to 1.
    """
    data = checked('standard_error', preferences)
    return math.sqrt(float(data.var()) / len(data))


def cluster_robust(preferences: Vector, participants: Sequence[Hashable], *, level: float = 0.95) -> Estimate:
    """The mean over votes with the interval of its cluster-robust standard error (`statistics.cluster_t_interval`).

    There is none with one participant, or where no participant differs from the mean.

    Args:
        preferences: [votes], from 0 to 1.
        participants: [votes], who voted.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: no votes, lengths that differ, or a preference that is not from 0 to 1.
    """
    data = checked('cluster_robust', preferences, participants)
    check_level('cluster_robust', level)
    totals, counts = (sums[:, 0] for sums in cluster_sums(data[None], participants))
    low, high = cluster_t_interval(totals, counts, level=level)
    return Estimate(float(data.mean()), low, high, len(data), len(totals), level)


def win_rates(
    preferences: Vector,
    participants: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> WinRates:
    """The win rate of the first assistant over participants, and its bounds over failures.

    Primary is the mean over participants of each one's mean preference. It weighs all participants alike, however often
    they vote. Its interval is that of `statistics.cluster_bootstraps`: percentiles from resampling participants, with
    wider tails for fewer, and Student's t of fewer than 6, cut at 0 and 1. A participant whose votes all failed is in
    the bounds only.

    Args:
        preferences: [votes], from 0 to 1; NaN for a failure.
        participants: [votes], who voted.
        level: nominal coverage, in (0, 1).
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no vote that did not fail, lengths that differ, or a preference that is not from 0 to 1.
    """
    data = np.asarray(preferences, np.float64)
    failed = np.isnan(data)
    if data.size and failed.all():
        raise ValueError(f'win_rates: expected a vote that did not fail, found {len(data)} failures')
    checked('win_rates', np.where(failed, 0.5, data), participants)

    def win_rate(values: np.ndarray, voters: Sequence[Hashable]) -> WinRate:
        totals, counts = (sums[:, 0] for sums in cluster_sums(values[None], voters))
        (primary,) = cluster_bootstraps(
            [totals / counts], range(len(totals)), level=level, resamples=resamples, seed=seed
        )
        low, high = (None if x is None else min(max(x, 0.0), 1.0) for x in (primary.low, primary.high))
        return WinRate(
            by_participant=dataclasses.replace(primary, low=low, high=high, num_observations=len(values)),
            by_vote=cluster_robust(values, voters, level=level),
            naive=independent_votes(values, level=level),
        )

    there = [who for who, lost in zip(participants, failed, strict=True) if not lost]
    observed = win_rate(data[~failed], there)
    if not failed.any():
        return WinRates(observed, observed, observed, 0)
    lost, won = (win_rate(np.where(failed, value, data), participants) for value in (0.0, 1.0))
    return WinRates(observed, lost, won, int(failed.sum()))


def majorities(preferences: Vector, participants: Sequence[Hashable]) -> Majorities:
    """The assistant that each participant prefers, and the exact sign test over those who prefer one (Conover 1999).

    It needs no more than independent participants, and ignores how strongly each prefers.

    Args:
        preferences: [votes], from 0 to 1.
        participants: [votes], who voted.

    Raises:
        ValueError: no votes, lengths that differ, or a preference that is not from 0 to 1.
    """
    data = checked('majorities', preferences, participants)
    totals, counts = (sums[:, 0] for sums in cluster_sums(data[None] - 0.5, participants))
    preferred = winners(0.5 + totals / counts)
    first, second = int((preferred > 0).sum()), int((preferred < 0).sum())
    tail = float(scipy.special.bdtr(min(first, second), first + second, 0.5)) if first + second else None
    return Majorities(first, second, len(preferred) - first - second, None if tail is None else min(1.0, 2 * tail))


def winners(preferences: Vector) -> np.ndarray:
    """1 where a preference is for the first assistant, -1 for the second, 0 at 1/2 but for rounding; NaN of NaN."""
    margin = np.asarray(preferences, np.float64) - 0.5
    return np.where(np.abs(margin) < _EVEN, 0.0, np.sign(margin))


def checked(caller: str, preferences: Vector, participants: Sequence[Hashable] | None = None) -> np.ndarray:
    """Preferences from 0 to 1 as float64 [votes], one participant each; errors name `caller`."""
    data = np.asarray(preferences, np.float64)
    if not data.size:
        raise ValueError(f'{caller}: expected at least one vote, found none')
    if participants is not None and len(participants) != len(data):
        raise ValueError(f'{caller}: expected a participant of each vote, found {len(participants)} of {len(data)}')
    if not ((data >= 0) & (data <= 1)).all():
        raise ValueError(f'{caller}: expected preferences from 0 to 1, found {data[~((data >= 0) & (data <= 1))][0]:g}')
    return data
