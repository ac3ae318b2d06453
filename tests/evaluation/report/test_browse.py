"""Conversations that a run kept become the data of a page, all of them, and nothing that runs."""

import json

import pytest

from simrl.evaluation.report import browse
from simrl.evaluation.report.browse import as_json, browse_page, training_talks
from simrl.evaluation.report.drawing import looks_of
from simrl.run.stage_files import WorkdirError
from tests.evaluation.report.fake_run import fake_results, training_rows


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=1, people=4)


def data_of(page):
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index('</script>', start)])


def write(path, rows):
    path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    return path


def test_rewards_by_part_and_by_message_and_causes_are_kept(tmp_path):
    rows = list(training_rows(12))
    single, lost = rows[1], rows[7]
    each = next(x for x in rows if isinstance(x['reward'], list) and len(x['reward']) > 1)
    each['reward'] = [0.25, None, *each['reward'][2:]]
    failed = {**single, 'reward': None, 'cause': 2, 'failure': 'HTTP 500'}
    found = training_talks('persona/seed-0', write(tmp_path / 'rl.jsonl', [single, each, lost, failed]))
    assert found[0].score == single['reward']
    assert found[0].parts == single['parts']
    assert found[0].notes == [('the simulator was told', single['told'])]
    known = [reward for reward in each['reward'] if reward is not None]
    assert found[1].score == sum(known) / len(known)
    assert found[1].parts == {'reward': each['reward'], **each['parts']}
    assert (found[2].score, found[2].notes[0]) == (None, ('no reward', 'a judge failed'))
    assert found[3].notes[0] == ('no reward', 'HTTP 500'), 'in the words of what failed'


def test_all_are_on_the_page_or_counted(results, tmp_path, monkeypatch):
    path = write(tmp_path / 'rl.jsonl', training_rows(30))
    kept = {'persona/seed-0': path, 'truth/seed-0': tmp_path / 'gone.jsonl'}
    looks = looks_of(results.experiment)
    page = browse_page(results, kept, looks)
    assert f'10 conversations of the evaluation, 30 of training. Not there: {tmp_path}/gone.jsonl.' in page
    talks = data_of(page)['talks']
    assert [talk['step'] for talk in talks[:10]] == [None] * 10
    assert [talk['example'] for talk in talks[10:]] == [row['example'] for row in training_rows(30)]
    monkeypatch.setattr(browse, 'MOST', 8)
    page = browse_page(results, kept, looks)
    assert 'Of the 30 that training kept the page has one of every 4.' in page
    assert [talk['step'] for talk in data_of(page)['talks'][10:]] == [x['step'] for x in list(training_rows(30))[::4]]


def test_no_text_ends_the_data(results, tmp_path):
    hostile = '</script><!--<script>\u2028\u2029 &lt; \ud800'
    row = next(training_rows(1))
    row['messages'][0]['content'] = hostile
    page = browse_page(results, {'truth/seed-0': write(tmp_path / 'rl.jsonl', [row])}, looks_of(results.experiment))
    assert page.count('<script') == page.count('</script>') == 2, 'the data and the script'
    assert not {'\u2028', '\u2029', '\ud800'} & set(page)
    assert data_of(page)['talks'][-1]['messages'][0][1] == hostile
    with pytest.raises(ValueError, match='Out of range'):
        as_json(float('nan'))


@pytest.mark.parametrize(
    ('line', 'found'),
    [
        (b'{', 'expected an object a line'),
        (b'[1]', 'expected an object, found'),
        (b'\xff', 'UTF-8'),
        (b'{"step": 1}', "KeyError\\('reward'\\)"),
        (json.dumps({**next(training_rows(1)), 'messages': [1]}).encode(), 'TypeError'),
        (json.dumps({**next(training_rows(1)), 'cause': 99}).encode(), 'IndexError'),
    ],
)
def test_a_broken_line_is_named(line, found, tmp_path):
    path = write(tmp_path / 'rl.jsonl', training_rows(2))
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(WorkdirError, match=f'rl.jsonl, line 3: expected a conversation of training, found .*{found}'):
        training_talks('truth/seed-0', path)
