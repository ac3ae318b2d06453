"""Votes between pairs of several models -> strengths on one scale, by Davidson's Bradley-Terry model with ties.

1. `davidson`: strengths, their differences and the win rates that they imply, with intervals over participants.
2. `_fit`: maximum likelihood by Newton's method, of all bootstrap draws at once.
3. `_separation`: the reason why votes have no finite fit, if so.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from simrl.evaluation.preferences import checked
from simrl.evaluation.statistics import Estimate, check_level, cluster_numbers, percentile_interval, resampled_means

_DRAWS_AT_ONCE = 512  # bootstrap draws in memory at a time
_STEPS = 100  # of Newton's method; fits need about six


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Models by strength.

    Attributes:
        models: the strongest first.
        strengths: [models], natural log, with mean 0: of two models whose strengths differ by d, the stronger wins
            exp(d) times as often as it loses.
        differences: of each two models, the stronger first: the first one's strength less the second's.
        win_rates: [models][models], the probability that the row's model is preferred, ties one half; 1/2 to itself.
        ties: Davidson's nu: between equal models a tie is nu times as likely as a win of the first.
        draws_without_fit: share of bootstrap draws whose votes have no finite fit: `Estimate.undefined_draws`.
    """

    models: tuple[str, ...]
    strengths: tuple[Estimate, ...]
    differences: dict[tuple[str, str], Estimate]
    win_rates: tuple[tuple[float, ...], ...]
    ties: float
    draws_without_fit: float


