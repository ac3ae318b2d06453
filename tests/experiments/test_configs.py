"""Every config file is the config of its settings, and every field is read somewhere: none is accepted and ignored."""

import ast
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import typing
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from simrl import main
from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Conversation, Message, write_conversations
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import natural_prompt, swapped_prompt
from simrl.experiments import experiment
from simrl.experiments.experiment import SCENES, settings_of
from simrl.experiments.pretrained import PretrainedScene
from simrl.experiments.sources import ModelSettings
from simrl.models.files.huggingface_config import config_to_json
from simrl.models.files.load import load_model
from simrl.models.lora import LoRASettings
from simrl.run import directory
from simrl.run.config import ConfigError, from_config_dict, to_config_dict, to_dict
from simrl.run.settings_help import settings_help
from simrl.serving.settings import ServeSettings
from simrl.study.settings import StudySettings
from tests.tiny import family_tokenizer, tiny_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {
    'smollm2': ('', 'cpu', 'smoke'),
    'quickstart': ('', 'ppo', 'grpo', 'smoke'),
    'concierge': ('', 'smoke'),
    'paper': ('', 'rpuser1,7b', 'sftuser-14b,llama'),
}


def parsed(name: str, arg: str, *overrides: str) -> ConfigDict:
    """The config that main would get from the command line."""
    values = flags.FlagValues()
    command = ['simrl', f'--config={ROOT}/configs/{name}.py:{arg}', *overrides]
    config_flags.DEFINE_config_file('config', None, '', flag_values=values, lock_config=True, sys_argv=command)
    values(command)
    return values['config'].value


def types_in(config: ConfigDict) -> dict[str, Any]:
    """The types of its fields, which is what flags are parsed by."""
    return {
        key: types_in(config[key]) if isinstance(config[key], ConfigDict) else config.get_type(key) for key in config
    }


@pytest.mark.parametrize(('name', 'arg'), [(name, arg) for name, args in CONFIGS.items() for arg in args])
def test_a_config_is_that_of_its_settings(name, arg):
    config = parsed(name, arg)
    settings = settings_of(config)
    written = to_config_dict(settings)
    assert types_in(config) == types_in(written)
    assert list(config.arms) == list(settings.arms)  # in the order of the file
    assert from_config_dict(type(settings), written, 'config') == settings


def test_flags_set_what_is_none():
    lora = settings_of(parsed('smollm2', 'smoke', '--config.rl.lora.rank=8', '--config.rl.lora.alpha=16.0')).rl.lora
    assert lora == LoRASettings(rank=8, alpha=16.0)


