"""Judge files in the benchmark's own layout, as scores and comparisons.

A row without a verdict that can be read is counted, and is never a number. The benchmark's own code fails at such rows:
what our judges could not say is in a file beside theirs, MODEL.failures.jsonl, which is counted with it. Its name is
none of a judge file, as that code reads every .json of a folder.
"""

import collections
import dataclasses
import pathlib
import re
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from simrl.conversations.row_files import placed_rows, write_rows
from simrl.evaluation.wildbench.generations import read_list
from simrl.evaluation.wildbench.tasks import NO_TASK
from simrl.run.stage_files import write_json

NO_VERDICT = 'no verdict'
OUTCOMES = {'win_much': 1.0, 'win': 0.5, 'tie': 0.0, 'lose': -0.5, 'lose_much': -1.0}


@dataclasses.dataclass(frozen=True)
class Score:
    """A judge's score of a reply, from 1 to 10."""

    task: str
    score: float
    reply: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A judge's verdict on a reply and the reference's.

    Attributes:
        value: of `OUTCOMES`, in the eyes of the assistant that is not the reference.
        first: the one whose reply was shown first.
    """

    task: str
    value: float
    reply: str
    reference: str
    first: Literal['assistant', 'reference']


def judge_file(folder: pathlib.Path, judge: str, generator: str, reference: str | None = None) -> pathlib.Path:
    """The place of a judge file in the benchmark's layout; `reference`: of pairs.

    What a file name cannot hold is written as %XX, so that models of different names have different places.
    """

    def part(name: str) -> str:
        return urllib.parse.quote(name, safe='@=+')

    pair = [] if reference is None else [f'ref={part(reference)}']
    return folder.joinpath(f'eval={part(judge)}', *pair, f'{part(generator)}.json')


def names_of(path: pathlib.Path) -> tuple[str, str]:
    """The judge and the assistant of a judge file, by its place (`judge_file`).

    Raises:
        ValueError: it is in no folder eval=JUDGE.
    """
    judges = [name for part in path.absolute().parts[:-1] for start, _, name in [part.partition('eval=')] if not start]
    if not judges:
        raise ValueError(f'{path}: expected a file in a folder eval=JUDGE, which names the judge, found none')
    name = re.sub(r'\.(json|jsonl|jsonl\.gz)$', '', path.name)
    return urllib.parse.unquote(judges[-1]), urllib.parse.unquote(name)


def write_verdicts(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> collections.Counter[str]:
    """Writes a judge file of rows of `verdicts`; returns the number of those without a verdict by cause.

    Rows without a verdict go into the file beside it. Without any verdict there is no judge file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failed, done = ([row for row in rows if (row['parsed_result'] is None) == lost] for lost in (True, False))
    for file, write, some in ((path, write_json, done), (_failures(path), write_rows, failed)):
        if some:
            write(file, some)
        else:
            file.unlink(missing_ok=True)
    return collections.Counter(row['meta_data']['cause'] for row in failed)


