"""Judges as settings of an experiment: a run by a panel and a local judge, what stages depend on, what is refused."""

import dataclasses
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from simrl.experiments import experiment
from simrl.experiments.endpoints import answers_file
from simrl.experiments.judges import JudgeSettings, LocalJudgeSettings, PanelSettings, RewardSettings, judge_identity
from simrl.experiments.pretrained_settings import PretrainedSimulator, RemoteSettings
from simrl.models.files.export import export
from simrl.remote.settings import EndpointSettings
from simrl.rewards import rubric
from simrl.rewards.shaping import ShapingSettings
from simrl.rl.futures import FutureSettings
from simrl.rollouts.collect import ConversationError
from simrl.run.config import ConfigError, to_config_dict
from tests.experiments.scene import identity
from tests.experiments.test_pretrained import config_of, files  # noqa: F401
from tests.models.files.test_huggingface import random_params
from tests.remote.server import ScriptedServer, Status, chat_reply
from tests.rewards.test_panel import answer
from tests.tiny import byte_tokenizer, tiny_config

STAGES = ('rl/role_play', 'held_out_judge/initial', 'matrix/initial/role_play')


def endpoint(url='http://127.0.0.1:9/v1', model='model', **changes):
    return EndpointSettings(url, model, **{'tries': 1, 'backoff': 0.01} | changes)


def local(folder, **changes):
    return {
        'model': {'source': str(folder / 'judge'), 'rewrites': 'error'},
        'lengths': (4096,),
        'batch_size': 2,
    } | changes


@pytest.fixture(scope='module')
def judge_files(files, tmp_path_factory):  # noqa: F811
    """The folder of tiny models and people, with a judge of more positions and another tokenizer beside them."""
    tokenizer = byte_tokenizer(merges=[('t', 'h'), ('e', 'r')])
    config = tiny_config(len(tokenizer), max_positions=8192)
    if not (files / 'judge').exists():
        export(random_params(config), config, tokenizer, files / 'judge')
    return files


def judged_config(folder, *, reward=None, held_out=None):
    config = config_of(folder)
    with config.unlocked(), config.ignore_type():
        del config.arms['fine_tuned']
        config.reward = to_config_dict(reward or RewardSettings())
        config.held_out = to_config_dict(held_out or JudgeSettings('local_judge', 'outside'))
        for judge in (config.reward, config.held_out):
            if judge.by == 'local_judge':
                judge.local_judge.update(local(folder))
        config.data.preferences = 'nowhere.jsonl.gz'
    return config


def by_panel(server, *names, **changes):
    judges = {name: endpoint(server.url) for name in names or ('first', 'second')}
    return RewardSettings('panel', panel=PanelSettings(judges, max_tokens=64), **changes)


def test_a_panel_gives_the_reward_and_a_local_judge_compares(judge_files, tmp_path):
    """Without people's choices; judgements are kept, and asked for once."""

    def script(body, _):
        return answer(len(body['messages'][0]['content']) % 11)

    with ScriptedServer(script) as server:
        config = judged_config(judge_files, reward=by_panel(server))
        config.compute.rows_in_flight = 4
        experiment.run(config, tmp_path / 'run', only=STAGES)
        asked = len(server.requests)
        assert not (tmp_path / 'run' / 'reward_model').exists()
        lines = [json.loads(x) for x in (tmp_path / 'run/rl/role_play/seed-0/metrics.jsonl').read_text().splitlines()]
        trained = [line for line in lines if 'reward/mean' in line]  # others are of validations alone
        assert len(trained) == config.rl.steps
        for line in trained:
            assert line['reward/mean'] == pytest.approx((line['reward/judge_first'] + line['reward/judge_second']) / 2)
            assert line['reward/unjudged'] == 0
            assert 0 <= line['time/waiting_for_judge'] <= 1
            assert line['endpoint/model/calls'] > 0 == line['endpoint/model/failed_tries']
        kept = [json.loads(x) for x in (tmp_path / 'run/judgements/helpfulness.jsonl').read_text().splitlines()]
        rows = [json.loads(x) for x in (tmp_path / 'run/rl/role_play/seed-0/conversations/rl.jsonl').open()]
        scores = {json.dumps(row['messages']): row['score'] for row in kept}
        for row in rows:
            said = [{'role': m['role'], 'content': m['content']} for m in row['messages']]
            heard = said[:-1] if row['end_reason'] == 'signal' else said
            assert row['reward'] == pytest.approx(scores[json.dumps(heard)])
        experiment.run(config, tmp_path / 'run', only=('rl/role_play',), rerun=('rl/role_play',))
        assert len(server.requests) == asked
    assert (tmp_path / 'run' / answers_file(0)).exists()
    measured = json.loads((tmp_path / 'run/held_out_judge/initial/block-0/result.json').read_text())
    assert all(0 < score < 1 for score in measured['outcomes']['score'])
    matrix = json.loads((tmp_path / 'run/matrix/initial/role_play/result.json').read_text())
    assert {round(score, 6) for score in matrix['outcomes']['score']} <= {n / 10 for n in range(11)}
    for judge in ('judge_first', 'judge_second'):
        assert matrix['outcomes'][judge] == matrix['outcomes']['score'], 'both say the same here'


