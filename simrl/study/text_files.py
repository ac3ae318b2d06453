"""The YAML files of tasks and texts, simrl's and a researcher's -> `Tasks` and `Texts`, checked for what is in them."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

from simrl.study.texts import NUMBERS, PLACEHOLDER, CheckQuestion, Fields, Tasks, Texts, strings_of
from simrl.study.yaml_files import Lines, read_yaml
from simrl.study.yaml_files import TextError as TextError

HERE = pathlib.Path(__file__).parent
TASKS, TEXTS = HERE / 'tasks.yaml', HERE / 'texts.yaml'
ID = re.compile(r'[a-z0-9]+([_-][a-z0-9]+)*')
LANGUAGE = re.compile('[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*')  # of the tags of BCP 47
# Filled in where a text is shown, not once for all; the fields whose texts may have them.
LATER = {
    'limit': ('errors',),
    'found': ('errors', 'labels'),
    'tries_left': ('notices',),
    'document_type': ('choose_task', 'notes', 'training', 'conversation', 'final', 'labels'),
}


@dataclasses.dataclass(frozen=True)
class _Question:
    """A `CheckQuestion` as a file states it: `right` is the text of an option."""

    text: str
    options: tuple[str, ...]
    right: str


# The dataclass of a file: `Texts` with questions as files state them.
_FileTexts = dataclasses.make_dataclass(
    '_FileTexts',
    [
        (field.name, {'check': tuple[_Question, ...], 'attention': _Question}.get(field.name, field.type))
        for field in dataclasses.fields(Texts)
    ],
    frozen=True,
)


def read_tasks(path: pathlib.Path | None = None) -> Tasks:
    """Reads document types and tasks; None: the 36 that simrl ships.

    Raises:
        TextError: see `read_yaml`; or an id or title is there twice, or an id has other characters.
    """
    tasks, lines = read_yaml(path or TASKS, Tasks)
    seen: dict[tuple[str, str], str] = {}

    def check(field: str, kind: str, value: str) -> None:
        if kind.endswith('id') and not ID.fullmatch(value):
            raise lines.error(field, f'expected small letters, digits, - and _ between them, found {value!r}')
        if (first := seen.setdefault((kind, value), field)) != field:
            raise lines.error(field, f'expected another {kind} than of line {lines.of[first]}, found {value!r} again')

    for i, own in enumerate(tasks.types):
        check(f'types[{i}].id', 'type id', own.id)
        check(f'types[{i}].name', 'name', own.name)
        for j, task in enumerate(own.tasks):
            check(f'types[{i}].tasks[{j}].id', 'id', task.id)
            check(f'types[{i}].tasks[{j}].title', f'title in {own.id}', task.title)
    return tasks


def read_texts(path: pathlib.Path | None = None) -> Texts:
    """Reads the texts; those that a file leaves out, and all for None, are simrl's. A list is replaced as a whole.

    Raises:
        TextError: see `read_yaml`; an unknown placeholder, a right answer that is no option, or an option twice.
    """
    shipped = _shipped()
    if path is None:
        return _checked(*shipped)
    return _checked(*read_yaml(path, _FileTexts, shipped[0]))


@functools.cache
def _shipped() -> tuple[Any, Lines]:
    return read_yaml(TEXTS, _FileTexts)


def _checked(found: Any, lines: Lines) -> Texts:
    """The texts of a file, with numbers for right answers."""
    known = {*NUMBERS, *(field.name for field in dataclasses.fields(Fields))}
    for field, text in strings_of(found, ''):
        later = {name for name, places in LATER.items() if field.split('.')[0] in places}
        inside_fields = field.startswith('fields.')
        for name in PLACEHOLDER.findall(text):
            if name not in known | later or inside_fields:
                allowed = 'none here' if inside_fields else ', '.join(f'{{{one}}}' for one in sorted(known | later))
                raise lines.error(
                    field, f'expected placeholders of {allowed}; found {{{name}}} (braces around one word are one)'
                )
    if not LANGUAGE.fullmatch(found.language):
        raise lines.error('language', f'expected a tag such as en, de or pt-BR, found {found.language!r}')
    questions = [_question(x, f'check[{i}]', lines) for i, x in enumerate(found.check)]
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Texts)}
    attention = _question(found.attention, 'attention', lines)
    given = [name for name in ('text', 'options', 'right') if f'attention.{name}' in lines.of]
    if len(given) < 3 and found.attention.right not in attention.text:
        left = f"simrl's other fields beside {' and '.join(given)}, and a text without {found.attention.right!r}"
        raise lines.error('attention', f'expected a text that says which option is right, found {left}')
    return Texts(**values | {'check': tuple(questions), 'attention': attention})


def _question(found: _Question, field: str, lines: Lines) -> CheckQuestion:
    options = found.options
    if len(set(options)) < max(2, len(options)):
        raise lines.error(f'{field}.options', f'expected two or more that differ, found {list(options)}')
    if found.right not in options:
        raise lines.error(f'{field}.right', f'expected one of {list(options)}, found {found.right!r}')
    return CheckQuestion(found.text, options, options.index(found.right))
