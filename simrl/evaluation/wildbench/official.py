"""WB-Score and WB-Reward (arXiv:2406.04770) from the scores and comparisons of judge files.

WB-Score is a judge's mean score from 1 to 10, also as (mean - 5) x 2. WB-Reward is the mean of 1 for a reply that is
much better than the reference's, 1/2 for slightly better, 0 for a tie, -1/2 and -1. Both also as a mean over groups of
tasks with the weights of the leaderboard.

The leaderboard has quirks, which the settings name: a verdict on a reply that is empty, or was cut for the judge, is in
no count, but the rewards of all tasks together are divided by the number of all verdicts; and each pair was judged in
one order. `LEADERBOARD` has them; the defaults judge every reply, divide by what was judged, and take both orders.

Of the published numbers, those by group need the tags of tasks, which no judge file has. The Elo ratings come from a
simulation whose draws are not published.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from simrl.evaluation.position import PositionBias, both_orders, flips, position_bias
from simrl.evaluation.wildbench.asking import CUT
from simrl.evaluation.wildbench.judge_files import OUTCOMES, Comparison, Score
from simrl.evaluation.wildbench.means import Mean, bounds, mean_of
from simrl.evaluation.wildbench.tasks import (
    CODING,
    CREATIVE,
    INFORMATION,
    MATH,
    NOT_MEASURED,
    PLANNING,
    Overlap,
    Task,
    by_group,
    check_known,
)

WEIGHTS = {CREATIVE: 0.5, PLANNING: 1.25, MATH: 1.0, INFORMATION: 0.75, CODING: 1.25}
NAMES = {value: name for name, value in OUTCOMES.items()}

CutReplies = Literal['judged', 'left out']
Divisor = Literal['judged', 'all']
Orders = Literal['mean', 'strict', 'single']
Weights = Literal['leaderboard', 'equal']  # of groups


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Settings of WB-Score."""

    # Whether replies that are empty or cut are in the groups; they are in the mean over all. The leaderboard leaves
    # them out.
    cut_replies: CutReplies = 'judged'
    weights: Weights = 'leaderboard'  # of groups in the task-macro score


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Settings of WB-Reward."""

    # A slight win is a tie if its reply is longer by more than this many characters; None: it stays a win. The
    # leaderboard's K, which is -1 where it is off.
    length_margin: int | None = None
    cut_replies: CutReplies = 'judged'  # verdicts on a pair with an empty reply, or one that was cut for the judge
    divisor: Divisor = 'judged'  # of the sum over all tasks; groups are divided by what was judged
    # Of a pair that was judged in both orders: their mean; or a tie where not both have the same winner. 'single': each
    # pair was judged in one.
    orders: Orders = 'mean'
    weights: Weights = 'leaderboard'  # of groups in the task-macro reward

    def __post_init__(self) -> None:
        if self.length_margin is not None and self.length_margin < 0:
            raise ValueError(f'RewardSettings.length_margin: expected at least 0, or None, found {self.length_margin}')


LEADERBOARD = RewardSettings(cut_replies='left out', divisor='all', orders='single')


@dataclasses.dataclass(frozen=True)
class WBScore:
    """WB-Score of an assistant.

    Attributes:
        score: mean over tasks.
        adjusted: from -8 to 10.
        groups: adjusted, by group; empty without tags.
        task_macro: their weighted mean, of `group_means`; None without tags.
        bounds: the mean if all tasks without a score have 1, and if all have 10; None without tasks.
        unjudged: number of tasks without a score, for whatever reason; None without tasks.
        length: mean characters of a reply that is not empty and was not cut; None without such a reply.
        left_out: verdicts that could not be read, by cause.
        overlap: with training data, and the score without these tasks; or `NOT_MEASURED`.
    """

    score: Mean
    adjusted: float
    groups: Mapping[str, Mean]
    task_macro: Mean | None
    bounds: tuple[float, float] | None
    unjudged: int | None
    length: float | None
    left_out: Mapping[str, int]
    overlap: Mapping[str, Any] | str


@dataclasses.dataclass(frozen=True)
class WBReward:
    """WB-Reward of an assistant over a reference.

    Attributes:
        reward: mean over tasks, from -1 to 1.
        counts: verdicts by outcome, after the length margin.
        groups: rewards by group; empty without tags.
        task_macro: their weighted mean, of `group_means`; None without tags.
        bounds: the mean if all tasks that are not judged are lost by far, and if all are won; None without tasks.
        unjudged: number of tasks that are in no count, for whatever reason; None without tasks.
        flips: tasks whose two orders have different winners.
        length: as of `WBScore`, of the assistant's replies.
        left_out: tasks or verdicts that are in no count, by cause.
        overlap: with training data, and the reward without these tasks; or `NOT_MEASURED`.
    """

    reward: Mean
    counts: Mapping[str, int]
    groups: Mapping[str, Mean]
    task_macro: Mean | None
    bounds: tuple[float, float] | None
    unjudged: int | None
    flips: int
    length: float | None
    left_out: Mapping[str, int]
    overlap: Mapping[str, Any] | str


def adjusted_score(score: float) -> float:
    """A mean score from 1 to 10 on a scale from -8 to 10. One of the benchmark's tables has it times 10."""
    return (score - 5) * 2