@pytest.mark.long
def test_a_panel_judges_the_futures_of_each_reply(judge_files, tmp_path):
    """And whole conversations where a checkpoint is validated."""

    def script(body, _):
        return answer(len(body['messages'][0]['content']) % 11)

    with ScriptedServer(script) as server:
        reward = by_panel(server, 'first', unit='future', futures=FutureSettings(2, 1))
        experiment.run(judged_config(judge_files, reward=reward), tmp_path / 'run', only=('rl/role_play',))
    stage = tmp_path / 'run/rl/role_play/seed-0'
    for row in [json.loads(x) for x in (stage / 'conversations/rl.jsonl').open()]:
        assert [reward is not None for reward in row['reward']] == [
            i < len(row['messages']) // 2 for i in range(len(row['reward']))
        ]
    lines = [json.loads(x) for x in (stage / 'metrics.jsonl').read_text().splitlines()]
    assert all(line['reward/futures_left_out'] == 0 for line in lines if 'reward/mean' in line)
    validated = [line for line in lines if 'validation/reward' in line]
    assert validated
    assert all(line['validation/unjudged'] == 0 for line in validated)


@pytest.mark.parametrize(('validates', 'where'), [(True, 'validation after step 0: 3 of 3'), (False, 'step 0: 8 of 8')])
def test_a_panel_that_always_fails_stops_the_run_with_the_cause(judge_files, tmp_path, validates, where):
    with ScriptedServer(lambda body, _: Status(503)) as server:
        config = judged_config(judge_files, reward=by_panel(server))
        if not validates:
            config.rl.validation.update(dict.fromkeys(config.rl.validation))
        with pytest.raises(
            ConversationError,
            match=rf'^{where} .*: a judge failed: judge first: server for now, judge second: server for now',
        ):
            experiment.run(config, tmp_path / 'run', only=('rl/role_play',))


def test_a_conversation_that_a_panel_always_fails_does_not_keep_a_stage_from_ending(judge_files, tmp_path):
    """At temperature 0 a judge gives the same broken answer at every try."""
    failing = []

    def script(body, _):
        prompt = body['messages'][0]['content']
        failing[:] = failing or [prompt]
        return chat_reply('I give this an 8.') if prompt == failing[0] else answer(7)

    with ScriptedServer(script) as server:
        config = judged_config(judge_files, reward=by_panel(server, 'first'))
        experiment.run(config, tmp_path / 'run', only=('matrix/initial/role_play',))
    outcomes = json.loads((tmp_path / 'run/matrix/initial/role_play/result.json').read_text())['outcomes']
    assert sorted(cause for cause in outcomes['cause'] if cause) == ['a judge failed: judge first: invalid_json']
    lost = [bool(cause) for cause in outcomes['cause']].index(True)
    assert outcomes['score'] == [None if i == lost else pytest.approx(0.7) for i in range(len(outcomes['score']))]


