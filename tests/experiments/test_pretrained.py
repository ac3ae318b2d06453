"""The experiment on a tiny pretrained model and made-up people: it runs, resumes, grows, and refuses."""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Conversation, Message, Preference, write_conversations, write_preferences
from simrl.conversations.templates import chat_from_huggingface
from simrl.evaluation.fidelity.turns import read_turns
from simrl.evaluation.report.card_failures import METRICS
from simrl.evaluation.results import files as result_files
from simrl.experiments import experiment, fitting, sources
from simrl.experiments.replays import TURNS_FILE
from simrl.models import transformer
from simrl.models.files.export import export, read_generation_config
from simrl.models.files.huggingface import load_config, load_params
from simrl.models.transformer import TransformerConfig
from simrl.remote.cache import Cache
from simrl.run import directory, stage_files
from simrl.run.config import ConfigError, from_config_dict, to_dict
from simrl.run.stages import WorkdirError
from simrl.serving import respond
from simrl.serving.load import find_assistant, find_model, find_simulator
from simrl.training import loop
from tests.experiments.scene import fields_without_effect, identity, leaves, without_effect
from tests.tiny import CHATML_WITHOUT_SYSTEM, TEXT_TEMPLATES, byte_tokenizer, tiny_config
from tools import card as card_tool
from tools import export as export_tool