def task_macro(groups: Mapping[str, float], weights: Weights = 'leaderboard') -> float:
    """The weighted mean of numbers by group, over the groups that are there; added up in their order."""
    if not groups:
        raise ValueError(f'groups: expected some of {", ".join(WEIGHTS)}, found none')
    of = _weights(weights)
    return sum(value * of[group] for group, value in groups.items()) / sum(of[group] for group in groups)


def _weights(weights: Weights) -> Mapping[str, float]:
    return WEIGHTS if weights == 'leaderboard' else dict.fromkeys(WEIGHTS, 1.0)


def group_means(
    tasks: Mapping[str, Task], values: Mapping[str, float], weights: Weights = 'leaderboard'
) -> tuple[dict[str, Mean], Mean | None]:
    """The mean of each group of tasks, and their weighted mean over groups; None where no task has a value.

    A task may be in several groups, whose means then depend on each other. So the weighted mean's variance adds up by
    task (linearisation, Woodruff 1971): with group means m_g over n_g tasks and weights w_g of sum 1 it is

        sum over tasks of (sum over the task's groups of w_g (value - m_g) / sqrt(n_g (n_g - 1)))^2,

    of groups without common tasks the sum of w_g^2 s_g^2 / n_g. There is none with a group of one task.

    Args:
        values: by task, of the tasks that have one.
    """
    groups = {group: mean_of(found) for group, found in by_group(tasks, values).items()}
    if not groups:
        return {}, None
    means = {group: found.mean for group, found in groups.items() if found.mean is not None}
    error = None
    if min(found.n for found in groups.values()) > 1:
        of = _weights(weights)
        whole = sum(of[group] for group in groups)
        scale = {g: of[g] / whole / math.sqrt(found.n * (found.n - 1)) for g, found in groups.items()}
        parts = (sum(scale[g] * (value - means[g]) for g in tasks[name].groups) for name, value in values.items())
        error = math.sqrt(sum(part**2 for part in parts))
    return groups, Mean(task_macro(means, weights), error, len(values))


def reward_of_counts(counts: Mapping[str, int], total: int | None = None) -> float:
    """The reward of verdicts counted by outcome.

    Args:
        total: what it is divided by; None: the verdicts that are counted.
    """
    number = sum(counts[name] for name in OUTCOMES) if total is None else total
    return sum(value * counts[name] for name, value in OUTCOMES.items()) / number


def mixture(rewards: Sequence[float]) -> float:
    """The mean of an assistant's rewards over several references; the leaderboard has three."""
    return sum(rewards) / len(rewards)


def is_cut(reply: str) -> bool:
    """True for a reply that is empty or was cut for the judge."""
    return not reply.strip() or reply.endswith(CUT)


def mean_length(replies: Sequence[str]) -> float | None:
    """Mean characters of the replies that are not empty and were not cut."""
    lengths = [len(reply) for reply in replies if not is_cut(reply)]
    return sum(lengths) / len(lengths) if lengths else None


def wb_score(
    scores: Sequence[Score],
    tasks: Mapping[str, Task] | None = None,
    settings: ScoreSettings = ScoreSettings(),
    *,
    left_out: Mapping[str, int] | None = None,
    overlap: Overlap | None = None,
) -> WBScore:
    """WB-Score from scores.

    Args:
        tasks: by id, with their tags; None: no groups.
        left_out: of `read_scores`.
        overlap: with training data; None: not measured.

    Raises:
        ValueError: there is no score, or one of an unknown task.
    """
    mean = mean_of([of.score for of in scores])
    if mean.mean is None:
        raise ValueError('scores: expected at least one, found none')
    groups, macro = dict[str, Mean](), None
    if tasks is not None:
        check_known(tasks, [of.task for of in scores], 'scores')
        kept = (of for of in scores if settings.cut_replies == 'judged' or not is_cut(of.reply))
        groups, macro = group_means(tasks, {of.task: adjusted_score(of.score) for of in kept}, settings.weights)
    unjudged = None if tasks is None else len(tasks) - len(scores)
    return WBScore(
        mean,
        adjusted_score(mean.mean),
        groups,
        macro,
        None if unjudged is None else bounds([of.score for of in scores], unjudged, 1.0, 10.0),
        unjudged,
        mean_length([of.reply for of in scores]),
        dict(left_out or {}),
        NOT_MEASURED
        if overlap is None
        else overlap.result(mean_of(overlap.others({of.task: of.score for of in scores}))),
    )