def names_in(config, name='config'):
    """The dotted names of all settings of a config, of those that have names of their own once."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from names_in(value, f'{name}.{key}')
        else:
            yield f'{name}.{key}'


@pytest.mark.parametrize('name', ['concierge', 'smollm2'])
def test_help_lists_all_settings_with_what_is_said_of_them(name):
    config = parsed(name, '')
    said = settings_help(main.settings_type(config), config)
    found = re.findall(r'^  --(config\S*?)(?:=|  \()', said, re.MULTILINE)
    assert len(found) == len(set(found))
    named = tuple({x.partition('.NAME')[0] for x in found if '.NAME' in x})
    assert {x for x in found if not x.startswith(named)} == {x for x in names_in(config) if not x.startswith(named)}
    assert re.search(r'^  --config\.compute\.mesh\.model=1  \(int\) devices that heads, MLP and', said, re.MULTILINE)
    assert re.search(r'rows_in_flight\S*  \(int or none\) conversations of an RL step sampled at once', said)


def test_help_is_of_the_config_that_was_given(monkeypatch, capsys):
    values = flags.FlagValues()
    command = ['study', '--config.task.exchanges=7', '--help']
    config_flags.DEFINE_config_file(
        'config', str(ROOT / 'configs' / 'study.py'), '', flag_values=values, sys_argv=command
    )
    monkeypatch.setattr(flags, 'FLAGS', values)
    with pytest.raises(SystemExit) as end:
        main.parse_flags(command, lambda _: StudySettings)
    assert not end.value.code
    said = capsys.readouterr().out
    assert '\n  --config.task.exchanges=7  (int) min exchanges before the final text\n' in said
    assert '\nconfig.models: by name (fine_tuned, role_play)\n  --config.models.NAME.source=  (str) A name' in said


def test_a_field_is_set_to_none_by_a_flag(monkeypatch):
    values = flags.FlagValues()
    command = ['main', *(f'--config.{x}=None' for x in ('compute.mesh.data', 'compute.rows_in_flight', 'rl.steps'))]
    config_flags.DEFINE_config_file(
        'config', str(ROOT / 'configs' / 'quickstart.py'), '', flag_values=values, sys_argv=command
    )
    monkeypatch.setattr(flags, 'FLAGS', values)
    assert main.parse_flags(command) == ['main']
    assert values.config.compute.mesh.data is None
    with pytest.raises(ConfigError, match=r'^config\.rl\.steps: expected int, found None'):
        from_config_dict(main.settings_type(values.config), values.config, 'config')
    with pytest.raises(SystemExit, match=r'error: --config: no field .*rows.* to set'):
        main.parse_flags(['main', '--config.compute.rows=None'])


def test_every_config_file_is_tested():
    # Not experiments: `tests/serving/test_start.py`, `tests/study/test_start.py`, `tests/study/test_report.py`.
    others = {'serve', 'study', 'study_report'}
    assert {path.stem for path in (ROOT / 'configs').glob('*.py')} == set(CONFIGS) | others


def test_the_config_of_the_server_is_that_of_its_settings():
    config = parsed('serve', 'runs/a/initial')
    settings = from_config_dict(ServeSettings, config, 'config')
    assert settings == ServeSettings(models=('runs/a/initial',))
    assert types_in(config) == types_in(to_config_dict(settings))


@pytest.mark.parametrize('name', CONFIGS)
def test_an_unknown_argument_is_named(name):
    message = r"unknown (size|argument|arm) 'huge', expected .*(smoke|rpuser1)"
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        parsed(name, 'huge')


def dataclasses_in(hint: Any) -> set[type]:
    """The dataclasses that a type is made of, at any depth."""
    if dataclasses.is_dataclass(hint):
        return {hint}.union(*map(dataclasses_in, typing.get_type_hints(hint).values()))
    return set().union(*map(dataclasses_in, typing.get_args(hint)))


def names_read() -> set[str]:
    """The attributes that simrl reads, but for checks in `__post_init__`."""
    nodes = [node for path in (ROOT / 'simrl').rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))]
    checks = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == '__post_init__']
    in_checks = {id(node) for check in checks for node in ast.walk(check)}
    reads = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in reads if id(node) not in in_checks}


def test_every_field_is_read():
    """By its name alone, which another class's field may have too; that it has an effect is for other tests to show."""
    read = names_read()
    for cls in set().union(*(dataclasses_in(settings) for settings, _ in SCENES.values())):
        assert {field.name for field in dataclasses.fields(cls)} <= read, cls


