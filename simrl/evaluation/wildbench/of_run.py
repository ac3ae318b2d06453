"""Results of every protocol, as the results of a run have them: numbers with intervals over tasks.

The arguments are the results that are written and printed: of `checklist.summary` and `checklist.compare`, and the
fields of `official.WBScore` and `official.WBReward`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from simrl.evaluation.position import Votes
from simrl.evaluation.results.judges import PANEL
from simrl.evaluation.results.wildbench import WildBenchNumber
from simrl.evaluation.statistics import Estimate, t_quantile
from simrl.evaluation.wildbench.means import bounds

LEVEL = 0.95
SHARES, SCORES, REWARDS = (0, 1), (1, 10), (-1, 1)  # the least and the most that a task can have
Result = Mapping[str, Any]


def of_checklist(result: Result, assistant: str) -> list[WildBenchNumber]:
    """The share of satisfied items by the panel, and by each judge."""
    counts = result['tasks']
    no_reply = {'no reply': counts['without a reply']}
    found = {PANEL: {**result, 'left_out': no_reply | {'no verdict of every judge': counts['without a verdict']}}}
    found |= {judge: of | {'left_out': no_reply | of['failures']} for judge, of in result['judges'].items()}
    return [
        _number(
            WildBenchNumber('checklist', assistant, None, judge, _of_mean(of['share'], SHARES), counts['all']),
            of,
            SHARES,
        )
        for judge, of in found.items()
    ]


def of_compare(result: Result, first: str, second: str) -> list[WildBenchNumber]:
    """The win rate of the first assistant by the panel, and by each judge."""
    fields = [field.name for field in dataclasses.fields(Estimate)]
    counts = dict(result['tasks'])
    tasks, _ = counts.pop('all'), counts.pop('judged')
    numbers = []
    for judge, found in {PANEL: {**result, 'left_out': counts}, **result['judges']}.items():
        estimate = None if found is None else Estimate(**{name: found['win rate'][name] for name in fields})
        numbers.append(_number(WildBenchNumber('win rate', first, second, judge, estimate, tasks), found or {}, SHARES))
    return numbers


def of_score(
    result: Result, assistant: str, judge: str, tasks: int, settings: Mapping[str, str] | None = None
) -> WildBenchNumber:
    """WB-Score by a judge.

    Args:
        tasks: the number of all tasks, of which the result is.
        settings: that are not the defaults.
    """
    number = WildBenchNumber('WB-Score', assistant, None, judge, _of_mean(result['score'], SCORES), tasks)
    return dataclasses.replace(_number(number, result, SCORES), settings=dict(settings or {}))


def of_reward(
    result: Result, assistant: str, reference: str, judge: str, tasks: int, settings: Mapping[str, str] | None = None
) -> WildBenchNumber:
    """The same of WB-Reward over a reference."""
    number = WildBenchNumber('WB-Reward', assistant, reference, judge, _of_mean(result['reward'], REWARDS), tasks)
    return dataclasses.replace(_number(number, result, REWARDS), settings=dict(settings or {}))


def _of_mean(found: Result, values: tuple[float, float], df: int | None = None) -> Estimate | None:
    """A mean over tasks with Student's t-interval from its standard error; without one where no task differs.

    The interval ends where values do: of few tasks it would go on to means that there cannot be.
    """
    mean, error, n = found['mean'], found['sem'], found['n']
    if mean is None:
        return None
    half = t_quantile(n - 1 if df is None else df, LEVEL) * error if error else None
    low, high = (None, None) if half is None else (max(mean - half, values[0]), min(mean + half, values[1]))
    return Estimate(mean, low, high, n, n, LEVEL)


def _number(number: WildBenchNumber, result: Result, values: tuple[float, float]) -> WildBenchNumber:
    """A number with all else that its result has.

    The interval of the weighted mean over groups has the degrees of freedom of the smallest group, which are never
    more than Welch's (1947).

    Args:
        values: the lowest and the highest of a task, which those that are not judged have in `lost` and `won`.
    """
    groups = {
        group: of for group, found in result.get('groups', {}).items() if (of := _of_mean(found, values)) is not None
    }
    macro: Estimate | None = None
    if result.get('task_macro') is not None:
        macro = _of_mean(result['task_macro'], values, min(of.num_observations for of in groups.values()) - 1)
    lost = won = None
    if (of := number.estimate) is not None:
        judged = of.num_observations
        lost, won = result.get('bounds') or bounds([of.mean] * judged, number.tasks - judged, *values)
    return dataclasses.replace(
        number,
        lost=lost,
        won=won,
        macro=None if macro is None else macro.mean,
        macro_low=None if macro is None else macro.low,
        macro_high=None if macro is None else macro.high,
        groups=groups,
        left_out={cause: count for cause, count in result.get('left_out', {}).items() if count},
        votes=Votes(**votes) if isinstance(votes := result.get('votes'), dict) else None,
    )
