"""Every config file fills in its dataclasses, and every field is read somewhere: none is accepted and ignored."""

import ast
import dataclasses
import importlib
import pathlib
import subprocess
import sys
import typing

import pytest

from simrl import experiment
from simrl.config import ConfigError, from_config_dict, to_dict

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ('smollm2', 'sft_user', 'reward_model', 'rl')


def settings_of(name: str, arg: str):
    config = importlib.import_module(f'configs.{name}').get_config(arg)
    fields = dict(config)
    job = fields.pop('job')
    return from_config_dict(experiment.JOBS[job].settings, fields, 'config')


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('arg', ['', 'cpu', 'smoke'])
def test_fills_in_its_dataclass(name, arg):
    settings = settings_of(name, arg)
    assert to_dict(settings)


def test_every_config_file_is_tested():
    assert {path.stem for path in (ROOT / 'configs').glob('*.py')} == set(CONFIGS)


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match=r"unknown size 'huge'.*'cpu'"):
        settings_of('smollm2', 'huge')


def dataclasses_below(cls: type) -> set[type]:
    found: set[type] = set()

    def visit(kind) -> None:
        for part in typing.get_args(kind):
            visit(part)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind not in found:
            found.add(kind)
            for hint in typing.get_type_hints(kind).values():
                visit(hint)

    visit(cls)
    return found


def test_every_field_is_read():
    """A field that is only checked in its own dataclass, or never, would be a setting without effect."""
    classes = set().union(*(dataclasses_below(job.settings) for job in experiment.JOBS.values()))
    read: set[str] = set()
    for path in (ROOT / 'simrl').rglob('*.py'):
        tree = ast.parse(path.read_text())
        checks = {
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == '__post_init__'
            for node in ast.walk(function)
        }
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in checks
        }
    unread = sorted(
        f'{cls.__name__}.{field.name}' for cls in classes for field in dataclasses.fields(cls) if field.name not in read
    )
    assert not unread


BAD = {
    'unknown field': ({'rl': {'algorithm': {'clip': 0.1}}}, r'config\.rl\.algorithm\.clip: unknown field.*clip_low'),
    'wrong type': ({'rl': {'steps': 'many'}}, r"config\.rl\.steps: expected int, found 'many'"),
    'unknown arm': ({'arms': ('oracle',)}, r'arms: unknown simulator .oracle., expected one of role_play, fine_tuned'),
    'no arms': ({'arms': ()}, 'arms: expected different values, at least one'),
    'clashing seeds': ({'seeds': (1, 1)}, 'seeds: expected different values'),
    'minibatch not dividing': ({'rl': {'algorithm': {'minibatches': 3}}}, 'minibatches.*expected to divide the 8 rows'),
    'one half for both': (
        {'judge': {'half': 'first'}},
        r'judge\.half: expected the half that reward_model\.half=first is not',
    ),
    'no turns': ({'talking': {'limits': {'turns': 0}}}, r'turns: expected at least 1, found 0'),
    'no signal': ({'talking': {'role_play': {'signal': ' '}}}, 'signal: expected some text'),
    'heads not divisible': (
        {'model': {'random': {'num_heads': 3, 'model_dim': 48}}},
        'num_heads: expected a multiple of num_kv_heads=2, found 3',
    ),
}


def merged(config: dict, change: dict) -> dict:
    return config | {
        key: merged(config[key], value) if isinstance(value, dict) and key in config else value
        for key, value in change.items()
    }


@pytest.mark.parametrize('name', BAD)
def test_bad_config_is_one_clear_error(name):
    change, message = BAD[name]
    plain = importlib.import_module('configs.smollm2').get_config('smoke').to_dict()
    plain.pop('job')

    def build() -> None:
        settings = from_config_dict(experiment.Experiment, merged(plain, change), 'config')
        settings.model.random.transformer_config(vocab_size=300)

    with pytest.raises((ConfigError, ValueError), match=message):
        build()


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'simrl.main', *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_main_refuses_what_it_does_not_know(tmp_path):
    done = run_main('--config=configs/smollm2.py:smoke', f'--workdir={tmp_path}/run', '--config.rl.stepz=3')
    assert done.returncode
    assert 'Did you mean "steps" instead of "stepz"' in done.stderr
    assert not (tmp_path / 'run').exists()


def test_main_refuses_another_configs_workdir(tmp_path):
    """The check comes before anything is loaded: the model of these runs does not exist."""
    workdir = f'--workdir={tmp_path}/run'
    common = ('--config=configs/smollm2.py:smoke', workdir, f'--config.model.source={tmp_path}/none.gguf')
    first = run_main(*common)
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1] == f'error: {tmp_path}/none.gguf: expected a GGUF file, found none'
    second = run_main(*common, '--config.rl.prompts_per_step=8')
    assert second.returncode == 1
    assert 'rl.prompts_per_step: 4 -> 8' in second.stderr.splitlines()[-1]
