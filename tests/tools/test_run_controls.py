"""The tool of the negative controls: what it runs, what it reads, and what it says of it."""

import json
import pathlib

import pytest

from simrl.evaluation import results
from tests.evaluation.fake_run import fake_results, write
from tools import controls


@pytest.fixture
def commands(monkeypatch):
    """Commands in place of runs; each leaves results whose gap is that of the dial."""
    ran = []

    def run(command, check):
        assert check
        flags = dict(part.removeprefix('--').split('=', 1) for part in command if part.startswith('--'))
        ran.append(flags)
        files = fake_results(seeds=3, people=50)
        gap = files['results/claims.json']['differences'][controls.PAIR]['satisfaction']
        dial = float(flags['config.world.dial'])
        values = [0.3 * dial + x for x in (0.0, 0.01, -0.01)]
        gap.update(mean=0.3 * dial, low=0.3 * dial - 0.025, high=0.3 * dial + 0.025, values=values)
        write(pathlib.Path(flags['workdir']), files)

    monkeypatch.setattr(controls.subprocess, 'run', run)
    return ran


def test_a_run_for_each_dial_and_what_the_gaps_say(commands, tmp_path, capsys):
    controls.main(
        ['dial', f'--workdir={tmp_path}', '--dials', '1', '0', '0.5', '--seeds', '0', '1', '2', '--people=50']
    )
    assert [flags['config.world.dial'] for flags in commands] == ['0.0', '0.5', '1.0'], 'in their order'
    assert {flags['workdir'] for flags in commands} == {f'{tmp_path}/dial-{dial}' for dial in ('0', '0.5', '1')}
    for flags in commands:
        assert flags['config.arms'] == "('role_play', 'fine_tuned')"
        assert flags['config.seeds'] == '(0, 1, 2,)'
        assert flags['config.evaluation.people'] == '50'
    printed = capsys.readouterr().out
    assert '+0.300 [+0.275, +0.325]' in printed
    assert 'not told apart from 0, at most' in printed
    assert 'The gap opens monotonically' in printed
    content = json.loads((tmp_path / 'controls.json').read_text())
    assert [x['dial'] for x in content['dials']] == [0.0, 0.5, 1.0]
    assert content['opening']['monotone'] is True
    assert (tmp_path / 'controls.png').read_bytes().startswith(b'\x89PNG')


def test_one_seed_says_nothing_of_others(tmp_path):
    with pytest.raises(SystemExit, match=r'--seeds: expected at least two, found \[0\]'):
        controls.main(['dial', f'--workdir={tmp_path}', '--seeds', '0'])


def test_no_run_and_no_results(tmp_path):
    with pytest.raises(SystemExit, match=r'expected a run, found no config\.json'):
        controls.main(['twice', f'--run={tmp_path}'])
    with pytest.raises(SystemExit, match='expected results, found none'):
        controls.row(tmp_path, 0.0)
    assert results.read(tmp_path).people is None
