"""Every config file fills in its dataclasses, and every field is read somewhere: none is accepted and ignored."""

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from simrl.conversations.chat import chat_from_huggingface
from simrl.conversations.views import natural_prompt, swapped_prompt
from simrl.experiments import experiment
from simrl.models.files.load import load_model
from simrl.run import stages
from simrl.run.config import ConfigError, from_config_dict, to_dict
from tests.experiments.reads import dataclasses_in, fields_read

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {
    'smollm2': ('', 'cpu', 'smoke'),
    'sft_user': ('', 'cpu', 'smoke'),
    'reward_model': ('', 'cpu', 'smoke'),
    'rl': ('', 'cpu', 'smoke'),
    'quickstart': ('', 'ppo', 'grpo', 'smoke'),
    'concierge': ('', 'smoke'),
}
EXPLICIT = ('smollm2', 'sft_user', 'reward_model', 'rl', 'quickstart', 'concierge')  # those that write out every field


def parsed(name: str, arg: str, *overrides: str) -> ConfigDict:
    """The config that main would get from the command line."""
    values = flags.FlagValues()
    command = ['simrl', f'--config={ROOT}/configs/{name}.py:{arg}', *overrides]
    config_flags.DEFINE_config_file('config', None, '', flag_values=values, lock_config=True, sys_argv=command)
    values(command)
    return values['config'].value


def settings_of(config: ConfigDict) -> Any:
    fields = dict(config)
    job = fields.pop('job')
    return from_config_dict(experiment.JOBS[job].settings, fields, 'config')


@pytest.mark.parametrize(('name', 'arg'), [(name, arg) for name, args in CONFIGS.items() for arg in args])
def test_fills_in_its_dataclass(name, arg):
    assert to_dict(settings_of(parsed(name, arg)))


def test_every_config_file_is_tested():
    assert {path.stem for path in (ROOT / 'configs').glob('*.py')} - {'parts'} == set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_an_unknown_argument_is_named(name):
    with pytest.raises(flags.IllegalFlagValueError, match=r"unknown (size|argument) 'huge'.*'smoke'"):
        parsed(name, 'huge')


