"""OASST1 and hh-rlhf: planted trees and transcripts become the conversations and pairs that a reader would make."""

import collections
import dataclasses
import pathlib
import random

import pyarrow
import pyarrow.parquet
import pytest

from simrl.conversations import choices
from simrl.conversations.choices import HHSettings, Oasst1Settings
from simrl.conversations.records import read_conversations, read_preferences
from tests.conversations.wildchat_rows import write_jsonl


def message(name: str, parent: str | None, text: str, rank: int | None = None, **fields: object) -> dict:
    """A message as OASST1 has it. Names of an assistant's begin with a."""
    return {
        'message_id': name,
        'parent_id': parent,
        'user_id': 'u',
        'created_date': '2023-02-05T14:23:50.983374+00:00',
        'text': text,
        'role': 'assistant' if name.startswith('a') else 'prompter',
        'lang': 'en',
        'review_count': 3,
        'review_result': True,
        'deleted': False,
        'rank': rank,
        'synthetic': False,
        'message_tree_id': 'tree',
        'tree_state': 'ready_for_export',
    } | fields


def trees() -> list[dict]:
    """Two trees in English; a5 and a6 end paths of equal length."""
    return [
        message('p1', None, 'How do I knit?'),
        message('a1', 'p1', 'With needles.', rank=1),
        message('a2', 'p1', 'Take two needles.', rank=0),
        message('a3', 'p1', 'No.', rank=2),
        message('a4', 'p1', 'Perhaps.'),  # not ranked
        message('p2', 'a1', 'And then?'),
        message('p3', 'a2', 'Which ones?'),
        message('a5', 'p3', 'Any.', rank=0),
        message('a6', 'p3', 'Any.', rank=1),  # says what a5 says
        message('a7', 'p2', 'Cast on.', deleted=True),
        message('p4', 'a7', 'Why?'),  # answers a deleted message
        message('p5', None, 'Was ist das?', lang='de'),
        message('a8', 'p5', 'Ein Ding.', lang='de'),
        message('p6', None, 'Name a fish'),
        message('a9', 'p6', 'Cod.', rank=0),
        message('a10', 'p6', 'Carp.', rank=0),
    ]


DROPPED = {
    'deleted message': 1,
    'language is not en': 2,
    'answer to a message that is left out': 1,
    'equal replies': 1,
    'replies of equal rank': 1,
}


def test_trees_become_longest_paths_and_ranked_pairs(tmp_path):
    rows = trees()
    random.Random(0).shuffle(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'oasst1.parquet')
    made = choices.prepare_oasst1(str(tmp_path / 'oasst1.parquet'), tmp_path / 'out', Oasst1Settings())
    assert made['dropped'] == DROPPED
    conversations, counts = read_conversations(tmp_path / 'out' / 'conversations.jsonl.gz')
    assert not counts
    assert {c.id: [m.content for m in c.messages] for c in conversations} == {
        'p1': ['How do I knit?', 'Take two needles.', 'Which ones?', 'Any.'],
        'p6': ['Name a fish', 'Carp.'],
    }
    assert {c.end for c in conversations} == {'unknown'}
    preferences, _ = read_preferences(tmp_path / 'out' / 'preferences.jsonl.gz')
    assert {p.id: (p.chosen, p.rejected) for p in preferences} == {
        'a2-a1': ('Take two needles.', 'With needles.'),
        'a2-a3': ('Take two needles.', 'No.'),
        'a1-a3': ('With needles.', 'No.'),
    }
    assert {p.split for p in preferences} == {c.split for c in conversations if c.id == 'p1'}
    for name, found in (('conversations', conversations), ('preferences', preferences)):
        assert made[name] == {split: sum(x.split == split for x in found) for split in ('train', 'dev', 'test')}


def test_the_best_and_the_worst_reply_alone():
    dropped: collections.Counter[str] = collections.Counter()
    _, preferences = choices.build_oasst1(trees(), dropped, Oasst1Settings(pairs='best_and_worst'))
    assert [p.id for p in preferences] == ['a2-a3']
    assert dropped == DROPPED


def transcript(*messages: str) -> str:
    return ''.join(f'\n\n{("Human", "Assistant")[i % 2]}: {text}' for i, text in enumerate(messages))


