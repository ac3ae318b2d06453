"""How the same new people fared with every assistant -> people.json.

1. `outcomes_of` turns one row per person into arrays, for each assistant; `compare` sets it against the initial one.
2. `summarise_people`: each assistant by itself and against the initial one, with intervals over people.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from simrl.evaluation.results import INITIAL, AssistantResult, PeopleResult, World
from simrl.evaluation.statistics import cluster_bootstraps
from simrl.evaluation.win_rate import wins

Vote = Callable[[float, float], float]  # satisfactions with two assistants -> how likely a person prefers the first

ENDS = ('accepted', 'left', 'turns')
_SEED = '/seed-'
_TYPES = {
    'satisfaction': (int, float),
    'share_met': (int, float),
    'left': (bool,),
    'accepted': (bool,),
    'assistant_turns': (int,),
    'first_act': (str,),
    'truncated': (int,),
    'user_truncated': (int,),
}


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What one assistant was worth to each person; all [people].

    Attributes:
        satisfaction, share_met: float64.
        end: of `ENDS`.
        assistant_turns, truncated: numbers of the assistant's messages, and of those that the budget cut.
        user_truncated: numbers of the person's messages that the budget cut.
        first_act: what the assistant did first.
    """

    satisfaction: np.ndarray
    share_met: np.ndarray
    end: tuple[str, ...]
    assistant_turns: np.ndarray
    truncated: np.ndarray
    user_truncated: np.ndarray
    first_act: tuple[str, ...]


def outcomes_of(assistant: str, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
    """One row per person as arrays.

    Args:
        assistant: what errors call it.
        rows: `{satisfaction, share_met, left, accepted, assistant_turns, first_act, truncated,
            user_truncated}`, other keys are ignored; `truncated` counts the assistant's messages that the budget cut,
            `user_truncated` the person's.

    Raises:
        ValueError: no rows, a key that is missing or of the wrong type, or a person who both accepted and left.
    """
    if not rows:
        raise ValueError(f'outcomes of {assistant!r}: expected at least one person, found none')
    for number, row in enumerate(rows):
        for key, types in _TYPES.items():
            if key not in row:
                raise ValueError(f'outcomes of {assistant!r}, row {number}: {key} is missing, found {sorted(row)}')
            if type(row[key]) not in types:
                expected = ' or '.join(kind.__name__ for kind in types)
                raise ValueError(
                    f'outcomes of {assistant!r}, row {number}: expected {key} of type {expected}, found {row[key]!r}'
                )
        if row['left'] and row['accepted']:
            raise ValueError(f'outcomes of {assistant!r}, row {number}: expected left or accepted, found both')
    return Outcomes(
        satisfaction=np.array([row['satisfaction'] for row in rows], np.float64),
        share_met=np.array([row['share_met'] for row in rows], np.float64),
        end=tuple('accepted' if row['accepted'] else 'left' if row['left'] else 'turns' for row in rows),
        assistant_turns=np.array([row['assistant_turns'] for row in rows], np.int64),
        truncated=np.array([row['truncated'] for row in rows], np.int64),
        user_truncated=np.array([row['user_truncated'] for row in rows], np.int64),
        first_act=tuple(row['first_act'] for row in rows),
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """One assistant against the initial one on the same people; all [people], float64.

    Attributes:
        gain: satisfaction minus that with the initial assistant.
        vote: the expected vote between the two.
        win: 1 where satisfaction is higher, 0 where it is lower, 1/2 for a tie.
    """

    gain: np.ndarray
    vote: np.ndarray
    win: np.ndarray


def compare(outcomes: Mapping[str, Outcomes], *, vote: Vote) -> dict[str, Compared]:
    """Every assistant but the initial one against it.

    Args:
        outcomes: of each assistant, 'initial' among them; people in the same order for all.
        vote: how likely a person prefers the first of two satisfactions.

    Raises:
        ValueError: without the initial assistant, or with other numbers of people.
    """
    initial = _initial(outcomes).satisfaction
    return {
        name: Compared(
            gain=found.satisfaction - initial,
            vote=np.array([vote(x, y) for x, y in zip(found.satisfaction.tolist(), initial.tolist(), strict=True)]),
            win=np.array(wins(found.satisfaction.tolist(), initial.tolist())),
        )
        for name, found in outcomes.items()
        if name != INITIAL
    }


def summarise_people(
    outcomes: Mapping[str, Outcomes],
    compared: Mapping[str, Compared],
    people: Sequence[Hashable],
    *,
    dial: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PeopleResult:
    """people.json: every assistant on the same people, by itself and against the initial one.

    Args:
        outcomes: of each assistant, 'initial' among them; people in the same order for all.
        compared: what `compare` made of them.
        people: [people], their names: the clusters of the bootstrap.
        dial: of the world.
        level, resamples, seed: of the bootstrap; all measures share its draws.

    Raises:
        ValueError: other numbers of people.
    """
    measures: dict[tuple[str, str], np.ndarray] = {}
    for name, found in outcomes.items():
        measures[name, 'satisfaction'] = found.satisfaction
        measures[name, 'share_met'] = found.share_met
        if name in compared:
            measures[name, 'gain'] = compared[name].gain
            measures[name, 'win_rate'] = compared[name].vote
            measures[name, 'strict_win_rate'] = compared[name].win
    estimates = dict(
        zip(
            measures,
            cluster_bootstraps(list(measures.values()), people, level=level, resamples=resamples, seed=seed),
            strict=True,
        )
    )
    acts = sorted({act for found in outcomes.values() for act in found.first_act})
    return PeopleResult(
        World(dial=dial, people=len(people)),
        {
            name: AssistantResult(
                satisfaction=estimates[name, 'satisfaction'],
                share_met=estimates[name, 'share_met'],
                assistant_turns=float(found.assistant_turns.mean()),
                ends=_shares(found.end, ENDS),
                first_acts=_shares(found.first_act, acts),
                truncated=float(found.truncated.sum() / max(1, found.assistant_turns.sum())),
                user_truncated=float((found.user_truncated > 0).mean()),
                gain=estimates.get((name, 'gain')),
                win_rate=estimates.get((name, 'win_rate')),
                strict_win_rate=estimates.get((name, 'strict_win_rate')),
            )
            for name, found in outcomes.items()
        },
    )


def split_name(assistant: str) -> tuple[str, int]:
    """'ARM/seed-K' -> (ARM, K).

    Raises:
        ValueError: any other name.
    """
    arm, _, number = assistant.rpartition(_SEED)
    if not arm or not number.isdecimal() or number != str(int(number)):
        raise ValueError(f"expected an assistant called 'initial' or 'ARM/seed-K', found {assistant!r}")
    return arm, int(number)


def _initial(outcomes: Mapping[str, Outcomes]) -> Outcomes:
    if INITIAL not in outcomes:
        raise ValueError(f'outcomes: expected {INITIAL!r} among the assistants, found {", ".join(outcomes) or "none"}')
    number = len(outcomes[INITIAL].satisfaction)
    for name, found in outcomes.items():
        if len(found.satisfaction) != number:
            raise ValueError(f'outcomes of {name!r}: expected {number} people, found {len(found.satisfaction)}')
    return outcomes[INITIAL]


def _shares(values: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {kind: counts[kind] / len(values) for kind in kinds}