ROOT = pathlib.Path(__file__).parents[2]
ARMS = ('role_play', 'fine_tuned')
TRAINED = 'rl/role_play/seed-0'
MEASURE = 'held_out_reward_model'


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and people of all splits."""
    folder = tmp_path_factory.mktemp('files')
    tokenizer = byte_tokenizer()
    config = tiny_config(len(tokenizer), mlp_dim=32, max_positions=512, tied_embedding=True)
    export(transformer.init_params(jax.random.key(0), config), config, tokenizer, folder / 'model')
    splits = ['train'] * 12 + ['test'] * 6 + ['dev'] * 4
    write_conversations(
        folder / 'conversations.jsonl.gz',
        [
            Conversation(
                id=f'c{i}',
                source='made up',
                split=split,
                messages=tuple(Message(('user', 'assistant')[j % 2], f'line {i} {j}') for j in range(4)),
                end='natural',
            )
            for i, split in enumerate(splits)
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


def config_of(files: pathlib.Path):
    config = importlib.import_module('configs.smollm2').get_config('smoke')
    with config.unlocked(), config.ignore_type():
        config.model.source = str(files / 'model')
        config.model.random = None
        config.data.folder = str(files)
        config.conversation.role_play.instructions = 'Play. End with {signal}. {opening}'
        config.conversation.limits.prompt_tokens = 96
        config.conversation.limits.user_tokens = config.conversation.limits.assistant_tokens = 8
        for part in (config.user_sft.sft, config.reward_model.preference, config.held_out_reward_model.preference):
            part.batch.lengths = (128,)
        config.rl.row_buckets = (256,)
        config.rl.validation.update({'every': 1, 'examples': 3, 'margin': 1.0})
        config.scale.openings = config.scale.batch_size = config.evaluation.batch_size = 6
        config.evaluation.people, config.evaluation.matrix = 6, 4
        config.evaluation.shown = 2
        config.workers = 1
    return config


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    experiment.run(config_of(files), workdir)
    return workdir


def contents(workdir: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """When each result was written, and what it says."""
    return {str(p.relative_to(workdir)): (p.stat().st_mtime_ns, p.read_bytes()) for p in workdir.rglob('result.json')}


def stages_of(arms: tuple[str, ...], seed: int) -> set[str]:
    """The stages that arms of a training seed add."""
    return {
        *(f'rl/{arm}/seed-{seed}' for arm in arms),
        *(f'{MEASURE}/{arm}/seed-{seed}/block-0' for arm in arms),
        *(f'matrix/{arm}/seed-{seed}/{simulator}' for arm in arms for simulator in ARMS),
    }


def test_leaves_a_result_of_every_stage_and_a_report(files, finished):
    names = {'sft/fine_tuned', 'reward_model/train', 'reward_model/held_out', 'reward_model/scale'}
    names |= {f'{MEASURE}/initial/block-0', *(f'matrix/initial/{arm}' for arm in ARMS)}
    names |= {f'likelihood/{arm}' for arm in ARMS} | stages_of(ARMS, 0)
    assert {name.removesuffix('/result.json') for name in contents(finished)} == names
    measured = json.loads((finished / 'results' / f'{MEASURE}.json').read_text())
    assert set(measured['assistants']) == {'initial', *(f'{arm}/seed-0' for arm in ARMS)}
    for name, row in measured['assistants'].items():
        if name != 'initial':
            low, high = row['win_rate']['low'], row['win_rate']['high']
            assert (low is None) == (high is None)  # no interval where no reply wins
            assert 0 <= (low or 0) <= row['win_rate']['mean'] <= (1 if high is None else high) <= 1
    fidelity = json.loads((finished / 'results' / 'fidelity.json').read_text())
    assert all(found['nats_per_token']['mean'] > 0 for found in fidelity['simulators'].values())
    predicted = [json.loads((finished / 'likelihood' / arm / 'result.json').read_text()) for arm in ARMS]
    assert all(found['tokens'] == predicted[0]['tokens'] for found in predicted), 'whatever a simulator is told'
    trained = finished / TRAINED
    validation = json.loads((trained / 'result.json').read_text())['validation']
    assert validation['step'] == [0, 1, 2]
    assert str(validation['chosen']) in {path.name for path in (trained / 'candidates').iterdir()}
    for step, reward in zip(validation['step'], validation['reward'], strict=True):
        rewards = json.loads((trained / 'validation' / f'step-{step}.json').read_text())['rewards']
        assert len(rewards) == 3
        assert reward == pytest.approx(np.mean(list(rewards.values())))
    found = result_files.read(finished)
    params = sources.open_model(experiment.settings_of(config_of(files)).model).load_params()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert {arm.parameters for arm in found.experiment.arms.values()} == {size}, 'all are the model itself'
    for curve in found.training.assistants.values():
        assert all(0 < tokens <= 8 for tokens in curve.message_tokens)
        assert set(curve.ends) >= {'signal', 'turns', 'failure'}
        assert all(sum(shares) == pytest.approx(1) for shares in zip(*curve.ends.values(), strict=True))
        assert curve.unjudged == (0.0,) * len(curve.step)
    assert all(0 < x.message_tokens <= 8 for x in found.measures[MEASURE].assistants.values())
    page = (finished / 'report.html').read_text()
    assert 'Validation reward' in page
    assert 'of more than 1 × its standard error' in page
    assert 'role_play' in page
    assert 'openings' in page
    rows = (finished / TRAINED / 'conversations' / 'rl.jsonl').read_text().splitlines()
    browsed = (finished / 'conversations.html').read_text()
    assert f'{len(rows) * len(ARMS)} of training' in browsed
    row = json.loads(rows[0])
    assert {'messages', 'end_reason', 'reward', 'parts', 'seed', 'example', 'step', 'told'} <= set(row)
    assert row['told'].startswith('Play. End with [END]. line')


def test_each_simulator_of_a_real_run_has_its_card(finished, tmp_path):
    """From what stages wrote: metrics of training, statistics of conversations, seconds, hashes."""
    for arm in ARMS:
        card_tool.main([str(finished), arm, f'--output={tmp_path / arm}'])
        card = json.loads((tmp_path / arm / 'card.json').read_text())
        assert card['cost']['unfinished'] == {}
        assert all(x > 0 for of in card['cost']['seconds'].values() for x in of.values())
        assert card['conversations']['held'] == 4 * (1 + len(ARMS))
        assert {'later_messages', 'repeated', 'resampled', 'missed_signals'} == card['conversations']['counts'].keys()
        assert METRICS.keys() <= card['training']['rates'].keys()
        assert card['fidelity']['perplexity'] > 1
        assert all(len(digest) == 64 for digest in card['identity']['inputs'].values())
        assert set(card['not_measured']) >= {'forecast', 'utility over training seeds'}
        assert {'utility', 'transfer', 'fidelity', 'failures in training'}.isdisjoint(card['not_measured'])


def test_a_served_stage_has_the_weights_that_the_stage_left(finished):
    """By the name of the assistant or simulator, and by that of its stage."""
    weights = [jax.tree.leaves(find_model(f'{finished}/initial')().policy.params)]
    for find, names in (
        (find_assistant, ('role_play/seed-0', TRAINED)),
        (find_simulator, ('fine_tuned', 'sft/fine_tuned')),
    ):
        expected = jax.tree.leaves(find(f'{finished}/{names[0]}')().agent.policy.params)
        for name in names:
            found = find_model(f'{finished}/{name}')()
            assert found.knows_terminal == (find is find_simulator)
            assert not found.policy.token_mask[found.chat.terminal]  # a chat with it is no simulation
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found.policy.params), expected)
        weights.append(expected)
    for first, second in itertools.combinations(weights, 2):
        assert any(not np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_same_command_runs_nothing_again_and_a_seed_runs_only_what_is_new(files, finished):
    before = contents(finished)
    experiment.run(config_of(files), finished)
    assert contents(finished) == before
    config = config_of(files)
    config.seeds = (0, 1)
    settings = experiment.settings_of(config)
    planned = directory.plan_of(
        finished, to_dict(settings), experiment.build_stages(settings, finished), fixed=experiment.FIXED
    )
    assert {stage.state for stage in planned} == {'done', 'missing', 'waits'}
    assert {stage.name for stage in planned if stage.state != 'done'} == stages_of(ARMS, 1)


def test_responses_to_a_simulator_are_the_conversations_of_the_matrix(finished, tmp_path, monkeypatch):
    """Whole, and without the message that ended one. They are kept: those that are there need no weights."""
    openings, cache = [], Cache(tmp_path / 'cache.sqlite')
    for name, stage in (('initial', 'matrix/initial'), (TRAINED, 'matrix/role_play/seed-0')):
        some, _ = respond.with_user(str(finished / name), 'role_play', cache, people=2)
        rows, failed = respond.with_user(str(finished / name), 'role_play', cache, people=4)
        assert rows[:2] == some
        with monkeypatch.context() as patched:
            patched.delattr(respond, 'load_assistant')
            assert respond.with_user(str(finished / name), 'role_play', cache, people=4) == (rows, {})
        outcomes = json.loads((finished / stage / 'role_play' / 'result.json').read_text())['outcomes']
        assert not failed
        assert [row['id'] for row in rows] == outcomes['example']
        for row, end, turns in zip(rows, outcomes['end'], outcomes['assistant_turns'], strict=True):
            roles = [message['role'] for message in row['messages']]
            assert roles == ['user', 'assistant'] * (len(roles) // 2) + ['user'] * (len(roles) % 2)
            if turns is not None:  # it has a score
                assert (row['end'], roles.count('assistant')) == (end, turns)
        openings.append([row['messages'][0]['content'] for row in rows])
    assert openings[0] == openings[1]
    with pytest.raises(ValueError, match=r'nobody: expected a simulator of the run \(role_play, fine_tuned\)'):
        respond.with_user(str(finished / 'initial'), 'nobody', cache, people=4)
    cache.close()


@pytest.mark.long
def test_a_run_again_gives_the_same_numbers(files, finished, tmp_path):
    """Of another workdir, by two jobs: each trains an arm, and the second one finds the shared stages done."""
    for arm in ARMS:
        experiment.run(config_of(files), tmp_path / 'again', only=(f'rl/{arm}', f'{MEASURE}/{arm}'))
        assert not (tmp_path / 'again' / 'report.html').exists()
    for name in ('sft/fine_tuned', 'rl/fine_tuned/seed-0', f'{MEASURE}/fine_tuned/seed-0/block-0'):
        assert (tmp_path / 'again' / name / 'result.json').read_bytes() == (
            finished / name / 'result.json'
        ).read_bytes()
    assert not (tmp_path / 'again' / 'matrix').exists()


def test_an_edited_simulator_is_run_again_and_no_other_arm(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    config = config_of(files)
    config.arms.role_play.instructions = 'Be terse. End with {signal}. {opening}'
    with pytest.raises(WorkdirError, match=r'--rerun=rl/role_play') as refused:
        experiment.run(config, tmp_path / 'run')
    assert 'fine_tuned' not in str(refused.value).partition('--rerun')[0].replace('matrix/fine_tuned', '')


def test_a_stage_knows_every_setting_that_it_depends_on(files, monkeypatch):
    monkeypatch.setattr(sources, 'open_model', functools.cache(sources.open_model))  # of settings that stay the same
    config = config_of(files)
    config.evaluation.replayed = 4
    settings = experiment.settings_of(config)
    without, skipped = fields_without_effect(to_dict(settings))
    declared = without_effect(settings)
    # That bad rows are dropped shows in the data, whose hash is an input. No model is of a hub here, no judge is asked.
    unused = {'model.revision', 'reward.rubric', 'held_out.rubric'}
    assert without - declared <= {'evaluation.people', 'model.source', 'data.on_bad_rows'} | unused
    assert declared <= without | skipped
    assert 'scale.batch_size' in declared
    assert len(skipped) < len(list(leaves(to_dict(settings)))) / 2
    with config.unlocked(), config.ignore_type():
        config.evaluation.forecast = ConfigDict({'examples': 4, 'samples': 4, 'n': 2})

    def stages() -> dict[str, str]:
        return {stage.name: identity(stage) for stage in experiment.build_stages(experiment.settings_of(config), files)}

    before = stages()
    config.conversation.assistant.temperature *= 0.5
    same = {name for name, found in stages().items() if found == before[name]}
    assert same == {'sft/fine_tuned', 'reward_model/train', 'reward_model/held_out'}, 'in no other the assistant speaks'


def test_less_at_once_and_other_logs_resume_a_run(files, finished):
    """As after running out of memory. That tokens and gradients stay the same is for tests of `rl` to show."""
    before, config = contents(finished), config_of(files)
    config.rl.algorithm.microbatches *= 2
    config.rl.row_buckets = (128, 256)
    config.compute.rows_in_flight = 4
    config.compute.loop.log_every = 2
    config.scale.batch_size = config.evaluation.batch_size = 3
    experiment.run(config, finished)
    assert contents(finished) == before


def test_more_people_are_the_same_and_others(files, tmp_path):
    config = config_of(files)
    config.evaluation.matrix = 2

    def ids(people: int) -> list[str]:
        config.evaluation.people = people
        scene = experiment.scene_of(experiment.settings_of(config), tmp_path)
        return [example.id for example in scene.held_out_examples(None)]

    assert ids(5)[:3] == ids(3)
    assert len(set(ids(6))) == 6


def test_changed_parameters_of_a_stage_are_named(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    file = next((tmp_path / 'run' / 'reward_model' / 'held_out' / 'params').rglob('manifest.ocdbt'))
    file.write_bytes(file.read_bytes() + b' ')
    name = file.relative_to(tmp_path / 'run' / 'reward_model' / 'held_out')
    with pytest.raises(WorkdirError, match=f'{name}.*--rerun=reward_model/held_out'):
        experiment.run(config_of(files), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'reward_model' / 'held_out' / loop.CHECKPOINTS_FOLDER).exists()
    assert stage_files.SCRATCH_FOLDER == loop.CHECKPOINTS_FOLDER  # what a stage drops is what the loop resumes from


def test_a_local_model_is_known_by_its_contents_wherever_it_lies(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.copytree(files / 'model', tmp_path / 'moved')
    before = contents(tmp_path / 'run')
    config = config_of(files)
    config.model.source = str(tmp_path / 'moved')
    experiment.run(config, tmp_path / 'run')
    assert contents(tmp_path / 'run') == before
    (tmp_path / 'moved' / 'generation_config.json').write_text('{"top_p": 0.5}')
    with pytest.raises(WorkdirError, match='input model'):
        experiment.run(config, tmp_path / 'run')


def test_workers_would_share_an_accelerator(files, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1})
    config = config_of(files)
    config.workers = 2
    with pytest.raises(ConfigError, match=r'config\.workers: expected 1 on gpu, .* found 2'):
        experiment.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_another_setting_is_refused_with_the_difference(files, finished):
    config = config_of(files)
    config.rl.algorithm.clip_low = 0.1
    config.seeds = (2, 0)
    before = {path: path.read_bytes() for path in finished.rglob('*.json')}
    named = r'rl/role_play/seed-0, rl/fine_tuned/seed-0 \(rl\.algorithm\.clip_low: 0\.2 -> 0\.1\)'
    with pytest.raises(WorkdirError, match=rf'{named}.*--rerun=rl\)'):
        experiment.run(config, finished)
    assert {path: path.read_bytes() for path in finished.rglob('*.json')} == before  # not a stage of the new seed ran


def test_a_plan_says_what_is_done_and_what_cannot_be_and_writes_nothing(files, finished, tmp_path, capsys):
    before = sorted(finished.rglob('*'))
    experiment.run(config_of(files), finished, show_plan=True)
    assert sorted(finished.rglob('*')) == before
    assert 'rl/fine_tuned/seed-0' in capsys.readouterr().out
    experiment.run(config_of(files), tmp_path / 'run', show_plan=True)
    assert not (tmp_path / 'run').exists()
    config = config_of(files)
    config.rl.prompts_per_step = 100
    with pytest.raises(ConfigError, match=r'prompts_per_step: expected at most the 12 examples .* found 100'):
        experiment.run(config, tmp_path / 'run', show_plan=True)
    assert 'refused' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


def test_fine_tuning_needs_no_preferences(files, tmp_path):
    config = config_of(files)
    config.data.preferences = 'nowhere.jsonl.gz'
    experiment.run(config, tmp_path / 'run', only=('sft',), show_plan=True)
    with pytest.raises(ConfigError, match=r"its input 'preferences' at .*nowhere\.jsonl\.gz, found nothing"):
        experiment.run(config, tmp_path / 'run', only=('reward_model/train',), show_plan=True)


def test_the_sample_of_the_readme_has_rows_of_every_split():
    folder = str(ROOT / 'tests' / 'data' / 'sample')
    settings = from_config_dict(sources.DataSettings, {'folder': folder}, 'data')
    for rows in (sources.conversations_of(settings, str.encode), sources.preferences_of(settings, str.encode)):
        assert all(sources.of_split(rows, split) for split in ('train', 'dev', 'test'))


def test_the_two_reward_models_share_no_opening(files):
    settings = from_config_dict(sources.DataSettings, {'folder': str(files)}, 'data')
    preferences = sources.of_split(sources.preferences_of(settings, str.encode), 'train')
    halves = [{p.opening for p in preferences if fitting.half_of(p) == half} for half in fitting.HALVES]
    assert all(halves)
    assert not halves[0] & halves[1]


def test_a_trained_stage_exports_with_the_terminal_token(finished, tmp_path):
    export_tool.main([f'--stage={finished}/sft/fine_tuned', f'--output={tmp_path}/simulator'])
    config = load_config(tmp_path / 'simulator')
    chat = chat_from_huggingface(byte_tokenizer())
    assert config.vocab_size == chat.size
    assert load_params(tmp_path / 'simulator', config)
    ends = [chat.end_of_turn['user'], chat.terminal]
    assert read_generation_config(tmp_path / 'simulator') == {'eos_token_id': ends}
    export_tool.main([f'--stage={finished}/rl/role_play/seed-0', f'--output={tmp_path}/assistant'])
    assert read_generation_config(tmp_path / 'assistant') == {'eos_token_id': [chat.end_of_turn['assistant']]}


def test_an_exported_simulator_may_be_the_model_of_an_arm(files, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    config = dataclasses.replace(load_config(files / 'model'), vocab_size=len(tokenizer))
    export(transformer.init_params(jax.random.key(0), config), config, tokenizer, tmp_path / 'simulator')
    run = config_of(files)
    run.arms.fine_tuned.model.source, run.arms.fine_tuned.model.rewrites = str(tmp_path / 'simulator'), 'error'
    scene = experiment.scene_of(experiment.settings_of(run), tmp_path / 'run')
    assert scene.simulators.model('fine_tuned').knows_terminal
    assert scene.simulators.model('fine_tuned').chat.terminal == scene.chat.terminal


@pytest.mark.long
def test_simulators_replay_the_same_turns_of_held_out_people(files, tmp_path):
    config = config_of(files)
    config.evaluation.replayed = 5
    experiment.run(config, tmp_path / 'run', only=('replay',))
    turns = {arm: read_turns(tmp_path / 'run' / 'replay' / arm / TURNS_FILE) for arm in ARMS}
    assert len({tuple((turn.conversation, turn.turn) for turn in found) for found in turns.values()}) == 1
    found = turns['fine_tuned']
    assert {turn.turn for turn in found} == {1, 2}
    assert {int(turn.conversation[1:]) >= 12 for turn in found} == {True}, 'none of the training split'
    assert [turn.real_end for turn in found] == [turn.turn == 2 for turn in found]
    assert all(turn.replayed and len(turn.simulated or '') <= 8 for turn in found)


@pytest.mark.long
def test_a_simulator_and_an_assistant_are_trained_by_adapters(files, tmp_path):
    """Each stage leaves a whole model, of which only the adapted weights are not those that it started from."""
    config = config_of(files)
    for settings in (config.user_sft.sft, config.rl):
        settings.lora.update({'rank': 2, 'alpha': 8.0, 'targets': ('value', 'up')})
        settings.optimizer.learning_rate = 1e-2
    experiment.run(config, tmp_path / 'run', only=('rl/fine_tuned',))

    def exported(stage: str) -> dict:
        output = tmp_path / 'exported' / stage
        export_tool.main([f'--stage={tmp_path}/run/{stage}', f'--output={output}'])
        return load_params(output, load_config(output))['decoder']

    model = sources.open_model(from_config_dict(sources.ModelSettings, {'source': config.model.source}, 'model'))
    start = model.load_params()['decoder']
    for stage in ('sft/fine_tuned', 'rl/fine_tuned/seed-0'):
        decoder = exported(stage)
        layers = decoder.pop('layers')
        changed = {name for name, weights in layers.items() if not np.array_equal(weights, start['layers'][name])}
        assert changed == {'value', 'up'}
        assert all(np.array_equal(x, start[name][: len(x)]) for name, x in decoder.items())


def of_another_size(vocab_size: int) -> TransformerConfig:
    return tiny_config(vocab_size, model_dim=24, num_layers=2, num_kv_heads=2, head_dim=12, max_positions=512)


@pytest.mark.long
def test_a_simulator_has_a_model_of_its_own(files, tmp_path):
    """Of other sizes and another dtype than the assistant's."""
    config = of_another_size(len(byte_tokenizer()))
    export(transformer.init_params(jax.random.key(1), config), config, byte_tokenizer(), tmp_path / 'large')
    run = config_of(files)
    run.arms.role_play.model.source, run.arms.role_play.model.rewrites = str(tmp_path / 'large'), 'error'
    run.arms.role_play.dtype = 'bfloat16'
    experiment.run(run, tmp_path / 'run', only=('rl/role_play', 'likelihood/role_play'))
    lines = (tmp_path / 'run' / 'rl/role_play/seed-0/metrics.jsonl').read_text().splitlines()
    assert len(lines) == 1 + run.rl.steps  # the first is a validation


