"""People's turns of conversations, and rows of them."""

import dataclasses

import pytest

from simrl.conversations.records import Conversation, Message
from simrl.evaluation.fidelity.turns import Turn, paired, read_turns, turns_of, write_turns
from simrl.run.config import ConfigError


def conversation(number: int, end: str) -> Conversation:
    messages = tuple(Message(('user', 'assistant')[i % 2], f'message {i}', truncated=i == 2) for i in range(number))
    return Conversation('c', 'made up', 'test', (Message('system', 's'), *messages), end, 'a goal')


@pytest.mark.parametrize(
    ('number', 'end', 'real', 'ends'),
    [
        (4, 'natural', ['message 0', 'message 2', None], [False, False, True]),
        (5, 'natural', ['message 0', 'message 2', 'message 4'], [False, False, True]),
        (4, 'unknown', ['message 0', 'message 2'], [False, False]),
        (5, 'cut', ['message 0', 'message 2', 'message 4'], [False, False, None]),
        (1, 'natural', ['message 0'], [True]),
    ],
)
def test_a_person_who_leaves_has_a_turn_of_its_own_and_an_end_that_is_not_natural_has_none(number, end, real, ends):
    turns = turns_of(conversation(number, end))
    assert [turn.real for turn in turns] == real
    assert [turn.real_end for turn in turns] == ends
    assert [turn.turn for turn in turns] == list(range(len(real)))
    assert [turn.real_truncated for turn in turns] == [text == 'message 2' for text in real]
    assert turns_of(conversation(number, end), first=1) == turns[1:]


def test_turns_are_read_as_they_were_written_and_others_are_refused_by_line_and_field(tmp_path):
    person = turns_of(conversation(4, 'natural'))
    turns = [
        dataclasses.replace(person[0], simulated='hello', ended=False),
        dataclasses.replace(person[1], failure='no answer'),
        dataclasses.replace(person[2], ended=True),
    ]
    write_turns(tmp_path / 'turns.jsonl', turns)
    assert read_turns(tmp_path / 'turns.jsonl') == turns
    row = (tmp_path / 'turns.jsonl').read_text().splitlines()[0]
    for old, new, error in (
        ('"turn": 0', '"turn": "0"', r'bad\.jsonl, line 2\.turn: expected int, found'),
        ('"turn": 0', '"turn": -1', r'bad\.jsonl, line 2\.turn: expected at least 0, found -1'),
        ('"simulated": "hello"', '"simulated": null', r'line 2\.simulated: expected a text, .* found None'),
        ('"real": "message 0"', '"real": null', r'line 2\.real: expected a text, .* found None'),
    ):
        (tmp_path / 'bad.jsonl').write_text(f'{row}\n{row.replace(old, new)}\n')
        with pytest.raises(ConfigError, match=error):
            read_turns(tmp_path / 'bad.jsonl')


def test_what_distances_leave_out_is_counted_by_reason():
    turn = Turn('c', 's', 1, real='yes', real_end=False)
    turns = [
        turn,
        dataclasses.replace(turn, simulated='no', ended=False),
        dataclasses.replace(turn, simulated='bye', ended=True),
        dataclasses.replace(turn, ended=True),
        dataclasses.replace(turn, simulated=' ', ended=False),
        dataclasses.replace(turn, failure='x'),
        dataclasses.replace(turn, real=None, real_end=True),
        dataclasses.replace(turn, real_truncated=True),
    ]
    kept, counts = paired(turns)
    assert kept == turns[:3]
    assert counts == {
        'the simulator ended without a word': 1,
        "the simulator's message is empty": 1,
        'the simulator failed': 1,
        'the person left without a word': 1,
        "the data set cut the person's message": 1,
    }
