"""Regressions of votes: the preference for an assistant apart from the position in which it is shown.

Two views of the same votes. They estimate different numbers on the log-odds scale, and one win rate: that of the first
assistant with a new participant, ties one half, the mean over both positions with equal weight. Where votes have no
positions it is the win rate in whichever positions there were.

1. `cumulative_logit`: the odds within one participant, by maximum likelihood with an intercept of each participant.
2. `gee`: the odds over all participants, with an interval that does not depend on how votes of one participant vary.

Intervals are Student's, with one degree of freedom less than there are participants (Cameron & Miller 2015, s. VI.D):
participants are the independent units, and standard errors of few are uncertain. That of a win rate is taken in
log-odds, so that it stays between 0 and 1.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import scipy.optimize
import scipy.special
import statsmodels.genmod.api as genmod

from simrl.evaluation.preferences import checked
from simrl.evaluation.statistics import Vector, check_level, cluster_numbers, t_quantile

# Standard normal points and the logarithms of their weights. Equal steps converge faster than Gauss-Hermite's points
# where the many votes of a participant make the integrand narrow.
_NODES = np.linspace(-6.25, 6.25, 101)
_LARGEST_SD = 8.0  # of participants: beyond, the integrand is narrower than the steps
_LARGEST_ERROR = 100.0  # in log-odds: beyond, the votes say nothing
_NO_ERROR = 1e-9  # in log-odds: below, it is 0 but for rounding
_LARGEST_CORRELATION = 1 - 1e-6  # of votes of one participant; 1 where each always votes alike
_LOG_WEIGHTS = -np.square(_NODES) / 2 - math.log(np.exp(-np.square(_NODES) / 2).sum())


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """An estimated parameter.

    Attributes:
        value: the estimate.
        standard_error: in the same unit.
        low, high: the bounds of its interval; None where participants do not differ in it, as nothing is then known of
            others: the standard error is 0.
    """

    value: float
    standard_error: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class CumulativeLogit:
    """The fit of `cumulative_logit`, on the log-odds scale but for `win_rate`.

    Attributes:
        preference: for the first assistant, positions aside; 0 without a preference.
        position: for the assistant in the first position over the one in the second; None without positions.
        tie: half the width of the band of ties; 0 without ties.
        participant_sd: the standard deviation of participants' preferences.
        win_rate: of the first assistant with a new participant, ties one half, the mean over both positions.
        log_likelihood: natural, of all votes.
        num_votes, num_participants: sizes of the sample.
        level: the nominal coverage of the intervals.
    """

    preference: Coefficient
    position: Coefficient | None
    tie: float
    participant_sd: float
    win_rate: Coefficient
    log_likelihood: float
    num_votes: int
    num_participants: int
    level: float


@dataclasses.dataclass(frozen=True)
class Gee:
    """The fit of `gee`, on the log-odds scale but for `win_rate` and `correlation`.

    Attributes:
        preference: for the first assistant, positions aside.
        position: for the assistant in the first position over the one in the second; None without positions.
        correlation: between two votes of one participant, as the working model estimates it, at least 0.
        win_rate: of the first assistant, ties one half, the mean over both positions.
        num_votes, num_participants: sizes of the sample.
        level: the nominal coverage of the intervals.
    """

    preference: Coefficient
    position: Coefficient | None
    correlation: float
    win_rate: Coefficient
    num_votes: int
    num_participants: int
    level: float


def cumulative_logit(
    preferences: Vector,
    participants: Sequence[Hashable],
    a_first: Sequence[bool] | None = None,
    *,
    level: float = 0.95,
) -> CumulativeLogit:
    """A cumulative-logit model with an intercept of each participant (Agresti 2010, s. 10.1; McCullagh 1980).

    Participant g votes for the first assistant where b + c x + u_g + e > t, for the second where it is below -t, and
    ties in between: x is 1/2 where the first assistant is in the first position, else -1/2; u_g is normal with mean 0;
    e is logistic. The thresholds mirror each other: exchanging the assistants changes signs only. The likelihood is
    integrated over u_g by the trapezoidal rule at 101 points. Standard errors are from the observed information.

    Args:
        preferences: [votes], each 1, 1/2 or 0.
        participants: [votes], who voted.
        a_first: [votes], True where the first assistant was in the first position (on the left); None: not known, and
            no position in the model.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: a preference that is not 1, 1/2 or 0; lengths that differ; one participant, or no participant with
            two votes; never a vote for one of the assistants; one position only, or a position in which all votes are
            alike; participants who each always vote alike; a likelihood whose maximum is not found.
    """
    data, member, x = _design('cumulative_logit', preferences, participants, a_first, level)
    if not np.isin(data, (0, 0.5, 1)).all():
        found = data[~np.isin(data, (0, 0.5, 1))][0]
        raise ValueError(f'cumulative_logit: expected preferences of 1, 1/2 or 0, found {found:g}')
    if max(np.bincount(member)) < 2:
        raise ValueError('cumulative_logit: expected a participant with at least two votes, found none')
    ties = float((data == 0.5).mean())
    width = [math.log(2 * math.atanh(ties))] if ties else []
    start = np.array([0.0, *([] if x is None else [0.0]), *width, 0.5])
    objective = _negative_log_likelihood(data, member, x)
    try:
        found = scipy.optimize.minimize(
            objective, start, jac=True, method='BFGS', options={'gtol': 1e-6 * len(data) ** 0.5}
        )
    except OverflowError:  # of exp(parameter)
        raise ValueError(
            'cumulative_logit: expected a likelihood with a maximum, found one that rises without bound'
        ) from None
    information = _jacobian(lambda theta: objective(theta)[1], found.x)
    covariance = np.linalg.pinv((information + information.T) / 2)
    if not (found.success and np.isfinite(covariance).all() and (np.diagonal(covariance) > 0).all()):
        raise ValueError(f'cumulative_logit: expected a likelihood with a maximum, found none: {found.message}')
    preference, position, tie, sd = _parameters(found.x, x is not None, bool(ties))
    if abs(sd) > _LARGEST_SD:
        raise ValueError(
            'cumulative_logit: expected participants whose own votes vary, found a standard deviation between them of '
            f'{abs(sd):.0f} in log-odds, above {_LARGEST_SD:g}: each always votes alike'
        )

    def win_rate(theta: np.ndarray) -> np.ndarray:
        preference, position, tie, sd = _parameters(theta, x is not None, bool(ties))
        at = preference + sd * _NODES + position * np.array([[0.5], [-0.5]])
        chosen = (scipy.special.expit(at - tie) + scipy.special.expit(at + tie)) / 2
        return np.atleast_1d((chosen @ np.exp(_LOG_WEIGHTS)).mean())

    slope = _jacobian(win_rate, found.x)[0]
    errors = np.sqrt(np.diagonal(covariance))
    number = int(member.max()) + 1
    bound = t_quantile(number - 1, level)
    return CumulativeLogit(
        preference=_coefficient(preference, errors[0], bound),
        position=None if x is None else _coefficient(position, errors[1], bound),
        tie=tie,
        participant_sd=abs(sd),
        win_rate=_rate(float(win_rate(found.x)[0]), math.sqrt(slope @ covariance @ slope), bound),
        log_likelihood=-float(found.fun),
        num_votes=len(data),
        num_participants=number,
        level=level,
    )


class _Alike(genmod.cov_struct.Exchangeable):
    """One correlation between votes of one participant, from 0 to almost 1, where the covariance has an inverse."""

    dep_params: float

    def update(self, params: np.ndarray) -> None:
        super().update(params)
        estimate = float(self.dep_params)  # over 0 where there are as many pairs of votes as coefficients: of nothing
        self.dep_params = min(max(estimate, 0.0), _LARGEST_CORRELATION) if math.isfinite(estimate) else 0.0


def gee(
    preferences: Vector,
    participants: Sequence[Hashable],
    a_first: Sequence[bool] | None = None,
    *,
    level: float = 0.95,
) -> Gee:
    """Generalised estimating equations: logit of the mean preference is b + c x (Liang & Zeger 1986).

    Votes of one participant have one correlation in the working model, 0 where the estimate is below: few participants
    may give one that no covariance has, and steps that diverge. It is 0 also where there are too few votes for one.
    Standard errors are robust to its being wrong, and corrected for few participants (Mancl & DeRouen 2001). x is 1/2
    or -1/2, as in `cumulative_logit`; the win rate is the mean of logistic(b + c / 2) and logistic(b - c / 2).
    Participants who vote more often weigh more, but less than their votes: where these prefer another assistant than
    the rest, `preferences.win_rates` is of all alike.

    Args:
        preferences: [votes], from 0 to 1.
        participants, a_first, level: as for `cumulative_logit`.

    Raises:
        ValueError: a preference that is not from 0 to 1; lengths that differ; one participant; never a vote for one of
            the assistants; one position only, or a position in which all votes are alike; as many coefficients as
            participants; no convergence, or a coefficient or standard error above 100 in log-odds.
    """
    data, member, x = _design('gee', preferences, participants, a_first, level)
    columns = np.ones((len(data), 1)) if x is None else np.column_stack([np.ones(len(data)), x])
    if (number := int(member.max()) + 1) <= columns.shape[1]:  # their correction has no finite value
        raise ValueError(
            f'gee: expected more than {columns.shape[1]} participants, as many as coefficients, found {number}'
        )
    order = np.argsort(member, kind='stable')
    structure = _Alike()
    model = genmod.GEE(
        data[order], columns[order], member[order], family=genmod.families.Binomial(), cov_struct=structure
    )
    try:
        # Of steps that diverge, which are refused below, and of `_Alike`.
        with np.errstate(over='ignore', divide='ignore', invalid='ignore'), warnings.catch_warnings(action='ignore'):
            fit = model.fit(cov_type='bias_reduced')
    except np.linalg.LinAlgError as error:
        raise ValueError(f'gee: expected estimating equations with a solution, found: {error}') from error
    params, covariance = np.asarray(fit.params), np.asarray(fit.cov_params())
    # A variance of 0, of a position that decides no vote or of participants who are alike, may be below by rounding.
    errors = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    largest = float(np.abs([*params, *errors]).max())  # NaN of a NaN
    if not (fit.converged and largest < _LARGEST_ERROR):
        reason = f'a coefficient or standard error of {largest:g} in log-odds' if fit.converged else 'no convergence'
        raise ValueError(f'gee: expected estimating equations with a solution, found {reason}')
    places = np.unique(columns, axis=0)  # positions, as all that rows differ in
    rates = scipy.special.expit(places @ params)
    slope = (rates * (1 - rates)) @ places / len(places)
    bound = t_quantile(number - 1, level)
    return Gee(
        preference=_coefficient(params[0], errors[0], bound),
        position=None if x is None else _coefficient(params[1], errors[1], bound),
        correlation=float(structure.dep_params),
        win_rate=_rate(float(rates.mean()), math.sqrt(max(slope @ covariance @ slope, 0.0)), bound),
        num_votes=len(data),
        num_participants=number,
        level=level,
    )


def _design(
    caller: str, preferences: Vector, participants: Sequence[Hashable], a_first: Sequence[bool] | None, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Votes, the number of each one's participant, and positions as 1/2 and -1/2, all [votes]; errors name `caller`."""
    data = checked(caller, preferences, participants)
    check_level(caller, level)
    member = cluster_numbers(participants)
    if (number := int(member.max()) + 1) < 2:
        raise ValueError(f'{caller}: expected at least two participants, found {number}')
    if data.max() <= 0.5 or data.min() >= 0.5:
        raise ValueError(f'{caller}: expected votes for both assistants, found {data.min():g} to {data.max():g}')
    if a_first is None:
        return data, member, None
    if len(a_first) != len(data):
        raise ValueError(f'{caller}: expected a position of each vote, found {len(a_first)} of {len(data)}')
    x = np.asarray(a_first, np.bool_) - 0.5
    if x.min() == x.max():
        raise ValueError(f'{caller}: expected votes with each assistant first, found one position only')
    for side, words in ((x > 0, 'first'), (x < 0, 'second')):
        if data[side].max() == data[side].min():
            raise ValueError(
                f'{caller}: expected votes that differ where the first assistant is in the {words} position, '
                f'found {data[side][0]:g} only'
            )
    return data, member, x