def test_a_simulator_of_another_vocabulary_is_refused(files, tmp_path):
    tokenizer = byte_tokenizer(merges=[('a', 'b')])
    config = of_another_size(len(tokenizer))
    export(transformer.init_params(jax.random.key(1), config), config, tokenizer, tmp_path / 'other')
    run = config_of(files)
    run.arms.role_play.model.source, run.arms.role_play.model.rewrites = str(tmp_path / 'other'), 'error'
    with pytest.raises(ConfigError, match=r'config\.arms\.role_play\.model: expected the vocabulary of config\.model'):
        experiment.run(run, tmp_path / 'refused')
    assert not (tmp_path / 'refused').exists()


def edit(path: str, value):
    def change(config) -> None:
        *parents, field = path.split('.')
        for parent in parents:
            config = config[parent]
        with config.unlocked(), config.ignore_type():
            config[field] = value

    return change


def short_rows(config) -> None:
    del config.arms['fine_tuned']  # which has nothing to learn in them
    edit('user_sft.sft.batch.lengths', (8,))(config)


LATE = {
    'budgets over positions': (edit('conversation.limits.turns', 40), 'max_positions=512'),
    'filters in training': (edit('conversation.assistant.top_p', 0.9), 'temperature alone'),
    'more prompts than openings': (
        edit('rl.prompts_per_step', 100),
        'prompts_per_step: expected at most the 12 examples .* found 100',
    ),
    'warm-up without end': (edit('rl.optimizer.warmup_steps', 50), r'config\.rl\.optimizer\.warmup_steps'),
    'warm-up of fine-tuning': (
        edit('user_sft.sft.optimizer.warmup_steps', 50),
        r'config\.user_sft\.sft\.optimizer\.warmup_steps',
    ),
    'pairs over positions': (
        edit('held_out_reward_model.preference.batch.lengths', (128, 600)),
        r'config\.held_out_reward_model\.preference\.batch\.lengths: expected at most .* found 600',
    ),
    'a scale of one reply': (edit('scale.openings', 1), r'config\.scale\.openings: expected at least 2, or None'),
    'batches of no reply': (edit('evaluation.batch_size', 0), r'config\.evaluation\.batch_size: expected at least 1'),
    'more people than there are': (edit('evaluation.people', 99), r'config\.evaluation\.people: .* the 6 that fit'),
    'a larger matrix than people': (edit('evaluation.matrix', 7), r'config\.evaluation\.matrix: .* the 6 that fit'),
    'more replays than people': (
        edit('evaluation.replayed', 11),
        r'config\.evaluation\.replayed: expected at most the 10 held-out .* an opening, found 11',
    ),
    'no opening fits': (edit('conversation.limits.prompt_tokens', 3), 'none of 12 fits'),
    'a longer prompt': (
        edit('arms.role_play.instructions', '{signal} {opening}' + 'x' * 90),
        r'config\.arms\.role_play: its prompt for example .* expected at most .*prompt_tokens=96',
    ),
    'instructions without a field': (
        edit('arms.role_play.instructions', '{opening}'),
        r'instructions: .*signal',
    ),
    'rows without room for a second message': (
        short_rows,
        r"batch\.lengths: expected a length that holds a held-out person's opening, .* found at most 8",
    ),
    'the same half twice': (edit('reward_model.half', 'second'), r'config\.held_out_reward_model\.half: expected'),
    'no data': (edit('data.folder', 'nowhere'), 'nowhere'),
}


