"""What is claimed about simulators, with the training run as the unit -> claims.json.

1. Each arm over its training seeds against the initial assistant; with the recovered share of the oracle's gain.
2. Pairs of arms over the seeds that both have.
3. Transfer: what each arm gained with simulators that it did not train against.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from simrl.evaluation.gap_recovered import RecoveredShare, recovered_shares
from simrl.evaluation.people import Compared, Outcomes, split_name
from simrl.evaluation.results import INITIAL, ORACLE, ArmClaim, ClaimsResult, DifferenceClaim, TransferClaim
from simrl.evaluation.statistics import cluster_bootstraps, paired_difference, t_interval

T = TypeVar('T')

SIZES = ('large', '', 'small')  # of one simulator; '' is that of an arm that names none
# The kinds of simulators that are compared, at each size that both have: the first minus the second.
KINDS = (('persona', 'role_play'), ('fine_tuned', 'role_play'), ('fine_tuned', 'persona'))


def claims_over_seeds(
    outcomes: Mapping[str, Outcomes],
    compared: Mapping[str, Compared],
    people: Sequence[Hashable],
    *,
    met: Mapping[str, Mapping[str, float]],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> ClaimsResult:
    """claims.json: each arm over its training seeds, the differences of `pairs_of`, and transfer.

    A pair without a common seed has no difference and is left out.

    Args:
        outcomes: of each assistant with the same people, in the same order: 'initial' and any 'ARM/seed-K'.
        compared: each but the initial one against it, as `people.compare` makes it.
        people: [people], their names: the clusters of the bootstraps.
        met: assistant -> simulator -> mean satisfaction, for whoever met simulators; a simulator that is trained anew
            for each seed is 'NAME/seed-K'. Where there is an assistant, 'initial' met the same ones.
        level: of all intervals.
        resamples, seed: of the bootstraps over people (recovered shares, and differences of these checkpoints).

    Raises:
        ValueError: an assistant is neither 'initial' nor 'ARM/seed-K', or numbers of people differ.
    """
    runs = _runs(compared)
    scores = {name: found.satisfaction for name, found in outcomes.items()}
    satisfaction = {name: float(found.mean()) for name, found in scores.items()}
    share_met = {name: float(outcomes[name].share_met.mean()) for name in compared}
    gain = {name: float(found.gain.mean()) for name, found in compared.items()}
    win_rate = {name: float(found.vote.mean()) for name, found in compared.items()}
    strict = {name: float(found.win.mean()) for name, found in compared.items()}

    def over_seeds(arm: str, values: Mapping[str, T]) -> list[T]:
        return [values[name] for name in runs[arm].values()]

    shared = {pair: sorted(runs[pair[0]].keys() & runs[pair[1]].keys()) for pair in pairs_of(tuple(runs))}
    shared = {pair: seeds for pair, seeds in shared.items() if seeds}

    def of_pair(pair: tuple[str, str], values: Mapping[str, T]) -> tuple[list[T], list[T]]:
        first, second = ([values[runs[arm][number]] for number in shared[pair]] for arm in pair)
        return first, second

    gaps = [np.mean(over_seeds(arm, scores), 0) - scores[INITIAL] for arm in runs]
    gaps.extend(np.mean(first, 0) - np.mean(second, 0) for first, second in (of_pair(pair, scores) for pair in shared))
    over_people = cluster_bootstraps(gaps, people, level=level, resamples=resamples, seed=seed)
    by_arm = {arm: np.stack(over_seeds(arm, scores)) for arm in runs}
    recovered = _recovered(by_arm, scores[INITIAL], people, level=level, resamples=resamples, seed=seed)
    return ClaimsResult(
        seeds=tuple(sorted({number for seeds in runs.values() for number in seeds})),
        arms={
            arm: ArmClaim(
                seeds=tuple(runs[arm]),
                satisfaction=t_interval(over_seeds(arm, satisfaction), level=level),
                share_met=t_interval(over_seeds(arm, share_met), level=level),
                gain=t_interval(over_seeds(arm, gain), level=level, null=0.0),
                win_rate=t_interval(over_seeds(arm, win_rate), level=level, null=0.5),
                strict_win_rate=t_interval(over_seeds(arm, strict), level=level, null=0.5),
                gain_over_people=of_these,
                recovered=recovered[arm],
            )
            for arm, of_these in zip(runs, over_people[: len(runs)], strict=True)
        },
        differences={
            ' - '.join(pair): DifferenceClaim(
                seeds=tuple(seeds),
                satisfaction=paired_difference(*of_pair(pair, satisfaction), level=level),
                win_rate=paired_difference(*of_pair(pair, win_rate), level=level),
                satisfaction_over_people=of_these,
            )
            for (pair, seeds), of_these in zip(shared.items(), over_people[len(runs) :], strict=True)
        },
        transfers={arm: _transfer(arm, seeds, met, level) for arm, seeds in runs.items() if met},
    )


def pairs_of(arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of arms that are compared, the first minus the second.

    Kinds of simulators at equal size, sizes of one kind, and the oracle minus each.
    """
    kinds = list(dict.fromkeys(arm.partition('-')[0] for arm in arms))
    sized = {kind: [_sized(kind, size) for size in SIZES] for kind in {*kinds, 'role_play', 'persona', 'fine_tuned'}}
    pairs = [(sized[first][i], sized[second][i]) for first, second in KINDS for i in (1, 2, 0)]
    for kind in kinds:
        large, usual, small = sized[kind]
        pairs += [(large, usual), (usual, small), (large, small)]
    pairs += [(ORACLE, arm) for arm in arms if arm != ORACLE]
    return tuple(pair for pair in pairs if set(pair) <= set(arms))


def _sized(kind: str, size: str) -> str:
    return f'{kind}-{size}' if size else kind


def _runs(compared: Mapping[str, Compared]) -> dict[str, dict[int, str]]:
    """Arm -> training seed, ascending -> assistant."""
    runs: dict[str, dict[int, str]] = {}
    for name in compared:
        arm, number = split_name(name)
        runs.setdefault(arm, {})[number] = name
    return {arm: dict(sorted(seeds.items())) for arm, seeds in runs.items()}


def _recovered(
    by_arm: Mapping[str, np.ndarray],
    initial: np.ndarray,
    people: Sequence[Hashable],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> dict[str, RecoveredShare]:
    """Of every arm; undefined without an oracle, whose own share is 1."""
    if ORACLE not in by_arm:
        no_oracle = RecoveredShare(None, None, None, 'no assistant was trained against people', len(people), level)
        return dict.fromkeys(by_arm, no_oracle)
    shares = recovered_shares(by_arm, initial, by_arm[ORACLE], people, level=level, resamples=resamples, seed=seed)
    own = shares[ORACLE]
    if own.mean is not None:
        shares[ORACLE] = RecoveredShare(1.0, None, None, None, own.num_people, level)
    return shares


def _transfer(arm: str, runs: Mapping[int, str], met: Mapping[str, Mapping[str, float]], level: float) -> TransferClaim:
    gains: dict[str, list[float]] = {}  # simulator, whichever seed's -> gain by training seed
    for assistant in runs.values():
        for user, value in met[assistant].items():
            gains.setdefault(user.partition('/')[0], []).append(value - met[INITIAL][user])
    kind = arm.partition('-')[0]
    others = [values for user, values in gains.items() if user.partition('-')[0] != kind]
    return TransferClaim(
        seeds=tuple(runs),
        users={user: t_interval(values, level=level, null=0.0) for user, values in gains.items()},
        others=t_interval(np.mean(others, 0), level=level, null=0.0) if others else None,
    )
