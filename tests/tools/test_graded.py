"""Simulators of graded quality: the program of people that goes by what was said, the run's config, and the table."""

import dataclasses
import pathlib

import pytest

from configs import quickstart
from simrl.evaluation.forecast import rank_correlation
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.simulators import ForecastResult, SimulatorForecast
from simrl.evaluation.results.training import TimingsResult
from simrl.evaluation.statistics import Estimate
from simrl.experiments.experiment import build_stages, settings_of
from simrl.worlds.concierge.people import World, person
from simrl.worlds.concierge.replies import speak
from tests.evaluation.report.fake_run import fake_results
from tools import graded
from tools.dialled import DIALS, next_message

HEARD = (
    'what would you like?',
    'which area and time?',
    'try cheap thai near station for lunch',
    'hello',
    'which food?',
)


@pytest.mark.parametrize(('dial', 'end'), [(0.0, 0), (0.5, 1), (1.0, 20)])
def test_in_a_conversation_of_its_own_it_is_peoples_program(dial, end):
    ends = 0
    for number in range(60):
        who = person(World(dial=dial), 'dev', number)
        messages = []
        for heard in ('', *HEARD):
            messages += [('assistant', heard)] if heard else []
            expected = speak(who, [text for role, text in messages if role == 'assistant'], seed=number)
            assert next_message(who, messages, seed=number) == expected
            ends += expected.end is not None
            if expected.end is not None:
                break
            messages.append(('user', expected.text))
    assert ends >= end


def test_what_another_said_before_counts_as_disclosed():
    """In a conversation that others began it does not tell again what was told."""
    who = person(World(), 'dev', 3)
    told = [('user', ' '.join(x for x in who.intent.values if x != 'any')), ('assistant', 'what would you like?')]
    untold = [('user', 'hello'), told[1]]
    patient = dataclasses.replace(who, traits=dataclasses.replace(who.traits, patience=0.9))
    assert next_message(patient, told, seed=0).end == 'left', 'a question about what was told costs more'
    assert next_message(patient, untold, seed=0).end is None


def test_the_config_has_ten_simulators_and_more_and_forecasts_each():
    config = graded.get_config('configs/quickstart.py:smoke')
    names = {stage.name for stage in build_stages(settings_of(config), pathlib.Path('run'))}
    arms = {f'dial_{dial}' for dial in DIALS} | set(graded.KINDS)
    assert len(arms) == 12
    assert {f'forecast/{arm}' for arm in arms - {'fine_tuned'}} < names
    assert config.rl == quickstart.get_config('smoke').rl


def test_the_table_says_what_was_forecast_beside_what_came_out(tmp_path, capsys, monkeypatch):
    found = fake_results(seeds=2, people=40)
    utilities = found.measures['people'].arms
    known = {
        arm: SimulatorForecast(Estimate(x, x - 0.2, x + 0.2, 64, 64, 0.95), None, why, (f'forecast/{arm}',))
        for arm, x, why in (('role_play', 0.1, None), ('persona', 0.4, 'it continues none'), ('sft 7b', 0.9, None))
    }
    gains = [utilities[arm].gain.mean for arm in known]
    correlation = rank_correlation('cosine', 'gain', [x.cosine.mean for x in known.values()], gains)
    forecast = ForecastResult('Program.', 'people_forecast', 'people', 64, 8, 4, known, (correlation,))
    seconds = {'people_forecast': 6.0, **dict.fromkeys((f'forecast/{arm}' for arm in known), 2.0)}
    timings = TimingsResult(found.timings.stages | seconds)
    monkeypatch.setattr(graded, 'run_child', lambda command: commands.append(command))
    commands = []
    result_files.write(dataclasses.replace(found, forecast=forecast, timings=timings), tmp_path)
    graded.main([f'--workdir={tmp_path}', '--seeds', '0', '1', '--people=100'])
    assert f'--config={graded.__file__}:configs/quickstart.py' in commands[0]
    assert '--config.evaluation.block=100' in commands[0]
    printed = capsys.readouterr().out
    lines = [line.split()[0] for line in printed.splitlines() if '[' in line]
    order = sorted(known, key=lambda arm: -utilities[arm].gain.mean)
    assert lines[:3] == [arm.split()[0] for arm in order]
    assert '0.40 [0.20, 0.60]' in printed
    assert '(it continues none)' in printed
    assert 'cosine with gain, over 3 simulators: +1.00' in printed
    assert 'A forecast took 4 s, people’s side shared by 3 simulators, and a training 88 s: 4.5%.' in printed
