"""What share of the utility that can be had an assistant recovers, where an oracle trains against people themselves."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from simrl.evaluation.statistics import check_level, resampled_means, t_interval


@dataclasses.dataclass(frozen=True)
class RecoveredShare:
    """(U_arm - U_initial) / (U_oracle - U_initial), U being mean satisfaction; it may exceed 1.

    Attributes:
        mean: the share, from the means over all people; None where it is undefined.
        low, high: the bounds of its interval over people: of these checkpoints only; None for the oracle itself, whose
            share is 1 by definition.
        reason: why it is undefined.
        num_people: what it rests on.
        level: the nominal coverage of the interval.
    """

    mean: float | None
    low: float | None
    high: float | None
    reason: str | None
    num_people: int
    level: float


def recovered_shares(
    arms: Mapping[str, np.ndarray],
    initial: np.ndarray,
    oracle: np.ndarray,
    people: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, RecoveredShare]:
    """The recovered share of each arm, with a percentile interval from resampling people (Efron & Tibshirani 1993).

    A draw of people is the same for all, so what makes a person hard to please cancels. Seeds are averaged first: the
    interval does not hold what other training runs would change. The share is undefined where an interval of the
    oracle's gain, over people or (from two seeds on) over training seeds, is not above 0: a ratio to a gain that may
    be none says nothing.

    Args:
        arms: satisfactions by arm, [people] of one run or [seeds, people].
        initial: [people].
        oracle: as an arm.
        people: [people], their names.
        level: nominal coverage, in (0, 1).
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no people, numbers of people that differ, or a satisfaction that is not finite.
    """
    check_level('recovered_shares', level)
    if not len(people):
        raise ValueError('recovered_shares: expected at least one person, found none')
    base, best = (_per_person(name, x, len(people)) for name, x in (('initial', initial), ('oracle', oracle)))
    gains = np.stack([best - base, *(_per_person(arm, scores, len(people)) - base for arm, scores in arms.items())])
    oracle_draws, *arm_draws = resampled_means(gains, people, resamples=resamples, seed=seed)
    bounds = [(1 - level) / 2, (1 + level) / 2]
    over_people = np.quantile(oracle_draws, bounds).tolist()
    over_seeds = t_interval((np.atleast_2d(oracle) - base).mean(1), level=level)
    found = {'people': over_people, 'training seeds': (over_seeds.low, over_seeds.high)}
    for unit, (lowest, highest) in found.items():
        if lowest is not None and lowest <= 0:
            reason = (
                f"the oracle's gain {gains[0].mean():+.3f} [{lowest:+.3f}, {highest:+.3f}] over {unit} is not above 0"
            )
            return dict.fromkeys(arms, RecoveredShare(None, None, None, reason, len(people), level))
    defined = oracle_draws > 0  # all but fewer draws than the interval leaves out below
    shares = {}
    for arm, gain, draws in zip(arms, gains[1:], arm_draws, strict=True):
        low, high = np.quantile(draws[defined] / oracle_draws[defined], bounds)
        share = float(gain.mean() / gains[0].mean())
        shares[arm] = RecoveredShare(share, float(low), float(high), None, len(people), level)
    return shares


def _per_person(name: str, scores: np.ndarray, num_people: int) -> np.ndarray:
    """[people] or [seeds, people] -> [people], the mean over seeds."""
    means = np.atleast_2d(np.asarray(scores, np.float64)).mean(0)
    if means.shape != (num_people,):
        raise ValueError(f'recovered_shares: expected {num_people} people of {name!r}, found {means.shape[0]}')
    if not np.isfinite(means).all():
        raise ValueError(f'recovered_shares: expected finite satisfactions of {name!r}, found {means.sum()}')
    return means
