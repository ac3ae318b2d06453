"""The whole line on a tiny model and made-up people: it runs, goes on, grows, and refuses what does not fit."""

import dataclasses
import importlib
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

from simrl.conversations.chat import chat_from_huggingface
from simrl.conversations.records import Conversation, Message, Preference, write_conversations, write_preferences
from simrl.experiments import experiment, jobs, sources
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.models.files.huggingface import load_config, load_params
from simrl.models.transformer import TransformerConfig
from simrl.run import stage_files
from simrl.run.config import ConfigError, from_config_dict
from simrl.run.stages import LockedError, Stage, WorkdirError
from simrl.training import loop
from tests.run import worker_job
from tests.tiny import byte_tokenizer
from tools import export as export_tool

ROOT = pathlib.Path(__file__).parents[2]
SEED_STAGES = [f'rl/{arm}/seed-{seed}' for seed in (0, 1) for arm in ('role_play', 'fine_tuned')]


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and people of all splits."""
    folder = tmp_path_factory.mktemp('files')
    tokenizer = byte_tokenizer()
    config = TransformerConfig(
        vocab_size=len(tokenizer),
        model_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        max_positions=512,
        tied_embedding=True,
    )
    export(transformer.init_params(jax.random.key(0), config), config, tokenizer, folder / 'model')
    splits = ['train'] * 12 + ['test'] * 6
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


def config_of(files: pathlib.Path, name: str = 'smollm2'):
    config = importlib.import_module(f'configs.{name}').get_config('smoke')
    with config.unlocked(), config.ignore_type():
        config.model.source = str(files / 'model')
        config.model.random = None
        config.data.folder = str(files)
        if 'talking' in config:
            config.talking.role_play.instructions = 'Play. End with {signal}. {opening}'
            config.talking.limits.prompt_tokens = 96
            config.talking.limits.user_tokens = config.talking.limits.assistant_tokens = 8
        for batch in (config.get('user_sft', {}).get('sft'), config.get('reward_model', {}).get('preference')):
            if batch:
                batch.batch.lengths = (128,)
        if 'judge' in config:
            config.judge.preference.batch.lengths = (128,)
        if 'rl' in config:
            config.rl.row_buckets = (256,)
        for replies in ('scale', 'comparison'):
            if replies in config:
                config[replies].openings = config[replies].batch_size = 6
    return config


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    experiment.run(config_of(files), workdir)
    return workdir


def contents(workdir: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """When each result was written, and what it says."""
    return {str(p.relative_to(workdir)): (p.stat().st_mtime_ns, p.read_bytes()) for p in workdir.rglob('result.json')}


def test_leaves_a_result_of_every_stage_and_a_comparison(finished):
    names = {'sft/user', 'reward_model/train', 'reward_model/judge', 'reward_model/scale', 'evaluate/initial'}
    names |= {name for arm in SEED_STAGES[:2] for name in (arm, f'evaluate/{arm}')}
    assert {name.removesuffix('/result.json') for name in contents(finished)} == names
    comparison = json.loads((finished / 'results' / 'comparison.json').read_text())
    assert set(comparison['assistants']) == {'initial', *SEED_STAGES[:2]}
    for name, row in comparison['assistants'].items():
        if name != 'initial':
            assert 0 <= row['win_rate']['low'] <= row['win_rate']['mean'] <= row['win_rate']['high'] <= 1
    said = (finished / SEED_STAGES[0] / 'conversations' / 'rl.jsonl').read_text().splitlines()
    assert {'messages', 'end_reason', 'reward', 'parts', 'seed', 'example', 'step'} <= set(json.loads(said[0]))


def test_the_same_command_runs_nothing_again_and_a_seed_runs_only_what_is_new(files, finished):
    before = contents(finished)
    experiment.run(config_of(files), finished)
    assert contents(finished) == before
    config = config_of(files)
    config.seeds = (0, 1)
    experiment.run(config, finished)
    after = contents(finished)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f'{p}{s}/result.json' for s in SEED_STAGES[2:] for p in ('', 'evaluate/')}


def test_a_run_again_gives_the_same_numbers(files, finished, tmp_path):
    experiment.run(config_of(files), tmp_path / 'again')
    for name in ('sft/user', 'reward_model/train', 'rl/fine_tuned/seed-0', 'evaluate/rl/fine_tuned/seed-0'):
        assert (tmp_path / 'again' / name / 'result.json').read_bytes() == (
            finished / name / 'result.json'
        ).read_bytes()


def test_changed_parameters_of_a_stage_are_named(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    file = next((tmp_path / 'run' / 'reward_model' / 'judge' / 'params').rglob('manifest.ocdbt'))
    file.write_bytes(file.read_bytes() + b' ')
    name = file.relative_to(tmp_path / 'run' / 'reward_model' / 'judge')
    with pytest.raises(WorkdirError, match=f'found that {name} was changed; --rerun=reward_model/judge'):
        experiment.run(config_of(files), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'reward_model' / 'judge' / loop.CHECKPOINTS_FOLDER).exists()
    assert stage_files.SCRATCH_FOLDER == loop.CHECKPOINTS_FOLDER  # what a stage drops is what the loop goes on from


def test_a_local_model_is_known_by_its_contents_wherever_it_lies(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    shutil.copytree(files / 'model', tmp_path / 'moved')
    before = contents(tmp_path / 'run')
    config = config_of(files)
    config.model.source = str(tmp_path / 'moved')
    experiment.run(config, tmp_path / 'run')
    assert contents(tmp_path / 'run') == before
    export_tool.main([f'--stage={tmp_path}/run/sft/user', f'--output={tmp_path}/simulator'])
    (tmp_path / 'moved' / 'generation_config.json').write_text('{"top_p": 0.5}')
    with pytest.raises(WorkdirError, match='input model'):
        experiment.run(config, tmp_path / 'run')


def test_workers_would_share_an_accelerator(files, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1})
    jobs_with_workers = {name: dataclasses.replace(job, workers=lambda _: 2) for name, job in experiment.JOBS.items()}
    monkeypatch.setattr(experiment, 'JOBS', jobs_with_workers)
    with pytest.raises(ConfigError, match=r'config\.workers: expected 1 on gpu, .* found 2'):
        experiment.run(config_of(files), tmp_path / 'run')
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


@dataclasses.dataclass(frozen=True)
class Steps:
    """Settings of a job of two trivial stages, the second of which reads the first."""

    steps: int


def steps_tasks(settings: Steps, workdir: pathlib.Path) -> list[Stage]:
    def work(folder: pathlib.Path) -> None:
        (folder / 'result.json').write_text(str(settings.steps))

    own = {'steps': settings.steps}
    return [Stage('first', own, {}, work), Stage('second', own, {'first': workdir / 'first'}, work)]


@pytest.fixture
def run_steps(tmp_path, monkeypatch):
    """(steps, rerun) -> that run, once one of a single step is done."""
    monkeypatch.setattr(experiment, 'JOBS', {'steps': experiment.Job(Steps, steps_tasks)})

    def run(steps: int, *rerun: str) -> None:
        experiment.run(ConfigDict({'job': 'steps', 'steps': steps}), tmp_path, rerun=rerun)

    run(1)
    return run


def json_files(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in workdir.rglob('*.json')}


@pytest.mark.parametrize('held', ['first', 'second'])
def test_a_run_again_that_is_refused_changes_nothing(run_steps, tmp_path, held):
    before = json_files(tmp_path)
    with stage_files.lock(tmp_path / held, shared=True), pytest.raises(LockedError, match=f'{held}: another process'):
        run_steps(2, 'first')
    assert json_files(tmp_path) == before
    run_steps(1)
    run_steps(2, 'first')
    assert json.loads((tmp_path / 'second' / 'result.json').read_text()) == 2


def test_a_run_again_of_something_else_changes_nothing(run_steps, tmp_path):
    for path in (tmp_path / 'second').iterdir():
        path.unlink()
    (tmp_path / 'second' / 'thesis.tex').write_text('years of work')
    before = json_files(tmp_path)
    with pytest.raises(WorkdirError, match=r'expected an empty folder or a stage .*found thesis\.tex'):
        run_steps(2, 'first')
    assert json_files(tmp_path) == before


@pytest.mark.parametrize('emptied', [0, 1])
def test_a_run_again_that_is_killed_goes_on_by_the_same_command(run_steps, tmp_path, monkeypatch, emptied):
    empty, left = stage_files.empty, emptied

    def killed(folder: pathlib.Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        empty(folder)

    with monkeypatch.context() as patch:
        patch.setattr(stage_files, 'empty', killed)
        with pytest.raises(KeyboardInterrupt):
            run_steps(2, 'first')
    run_steps(2, 'first')
    run_steps(2)
    assert json.loads((tmp_path / 'second' / 'result.json').read_text()) == 2


def test_results_are_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    holders = []

    def finish(_: worker_job.Settings, workdir: pathlib.Path) -> None:
        with stage_files.lock(workdir / 'results') as holder:
            holders.append(holder)

    monkeypatch.setattr(experiment, 'JOBS', {'trivial': experiment.Job(worker_job.Settings, worker_job.build, finish)})
    config = ConfigDict({'job': 'trivial', 'log': str(tmp_path / 'log'), 'seconds': 0.0})
    experiment.run(config, tmp_path / 'run')
    assert len(holders) == 1
    assert holders[0].startswith(f'process {os.getpid()} on')
    with stage_files.lock(tmp_path / 'run' / 'results') as holder:
        assert holder is None


def test_the_reward_model_and_the_judge_share_no_opening(files):
    data = sources.read(from_config_dict(sources.DataSettings, {'folder': str(files)}, 'data'))
    halves = [{p.opening for p in data.preferences_of('train') if jobs.half_of(p) == half} for half in jobs.HALVES]
    assert all(halves)
    assert not halves[0] & halves[1]


def test_a_trained_stage_exports_with_the_terminal_token(finished, tmp_path):
    export_tool.main([f'--stage={finished}/sft/user', f'--output={tmp_path}/simulator'])
    config = load_config(tmp_path / 'simulator')
    assert config.vocab_size == chat_from_huggingface(byte_tokenizer()).size
    assert load_params(tmp_path / 'simulator', config)


@pytest.mark.parametrize('trained', ['assistant', 'user'])
def test_rl_alone_trains_either_side(files, finished, tmp_path, trained):
    config = config_of(files, 'rl')
    config.rl.trained = trained
    config.talking.role_play.sampling.top_p = 1.0
    config.reward_stage = str(finished / 'reward_model' / 'train')
    experiment.run(config, tmp_path / 'run')
    before = (finished / 'rl' / 'role_play' / 'seed-0' / 'metrics.jsonl').read_text()
    after = (tmp_path / 'run' / 'rl' / 'role_play' / 'seed-0' / 'metrics.jsonl').read_text()
    assert len(after.splitlines()) == len(before.splitlines()) == config.rl.steps


def test_a_simulator_and_an_assistant_are_trained_by_adapters(files, finished, tmp_path):
    """Each stage leaves a whole model, of which only the adapted weights are not those that it started from."""

    def adapted(name: str, part: str) -> ConfigDict:
        config = config_of(files, name)
        settings = config[part].sft if part == 'user_sft' else config.rl
        settings.lora.update({'rank': 2, 'alpha': 8.0, 'targets': ('value', 'up')})
        settings.optimizer.learning_rate = 1e-2
        return config

    def exported(stage: str) -> dict:
        output = tmp_path / 'exported' / stage
        export_tool.main([f'--stage={tmp_path}/{stage}', f'--output={output}'])
        return load_params(output, load_config(output))['decoder']

    experiment.run(adapted('sft_user', 'user_sft'), tmp_path / 'sft')
    config = adapted('rl', 'rl')
    config.simulator, config.simulator_stage = 'fine_tuned', str(tmp_path / 'sft' / 'sft' / 'user')
    config.reward_stage = str(finished / 'reward_model' / 'train')
    experiment.run(config, tmp_path / 'rl')
    settings = from_config_dict(sources.ModelSettings, config.model.to_dict(), 'model')
    start = sources.load(settings).params['decoder']
    for stage in ('sft/sft/user', 'rl/rl/fine_tuned/seed-0'):
        decoder = exported(stage)
        layers = decoder.pop('layers')
        changed = {name for name, weights in layers.items() if not np.array_equal(weights, start['layers'][name])}
        assert changed == {'value', 'up'}
        assert all(np.array_equal(x, start[name][: len(x)]) for name, x in decoder.items())


def edit(path: str, value):
    def change(config) -> None:
        *parents, field = path.split('.')
        for parent in parents:
            config = config[parent]
        with config.unlocked(), config.ignore_type():
            config[field] = value

    return change


LATE = {
    'budgets over positions': (edit('talking.limits.turns', 40), 'max_positions=512'),
    'filters in training': (edit('talking.assistant', {'temperature': 1.0, 'top_p': 0.9}), 'temperature alone'),
    'more prompts than openings': (
        edit('rl.prompts_per_step', 100),
        'prompts_per_step: expected at most 12, found 100',
    ),
    'warm-up without end': (edit('rl.optimizer.warmup_steps', 50), r'config\.rl\.optimizer\.warmup_steps'),
    'warm-up of fine-tuning': (
        edit('user_sft.sft.optimizer.warmup_steps', 50),
        r'config\.user_sft\.sft\.optimizer\.warmup_steps',
    ),
    'pairs over positions': (
        edit('judge.preference.batch.lengths', (128, 600)),
        r'config\.judge\.preference\.batch\.lengths: expected at most .* found 600',
    ),
    'a scale of one reply': (edit('scale.openings', 1), r'config\.scale\.openings: expected at least 2, found 1'),
    'batches of no reply': (edit('comparison.batch_size', 0), r'config\.comparison\.batch_size: expected at least 1'),
    'no opening fits': (edit('talking.limits.prompt_tokens', 3), 'found none of 12'),
    'no data': (edit('data.folder', 'nowhere'), 'nowhere'),
}


@pytest.mark.parametrize('name', LATE)
def test_what_cannot_be_is_said_before_anything_trains(files, tmp_path, name):
    change, message = LATE[name]
    config = config_of(files)
    change(config)
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        experiment.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'sft').exists()


def test_a_fine_tuned_simulator_needs_its_stage(files, tmp_path):
    config = config_of(files, 'rl')
    config.simulator = 'fine_tuned'
    with pytest.raises(ConfigError, match=r'simulator_stage: expected the folder of a stage'):
        experiment.run(config, tmp_path / 'run')


def test_a_second_process_in_one_workdir_is_refused(files, tmp_path):
    """Both by the command line; the first is stopped while it holds a stage's lock."""
    command = [
        *(sys.executable, '-m', 'simrl.main', '--config=configs/sft_user.py:smoke', f'--workdir={tmp_path}/run'),
        *(f'--config.model.source={files}/model', f'--config.data.folder={files}'),
        '--config.user_sft.sft.steps=100000',
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        lock = tmp_path / 'run' / 'sft' / 'user' / 'stage.json'
        deadline = time.monotonic() + 120
        while not lock.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(first.pid, signal.SIGSTOP)
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        os.kill(first.pid, signal.SIGKILL)
    assert second.returncode == 1
    assert 'another process works on this stage' in second.stderr.splitlines()[-1]