def _failures(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix('.failures.jsonl')


def _failed(path: pathlib.Path) -> collections.Counter[str]:
    """The rows of the file beside a judge file, by cause; without one there are none."""
    file = _failures(path)
    causes = collections.Counter[str]()
    for place, row in placed_rows(file) if file.exists() else ():
        match row:
            case {'meta_data': {'cause': str(cause)}}:
                causes[cause] += 1
            case _:
                raise ValueError(f'{place}: expected meta_data with a cause, found {_fields(row)}')
    return causes


def read_scores(path: pathlib.Path, dropped: Collection[str] = ()) -> tuple[list[Score], collections.Counter[str]]:
    """Reads a judge file of scores; also counts what is left out by cause, such as rows without a readable score.

    Args:
        path: .json as the benchmark writes it, or .jsonl or .jsonl.gz with a row a line.
        dropped: ids of rows that are no tasks, as of `read_tasks`: scores of replies to them are left out.

    Raises:
        ValueError: a row has no id or no reply, an id is there twice, or the rows name several assistants.
    """
    found, left_out, seen, assistants = [], _failed(path), set[tuple[str, ...]](), set[str]()
    for place, row in _rows(path):
        match row:
            case {'session_id': str(task), 'model_output': str(reply)}:
                score = _score(row.get('score'))
            case _:
                raise ValueError(f'{place}: expected session_id and model_output, found {_fields(row)}')
        _check_new(place, seen, (task,))
        assistants |= {row['model_test']} if isinstance(row.get('model_test'), str) else set()
        if len(assistants) > 1:
            raise ValueError(f'{place}, model_test: expected one assistant, found {sorted(assistants)}')
        if task in dropped or score is None:
            left_out[NO_TASK if task in dropped else NO_VERDICT] += 1
        else:
            found.append(Score(task, score, reply))
    _check_some(path, found)
    return found, left_out


def _score(value: Any) -> float | None:
    """A number from 1 to 10, also as text, as judges write it; else None."""
    try:
        score = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0.0
    except ValueError:
        return None
    return score if 1 <= score <= 10 else None


def read_comparisons(
    path: pathlib.Path, reference: str, dropped: Collection[str] = ()
) -> tuple[list[Comparison], collections.Counter[str]]:
    """Reads a judge file of pairs; also counts what is left out by cause, such as rows without a verdict.

    Args:
        path, dropped: as for `read_scores`.
        reference: name of the reference in the file.

    Raises:
        ValueError: a row is no comparison of the reference with the one other assistant of the file, or one of the same
            task and order is there twice. It names the row.
    """
    found, left_out, others, seen = [], _failed(path), set[str](), set[tuple[str, ...]]()
    for place, row in _rows(path):
        match row:
            case {'session_id': str(task), 'model_A': str(a), 'model_B': str(b), 'model_outputs': Mapping() as outputs}:
                pass
            case _:
                raise ValueError(
                    f'{place}: expected session_id, model_A, model_B and model_outputs, found {_fields(row)}'
                )
        if (a == reference) == (b == reference) or not all(isinstance(outputs.get(name), str) for name in (a, b)):
            raise ValueError(f'{place}: expected replies of {reference!r} and another, found those of {a!r} and {b!r}')
        other = b if a == reference else a
        others.add(other)
        if len(others) > 1:
            raise ValueError(f'{place}: expected one assistant beside the reference, found {sorted(others)}')
        first: Literal['assistant', 'reference'] = 'reference' if a == reference else 'assistant'
        _check_new(place, seen, (task, f'{first} first'))
        value = _value(row.get('winner'), row.get('extent'), other, reference)
        if task in dropped or value is None:
            left_out[NO_TASK if task in dropped else NO_VERDICT] += 1
        else:
            found.append(Comparison(task, value, outputs[other], outputs[reference], first))
    _check_some(path, found)
    return found, left_out


def _value(winner: Any, extent: Any, other: str, reference: str) -> float | None:
    if winner == 'tie':
        return 0.0
    if winner not in (other, reference) or isinstance(extent, bool) or extent not in (1, 2):
        return None
    return float(extent / 2 if winner == other else -extent / 2)


def _rows(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Rows with their places."""
    if path.suffix == '.json':
        return [(f'{path}, row {number}', row) for number, row in enumerate(read_list(path), start=1)]
    return list(placed_rows(path))


def _fields(row: Any) -> str:
    return ', '.join(sorted(row)) if isinstance(row, Mapping) else type(row).__name__


def _check_new(place: str, seen: set[tuple[str, ...]], key: tuple[str, ...]) -> None:
    """Refuses a second row of a session_id and order, with a verdict or without; adds the key to those seen."""
    if key in seen:
        raise ValueError(f'{place}: expected one row of a session_id and order, found another of {", ".join(key)}')
    seen.add(key)


def _check_some(path: pathlib.Path, found: Sequence[Any]) -> None:
    if not found:
        raise ValueError(f'{path}: expected at least one verdict, found none')
