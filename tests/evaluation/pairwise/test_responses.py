"""Responses of assistants: what they were given is the same for all, or an error names the rows that differ."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from simrl.evaluation.pairwise.responses import NOT_KEPT, compared, read_responses
from simrl.evaluation.wildbench.generations import Generation, GenerationSettings, write_generations
from tests.evaluation.wildbench import made_up


def row(name: str, *texts: str, **more: Any) -> dict[str, Any]:
    """A row whose messages alternate from the user's."""
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
    return {'id': name, 'messages': messages, **more}


def write(path: pathlib.Path, *rows: Any) -> pathlib.Path:
    path.write_text(''.join(json.dumps(of) + '\n' for of in rows))
    return path


def read_all(folder: pathlib.Path, given: Any = 'opening', **rows: Sequence[Any]) -> dict[str, Any]:
    return {name: read_responses(write(folder / f'{name}.jsonl', *own), given)[0] for name, own in rows.items()}


@pytest.mark.parametrize(
    ('given', 'prompt', 'characters'), [('nothing', 's', 6), ('opening', 'su', 6), ('history', 'suau', 3)]
)
def test_what_was_given_is_no_part_of_the_response(tmp_path, given, prompt, characters) -> None:
    whole = row('x', 'hi', 'one', 'and', ' two ')
    whole['messages'].insert(0, {'role': 'system', 'content': 'be brief'})
    response = read_all(tmp_path, given, a=[whole])['a']['x']
    assert ''.join(message.role[0] for message in response.prompt) == prompt
    assert [*response.prompt, *response.rest] == list(response.messages)
    assert response.num_characters == characters


@pytest.mark.parametrize(
    ('bad', 'found'),
    [
        ({'messages': [{'role': 'user', 'content': 'a'}]}, 'line 2, id: expected a text that is not empty, found None'),
        (row('', 'a', 'b'), "line 2, id: expected a text that is not empty, found ''"),
        (row('x', 'a', person=3), 'line 2, person: expected a text or none, found 3'),
        ({'id': 'x'}, "line 2, id 'x', messages: expected a list of objects, found None"),
        ({'id': 'x', 'messages': [{'role': 'user'}]}, "line 2, id 'x', message 0: expected a role of system, user, "),
        ({'id': 'x', 'messages': [{'role': 'bot', 'content': ''}]}, "id 'x', message 0: expected a role of "),
        ({'id': 'x', 'messages': row('', 'a', 'b')['messages'][1:]}, 'then the user first, found the roles assistant'),
        (row('x', 'a', 'b', 'c'), "id 'x', messages: expected the assistant's reply at the end, found the user's"),
        (row('first', 'a', 'b'), r"id 'first': expected another id, found 'first' again, as in .*line 1, id 'first'"),
        ('text', 'line 2: not JSON: expected an object'),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, found) -> None:
    with pytest.raises(ValueError, match=found):
        read_all(tmp_path, 'history', a=[row('first', 'a', 'b'), bad])


def test_a_file_of_no_responses_or_of_another_kind_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r'a.jsonl: expected at least one response, found none'):
        read_all(tmp_path, a=[])
    prompts = [row('x', 'hi'), row('y', 'hi', ' ')]
    with pytest.raises(ValueError, match=r'a.jsonl: expected messages of an assistant, found none with text in 2 rows'):
        read_all(tmp_path, a=prompts)
    found = read_all(tmp_path, a=[*prompts, row('z', 'hi', 'a')])['a']
    assert [of.num_characters for of in found.values()] == [0, 0, 1]
    for text, found in (('{', 'expected JSON'), ('{}', "expected WildBench's result layout or a stage")):
        (tmp_path / 'a.json').write_text(text)
        with pytest.raises(ValueError, match=found):
            read_responses(tmp_path / 'a.json')


def test_generations_are_replies_to_their_histories(tmp_path) -> None:
    tasks = made_up.tasks_of(made_up.task(0), made_up.task(1, turns=2))
    replies = [Generation(name, f'reply to {name}', 'mine') for name in tasks]
    write_generations(tmp_path / 'mine.json', replies, tasks, GenerationSettings())
    found, counts = read_responses(tmp_path / 'mine.json')
    assert not counts
    assert {name: of.prompt for name, of in found.items()} == {name: of.messages for name, of in tasks.items()}
    assert [of.rest[0].content for of in found.values()] == ['reply to task0', 'reply to task1']
    (tmp_path / 'mine.json').write_text(json.dumps([{'session_id': 'task0'}]))
    with pytest.raises(ValueError, match='row 1: expected session_id, chat_history, output and generator'):
        read_responses(tmp_path / 'mine.json')


