"""How the same new people fared with every assistant -> people.json and claims.json.

1. `outcomes_of` turns one row per person into arrays, for each assistant.
2. `summarise_people`: each assistant by itself and against the initial one, with intervals over people.
3. `claims_over_seeds`: each arm over its training seeds, and pairs of arms over the seeds that both have.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from simrl.evaluation.recovered import RecoveredShare, recovered_shares
from simrl.evaluation.results import (
    INITIAL,
    ORACLE,
    ArmClaim,
    AssistantResult,
    ClaimsResult,
    DifferenceClaim,
    PeopleResult,
    World,
)
from simrl.evaluation.statistics import cluster_bootstraps, paired_difference, t_interval
from simrl.evaluation.win_rate import wins

T = TypeVar('T')
Vote = Callable[[float, float], float]  # satisfactions with two assistants -> how likely a person prefers the first

ENDS = ('accepted', 'left', 'turns')
# What is claimed about simulators, beside the sizes of one: the first minus the second.
PAIRS = (('persona', 'role_play'), ('fine_tuned', 'role_play'), ('fine_tuned', 'persona'), (ORACLE, 'fine_tuned'))
_SEED = '/seed-'
_TYPES = {
    'satisfaction': (int, float),
    'share_met': (int, float),
    'left': (bool,),
    'accepted': (bool,),
    'assistant_turns': (int,),
    'first_act': (str,),
    'truncated': (int,),
}


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What one assistant was worth to each person; all [people].

    Attributes:
        satisfaction, share_met: float64.
        end: of `ENDS`.
        assistant_turns, truncated: numbers of the assistant's messages, and of those that the budget cut.
        first_act: what the assistant did first.
    """

    satisfaction: np.ndarray
    share_met: np.ndarray
    end: tuple[str, ...]
    assistant_turns: np.ndarray
    truncated: np.ndarray
    first_act: tuple[str, ...]


