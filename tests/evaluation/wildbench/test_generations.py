"""Replies in the official layout: read back, and refused where they are of other tasks."""

import collections
import json
import pathlib
from collections.abc import Sequence

import pytest

from simrl.conversations.completion import NoText
from simrl.conversations.records import Message
from simrl.evaluation.wildbench.generations import (
    Generation,
    GenerationSettings,
    missing,
    read_generations,
    sample,
    write_generations,
)
from simrl.remote.cache import Cache
from simrl.rollouts.completion import Sampled
from tests.evaluation.wildbench.made_up import task, tasks_of

TASKS = tasks_of(*(task(number, turns=1 + number) for number in range(3)))
FIELDS = {'session_id', 'chat_history', 'model_input', 'output', 'generator', 'configs', 'dataset', 'primary_tag'}


def official(name: str, **changes: object) -> dict:
    """A row as the benchmark's code writes it."""
    messages = [message.content for message in TASKS[name].messages]
    row = {'session_id': name, 'chat_history': messages, 'model_input': 'n/a', 'output': [' hi\n'], 'generator': 'm'}
    return row | {'configs': {}, 'dataset': 'wild_bench_v2'} | changes


def write(path: pathlib.Path, rows: object) -> pathlib.Path:
    path.write_text(json.dumps(rows))
    return path


def test_a_file_is_read_back_in_the_order_of_the_tasks(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'a' / 'm.json'
    found = [Generation(name, f' {name}\n', 'm', truncated=name == 'task1') for name in ('task2', 'task1')]
    write_generations(path, found, TASKS, GenerationSettings(7, 0.5, 0.9))
    replies, left_out = read_generations(path, TASKS)
    assert (replies, left_out) == ({of.task: of for of in found[::-1]}, 0)
    assert missing(TASKS, replies) == ['task0']
    rows = json.loads(path.read_text())
    assert all(row.keys() >= FIELDS for row in rows)
    assert rows[0]['chat_history'] == [message.content for message in TASKS['task2'].messages]
    assert rows[0]['configs'] == {
        'engine': None,
        'repetition_penalty': 1.0,
        'temperature': 0.5,
        'top_p': 0.9,
        'max_tokens': 7,
    }


def test_official_files_are_read_with_their_text_as_it_is(tmp_path: pathlib.Path) -> None:
    """Outer white space of a prompt, which tasks are read without, makes no other prompt of it."""
    rows = [official('task0', chat_history=[' Question 0.0?\n']), official('task1', output=[''])]
    rows.append(official('task2', output='text'))
    found, _ = read_generations(write(tmp_path / 'm.json', rows), TASKS)
    assert [of.text for of in found.values()] == [' hi\n', '', 'text']
    assert {of.truncated for of in found.values()} == {None}


def test_replies_to_rows_that_are_no_tasks_are_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / 'm.json', [official('task0'), official('task1') | {'session_id': 'x'}])
    found, left_out = read_generations(path, TASKS, {'x', 'y'})
    assert (list(found), left_out) == (['task0'], 1)
    with pytest.raises(ValueError, match=r"m.json: .* found 1 others, for instance 'x'"):
        read_generations(path, TASKS, {'y'})
    with pytest.raises(ValueError, match=r'm.json: expected replies to tasks, found 2, all to rows that are none'):
        read_generations(path, TASKS, {'x', 'task0'})


BAD = {
    'twice': ([official('task0')] * 2, "expected each session_id once, found 'task0' 2 times"),
    'unknown': ([official('task0') | {'session_id': 'x'}], "found 1 others, for instance 'x'"),
    'another prompt': ([official('task1', chat_history=['a', 'b', 'c'])], "'task1', chat_history: expected the 3"),
    'fewer messages': ([official('task1', chat_history=['Question 1.0?'])], 'found another conversation of 1'),
    'two assistants': ([official('task0'), official('task1', generator='n')], 'generator: expected one, found m, n'),
    'two replies': ([official('task0', output=['a', 'b'])], 'row 1, output: expected a list of one text'),
    'no reply': ([official('task0'), official('task1', output=[])], 'row 2, output: expected a list of one text'),
    'null': ([official('task0', output=[None])], 'row 1, output'),
    'numbers': ([official('task0', chat_history=[1])], 'row 1, chat_history: expected texts'),
    'a field missing': ([{'session_id': 'task0'}], r"row 1: expected session_id, .*found \['session_id'\]"),
    'no rows': ([], 'found an empty one'),
    'an object': ({}, 'found dict'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_one_error(tmp_path: pathlib.Path, name: str) -> None:
    rows, expected = BAD[name]
    with pytest.raises(ValueError, match=f'm.json.*{expected}'):
        read_generations(write(tmp_path / 'm.json', rows), TASKS)


def test_replies_on_the_device_are_kept_as_they_come(tmp_path: pathlib.Path) -> None:
    """A call that dies at its second batch loses no reply of the first; other identities find none."""
    asked: list[int] = []

    def replies(chats: Sequence[Sequence[Message]], attempt: int) -> list[Sampled | NoText]:
        asked.append(len(chats))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [
            NoText('prompt too long') if 'Question 1' in chat[-1].content else Sampled(chat[-1].content, len(chat) > 1)
            for chat in chats
        ]

    def call(identity: str) -> tuple[list[Generation], collections.Counter[str]]:
        return sample(TASKS, replies, cache, generator='m', identity=identity, batch_size=2)

    with Cache(tmp_path / 'c.sqlite') as cache:
        with pytest.raises(KeyboardInterrupt):
            call('m')
        found, failed = call('m')
        assert call('m') == (found, failed)
        assert asked == [2, 1, 2, 1], 'a failure is asked for again'
        assert call('n') == (found, failed)
        assert asked[4:] == [2, 1]
    assert [(of.task, of.text, of.truncated) for of in found] == [
        ('task0', 'Question 0.0?', False),
        ('task2', 'Question 2.2?', True),
    ]
    assert failed == {'prompt too long': 1}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r'GenerationSettings.max_tokens: expected at least 1'):
        GenerationSettings(max_tokens=0)
    with pytest.raises(ValueError, match='temperature'):
        GenerationSettings(temperature=-1.0)