def davidson(
    first: Sequence[str],
    second: Sequence[str],
    preferences: Sequence[float],
    participants: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Ranking:
    """Strengths of models by maximum likelihood under Davidson's (1970) model of paired comparisons with ties.

    Of strengths p and q, the first model wins with probability p / (p + q + nu sqrt(p q)), the second with q over the
    same, and they tie with nu sqrt(p q) over the same. Without ties nu is 0: the model of Bradley & Terry (1952).
    Percentile intervals resample participants (`statistics.percentile_interval`); of fewer than 6 there are none.

    Args:
        first, second: [votes], the models compared.
        preferences: [votes], 1 for the first, 0 for the second, 1/2 for a tie.
        participants: [votes], who voted.
        level: nominal coverage, in (0, 1).
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no votes, lengths that differ, a model compared with itself, a preference that is not 1, 1/2 or 0;
            votes without a finite fit: models that no chain of votes connects, or one that never loses or never wins.
    """
    data = checked('davidson', preferences, participants)
    check_level('davidson', level)
    if not len(first) == len(second) == len(data):
        raise ValueError(
            f'davidson: expected two models of each vote, found {len(first)} and {len(second)} of {len(data)}'
        )
    if not np.isin(data, (0, 0.5, 1)).all():
        raise ValueError(
            f'davidson: expected preferences of 1, 1/2 or 0, found {data[~np.isin(data, (0, 0.5, 1))][0]:g}'
        )
    if itself := [one for one, other in zip(first, second, strict=True) if one == other]:
        raise ValueError(f'davidson: expected two different models in each vote, found {itself[0]!r} against itself')
    names = sorted({*first, *second})
    index = {name: number for number, name in enumerate(names)}
    pairs = np.array(list(itertools.combinations(range(len(names)), 2)))
    number_of = np.zeros((len(names), len(names)), np.int64)
    number_of[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    one, other = (np.array([index[name] for name in side]) for side in (first, second))
    swapped = one > other
    pair = number_of[np.minimum(one, other), np.maximum(one, other)]
    outcome = np.where(data == 0.5, 1, np.where((data == 1) ^ swapped, 0, 2))  # a win of the pair's first model is 0
    member = cluster_numbers(participants)
    people = int(member.max()) + 1
    votes = np.zeros((3 * len(pairs), people))
    np.add.at(votes, (pair * 3 + outcome, member), 1.0)
    shares = votes.mean(1).reshape(1, -1, 3)
    if reason := _separation(shares[0], pairs, names):
        raise ValueError(f'davidson: expected votes with a finite fit, found {reason}')
    (found,), (nu,) = _fit(shares, pairs)
    draws = resampled_means(votes, range(people), resamples=resamples, seed=seed).T.reshape(resamples, -1, 3)
    finite = np.concatenate([_is_finite(part, pairs) for part in _parts(draws)])
    drawn = np.full((resamples, len(names)), np.nan)
    if finite.any():
        drawn[finite] = np.concatenate([_fit(part, pairs)[0] for part in _parts(draws[finite])])
    without = float(1 - finite.mean())

    def estimate(value: float, values: np.ndarray, number: int) -> Estimate:
        low, high = percentile_interval(values, people, level=level)
        return Estimate(float(value), low, high, number, people, level, without)

    order = sorted(range(len(names)), key=lambda model: (-found[model], names[model]))
    counts = {model: int(((one == model) | (other == model)).sum()) for model in order}
    gap = found[:, None] - found[None]
    odds, tie = np.exp(gap / 2), nu
    rates = (odds + tie / 2) / (odds + 1 / odds + tie)
    return Ranking(
        models=tuple(names[model] for model in order),
        strengths=tuple(estimate(found[model], drawn[:, model], counts[model]) for model in order),
        differences={
            (names[a], names[b]): estimate(found[a] - found[b], drawn[:, a] - drawn[:, b], len(data))
            for a, b in itertools.combinations(order, 2)
        },
        win_rates=tuple(tuple(float(rates[a, b]) for b in order) for a in order),
        ties=float(nu),
        draws_without_fit=without,
    )


def _parts(draws: np.ndarray) -> list[np.ndarray]:
    return [draws[start : start + _DRAWS_AT_ONCE] for start in range(0, len(draws), _DRAWS_AT_ONCE)]


def _fit(shares: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log strengths [R, models] with mean 0 and nu [R], by Newton's method.

    With d half the difference of log strengths, a win, a tie and a loss have log-odds d, log nu and -d: the
    log-likelihood is that of an exponential family, concave in all parameters.

    Args:
        shares: [R, pairs, 3], wins of the pair's first model, ties and losses, in any unit; with a finite fit.
        pairs: [pairs, 2], models.
    """
    models, draws = int(pairs.max()) + 1, len(shares)
    halves = np.zeros((len(pairs), models))  # of d by log strength
    halves[np.arange(len(pairs)), pairs[:, 0]], halves[np.arange(len(pairs)), pairs[:, 1]] = 0.5, -0.5
    total, tied = shares.sum(2), shares[:, :, 1].sum(1)
    has_ties = tied > 0
    value = np.zeros((draws, models + 1))  # the last is log nu
    share = tied / total.sum(1)
    value[:, -1] = np.where(has_ties, np.log(np.where(has_ties, 2 * share / (1 - share), 1.0)), -np.inf)
    for _ in range(_STEPS):
        d = value[:, :-1] @ halves.T
        largest = np.maximum(np.abs(d), value[:, -1:])
        win, tie, loss = (np.exp(x - largest) for x in (d, value[:, -1:], -d))
        every = win + tie + loss
        win, tie, loss = win / every, tie / every, loss / every
        gradient = np.empty_like(value)
        gradient[:, :-1] = (shares[:, :, 0] - shares[:, :, 2] - total * (win - loss)) @ halves
        gradient[:, -1] = np.where(has_ties, tied - (total * tie).sum(1), 0.0)
        information = np.empty((draws, models + 1, models + 1))
        spread = total * (win + loss - np.square(win - loss))
        information[:, :-1, :-1] = np.einsum('rp,pi,pj->rij', spread, halves, halves, optimize=True)
        information[:, :-1, -1] = information[:, -1, :-1] = -(total * (win - loss) * tie) @ halves
        information[:, -1, -1] = np.where(has_ties, (total * tie * (1 - tie)).sum(1), 1.0)
        information[:, :-1, :-1] += total.sum(1)[:, None, None] / models**2  # the direction of the mean, which is free
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        size = np.abs(step).max(1, keepdims=True)
        step *= np.minimum(1.0, 2.0 / np.maximum(size, 1e-300))  # damped far from the maximum
        value += np.where(np.isfinite(value), step, 0.0)
        if size.max() < 1e-10:
            strengths = value[:, :-1] - value[:, :-1].mean(1, keepdims=True)
            return strengths, np.exp(value[:, -1])
    raise ValueError(f'davidson: expected a fit within {_STEPS} steps, found a last step of {size.max():g}')


def _is_finite(shares: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool [R], True where the likelihood has a finite maximum (as Ford 1957 for votes without ties).

    It has none if strengths and log nu can grow without bound while no vote becomes less likely. With log nu fixed that
    is so unless a chain of 'wins against or ties with' leads from each model to each other. With log nu rising by 1 a
    winner must rise by at least 2 over the loser, and models that tie may part by at most 2: a cycle of shortest paths
    of negative length rules that out.
    """
    wins, ties = _relations(shares, pairs)
    models = wins.shape[-1]
    distance = np.where(wins, -2.0, np.where(ties, 2.0, np.inf))
    for middle in range(models):
        distance = np.minimum(distance, distance[:, :, middle, None] + distance[:, None, middle])
        distance = np.maximum(distance, -2.0 * models)  # shorter than any path without a cycle
    can_rise = ties.any((1, 2)) & (np.diagonal(distance, axis1=1, axis2=2) >= 0).all(1)
    return np.asarray(_closure(wins | ties).all((1, 2)) & ~can_rise)


def _separation(shares: np.ndarray, pairs: np.ndarray, names: Sequence[str]) -> str | None:
    """The reason why the votes [pairs, 3] have no finite fit; None if they have one."""
    if _is_finite(shares[None], pairs)[0]:
        return None
    (wins,), (ties,) = _relations(shares[None], pairs)
    if not wins.any():
        return 'ties only'
    linked = _closure(wins | wins.T | ties)
    if not linked.all():
        groups = sorted({tuple(name for name, there in zip(names, row, strict=True) if there) for row in linked})
        return f'groups of models that were never compared: {groups}'
    for won, verb in ((wins, 'wins'), (wins.T, 'loses')):
        if not won.any(axis=1).all():
            return f'{names[int(won.any(axis=1).argmin())]!r}, which never {verb}'
    # All win, so there is a cycle of wins: log nu cannot rise, and what is left is a group without a chain out of it.
    group = next(row for row in _closure(wins | ties) if not row.all())
    return f'models that never win or tie against the others: {[names[i] for i in np.flatnonzero(group).tolist()]}'


def _relations(shares: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R, pairs, 3] -> bool [R, models, models]: the row's model won a vote against the column's; they tied."""
    models = int(pairs.max()) + 1
    wins, ties = np.zeros((2, len(shares), models, models), np.bool_)
    a, b = pairs.T
    wins[:, a, b], wins[:, b, a] = shares[:, :, 0] > 0, shares[:, :, 2] > 0
    ties[:, a, b] = ties[:, b, a] = shares[:, :, 1] > 0
    return wins, ties


def _closure(relation: np.ndarray) -> np.ndarray:
    """bool [..., K, K], True where a chain of the relation leads from the row to the column; each leads to itself."""
    reached = relation | np.eye(relation.shape[-1], dtype=bool)
    for middle in range(relation.shape[-1]):
        reached |= reached[..., :, middle, None] & reached[..., None, middle, :]
    return reached