def leaves(hint: Any, config: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, type and value of everything in a config that is no part of parts; no field may be left out."""
    inside = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
    if not inside:
        yield path, hint, config
        return
    if typing.get_origin(hint) is dict:
        for key in config:
            yield from leaves(inside[0], config[key], f'{path}.{key}')
        return
    hints = typing.get_type_hints(inside[0])
    assert set(config) - {'job'} == set(hints), f'{path}: expected all fields of {inside[0].__name__}'
    for field, its_hint in hints.items():
        yield from leaves(its_hint, config[field], f'{path}.{field}')


def another(hint: Any, value: Any) -> tuple[str, Any]:
    """Another value of a field, as it is written on the command line and as it is to arrive."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return another(parts[0], value)
    if typing.get_origin(hint) is Literal:
        option = next((part for part in parts if part != value), value)
        return option, option
    if typing.get_origin(hint) is tuple:
        items = {int: (3, 50), str: ('some', 'words')}[parts[0]]
        return repr(items), items
    simple: Mapping[type, Any] = {int: 17, float: 0.0625, bool: not value, str: 'word', pathlib.Path: 'some/place'}
    return str(simple[hint]), simple[hint]


@pytest.mark.parametrize('name', EXPLICIT)
@pytest.mark.parametrize('arg', ['', 'smoke'])
def test_every_field_is_there_and_can_be_set_on_the_command_line(name, arg):
    config = parsed(name, arg)
    found = list(leaves(experiment.JOBS[config.job].settings, config, 'config'))
    assert len(found) > 30
    wanted = {path: (hint, *another(hint, value)) for path, hint, value in found}
    changed = parsed(name, arg, *(f'--{path}={text}' for path, (_, text, _) in wanted.items()))
    for path, _, value in leaves(experiment.JOBS[config.job].settings, changed, 'config'):
        hint, _, expected = wanted.pop(path)
        assert (value, type(value)) == (expected, type(expected)), path
        one = dataclasses.make_dataclass('One', [('field', hint)])
        assert from_config_dict(one, {'field': value}, 'config')  # it is of the type that the dataclass wants
    assert not wanted


def dataclasses_below(cls: type) -> set[type]:
    """A dataclass and all that its fields are made of."""
    found: set[type] = set()
    new = {cls}
    while new:
        found |= new
        hints = [hint for kind in new for hint in typing.get_type_hints(kind).values()]
        new = {kind for hint in hints for kind in dataclasses_in(hint)} - found
    return found


def test_every_field_is_read():
    """A field that is only checked in its own dataclass, or never, would be a setting without effect."""
    modules = [module for name, module in sys.modules.items() if name.startswith('simrl.')]
    known = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    sources = [path.read_text() for path in sorted((ROOT / 'simrl').rglob('*.py'))]
    read = fields_read(sources, {kind for kind in known if dataclasses_in(kind)})
    for cls in set().union(*(dataclasses_below(job.settings) for job in experiment.JOBS.values())):
        unread = [field.name for field in dataclasses.fields(cls) if (cls, field.name) not in read]
        assert not unread, cls


@dataclasses.dataclass(frozen=True)
class Inner:
    seed: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    several: dict[str, Inner]
    seed: int

    def __post_init__(self) -> None:
        assert self.seed


READS = {
    'a parameter': ('def f(x: Inner):\n return x.seed', {'Inner.seed'}),
    'nothing known': ('def f(x):\n return x.seed', set()),
    'assignment': (
        "def f(x: 'Outer | None'):\n y, z = x.inner, 3\n return lambda: y.rate + z.seed",
        {'Outer.inner', 'Inner.rate'},
    ),
    'a loop': (
        'def f(x: Outer):\n for name, one in x.several.items():\n  yield one.seed',
        {'Outer.several', 'Inner.seed'},
    ),
    'a changed copy': (
        'def f(x: Outer):\n x = replace(x, seed=1)\n return [i.rate for i in x.several.values()]',
        {'Outer.several', 'Inner.rate'},
    ),
    'kept by a class': (
        'class C:\n def __init__(self, x: Inner):\n  self.x = x\n def f(self):\n  return self.x.rate',
        {'Inner.rate'},
    ),
    'its own methods': (
        'class Outer:\n def __post_init__(self):\n  self.seed\n def f(self):\n  return self.inner',
        {'Outer.inner'},
    ),
    'a result': ('def make() -> Inner: ...\ndef f():\n return make().rate', {'Inner.rate'}),
}


@pytest.mark.parametrize('case', READS)
def test_reads_go_by_type_not_by_name(case):
    source, read = READS[case]
    assert {f'{cls.__name__}.{field}' for cls, field in fields_read([source], {Inner, Outer})} == read


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
    'no such weights': (
        {'user_sft': {'sft': {'lora': {'rank': 8, 'alpha': 16.0, 'targets': ('q_proj',)}}}},
        r"config\.user_sft\.sft\.lora\.targets: expected at least one of query, key, .* found 'q_proj'",
    ),
    'half of LoRA': ({'rl': {'lora': {'rank': 8}}}, r'config\.rl\.lora\.alpha: expected float, found None'),
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


@pytest.mark.skipif('SIMRL_SMOLLM2' not in os.environ, reason='SIMRL_SMOLLM2 is not set')
def test_rows_of_the_cpu_size_fit_into_its_longest_bucket():
    """The longest opening that the role-play prompt lets in, and every message as long as its budget."""
    settings = settings_of(parsed('smollm2', 'cpu'))
    chat = chat_from_huggingface(load_model(os.environ['SIMRL_SMOLLM2'])[2])
    limits, role_play = settings.talking.limits, settings.talking.role_play

    def role_play_tokens(opening: str) -> int:
        text = role_play.instructions.replace('{signal}', role_play.signal).replace('{opening}', opening)
        return len(swapped_prompt(chat, text))

    opening = 'dog'
    while role_play_tokens(opening + ' dog') <= limits.prompt_tokens:
        opening += ' dog'
    reply = len(chat.header('assistant')) + limits.assistant_tokens + 1
    answer = len(chat.header('user')) + limits.user_tokens + 1
    longest = len(natural_prompt(chat, opening)) + limits.turns * reply + (limits.turns - 1) * answer
    assert 192 < longest <= settings.rl.row_buckets[-1] == 256


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'simrl.main', *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_main_refuses_what_it_does_not_know(tmp_path):
    done = run_main('--config=configs/smollm2.py:smoke', f'--workdir={tmp_path}/run', '--config.rl.stepz=3')
    assert done.returncode
    assert 'Did you mean "steps" instead of "stepz"' in done.stderr
    assert not (tmp_path / 'run').exists()


def test_main_says_in_one_line_what_a_person_can_mend(tmp_path):
    source = f'--config.model.source={tmp_path}/none.gguf'
    done = run_main('--config=configs/smollm2.py:smoke', f'--workdir={tmp_path}/run', source)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f'error: {tmp_path}/none.gguf: expected a GGUF file, found none'
    assert not (tmp_path / 'run').exists()


def test_main_refuses_another_configs_workdir(tmp_path):
    settings = settings_of(parsed('quickstart', 'smoke'))
    stages.open_workdir(tmp_path / 'run', {'job': 'known_answer', **to_dict(settings)})
    changed = '--config.rl.prompts_per_step=16'
    done = run_main('--config=configs/quickstart.py:smoke', f'--workdir={tmp_path}/run', changed)
    assert done.returncode == 1
    assert 'rl.prompts_per_step: 8 -> 16' in done.stderr.splitlines()[-1]
