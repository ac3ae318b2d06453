"""Verdicts on pairs -> win rates of each two assistants, by judge and panel, with what qualifies them.

1. `preferences_of`: one preference for each pair and judge from its verdicts in both orders, and the panel's.
2. `compare`: of two assistants: win rates with intervals over prompts or people, with failures lost and won, and at
   equal lengths; position bias, regressions over people, and the agreement of judges.
3. `table`: of each two assistants, with Holm's correction over them; arms over their training seeds (`seeds`); of more
   than two assistants also strengths on one scale.

A number that the verdicts do not determine is given as the reason in words (`agreement.or_reason`).
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.evaluation.length_control import LengthControlled, length_controlled
from simrl.evaluation.multiplicity import holm
from simrl.evaluation.pairwise.agreement import JudgeAgreement, judge_agreement, or_reason
from simrl.evaluation.pairwise.judges import NOT_ASKED, Judged
from simrl.evaluation.pairwise.responses import Pair, Responses
from simrl.evaluation.pairwise.seeds import over_seeds
from simrl.evaluation.position import (
    Combine,
    PositionBias,
    both_orders,
    position_bias,
)
from simrl.evaluation.preferences import Majorities, WinRates, majorities, win_rates, winners
from simrl.evaluation.ranking import Ranking, davidson
from simrl.evaluation.results.judges import PANEL, ArmWinRate

if TYPE_CHECKING:  # importing it takes a second, which few tables need
    from simrl.evaluation.vote_models import CumulativeLogit, Gee

Two = tuple[str, str]  # names of the first and the second assistant
Labels = Mapping[tuple[str, str, str], float]  # by id, first and second assistant: people's preference for the first


@dataclasses.dataclass(frozen=True)
class Counted:
    """The preferences of a judge or panel between two assistants.

    Attributes:
        wins, ties, losses: pairs on which the first assistant is preferred, neither, or the second.
        win_rates: of the first assistant; intervals resample clusters.
        majorities: clusters by the assistant that they prefer, with a sign test.
        length_controlled: were both responses equally long in characters of the assistants.
        position: effect of the order on pairs that were asked about; None for a panel.
        cumulative_logit, gee: of single verdicts, by the person of each prompt; None where persons are not known.
        failures: verdicts that could not be had, by cause.
    """

    wins: int
    ties: int
    losses: int
    win_rates: WinRates | str
    majorities: Majorities | str
    length_controlled: LengthControlled | str
    position: PositionBias | str | None
    cumulative_logit: 'CumulativeLogit | str | None'
    gee: 'Gee | str | None'
    failures: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two assistants on the same prompts.

    Attributes:
        pairs, clusters: prompts, and the people or openings that they are of.
        missing, empty: number of prompts to which an assistant has no response, or an empty one.
        characters: mean characters of the assistants' responses, on prompts that both responded to.
        judges: by judge; with more than one also of the panel.
        agreement: None with one judge.
        p_value, adjusted: of the sign test over clusters by the panel, or by the one judge; and by Holm over the family
            of all comparisons of the table. None where no cluster prefers either.
    """

    first: str
    second: str
    pairs: int
    clusters: int
    missing: Mapping[str, int]
    empty: Mapping[str, int]
    characters: Mapping[str, float]
    judges: Mapping[str, Counted]
    agreement: JudgeAgreement | None
    p_value: float | None
    adjusted: float | None


@dataclasses.dataclass(frozen=True)
class Table:
    """All comparisons.

    Attributes:
        combine: how a preference is made of a judge's two verdicts.
        comparisons: of each two assistants.
        seeds: of runs of arms over an assistant that is none, by the panel, or by the one judge.
        rankings: by judge and panel, of more than two assistants, else empty.
    """

    combine: Combine
    comparisons: tuple[Comparison, ...]
    seeds: tuple[ArmWinRate, ...]
    rankings: Mapping[str, Ranking | str]


@dataclasses.dataclass(frozen=True)
class _Verdicts:
    """The verdicts on the pairs of two assistants.

    Attributes:
        pairs: N of them.
        single: by judge, preferences for the first assistant [2, N]: shown first, shown second; NaN without a verdict.
        asked: [N], False where the verdict is known without a judge.
        failures: by judge and cause.
    """

    pairs: tuple[Pair, ...]
    single: Mapping[str, np.ndarray]
    asked: np.ndarray
    failures: Mapping[str, Mapping[str, int]]

    @property
    def clusters(self) -> list[str]:
        return [pair.cluster for pair in self.pairs]