def test_an_evaluation_asks_endpoints_for_its_conversations_alone_and_one_may_always_fail(judge_files, tmp_path):
    """Four conversations in a batch of six: none of what fills it up is sent, and the others keep their places."""
    failing = []

    def script(body, _):
        if 'score' in body['response_format']['json_schema']['schema']['properties']:
            return answer(7)
        found = next(i for i in range(22) if f'line {i} 0' in json.dumps(body))
        failing[:] = failing or [found]
        said = 'no JSON' if found == failing[0] else {'current_answer': 'none', 'thought': 'more', 'response': 'and?'}
        return chat_reply(json.dumps(said))

    with ScriptedServer(script) as server:
        config = judged_config(judge_files, reward=by_panel(server, 'first'))
        remote = RemoteSettings(endpoint(server.url), form='json')
        with config.unlocked(), config.ignore_type():
            config.arms = ConfigDict({'remote': to_config_dict(PretrainedSimulator('role_play', remote=remote))})
        experiment.run(config, tmp_path / 'run', only=('matrix/initial/remote',))
        bodies = [json.dumps(body, sort_keys=True) for body in server.requests if 'messages' in body]
    assert len(set(bodies)) == len(bodies), 'a copy of a conversation asks the same again'
    outcomes = json.loads((tmp_path / 'run/matrix/initial/remote/result.json').read_text())['outcomes']
    lost = outcomes['example'].index(f'c{failing[0]}')
    assert [bool(cause) for cause in outcomes['cause']] == [i == lost for i in range(4)]
    assert outcomes['score'] == [None if i == lost else pytest.approx(0.7) for i in range(4)]


def identities(config):
    stages = experiment.build_stages(experiment.settings_of(config), pathlib.Path('run'))
    return {stage.name: identity(stage) for stage in stages}


def changed(before, after):
    return {name.split('/')[0] for name in before if before[name] != after[name]}


CHANGES = {
    'panel.judges.a.model': ({'panel': PanelSettings({'a': endpoint(model='other')})}, True),
    'panel.judges': ({'panel': PanelSettings({'a': endpoint(), 'b': endpoint()})}, True),
    'panel.max_tokens': ({'panel': PanelSettings({'a': endpoint()}, max_tokens=9)}, True),
    'panel.judges.a.url': ({'panel': PanelSettings({'a': endpoint('http://127.0.0.1:8/v1')})}, False),
    'unit': ({'unit': 'turn'}, True),
    'futures': ({'unit': 'future', 'futures': FutureSettings(2, 1)}, True),
    'shaping': ({'shaping': ShapingSettings(truncated='mask')}, True),
}


@pytest.mark.parametrize('name', CHANGES)
def test_training_depends_on_the_judge_of_the_reward(judge_files, name):
    change, counts = CHANGES[name]
    panel = RewardSettings('panel', panel=PanelSettings({'a': endpoint()}))
    before, after = (
        identities(judged_config(judge_files, reward=reward))
        for reward in (panel, dataclasses.replace(panel, **change))
    )
    assert changed(before, after) == ({'rl', 'matrix'} if counts else set())


@pytest.mark.parametrize('futures', [FutureSettings(3, 1), FutureSettings(2, 2)], ids=str)
def test_training_depends_on_the_futures_of_the_reward(judge_files, futures):
    before, after = (
        identities(judged_config(judge_files, reward=RewardSettings('local_judge', unit='future', futures=of)))
        for of in (FutureSettings(2, 1), futures)
    )
    assert changed(before, after) == {'rl', 'matrix'}


def test_stages_depend_on_the_version_of_their_rubric(judge_files, monkeypatch):
    config = judged_config(judge_files, reward=RewardSettings('local_judge'))
    before = identities(config)
    for name, stages in (('outside', {'held_out_judge'}), ('helpfulness', {'rl', 'matrix'})):
        newer = dataclasses.replace(rubric.RUBRICS[name], version=2)
        monkeypatch.setitem(rubric.RUBRICS, name, newer)
        assert changed(before, identities(config)) == stages
        monkeypatch.undo()


def test_a_reward_model_leaves_stages_as_they_were():
    assert judge_identity(RewardSettings()) == {}


