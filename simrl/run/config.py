"""Convert settings: a frozen dataclass <-> a `ConfigDict` that flags can change, strictly; and list differences.

The dataclasses are defined in the rooms that use them. Every error is a `ConfigError` with the dotted name of the
field (`config.rl.algorithm.clip_low`), what was expected and what was found.

A field with `metadata=NO_EFFECT` changes speed, memory or logs, and no result beyond rounding: `identity` leaves it
out, so that it may change when a run is resumed.
"""

import dataclasses
import difflib
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, config_dict

T = TypeVar('T')
NO_EFFECT = {'changes_results': False}
URL = re.compile(r'file:|[A-Za-z][A-Za-z0-9+.-]+:/')  # pathlib shortens gs:// to gs:/
VARIABLE = re.compile(r'\$([A-Za-z_]\w*|\{\w+\})')  # of a shell
_Mapping = (ConfigDict, Mapping)  # a ConfigDict is no Mapping


class ConfigError(ValueError):
    """A field of a config is unknown, missing, of the wrong type or impossible."""


def to_config_dict(settings: Any) -> ConfigDict:
    """Returns a dataclass as a config with all of its fields, so that a flag can set every one of them.

    `from_config_dict` reverses it. A field that is None becomes a placeholder of its type, a path becomes a str, and a
    dataclass that is None (`X | None`) becomes a config of X in which every field is a placeholder.
    """
    return typing.cast(ConfigDict, _to_config(type(settings), settings))


def _to_config(hint: Any, value: Any) -> Any:
    kind, _ = split_none(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        fields = {name: _to_config(hints[name], None if value is None else getattr(value, name)) for name in names}
        return ConfigDict(fields, sort_keys=False)
    if value is None:
        flag_type = {Literal: type(args[0]) if args else None, pathlib.Path: str}.get(origin or kind, origin or kind)
        return config_dict.placeholder(flag_type)
    if origin is dict:
        return ConfigDict({key: _to_config(args[1], x) for key, x in value.items()}, sort_keys=False)
    if kind is float and type(value) is int:
        return float(value)  # 1 has the type int, which a flag could not set to 0.5
    return str(value) if isinstance(value, pathlib.Path) else value


def from_config_dict(cls: type[T], config: ConfigDict | Mapping[str, Any], name: str) -> T:
    """Returns the dataclass `cls` with the fields of a config.

    Field types: int, float (finite; an int is converted), bool, str, `pathlib.Path` (from a str, by `local_path`),
    `Literal`, `tuple[X, ...]`, `dict[str, X]`, dataclasses, and `X | None` of these. A dataclass that may be None is
    None where all of its fields are None. Where only some are, these have their defaults.

    Args:
        cls: a dataclass; fields that `config` leaves out have their defaults.
        config: its fields by name.
        name: what the errors call `config`, for instance 'config.rl'.

    Raises:
        ConfigError: an unknown or missing field, a wrong type, or a ValueError raised by the dataclass itself.
        TypeError: `cls` has a field of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    names = [field.name for field in fields]
    for key in config:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f' (did you mean {close[0]!r}?)' if close else ''
            raise ConfigError(f'{name}.{key}: unknown field{hint}; {cls.__name__} has {", ".join(names)}')
    missing = [field.name for field in fields if field.name not in config and not _has_default(field)]
    if missing:
        raise ConfigError(f'{name}.{missing[0]}: missing; {cls.__name__} needs {", ".join(missing)}')
    values = {key: _from_config(hints[key], config[key], f'{name}.{key}') for key in names if key in config}
    try:
        return cls(**values)
    except ValueError as error:
        # A dataclass says 'LoRASettings.rank: expected ...'; in a config that field is 'config.rl.lora.rank'.
        own, _, rest = str(error).partition('.')
        raise ConfigError(f'{name}.{rest}' if own == cls.__name__ else f'{name}: {error}') from error


def _from_config(hint: Any, value: Any, name: str) -> Any:
    kind, optional = split_none(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    expected = describe(kind) + ' or None' * optional
    if optional and _is_unset(value):
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, _Mapping):
        if optional:
            defaults = {field.name for field in dataclasses.fields(kind) if _has_default(field)}
            value = {key: value[key] for key in value if not (key in defaults and _is_unset(value[key]))}
        return from_config_dict(typing.cast(type, kind), value, name)
    if origin is dict and isinstance(value, _Mapping):
        return {key: _from_config(args[1], value[key], f'{name}.{key}') for key in value}
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_from_config(args[0], x, f'{name}[{i}]') for i, x in enumerate(value))
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f'{name}: expected a finite number, found {_show(value)}')
        return float(value)
    if kind is pathlib.Path and isinstance(value, str | pathlib.Path):
        try:
            return local_path(value)
        except ValueError as error:
            raise ConfigError(f'{name}: {error}') from error
    if kind in (int, float, bool, str) and type(value) is kind:
        return value
    if origin is Literal and any(type(value) is type(option) and value == option for option in args):
        return value
    raise ConfigError(f'{name}: expected {expected}, found {_show(value)}')


def local_path(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path of this machine's file system, with `~` expanded.

    Raises:
        ValueError: it is a URL, empty, has a variable that no shell has expanded, or `~` is of no user.
    """
    if URL.match(str(path)):
        raise ValueError(f'expected a local path, found the URL {str(path)!r}: mount it, or copy it here')
    if not str(path).strip():
        raise ValueError(f'expected a path, found {str(path)!r}')
    for place in (pathlib.Path(path), *pathlib.Path(path).parents):
        if (variable := VARIABLE.search(place.name)) and not place.exists():
            raise ValueError(f'expected a path, found {str(path)!r}: {variable[0]} is not expanded here')
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f'expected a path, found {str(path)!r}: {error}') from error


