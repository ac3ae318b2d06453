"""YAML files -> frozen dataclasses of texts, strictly; every error names the file, the line and the field.

Nodes are read, not values, since only they know their lines. No tag of Python is ever followed.
"""

import contextlib
import dataclasses
import difflib
import pathlib
import re
import types
import typing
from typing import Any, TypeVar

import yaml

T = TypeVar('T')
KINDS = {'str': 'a text', 'int': 'a number', 'float': 'a number', 'bool': 'yes or no', 'timestamp': 'a date'}
SHOWN = 60  # characters of a found value in an error
IN_QUOTES = "a text in quotes, needed where it has ': ' in it or begins with one of { [ * & @ % ? - | > !"
A_FIELD = 'a field, a colon and a space'
# What YAML says of a file that is none -> what was to be there; the first that fits.
EXPECTED = {
    r'a quoted scalar.* end of stream': 'a quote at the end of the text, of the kind at its start',
    r'end of stream|<stream end>': 'the ] or } that ends the list or the fields',
    r'unknown escape|escape sequence': r"'single quotes' around a text with \ in it",
    r"character '\\t'": 'spaces at the start of a line',
    r"could not find expected ':'": A_FIELD,
    r'a single document': 'one set of fields',
    r'flow .*but got': 'texts in quotes inside [ ] and { }, and commas between them',
    r"<block end>, but found '(<block|-)": 'a line that begins where those beside it begin',
    r'<block end>': 'nothing after a closing quote or bracket, and all lines of a text as far in as its first',
}


class TextError(ValueError):
    """A file of tasks or texts that cannot be used: the file, the line, the field, expected and found."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A node's place in its file, for errors."""

    path: pathlib.Path
    field: str = ''

    def error(self, node: yaml.Node, problem: str) -> TextError:
        return self.on_line(node.start_mark.line, problem)

    def at(self, field: str) -> 'Place':
        return Place(self.path, f'{self.field}.{field}' if self.field else field)

    def item(self, number: int) -> 'Place':
        return Place(self.path, f'{self.field}[{number}]')

    def on_line(self, line: int, problem: str) -> TextError:
        """The error of a line, counted from 0."""
        field = f'{self.field}: ' if self.field else ''
        return TextError(f'{self.path}, line {line + 1}: {field}{problem}')


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines, from 1, on which the fields of a file begin, by dotted name: `types[0].tasks[3].id`."""

    path: pathlib.Path
    of: dict[str, int]

    def error(self, field: str, problem: str) -> TextError:
        """The error of a field that was read and is wrong beside others.

        One that the file leaves out is of the line of the field around it.
        """
        around = field
        while around not in self.of:
            around = re.sub(r'(^|\.|\[)[^.\[]*$', '', around)
        return TextError(f'{self.path}, line {self.of[around]}: {field}: {problem}')


def read_yaml(path: pathlib.Path, cls: type[T], base: T | None = None) -> tuple[T, Lines]:
    """Reads a file as a dataclass.

    Types of fields: str (not empty, stripped), `str | None`, `tuple[X, ...]` (not empty) and dataclasses.

    Args:
        base: fields that the file leaves out are those of it; None: each must be there.

    Raises:
        TextError: not readable, no YAML, an unknown, double, missing or empty field, or another type.
    """
    place = Place(path)
    try:
        content = path.read_text(encoding='utf-8')
        node = yaml.compose(content, yaml.SafeLoader)
    except OSError as error:
        raise TextError(f'{path}: expected a file that can be read, found: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise TextError(f'{path}: expected UTF-8, found the byte {error.object[error.start]:#04x}') from None
    except yaml.reader.ReaderError as error:
        line = content.count('\n', 0, error.position)
        raise place.on_line(line, f'expected YAML, found the character U+{error.character:04X}') from None
    except yaml.MarkedYAMLError as error:
        raise _unparsed(path, content, error) from None
    except RecursionError:
        raise TextError(f'{path}: expected a few levels, found hundreds') from None
    if node is None:
        raise TextError(f'{path}: expected fields, found an empty file')
    lines: dict[str, int] = {}
    found: T = _read(node, cls, place, base, lines)
    return found, Lines(path, lines)


def _unparsed(path: pathlib.Path, content: str, error: yaml.MarkedYAMLError) -> TextError:
    """The error of a file that is no YAML: what was to be there, and the line that was found."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    place = Place(path, _field_at(content, mark.index))
    told = f'{error.context} {error.problem}'
    otherwise = IN_QUOTES if place.field else A_FIELD
    expected = next((words for of, words in EXPECTED.items() if re.search(of, told)), otherwise)
    lines = content.splitlines()
    found = repr(_shortened(lines[mark.line].strip())) if mark.line < len(lines) else 'the end of the file'
    return place.on_line(mark.line, f'expected {expected}; found {found}')


