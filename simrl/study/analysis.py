"""Votes of a study -> win rates of each two models, with what qualifies them.

1. `flow`: what became of everybody who arrived, and who is left out of the primary analysis, by reason.
2. `samples_of`: the votes of the primary analysis, and those of others beside it: with and without what is flagged.
3. `analyse`: of each pair the win rate by the plan's unit and by others, regressions with the position, majorities, by
   document type, task and turn; Holm's correction over the pairs; the models on one scale.

The unit is the participant: whoever votes more often counts once, and intervals are over participants like these. Both
models continue from the preferred reply, so replies from the second turn on share a history, which the better model
has helped to write: a win rate over all turns is of replies, not of whole conversations. First turns are free of it.

A number that the votes do not determine is given as the reason in words (`agreement.or_reason`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy.special

from simrl.evaluation.multiplicity import holm
from simrl.evaluation.pairwise.agreement import or_reason
from simrl.evaluation.preferences import Majorities, WinRate, majorities, win_rates
from simrl.evaluation.ranking import Ranking, davidson
from simrl.evaluation.statistics import Estimate, cluster_sums, cluster_t_interval, t_quantile
from simrl.study.events import Mode
from simrl.study.participant import Participant
from simrl.study.plan import Clustering, blind_clustering, look_bounds
from simrl.study.settings import PlanSettings
from simrl.study.votes import Pair, Vote

if TYPE_CHECKING:  # importing it takes a second
    from simrl.evaluation.vote_models import CumulativeLogit, Gee

K = TypeVar('K', str, int, tuple[str, str])
PRIMARY, FIRST_TURNS = 'primary', 'first turns alone'
UNDER_WAY = 'under way, or not seen again'
TOO_FEW = 'too few participants'
_LARGEST_LEVEL = 1 - 1e-9  # of an interval, at a look that spends no alpha


@dataclasses.dataclass(frozen=True)
class Flow:
    """The participants of a study.

    Attributes:
        arrived: number of them.
        ends: by outcome; `UNDER_WAY` without one.
        unfinished_votes: votes of participants who did not complete.
        excluded: of those who completed and were excluded by an administrator, by the reason given.
        flags: of those who completed, by flag; one participant may have several.
        excluded_by_flag: of those who completed and were not excluded otherwise, by flags of the plan.
        primary: participants of the primary analysis.
        reentered: who entered by another session id of the panel.
        named: judged turns of the primary analysis in which a reply may name its model.
    """

    arrived: int
    ends: Mapping[str, int]
    unfinished_votes: int
    excluded: Mapping[str, int]
    flags: Mapping[str, int]
    excluded_by_flag: int
    primary: int
    reentered: int
    named: int


@dataclasses.dataclass(frozen=True)
class Rate:
    """A win rate.

    Attributes:
        participants, votes: sizes of its sample.
        estimate: of the first model, by the unit of the analysis.
        p_value: two-sided, that it is 1/2: Student's t over participants, with the cluster-robust standard error where
            the unit is the vote. None where participants do not differ, or there is one.
    """

    participants: int
    votes: int
    estimate: Estimate | str
    p_value: float | None

    @property
    def untested(self) -> str:
        """The reason why there is no p-value, so that nothing can be said to be significant or not; else empty."""
        if self.p_value is not None:
            return ''
        return TOO_FEW if self.participants < 2 else 'participants do not differ'


@dataclasses.dataclass(frozen=True)
class PairResult:
    """Two models.

    Attributes:
        assigned, completed: participants of the pair, and those of them who completed.
        wins, ties, losses: votes for the first model, for neither, for the second.
        rate: primary.
        adjusted_p: Holm's over all pairs.
        significant: by Holm's procedure at the level of this look. False, too, of a rate that is `untested`.
        by_unit: the mean over participants, over votes, and over votes as if each were of a participant of its own.
        cumulative_logit, gee: regressions with the position.
        characters: mean length of a reply, by model.
        longer: mean preference for the longer reply, of those that differ in length; None of none.
        left: mean preference for the reply on the left; 1/2 without a bias.
        types, tasks, turns: by document type, task and number of the turn, by the same unit.
    """

    first: str
    second: str
    assigned: int
    completed: int
    wins: int
    ties: int
    losses: int
    rate: Rate
    adjusted_p: float
    significant: bool
    by_unit: WinRate | str
    majorities: Majorities | str
    cumulative_logit: 'CumulativeLogit | str'
    gee: 'Gee | str'
    characters: Mapping[str, float]
    longer: Rate | None
    left: Rate
    types: Mapping[str, Rate]
    tasks: Mapping[str, Rate]
    turns: Mapping[int, Rate]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A study.

    Attributes:
        level: nominal coverage of the intervals, each by itself.
        unit: that the primary win rate weighs alike.
        pairs: of the primary sample.
        left: mean preference for the reply on the left, all pairs together.
        samples: by name of the sample and pair; the p-values are not adjusted.
        clustering: how alike votes of one participant are, pooled over pairs.
        ranking: of more than two models; None of two.
    """

    level: float
    unit: str
    flow: Flow
    pairs: tuple[PairResult, ...]
    left: Rate | None
    samples: Mapping[str, Mapping[Pair, Rate]]
    clustering: Clustering
    ranking: Ranking | str | None


