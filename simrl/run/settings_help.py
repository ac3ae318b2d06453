"""The settings of a config as lines of a program's `--help`: names, values, types, and what their dataclasses say.

A field is described by the comment behind it, else by the one above it, else under `Attributes:` in its class's
docstring; of several sentences the first is shown.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Mapping
from typing import Any

from simrl.run.config import describe, split_none

WIDTH = 120
ATTRIBUTE = re.compile(r' {4}(\w+(?:, \w+)*): (.*)')  # of a docstring
SENTENCE = re.compile(r'.*?\.(?=\s)', re.DOTALL)


def settings_help(cls: type, config: Mapping[str, Any], name: str = 'config') -> str:
    """The settings of a dataclass, then those of each inner dataclass under its own heading.

    Args:
        cls: a dataclass whose fields `config.from_config_dict` knows.
        config: its values by name, as `config.to_config_dict` gives them; where there is none the default is shown.
        name: what flags call `config`.
    """
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    lines: list[str] = []
    parts: list[str] = []
    for field in (field for field in dataclasses.fields(cls) if field.init):
        kind, optional = split_none(hints[field.name])
        path, doc = f'{name}.{field.name}', docs.get(field.name, '')
        value = config.get(field.name)
        if value is None and field.default is not dataclasses.MISSING:
            value = field.default
        args = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            inner = typing.cast(type, kind)
            of_inner: Any = value if hasattr(value, 'get') else {}
            parts.append(
                f'{path}: {doc or _first(inspect.getdoc(inner) or "")}\n{settings_help(inner, of_inner, path)}'
            )
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(args[1]):
            named = f' ({", ".join(value)})' if value else ''
            inside = settings_help(typing.cast(type, args[1]), {}, f'{path}.NAME')
            parts.append(f'{path}: {doc}{named}\n{inside}')
        else:
            lines.append(_line(path, value, _type(kind) + ' or none' * optional, doc))
    return '\n\n'.join(filter(None, ['\n'.join(lines), *parts]))


def _line(path: str, value: Any, kind: str, doc: str) -> str:
    shown = '' if value is None else f'={value!r}' if isinstance(value, tuple) else f'={value}'
    said = f'  --{path}{shown}  ({kind}) {doc}'
    return textwrap.fill(said, WIDTH, subsequent_indent=' ' * 6, break_long_words=False, break_on_hyphens=False)


def _type(kind: Any) -> str:
    is_tuple = typing.get_origin(kind) is tuple
    return f'tuple of {describe(typing.get_args(kind)[0])}' if is_tuple else describe(kind)


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The first sentence on each field of a dataclass; none of one that nothing is said of."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _of_docstring(inspect.getdoc(base) or '')
            found |= {name: text for name, text in _of_comments(base).items() if text}
    return {name: _first(text) for name, text in found.items()}


def _of_docstring(text: str) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    own: list[str] = []
    for line in text.partition('Attributes:\n')[2].splitlines():
        if match := ATTRIBUTE.fullmatch(line):
            own = [match[2]]
            found |= dict.fromkeys(match[1].split(', '), own)
        elif not line.startswith(' ' * 5):
            break
        else:
            own.append(line.strip())
    return {name: ' '.join(lines) for name, lines in found.items()}


def _of_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.removeprefix('#').strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith('# type:')
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = node.lineno
        while lines[above - 2].lstrip().startswith('#'):
            above -= 1
        behind = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        said = [comments[number] for number in behind if number in comments]
        found[node.target.id] = ' '.join(said or [comments[number] for number in range(above, node.lineno)])
    return found


def _first(text: str) -> str:
    """The first sentence of a text."""
    match = SENTENCE.match(text)
    return ' '.join((match[0] if match else text).split())