def outcomes_of(assistant: str, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
    """One row per person as arrays.

    Args:
        assistant: what errors call it.
        rows: `{satisfaction, share_met, left, accepted, assistant_turns, first_act, truncated}`, other keys are
            ignored; `truncated` counts the assistant's messages that the budget cut.

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
        first_act=tuple(row['first_act'] for row in rows),
    )


def summarise_people(
    outcomes: Mapping[str, Outcomes],
    people: Sequence[Hashable],
    *,
    vote: Vote,
    dial: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PeopleResult:
    """people.json: every assistant on the same people, by itself and against the initial one.

    Args:
        outcomes: of each assistant, 'initial' among them; people in the same order for all.
        people: [people], their names: the clusters of the bootstrap.
        vote: how likely a person prefers the first of two satisfactions.
        dial: of the world.
        level, resamples, seed: of the bootstrap; all measures share its draws.

    Raises:
        ValueError: without the initial assistant, or with other numbers of people.
    """
    initial = _initial(outcomes, people)
    measures: dict[tuple[str, str], np.ndarray] = {}
    for name, found in outcomes.items():
        measures[name, 'satisfaction'] = found.satisfaction
        measures[name, 'share_met'] = found.share_met
        if name != INITIAL:
            measures[name, 'gain'] = found.satisfaction - initial.satisfaction
            measures[name, 'win_rate'] = votes(vote, found.satisfaction, initial.satisfaction)
            measures[name, 'strict_win_rate'] = np.array(
                wins(found.satisfaction.tolist(), initial.satisfaction.tolist())
            )
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
                gain=estimates.get((name, 'gain')),
                win_rate=estimates.get((name, 'win_rate')),
                strict_win_rate=estimates.get((name, 'strict_win_rate')),
            )
            for name, found in outcomes.items()
        },
    )


def claims_over_seeds(
    outcomes: Mapping[str, Outcomes],
    people: Sequence[Hashable],
    *,
    vote: Vote,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> ClaimsResult:
    """claims.json: each arm over its training seeds, and the differences of `pairs_of` over the seeds that both have.

    A pair without a common seed has no difference and is left out.

    Args:
        outcomes, people, vote: as for `summarise_people`.
        level: of all intervals.
        resamples, seed: of the bootstraps over people (recovered shares, and differences of these checkpoints).

    Raises:
        ValueError: as `summarise_people`, or an assistant that is neither 'initial' nor 'ARM/seed-K'.
    """
    initial = _initial(outcomes, people)
    runs: dict[str, dict[int, str]] = {}  # arm -> seed -> assistant
    for name in outcomes:
        if name != INITIAL:
            arm, number = split_name(name)
            runs.setdefault(arm, {})[number] = name
    scores = {name: found.satisfaction for name, found in outcomes.items()}
    satisfaction = {name: float(found.mean()) for name, found in scores.items()}
    share_met = {name: float(found.share_met.mean()) for name, found in outcomes.items()}
    win_rate = {name: float(votes(vote, found, initial.satisfaction).mean()) for name, found in scores.items()}
    strict = {
        name: float(np.mean(wins(found.tolist(), initial.satisfaction.tolist()))) for name, found in scores.items()
    }

    def over_seeds(arm: str, values: Mapping[str, float]) -> list[float]:
        return [values[name] for _, name in sorted(runs[arm].items())]

    by_arm = {arm: np.stack([scores[name] for name in seeds.values()]) for arm, seeds in runs.items()}
    if ORACLE in by_arm:
        recovered = recovered_shares(
            by_arm, initial.satisfaction, by_arm[ORACLE], people, level=level, resamples=resamples, seed=seed
        )
    else:
        no_oracle = RecoveredShare(None, None, None, 'no assistant was trained against people', len(people), level)
        recovered = dict.fromkeys(by_arm, no_oracle)

    shared = {pair: sorted(runs[pair[0]].keys() & runs[pair[1]].keys()) for pair in pairs_of(tuple(runs))}
    shared = {pair: seeds for pair, seeds in shared.items() if seeds}

    def of_pair(pair: tuple[str, str], values: Mapping[str, T]) -> tuple[list[T], list[T]]:
        first, second = ([values[runs[arm][number]] for number in shared[pair]] for arm in pair)
        return first, second

    gaps = [by_arm[arm].mean(0) - initial.satisfaction for arm in runs]
    gaps.extend(np.mean(first, 0) - np.mean(second, 0) for first, second in (of_pair(pair, scores) for pair in shared))
    over_people = cluster_bootstraps(gaps, people, level=level, resamples=resamples, seed=seed)
    return ClaimsResult(
        seeds=tuple(sorted({number for seeds in runs.values() for number in seeds})),
        arms={
            arm: ArmClaim(
                satisfaction=t_interval(over_seeds(arm, satisfaction), level=level),
                share_met=t_interval(over_seeds(arm, share_met), level=level),
                gain=t_interval(
                    [score - satisfaction[INITIAL] for score in over_seeds(arm, satisfaction)], level=level, null=0.0
                ),
                win_rate=t_interval(over_seeds(arm, win_rate), level=level, null=0.5),
                strict_win_rate=t_interval(over_seeds(arm, strict), level=level, null=0.5),
                gain_over_people=gain,
                recovered=recovered[arm],
            )
            for arm, gain in zip(runs, over_people[: len(runs)], strict=True)
        },
        differences={
            ' - '.join(pair): DifferenceClaim(
                satisfaction=paired_difference(*of_pair(pair, satisfaction), level=level),
                win_rate=paired_difference(*of_pair(pair, win_rate), level=level),
                satisfaction_over_people=difference,
            )
            for pair, difference in zip(shared, over_people[len(runs) :], strict=True)
        },
    )


def votes(vote: Vote, satisfaction: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[people] the expected vote of each person between two assistants."""
    return np.array([vote(x, y) for x, y in zip(satisfaction.tolist(), other.tolist(), strict=True)], np.float64)


def split_name(assistant: str) -> tuple[str, int]:
    """'ARM/seed-K' -> (ARM, K).

    Raises:
        ValueError: any other name.
    """
    arm, _, number = assistant.rpartition(_SEED)
    if not arm or not number.isdecimal() or number != str(int(number)):
        raise ValueError(f"expected an assistant called 'initial' or 'ARM/seed-K', found {assistant!r}")
    return arm, int(number)


def pairs_of(arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of arms that are compared: those of `PAIRS`, and neighbouring sizes of one simulator, larger first."""
    sizes = itertools.chain.from_iterable(
        ((f'{arm}-large', arm), (arm, f'{arm}-small')) for arm in arms if '-' not in arm
    )
    return tuple(pair for pair in (*PAIRS, *sizes) if set(pair) <= set(arms))


def _initial(outcomes: Mapping[str, Outcomes], people: Sequence[Hashable]) -> Outcomes:
    if INITIAL not in outcomes:
        raise ValueError(f'outcomes: expected {INITIAL!r} among the assistants, found {", ".join(outcomes) or "none"}')
    for name, found in outcomes.items():
        if len(found.satisfaction) != len(people):
            raise ValueError(f'outcomes of {name!r}: expected {len(people)} people, found {len(found.satisfaction)}')
    return outcomes[INITIAL]


def _shares(values: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {kind: counts[kind] / len(values) for kind in kinds}
