"""Sample sizes for a win rate: people and training seeds until an interval excludes 1/2 with a given probability.

1. `Design`: what is assumed of judgements, people and training seeds.
2. `checkpoint_power`: of one checkpoint, the t-interval over people.
3. `crossed_power`: of a simulator, `crossed.crossed_mean` over training seeds and people at once.
4. `people_needed`, `seeds_needed`: the smallest numbers that reach a power.
5. `simulated_power`: the same by simulated studies, which go through the intervals themselves.

A judgement is 1 for the assistant, 0 against it, 1/2 for a tie. Each person gives the same number of them to each
checkpoint, and the win rate is the mean over people of each one's mean.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.special

from simrl.evaluation.blocks import block_spread
from simrl.evaluation.crossed import crossed_mean
from simrl.evaluation.seeds import t_interval

MAX_PEOPLE = 10_000_000
MAX_SEEDS = 1000
_SEED_GRID, _PEOPLE_GRID = 64, 16  # quantiles of sample variances over seeds, and over people
_JUDGEMENTS_AT_ONCE = 4_000_000  # simulated, in memory at a time


class UnreachableError(ValueError):
    """A power that no number of people, or of training seeds, reaches; `best` is the highest found."""

    def __init__(self, message: str, best: float) -> None:
        super().__init__(message)
        self.best = best


@dataclasses.dataclass(frozen=True)
class Design:
    """Assumptions about a study.

    Attributes:
        win_rate: the true one over training seeds and people, in (0, 1), not 1/2.
        ties: share of judgements that are ties, at most twice the win rate of the weaker side.
        turns: judgements of each person, at least 1; where people differ, their harmonic mean rounded down.
        icc: intra-class correlation, that of two judgements of one person, also of different checkpoints; in [0, 1].
        seed_sd: standard deviation of the true win rate between training seeds.
        arms: arms whose spread over the same training seeds is pooled (`blocks.block_spread`); 1: the arm's alone.
        level: nominal coverage of the interval, in (0, 1).
    """

    win_rate: float = 0.58
    ties: float = 0.0
    turns: int = 5
    icc: float = 0.1
    seed_sd: float = 0.03
    arms: int = 1
    level: float = 0.95

    def __post_init__(self) -> None:
        weaker = min(self.win_rate, 1 - self.win_rate)
        for field, expected, right in (
            ('win_rate', 'in (0, 1) and not 1/2', weaker > 0 and self.win_rate != 0.5),
            ('ties', f'from 0 to {2 * weaker:g}, twice the win rate of the weaker side', 0 <= self.ties <= 2 * weaker),
            ('turns', 'of at least 1', self.turns >= 1),
            ('icc', 'from 0 to 1', 0 <= self.icc <= 1),
            ('seed_sd', 'from 0 to 0.5', 0 <= self.seed_sd <= 0.5),
            ('arms', 'of at least 1', self.arms >= 1),
            ('level', 'in (0, 1)', 0 < self.level < 1),
        ):
            if not right:
                raise ValueError(f'Design: expected {field} {expected}, found {getattr(self, field):g}')

    @property
    def effect(self) -> float:
        """The distance of the win rate from 1/2."""
        return abs(self.win_rate - 0.5)

    @property
    def variance(self) -> float:
        """Of one judgement: w (1 - w) - ties / 4, as a tie is nearer to the mean than a win or loss."""
        return self.win_rate * (1 - self.win_rate) - self.ties / 4

    @property
    def shared(self) -> float:
        """Variance between people that all checkpoints share: icc x variance."""
        return self.icc * self.variance

    @property
    def own(self) -> float:
        """Variance of a person's mean with one checkpoint about what is shared: (1 - icc) x variance / turns."""
        return (1 - self.icc) * self.variance / self.turns


def design_effect(design: Design) -> float:
    """The factor by which more judgements are needed than independent ones: 1 + (turns - 1) icc (Kish 1965, s. 5.4)."""
    return 1 + (design.turns - 1) * design.icc


