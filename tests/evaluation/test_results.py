"""Results are read back as they were written, and a file of another kind is an error that names it."""

import dataclasses
import json

import pytest

from simrl.evaluation.forecast import rank_correlation
from simrl.evaluation.report.tables import comparisons
from simrl.evaluation.results.files import read, write
from simrl.evaluation.results.simulators import ForecastResult, SimulatorForecast
from simrl.evaluation.statistics import Estimate
from simrl.run.config import ConfigError
from tests.evaluation.report.fake_run import fake_results


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=2, people=30, measures=2)


def test_results_are_read_as_they_were_written(results, tmp_path):
    write(results, tmp_path)
    assert read(tmp_path) == results
    assert sorted(path.stem for path in (tmp_path / 'results').iterdir()) == [
        *('conversations', 'experiment', 'fidelity', 'forecast', 'held_out_reward_model', 'matrix', 'people'),
        *('scores', 'timings', 'training'),
    ]
    (tmp_path / 'results' / 'forecast.json').unlink()
    assert read(tmp_path) == dataclasses.replace(results, forecast=None), 'an earlier version forecast nothing'


def test_a_forecast_is_read_as_it_was_written(results, tmp_path):
    known = SimulatorForecast(Estimate(1.02, 0.9, 1.1, 32, 32, 0.95), None, 'it continues none', ('forecast/a',))
    correlation = rank_correlation('cosine', 'gain', [1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    forecast = ForecastResult('Logged.', 'people_forecast', 'people', 32, 8, 4, {'role_play': known}, (correlation,))
    written = dataclasses.replace(results, forecast=forecast)
    write(written, tmp_path)
    assert read(tmp_path) == written


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


NEW = {  # fields with defaults
    'assistants': ('win_rate_bounds', 'strict_win_rate_bounds'),
    'arms': ('compared', 'win_rate_bounds', 'strict_win_rate_bounds', 'gain_intervals', 'win_rate_intervals'),
    'differences': ('compared', 'adjusted_p', 'score_intervals', 'win_rate_intervals'),
}


def without(field, content):
    """JSON without a field, wherever it is."""
    if isinstance(content, list):
        return [without(field, x) for x in content]
    if isinstance(content, dict):
        return {name: without(field, x) for name, x in content.items() if name != field}
    return content


def test_results_of_before_further_intervals_are_read_and_reported_without_them(results, tmp_path):
    write(results, tmp_path)
    for name in ('people', 'held_out_reward_model'):
        path = tmp_path / 'results' / f'{name}.json'
        content = json.loads(path.read_text())
        del content['without_outcome']
        for group, fields in NEW.items():
            for found in content[group] if group == 'differences' else content[group].values():
                for field in fields:
                    del found[field]
        path.write_text(json.dumps(without('undefined_draws', content)))
    found = read(tmp_path)
    people, whole = found.measures['people'], results.measures['people']
    assert people.arms['persona'].gain == whole.arms['persona'].gain
    assert people.arms['persona'].gain_intervals is None
    assert people.differences[0].adjusted_p is None
    for measure, there in ((people, False), (whole, True)):
        text = ''.join(comparisons(measure))
        assert ('The same differences with other intervals' in text) == there
        assert ('<small>adjusted ' in text) == there


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
