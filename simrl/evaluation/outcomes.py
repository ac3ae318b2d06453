"""Outcomes of every assistant on the same examples, by themselves and against the initial assistant.

1. `outcomes_of`: columns of a measure's stages -> arrays.
2. `compare`: each assistant against the initial one, example by example.
3. `summarise`: means and shares, with intervals over clusters: of these checkpoints only.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simrl.evaluation.results import INITIAL, AssistantResult
from simrl.evaluation.statistics import cluster_bootstraps, cluster_shares
from simrl.evaluation.win_rate import Prefer, prefer_higher, preferences

COUNTS = ('assistant_turns', 'truncated', 'user_truncated')
COLUMNS = ('example', 'cluster', 'score', 'end', *COUNTS)  # of every measure; others are the scene's own


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Outcomes of one assistant, one entry per example.

    Attributes:
        examples: ids.
        clusters: what intervals resample: examples of one cluster (a person, an opening) stay together.
        score: float64 [N].
        end: reasons for ending.
        assistant_turns, truncated, user_truncated: int64 [N], messages of the assistant, those of them that reached
            max_new_tokens, and the same of the user.
        parts: further numbers by name, float64 [N].
        labels: further labels by name.
    """

    examples: tuple[str, ...]
    clusters: tuple[str, ...]
    score: np.ndarray
    end: tuple[str, ...]
    assistant_turns: np.ndarray
    truncated: np.ndarray
    user_truncated: np.ndarray
    parts: dict[str, np.ndarray]
    labels: dict[str, tuple[str, ...]]


def outcomes_of(assistant: str, columns: Mapping[str, Sequence[Any]]) -> Outcomes:
    """Columns as arrays.

    Args:
        assistant: its name in errors.
        columns: those of `COLUMNS`; others of numbers become `parts`, of strings `labels`.

    Raises:
        ValueError: a column is missing, is empty, or has another length than the others.
    """
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f'outcomes of {assistant!r}: expected a column {missing[0]!r}, found {sorted(columns)}')
    lengths = {name: len(values) for name, values in columns.items()}
    if min(lengths.values()) < 1 or len(set(lengths.values())) > 1:
        raise ValueError(f'outcomes of {assistant!r}: expected columns of one length, at least 1, found {lengths}')
    own = {name: values for name, values in columns.items() if name not in COLUMNS}
    labels = {name: tuple(values) for name, values in own.items() if isinstance(values[0], str)}
    return Outcomes(
        examples=tuple(columns['example']),
        clusters=tuple(columns['cluster']),
        score=np.array(columns['score'], np.float64),
        end=tuple(columns['end']),
        **{name: np.array(columns[name], np.int64) for name in COUNTS},
        parts={name: np.array(values, np.float64) for name, values in own.items() if name not in labels},
        labels=labels,
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """One assistant against the initial one on the same examples; all float64 [N].

    Attributes:
        gain: the score minus the initial assistant's.
        preferred: the probability that this assistant is preferred to the initial one.
        higher: 1 where the score is higher, 0 where it is lower, 1/2 for a tie; None where `preferred` is just that.
    """

    gain: np.ndarray
    preferred: np.ndarray
    higher: np.ndarray | None


def compare(outcomes: Mapping[str, Outcomes], prefer: Prefer = prefer_higher) -> dict[str, Compared]:
    """Every assistant but the initial one against it.

    Args:
        outcomes: of each assistant, 'initial' among them.
        prefer: the probability that the first of two scores is preferred.

    Raises:
        ValueError: without the initial assistant, or with other examples than its own.
    """
    if INITIAL not in outcomes:
        raise ValueError(f'outcomes: expected {INITIAL!r} among the assistants, found {", ".join(outcomes) or "none"}')
    initial = outcomes[INITIAL]
    base = initial.score.tolist()
    compared = {}
    for name, found in outcomes.items():
        if found.examples != initial.examples:
            raise ValueError(
                f'outcomes of {name!r}: expected the {len(base)} examples of {INITIAL!r} in their order, found '
                f'{len(found.examples)}, {len({*found.examples} & {*initial.examples})} of them the same'
            )
        if name != INITIAL:
            scores = found.score.tolist()
            compared[name] = Compared(
                gain=found.score - initial.score,
                preferred=np.array(preferences(scores, base, prefer)),
                higher=None if prefer is prefer_higher else np.array(preferences(scores, base)),
            )
    return compared


def summarise(
    outcomes: Mapping[str, Outcomes],
    compared: Mapping[str, Compared],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, AssistantResult]:
    """Every assistant by itself and against the initial one.

    Args:
        outcomes: of each assistant, 'initial' among them.
        compared: of each but the initial one, from `compare`.
        level: of all intervals.
        resamples, seed: of the bootstrap over clusters, for all but win rates; all estimates share its draws.
    """
    values: dict[tuple[str, str], np.ndarray] = {}
    shares: dict[tuple[str, str], np.ndarray] = {}
    for name, found in outcomes.items():
        values[name, 'score'] = found.score
        values.update({(name, f'parts.{part}'): x for part, x in found.parts.items()})
        if name in compared:
            values[name, 'gain'] = compared[name].gain
            shares[name, 'win_rate'] = compared[name].preferred
            if (higher := compared[name].higher) is not None:
                shares[name, 'strict_win_rate'] = higher
    clusters = outcomes[INITIAL].clusters
    bootstrapped = cluster_bootstraps(list(values.values()), clusters, level=level, resamples=resamples, seed=seed)
    estimates = dict(zip(values, bootstrapped, strict=True))
    if shares:
        estimates |= zip(shares, cluster_shares(list(shares.values()), clusters, level=level), strict=True)
    ends = sorted({end for found in outcomes.values() for end in found.end})
    kinds = {
        label: sorted({kind for found in outcomes.values() for kind in found.labels[label]})
        for label in outcomes[INITIAL].labels
    }
    return {
        name: AssistantResult(
            score=estimates[name, 'score'],
            parts={part: estimates[name, f'parts.{part}'] for part in found.parts},
            assistant_turns=float(found.assistant_turns.mean()),
            ends=_shares(found.end, ends),
            labels={label: _shares(found.labels[label], among) for label, among in kinds.items()},
            truncated=float(found.truncated.sum() / max(1, found.assistant_turns.sum())),
            user_truncated=float((found.user_truncated > 0).mean()),
            gain=estimates.get((name, 'gain')),
            win_rate=estimates.get((name, 'win_rate')),
            strict_win_rate=estimates.get((name, 'strict_win_rate')),
        )
        for name, found in outcomes.items()
    }


def _shares(values: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {kind: counts[kind] / len(values) for kind in kinds}