BAD = {
    'two judges of one rubric': (
        {'reward': RewardSettings('local_judge', 'outside')},
        r"config\.held_out\.rubric: expected another rubric than that of the reward, found 'outside' for both",
    ),
    'a panel of none': (
        {'reward': {'by': 'panel'}},
        r"config\.reward\.panel\.judges: expected at least one with by='panel', found none",
    ),
    'settings of another judge': (
        {'reward': {'by': 'reward_model', 'local_judge': {'batch_size': 3}}},
        r"config\.reward\.local_judge: expected settings only with by='local_judge', found some with by='reward_model'",
    ),
    'an unknown judge': ({'reward': {'by': 'oracle'}}, r"config\.reward\.by: expected one of 'reward_model', "),
    'an unknown rubric': ({'reward': {'rubric': 'mine'}}, r"config\.reward\.rubric: expected one of 'helpfulness', "),
    'no room for a number': (
        {'held_out': {'by': 'local_judge', 'local_judge': {'batch_size': 0}}},
        r'config\.held_out\.local_judge\.batch_size: expected at least 1, found 0',
    ),
    'falling lengths': (
        {'held_out': {'by': 'local_judge', 'local_judge': {'lengths': (64, 32)}}},
        r'config\.held_out\.local_judge\.lengths: expected ascending',
    ),
    'a judge named as a path': (
        {'reward': {'by': 'panel', 'panel': {'judges': {'../a': {'url': 'http://a/v1', 'model': 'm'}}}}},
        r"config\.reward\.panel\.judges: expected names of letters.*found '\.\./a'",
    ),
    'futures of another unit': (
        {'reward': {'futures': {'samples': 2, 'turns': 1}}},
        r"config\.reward\.futures: expected settings if and only if unit is 'future', found some with 'conversation'",
    ),
    'no futures': ({'reward': {'unit': 'future'}}, r"config\.reward\.futures: expected .* found none with 'future'"),
    'no samples of a future': (
        {'reward': {'unit': 'future', 'futures': {'samples': 0, 'turns': 1}}},
        r'config\.reward\.futures\.samples: expected at least 1, found 0',
    ),
    'a penalty of nothing': (
        {'reward': {'shaping': {'length_penalty': 'linear'}}},
        r'config\.reward\.shaping\.length_coef: expected above 0',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_settings_that_cannot_be(judge_files, name):
    changes, message = BAD[name]
    plain = config_of(judge_files).to_dict()
    for field, change in changes.items():
        plain[field] = to_config_dict(change).to_dict() if dataclasses.is_dataclass(change) else change
    plain['held_out'] = plain['held_out'] | ({'by': 'local_judge'} if name == 'two judges of one rubric' else {})
    with pytest.raises(ConfigError, match=message):
        experiment.settings_of(plain)


def refusal(config, tmp_path):
    with pytest.raises(ConfigError) as refused:
        experiment.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    return str(refused.value)


def test_a_local_judge_is_checked_before_anything_is_written(judge_files, tmp_path):
    def with_local(**changes):
        config = judged_config(judge_files, reward=RewardSettings('local_judge'))
        with config.unlocked(), config.ignore_type():
            config.reward.local_judge.update(changes)
        return refusal(config, tmp_path)

    assert 'config.reward.local_judge.lengths: expected room for the ' in with_local(lengths=(1024,))
    assert "config.reward.local_judge.lengths: expected at most the model's max_positions=8192" in with_local(
        lengths=(9000,)
    )
    assert 'config.reward.local_judge.model: ' in with_local(model={'source': str(tmp_path / 'none')})


def test_endpoints_are_asked_before_anything_is_written(judge_files, tmp_path):
    with ScriptedServer(lambda body, _: answer(5), models=('served',)) as server:
        found = refusal(judged_config(judge_files, reward=by_panel(server)), tmp_path)
    assert found.startswith('config.reward.panel.judges.first: ')
    assert 'served' in found
    keyed = PanelSettings({'a': endpoint(server.url, key_variable='SIMRL_NO_SUCH_KEY')})
    found = refusal(judged_config(judge_files, reward=RewardSettings('panel', panel=keyed)), tmp_path)
    assert 'SIMRL_NO_SUCH_KEY' in found


def test_a_judge_may_be_set_by_flags():
    settings = LocalJudgeSettings()
    assert RewardSettings('local_judge').local == settings
    assert (
        RewardSettings('local_judge', local_judge=dataclasses.replace(settings, read='argmax')).local.read == 'argmax'
    )