BAD = {
    'unknown field': ({'rl': {'algorithm': {'clip': 0.1}}}, r'config\.rl\.algorithm\.clip: unknown field.*clip_low'),
    'wrong type': ({'rl': {'steps': 'many'}}, r"config\.rl\.steps: expected int, found 'many'"),
    'unknown simulator': (
        {'arms': {'a': {'simulator': 'oracle'}}},
        r"config\.arms\.a\.simulator: expected one of role_play, fine_tuned, mixture or 'module:function', found 'or",
    ),
    'a held-out simulator in a mixture': (
        {
            'arms': {'both': {'simulator': 'mixture', 'mixture': {'role_play': 1.0}}},
            'held_out_simulators': ('role_play',),
        },
        r"config\.held_out_simulators: expected .* trains against, found 'role_play', which the mixture 'both' has",
    ),
    'an arm without a simulator': ({'arms': {'a': {}}}, r'config\.arms\.a\.simulator: missing'),
    'clashing seeds': ({'seeds': (1, 1)}, 'seeds: expected different values'),
    'minibatch not dividing': ({'rl': {'algorithm': {'minibatches': 3}}}, 'minibatches.*expected to divide the 8 rows'),
    'one half for both': (
        {'held_out_reward_model': {'half': 'first'}},
        r'held_out_reward_model\.half: expected the half that reward_model\.half=first is not',
    ),
    'no turns': ({'conversation': {'limits': {'turns': 0}}}, r'turns: expected at least 1, found 0'),
    'no such weights': (
        {'user_sft': {'sft': {'lora': {'rank': 8, 'alpha': 16.0, 'targets': ('q_proj',)}}}},
        r"config\.user_sft\.sft\.lora\.targets: expected at least one of query, key, .* found 'q_proj'",
    ),
    'half of LoRA': ({'rl': {'lora': {'rank': 8}}}, r'config\.rl\.lora\.alpha: expected float, found None'),
    'no signal': ({'conversation': {'role_play': {'signal': ' '}}}, 'signal: expected some text'),
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

    def build() -> None:
        settings = settings_of(merged(plain, change))
        settings.model.random.transformer_config(vocab_size=300)

    with pytest.raises((ConfigError, ValueError), match=message):
        build()


@pytest.mark.skipif('SIMRL_SMOLLM2' not in os.environ, reason='SIMRL_SMOLLM2 is not set')
def test_rows_of_the_cpu_size_fit_into_its_longest_bucket():
    """The longest opening that the role-play prompt lets in, and every message as long as its budget."""
    settings = settings_of(parsed('smollm2', 'cpu'))
    chat = chat_from_huggingface(load_model(os.environ['SIMRL_SMOLLM2'])[2])
    limits, role_play = settings.conversation.limits, settings.conversation.role_play

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


FAMILIES = {  # of the models of paper.py, by how their names begin
    'Qwen/Qwen2.5-': 'qwen2_5',
    'Qwen/Qwen3-': 'qwen3',
    'jjssuh/sftuser-base-Qwen2.5-': 'qwen2_5',
    'jjssuh/sftuser2-base-Qwen2.5-': 'qwen2_5',
    'meta-llama/Llama-3.2-': 'llama3_2',
}


def without_weights(settings: ModelSettings, folder: pathlib.Path) -> ModelSettings:
    """The settings of a model, read from a folder with its family's own chat template and special tokens."""
    (family,) = (family for start, family in FAMILIES.items() if settings.source.startswith(start))
    template = pathlib.Path(os.environ['SIMRL_DATA'], 'chat_templates', f'{family}.jinja').read_text()
    tokenizer = family_tokenizer(family, template)
    if 'sftuser' in settings.source:
        tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = tiny_config(len(tokenizer), max_positions=32768)
    (folder / 'config.json').write_text(json.dumps(config_to_json(config, len(tokenizer), 'float32')))
    return dataclasses.replace(settings, source=str(folder))


@pytest.mark.skipif('SIMRL_DATA' not in os.environ, reason='SIMRL_DATA is not set')
@pytest.mark.parametrize('assistant', importlib.import_module('configs.paper').ASSISTANTS)
def test_every_model_of_paper_opens_and_can_converse(tmp_path, assistant):
    """With the templates of its models and their settings; a token is a byte here, so prompts are longer."""
    settings = settings_of(parsed('paper', assistant))
    arms = {
        arm: dataclasses.replace(own, model=without_weights(own.model, tmp_path / arm))
        for arm, own in settings.arms.items()
    }
    said = (Message('user', 'A dish?'), Message('assistant', 'Risotto.'), Message('user', 'And another?'))
    people = [
        Conversation(split, 'test', split, said, intent='You want a recipe.') for split in ('train', 'dev', 'test')
    ]
    write_conversations(tmp_path / settings.data.conversations, people)
    limits = dataclasses.replace(settings.conversation.limits, prompt_tokens=8192)
    settings = dataclasses.replace(
        settings,
        model=without_weights(settings.model, tmp_path / 'assistant'),
        data=dataclasses.replace(settings.data, folder=tmp_path),
        conversation=dataclasses.replace(settings.conversation, limits=limits),
        arms=arms,
    )
    simulators = PretrainedScene(settings, tmp_path / 'run').simulators
    for arm in arms:
        simulators.check_people(arm)
        simulators.check(arm)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('--config.rl.step=3', """--config: no field 'step' to set; Did you mean "steps" instead of "step"?"""),
        ('--config.nothing=3', "--config: no field 'nothing' to set; names such as arms are added in a config file"),
        (
            '--config.seeds[0]=3',
            "--config: 0 is not a valid index for <class 'tuple'> (in: seeds[0]); set a",
        ),
        ('--config.rl.steps=1.5', "flag --config.rl.steps=1.5: invalid literal for int() with base 10: '1.5'"),
        ('--config.rl=3', "flag --config.rl=3: Failed to parse '3' as a ConfigDict"),
    ],
)
def test_a_slip_in_a_flag_is_one_line(override, message):
    with pytest.raises(Exception) as error:  # noqa: PT011  (of many kinds)
        parsed('quickstart', 'smoke', override)
    line = main.flag_error(error.value)
    assert line.startswith(message)
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(:', r'SyntaxError: .*\(config\.py, line 1\)'),
        ('def get_config(arg=None):\n    return {}["arms"]', r"KeyError: 'arms' \(.*config\.py:2\)"),
        ('def get_config(arg=None):\n    raise ValueError("two\\nlines")', r'ValueError: two lines \(.*config\.py:2\)'),
        ('import nothing_of_this_name', r"ModuleNotFoundError: No module named 'nothing_of_this_name' \(.*py:1\)"),
        ('def get_config(arg):\n    return {}', r"TypeError: get_config\(\) missing 1 required .* 'arg'"),
        (None, r"\[Errno 2\] No such file or directory: '.*config\.py'"),
    ],
)
def test_a_fault_of_a_config_file_is_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / 'config.py').write_text(text)
    values = flags.FlagValues()
    command = ['simrl', f'--config={tmp_path}/config.py']
    config_flags.DEFINE_config_file('config', None, '', flag_values=values, sys_argv=command)
    with pytest.raises(Exception) as error:  # noqa: PT011
        bool(values(command) and values['config'].value.anything)
    assert re.fullmatch(f'--config: {message}', main.flag_error(error.value))


