"""Outcomes of every assistant on the same examples, by themselves and against the initial assistant.

1. `outcomes_of`: columns of a measure's stages -> arrays. A conversation without a score is missing in all of them.
2. `compare`: each assistant against the initial one, example by example.
3. `summarise`: means and shares, with intervals over clusters: of these checkpoints only.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from simrl.evaluation.position import Votes, votes_of
from simrl.evaluation.results.measures import INITIAL, AssistantResult, Bounds
from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import cluster_bootstraps, spearman
from simrl.evaluation.win_rate import Prefer, prefer_higher, preferences
from simrl.rewards.rubric import JUDGE_PART

COUNTS = ('assistant_turns', 'truncated', 'user_truncated')
TOKENS = 'assistant_tokens'  # a column that results of an earlier version do not have
COLUMNS = ('example', 'cluster', 'cause', 'score', 'end', *COUNTS)  # of every measure; others are the scene's own


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Outcomes of one assistant, one entry per example.

    Attributes:
        examples: ids.
        clusters: what intervals resample: examples of one cluster (a person, an opening) stay together.
        cause: why an example has no outcome; '' where it has one.
        score: float64 [N]; NaN without an outcome.
        end: reasons for ending; '' without an outcome.
        assistant_turns, truncated, user_truncated: int64 [N], messages of the assistant, those of them that reached
            max_new_tokens, and the same of the user; 0 without an outcome.
        parts: further numbers by name, float64 [N]; NaN without an outcome.
        labels: further labels by name; '' without an outcome.
        assistant_tokens: float64 [N], tokens of all messages of the assistant; NaN without an outcome. None in results
            of an earlier version.
    """

    examples: tuple[str, ...]
    clusters: tuple[str, ...]
    cause: tuple[str, ...]
    score: np.ndarray
    end: tuple[str, ...]
    assistant_turns: np.ndarray
    truncated: np.ndarray
    user_truncated: np.ndarray
    parts: dict[str, np.ndarray]
    labels: dict[str, tuple[str, ...]]
    assistant_tokens: np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        """bool [N], True where there is an outcome."""
        return np.isfinite(self.score)


