"""The tool of the negative controls: what it runs, what it reads, and what it says of it."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from configs import quickstart
from simrl.evaluation.controls import opening
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.measures import Difference
from simrl.evaluation.results.simulators import FidelityResult
from simrl.evaluation.seeds import SeedEstimate
from tests.evaluation.report.fake_run import fake_results
from tools import controls


def results_of(gap):
    """A run of the two arms, by its differences seed by seed."""
    spread = (gap, gap + 0.01 + gap**2 / 10, gap - 0.01 - gap**2 / 10)  # rises a little otherwise in each seed
    difference = SeedEstimate(gap, gap - 0.025, gap + 0.025, spread, None, 0.95)
    made_up = fake_results(seeds=3, people=50)
    people = made_up.measures['people']
    arms = people.arms | {'fine_tuned': people.arms['sft 7b']}
    pair = Difference(*controls.PAIR, (0, 1, 2), difference, difference, people.differences[0].checkpoint_score)
    fidelity = made_up.fidelity.simulators
    return dataclasses.replace(
        made_up,
        measures={'people': dataclasses.replace(people, arms=arms, differences=(*people.differences, pair))},
        fidelity=FidelityResult({}, fidelity | {'fine_tuned': fidelity['sft 7b']}),
    )


@pytest.fixture
def commands(monkeypatch):
    """Commands in place of runs; each leaves results whose gap is that of the dial."""
    ran = []

    def run(command):
        flags = dict(part.removeprefix('--').split('=', 1) for part in command if part.startswith('--'))
        ran.append(flags)
        workdir = pathlib.Path(flags['workdir'])
        workdir.mkdir()
        result_files.write(results_of(0.3 * float(flags['config.world.dial'])), workdir)

    monkeypatch.setattr(controls, 'run_child', run)
    return ran


def test_a_run_for_each_dial_and_what_the_gaps_say(commands, tmp_path, capsys):
    controls.main(
        ['dial', f'--workdir={tmp_path}', '--dials', '1', '0', '0.5', '--seeds', '0', '1', '2', '--people=50']
    )
    assert [flags['config.world.dial'] for flags in commands] == ['0.0', '0.5', '1.0'], 'in their order'
    assert {flags['workdir'] for flags in commands} == {f'{tmp_path}/dial-{dial}' for dial in ('0', '0.5', '1')}
    for flags in commands:
        assert flags['config'] == f'{controls.__file__}:configs/quickstart.py'
        assert flags['config.seeds'] == '(0, 1, 2,)'
        assert flags['config.evaluation.people'] == '50'
    printed = capsys.readouterr().out
    assert '+0.300 [+0.275, +0.325]' in printed
    assert (
        'At the first dial the gain is at most +0.025, 8% of the gap at the last dial: '
        '+0.000 [−0.025, +0.025], above 0 in 1 of 3 seeds.'
    ) in printed
    assert 'The gap opens monotonically' in printed
    content = json.loads((tmp_path / 'controls.json').read_text())
    assert [x['dial'] for x in content['dials']] == [0.0, 0.5, 1.0]
    assert content['opening']['monotone'] is True
    assert (tmp_path / 'controls.png').read_bytes().startswith(b'\x89PNG')


def test_the_config_of_the_dial_is_another_with_two_arms():
    config = controls.get_config('configs/quickstart.py:smoke')
    assert tuple(config.arms) == controls.ARMS
    whole = quickstart.get_config('smoke')
    assert config.arms.fine_tuned == whole.arms.fine_tuned
    with config.unlocked():
        config.arms = whole.arms
    assert config == whole


@pytest.mark.parametrize(
    ('at_first', 'words'),
    [
        # Four seeds of the same sign are not nothing, though their interval holds 0: it is a bound.
        (
            (0.001, 0.003, 0.004, 0.009),
            r'the gain is at most \+0\.010, 2% of the gap at the last dial: .*above 0 in 4 of',
        ),
        ((0.1, 0.11, 0.09, 0.1), r'there IS a gain: \+0\.100 \[\+0\.0'),
        ((-0.1, -0.11, -0.09, -0.1), r'fine-tuning gains nothing, it loses: −0\.100 \[−0\.1.*above 0 in 0 of 4 seeds'),
    ],
)
def test_what_is_gained_at_the_first_dial_in_words(at_first, words):
    first, *_ = controls.verdict(opening((0.0, 1.0), np.array([at_first, (0.39, 0.4, 0.41, 0.4)]))).splitlines()
    assert re.search(rf'^At the first dial {words}', first)


@pytest.mark.parametrize('dials', [['1'], ['0', '1', '0'], ['0', '0.0'], ['0', '1.5']])
def test_dials_that_are_no_dials_are_refused_before_anything_runs(commands, tmp_path, dials):
    with pytest.raises(SystemExit, match='--dials: expected at least two different numbers from 0 to 1, found'):
        controls.main(['dial', f'--workdir={tmp_path}', '--dials', *dials])
    assert not commands


def test_each_arm_of_a_run_against_itself(tmp_path, capsys):
    result_files.write(fake_results(seeds=4, people=30), tmp_path)
    controls.main(['twice', f'--run={tmp_path}'])
    printed = capsys.readouterr().out
    assert re.search(r'\nsft 7b +3 ', printed), 'four seeds have three halvings'


def test_too_few_seeds_to_halve(tmp_path):
    result_files.write(fake_results(seeds=3, people=30), tmp_path)
    with pytest.raises(SystemExit, match='expected at least 4 training seeds, found 3'):
        controls.main(['twice', f'--run={tmp_path}'])


def test_one_seed_says_nothing_of_others(tmp_path):
    with pytest.raises(SystemExit, match=r'--seeds: expected at least two, found \[0\]'):
        controls.main(['dial', f'--workdir={tmp_path}', '--seeds', '0'])


def test_no_results(tmp_path):
    with pytest.raises(SystemExit, match='expected the results of a finished run'):
        controls.main(['twice', f'--run={tmp_path}'])
    with pytest.raises(SystemExit, match='expected the results of a finished run'):
        controls.row(tmp_path, 0.0)
