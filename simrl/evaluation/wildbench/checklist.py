"""The share of a checklist that replies satisfy, by a panel of judges (arXiv:2605.09808, section 4.2, appendix G).

1. Each judge says of each item of a task's checklist whether the reply satisfies it: yes, partly or no.
2. An item is satisfied where more than half of the judges say yes: partly counts as no.
3. The metric is the mean over tasks of the share of satisfied items, with the standard error of that mean.
4. Of two assistants the one with more satisfied items wins a task; with equally many each has half a win.

A task without a reply, or without a verdict of every judge, has no share: it has a row and is counted, and the bounds
say what the metric is if all of these failed, or all were satisfied.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simrl.conversations.quoting import as_json
from simrl.conversations.row_files import placed_rows
from simrl.evaluation.pairwise.agreement import or_reason
from simrl.evaluation.position import PanelAgreement, panel_agreement, votes_of
from simrl.evaluation.preferences import align, independent_votes, standard_error
from simrl.evaluation.wildbench.asking import AskSettings, JudgePrompt, ask, kept, prompt_of, shown, task_lines
from simrl.evaluation.wildbench.generations import Generation, generator_of
from simrl.evaluation.wildbench.means import bounds, mean_of
from simrl.evaluation.wildbench.tasks import NOT_MEASURED, Overlap, Task, by_group
from simrl.evaluation.win_rate import preferences
from simrl.remote.answers import Answer, Outcome
from simrl.remote.client import Endpoint
from simrl.remote.schema import object_of

VERSION = '1'  # of the prompt; goes up with every change of a word
VERDICTS = ('yes', 'partly', 'no')
Rows = Sequence[Mapping[str, Any]]  # of `judge`

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
    """Asks a panel about all replies; returns a row for each task, in their order, for `summary` and a file.

    A row has the raw text of each judge, its verdicts or why there are none, and `satisfied`, by item, which is null
    unless every judge has a verdict. That of a task without a reply has no judges.

    Args:
        generations: by task, at least one, all of one assistant.
    """
    replies = {task: shown(of.text, settings) for task, of in generations.items()}
    outcomes = ask(endpoints, [checklist_prompt(tasks[task], reply) for task, reply in replies.items()], settings, name)
    by_task = {
        task: {
            judge: {'model': endpoints[judge].settings.model, 'verdicts': _verdicts(found[i]), **kept(found[i])}
            for judge, found in outcomes.items()
        }
        for i, task in enumerate(replies)
    }
    generator = generator_of(generations)
    return [
        {
            'session_id': task.id,
            'task': task.fingerprint,
            'generator': generator,
            'version': VERSION,
            'satisfied': majority([one['verdicts'] for one in judges.values()]) if judges else None,
            'judges': judges,
        }
        for task in tasks.values()
        for judges in [by_task.get(task.id, {})]
    ]


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


def shares(rows: Rows) -> dict[str, float]:
    """The share of satisfied items by task, of the rows that have verdicts."""
    return {row['session_id']: _share(row['satisfied']) for row in rows if row['satisfied'] is not None}


def _share(satisfied: Sequence[bool]) -> float:
    return sum(satisfied) / len(satisfied)


def summary(rows: Rows, tasks: Mapping[str, Task], overlap: Overlap | None) -> dict[str, Any]:
    """The metric of an assistant, with each judge's own numbers and all that was left out.

    Args:
        rows: of `judge` about these tasks.
        overlap: with training data; None: not measured.
    """
    found = shares(rows)
    values = list(found.values())
    asked = [row for row in rows if row['judges']]
    return {
        'protocol': 'checklist',
        'version': VERSION,
        'generator': rows[0]['generator'],
        'share': dataclasses.asdict(mean_of(values)),
        'bounds': bounds(values, len(tasks) - len(found), 0.0, 1.0),
        'tasks': {
            'all': len(tasks),
            'judged': len(found),
            'without a reply': len(tasks) - len(asked),
            'without a verdict': len(asked) - len(found),
        },
        'judges': {name: _of_judge(asked, name) for name in asked[0]['judges']},
        'agreement': agreement(asked),
        'votes': votes(asked),
        'groups': {group: dataclasses.asdict(mean_of(numbers)) for group, numbers in by_group(tasks, found).items()},
        'overlap': NOT_MEASURED if overlap is None else overlap.result(mean_of(overlap.others(found))),
    }


def agreement(rows: Rows) -> dict[str, dict[str, float | None]]:
    """Agreement of each two judges: the share of items that both or neither find satisfied, and of how many items."""
    found: dict[str, dict[str, float | None]] = {}
    for pair in itertools.combinations(rows[0]['judges'], 2):
        both = [[row['judges'][name]['verdicts'] for name in pair] for row in rows]
        equal = [(x == 'yes') == (y == 'yes') for a, b in both if a and b for x, y in zip(a, b, strict=True)]
        found[' and '.join(pair)] = {'share': sum(equal) / len(equal) if equal else None, 'items': len(equal)}
    return found


def votes(rows: Rows) -> dict[str, Any] | str | None:
    """The number of independent votes that the panel is worth on items in clusters of a task (`position.votes_of`).

    Returns:
        Its fields; the reason where the verdicts do not determine it; None with one judge.
    """
    judges, whole = list(rows[0]['judges']), [row for row in rows if row['satisfied'] is not None]
    if len(judges) < 2:
        return None
    said = {judge: [float(x == 'yes') for row in whole for x in row['judges'][judge]['verdicts']] for judge in judges}
    tasks = [row['session_id'] for row in whole for _ in row['satisfied']]
    return _fields(lambda: votes_of(said, tasks))


def _fields(statistic: Callable[[], Any]) -> dict[str, Any] | str:
    found = or_reason(statistic)
    return found if isinstance(found, str) else dataclasses.asdict(found)


def against_people(rows: Rows, people: Rows) -> PanelAgreement:
    """Each judge of a panel against people's verdicts on the same replies, over items in clusters of a task.

    Args:
        people: rows of the same replies in which `satisfied` is what people said; null where nobody was asked.

    Raises:
        ValueError: rows of people are of another assistant, task or checklist; or no item has verdicts of all.
    """
    by_task = {row['session_id']: row for row in rows}
    verdicts = {name: list[float]() for row in rows for name in row['judges']}
    labels, clusters = list[float](), list[str]()
    for said in people:
        if said['satisfied'] is None:
            continue
        name, fields = said['session_id'], ('task', 'generator')
        if name not in by_task or any(said[field] != by_task[name][field] for field in fields):
            raise ValueError(f'people, session_id {name!r}: expected a task and a reply of the judges, found others')
        labels += map(float, said['satisfied'])
        clusters += [name] * len(said['satisfied'])
        for judge, found in verdicts.items():
            own = by_task[name]['judges'].get(judge, {}).get('verdicts')
            found += [math.nan] * len(said['satisfied']) if own is None else [float(x == 'yes') for x in own]
    return panel_agreement(verdicts, labels, clusters)


def _of_judge(rows: Rows, name: str) -> dict[str, Any]:
    own = [row['judges'][name] for row in rows]
    verdicts = [one['verdicts'] for one in own if one['verdicts'] is not None]
    counts = collections.Counter(verdict for of in verdicts for verdict in of)
    return {
        'model': own[0]['model'],
        'share': dataclasses.asdict(mean_of([_share([x == 'yes' for x in of]) for of in verdicts])),
        'verdicts': {verdict: counts[verdict] for verdict in VERDICTS},
        'failures': dict(sorted(collections.Counter(one['cause'] for one in own if one['verdicts'] is None).items())),
    }


def compare(first: Rows, second: Rows) -> dict[str, Any]:
    """The win rate of the first assistant over the second, from their rows of `judge`, by the panel and by each judge.

    Tasks that not both have a share of are left out and counted by reason; the bounds count them all lost, and all won.
    A judge's own rate is over the tasks of which it has verdicts on both; None without any.

    Raises:
        ValueError: the rows are of other panels, prompts or tasks, or no task has shares of both.
    """
    for field, told in (('version', _version), ('judges', _panel)):
        found = [told(rows) for rows in (first, second)]
        if found[0] != found[1]:
            raise ValueError(f'{field}: expected the same of both assistants, found {found[0]} and {found[1]}')
    tasks, others = ({row['session_id']: row for row in rows} for rows in (first, second))
    if alone := sorted(tasks.keys() ^ others.keys()):
        whose = 'first' if alone[0] in tasks else 'second'
        raise ValueError(
            f'session_id: expected the same tasks of both assistants, found {alone[0]!r} of the {whose} alone '
            f'(one of {len(alone)})'
        )
    names, counts = align({side: _counts(rows) for side, rows in (('first', first), ('second', second))})
    left_out = collections.Counter[str]()
    for name, of_task in zip(names, counts.T, strict=True):
        pair = tasks[str(name)], others[str(name)]
        if pair[0]['task'] != pair[1]['task']:
            raise ValueError(f'session_id {name!r}: expected one prompt and checklist of both assistants, found others')
        if np.isnan(of_task).any():
            silent = [side for side, row in zip(('first', 'second'), pair, strict=True) if not row['judges']]
            left_out[f'no reply of the {" and the ".join(silent)}' if silent else 'no verdict'] += 1
    panel = _win_rate(counts)
    if panel is None:
        raise ValueError(f'expected at least one task with verdicts of both assistants, found none: {dict(left_out)}')
    of_judges = {
        name: align({'1': _counts(first, name), '2': _counts(second, name)})[1]
        for name in dict.fromkeys(name for row in first for name in row['judges'])
    }
    said = {name: (np.sign(of[0] - of[1]) + 1) / 2 for name, of in of_judges.items()}  # NaN without a verdict
    return {
        'first': first[0]['generator'],
        'second': second[0]['generator'],
        'tasks': {'all': len(names), 'judged': len(names) - left_out.total(), **left_out},
        **panel,
        'judges': {name: _win_rate(of) for name, of in of_judges.items()},
        'votes': _fields(lambda: votes_of(said, names)) if len(said) > 1 else None,
    }


def _counts(rows: Rows, judge: str | None = None) -> list[tuple[str, float]]:
    """The number of items that the panel, or one judge, finds satisfied, by task; NaN without verdicts."""

    def satisfied(row: Mapping[str, Any]) -> Sequence[bool] | None:
        if judge is None:
            return row['satisfied']
        verdicts = row['judges'].get(judge, {}).get('verdicts')
        return None if verdicts is None else [verdict == 'yes' for verdict in verdicts]

    found = ((row['session_id'], satisfied(row)) for row in rows)
    return [(name, math.nan if items is None else float(sum(items))) for name, items in found]


def _win_rate(counts: np.ndarray) -> dict[str, Any] | None:
    """The win rate from numbers of satisfied items, [assistants, tasks], NaN without verdicts; None without a pair."""
    judged = counts[:, ~np.isnan(counts).any(axis=0)]
    if not judged.size:
        return None
    values = preferences(*judged.tolist())
    return {
        'win rate': {**dataclasses.asdict(independent_votes(values)), 'standard error': standard_error(values)},
        'wins, ties, losses': [values.count(x) for x in (1.0, 0.5, 0.0)],
        'bounds': bounds(values, counts.shape[1] - len(values), 0.0, 1.0),
    }


def _version(rows: Rows) -> str:
    return ', '.join(sorted({row['version'] for row in rows}))


def _panel(rows: Rows) -> str:
    return ', '.join(sorted({f'{name} ({one["model"]})' for row in rows for name, one in row['judges'].items()}))


def read_rows(path: pathlib.Path) -> Rows:
    """The rows of `judge` in a file.

    Raises:
        ValueError: a row is none of its rows, there is no row, an id is there twice, or the rows are of several
            assistants.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for place, row in placed_rows(path):
        if not _is_row(row) or row['session_id'] in rows:
            expected = 'a row of the checklist protocol with a session_id of its own'
            raise ValueError(f'{place}: expected {expected}, found {str(row)[:80]}')
        rows[row['session_id']] = row
    if not rows:
        raise ValueError(f'{path}: expected at least one row, found none')
    if len(generators := sorted({row['generator'] for row in rows.values()})) > 1:
        raise ValueError(f'{path}, generator: expected one, found {", ".join(generators[:5])}')
    return list(rows.values())


def _is_row(row: Any) -> bool:
    match row:
        case {
            'session_id': str(),
            'task': str(),
            'generator': str(),
            'version': str(),
            'satisfied': list() | None as satisfied,
            'judges': dict(judges),
        }:
            answered = all(isinstance(of, dict) and isinstance(of.get('model'), str) for of in judges.values())
            return answered and all(isinstance(x, bool) for x in satisfied or [])
    return False
