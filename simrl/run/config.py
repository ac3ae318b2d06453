"""A `ConfigDict` (or nested dict) -> the caller's frozen dataclass, strictly; and back, and what differs between two.

The dataclasses live in the rooms that use them: this module only fills them in. Every error is a `ConfigError` that
names the field with its dots (`config.rl.ppo.clip`), what was expected and what was found.
"""

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

import ml_collections

T = TypeVar('T')


class ConfigError(ValueError):
    """A field of a config is unknown, missing, of the wrong type or impossible."""


def from_config_dict(cls: type[T], config: ml_collections.ConfigDict | Mapping[str, Any], name: str) -> T:
    """Fills in the dataclass `cls` from a config that has exactly its fields.

    Supported field types: int, float (an int is accepted and converted), bool, str, None, `pathlib.Path` (from a str),
    `Literal`, unions such as `X | None`, nested dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`, `dict[str, X]`.
    A dataclass that may be None is None also where all the fields that the config gives for it are: so its fields can
    be there with their types, for flags to set.

    Args:
        cls: a dataclass; its defaults stand for the fields that `config` leaves out.
        config: its fields by name.
        name: what the errors call `config`, for instance 'config.rl'.

    Raises:
        ConfigError: an unknown or missing field, a wrong type, or a ValueError raised by the dataclass itself.
        TypeError: `cls` has a field of a type that is not supported.
    """
    if not isinstance(config, ml_collections.ConfigDict | Mapping):
        raise ConfigError(f'{name}: expected the fields of {cls.__name__}, found {_show(config)}')
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = [key for key in config if key not in fields]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ConfigError(
            f'{name}.{unknown[0]}: unknown field{hint}; {cls.__name__} has {", ".join(fields) or "no fields"}'
        )
    missing = [key for key, field in fields.items() if key not in config and _required(field)]
    if missing:
        raise ConfigError(f'{name}.{missing[0]}: missing; {cls.__name__} needs {", ".join(missing)}')

    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], config[key], f'{name}.{key}') for key in fields if key in config}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        # A dataclass says 'PPO.clip: expected ...'; the reader of a config knows that field as 'config.rl.ppo.clip'.
        message = str(error)
        own_prefix = f'{cls.__name__}.'
        message = (
            f'{name}.{message.removeprefix(own_prefix)}' if message.startswith(own_prefix) else f'{name}: {message}'
        )
        raise ConfigError(message) from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(expected: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, name)
    if origin is Literal:
        for option in args:
            if type(value) is type(option) and value == option:
                return option
        raise ConfigError(f'{name}: expected one of {", ".join(map(repr, args))}, found {_show(value)}')
    if dataclasses.is_dataclass(expected):
        return from_config_dict(typing.cast(type, expected), value, name)
    if origin in (tuple, list):
        return _convert_sequence(expected, value, name)
    if origin is dict and args[0] is str:
        if not isinstance(value, ml_collections.ConfigDict | Mapping):
            raise ConfigError(f'{name}: expected {_describe(expected)}, found {_show(value)}')
        return {str(key): _convert(args[1], value[key], f'{name}.{key}') for key in value}
    if expected is float and type(value) is int:
        return float(value)
    if expected is pathlib.Path and isinstance(value, str | pathlib.Path):
        return pathlib.Path(value)
    if expected in (int, float, bool, str, type(None)):
        if type(value) is expected:
            return value
        raise ConfigError(f'{name}: expected {_describe(expected)}, found {_show(value)}')
    if expected is pathlib.Path:
        raise ConfigError(f'{name}: expected a path, found {_show(value)}')
    raise TypeError(f'{name}: fields of type {expected} cannot be filled in from a config')


def _convert_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    exact = [option for option in options if option is type(value)]  # 3 for `float | int` stays an int
    concrete = [option for option in options if option is not type(None)]
    if type(None) in options and (value is None or _is_unset(concrete, value)):
        return None
    if len(concrete) == 1:
        try:
            return _convert(concrete[0], value, name)
        except ConfigError as error:
            # Only an error about this very field profits from the other option: one deeper down speaks for itself.
            if str(error).startswith(f'{name}: ') and ' or None' not in str(error):
                raise ConfigError(str(error).replace(', found', ' or None, found', 1)) from None
            raise
    for option in exact + concrete:
        try:
            return _convert(option, value, name)
        except ConfigError:
            continue
    raise ConfigError(f'{name}: expected {" or ".join(map(_describe, options))}, found {_show(value)}')


def _is_unset(concrete: list[Any], value: Any) -> bool:
    """Whether a dataclass's fields are all there and all None: how a config with typed fields writes `X | None`."""
    if len(concrete) != 1 or not dataclasses.is_dataclass(concrete[0]):
        return False
    is_dict = isinstance(value, ml_collections.ConfigDict | Mapping)
    return is_dict and len(value) > 0 and all(value[key] is None for key in value)


def _convert_sequence(expected: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if not isinstance(value, tuple | list):
        raise ConfigError(f'{name}: expected {_describe(expected)}, found {_show(value)}')
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        item_types = (args[0],) * len(value)
    else:
        item_types = args
    if len(item_types) != len(value):
        raise ConfigError(f'{name}: expected {len(item_types)} values, found {len(value)}: {_show(value)}')
    return origin(_convert(item, x, f'{name}[{i}]') for i, (item, x) in enumerate(zip(item_types, value, strict=True)))


def _describe(expected: Any) -> str:
    if expected is type(None):
        return 'None'
    return expected.__name__ if isinstance(expected, type) and not typing.get_args(expected) else str(expected)


def _show(value: Any) -> str:
    text = repr(value)
    return f'{text if len(text) <= 100 else text[:97] + "..."} ({type(value).__name__})'


def to_dict(value: Any) -> Any:
    """A dataclass as the plain dict that JSON stores: tuples become lists, paths and numpy scalars plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {str(key): to_dict(value[key]) for key in value}
    if isinstance(value, tuple | list):
        return [to_dict(x) for x in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f'expected a value that JSON can hold, found {_show(value)}')


def differences(old: Mapping[str, Any], new: Mapping[str, Any], name: str = '') -> list[str]:
    """One line per dotted field in which two nested dicts (see `to_dict`) differ: 'rl.ppo.clip: 0.2 -> 0.1'.

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