def by_two(judged: Sequence[Judged]) -> dict[Two, _Verdicts]:
    """The verdicts by the two assistants that they are on."""
    pairs: dict[Two, dict[str, Pair]] = {}
    values: dict[Two, dict[tuple[str, str, bool], Judged]] = collections.defaultdict(dict)
    for one in judged:
        two = (one.pair.first, one.pair.second)
        pairs.setdefault(two, {})[one.pair.id] = one.pair
        values[two][one.judge, one.pair.id, one.first_is_a] = one
    judges = list(dict.fromkeys(one.judge for one in judged))
    found = {}
    for two, own in pairs.items():
        causes = {judge: collections.Counter[str]() for judge in judges}
        for (judge, *_), one in values[two].items():
            if one.verdict.value is None:
                causes[judge][one.verdict.cause] += 1
        found[two] = _Verdicts(
            pairs=tuple(own.values()),
            single={
                judge: np.array([[values[two][judge, name, is_a].preference for name in own] for is_a in (True, False)])
                for judge in judges
            },
            asked=np.array([values[two][judges[0], name, True].verdict.cause != NOT_ASKED for name in own]),
            failures={judge: dict(sorted(counts.items())) for judge, counts in causes.items()},
        )
    return found


def preferences_of(single: Mapping[str, np.ndarray], combine: Combine) -> dict[str, np.ndarray]:
    """One preference for each pair, float64 [N], by judge and with several of the panel; NaN is a failure.

    A panel's is the mean over its judges; with 'strict' the side that their mean is on, else a tie. A pair that one of
    its judges has no verdict on is a failure: a mean over fewer judges would be another measure.

    Args:
        single: by judge, preferences for the first assistant [2, N].
        combine: see `both_orders`.
    """
    found = {judge: both_orders(*values, combine=combine) for judge, values in single.items()}
    if len(found) > 1:
        mean = np.mean(list(found.values()), axis=0)
        found[PANEL] = mean if combine == 'mean' else (winners(mean) + 1) / 2
    return found


def compare(
    two: Two, found: _Verdicts, responses: Mapping[str, Responses], combine: Combine, labels: Labels | None = None
) -> Comparison:
    """Compares two assistants; `adjusted` is left to `table`.

    Args:
        responses: by assistant; of these two.
        labels: preferences of people.
    """
    preferences = preferences_of(found.single, combine)
    own = [responses[name] for name in two]
    both = [pair.id for pair in found.pairs if all(pair.id in of for of in own)]
    lengths = {name: [of[key].num_characters for key in both] for name, of in zip(two, own, strict=True)}
    primary = list(preferences)[-1]
    judges = {name: _counted(name, values, found, lengths, both) for name, values in preferences.items()}
    tested = judges[primary].majorities
    agreement = None
    if len(found.single) > 1:
        asked = [pair for pair, is_asked in zip(found.pairs, found.asked, strict=True) if is_asked]
        agreement = judge_agreement(
            {judge: preferences[judge][found.asked] for judge in found.single},
            [pair.cluster for pair in asked],
            None if labels is None else np.array([labels.get((pair.id, *two), np.nan) for pair in asked]),
        )
    return Comparison(
        first=two[0],
        second=two[1],
        pairs=len(found.pairs),
        clusters=len(set(found.clusters)),
        missing={name: sum(pair.id not in of for pair in found.pairs) for name, of in zip(two, own, strict=True)},
        empty={name: values.count(0) for name, values in lengths.items()},
        characters={name: float(np.mean(values)) for name, values in lengths.items()},
        judges=judges,
        agreement=agreement,
        p_value=None if isinstance(tested, str) else tested.p_value,
        adjusted=None,
    )


