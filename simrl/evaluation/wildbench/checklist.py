"""The share of a checklist that replies satisfy, by a panel of judges (arXiv:2605.09808, section 4.2, appendix G).

1. Each judge says of each item of a task's checklist whether the reply satisfies it: yes, partly or no.
2. An item is satisfied where more than half of the judges say yes: partly counts as no.
3. The metric is the mean over tasks of the share of satisfied items, with the standard error of that mean.
4. Of two assistants the one with more satisfied items wins a task; with equally many each has half a win.

A task without a reply, or without a verdict of every judge, has no share: it is counted, and the bounds say what the
metric is if all of these failed, or all were satisfied.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simrl.conversations.quoting import as_json
from simrl.evaluation.preferences import independent_votes
from simrl.evaluation.wildbench.asking import AskSettings, JudgePrompt, ask, kept, prompt_of, shown, task_lines
from simrl.evaluation.wildbench.generations import Generation
from simrl.evaluation.wildbench.tasks import Task, by_group
from simrl.evaluation.win_rate import preferences
from simrl.remote.answers import Answer, Outcome
from simrl.remote.client import Endpoint
from simrl.remote.schema import object_of

VERSION = '1'  # of the prompt; goes up with every change of a word
VERDICTS = ('yes', 'partly', 'no')

INSTRUCTION = """\
You check one reply of an AI assistant against a list of questions about it. The conversation comes first, then the
reply to its last message, then the questions, numbered from 1.
Take each question by itself, and answer it from what the reply says, not from what its writer may have meant.
yes: the reply does all that the question asks for.
partly: it does some of it, or does it with an error.
no: it does not, or the question cannot be answered from the reply.
A reply is not better for being long, polite or sure of itself. An empty reply satisfies nothing."""
END = (
    'Answer with a JSON object: "items", a list with one object for each question, in their order: "item", its number, '
    '"thought", your reason in a sentence, then "verdict": "yes", "partly" or "no".'
)


def checklist_prompt(task: Task, reply: str) -> JudgePrompt:
    """Asks of each item of a task's checklist whether a reply satisfies it."""
    numbers = list(range(1, len(task.checklist) + 1))
    items = [as_json({'item': number, 'question': text}) for number, text in zip(numbers, task.checklist, strict=True)]
    lines = [*task_lines(task), as_json({'reply': reply}), *items]
    item = object_of(
        item={'type': 'integer', 'minimum': 1, 'maximum': len(items)},
        thought={'type': 'string'},
        verdict={'type': 'string', 'enum': list(VERDICTS)},
    )
    schema = object_of(items={'type': 'array', 'items': item, 'minItems': len(items), 'maxItems': len(items)})

    def check(value: Any) -> str | None:
        found = [item['item'] for item in value['items']]
        return None if found == numbers else f'answer.items: expected the items {numbers} in order, found {found}'

    return JudgePrompt(prompt_of(INSTRUCTION, lines, END), schema, f'wildbench-checklist-{VERSION}', check)


def judge(
    tasks: Mapping[str, Task],
    generations: Mapping[str, Generation],
    endpoints: Mapping[str, Endpoint],
    settings: AskSettings,
    name: str = '',
) -> list[dict[str, Any]]:
    """Asks a panel about all replies; returns a row for each, in the order of the tasks, for `summary` and a file.

    A row has the raw text of each judge, its verdicts or why there are none, and `satisfied`, by item, which is null
    unless every judge has a verdict.
    """
    asked = [(tasks[of.task], of) for of in generations.values()]
    outcomes = ask(endpoints, [checklist_prompt(task, shown(of.text, settings)) for task, of in asked], settings, name)
    rows = []
    for i, (task, of) in enumerate(asked):
        judges = {
            judge: {'model': endpoints[judge].settings.model, 'verdicts': _verdicts(found[i]), **kept(found[i])}
            for judge, found in outcomes.items()
        }
        rows.append(
            {
                'session_id': task.id,
                'task': task.fingerprint,
                'generator': of.generator,
                'version': VERSION,
                'satisfied': majority([one['verdicts'] for one in judges.values()]),
                'judges': judges,
            }
        )
    return rows


def _verdicts(outcome: Outcome) -> list[str] | None:
    return [item['verdict'] for item in outcome.value['items']] if isinstance(outcome, Answer) else None