def test_a_stage_has_the_conversations_that_it_keeps(tmp_path) -> None:
    """Without the message that ended one; those that it does not keep are counted."""
    shown = [
        {'example': f'e{i}', 'intent': 'tea', 'traits': {}, 'messages': row('', 'hi', 'tea?', 'bye')['messages']}
        for i in range(2)
    ]
    names = [f'e{i}' for i in range(5)]
    outcomes = {'example': names, 'cluster': ['e0', *['hi'] * 4], 'end': ['signal', *['turns'] * 4]}
    (tmp_path / 'result.json').write_text(json.dumps({'outcomes': outcomes, 'shown': shown}))
    found, counts = read_responses(tmp_path)
    assert [[message.content for message in of.rest] for of in found.values()] == [['tea?'], ['tea?', 'bye']]
    assert (counts, found['e0'].intent) == ({NOT_KEPT: 3}, 'tea')
    assert [of.person for of in found.values()] == ['e0', None]
    (tmp_path / 'result.json').write_text(json.dumps({'outcomes': outcomes, 'shown': [{'example': 'other'}]}))
    with pytest.raises(ValueError, match='conversation 1: expected an example of the stage'):
        read_responses(tmp_path)


def test_pairs_are_of_each_two_assistants_and_resampled_by_person_or_opening(tmp_path) -> None:
    rows = [row('x', 'hi', 'a', person='p'), row('y', ' hi ', 'a'), row('z', 'yo', 'a')]
    found = read_all(tmp_path, a=rows, b=rows[::-1], c=rows)
    pairs = compared(found)
    assert [(of.first, of.second) for of in pairs] == [('a', 'b')] * 3 + [('a', 'c')] * 3 + [('b', 'c')] * 3
    assert [(of.id, of.cluster, of.person) for of in pairs[:3]] == [
        ('x', 'person p', 'p'),
        ('y', 'opening hi', None),
        ('z', 'opening yo', None),
    ]
    assert [(of.first, of.second) for of in compared(found, against='b')[::3]] == [('a', 'b'), ('c', 'b')]
    told = [{**row('x', 'hi', 'a'), 'messages': [{'role': 'system', 'content': 's'}, *row('x', 'hi', 'a')['messages']]}]
    assert [of.cluster for of in compared(read_all(tmp_path, a=told, b=told))] == ['opening hi'], 'of the user'
    nothing = compared(read_all(tmp_path, 'nothing', a=rows, b=rows))
    assert [of.cluster for of in nothing] == ['person p', 'id y', 'id z']


ONE = row('x', 'hi', 'a')


@pytest.mark.parametrize(
    ('other', 'given', 'found'),
    [
        (
            [ONE, row('y', 'hi', 'a')],
            'opening',
            r"^a: expected a response to each id, found none to 'y' of .*b.jsonl, ",
        ),
        (
            [row('y', 'hi', 'a')],
            'opening',
            r"^a: .* found none to 'y' of .*b.jsonl, .* \(missing: 1 of 2\); --on_missing",
        ),
        (
            [row('x', 'yo', 'a')],
            'opening',
            r"b.jsonl, line 1.* the prompt of .*a.jsonl.* another message 0: 'yo'",
        ),
        ([row('x', 'hi', 'b', 'ok', 'c')], 'history', 'found 3 messages in the place of 1'),
        ([row('x', 'hi', 'a', intent='tea')], 'opening', "expected the intent of .*, found 'tea' in the place of None"),
        ([row('x', 'hi', 'a', person='p')], 'opening', "expected the person of .*, found 'p' in the place of None"),
    ],
)
def test_assistants_that_were_given_something_else_are_refused(tmp_path, other, given, found) -> None:
    with pytest.raises(ValueError, match=found):
        compared(read_all(tmp_path, given, a=[ONE], b=other))


def test_an_id_that_one_lacks_may_be_kept_as_a_failure(tmp_path) -> None:
    found = read_all(tmp_path, a=[row('x', 'hi', 'a'), row('y', 'hi', 'a')], b=[row('x', 'hi', 'b')])
    assert [of.id for of in compared(found, on_missing='failure')] == ['x', 'y']
    with pytest.raises(ValueError, match='a and b: expected ids with responses of both, found none'):
        compared(read_all(tmp_path, a=[row('x', 'hi', 'a')], b=[row('y', 'hi', 'b')]), on_missing='failure')
    with pytest.raises(ValueError, match='expected responses of at least two assistants, found a'):
        compared({'a': found['a']})
    with pytest.raises(ValueError, match="against: expected one of a, b, found 'c'"):
        compared(found, against='c')