def _counted(
    name: str, values: np.ndarray, found: _Verdicts, lengths: Mapping[str, Sequence[int]], both: Sequence[str]
) -> Counted:
    """The numbers of a judge, or of the panel, from its preferences [N]."""
    there, side, clusters = ~np.isnan(values), winners(values), found.clusters
    known = [cluster for cluster, has in zip(clusters, there, strict=True) if has]
    of_id = {pair.id: value for pair, value in zip(found.pairs, values, strict=True)}
    with_length = [i for i, key in enumerate(both) if not np.isnan(of_id[key])]
    own, other = (np.array(x, np.float64)[with_length] for x in lengths.values())
    judges = list(found.single) if name == PANEL else [name]
    failures = collections.Counter[str]()
    for judge in judges:
        failures.update(found.failures[judge])
    asked = found.asked
    asked_clusters = [cluster for cluster, is_asked in zip(clusters, asked, strict=True) if is_asked]
    position: PositionBias | str | None = None
    if name != PANEL:
        a_first, b_first = found.single[name][:, asked]
        position = or_reason(lambda: position_bias(a_first, b_first, asked_clusters))
    to_compare = np.array([of_id[both[i]] for i in with_length], np.float64)
    return Counted(
        wins=int((side == 1).sum()),
        ties=int((side == 0).sum()),
        losses=int((side == -1).sum()),
        win_rates=or_reason(lambda: win_rates(values, clusters)),
        majorities=or_reason(lambda: majorities(values[there], known)),
        length_controlled=or_reason(lambda: length_controlled(to_compare, own, other)),
        position=position,
        **_regressions(found, judges),
        failures=dict(sorted(failures.items())),
    )


def _regressions(found: _Verdicts, judges: Sequence[str]) -> dict[str, Any]:
    """Both regressions of the judges' single verdicts on the pairs that they were asked about."""
    if any(pair.person is None for pair in found.pairs):
        return {'cumulative_logit': None, 'gee': None}
    from simrl.evaluation.vote_models import cumulative_logit, gee

    single = np.concatenate([found.single[judge][:, found.asked] for judge in judges])  # [2 x judges, asked]
    people = [pair.person for pair, asked in zip(found.pairs, found.asked, strict=True) if asked]
    there = ~np.isnan(single)
    who = [people[i] for i in np.nonzero(there)[1]]
    a_first = (np.nonzero(there)[0] % 2 == 0).tolist()
    return {
        'cumulative_logit': or_reason(lambda: cumulative_logit(single[there], who, a_first)),
        'gee': or_reason(lambda: gee(single[there], who, a_first)),
    }


def table(
    judged: Sequence[Judged], responses: Mapping[str, Responses], *, combine: Combine, labels: Labels | None = None
) -> Table:
    """Compares each two assistants that were judged.

    Args:
        judged: verdicts on their pairs, both orders, by every judge.
        responses: by assistant.
        combine: how a judge's two verdicts become a preference; see `preferences_of`.
        labels: preferences of people, for the errors of judges.
    """
    found = by_two(judged)
    comparisons = {two: compare(two, verdicts, responses, combine, labels) for two, verdicts in found.items()}
    adjusted = holm({two: of.p_value for two, of in comparisons.items() if of.p_value is not None})
    assistants = {name for two in found for name in two}
    primary = {two: (of.pairs, list(preferences_of(of.single, combine).values())[-1]) for two, of in found.items()}
    return Table(
        combine=combine,
        comparisons=tuple(dataclasses.replace(of, adjusted=adjusted.get(two)) for two, of in comparisons.items()),
        seeds=over_seeds(primary),
        rankings=_rankings(found, combine) if len(assistants) > 2 else {},
    )


def _rankings(found: Mapping[Two, _Verdicts], combine: Combine) -> dict[str, Ranking | str]:
    """Strengths of all assistants by judge and panel.

    Votes are single verdicts, a panel's those of all its judges; with 'strict' the preferences of pairs.
    """
    votes: dict[str, list[tuple[Pair, float]]] = collections.defaultdict(list)
    for verdicts in found.values():
        if combine == 'strict':
            sources = {name: values[None] for name, values in preferences_of(verdicts.single, combine).items()}
        else:
            sources = dict(verdicts.single)
            if len(sources) > 1:
                sources[PANEL] = np.concatenate(list(sources.values()))
        for source, values in sources.items():
            votes[source] += [
                (pair, float(value))
                for row in values
                for pair, value in zip(verdicts.pairs, row, strict=True)
                if not np.isnan(value)
            ]
    return {source: or_reason(functools.partial(_ranking, rows)) for source, rows in votes.items()}


def _ranking(votes: Sequence[tuple[Pair, float]]) -> Ranking:
    return davidson(
        [pair.first for pair, _ in votes],
        [pair.second for pair, _ in votes],
        [value for _, value in votes],
        [pair.cluster for pair, _ in votes],
    )