def hh_rows() -> list[dict]:
    twice = '\n\nHuman: One' + transcript('Two', 'Yes.')
    pair = {
        'chosen': transcript('Hi', 'Hello.', 'Bye', 'So long.'),
        'rejected': transcript('Hi', 'Hello.', 'Bye', 'No.'),
    }
    return [
        {'chosen': transcript('Hi', 'Hello.'), 'rejected': transcript('Hi', 'What?')},  # the start of the next
        pair,
        pair,  # again
        {'chosen': transcript('Sing', 'La.\n\nLa.'), 'rejected': transcript('Sing', 'No.')},
        {'chosen': transcript('A', 'B'), 'rejected': transcript('C', 'D')},
        {'chosen': transcript('A', 'B', 'C'), 'rejected': transcript('A', 'B', 'D')},
        {'chosen': transcript('Same', 'Yes.'), 'rejected': transcript('Same', 'Yes.')},
        {'chosen': transcript('Empty', ' '), 'rejected': transcript('Empty', 'No.')},
        {'chosen': 'Hello', 'rejected': transcript('Hello', 'No.')},
        {'chosen': None, 'rejected': transcript('Hello', 'No.')},
        {'chosen': twice, 'rejected': twice.replace('Yes', 'No')},
    ]  # fmt: skip


def test_transcripts_become_pairs_and_one_conversation_an_opening(tmp_path):
    source = write_jsonl(tmp_path / 'train.jsonl.gz', hh_rows())
    made = choices.prepare_hh_rlhf(str(source), tmp_path / 'out', HHSettings())
    assert made['dropped'] == {
        'another conversation with this opening': 1,
        'duplicate pair': 1,
        'transcripts differ before the last reply': 2,
        'equal replies': 1,
        'empty content': 1,
        'no transcript': 1,
        'wrong type': 1,
        'two user messages in a row': 1,
    }
    conversations, _ = read_conversations(tmp_path / 'out' / 'conversations.jsonl.gz')
    said = sorted([m.content for m in c.messages] for c in conversations)
    assert said == [['Hi', 'Hello.', 'Bye', 'So long.'], ['Sing', 'La.\n\nLa.']]
    preferences, _ = read_preferences(tmp_path / 'out' / 'preferences.jsonl.gz')
    assert sorted((p.opening, p.chosen, p.rejected) for p in preferences) == [
        ('Hi', 'Hello.', 'What?'),
        ('Hi', 'So long.', 'No.'),
        ('Sing', 'La.\n\nLa.', 'No.'),
    ]


@pytest.mark.parametrize('prepare', [choices.prepare_oasst1, choices.prepare_hh_rlhf])
def test_openings_are_never_in_two_splits_and_a_second_command_confirms(tmp_path, prepare):
    if prepare is choices.prepare_hh_rlhf:
        settings: Oasst1Settings | HHSettings = HHSettings()
        rows = [
            {'chosen': transcript(f'Ask {i // 2}', f'{i}'), 'rejected': transcript(f'Ask {i // 2}', '?')}
            for i in range(400)
        ]
    else:
        settings = Oasst1Settings()
        rows = [
            row
            for i in range(400)
            for row in (
                message(f'p{i}', None, f'Ask {i // 2}'),
                *(message(f'a{i}-{rank}', f'p{i}', f'{rank}', rank=rank) for rank in range(2)),
            )
        ]
    source = str(write_jsonl(tmp_path / 'rows.jsonl', rows))
    made = prepare(source, tmp_path / 'out', settings)
    records = [
        *read_conversations(tmp_path / 'out' / 'conversations.jsonl.gz')[0],
        *read_preferences(tmp_path / 'out' / 'preferences.jsonl.gz')[0],
    ]
    splits = collections.defaultdict(set)
    for record in records:
        splits[record.opening].add(record.split)
    assert len(splits) == 200
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {'train', 'dev', 'test'}
    assert prepare(source, tmp_path / 'out', settings) == made
    other = dataclasses.replace(settings, splits=dataclasses.replace(settings.splits, seed=1))
    with pytest.raises(ValueError, match=r'settings\.splits\.seed: 42 -> 1'):
        prepare(source, tmp_path / 'out', other)


@pytest.mark.parametrize('prepare', [choices.prepare_oasst1, choices.prepare_hh_rlhf])
def test_other_data_is_refused(tmp_path: pathlib.Path, prepare):
    settings = Oasst1Settings() if prepare is choices.prepare_oasst1 else HHSettings()
    source = write_jsonl(tmp_path / 'rows.jsonl', [{'prompt': 'Hi'}])
    with pytest.raises(ValueError, match=r'rows\.jsonl, line 1: expected the fields (message_id|chosen), '):
        prepare(str(source), tmp_path / 'out', settings)
    source = write_jsonl(tmp_path / 'rows.jsonl', [])
    with pytest.raises(ValueError, match=r'rows\.jsonl: expected conversations and pairs that stay, found none'):
        prepare(str(source), tmp_path / 'out', settings)
