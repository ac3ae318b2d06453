"""The planned size of a study, and interim looks at its results that keep the level.

1. `blind_clustering`: how alike the votes of one participant are, from votes so far and without a word of who wins.
2. `planned_size`: participants that reach the planned power (`evaluation.power`), by what was assumed or by 1.
3. `look_bounds`: the alpha that each look may spend (Lan & DeMets 1983), and the bound that its |z| must pass.
4. `next_look`: the planned look that is open by now, if any; any other look departs from the plan.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from simrl.evaluation.power import Design, people_needed
from simrl.evaluation.preferences import checked
from simrl.evaluation.statistics import Vector, cluster_numbers
from simrl.run.config import from_config_dict
from simrl.study.flags import ScreenSettings
from simrl.study.settings import PlanSettings, TaskSettings

FEWEST_PARTICIPANTS = 20  # with fewer the clustering is hardly known
_CLUSTERING_LEVEL = 0.8  # nominal coverage of its interval
_LARGEST_CLUSTERING = 0.99  # a power needs some votes that differ
_FARTHEST = 9.0  # in standard deviations: the normal tails beyond are 0 but for rounding
_SMALLEST_SPENT = 1e-15
_NUM_NODES = 400  # of an integral: enough for looks that are .1% of the participants apart


@dataclasses.dataclass(frozen=True)
class Clustering:
    """Variation of the votes so far. Exchanging the two models of a pair changes nothing here.

    Attributes:
        participants: with at least one vote.
        votes: number of votes.
        turns: votes of each participant, their harmonic mean rounded down.
        ties: share of votes that are ties.
        icc: intra-class correlation of a participant's votes; None where it cannot be estimated.
        low, high: its interval at 80%.
    """

    participants: int
    votes: int
    turns: int
    ties: float
    icc: float | None
    low: float | None
    high: float | None

    @property
    def is_known(self) -> bool:
        """True if there is enough for a sample size."""
        return self.icc is not None and self.participants >= FEWEST_PARTICIPANTS


@dataclasses.dataclass(frozen=True)
class Size:
    """A sample size.

    Attributes:
        per_pair: participants of each pair who complete.
        total: of all pairs.
        design: what it assumes.
    """

    per_pair: int
    total: int
    design: Design


@dataclasses.dataclass(frozen=True)
class LookBound:
    """A look at the results.

    Attributes:
        share: of the planned participants who had completed, in (0, 1].
        spent: alpha that may be spent until then, both sides together.
        alpha: the part of it that this look spends.
        z: the results are significant where |z| is at least this; infinite where nothing is spent yet.
        level: nominal coverage of the interval that excludes 1/2 just then.
    """

    share: float
    spent: float
    alpha: float
    z: float

    @property
    def level(self) -> float:
        return math.erf(self.z / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Plan:
    """An analysis plan.

    Attributes:
        pairs: of models, each in the order in which its win rate is given.
        exchanges: that each participant has at least.
        screens: thresholds of the screens.
    """

    settings: PlanSettings
    pairs: tuple[tuple[str, str], ...]
    exchanges: int
    screens: ScreenSettings


def read_plan(plan: Mapping[str, Any]) -> Plan:
    """A plan that was frozen, or would be (`settings.plan_of`); what it leaves out has its default.

    Raises:
        ConfigError: a field is of another type.
    """
    names = [field.name for field in dataclasses.fields(PlanSettings)]
    return Plan(
        from_config_dict(PlanSettings, {name: plan[name] for name in names if name in plan}, 'plan'),
        tuple((first, second) for first, second in plan.get('pairs', ())),
        plan.get('exchanges', TaskSettings().exchanges),
        from_config_dict(ScreenSettings, plan.get('screens', {}), 'plan.screens'),
    )


def blind_clustering(preferences: Vector, participants: Sequence[Hashable], pairs: Sequence[Hashable]) -> Clustering:
    """Pools the clustering of votes over pairs: the one-way analysis of variance within pairs (Donner & Koval 1980).

    Means are taken within a pair, so that neither its effect nor its orientation enters, and no mean is given away. The
    interval is Searle's (1971, s. 9.8).

    Args:
        preferences: [N] 1 for a pair's first model, 0 for its second, 1/2 for a tie.
        participants: [N], who voted.
        pairs: [N], the pair of the vote.

    Raises:
        ValueError: lengths that differ, or a preference that is not from 0 to 1.
    """
    if not len(preferences):
        return Clustering(0, 0, 0, 0.0, None, None, None)
    values = checked('blind_clustering', preferences, participants)
    of_pair = cluster_numbers(pairs)
    people = cluster_numbers(list(zip(of_pair.tolist(), participants, strict=True)))
    counts = np.bincount(people)
    means = np.bincount(people, values) / counts
    pair = np.zeros(len(counts), int)
    pair[people] = of_pair
    votes_of_pair = np.bincount(pair, counts)
    centred = means - (np.bincount(pair, counts * means) / votes_of_pair)[pair]
    num_people, num_votes, num_pairs = len(counts), len(values), len(votes_of_pair)
    turns = int(num_people / (1 / counts).sum() + 1e-9)
    icc = low = high = None
    between, within = num_people - num_pairs, num_votes - num_people  # degrees of freedom
    if between and within:
        size = (num_votes - (np.bincount(pair, np.square(counts)) / votes_of_pair).sum()) / between
        of_people = (counts * np.square(centred)).sum() / between  # mean squares
        of_votes = np.square(values - means[people]).sum() / within
        if of_people + of_votes > 0:
            tails = np.array([1 + _CLUSTERING_LEVEL, 1 - _CLUSTERING_LEVEL]) / 2
            noise = of_votes * np.array([1.0, *scipy.special.fdtri(between, within, tails)])
            icc, low, high = np.clip((of_people - noise) / (of_people + (size - 1) * noise), 0, 1).tolist()
    return Clustering(num_people, num_votes, turns, float(np.mean(values == 0.5)), icc, low, high)


def assumed(plan: PlanSettings, exchanges: int) -> Clustering:
    """The clustering that the plan assumes until votes are there; `exchanges` of each participant."""
    return Clustering(0, 0, exchanges, plan.tie_share, plan.clustering, None, None)


def planned_size(plan: PlanSettings, pairs: int, clustering: Clustering) -> Size:
    """The fewest participants that find the planned effect in a pair with the planned power.

    The level is that of the last look, of the smallest p-value of all pairs (Holm's first step), so that the power is
    at least the planned one whatever the other pairs show.

    Args:
        plan: effect, power, level, looks.
        pairs: number of pairs that are compared.
        clustering: with an icc, `assumed` or of votes.

    Raises:
        ValueError: a clustering without an icc, or no pair.
        UnreachableError: no number of participants reaches the power.
    """
    if clustering.icc is None or pairs < 1:
        raise ValueError(f'planned_size: expected an icc and at least 1 pair, found {clustering.icc} and {pairs}')
    last = look_bounds((*plan.looks, 1.0), plan, pairs)[-1]
    design = Design(
        win_rate=plan.effect,
        ties=min(clustering.ties, 2 * (1 - plan.effect)),
        turns=max(1, clustering.turns),
        icc=min(clustering.icc, _LARGEST_CLUSTERING),
        level=last.level,
    )
    per_pair = people_needed(design, power=plan.power)
    return Size(per_pair, pairs * per_pair, design)


def alpha_spent(share: float, alpha: float, spending: str) -> float:
    """The two-sided alpha that may be spent until a share of the participants is there (Lan & DeMets 1983).

    Each side spends half of it by its own function of one-sided alpha a: 2 - 2 Phi(z_{1-a/2} / sqrt(share)) comes near
    O'Brien and Fleming's bounds, a log(1 + (e - 1) share) near Pocock's.

    Args:
        share: in (0, 1].
        alpha: in (0, 1), of all looks together.
        spending: 'obrien_fleming' or 'pocock'.

    Raises:
        ValueError: a share outside of (0, 1], or another spending.
    """
    if not 0 < share <= 1:
        raise ValueError(f'alpha_spent: expected a share in (0, 1], found {share:g}')
    if spending == 'obrien_fleming':
        return float(4 * scipy.special.ndtr(scipy.special.ndtri(alpha / 4) / math.sqrt(share)))
    if spending == 'pocock':
        return alpha * math.log(1 + (math.e - 1) * share)
    raise ValueError(f"alpha_spent: expected 'obrien_fleming' or 'pocock', found {spending!r}")


def look_bounds(shares: Sequence[float], plan: PlanSettings, pairs: int) -> tuple[LookBound, ...]:
    """The bounds of looks, from the first to the last, by numerical integration (Armitage, McPherson & Rowe 1969).

    Without an effect z sqrt(share) is a Brownian motion at the times `shares`; its density inside the bounds is carried
    from look to look. Bounds are symmetric, and of the level's share of one pair: Bonferroni's, Holm's first step.

    Args:
        shares: rising, in (0, 1]; those of looks that were made, and of ones to come.
        plan: level and spending.
        pairs: number of pairs that are compared.

    Raises:
        ValueError: shares that do not rise, or are outside of (0, 1].
    """
    if any(later <= earlier for earlier, later in itertools.pairwise(shares)):
        raise ValueError(f'look_bounds: expected rising shares, found {tuple(shares)}')
    total = (1 - plan.level) / pairs
    bounds: list[LookBound] = []
    nodes, weights = _rule()
    where, density, time, before = np.zeros(1), np.ones(1), 0.0, 0.0
    for share in shares:
        spent = alpha_spent(share, total, plan.spending)
        step = math.sqrt(share - time)
        alpha = spent - before
        z = math.inf
        if alpha > _SMALLEST_SPENT:
            z = scipy.optimize.brentq(_excess, 0.0, _FARTHEST, (alpha, where / step, density, math.sqrt(share) / step))
        bounds.append(LookBound(share, spent, alpha, z))
        half = min(z, _FARTHEST) * math.sqrt(share)
        steps = (half * nodes[:, None] - where) / step
        density = half * weights * (np.exp(-np.square(steps) / 2) @ density) / (step * math.sqrt(2 * math.pi))
        where, time, before = half * nodes, share, spent
    return tuple(bounds)


@functools.cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [-1, 1] and weights of Gauss and Legendre's rule."""
    nodes, weights = scipy.special.roots_legendre(_NUM_NODES)
    return nodes, weights


def _excess(z: float, alpha: float, where: np.ndarray, density: np.ndarray, scale: float) -> float:
    """The probability that |z| is passed now and was not before, less alpha. `where`, `scale`: in steps."""
    return 2 * float(density @ scipy.special.ndtr(where - z * scale)) - alpha


def next_look(
    plan: PlanSettings, pairs: int, completed: int, made: Sequence[float], *, is_over: bool = False
) -> LookBound | None:
    """The planned look that is open, with its bound; None if none is.

    A look is open from its share of the planned participants on, until it or a later one is made; the last one is open
    once all have completed, or recruitment is over. Its alpha is that of the share that is there, less what earlier
    planned looks have spent; the last one has all that is left.

    Args:
        plan: participants, looks, level and spending.
        pairs: number of pairs that are compared.
        completed: participants who completed and are not excluded.
        made: shares of the planned looks that were made.
        is_over: nobody new is let in any more.
    """
    before = made[-1] if made else 0.0
    now = 1.0 if is_over else min(1.0, completed / plan.participants)
    if not any(before < share <= now for share in (*plan.looks, 1.0)):
        return None
    return look_bounds((*made, now), plan, pairs)[-1]
