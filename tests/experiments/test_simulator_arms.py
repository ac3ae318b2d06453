"""Arms of pretrained simulators: what each is told, what its stages depend on, what is refused. Nothing is trained."""

import dataclasses
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Conversation, Message, Preference, write_conversations, write_preferences
from simrl.evaluation.report.card_page import document
from simrl.experiments import cards, experiment, plan
from simrl.experiments.pretrained_settings import PretrainedSimulator, RemoteSettings
from simrl.experiments.sources import ModelSettings
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.models.files.huggingface_config import config_to_json
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.agents import HostConversation, Reply, Resampling, agent_for, told
from simrl.run import config as config_lib
from simrl.run.config import ConfigError, to_config_dict
from simrl.simulators import prompts
from simrl.simulators.person import FewShotSettings
from simrl.simulators.prompts import GUIDELINES
from tests.experiments.made_run import made_run
from tests.remote.server import ScriptedServer, chat_reply
from tests.tiny import byte_tokenizer, tiny_config


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and people, two thirds of whom have an intent."""
    folder = tmp_path_factory.mktemp('files')
    tokenizer = byte_tokenizer()
    config = tiny_config(len(tokenizer), mlp_dim=32, max_positions=2048, tied_embedding=True)
    export(transformer.init_params(jax.random.key(0), config), config, tokenizer, folder / 'model')
    write_conversations(
        folder / 'conversations.jsonl.gz',
        [
            Conversation(
                id=f'c{i}',
                source=f'set {i % 2}',
                split=split,
                messages=tuple(Message(('user', 'assistant')[j % 2], f'line {i} {j}') for j in range(4)),
                end='natural',
                intent=f'to do {i}' if i % 3 else None,
            )
            for i, split in enumerate(['train'] * 12 + ['test'] * 6)
        ],
    )
    write_preferences(
        folder / 'preferences.jsonl.gz',
        [
            Preference(f'p{i}', 'made up', split, (Message('user', f'ask {i // 2}'),), f'good {i}', f'bad {i} {i}')
            for i, split in enumerate(['train'] * 40 + ['test'] * 8)
        ],
    )
    return folder


def scene_of(files: pathlib.Path, workdir: pathlib.Path, arms: dict[str, PretrainedSimulator], **conversation):
    """The scene of arms on the tiny model."""
    config = importlib.import_module('configs.smollm2').get_config('smoke')
    with config.unlocked(), config.ignore_type():
        config.model.source, config.model.random = str(files / 'model'), None
        config.data.folder = str(files)
        config.arms = {name: to_config_dict(arm) for name, arm in arms.items()}
        config.conversation.limits.prompt_tokens = 1400
        config.conversation.reserved_prompt_tokens = 800
        config.conversation.update(conversation)
        for part in (config.user_sft.sft, config.reward_model.preference, config.held_out_reward_model.preference):
            part.batch.lengths = (256,)
        config.rl.row_buckets = (2048,)
        config.scale.openings = config.scale.batch_size = config.evaluation.batch_size = 4
        config.evaluation.people, config.evaluation.matrix, config.evaluation.shown = 4, 4, 2
    return experiment.scene_of(experiment.settings_of(config), workdir)


def stage_settings(scene, name: str) -> dict:
    """The settings of a stage as they are stored, and its inputs."""
    stage = next(stage for stage in plan.plan(scene) if stage.name == name)
    return config_lib.identity(stage.settings) | {'inputs': sorted(stage.inputs)}


def test_what_an_arm_is_told_of_an_example(files, tmp_path):
    (tmp_path / 'people.txt').write_text('A nurse.\nA pilot.\n')
    arms = {
        'intent': PretrainedSimulator('role_play', intent='where_known'),
        'guidelines': PretrainedSimulator('role_play', guidelines=tuple(GUIDELINES)),
        'personas': PretrainedSimulator('role_play', personas=tmp_path / 'people.txt', guidelines=('typo',)),
        'few_shot': PretrainedSimulator('role_play', few_shot=FewShotSettings(messages=3, tokens=60)),
        'opens': PretrainedSimulator('role_play', intent='where_known', opening='written'),
    }
    scene = scene_of(files, tmp_path / 'run', arms)
    scene.check()
    example, another = scene.training_examples()[0], scene.training_examples()[1]
    assert (example.id, example.intent, another.intent) == ('c0', None, 'to do 1')
    texts = {arm: told(scene.simulator(arm, 0), another) for arm in arms}
    assert all('line 1 0' in texts[arm] for arm in arms if arm != 'opens')
    assert [arm for arm, text in texts.items() if 'to do 1' in text] == ['intent', 'opens']
    assert 'to do' not in told(scene.simulator('intent', 0), example)
    assert any(text in texts['guidelines'] for text in GUIDELINES.values())
    assert GUIDELINES['typo'] in texts['personas']
    assert 'A nurse.' in texts['personas'] or 'A pilot.' in texts['personas']
    shown = [line for line in texts['few_shot'].splitlines() if line.startswith('- line ')]
    assert len(shown) == 3
    assert all(int(line.split()[2]) in range(12) and line.split()[2] != '1' for line in shown), 'of the training split'
    assert 'line 1 0' not in texts['opens']
    assert agent_for(scene.simulator('opens', 0), another).opening == 'written'
    for arm in arms:  # no intent in the assistant's view
        assert 'to do' not in scene.chat.decode(scene.assistant(None).prompt(another).tokens), arm


def test_arms_without_new_settings_are_known_by_what_they_were(files, tmp_path):
    """So that runs that were begun before go on."""
    arms = {'role_play': PretrainedSimulator('role_play'), 'fine_tuned': PretrainedSimulator('fine_tuned')}
    scene = scene_of(files, tmp_path / 'run', arms, reserved_prompt_tokens=0)
    role_play = stage_settings(scene, 'rl/role_play/seed-0')
    assert sorted(role_play) == [
        *('asked', 'assistant_sampling', 'compute', 'inputs', 'limits', 'model', 'openings', 'rl', 'seed', 'simulator'),
        'told',
    ]
    assert sorted(role_play['asked']) == ['instructions', 'sampling', 'signal']
    assert sorted(role_play['openings']) == ['instructions', 'limits', 'signal']
    assert sorted(stage_settings(scene, 'sft/fine_tuned')) == ['compute', 'inputs', 'model', 'user_sft']


CHANGES = {
    'intent': {'intent': 'where_known'},
    'guidelines': {'guidelines': ('typo',)},
    'other guidelines': {'guidelines': ('typo', 'default')},
    'few-shot': {'few_shot': FewShotSettings(3, 60)},
    'more few-shot': {'few_shot': FewShotSettings(4, 60)},
    'opening': {'opening': 'written'},
}


def test_every_setting_of_what_is_told_is_in_the_identity(files, tmp_path):
    arms = {'plain': PretrainedSimulator('role_play')}
    arms |= {name.replace(' ', '-'): PretrainedSimulator('role_play', **change) for name, change in CHANGES.items()}
    scene = scene_of(files, tmp_path / 'run', arms)
    found = [config_lib.identity(scene.simulator_identity(arm)) for arm in arms]
    assert len({repr(identity) for identity in found}) == len(arms)


def test_training_rows_and_the_simulator_have_one_system_text(files, tmp_path):
    arms = {
        'intent': PretrainedSimulator('fine_tuned', intent='required'),
        'tag': PretrainedSimulator('fine_tuned', source_tag=True),
        'both': PretrainedSimulator('fine_tuned', intent='required', source_tag=True),
    }
    scene = scene_of(files, tmp_path / 'run', arms, without_intent='drop')
    scene.check()
    example = scene.training_examples()[0]
    assert example.id == 'c1', 'the first has no intent'
    texts = {'intent': 'to do 1', 'tag': 'source: set 1', 'both': 'source: set 1\nto do 1'}
    for arm, text in texts.items():
        agent = scene.simulators.on_device(arm, {})
        assert told(agent, example) == text
        people = scene.likelihood_rows(agent)
        assert len(people.rows) == 4
        assert sorted(people.sources) == sorted(one.source for one in scene.data.people_of('test'))
        prompt = agent.prompt(example).tokens
        assert text in scene.chat.decode(prompt)
        settings = stage_settings(scene, f'sft/{arm}')
        assert (settings['intent'], settings['source_tag']) == (arms[arm].intent, arms[arm].source_tag)
        assert settings['without_intent'] == 'drop'


REFUSED: dict = {
    'a missing intent': (
        {'simulator': 'role_play', 'intent': 'required'},
        r'arms\.a\.intent: .*conversations\.jsonl\.gz: conversation c0: expected an intent, found none, as in 4 of '
        r"the split 'train'",
    ),
    'a missing intent of fine-tuning': (
        {'simulator': 'fine_tuned', 'intent': 'required'},
        r'arms\.a\.intent: .*conversation c0: expected an intent',
    ),
    'a model that is no simulator': (
        {'simulator': 'fine_tuned', 'weights': 'load', 'model': 'model'},
        r"arms\.a\.model: expected a fine-tuned simulator \(weights='load'\), whose tokenizer has <\|endconv",
    ),
    'another vocabulary': (
        {'simulator': 'fine_tuned', 'weights': 'load', 'model': 'other'},
        r'arms\.a\.model: expected the vocabulary of config\.model, found another',
    ),
    'no file of personas': (
        {'simulator': 'role_play', 'personas': 'nowhere.txt'},
        r'arms\.a: personas: .*nowhere\.txt',
    ),
    'a bad row of personas': (
        {'simulator': 'role_play', 'personas': 'bad.txt'},
        r'arms\.a: personas: .*bad\.txt, line 2: expected a persona',
    ),
    'few-shot over its budget': (
        {'simulator': 'role_play', 'few_shot': FewShotSettings(2, 3)},
        r'arms\.a: example .*: expected a message of another person of at most 3 tokens',
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_is_said_before_anything_runs(files, tmp_path, name):
    change, message = REFUSED[name]
    (tmp_path / 'bad.txt').write_text('one\n\n')
    if change.get('model') == 'other':
        tokenizer = byte_tokenizer(merges=[('a', 'b')])
        tokenizer.add_tokens(['<|endconversation|>'], special_tokens=True)
        config = tiny_config(len(tokenizer), max_positions=2048)
        export(transformer.init_params(jax.random.key(0), config), config, tokenizer, tmp_path / 'other')
    arm = PretrainedSimulator('role_play')
    values = dict(change)
    if 'model' in values:
        source = files / 'model' if values['model'] == 'model' else tmp_path / 'other'
        values['model'] = ModelSettings(str(source))
    if 'personas' in values:
        values['personas'] = tmp_path / values['personas']
    arm = dataclasses.replace(arm, **values)
    with pytest.raises(ConfigError, match=message):
        scene_of(files, tmp_path / 'run', {'a': arm}).check()


def save_model(folder: pathlib.Path, max_positions: int = 2048, **tokenizer) -> ModelSettings:
    """A model with a tokenizer of its own."""
    own = byte_tokenizer(**tokenizer)
    rows = max(own.get_vocab().values()) + 1
    config = tiny_config(rows, mlp_dim=32, max_positions=max_positions)
    own.save_pretrained(folder)
    (folder / 'config.json').write_text(json.dumps(config_to_json(config, rows, 'float32')))
    return ModelSettings(str(folder))


UNMET = {  # of whose messages no tokens are known
    'own': {'simulator': 'simrl.rollouts.agents:opening_only'},
    'text': {'simulator': 'role_play', 'exchange': 'text'},
    'remote': {'simulator': 'role_play', 'remote': RemoteSettings(EndpointSettings('http://127.0.0.1:1/v1', 'none'))},
}


@pytest.mark.parametrize('name', UNMET)
def test_the_assistant_is_checked_whoever_it_meets(files, tmp_path, name):
    model = {'model': save_model(tmp_path / 'own', merges=[('a', 'b')])} if name == 'text' else {}
    arms = {'a': PretrainedSimulator(**UNMET[name], **model)}
    with pytest.raises(ConfigError, match=r'^config\.arms\.a: assistant: expected conversations of at most .*=2048'):
        scene_of(files, tmp_path / 'run', arms, limits={'turns': 40}).check()
    with pytest.raises(ConfigError, match=r'^config\.arms\.a: the trained agent: expected sampling by temperature'):
        scene_of(files, tmp_path / 'run', arms, assistant={'top_p': 0.9}).check()


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (
            {'max_positions': 128},
            r"user_sft\.sft\.batch\.lengths: expected at most the model's max_positions=128 tokens",
        ),
        ({'without': '7'}, r"arms\.a\.model: .*conversations\.jsonl\.gz: conversation c7: .*'7'"),
    ],
)
def test_rows_of_fine_tuning_are_checked_with_the_model_that_is_trained(files, tmp_path, model, message):
    arm = PretrainedSimulator('fine_tuned', model=save_model(tmp_path / 'own', **model), exchange='text')
    with pytest.raises(ConfigError, match=rf'^config\.{message}'):
        scene_of(files, tmp_path / 'run', {'a': arm}).check()


def test_a_model_that_is_met_by_text_has_room_for_a_message(files, tmp_path):
    arm = PretrainedSimulator('role_play', model=save_model(tmp_path / 'own', 1400), exchange='text')
    message = r'^config\.arms\.a: user: expected a prompt of 1400 tokens and a message of .* in max_positions=1400'
    with pytest.raises(ConfigError, match=message):
        scene_of(files, tmp_path / 'run', {'a': arm}).check()


BAD = {
    'unknown guideline': ({'guidelines': ('rude',)}, r"guidelines: expected default, .* found 'rude'"),
    'guidelines of a fine-tuned one': (
        {'simulator': 'fine_tuned', 'guidelines': ('typo',)},
        r"guidelines: expected \(\) for fine_tuned, found \('typo',\)",
    ),
    'a tag of role-play': ({'source_tag': True}, 'source_tag: expected False for role_play, found True'),
    'rows with and without an intent': (
        {'simulator': 'fine_tuned', 'intent': 'where_known'},
        "intent: expected 'none' or 'required' for fine_tuned",
    ),
    'nothing to load': ({'simulator': 'fine_tuned', 'weights': 'load'}, "model: expected a model for weights='load'"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_settings_of_an_arm(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        PretrainedSimulator(**{'simulator': 'role_play', **change})


def test_a_published_simulator_is_loaded_by_name_and_not_trained(files, tmp_path):
    """Its tokenizer has one token more than the assistant's, whose row is kept as it is."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    config = tiny_config(len(tokenizer), mlp_dim=32, max_positions=2048, tied_embedding=True)
    params = transformer.init_params(jax.random.key(1), config)
    export(params, config, tokenizer, tmp_path / 'published')
    model = ModelSettings(str(tmp_path / 'published'))
    arm = PretrainedSimulator('fine_tuned', model=model, weights='load', intent='required', repeats=Resampling())
    scene = scene_of(files, tmp_path / 'run', {'a': arm}, without_intent='drop')
    scene.check()
    assert not [stage.name for stage in scene.setup() if stage.name.startswith('sft/')]
    agent = scene.simulator('a', 0)
    terminal = scene.chat.terminal
    found = np.asarray(agent.policy.params['decoder']['embedding'])[terminal]
    np.testing.assert_array_equal(found, np.asarray(params['decoder']['embedding'])[terminal])
    assert agent.policy.spec.stop_sequences == ((terminal,),)
    assert agent.resampling == Resampling()


