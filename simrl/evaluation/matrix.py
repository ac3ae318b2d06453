"""The cross-simulator matrix: every assistant with every simulator, on the same examples.

1. Cells: the mean score of an assistant with a simulator, its interval over conversations: of this checkpoint only.
2. `transfers`: each arm minus the initial assistant, by simulator; their means over simulators of other kinds and over
   held-out ones.
3. `differences`: each pair of arms, by simulator.

Differences are paired by conversation: with the same simulator, from the same example, with the same seed of sampling.
Beside their interval over training seeds stands one over conversations, of these checkpoints only. A simulator that is
trained anew for each training seed is another user in each; the initial assistant meets all of them.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from simrl.evaluation.comparisons import Runs, paired, pairs_of
from simrl.evaluation.outcomes import Outcomes, judge_parts, panel_votes
from simrl.evaluation.results.measures import INITIAL, Arm
from simrl.evaluation.results.simulators import MatrixResult, SimulatorDifference, Transfer
from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import Estimate, cluster_bootstraps, mean_over_seeds, present_mean

Met = Mapping[str, Mapping[str, Outcomes]]  # assistant -> simulator -> outcomes
Scores = Mapping[str, Mapping[str, np.ndarray]]  # the same, scores alone; NaN without one
Pair = tuple[str, str]  # of arms
OTHER_KINDS, HELD_OUT = 'other kinds', 'held out'  # groups of simulators


def matrix_of(
    met: Met,
    simulators: Mapping[str, str],
    runs: Runs,
    arms: Mapping[str, Arm],
    *,
    score: str,
    times: int = 1,
    people: tuple[str, Mapping[str, Outcomes]] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MatrixResult:
    """The matrix, and the differences between its assistants.

    Args:
        met: 'initial' first. A trained assistant met one simulator of each arm, the initial assistant all of them.
        simulators: simulator -> its arm. An arm has several where they are trained anew for each training seed.
        runs: the runs of each arm.
        arms: those of `simulators` and `runs`.
        score, times: as in `MatrixResult`.
        people: the name of a measure with the same score, and its outcomes; it becomes the last user.
        level: of all intervals.
        resamples, seed: of the bootstraps over clusters of examples.

    Raises:
        ValueError: a cell has other examples than another, or one twice; two assistants share no conversation with a
            score.
    """
    clusters = _clusters_of(met)
    scores = {who: {name: x.score for name, x in found.items()} for who, found in met.items()}
    gains = transfers(runs, arms, simulators, scores, level=level)
    bootstraps = functools.partial(cluster_bootstraps, level=level, resamples=resamples, seed=seed, nan='missing')
    rows = {}
    for user in dict.fromkeys(simulators[name] for name in met[INITIAL]):
        with_user = {who: {name: x for name, x in of.items() if simulators[name] == user} for who, of in scores.items()}
        rows[user] = _row(with_user, runs)
    groups = {
        (arm, group): mean_over_seeds([mean_over_seeds(rows[user].gains[arm]) for user in users])
        for arm in runs
        for group, users in _groups(arm, rows, arms).items()
        if users
    }
    measures = [*(values for row in rows.values() for values in row.measures), *groups.values()]
    estimates = iter(bootstraps(measures, clusters=clusters))
    found = {user: _estimated(user, row, estimates, level) for user, row in rows.items()}
    over_groups = dict(zip(groups, estimates, strict=True))
    shown = {user: (cells, row.counts) for (user, row), (cells, _, _) in zip(rows.items(), found.values(), strict=True)}
    if people is not None:
        name, outcomes = people
        with_people = [outcomes[who].score for who in met]
        cells = bootstraps(with_people, clusters=outcomes[INITIAL].clusters)
        shown[name] = cells, [_counts([x]) for x in with_people]
    causes = collections.Counter(cause for of in met.values() for x in of.values() for cause in x.cause if cause)
    return MatrixResult(
        score=score,
        users=tuple(shown),
        people=people and people[0],
        assistants=tuple(met),
        mean=tuple(tuple(cell.mean for cell in row) for row, _ in shown.values()),
        low=tuple(tuple(cell.low for cell in row) for row, _ in shown.values()),
        high=tuple(tuple(cell.high for cell in row) for row, _ in shown.values()),
        conversations=tuple(tuple(judged for judged, _ in counts) for _, counts in shown.values()),
        failed=tuple(tuple(failed for _, failed in counts) for _, counts in shown.values()),
        causes=dict(sorted(causes.items())),
        transfers={
            arm: dataclasses.replace(
                gain,
                checkpoints={user: by_arm[arm] for user, (_, by_arm, _) in found.items()},
                checkpoint_other_kinds=over_groups.get((arm, OTHER_KINDS)),
                checkpoint_held_out=over_groups.get((arm, HELD_OUT)),
            )
            for arm, gain in gains.items()
        },
        times=times,
        differences=tuple(difference for _, _, differences in found.values() for difference in differences),
        judges=_by_judge(met, simulators),
        votes=panel_votes([x for of in met.values() for x in of.values()]),
    )


def _by_judge(met: Met, simulators: Mapping[str, str]) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Mean scores with each simulator of each assistant, by the part of each judge of a panel."""

    def mean(judge: str, user: str, of: Mapping[str, Outcomes]) -> float:
        return present_mean(np.concatenate([x.parts[judge] for name, x in of.items() if simulators[name] == user]))

    users = dict.fromkeys(simulators[name] for name in met[INITIAL])
    return {
        judge: tuple(tuple(mean(judge, user, of) for of in met.values()) for user in users)
        for judge in judge_parts([x for of in met.values() for x in of.values()])
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """Scores with one simulator; several arrays `[N]` are of several training seeds.

    Attributes:
        columns: of each assistant; of the initial one, with each training of the simulator.
        gains: of each arm, minus the initial assistant's with the same simulator.
        differences: of two arms, the first minus the second in each training seed that both have.
        seeds: these seeds.
    """

    columns: list[list[np.ndarray]]
    gains: dict[str, list[np.ndarray]]
    differences: dict[Pair, list[np.ndarray]]
    seeds: dict[Pair, list[int]]

    @property
    def measures(self) -> list[np.ndarray]:
        """Means over training seeds by conversation: of columns, gains and differences."""
        return [mean_over_seeds(x) for x in (*self.columns, *self.gains.values(), *self.differences.values())]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Of each assistant, the conversations with a score, and those without."""
        return [_counts(column) for column in self.columns]


def _row(met: Scores, runs: Runs) -> _Row:
    """The row of a simulator; `met` has its trainings alone."""
    own = {who: next(iter(found)) for who, found in met.items() if who != INITIAL}
    shared = pairs_of(runs)
    return _Row(
        columns=[list(found.values()) for found in met.values()],
        gains={arm: [_gain(met, who, own[who]) for who in of.values()] for arm, of in runs.items()},
        differences={
            pair: [paired(*(_cell(met, runs[arm][seed], own[runs[arm][seed]]) for arm in pair)) for seed in seeds]
            for pair, seeds in shared.items()
        },
        seeds=shared,
    )


def _cell(met: Scores, who: str, simulator: str) -> tuple[str, np.ndarray]:
    """Scores with a name for `paired`."""
    return f'{who} with {simulator}', met[who][simulator]


def _gain(met: Scores, who: str, simulator: str) -> np.ndarray:
    """An assistant's scores minus those of the initial one with the same simulator."""
    return paired(_cell(met, who, simulator), _cell(met, INITIAL, simulator))


def _estimated(
    user: str, row: _Row, estimates: Iterator[Estimate], level: float
) -> tuple[list[Estimate], dict[str, Estimate], list[SimulatorDifference]]:
    """The cells of a row, its gains by arm and its differences; takes the estimates of `row.measures`."""
    cells = list(itertools.islice(estimates, len(row.columns)))
    gains = {arm: next(estimates) for arm in row.gains}
    differences = [
        SimulatorDifference(
            user,
            *pair,
            seeds=tuple(row.seeds[pair]),
            score=t_interval([present_mean(x) for x in of_seeds], level=level, null=0.0),
            checkpoint_score=next(estimates),
        )
        for pair, of_seeds in row.differences.items()
    ]
    return cells, gains, differences


def transfers(
    runs: Runs,
    arms: Mapping[str, Arm],
    simulators: Mapping[str, str],
    met: Scores,
    *,
    level: float = 0.95,
) -> dict[str, Transfer]:
    """The gain of each arm over the initial assistant with each arm's simulator, over the arm's training seeds.

    Args:
        runs: the runs of each arm.
        arms: the kinds of simulators.
        simulators: simulator -> its arm. An arm has several where they are trained anew for each training seed.
        met: assistant -> simulator -> scores of the same examples, NaN where there is none. The initial assistant met
            every simulator that a run met.
        level: of the intervals.
    """
    found = {}
    for arm, assistants in runs.items():
        gains: dict[str, list[float]] = {}  # arm of the simulator -> gain by training seed
        for assistant in assistants.values():
            for simulator in met[assistant]:
                gains.setdefault(simulators[simulator], []).append(present_mean(_gain(met, assistant, simulator)))
        means = {
            group: t_interval(np.mean([gains[user] for user in users], 0), level=level, null=0.0)
            for group, users in _groups(arm, gains, arms).items()
            if users
        }
        found[arm] = Transfer(
            seeds=tuple(assistants),
            simulators={other: t_interval(values, level=level, null=0.0) for other, values in gains.items()},
            other_kinds=means.get(OTHER_KINDS),
            held_out=means.get(HELD_OUT),
        )
    return found


def _groups(arm: str, users: Iterable[str], arms: Mapping[str, Arm]) -> dict[str, list[str]]:
    """The simulators of other kinds than an arm's own, and the held-out ones."""
    return {
        OTHER_KINDS: [user for user in users if arms[user].kind != arms[arm].kind],
        HELD_OUT: [user for user in users if arms[user].held_out],
    }


def _counts(columns: Sequence[np.ndarray]) -> tuple[int, int]:
    """The conversations with a score, and those without."""
    judged = sum(int(np.isfinite(scores).sum()) for scores in columns)
    return judged, sum(map(len, columns)) - judged


def _clusters_of(met: Met) -> Sequence[Hashable]:
    """The clusters of the examples, which are the same in every cell."""
    first = next(iter(met[INITIAL].values()))
    if len(set(first.examples)) < len(first.examples):
        twice, _ = collections.Counter(first.examples).most_common(1)[0]
        raise ValueError(f'matrix: expected each example once, found {twice!r} more often')
    for who, found in met.items():
        for name, x in found.items():
            if (x.examples, x.clusters) != (first.examples, first.clusters):
                raise ValueError(
                    f'matrix: expected the {len(first.examples)} examples of every cell in their order, found '
                    f'{len(x.examples)} of {who!r} with {name!r}, {len({*x.examples} & {*first.examples})} of them the '
                    'same'
                )
    return first.clusters
