"""Judges of a panel beside each other, and against people.

A number that the verdicts do not determine is given as the reason in words.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from simrl.evaluation.position import PanelAgreement, Votes, panel_agreement, votes_of
from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import Estimate

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class JudgeAgreement:
    """Agreement of the judges of a panel, on pairs that they were asked about.

    Attributes:
        equal: of each two judges, 1 less the mean distance between their preferences.
        votes: by the correlation of preferences: what judges are right about together counts as what they share.
        errors: against people's preferences: each judge's and the panel's agreement, and the effective number of votes
            by the correlation of errors. None where no people were asked.
    """

    equal: Mapping[str, Estimate | str]
    votes: Votes | str
    errors: PanelAgreement | str | None


def or_reason(statistic: Callable[[], T]) -> T | str:
    """A statistic; where its data do not determine it, what it expected and found. Other faults are raised."""
    try:
        return statistic()
    except ValueError as error:
        if ': expected ' not in str(error):
            raise
        return str(error)


def judge_agreement(
    preferences: Mapping[str, np.ndarray], clusters: Sequence[Hashable], people: np.ndarray | None = None
) -> JudgeAgreement:
    """The agreement of two judges or more.

    Args:
        preferences: by judge, [N], from 0 to 1; NaN is a failure.
        clusters: [N], what intervals resample.
        people: [N], people's preferences, NaN where they were not asked; None: they were not.
    """

    def equal(judge: str, other: str) -> Estimate | str:
        near = 1 - np.abs(preferences[judge] - preferences[other])
        return or_reason(lambda: cluster_shares([near], clusters, nan='missing')[0])

    return JudgeAgreement(
        equal={f'{one} and {other}': equal(one, other) for one, other in itertools.combinations(preferences, 2)},
        votes=or_reason(lambda: votes_of(preferences, clusters)),
        errors=None if people is None else or_reason(lambda: panel_agreement(preferences, people, clusters)),
    )
