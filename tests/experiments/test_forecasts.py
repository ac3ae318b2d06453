"""Forecasts in an experiment: their stages, their results from made-up ones, and whole in both scenes."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ml_collections import ConfigDict

from simrl.evaluation.forecast import best_of_n, gradient_cosine
from simrl.experiments import experiment, forecasts, plan
from simrl.experiments.checks import check_forecast
from simrl.experiments.concierge_people import alike, people_agent, people_examples
from simrl.experiments.experiment import build_stages, scene_of
from simrl.experiments.forecast_results import ForecastSpec, forecast_result, forecasts_of
from simrl.experiments.forecasts import cannot_continue, silent
from simrl.experiments.outputs import read_result, save_result
from simrl.experiments.settings import Compute, ForecastSettings, MeshSettings
from simrl.rewards.rewards import CAUSES, JUDGE_FAILED, Rewards
from simrl.rl.judged import Judged
from simrl.rollouts.agents import HostAgent, HostConversation, MixedAgent
from simrl.rollouts.replay import Replay
from simrl.rollouts.state import EndReason, Transcript
from simrl.run import stages as stages_lib
from simrl.run.config import ConfigError, to_dict
from tests.evaluation.report.fake_run import fake_results
from tests.experiments import test_pretrained
from tests.experiments.made_run import made_run
from tests.experiments.scene import arms, identity, settings, tiny_settings

WORKDIR = pathlib.Path('run')
FORECAST = {'examples': 4, 'samples': 4, 'n': 2}
files = test_pretrained.files  # a fixture


def stages(**changes) -> dict[str, str]:
    return {stage.name: identity(stage) for stage in build_stages(settings(**changes), WORKDIR)}


def test_forecasts_are_stages_of_their_own_one_for_each_simulator() -> None:
    before, after = stages(seeds=(0, 3)), stages(seeds=(0, 3), evaluation__forecast=FORECAST)
    assert before.items() < after.items(), 'no other stage changes'
    simulators = ('role_play', 'persona', 'fine_tuned/seed-0', 'fine_tuned/seed-3')
    assert after.keys() - before.keys() == {'people_forecast', *(f'forecast/{name}' for name in simulators)}
    more = stages(seeds=(0, 3), evaluation__forecast=FORECAST | {'samples': 6})
    assert {name for name in after if after[name] != more[name]} == after.keys() - before.keys()
    assert stages(seeds=(0, 3), evaluation__forecast=FORECAST | {'n': 3}) == after, 'of results alone'
    spec = experiment.results_spec(scene_of(settings(seeds=(0, 3), evaluation__forecast=FORECAST), WORKDIR)).forecast
    assert spec.stages['fine_tuned'] == ['forecast/fine_tuned/seed-0', 'forecast/fine_tuned/seed-3']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'n': 5}, 'n: expected at most samples=4, found 5'),
        ({'n': 1}, 'n: expected at least 2, found 1'),
        ({'samples': 1, 'n': 2}, 'samples: expected at least 2, found 1'),
        ({'examples': 2}, 'examples: expected at least 3, found 2'),
    ],
)
def test_what_cannot_be_forecast_is_refused(change: Mapping[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf'^config\.evaluation\.forecast\.{message}'):
        settings(evaluation__forecast=FORECAST | change)


def test_more_examples_than_people_and_groups_that_devices_cannot_share_are_refused() -> None:
    wanted, compute = ForecastSettings(examples=8, samples=4), Compute(mesh=MeshSettings(data=1))
    check_forecast(wanted, 8, compute)
    check_forecast(None, 0, compute)
    with pytest.raises(ConfigError, match=r"forecast.examples: expected at most the 7 examples of the split 'dev'"):
        check_forecast(wanted, 7, compute)
    eight, one = mock.Mock(shape={'data': 8}), mock.Mock(shape={'data': 1})
    for devices, message in (
        (mock.Mock(mesh=mock.Mock(make=lambda: eight), mesh_of_simulators=lambda: None), '8 devices'),
        (
            mock.Mock(mesh=mock.Mock(make=lambda: one), mesh_of_simulators=lambda: eight),
            '8 devices of config.compute.simulator_mesh.data',
        ),
    ):
        with pytest.raises(ConfigError, match=rf'forecast.samples: expected a multiple of the {message}.* found 4'):
            check_forecast(wanted, 8, devices)


def test_people_reply_alike_in_all_conversations_of_an_example() -> None:
    scene = scene_of(settings(), WORKDIR)
    examples = people_examples(scene.settings.world, 'dev', range(6))
    heard = (('user', 'x'), ('assistant', 'which food?'))
    asked = [HostConversation(example, sample, heard) for sample in range(3) for example in examples]
    people = people_agent(scene.settings.world, scene.limits)
    said = [reply.text for reply in alike(people).reply(asked, np.arange(18, dtype=np.uint32))]
    assert said[:6] == said[6:12] == said[12:]
    usual = [reply.text for reply in people.reply(asked, np.arange(18, dtype=np.uint32))]
    assert usual[:6] != usual[6:12]


def test_a_simulator_that_cannot_continue_says_why() -> None:
    record = mock.Mock(message_length=np.array([[3, 9], [7, 1]]))
    own, given = [mock.Mock(opening=None)], [mock.Mock(opening='hello')]
    program = HostAgent(mock.Mock(), 8)
    assert cannot_continue(program, own, record) == 'it continues no conversation of others (HostAgent.replayable)'
    short, long = (HostAgent(mock.Mock(), tokens, replayable=True) for tokens in (6, 7))
    assert cannot_continue(long, own, record) is None
    assert cannot_continue(short, own, record) == 'an opening of people has 7 tokens, its messages at most 6'
    assert cannot_continue(short, given, record) is None, 'openings are in its prompt'
    writer = HostAgent(mock.Mock(), 6, replayable=True, opening='written')
    assert cannot_continue(writer, given, record) is not None
    assert cannot_continue(MixedAgent((short, writer), mock.Mock()), given, record) is not None


def test_a_record_has_the_openings_of_its_user() -> None:
    """Those of a mixture are of the member that an example meets."""
    limits = settings().limits
    given, writer = (HostAgent(mock.Mock(), 6, opening=opening) for opening in ('given', 'written'))
    both = silent(MixedAgent((given, writer), choose := mock.Mock()), limits)
    assert [member.opening for member in both.members] == ['given', 'written']
    assert both.choose is choose
    assert silent(writer, limits).max_new_tokens == limits.user_tokens
    with pytest.raises(ValueError, match='2 that wait for the user'):
        silent(given, limits).reply([mock.Mock()] * 2, np.zeros(2))


def test_a_reply_in_a_record_is_worth_its_own_turn_and_has_no_reward_of_earlier_ones(monkeypatch, capsys) -> None:
    value, valid = np.array([[9.0, 0.2, 0], [9, 0, 0], [9, 0.4, 0]], np.float32), np.ones((3, 3), bool)
    valid[:, 2] = valid[1, 1] = False  # two turns of each; the second one's judge failed once
    rewards = Rewards(value, valid, {}, np.array([0, CAUSES.index(JUDGE_FAILED), 0]))
    judged = Judged(mock.Mock(), rewards, {}, {}, {})
    for name, found in (('check_agents', None), ('for_sampling', None), ('collect_judged', judged)):
        monkeypatch.setattr(forecasts, name, mock.Mock(return_value=found))
    forecaster = mock.Mock(examples=[mock.Mock()] * 3, examples_at_once=3, mesh=MeshSettings(1).make())
    forecaster.compute.loop.max_unjudged = 0.5
    record = {field.name: np.full(3, 4) for field in dataclasses.fields(Transcript)}
    record = Transcript(**record | {'end_reason': np.full(3, EndReason.TURNS)})
    arguments = ('logs', mock.Mock(), mock.Mock(), mock.Mock())
    (found,) = forecasts.Forecaster.talks(forecaster, *arguments, samples=1, replay=Replay(record, 1, 1, 1, heard=1))
    assert found.rewards.value.tolist() == value[:, 1].tolist()
    assert found.rewards.valid.tolist() == [True, False, True]
    assert f'logs: 1 conversations have no reward: {JUDGE_FAILED}' in capsys.readouterr().out
    (whole,) = forecasts.Forecaster.talks(forecaster, *arguments, samples=1, replay=Replay(record, 1, 1, 1))
    assert whole.rewards.valid.tolist() == valid.tolist()


# Results of made-up stages.


def made_up(folder: pathlib.Path, cosines: Mapping[str, float], examples: int = 12) -> dict[str, Any]:
    """Stages of people and of simulators whose gradients have these cosines; the first continues no conversation."""
    random = np.random.default_rng(0)
    people = np.eye(20)[0] + 0.2 * random.normal(size=(examples, 20))
    values = random.normal(size=(examples, 4))
    values[2, 1] = np.nan
    found = {'people': (people, values)}
    plain = [[None if np.isnan(x) else x for x in row] for row in values.tolist()]
    clusters = [f'hello {i}' for i in range(examples)]
    stages = {'people_forecast': {'values': plain, 'products': (people @ people.T).tolist(), 'clusters': clusters}}
    for number, (name, cosine) in enumerate(cosines.items()):
        mean = cosine * np.eye(20)[0] + np.sqrt(1 - cosine**2) * np.eye(20)[1]
        own = mean + 0.2 * random.normal(size=(examples, 20))
        rewards = cosine * np.nan_to_num(values) + random.normal(size=values.shape)
        found[name] = (own, rewards)
        stages[f'forecast/{name}'] = {
            'products': (own @ own.T).tolist(),
            'cross': (own @ people.T).tolist(),
            'rewards': rewards.tolist() if number else None,
            'reason': None if number else 'it continues no conversation of others',
        }
    for name, content in stages.items():
        (folder / name).mkdir(parents=True)
        save_result(folder / name, content)
    return found


def test_forecasts_are_of_an_arms_simulators_and_correlated_over_arms(tmp_path: pathlib.Path) -> None:
    cosines = {'role_play': 0.1, 'persona': 0.5, 'sft 7b/seed-0': 0.8, 'sft 7b/seed-1': 0.9, 'untrained': 0.3}
    found = made_up(tmp_path, cosines)
    stages_of = {'sft 7b': ['forecast/sft 7b/seed-0', 'forecast/sft 7b/seed-1']}
    stages_of = {arm: [f'forecast/{arm}'] for arm in ('role_play', 'persona', 'untrained')} | stages_of
    measure = fake_results(seeds=2, people=30).measures['people']
    result = forecast_result(ForecastSpec('Logged.', 'people_forecast', stages_of, n=2), tmp_path, measure)
    assert (result.examples, result.samples, result.n, result.measure) == (12, 4, 2, 'people')
    assert list(result.simulators) == ['role_play', 'persona', 'untrained', 'sft 7b']
    people, values = found['people']
    owns, rewards = zip(*(found[f'sft 7b/seed-{k}'] for k in (0, 1)), strict=True)
    products = [x @ x.T for x in owns], [x @ people.T for x in owns], people @ people.T
    expected, _ = gradient_cosine(*products, range(12))
    fine_tuned = result.simulators['sft 7b']
    assert fine_tuned.cosine.mean == pytest.approx(expected.mean)
    assert fine_tuned.cosine.mean == pytest.approx(0.85, abs=0.1)
    assert fine_tuned.best_of_n == best_of_n(list(rewards), values, 2, range(12))
    assert (fine_tuned.reason, fine_tuned.stages) == (None, tuple(stages_of['sft 7b']))
    assert result.simulators['role_play'].best_of_n is None
    assert result.simulators['role_play'].reason == 'it continues no conversation of others'
    by_name = {(x.forecast, x.utility): x for x in result.correlations}
    assert {pair: x.num_arms for pair, x in by_name.items()} == {
        ('cosine', 'gain'): 3,  # nothing was trained against one of them
        ('cosine', 'win_rate'): 3,
        ('best_of_n', 'gain'): 2,
        ('best_of_n', 'win_rate'): 2,
    }
    gains = [measure.arms[arm].gain.mean for arm in ('role_play', 'persona', 'sft 7b')]
    assert by_name['cosine', 'gain'].mean == pytest.approx(np.corrcoef(np.argsort(np.argsort(gains)), range(3))[0, 1])
    assert by_name['best_of_n', 'gain'].mean is None


def test_a_command_of_forecasts_alone_prints_those_that_it_made_or_found(tmp_path, monkeypatch, capsys) -> None:
    """With two seeds an arm is shown when the forecasts of both are there."""
    monkeypatch.setattr(stages_lib, 'run_stages', lambda *_: None)
    wanted = settings(seeds=(0, 3), workers=1, evaluation__forecast={'examples': 3, 'samples': 2, 'n': 2})
    spec = plan.forecast_spec(made_run(tmp_path, wanted))
    products = (1 + 0.01 * np.eye(3)).tolist()
    people = {'products': products, 'values': [[0.0, 1.0]] * 3, 'clusters': [*'abc']}
    known = {'products': products, 'cross': [[0.5] * 3] * 3, 'rewards': None, 'reason': 'mute'}
    save_result(tmp_path / 'people_forecast', people)
    save_result(tmp_path / 'forecast' / 'persona', known)
    found = forecasts_of(spec, tmp_path, people)
    rows = {'forecast': list(spec.stages), 'forecast/fine_tuned/seed-0': [], 'forecast/persona': ['persona']}
    for only, arms_shown in rows.items():
        experiment.run(to_dict(wanted), tmp_path, only=(only,))
        printed = capsys.readouterr().out
        lines = [line for line in printed.splitlines() if line.startswith(tuple(f'{arm}  ' for arm in spec.stages))]
        assert [line.split()[0] for line in lines] == arms_shown
        assert (spec.words in printed) == bool(arms_shown)
        for arm, line in zip(arms_shown, lines, strict=True):
            for value in (found[arm].cosine, found[arm].best_of_n, found[arm].reason):
                assert str(value or '') in line
    assert re.search(r'^persona +0\.5\d\d .* none +mute', lines[0])


# Whole.


@pytest.mark.long
def test_people_who_are_a_program(tmp_path: pathlib.Path, capsys) -> None:
    dialled = {'dial_75': {'simulator': 'tools.dialled:dial_75'}, 'own': {'simulator': 'tests.experiments.own:silent'}}
    tiny = tiny_settings(arms('role_play', 'fine_tuned', 'oracle') | dialled, workers=1, evaluation__forecast=FORECAST)
    experiment.run(to_dict(tiny), tmp_path, only=('forecast',))
    people = read_result(tmp_path / 'people_forecast')
    assert np.shape(people['values']) == (4, 4)
    assert people['clusters'] == [f'people-dev-{i}' for i in range(4)]
    for arm in ('role_play', 'fine_tuned/seed-0', 'dial_75', 'own'):
        found = read_result(tmp_path / 'forecast' / arm)
        assert np.shape(found['products']) == np.shape(found['cross']) == (4, 4)
        assert (found['rewards'] is None) == (arm == 'own')
    assert not (tmp_path / 'forecast' / 'oracle').exists(), 'people themselves are no simulator'
    assert 'it continues no conversation of others' in capsys.readouterr().out


@pytest.mark.long
def test_people_who_are_logged(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With real contexts of two turns; the arms differ, and people's side is of neither."""
    config = test_pretrained.config_of(files)
    with config.unlocked(), config.ignore_type():
        config.conversation.limits.user_tokens = config.conversation.limits.assistant_tokens = 12
        config.conversation.limits.turns = 2
        config.evaluation.forecast = ConfigDict(FORECAST)
    experiment.run(config, tmp_path / 'run', only=('forecast',))
    people = read_result(tmp_path / 'run' / 'people_forecast')
    assert people['messages_cut_off'] == 0
    assert np.shape(people['values']) == (4, 4)
    assert np.std(people['values']) > 0
    found = [read_result(tmp_path / 'run' / 'forecast' / arm) for arm in test_pretrained.ARMS]
    assert np.isfinite([x['products'] for x in found]).all()
    assert np.linalg.eigvalsh(people['products']).min() > -1e-6 * np.trace(people['products'])
    assert found[0]['rewards'] != found[1]['rewards']
    assert found[0]['products'] != found[1]['products']
    own, cross = np.array(found[0]['products']), np.array(found[0]['cross'])
    assert np.all(np.abs(cross) <= np.sqrt(np.outer(np.diag(own), np.diag(people['products']))) * (1 + 1e-4))