def outcomes_of(assistant: str, columns: Mapping[str, Sequence[Any]]) -> Outcomes:
    """Columns as arrays.

    Args:
        assistant: its name in errors.
        columns: those of `COLUMNS`; others of numbers become `parts`, of strings `labels`. Where there is a cause, all
            others but the example and its cluster are None.

    Raises:
        ValueError: a column is missing, is empty, or has another length than the others; no example has an outcome; a
            value is missing that has no cause, or the other way round.
    """
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f'outcomes of {assistant!r}: expected a column {missing[0]!r}, found {sorted(columns)}')
    lengths = {name: len(values) for name, values in columns.items()}
    if min(lengths.values()) < 1 or len(set(lengths.values())) > 1:
        raise ValueError(f'outcomes of {assistant!r}: expected columns of one length, at least 1, found {lengths}')
    there = [row for row, cause in enumerate(columns['cause']) if not cause]
    if not there:
        raise ValueError(f'outcomes of {assistant!r}: expected an example with an outcome, found none')
    for name, values in columns.items():
        if name in ('example', 'cluster', 'cause'):
            continue
        found = {row for row, value in enumerate(values) if value is not None and value == value}  # NaN differs
        if wrong := sorted(found ^ {*there}):
            row = wrong[0]
            raise ValueError(
                f'outcomes of {assistant!r}: expected a {name!r} of example {columns["example"][row]!r} if and only if '
                f'it has no cause, found {values[row]!r} with the cause {columns["cause"][row]!r}'
            )

    def filled(name: str, missing: float | str) -> list[Any]:
        return [missing if value is None else value for value in columns[name]]

    own = [name for name in columns if name not in (*COLUMNS, TOKENS)]
    labels = {name: tuple(filled(name, '')) for name in own if isinstance(columns[name][there[0]], str)}
    return Outcomes(
        examples=tuple(columns['example']),
        clusters=tuple(columns['cluster']),
        cause=tuple(columns['cause']),
        score=np.array(filled('score', np.nan), np.float64),
        end=tuple(filled('end', '')),
        **{name: np.array(filled(name, 0), np.int64) for name in COUNTS},
        parts={name: np.array(filled(name, np.nan), np.float64) for name in own if name not in labels},
        labels=labels,
        assistant_tokens=np.array(filled(TOKENS, np.nan), np.float64) if TOKENS in columns else None,
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """One assistant against the initial one on the same examples; all float64 [N], NaN where either has no outcome.

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
        ValueError: without the initial assistant, with an example that comes twice, with other examples or clusters
            than its own, or with an outcome on none that has one with the initial assistant too.
    """
    if INITIAL not in outcomes:
        raise ValueError(f'outcomes: expected {INITIAL!r} among the assistants, found {", ".join(outcomes) or "none"}')
    initial = outcomes[INITIAL]
    (example, times), *_ = collections.Counter(initial.examples).most_common(1)
    if times > 1:
        raise ValueError(f'outcomes of {INITIAL!r}: expected each example once, found {example!r} {times} times')
    compared = {}
    for name, found in outcomes.items():
        if found.examples != initial.examples:
            raise ValueError(
                f'outcomes of {name!r}: expected the {len(initial.examples)} examples of {INITIAL!r} in their order, '
                f'found {len(found.examples)}, {len({*found.examples} & {*initial.examples})} of them the same'
            )
        if wrong := [x for x in zip(found.examples, found.clusters, initial.clusters, strict=True) if x[1] != x[2]]:
            example, cluster, expected = wrong[0]
            raise ValueError(
                f'outcomes of {name!r}: expected the cluster {expected!r} of example {example!r}, as with {INITIAL!r}, '
                f'found {cluster!r}'
            )
        if name != INITIAL:
            if not (found.judged & initial.judged).any():
                raise ValueError(f'outcomes of {name!r}: expected an example with one of {INITIAL!r} too, found none')
            compared[name] = Compared(
                gain=found.score - initial.score,
                preferred=_preferred(found, initial, prefer),
                higher=None if prefer is prefer_higher else _preferred(found, initial, prefer_higher),
            )
    return compared


def _preferred(found: Outcomes, initial: Outcomes, prefer: Prefer) -> np.ndarray:
    """The probability that an assistant is preferred to the initial one, NaN where either has no outcome."""
    both = found.judged & initial.judged
    values = np.full(len(both), np.nan)
    values[both] = preferences(found.score[both].tolist(), initial.score[both].tolist(), prefer)
    return values


def with_common_parts(outcomes: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
    """The outcomes with the parts that all of them have: a stage of an earlier version may have fewer."""
    common = set.intersection(*(set(found.parts) for found in outcomes.values()))
    return {
        name: dataclasses.replace(found, parts={part: x for part, x in found.parts.items() if part in common})
        for name, found in outcomes.items()
    }


def judge_parts(outcomes: Sequence[Outcomes]) -> list[str]:
    """The parts of a panel's judges that all outcomes have; empty without two judges."""
    names = [part for part in outcomes[0].parts if part.startswith(JUDGE_PART)]
    common = [name for name in names if all(name in found.parts for found in outcomes)]
    return common if len(common) > 1 else []


def panel_votes(outcomes: Sequence[Outcomes]) -> Votes | None:
    """The worth of a panel's judges as votes, by their scores in all outcomes (`position.votes_of`).

    Returns:
        None without two judges' parts, or where a judge always gives the same score.
    """
    judges = judge_parts(outcomes)
    if not judges:
        return None
    scores = {judge: np.concatenate([found.parts[judge] for found in outcomes]) for judge in judges}
    votes = votes_of(scores, [cluster for found in outcomes for cluster in found.clusters])
    return None if votes.mean_correlation is None else votes


def failed_as(preferred: np.ndarray, value: float) -> np.ndarray:
    """Preferences with every example that has none counted as `value`: 0 as lost, 1 as won."""
    return np.where(np.isnan(preferred), value, preferred)


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
            rates = {'win_rate': compared[name].preferred, 'strict_win_rate': compared[name].higher}
            for kind, preferred in rates.items():
                if preferred is not None:
                    shares[name, kind] = preferred
                    if np.isnan(preferred).any():
                        shares[name, f'{kind} lost'] = failed_as(preferred, 0.0)
                        shares[name, f'{kind} won'] = failed_as(preferred, 1.0)
    clusters = outcomes[INITIAL].clusters
    bootstrapped = cluster_bootstraps(
        list(values.values()), clusters, level=level, resamples=resamples, seed=seed, nan='missing'
    )
    estimates = dict(zip(values, bootstrapped, strict=True))
    if shares:
        estimates |= zip(
            shares, cluster_shares(list(shares.values()), clusters, level=level, nan='missing'), strict=True
        )

    def bounds(name: str, kind: str) -> Bounds | None:
        known = (name, f'{kind} lost') in estimates
        return Bounds(estimates[name, f'{kind} lost'], estimates[name, f'{kind} won']) if known else None

    judged = {name: found.judged for name, found in outcomes.items()}
    ends = sorted({end for name, found in outcomes.items() for end in compress(found.end, judged[name])})
    kinds = {
        label: sorted({kind for name, x in outcomes.items() for kind in compress(x.labels[label], judged[name])})
        for label in outcomes[INITIAL].labels
    }
    return {
        name: AssistantResult(
            score=estimates[name, 'score'],
            parts={part: estimates[name, f'parts.{part}'] for part in found.parts},
            assistant_turns=float(found.assistant_turns[judged[name]].mean()),
            ends=_shares(compress(found.end, judged[name]), ends),
            labels={
                label: _shares(compress(found.labels[label], judged[name]), among) for label, among in kinds.items()
            },
            truncated=float(found.truncated.sum() / max(1, found.assistant_turns.sum())),
            user_truncated=float((found.user_truncated[judged[name]] > 0).mean()),
            causes=dict(sorted(collections.Counter(cause for cause in found.cause if cause).items())),
            gain=estimates.get((name, 'gain')),
            win_rate=estimates.get((name, 'win_rate')),
            strict_win_rate=estimates.get((name, 'strict_win_rate')),
            win_rate_bounds=bounds(name, 'win_rate'),
            strict_win_rate_bounds=bounds(name, 'strict_win_rate'),
            message_tokens=None if found.assistant_tokens is None else _tokens_per_message(found),
            length_correlation=None
            if found.assistant_tokens is None
            else spearman(found.score[judged[name]], found.assistant_tokens[judged[name]]),
        )
        for name, found in outcomes.items()
    }


def _tokens_per_message(found: Outcomes) -> float:
    assert found.assistant_tokens is not None
    return float(np.nansum(found.assistant_tokens) / max(1, found.assistant_turns.sum()))


def _shares(values: Iterable[str], kinds: Sequence[str]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {kind: counts[kind] / counts.total() for kind in kinds}