def _field_at(content: str, index: int) -> str:
    """The dotted name of the field at which a file stops being YAML, at a character; empty before the first."""
    names: list[str | int | None] = []  # of the mappings and lists that are open: their last key, or item
    is_key: list[bool] = []  # of mappings: a key comes next
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(content, yaml.SafeLoader):
            if isinstance(event, yaml.CollectionEndEvent):
                names.pop()
                is_key.pop()
            if isinstance(event, yaml.NodeEvent):
                own = names[-1] if names else None
                if isinstance(own, int):
                    names[-1] = own + 1
                elif names:
                    if is_key[-1]:
                        names[-1] = event.value if isinstance(event, yaml.ScalarEvent) else None
                    is_key[-1] = not is_key[-1]
                if isinstance(event, yaml.CollectionStartEvent):
                    names.append(-1 if isinstance(event, yaml.SequenceStartEvent) else None)
                    is_key.append(True)
            if event.start_mark is not None and event.start_mark.index >= index:
                break
    place = Place(pathlib.Path())
    for name in names:
        if name is None or name == -1:
            break
        place = place.item(name) if isinstance(name, int) else place.at(name)
    return place.field


def _read(node: yaml.Node, hint: Any, place: Place, base: Any, lines: dict[str, int]) -> Any:
    lines[place.field] = node.start_mark.line + 1
    kinds = [x for x in typing.get_args(hint) if x is not types.NoneType]
    if isinstance(hint, types.UnionType):
        return None if _kind(node) == 'null' else _read(node, kinds[0], place, base, lines)
    if typing.get_origin(hint) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise place.error(node, f'expected a list, found {_shown(node)}')
        if not node.value:
            raise place.error(node, 'expected at least one, found an empty list')
        return tuple(_read(x, kinds[0], place.item(i), None, lines) for i, x in enumerate(node.value))
    if dataclasses.is_dataclass(hint):
        return _read_fields(node, typing.cast(type, hint), place, base, lines)
    assert hint is str
    if _kind(node) != 'str':
        quoted = ' (a text that reads like that goes in quotes)' if _kind(node) != 'null' else ''
        raise place.error(node, f'expected a text, found {_shown(node)}{quoted}')
    if not node.value.strip():
        raise place.error(node, 'expected a text, found an empty one')
    return node.value.strip()


def _read_fields(node: yaml.Node, cls: type, place: Place, base: Any, lines: dict[str, int]) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise place.error(node, f'expected fields, found {_shown(node)}')
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _shown(key)
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            meant = f' (did you mean {close[0]!r}?)' if close else ''
            raise place.at(name).error(key, f'expected one of {", ".join(hints)}, found an unknown field{meant}')
        if name in values:
            raise place.at(name).error(key, f'expected it once, found it on line {lines[place.at(name).field]} too')
        inner = None if base is None else getattr(base, name)
        values[name] = _read(value, hints[name], place.at(name), inner, lines)
        lines[place.at(name).field] = key.start_mark.line + 1
    if base is not None:
        return dataclasses.replace(base, **values)
    if missing := [name for name in hints if name not in values]:
        raise place.error(node, f'expected the field {missing[0]!r}, found {", ".join(values) or "none"}')
    return cls(**values)


def _kind(node: yaml.Node) -> str:
    """The kind of a scalar by YAML's rules, for instance `int`; of another node its tag's last word."""
    return str(node.tag).rpartition(':')[2]


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return 'fields'
    if isinstance(node, yaml.SequenceNode):
        return 'a list'
    if _kind(node) == 'null':
        return 'nothing'
    return f'{_shortened(str(node.value))!r} ({KINDS.get(_kind(node), f"with the tag {node.tag}")})'


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + '...'
