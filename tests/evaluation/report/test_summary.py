"""What is put into words: an ordering exactly where an interval supports it, one seed as this checkpoint only."""

import copy
import re

import pytest

from simrl.evaluation.report.report import console_table, write_report
from simrl.evaluation.report.summary import label, number, ordered, rows_of, sentences
from simrl.evaluation.results import read
from tests.evaluation.report.fake_run import fake_results, write


@pytest.fixture(scope='module')
def files():
    return fake_results(seeds=3)


def claim(mean, low=None, high=None, seeds=1):
    return {'mean': mean, 'low': low, 'high': high, 'values': [mean] * seeds, 'p_value': None, 'level': 0.95}


def over_people(mean, low, high):
    return {'mean': mean, 'low': low, 'high': high, 'num_observations': 9, 'num_clusters': 9, 'level': 0.95}


def said(workdir):
    results = read(workdir)
    return sentences(results, rows_of(results, workdir))


def test_an_ordering_is_claimed_exactly_where_the_interval_over_seeds_supports_it(files, tmp_path):
    claims = copy.deepcopy(files['results/claims.json'])
    claims['arms']['persona']['gain'] = claim(0.1, -0.01, 0.21, seeds=3)
    claims['arms']['oracle']['gain'] = claim(-0.1, -0.2, -0.01, seeds=3)
    certain_people = over_people(0.2, 0.1, 0.3)
    for pair, interval in {
        'persona - role_play': claim(0.2, -0.1, 0.5, seeds=3),
        'fine_tuned - role_play': claim(-0.2, -0.3, -0.1, seeds=3),
        'fine_tuned - persona': claim(0.2, 0.1, 0.3, seeds=3),
        'oracle - fine_tuned': claim(0.0, -0.2, 0.2, seeds=3),
    }.items():
        claims['differences'][pair] = {
            'seeds': [0, 1, 2],
            'satisfaction': interval,
            'win_rate': interval,
            'satisfaction_over_people': certain_people,  # many people do not make up for few seeds
        }
    write(tmp_path, {**files, 'results/claims.json': claims})
    outcome = said(tmp_path)[1]
    assert 'lower after oracle (−0.10)' in outcome
    assert 'not told apart from it after' in outcome
    assert 'persona (+0.10)' in outcome.partition('not told apart from it after')[2].partition(';')[0]
    assert 'role-play came out above fine-tuned (by 0.20)' in outcome
    assert 'fine-tuned came out above persona (by 0.20)' in outcome
    assert 'not told apart: persona and role-play, oracle and fine-tuned' in outcome
    assert '95% t-intervals over training seeds, which rest on normal spread: so few seeds cannot' in outcome
    assert 'checkpoint' not in outcome


def test_one_seed_speaks_of_this_checkpoint_only(tmp_path):
    files = fake_results(seeds=1, people=100)
    write(tmp_path, files)
    asked, outcome, limits = said(tmp_path)
    assert 'one training seed each' in asked
    assert 'this checkpoint only' in outcome
    assert 'over training seeds' not in outcome
    assert 'no evidence about real people' in limits
    assert 'partly restates how its stereotypes were written' in limits
    text = write_report(tmp_path).read_text()
    assert '95% intervals are over people: this checkpoint only.' in text
    row = re.search(r'persona − role-play</th>(.*?)</tr>', text).group(1)
    cells = re.findall('<td>(.*?)</td>', row)
    assert cells[0] == '1'
    assert '[' not in cells[1], 'one seed has no interval over seeds'
    assert cells[2] == '–', 'and no p-value'


@pytest.mark.parametrize(
    ('sizes', 'asked'),
    [
        (('',), 'against four kinds of user, all else equal'),
        (('', 'small'), 'against four kinds of user (six arms with their sizes), all else equal'),
    ],
)
def test_sizes_are_no_kinds(tmp_path, sizes, asked):
    write(tmp_path, fake_results(seeds=2, people=30, sizes=sizes))
    assert asked in said(tmp_path)[0]


def test_seeds_that_differ_are_told_apart_from_those_that_are_several(files, tmp_path):
    people = files['results/people.json']
    kept = {
        name: found for name, found in people['assistants'].items() if name not in ('oracle/seed-1', 'oracle/seed-2')
    }
    claims = copy.deepcopy(files['results/claims.json'])
    claims['differences']['oracle - fine_tuned'] = {
        'seeds': [0],
        'satisfaction': claim(0.1),
        'win_rate': claim(0.1),
        'satisfaction_over_people': over_people(0.1, 0.05, 0.15),
    }
    write(
        tmp_path,
        {**files, 'results/people.json': {**people, 'assistants': kept}, 'results/claims.json': claims},
    )
    asked, outcome, _ = said(tmp_path)
    assert '1–3 training seeds each' in asked
    gain = kept['oracle/seed-0']['gain']['mean']  # of the checkpoint on people, where there is one seed
    assert f'oracle ({gain:+.2f}, one seed)' in outcome
    assert 'oracle came out above fine-tuned (by 0.10, one seed)' in outcome
    assert outcome.endswith(
        'cannot give a sign-flip p below .05; with one seed over people, so of that checkpoint only).'
    )
    assert 'with one seed, and for the initial assistant, over people: this checkpoint only' in console_table(tmp_path)


def test_names_and_their_order():
    names = [
        'people',
        'new_arm/seed-0',
        'oracle/seed-1',
        'role_play-large/seed-0',
        'oracle/seed-0',
        'role_play/seed-10',
    ]
    assert ordered([*names, 'role_play/seed-2', 'initial']) == [
        'initial',
        'role_play/seed-2',
        'role_play/seed-10',
        'role_play-large/seed-0',
        'oracle/seed-0',
        'oracle/seed-1',
        'new_arm/seed-0',
        'people',
    ]
    assert label('fine_tuned-large/seed-1') == 'fine-tuned large, seed 1'
    assert label('new_arm') == 'new arm'


def test_numbers():
    assert [number(x) for x in (0.125, -0.125, -0.001, None)] == ['0.12', '−0.12', '0.00', '–']
    assert [number(x, 3, '+') for x in (0.5, -0.5, 0.0)] == ['+0.500', '−0.500', '+0.000']