def flow(
    participants: Iterable[Participant], mode: Mode, flags: Mapping[str, Sequence[str]], plan: PlanSettings
) -> Flow:
    """Counts everybody of a mode once."""
    everybody = [one for one in participants if one.mode == mode]
    completed = [one for one in everybody if one.outcome == 'completed']
    kept = [one for one in completed if not one.is_excluded]
    primary = [one for one in kept if not set(flags.get(one.id, ())) & set(plan.excluded_flags)]
    ends = collections.Counter(one.outcome or UNDER_WAY for one in everybody)
    excluded = collections.Counter(
        (one.excluded.reason if one.excluded else '') or 'no reason given' for one in completed if one.is_excluded
    )
    of_flag = collections.Counter(flag for one in completed for flag in set(flags.get(one.id, ())))
    return Flow(
        arrived=len(everybody),
        ends=dict(sorted(ends.items())),
        unfinished_votes=sum(len(one.main.judged) for one in everybody if one.outcome != 'completed' and one.main),
        excluded=dict(sorted(excluded.items())),
        flags=dict(sorted(of_flag.items())),
        excluded_by_flag=len(kept) - len(primary),
        primary=len(primary),
        reentered=sum(one.other_sessions > 0 for one in everybody),
        named=sum(bool(turn.replies and turn.replies.named) for one in primary if one.main for turn in one.main.judged),
    )


def samples_of(votes: Sequence[Vote], plan: PlanSettings) -> dict[str, list[Vote]]:
    """The votes of each analysis by name, the primary one first."""
    completed = [vote for vote in votes if vote.outcome == 'completed']
    kept = [vote for vote in completed if vote.excluded is None]
    primary = [vote for vote in kept if not set(vote.flags) & set(plan.excluded_flags)]
    return {
        PRIMARY: primary,
        FIRST_TURNS: [vote for vote in primary if vote.turn == 1],
        'without participants with any flag': [vote for vote in primary if not vote.flags],
        'without turns in which a model may name itself': [vote for vote in primary if not vote.named],
        'with flagged participants': kept,
        'with excluded participants, too': completed,
        'all votes, also of those who left': list(votes),
    }


@dataclasses.dataclass(frozen=True)
class _How:
    """Settings of all intervals: the unit of the plan, nominal coverage, and those of bootstraps."""

    unit: str
    level: float
    resamples: int
    seed: int


def analyse(
    participants: Iterable[Participant],
    votes: Sequence[Vote],
    plan: PlanSettings,
    *,
    mode: Mode,
    pairs: Sequence[Pair] = (),
    shares: Sequence[float] = (1.0,),
    resamples: int = 10_000,
    seed: int = 0,
) -> Analysis:
    """The analysis of a study by its plan.

    Args:
        participants: all; those of other modes are not counted.
        votes: of `votes.votes`, with the participants' flags.
        plan: level, unit, excluded flags, and the spending of alpha.
        mode: whose participants are counted.
        pairs: the order of the results, whichever model of a pair is first; others come after them.
        shares: of the planned participants who had completed at each look that was planned, this one last.
        resamples, seed: of bootstraps.
    """
    participants = list(participants)
    level = min(round(look_bounds(shares, plan, 1)[-1].level, 9), _LARGEST_LEVEL)  # less the error of its root
    how = _How(plan.primary, level, resamples, seed)
    samples = samples_of(votes, plan)
    primary = samples[PRIMARY]
    found = _by(primary, lambda vote: vote.pair)
    rank = {frozenset(pair): number for number, pair in enumerate(pairs)}
    of_pair = {pair: found[pair] for pair in sorted(found, key=lambda pair: rank.get(frozenset(pair), len(rank)))}
    rates = {pair: rate_of(some, how) for pair, some in of_pair.items()}
    p_values = {pair: 1.0 if of.p_value is None else of.p_value for pair, of in rates.items()}
    adjusted, rejected = holm(p_values), rejected_by(p_values, plan, shares)
    assigned = [one for one in participants if one.mode == mode and one.main]
    results = tuple(
        _pair(
            pair,
            some,
            [one for one in assigned if one.main and set(one.main.pair) == set(pair)],
            how,
            rate=rates[pair],
            adjusted_p=adjusted[pair],
            significant=pair in rejected,
        )
        for pair, some in of_pair.items()
    )
    several = len({model for pair in of_pair for model in pair}) > 2
    return Analysis(
        level=level,
        unit=how.unit,
        flow=flow(participants, mode, {vote.participant: vote.flags for vote in votes}, plan),
        pairs=results,
        left=rate_of(primary, how, of_left) if primary else None,
        samples={name: _rates(some, lambda vote: vote.pair, how) for name, some in samples.items()},
        clustering=blind_clustering(
            [vote.preference for vote in primary],
            [vote.participant for vote in primary],
            [vote.pair for vote in primary],
        ),
        ranking=or_reason(lambda: _ranking(primary, how)) if several else None,
    )


