"""Results are read back as they were written, and a file of another kind is an error that names it."""

import dataclasses
import json

import pytest

from simrl.evaluation.results import read, write
from simrl.run.config import ConfigError
from tests.evaluation.report.fake_run import fake_results


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=2, people=30, measures=2)


def test_results_are_read_as_they_were_written(results, tmp_path):
    write(results, tmp_path)
    assert read(tmp_path) == results
    assert sorted(path.stem for path in (tmp_path / 'results').iterdir()) == [
        *('conversations', 'experiment', 'fidelity', 'held_out_reward_model', 'matrix', 'people', 'scores'),
        *('timings', 'training'),
    ]


def test_without_a_matrix(results, tmp_path):
    without = dataclasses.replace(results, matrix=None)
    write(without, tmp_path)
    assert read(tmp_path) == without


def test_results_of_before_failures_were_masked_are_read_as_results_without_any(results, tmp_path):
    write(results, tmp_path)
    for name in ('people', 'held_out_reward_model', 'matrix'):
        path = tmp_path / 'results' / f'{name}.json'
        content = json.loads(path.read_text())
        for assistant in [] if name == 'matrix' else content['assistants'].values():
            assert assistant.pop('causes') == {}
        if name == 'matrix':
            del content['failed'], content['causes']
        path.write_text(json.dumps(content))
    assert read(tmp_path) == results


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda path: path.unlink(), 'expected the results of a finished run, found no such file'),
        (lambda path: path.write_text('{'), 'expected JSON, found an error'),
        (
            lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {'examples': '30'})),
            r'examples: expected int',
        ),
    ],
)
def test_a_file_that_is_not_there_or_is_another(change, message, results, tmp_path):
    write(results, tmp_path)
    path = tmp_path / 'results' / 'people.json'
    change(path)
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path)
    assert str(path) in str(raised.value)
