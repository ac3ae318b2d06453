"""The tool on people alone, on a run that is not finished, and on what is neither."""

import json

import pytest

from simrl.conversations.records import Conversation, Message, write_conversations
from simrl.evaluation.fidelity import distances
from simrl.evaluation.fidelity.turns import Turn, write_turns
from tools import fidelity


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(distances, 'DRAWS', 20)


WITHOUT = ['--words=', '--tags=', '--sentiment=', '--embeddings=']


def people(folder, split='test'):
    write_conversations(
        folder / 'conversations.jsonl.gz',
        [
            Conversation(
                f'c{c}',
                f'set {c % 2}',
                split,
                tuple(Message(('user', 'assistant')[i % 2], f'message {c} {"word " * i}') for i in range(4 + c % 2)),
            )
            for c in range(8)
        ],
    )


def test_people_alone_need_no_run(tmp_path, capsys):
    people(tmp_path)
    fidelity.main([f'--people={tmp_path}', f'--json={tmp_path}/out.json', *WITHOUT])
    shown = capsys.readouterr().out
    assert 'people, all sources. 12 turns of 8 conversations' in shown
    assert 'people, set 1. 8 turns of 4 conversations' in shown
    assert 'Not measured: sentence embedding: no annotator is named for embeddings.' in shown
    assert 'simulator  excess' not in shown
    found = json.loads((tmp_path / 'out.json').read_text())['people']
    assert found['set 0']['distances']['utterance length']['people'] == 0.0
    fidelity.main([f'--people={tmp_path}/conversations.jsonl.gz', '--openings', *WITHOUT])
    shown = capsys.readouterr().out
    assert '20 turns of 8 conversations' in shown
    assert 'diversity of openings' in shown


def test_a_run_shows_what_is_there(tmp_path, capsys):
    turns = [
        Turn(f'c{c}', 'set', t, 'natural', real='a word', real_end=t == 1, simulated='A word.', ended=t == 1)
        for c in range(4)
        for t in (0, 1)
    ]
    for name in ('mine', 'tuned/seed-0'):
        (tmp_path / 'replay' / name).mkdir(parents=True)
        write_turns(tmp_path / 'replay' / name / 'turns.jsonl.gz', turns)
    (tmp_path / 'likelihood/mine').mkdir(parents=True)
    likelihood = {'log_likelihood': [0.0, 0.0], 'tokens': [1, 2], 'source': ['set', 'other']}
    (tmp_path / 'likelihood/mine/result.json').write_text(json.dumps(likelihood))
    fidelity.main([str(tmp_path), *WITHOUT])
    mine, tuned = capsys.readouterr().out.split('tuned/seed-0, set.')
    assert 'mine, set. 8 turns of 4 conversations' in mine
    assert 'perplexity of the person' in mine
    assert 'perplexity' not in tuned
    assert 'ends: F1' in tuned


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        ([], 'expected either RUN or --people=FOLDER'),
        (['{}', '--people={}'], 'expected either RUN or --people=FOLDER'),
        (['{}/run'], 'replay: expected replays of people, found none: the run needs config.evaluation.replayed=N'),
        (['{}'], ': expected a run directory, with a config.json of simrl, found none'),
        (['{}/none'], 'none: expected a run directory, with a config.json of simrl, found none'),
        (['--people={}'], 'expected turns after openings in the splits dev, test, found none'),
        (['--people={}/none.jsonl'], 'No such file'),
        (['--people={}', '--words=x'], "Annotators.words: expected 'module:function' or '', found 'x'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, error, tmp_path, capsys):
    people(tmp_path, 'train')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text('{}')
    with pytest.raises(SystemExit):
        fidelity.main([argument.format(tmp_path) for argument in arguments] + WITHOUT * (len(arguments) < 2))
    printed = capsys.readouterr()
    assert error in printed.err
    assert fidelity.ABOUT not in printed.out