def value_after_margin(comparison: Comparison, margin: int | None) -> float:
    """The value of a comparison; 0 for a slight win that is longer by more than the margin."""
    if margin is None or abs(comparison.value) != 0.5:
        return comparison.value
    longer = len(comparison.reply) - len(comparison.reference)
    return 0.0 if longer * (1 if comparison.value > 0 else -1) > margin else comparison.value


def wb_reward(
    comparisons: Sequence[Comparison],
    tasks: Mapping[str, Task] | None = None,
    settings: RewardSettings = RewardSettings(),
    *,
    left_out: Mapping[str, int] | None = None,
    overlap: Overlap | None = None,
) -> WBReward:
    """WB-Reward from comparisons with one reference.

    A task that has a verdict in one order only is left out and counted, unless orders are 'single'.

    Args:
        tasks: by id, with their tags; None: no groups.
        left_out: of `read_comparisons`.
        overlap: with training data; None: not measured.

    Raises:
        ValueError: there is no comparison, one of an unknown task, or two of a task where orders are 'single'.
    """
    by_task: dict[str, list[Comparison]] = {}
    for of in comparisons:
        by_task.setdefault(of.task, []).append(of)
    if tasks is not None:
        check_known(tasks, list(by_task), 'comparisons')
    dropped = collections.Counter(left_out or {})
    kept: dict[str, list[Comparison]] = {}
    cut: list[str] = []
    for task, of_task in by_task.items():
        if len(of_task) > 1 and settings.orders == 'single':
            raise ValueError(f"orders: expected 'mean' or 'strict' for task {task}, judged in both, found 'single'")
        if len(of_task) == 1 and settings.orders != 'single':
            dropped['one order only'] += 1
        elif settings.cut_replies == 'left out' and any(is_cut(of.reply) or is_cut(of.reference) for of in of_task):
            cut.append(task)
        else:
            kept[task] = of_task
    dropped['empty or cut reply'] += len(cut)
    values = {
        task: [value_after_margin(of, settings.length_margin) for of in of_task] for task, of_task in kept.items()
    }
    merged, num_flips = _merged(values, settings.orders)
    over_all = merged | (dict.fromkeys(cut, 0.0) if settings.divisor == 'all' else {})
    if not over_all:
        hint = "; where each pair was judged once, orders='single' takes them" if dropped['one order only'] else ''
        raise ValueError(
            f'comparisons: expected at least one that is judged, found none; left out: {dict(+dropped)}{hint}'
        )
    groups, macro = ({}, None) if tasks is None else group_means(tasks, merged, settings.weights)
    counts = collections.Counter(NAMES[value] for of_task in values.values() for value in of_task)
    unjudged = None if tasks is None else len(tasks) - len(merged)
    return WBReward(
        mean_of(list(over_all.values())),
        {name: counts[name] for name in OUTCOMES},
        groups,
        macro,
        None if unjudged is None else bounds(list(merged.values()), unjudged, -1.0, 1.0),
        unjudged,
        num_flips,
        mean_length([of_task[0].reply for of_task in by_task.values()]),
        dict(+dropped),
        NOT_MEASURED if overlap is None else overlap.result(mean_of(overlap.others(over_all))),
    )


def position(comparisons: Sequence[Comparison]) -> PositionBias | None:
    """The judge's position bias, over tasks; None where no task is judged in both orders."""
    firsts: list[dict[str, float]] = [
        {of.task: (of.value + 1) / 2 for of in comparisons if of.first == first} for first in ('assistant', 'reference')
    ]
    both = [task for task in firsts[0] if task in firsts[1]]
    shown_first, shown_second = ([side[task] for task in both] for side in firsts)
    return position_bias(shown_first, shown_second, both) if both else None


def _merged(values: Mapping[str, Sequence[float]], orders: Orders) -> tuple[dict[str, float], int]:
    """The reward of each task from its verdicts, and the number of flips among them (`position.flips`)."""
    if orders == 'single' or not values:
        return {task: value for task, (value,) in values.items()}, 0
    first, second = (np.array(list(values.values())) + 1).T / 2
    rewards = 2 * both_orders(first, second, combine=orders) - 1
    return dict(zip(values, rewards.tolist(), strict=True)), int(flips(first, second).sum())