@pytest.mark.parametrize('form', [['--config={}:x'], ['--config', '{}:x']])
def test_a_config_file_imports_those_beside_it_from_anywhere(tmp_path, monkeypatch, form):
    folder = tmp_path / f'my_configs_{len(form)}'
    folder.mkdir()
    (folder / 'base.py').write_text('def get_config(arg):\n    return {"arg": arg}')
    (folder / 'own.py').write_text(f'from {folder.name}.base import get_config')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.chdir('/')
    values, command = flags.FlagValues(), ['simrl', *(part.format(folder / 'own.py') for part in form)]
    config_flags.DEFINE_config_file('config', None, '', flag_values=values, sys_argv=command)
    main.find_neighbours(command)
    values(command)
    assert values['config'].value['arg'] == 'x'


def test_a_run_directory_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for workdir in ('gs://bucket/run', pathlib.Path('s3://bucket/run'), 'file:run'):
        with pytest.raises(ConfigError, match=r'^workdir: expected a local path, found the URL'):
            experiment.run({}, workdir)
    assert not list(tmp_path.iterdir())


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
    assert done.stderr.splitlines()[-1] == (
        f'error: config.model: {tmp_path}/none.gguf: expected a GGUF file, found none'
    )
    assert not (tmp_path / 'run').exists()


def test_main_refuses_the_workdir_of_another_scene(tmp_path):
    directory.open_workdir(tmp_path / 'run', to_dict(settings_of(parsed('smollm2', 'smoke'))))
    done = run_main('--config=configs/quickstart.py:smoke', f'--workdir={tmp_path}/run')
    assert done.returncode == 1
    assert "scene: 'pretrained' -> 'concierge'" in done.stderr.splitlines()[-1]