def checkpoint_power(design: Design, people: int) -> float:
    """The probability that the t-interval over people excludes 1/2: one checkpoint, other people.

    With s^2 = variance x design effect / turns of a person's mean, the t-statistic is noncentral t with people - 1
    degrees of freedom and the noncentrality (w - 1/2) sqrt(people) / s (Cohen 1988, ch. 2). The bootstrap over people
    (`preferences.win_rates`) comes close to the t-interval from some 8 people on.

    Raises:
        ValueError: fewer than two people.
    """
    _check_number('checkpoint_power', 'people', people)
    bound = scipy.special.stdtrit(people - 1.0, (1 + design.level) / 2)
    half = bound * np.sqrt(_chi_squares(people - 1, _SEED_GRID))
    return _excluded(design.effect * math.sqrt(people / (design.shared + design.own)), half)


def crossed_power(design: Design, people: int, seeds: int) -> float:
    """The probability that the interval of `crossed.crossed_mean` excludes 1/2: other training seeds, other people.

    The mean's variance is seed_sd^2 / seeds + own / (seeds x people) + shared / people. The power is a mean over
    quantiles of the sample variances, chi-square variables, of the normal probability that the mean is farther from 1/2
    than half the interval that they give. With several arms the sample variance over seeds, and its degrees of freedom,
    are those of `blocks.block_spread`.

    Raises:
        ValueError: fewer than two people or seeds.
    """
    _check_number('crossed_power', 'people', people)
    _check_number('crossed_power', 'seeds', seeds)
    of_seeds = design.seed_sd**2 / seeds + design.own / (seeds * people)
    of_people = design.shared / people
    between = _chi_squares(seeds - 1, _SEED_GRID)[:, None, None]
    within = _chi_squares((seeds - 1) * (design.arms - 1), _SEED_GRID)[:, None]
    sampled = of_seeds * (between + (design.arms - 1) * within) / design.arms
    df = (between + (design.arms - 1) * within) ** 2 / (between**2 + (design.arms - 1) * within**2) * (seeds - 1)
    residual = design.own / (seeds * people)
    people_sampled = np.maximum((of_people + residual) * _chi_squares(people - 1, _PEOPLE_GRID) - residual, 0.0)
    seeds_bound, people_bound = (scipy.special.stdtrit(x, (1 + design.level) / 2) for x in (df, people - 1.0))
    half = (seeds_bound * sampled + people_bound * people_sampled) / np.sqrt(sampled + people_sampled)
    scale = math.sqrt(of_seeds + of_people)
    return _excluded(design.effect / scale, half / scale)


def _excluded(shift: float, half: np.ndarray) -> float:
    """The probability that a normal variable of mean `shift` and variance 1 is farther from 0 than `half`, its mean."""
    return float((scipy.special.ndtr(shift - half) + scipy.special.ndtr(-shift - half)).mean())


def people_needed(design: Design, *, power: float = 0.8, seeds: int | None = None) -> int:
    """The fewest people that reach a power: of one checkpoint, or with `seeds` training seeds.

    Raises:
        UnreachableError: no number of people reaches it.
        ValueError: a power outside (0, 1), or fewer than two seeds.
    """
    if seeds is None:
        return _smallest(lambda people: checkpoint_power(design, people), power, MAX_PEOPLE, 'people')
    with_seeds = f'people with {seeds} training seeds'
    return _smallest(lambda people: crossed_power(design, people, seeds), power, MAX_PEOPLE, with_seeds)


def seeds_needed(design: Design, people: int, *, power: float = 0.8) -> int:
    """The fewest training seeds that reach a power with as many people, the same for all seeds.

    Raises:
        UnreachableError: no number of seeds reaches it.
        ValueError: a power outside (0, 1), or fewer than two people.
    """
    with_people = f'training seeds with {people} people'
    return _smallest(lambda seeds: crossed_power(design, people, seeds), power, MAX_SEEDS, with_people)


