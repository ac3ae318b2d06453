"""Tasks: rows of the benchmark are read whole, bad ones are named, and overlap is found by content."""

import gzip
import json
import pathlib

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.row_files import RowError
from simrl.evaluation.wildbench.tasks import (
    FIELDS,
    GROUPS,
    SOURCE,
    Overlap,
    by_group,
    check_known,
    overlap_of,
    read_tasks,
)
from tests.conversations.test_wildchat import Hub
from tests.evaluation.wildbench.made_up import task, task_row, tasks_of

ROWS = [task_row(number, turns=1 + number % 3) for number in range(6)]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = ''.join(json.dumps(row) + '\n' for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
    return str(path)


@pytest.mark.parametrize('name', ['t.jsonl', 't.jsonl.gz', 't.parquet'])
def test_all_formats_give_the_same_tasks(tmp_path: pathlib.Path, name: str) -> None:
    tasks, counts, dropped = read_tasks(write(tmp_path / name, ROWS))
    assert not dropped
    assert list(tasks) == [row['session_id'] for row in ROWS]
    assert not counts
    for row, found in zip(ROWS, tasks.values(), strict=True):
        assert [message.content for message in found.messages] == [m['content'] for m in row['conversation_input']]
        assert found.messages[-1].role == 'user'
        assert list(found.checklist) == row['checklist']
        assert found.groups[0] == GROUPS[row['primary_tag']]
        assert set(found.groups) == {GROUPS[tag] for tag in (row['primary_tag'], *row['secondary_tags'])}


BAD = {
    'no checklist': ({'checklist': []}, 'checklist: expected at least one item'),
    'null checklist': ({'checklist': None}, 'checklist: expected at least one item'),
    'empty item': ({'checklist': ['ok', ' ']}, 'checklist: expected texts that are not empty'),
    'text for a list': ({'checklist': 'ok'}, 'checklist: expected texts'),
    'unknown tag': ({'primary_tag': 'Poetry'}, "unknown tag: .*found 'Poetry'"),
    'unknown second tag': ({'secondary_tags': ['x']}, "unknown tag: .*found 'x'"),
    'no tag': ({'primary_tag': None}, 'primary_tag: expected texts'),
    'no id': ({'session_id': ''}, 'id: expected a string'),
    'the assistant last': (
        {'conversation_input': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]},
        "conversation_input: expected it to end with a user message, found the assistant's",
    ),
    'no messages': ({'conversation_input': []}, 'expected at least one user message'),
    'empty message': ({'conversation_input': [{'role': 'user', 'content': ' '}]}, 'expected text, found none'),
    'same id': ({'session_id': 'task0'}, "duplicate id: session_id: .* found 'task0' again"),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: pathlib.Path, name: str) -> None:
    changes, expected = BAD[name]
    path = write(tmp_path / 't.jsonl', [ROWS[0], task_row(1, **changes), ROWS[2]])
    with pytest.raises(RowError, match=f't.jsonl, row 2: .*{expected}'):
        read_tasks(path)
    tasks, counts, dropped = read_tasks(path, on_bad_rows='drop')
    assert list(tasks) == ['task0', 'task2']
    assert counts.total() == 1
    assert dropped == {changes.get('session_id', 'task1')} - tasks.keys()


def test_a_file_without_tasks_is_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / 't.jsonl', [task_row(0, checklist=[])])
    with pytest.raises(ValueError, match=r"expected at least one task, found none; rows dropped: \{'no checklist': 1"):
        read_tasks(path, on_bad_rows='drop')
    with pytest.raises(ValueError, match='line 1: expected the fields checklist, found only'):
        read_tasks(write(tmp_path / 'u.jsonl', [{k: v for k, v in ROWS[0].items() if k != 'checklist'}]))
    with pytest.raises(FileNotFoundError, match=r'missing.jsonl'):
        read_tasks(str(tmp_path / 'missing.jsonl'))


def test_tasks_of_the_hub_are_streamed_of_their_config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / 't.parquet', ROWS)
    hub = Hub({SOURCE: pathlib.Path(path)}, monkeypatch)
    assert read_tasks(revision='abc') == read_tasks(path)
    (call,) = hub.calls
    assert call[0] == 'allenai/WildBench'
    expected = {'name': 'v2', 'split': 'test', 'revision': 'abc', 'streaming': True, 'columns': list(FIELDS)}
    assert expected.items() <= call[1].items()


def test_a_hub_without_the_tasks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError('cannot reach the hub.\n\n  Check your connection.')

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', unreachable)
    with pytest.raises(FileNotFoundError) as error:
        read_tasks()
    assert str(error.value) == (
        'allenai/WildBench: no such file or folder, and the hub gives no data set of this name: ConnectionError: '
        'cannot reach the hub. Check your connection.'
    )


def test_overlap_is_by_content_and_of_first_messages_only() -> None:
    tasks = tasks_of(*(task(number, turns=2) for number in range(4)))
    found = overlap_of(tasks, ['question  1.0?', 'Question 3.0?\n', 'Question 2.1?', 'task0'])
    assert found == Overlap(4, ('task1', 'task3'))
    assert found.others({'task3': 1.0, 'task2': 0.5, 'task0': 0.25}) == [0.5, 0.25]
    assert overlap_of(tasks, ['x']) == Overlap(1, ())


def test_nothing_to_compare_with_is_no_overlap_of_0() -> None:
    with pytest.raises(ValueError, match='overlap: expected at least one training conversation, found none'):
        overlap_of(tasks_of(task(0)), [])


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_value_counts_in_each_group_of_its_task(numbers: set[int]) -> None:
    tasks = tasks_of(*map(task, numbers))
    found = by_group(tasks, {f'task{number}': float(number) for number in numbers})
    slow = {
        group: [float(number) for number in numbers if group in task(number).groups] for group in set(GROUPS.values())
    }
    assert found == {group: values for group, values in slow.items() if values}


def test_ids_that_no_task_has_or_that_are_there_twice_are_refused() -> None:
    tasks = tasks_of(task(0), task(1))
    check_known(tasks, ['task1', 'task0'], 'f')
    with pytest.raises(ValueError, match="f: expected each session_id once, found 'task1' 2 times"):
        check_known(tasks, ['task1', 'task1'], 'f')
    with pytest.raises(ValueError, match=r"f: .* found 2 others, for instance 'x'"):
        check_known(tasks, ['task1', 'x', 'y'], 'f')