def test_a_mixture_gives_each_example_one_of_other_arms(files, tmp_path):
    arms = {
        'plain': PretrainedSimulator('role_play'),
        'typo': PretrainedSimulator('role_play', guidelines=('typo',)),
        'both': PretrainedSimulator('mixture', mixture={'plain': 1.0, 'typo': 3.0}),
        'other': PretrainedSimulator('mixture', mixture={'plain': 3.0, 'typo': 1.0}),
    }
    scene = scene_of(files, tmp_path / 'run', arms)
    scene.check()
    agent = scene.simulator('both', 0)
    example = scene.training_examples()[0]
    seeds = [dataclasses.replace(example, persona_seed=seed) for seed in range(2000)]
    chosen = [agent.choose(one) for one in seeds]
    assert abs(sum(chosen) - 1500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert chosen == [agent.choose(dataclasses.replace(one, id='x')) for one in seeds], 'by the seed alone'
    texts = [told(agent, one) for one in seeds[:50]]
    assert [GUIDELINES['typo'] in text for text in texts] == [bool(number) for number in chosen[:50]]
    identities = {arm: config_lib.identity(scene.simulator_identity(arm)) for arm in arms}
    assert identities['both']['members'] == {arm: identities[arm] for arm in ('plain', 'typo')}
    assert identities['both'] != identities['other']


@pytest.mark.parametrize('mixture', [{}, {'b': 0.0}, {'c': 1.0}, {'a': 1.0}])
def test_a_mixture_names_other_arms_with_weights(files, tmp_path, mixture):
    def scene():
        arms = {'a': PretrainedSimulator('mixture', mixture=mixture), 'b': PretrainedSimulator('role_play')}
        return scene_of(files, tmp_path / 'run', arms)

    with pytest.raises(ValueError, match=r'mixture: expected (weights|names)'):
        scene()


def test_a_remote_simulator_is_an_endpoint_in_the_identity_and_is_checked(files, tmp_path):
    def arm(url: str, **changes) -> PretrainedSimulator:
        remote = RemoteSettings(EndpointSettings(url, 'model', tries=1), **changes)
        return PretrainedSimulator('role_play', guidelines=('typo',), remote=remote)

    with ScriptedServer(lambda body, attempt: chat_reply('a hat')) as server:
        arms = {'chat': arm(server.url), 'json': arm(server.url, form='json'), 'moved': arm('http://127.0.0.1:1/v1')}
        scene = scene_of(files, tmp_path / 'run', arms)
        with pytest.raises(ConfigError, match=r'arms\.moved\.remote\.endpoint: '):
            scene.check()
        identities = [config_lib.identity(scene.simulator_identity(name)) for name in arms]
        assert identities[0] == identities[2], 'wherever it is served'
        assert identities[0] != identities[1]
        agent = scene.simulator('chat', 0)
        example = scene.training_examples()[0]
        talk = HostConversation(example, 0, (('user', example.opening), ('assistant', 'Hi.')))
        assert agent.reply([talk], np.zeros(1, np.uint32)) == [Reply('a hat')]
        assert GUIDELINES['typo'] in server.requests[-1]['messages'][0]['content']


TEXTS = {'JSON_INSTRUCTIONS': 'json', 'NOT_BEGUN': 'json', 'OPENING_REQUEST': 'opens', 'VERSION': ''}


@pytest.mark.parametrize('name', TEXTS)
def test_the_identity_of_a_remote_simulator_follows_what_is_sent(files, tmp_path, monkeypatch, name):
    """An edited text is another simulator, of the arms that are sent it; those on the device never are."""
    endpoint = EndpointSettings('http://127.0.0.1:1/v1', 'model')
    arms = {
        'json': PretrainedSimulator('role_play', intent='where_known', remote=RemoteSettings(endpoint, form='json')),
        'opens': PretrainedSimulator(
            'role_play', intent='where_known', opening='written', remote=RemoteSettings(endpoint)
        ),
        'device': PretrainedSimulator('role_play', guidelines=('typo',)),
    }

    def identities(run: str):
        scene = scene_of(files, tmp_path / run, arms)
        return {arm: config_lib.identity(scene.simulator_identity(arm)) for arm in arms}

    before = identities('a')
    assert before == identities('b')
    monkeypatch.setattr(prompts, name, f'{getattr(prompts, name)} More.')
    after = identities('c')
    changed = {arm for arm in arms if before[arm] != after[arm]}
    assert changed == ({TEXTS[name]} if TEXTS[name] else {'json', 'opens'})


def test_any_simulator_has_a_card(files, tmp_path):
    """One of your own, one behind an endpoint, one that is loaded by name, a mixture; no card has an address."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    published = save_model(tmp_path / 'published')
    tokenizer.save_pretrained(tmp_path / 'published')
    endpoint = EndpointSettings('http://127.0.0.1:1/v1', 'served')
    arms = {
        'plain': PretrainedSimulator('role_play'),
        'own': PretrainedSimulator('simrl.rollouts.agents:opening_only'),
        'remote': PretrainedSimulator('role_play', remote=RemoteSettings(endpoint, form='json')),
        'loaded': PretrainedSimulator('fine_tuned', model=published, weights='load'),
        'both': PretrainedSimulator('mixture', mixture={'plain': 1.0, 'remote': 3.0}),
    }
    scene = made_run(tmp_path / 'run', scene_of(files, tmp_path / 'run', arms).settings)
    off_the_device = json.dumps({'log_likelihood': None, 'tokens': None})
    (scene.workdir / 'likelihood' / 'remote' / 'result.json').write_text(off_the_device)
    found = {arm: cards.simulator_card(scene, arm) for arm in arms}
    reason = 'there is none under a simulator that is met through its texts'
    assert {arm: card.not_measured.get('perplexity') for arm, card in found.items()} == {
        **dict.fromkeys(arms),
        'remote': reason,
    }
    assert {arm: card.identity.model for arm, card in found.items()} == {
        'plain': str(files / 'model'),
        'own': None,
        'remote': 'served behind an endpoint',
        'loaded': str(tmp_path / 'published'),
        'both': None,
    }
    assert [arm for arm, card in found.items() if card.parameters is not None] == ['plain', 'loaded']
    for arm, card in found.items():
        own = ['simulator_model'] if arm == 'loaded' else []
        assert sorted(card.identity.inputs) == ['conversations', 'model', *own]
    assert found['both'].identity.depends_on['members'].keys() == {'plain', 'remote'}
    assert found['own'].identity.depends_on['told'] == scene.simulator_identity('own')['told']
    assert {card.transfer.times for card in found.values()} == {1}, 'the scores of a reward model have no bounds'
    for card in found.values():
        assert '127.0.0.1' not in document(card) + json.dumps(config_lib.to_dict(card))


WRONG_REMOTE = {
    'raw role-play': ({'simulator': 'role_play'}, 'raw', r'remote\.form: expected chat or json for role_play'),
    'chat of a fine-tuned one': ({'simulator': 'fine_tuned'}, 'chat', r'remote\.form: expected raw for fine_tuned'),
    'raw of one that is trained here': ({'simulator': 'fine_tuned'}, 'raw', "weights: expected 'load'"),
    'a dtype': ({'simulator': 'role_play', 'dtype': 'float32'}, 'chat', 'dtype: expected None for a remote'),
}


@pytest.mark.parametrize('name', WRONG_REMOTE)
def test_what_a_remote_simulator_cannot_be(name):
    change, form, message = WRONG_REMOTE[name]
    remote = RemoteSettings(EndpointSettings('http://127.0.0.1:1/v1', 'model'), form=form)
    with pytest.raises(ValueError, match=message):
        PretrainedSimulator(**change, remote=remote)