def _smallest(power_of: Callable[[int], float], power: float, most: int, unit: str) -> int:
    """The smallest number from 2 to `most` whose power is enough."""
    if not 0 < power < 1:
        raise ValueError(f'expected a power in (0, 1), found {power:g}')
    low, high, best = 1, 2, 0.0
    while (found := power_of(high)) < power:
        best = max(best, found)
        if high == most:
            raise UnreachableError(
                f'expected a power of {power:.0%}, found at most {best:.1%} by any number of {unit}', best
            )
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high


def _chi_squares(df: float, number: int) -> np.ndarray:
    """Chi-square / df at the middles of equally likely ranges, `[number]`; [1.0] without degrees of freedom."""
    if df == 0:
        return np.ones(1)
    return 2 * scipy.special.gammaincinv(df / 2, (np.arange(number) + 0.5) / number) / df


def simulated_power(
    design: Design, people: int, seeds: int | None = None, *, studies: int = 2000, seed: int = 0
) -> float:
    """The share of simulated studies whose interval excludes 1/2, with a standard error of sqrt(p (1 - p) / studies).

    A judgement is with probability sqrt(icc) the person's own fixed one, else a new one, so that two of one person
    correlate at icc. New ones follow the checkpoint's win rate, which is normal between seeds.

    Args:
        design: as for the power. An icc of 1 leaves nothing for seeds to differ in.
        people: number of people.
        seeds: number of training seeds; None: one checkpoint, and the interval over people alone.
        studies, seed: number of studies and the seed of their random draws.

    Raises:
        ValueError: fewer than two people or seeds, no study, or an icc of 1 with seeds that differ.
    """
    _check_number('simulated_power', 'people', people)
    if seeds is not None:
        _check_number('simulated_power', 'seeds', seeds)
    if studies < 1:
        raise ValueError(f'simulated_power: expected at least 1 study, found {studies}')
    if design.icc == 1 and seeds is not None and design.seed_sd:
        raise ValueError('simulated_power: expected an icc below 1, as with it seeds cannot differ')
    random = np.random.default_rng(seed)
    arms = 1 if seeds is None else design.arms
    at_once = max(1, _JUDGEMENTS_AT_ONCE // (arms * (seeds or 1) * people * design.turns))
    excluded = 0
    for start in range(0, studies, at_once):
        shape = (min(at_once, studies - start), arms, seeds or 1, people)
        excluded += sum(_excludes_half(design, means, seeds) for means in _person_means(design, shape, seeds, random))
    return excluded / studies


def _excludes_half(design: Design, means: np.ndarray, seeds: int | None) -> bool:
    """True if the interval of the first arm excludes 1/2; `means` [arms, seeds, people]."""
    if seeds is None:
        return bool(t_interval(means[0, 0] - 0.5, level=design.level).sign)
    block = block_spread(means.mean(axis=2)) if design.arms > 1 else None
    spread = block.run if block else None
    return bool(crossed_mean(means[0] - 0.5, range(means.shape[2]), level=design.level, spread=spread).sign)


def _person_means(
    design: Design, shape: tuple[int, int, int, int], seeds: int | None, random: np.random.Generator
) -> np.ndarray:
    """Simulated means of each person's judgements, `shape` [studies, arms, seeds, people]."""
    studies, arms, runs, people = shape
    fixed = math.sqrt(design.icc)
    wins, losses = design.win_rate - design.ties / 2, 1 - design.win_rate - design.ties / 2
    spread = 0.0 if seeds is None or not design.seed_sd else design.seed_sd / (1 - fixed)
    # Of new judgements only, and no farther than shares of wins and losses go.
    shift = np.clip(random.normal(0, spread, (studies, arms, runs, 1, 1)), -wins, losses)
    mine = random.random((studies, 1, 1, people, 1))
    is_mine = random.random((*shape, design.turns)) < fixed
    drawn = np.where(is_mine, mine, random.random((*shape, design.turns)))
    win_share = wins + np.where(is_mine, 0.0, shift)
    return np.where(drawn < win_share, 1.0, np.where(drawn < win_share + design.ties, 0.5, 0.0)).mean(axis=-1)


def _check_number(caller: str, field: str, number: int) -> None:
    if number < 2:
        raise ValueError(f'{caller}: expected at least 2 {field}, found {number}')
