"""Settings of both scenes' smallest experiments, with changes by dotted field."""

import importlib
import json
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from simrl.experiments.experiment import build_stages, settings_of
from simrl.run import config
from simrl.run.config import ConfigError, to_dict
from simrl.run.stages import Stage

CONCIERGE_ARMS = {
    'role_play': {'simulator': 'role_play', 'size': 'medium'},
    'persona': {'simulator': 'persona', 'size': 'medium'},
    'fine_tuned': {'simulator': 'fine_tuned', 'size': 'medium'},
    'oracle': {'simulator': 'people', 'size': 'medium'},
}


def arms(*names: str) -> dict[str, dict[str, Any]]:
    """Some arms of the quickstart."""
    return {name: CONCIERGE_ARMS[name] for name in names}


def settings(name: str = 'quickstart', arg: str = 'smoke', **changes: Any) -> Any:
    """The settings of a config; a change is named by its dotted field, with '__' for each dot."""
    plain = to_dict(importlib.import_module(f'configs.{name}').get_config(arg))
    for field, value in changes.items():
        part = plain
        *path, last = field.split('__')
        for key in path:
            part = part[key]
        part[last] = value
    return settings_of(plain)


def tiny_settings(arms: Mapping[str, Mapping[str, Any]], **changes: Any) -> Any:
    """Settings of arms in the concierge world, smaller still than the smoke test's: batches of one shape."""
    plain = to_dict(settings())
    user = plain['users']['medium']
    for fitting in (plain['assistant']['sft'], user['base'], user['fine_tuning']):
        fitting['steps'], fitting['optimizer']['warmup_steps'] = 2, 0
        fitting['batch'] |= {'batch_size': 8, 'lengths': [128]}
    tiny = {
        'assistant__sft': plain['assistant']['sft'],
        'limits__turns': 2,
        'rl__row_buckets': (128,),
        'rl__steps': 1,
        'rl__prompts_per_step': 2,
        'evaluation__people': 8,
        'evaluation__block': 8,
        'evaluation__matrix': 8,
        'evaluation__batch_size': 8,
        'compute__loop__checkpoint_every': 100,
    }
    return settings(users={'medium': user}, arms=arms, **tiny | changes)


def identity(stage: Stage) -> str:
    """What a stage depends on: its settings and the paths of its inputs."""
    inputs = {name: str(path) for name, path in stage.inputs.items()}
    return json.dumps([config.identity(stage.settings), inputs], sort_keys=True)


def leaves(plain: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted fields and their values."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def changed(plain: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The settings with one dotted field of another value."""
    name, _, rest = field.partition('.')
    return {**plain, name: changed(plain[name], rest, value) if rest else value}


def without_effect(settings: Any) -> set[str]:
    """The fields that are declared to change no result (`NO_EFFECT`)."""
    every, kept = (dict(leaves(plain)) for plain in (to_dict(settings), config.identity(settings)))
    return every.keys() - kept.keys()


# Other values to try of a field, by the type of its value.
OTHER: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    bool: lambda x: (not x,),
    int: lambda x: (2 * x + 2, 2 * x, x // 2, x + 1),
    float: lambda x: (0.9 * x or 0.25,),
    str: lambda x: (f'{x} else',),
    tuple: lambda x: tuple((*x[:-1], last) for last in OTHER[type(x[-1])](x[-1])) if x else (),
}
USUAL = {int: 2, float: 0.25, str: 'x', pathlib.Path: 'x'}  # of a field that is None


def other_values(settings: Any, field: str) -> tuple[Any, ...]:
    """Values that a dotted field may have beside its own; not all of them are valid."""
    *path, last = field.split('.')
    for name in path:
        settings = settings[name] if isinstance(settings, Mapping) else getattr(settings, name)
    if isinstance(settings, Mapping):
        return OTHER[type(settings[last])](settings[last])
    value, (kind, _) = getattr(settings, last), config.split_none(typing.get_type_hints(type(settings))[last])
    if typing.get_origin(kind) is Literal:
        return tuple(option for option in typing.get_args(kind) if option != value)
    if value is None:
        return (USUAL[kind],) if kind in USUAL else ()
    return OTHER[type(value)](value) if type(value) in OTHER else ()


def fields_without_effect(plain: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Fields whose change leaves the stages' identities as they are, and fields of which no other value is valid."""
    settings, workdir = settings_of(plain), pathlib.Path('run')
    before = {stage.name: identity(stage) for stage in build_stages(settings, workdir)}
    without, skipped = set(), set()
    for field, own in leaves(plain):
        for value in (value for value in other_values(settings, field) if value != own):
            try:
                stages = build_stages(settings_of(changed(plain, field, value)), workdir)
            except (ConfigError, ValueError):
                continue
            if {stage.name: identity(stage) for stage in stages} == before:
                without.add(field)
            break
        else:
            skipped.add(field)
    return without, skipped