@pytest.mark.parametrize('name', LATE)
def test_what_cannot_be_is_said_before_anything_is_written(files, tmp_path, name):
    change, message = LATE[name]
    config = config_of(files)
    change(config)
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        experiment.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_template_without_system_text_has_fine_tuned_simulators_only(files, tmp_path):
    """And its arms start from openings that only those simulators' prompts bound."""
    tokenizer = byte_tokenizer(template=CHATML_WITHOUT_SYSTEM)
    export(
        transformer.init_params(jax.random.key(0), load_config(files / 'model')),
        load_config(files / 'model'),
        tokenizer,
        tmp_path / 'model',
    )
    config = config_of(files)
    config.model.source = str(tmp_path / 'model')
    with pytest.raises(ConfigError, match=r'config\.arms\.role_play: .*a chat template that takes a system text'):
        experiment.run(config, tmp_path / 'run')
    with config.unlocked():
        del config.arms['role_play']
    experiment.run(config, tmp_path / 'run', show_plan=True)


def test_a_template_whose_user_messages_end_with_text_has_prompted_simulators_only(files, tmp_path):
    tokenizer = byte_tokenizer(template=TEXT_TEMPLATES['tulu'], bos_token='<|endoftext|>', eos_token='<|im_end|>')
    model = load_config(files / 'model')
    export(transformer.init_params(jax.random.key(0), model), model, tokenizer, tmp_path / 'model')
    config = config_of(files)
    config.model.source = str(tmp_path / 'model')
    with pytest.raises(ConfigError, match=r"config\.arms\.fine_tuned: no model can speak under the user's header"):
        experiment.run(config, tmp_path / 'run')
    with config.unlocked():
        del config.arms['fine_tuned']
    assert experiment.scene_of(experiment.settings_of(config), tmp_path / 'run').check() is None