def split_none(hint: Any) -> tuple[Any, bool]:
    """Returns the type X of a hint X or X | None, and whether None is one of its values."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return (kinds[0], True) if len(kinds) == 1 else (hint, False)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_unset(value: Any) -> bool:
    """True if a value is None, or the config of a dataclass whose fields all are."""
    return value is None or (
        isinstance(value, _Mapping) and len(value) > 0 and all(_is_unset(value[key]) for key in value)
    )


def describe(kind: Any) -> str:
    """A field's type in the words of errors and of `--help`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return f'the fields of {typing.cast(type, kind).__name__}'
    if origin is Literal:
        return f'one of {", ".join(map(repr, args))}'
    if kind is pathlib.Path:
        return 'a path'
    if kind in (int, float, bool, str):
        return str(kind.__name__)
    if (origin is tuple and args[1:] == (...,)) or (origin is dict and args[0] is str):
        return str(kind)
    raise TypeError(f'fields of type {kind} cannot be filled in from a config')


def _show(value: Any) -> str:
    text = repr(value)
    return f'{text if len(text) <= 100 else text[:97] + "..."} ({type(value).__name__})'


def to_dict(value: Any) -> Any:
    """Returns a dataclass as the plain dict that JSON stores: tuples become lists, paths become str."""
    return _plain(value, lambda field: True)


def identity(value: Any) -> Any:
    """Returns `to_dict` without the fields that change no result (`NO_EFFECT`)."""
    return _plain(value, lambda field: field.metadata.get('changes_results', True))


def _plain(value: Any, keep: Callable[[dataclasses.Field[Any]], bool]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = filter(keep, dataclasses.fields(value))
        return {field.name: _plain(getattr(value, field.name), keep) for field in kept}
    if isinstance(value, _Mapping):
        return {str(key): _plain(value[key], keep) for key in value}
    if isinstance(value, tuple | list):
        return [_plain(x, keep) for x in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f'expected a value that JSON can hold, found {_show(value)}')


def differences(old: Mapping[str, Any], new: Mapping[str, Any], name: str = '') -> list[str]:
    """Lists the dotted fields in which two nested dicts (see `to_dict`) differ: 'rl.algorithm.lam: 0.95 -> 1.0'.

    1 and 1.0 are equal, True and 1 are not; lists are compared as wholes.
    """
    lines = []
    for key in sorted({*old, *new}):
        field = f'{name}.{key}' if name else str(key)
        if key not in old:
            lines.append(f'{field}: (absent) -> {new[key]!r}')
        elif key not in new:
            lines.append(f'{field}: {old[key]!r} -> (absent)')
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            lines.extend(differences(old[key], new[key], field))
        elif not _equal(old[key], new[key]):
            lines.append(f'{field}: {old[key]!r} -> {new[key]!r}')
    return lines


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, bool) != isinstance(new, bool):
        return False
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_equal, old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return not differences(old, new)
    return bool(old == new)