def _parameters(theta: np.ndarray, with_position: bool, with_ties: bool) -> tuple[float, float, float, float]:
    """The free parameters as preference, position, half the width of ties, and standard deviation of participants."""
    values = [float(value) for value in theta]
    position = values[1] if with_position else 0.0
    return values[0], position, math.exp(values[-2]) if with_ties else 0.0, values[-1]


def _negative_log_likelihood(
    data: np.ndarray, member: np.ndarray, x: np.ndarray | None
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """A function of the parameters -> (negative log-likelihood of all votes, its gradient).

    Votes of one participant, position and outcome are alike: there are at most six kinds, and each is counted.
    """
    places = np.zeros(1) if x is None else np.array([-0.5, 0.5])
    kind = (np.zeros(len(data), np.int64) if x is None else (x > 0) * 3) + (2 * data).astype(np.int64)
    counts = np.zeros((int(member.max()) + 1, 3 * len(places)))  # by position: losses, ties, wins
    np.add.at(counts, (member, kind), 1.0)
    has_ties = bool((data == 0.5).any())

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        preference, position, tie, sd = _parameters(theta, x is not None, has_ties)
        at = (preference + position * places)[:, None] + sd * _NODES
        not_above, not_below = scipy.special.expit(tie - at), scipy.special.expit(tie + at)
        lost, won = scipy.special.log_expit(-at - tie), scipy.special.log_expit(at - tie)
        tied, tied_by_width = np.zeros_like(at), np.zeros_like(at)
        if has_ties:
            # A tie is neither: expit(t - y) - expit(-t - y) = expit(t - y) expit(t + y) (1 - exp(-2 t)).
            width = math.log(-math.expm1(-2 * tie))
            tied = scipy.special.log_expit(tie - at) + scipy.special.log_expit(tie + at) + width
            tied_by_width = 2 - not_above - not_below + 2 / math.expm1(2 * tie)

        def kinds(*outcomes: np.ndarray) -> np.ndarray:
            return np.stack(outcomes, axis=1).reshape(-1, len(_NODES))

        joint = counts @ kinds(lost, tied, won) + _LOG_WEIGHTS
        evidence = scipy.special.logsumexp(joint, axis=1)
        expected = counts.T @ np.exp(joint - evidence[:, None])  # votes of each kind at each point
        slope = expected * kinds(-not_below, not_above - not_below, not_above)
        by_place = slope.sum(1).reshape(-1, 3).sum(1)
        gradient = [slope.sum()]
        if x is not None:
            gradient.append(by_place @ places)
        if has_ties:
            gradient.append((expected * kinds(-not_below, tied_by_width, -not_above)).sum() * tie)
        gradient.append((slope * _NODES).sum())
        return -float(evidence.sum()), -np.array(gradient)

    return objective


def _jacobian(function: Callable[[np.ndarray], np.ndarray], at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Derivatives of a vector function by central differences, [outputs, inputs]."""
    steps = np.eye(len(at)) * step
    return np.stack([(function(at + s) - function(at - s)) / (2 * step) for s in steps], axis=1)


def _coefficient(value: float, error: float, bound: float) -> Coefficient:
    """A parameter with the interval value +- bound x error."""
    if error < _NO_ERROR:
        return Coefficient(float(value), 0.0, None, None)
    half = bound * float(error)
    return Coefficient(float(value), float(error), float(value) - half, float(value) + half)


def _rate(value: float, error: float, bound: float) -> Coefficient:
    """A win rate with the interval of its log-odds, whose standard error is error / (value (1 - value))."""
    odds = _coefficient(float(scipy.special.logit(value)), error / (value * (1 - value)), bound)
    if odds.low is None or odds.high is None:
        return Coefficient(value, 0.0, None, None)
    return Coefficient(value, error, float(scipy.special.expit(odds.low)), float(scipy.special.expit(odds.high)))