def majority(verdicts: Sequence[Sequence[str] | None]) -> list[bool] | None:
    """True where more than half of the judges say yes, by item; None if a judge has no verdict.

    Args:
        verdicts: [judges][items].
    """
    whole = [of for of in verdicts if of is not None]
    if len(whole) < len(verdicts):
        return None
    return [2 * sum(verdict == 'yes' for verdict in item) > len(whole) for item in zip(*whole, strict=True)]


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of satisfied items by task, of the rows that have verdicts."""
    return {row['session_id']: _share(row['satisfied']) for row in rows if row['satisfied'] is not None}


def _share(satisfied: Sequence[bool]) -> float:
    return sum(satisfied) / len(satisfied)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
        mean: None without a task.
        sem: standard error, s / sqrt(n) with s of n - 1 degrees of freedom; None with fewer than 2 tasks.
        n: tasks.
    """

    mean: float | None
    sem: float | None
    n: int

    def __str__(self) -> str:
        mean, sem = ('none' if x is None else f'{x:.4f}' for x in (self.mean, self.sem))
        return f'{mean} (standard error {sem}, {self.n} tasks)'


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of a number for each task."""
    n = len(values)
    sem = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Mean(float(np.mean(values)) if n else None, sem, n)


def bounds(values: Sequence[float], failed: int, lowest: float, highest: float) -> tuple[float, float]:
    """The means of values if all that failed have the lowest value, and if all have the highest."""
    total, n = sum(values), len(values) + failed
    return (total + failed * lowest) / n, (total + failed * highest) / n


def summary(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task], overlap: Sequence[str]) -> dict[str, Any]:
    """The metric of an assistant, with each judge's own numbers and all that was left out.

    Args:
        rows: of `judge`.
        tasks: all tasks, those without a reply among them.
        overlap: ids of tasks that training data has.
    """
    found = shares(rows)
    values = list(found.values())
    return {
        'protocol': 'checklist',
        'version': VERSION,
        'generator': rows[0]['generator'],
        'share': dataclasses.asdict(mean_of(values)),
        'bounds': bounds(values, len(tasks) - len(found), 0.0, 1.0),
        'tasks': {
            'all': len(tasks),
            'judged': len(found),
            'without a reply': len(tasks) - len(rows),
            'without a verdict': len(rows) - len(found),
        },
        'judges': {name: _of_judge(rows, name) for name in rows[0]['judges']},
        'agreement': agreement(rows),
        'groups': {group: dataclasses.asdict(mean_of(numbers)) for group, numbers in by_group(tasks, found).items()},
        'overlap': {
            'tasks': len(overlap),
            'ids': list(overlap),
            'share of the others': dataclasses.asdict(
                mean_of([value for task, value in found.items() if task not in set(overlap)])
            ),
        },
    }


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Agreement of each two judges: the share of items that both or neither find satisfied, and of how many items."""
    found: dict[str, dict[str, float | None]] = {}
    for pair in itertools.combinations(rows[0]['judges'], 2):
        both = [[row['judges'][name]['verdicts'] for name in pair] for row in rows]
        equal = [(x == 'yes') == (y == 'yes') for a, b in both if a and b for x, y in zip(a, b, strict=True)]
        found[' and '.join(pair)] = {'share': sum(equal) / len(equal) if equal else None, 'items': len(equal)}
    return found


def _of_judge(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    own = [row['judges'][name] for row in rows]
    verdicts = [one['verdicts'] for one in own if one['verdicts'] is not None]
    counts = collections.Counter(verdict for of in verdicts for verdict in of)
    return {
        'model': own[0]['model'],
        'share': dataclasses.asdict(mean_of([_share([x == 'yes' for x in of]) for of in verdicts])),
        'verdicts': {verdict: counts[verdict] for verdict in VERDICTS},
        'failures': dict(sorted(collections.Counter(one['cause'] for one in own if one['verdicts'] is None).items())),
    }


def win_rate(values: Sequence[float]) -> dict[str, Any]:
    """The win rate of 1 a win, 1/2 a tie and 0 a loss, with its trinomial standard error (arXiv:2605.09808, app. G.1).

    p = (w + t / 2) / n, and its variance ((w + t / 4) / n - p^2) / n, which is the variance of the values by n.
    """
    error = float(np.std(values)) / math.sqrt(len(values))
    return dataclasses.asdict(independent_votes(values)) | {'standard error': error}


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The win rate of the first assistant over the second, from their rows of `judge`.

    Tasks that only one has a share of are left out and counted; the bounds count them all lost, and all won.

    Raises:
        ValueError: the rows are of other panels, prompts or tasks, or no task has shares of both.
    """
    sides = [{row['session_id']: row for row in rows} for rows in (first, second)]
    for field, told in (('version', _version), ('judges', _panel)):
        found = [told(rows) for rows in (first, second)]
        if found[0] != found[1]:
            raise ValueError(f'{field}: expected the same of both assistants, found {found[0]} and {found[1]}')
    common = [name for name in sides[0] if name in sides[1]]
    for name in common:
        if sides[0][name]['task'] != sides[1][name]['task']:
            raise ValueError(f'session_id {name!r}: expected one prompt and checklist of both assistants, found others')
    judged = [name for name in common if all(side[name]['satisfied'] is not None for side in sides)]
    if not judged:
        raise ValueError('expected at least one task with verdicts of both assistants, found none')
    own, other = ([sum(side[name]['satisfied']) for name in judged] for side in sides)
    values = preferences(own, other)
    failed = len({*sides[0], *sides[1]}) - len(judged)
    return {
        'first': first[0]['generator'],
        'second': second[0]['generator'],
        'win rate': win_rate(values),
        'wins, ties, losses': [values.count(x) for x in (1.0, 0.5, 0.0)],
        'left out': failed,
        'bounds': bounds(values, failed, 0.0, 1.0),
    }


def _version(rows: Sequence[Mapping[str, Any]]) -> str:
    return ', '.join(sorted({row['version'] for row in rows}))


def _panel(rows: Sequence[Mapping[str, Any]]) -> str:
    return ', '.join(sorted({f'{name} ({one["model"]})' for row in rows for name, one in row['judges'].items()}))