@pytest.mark.long
def test_a_killed_job_leaves_the_shared_stages_to_the_other(files, tmp_path):
    """Two jobs of the command line on one workdir; one is killed with a stage in hand, the other ends the run."""
    command = [
        *(sys.executable, '-m', 'simrl.main', '--config=configs/smollm2.py:smoke', f'--workdir={tmp_path}/run'),
        *(f'--config.model.source={files}/model', f'--config.data.folder={files}', '--config.workers=1'),
        *(f'--config.{side}.batch.lengths=(128,)' for side in SFT_SIDES),
        *('--config.rl.row_buckets=(256,)', '--config.conversation.limits.prompt_tokens=96'),
        '--config.conversation.role_play.instructions=Play. End with {signal}. {opening}',
        *('--config.evaluation.people=6', '--config.evaluation.matrix=4', '--config.evaluation.batch_size=6'),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        started = tmp_path / 'run' / 'sft' / 'fine_tuned' / 'stage.json'
        deadline = time.monotonic() + 120
        while not started.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert started.exists()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as second:
            time.sleep(5)
            os.kill(first.pid, signal.SIGKILL)
            printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed[-3000:]
    assert (tmp_path / 'run' / 'report.html').exists()


SFT_SIDES = ('user_sft.sft', 'reward_model.preference', 'held_out_reward_model.preference')