def of_left(vote: Vote) -> float:
    """The preference for the reply on the left."""
    return vote.preference if vote.first_was_left else 1 - vote.preference


def of_longer(vote: Vote) -> float:
    """The preference for the reply with more characters."""
    left = of_left(vote)
    return left if len(vote.left_text) > len(vote.right_text) else 1 - left


def rate_of(
    votes: Sequence[Vote], how: _How, preference: Callable[[Vote], float] = lambda vote: vote.preference
) -> Rate:
    """The mean preference of votes by the unit of the plan."""
    values, people = [preference(vote) for vote in votes], [vote.participant for vote in votes]
    found = or_reason(lambda: win_rates(values, people, level=how.level, resamples=how.resamples, seed=how.seed))
    if isinstance(found, str):
        return Rate(len(set(people)), len(votes), found, None)
    totals, counts = (sums[:, 0] for sums in cluster_sums(np.array(values)[None], people))
    if how.unit == 'vote':
        return Rate(len(totals), len(votes), found.observed.by_vote, student_p(totals, counts))
    estimate = found.observed.by_participant
    return Rate(len(totals), len(votes), estimate, student_p(totals / counts, np.ones(len(counts))))


def student_p(totals: np.ndarray, counts: np.ndarray) -> float | None:
    """The two-sided p-value that the mean is 1/2, by the test that `statistics.cluster_t_interval` inverts.

    Args:
        totals, counts: [clusters], the sum over each cluster's observations, and their number.

    Returns:
        None where there is no interval.
    """
    low, high = cluster_t_interval(totals, counts, level=0.95)
    if low is None or high is None:
        return None
    df = len(totals) - 1
    error = (high - low) / 2 / t_quantile(df, 0.95)
    return float(2 * scipy.special.stdtr(df, -abs(float(totals.sum() / counts.sum()) - 0.5) / error))


def rejected_by(p_values: Mapping[Pair, float], plan: PlanSettings, shares: Sequence[float]) -> set[Pair]:
    """The pairs whose p-values are significant: Holm's step-down procedure at the alpha of the last of the looks.

    With n pairs the j-th smallest p-value, j from 0, is held against the alpha that this look has of 1 / (n - j) of the
    level (`plan.look_bounds`); the first that is larger ends it. Without interim looks it is Holm's own procedure. With
    them each look is a step-down procedure of its own, whose bounds are those of the planned spending.
    """
    found: set[Pair] = set()
    for number, pair in enumerate(sorted(p_values, key=lambda pair: p_values[pair])):
        alpha = 1 - look_bounds(shares, plan, len(p_values) - number)[-1].level
        if p_values[pair] > alpha:
            break
        found.add(pair)
    return found


def _by(votes: Sequence[Vote], key: Callable[[Vote], K]) -> dict[K, list[Vote]]:
    """Votes by a key, keys in the order in which they first come."""
    found: dict[K, list[Vote]] = {}
    for vote in votes:
        found.setdefault(key(vote), []).append(vote)
    return found


def _rates(votes: Sequence[Vote], key: Callable[[Vote], K], how: _How) -> dict[K, Rate]:
    return {name: rate_of(some, how) for name, some in sorted(_by(votes, key).items())}


def _pair(pair: Pair, votes: Sequence[Vote], assigned: Sequence[Participant], how: _How, **judged: Any) -> PairResult:
    """The numbers of a pair. `assigned`: its participants; `judged`: the fields that depend on other pairs."""
    from simrl.evaluation.vote_models import cumulative_logit, gee

    values, people = [vote.preference for vote in votes], [vote.participant for vote in votes]
    first_was_left = [vote.first_was_left for vote in votes]
    differing = [vote for vote in votes if len(vote.left_text) != len(vote.right_text)]
    rates = or_reason(lambda: win_rates(values, people, level=how.level, resamples=how.resamples, seed=how.seed))
    return PairResult(
        first=pair[0],
        second=pair[1],
        assigned=len(assigned),
        completed=sum(one.outcome == 'completed' for one in assigned),
        wins=values.count(1.0),
        ties=values.count(0.5),
        losses=values.count(0.0),
        by_unit=rates if isinstance(rates, str) else rates.observed,
        majorities=or_reason(lambda: majorities(values, people)),
        cumulative_logit=or_reason(lambda: cumulative_logit(values, people, first_was_left, level=how.level)),
        gee=or_reason(lambda: gee(values, people, first_was_left, level=how.level)),
        characters={model: float(np.mean([len(vote.text_of(model)) for vote in votes])) for model in pair},
        longer=rate_of(differing, how, of_longer) if differing else None,
        left=rate_of(votes, how, of_left),
        types=_rates(votes, lambda vote: vote.document_type, how),
        tasks=_rates(votes, lambda vote: vote.task, how),
        turns=_rates(votes, lambda vote: vote.turn, how),
        **judged,
    )


def _ranking(votes: Sequence[Vote], how: _How) -> Ranking:
    return davidson(
        [vote.pair[0] for vote in votes],
        [vote.pair[1] for vote in votes],
        [vote.preference for vote in votes],
        [vote.participant for vote in votes],
        level=how.level,
        seed=how.seed,
    )
