"""All that a participant reads: tasks and texts, which `text_files` reads from YAML files.

Texts are Markdown (`render.page_html`) but for titles, labels, notices and errors, which are plain. In them {exchanges}
and the like stand for numbers of the study's settings and for what the researcher fills in under `fields`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from simrl.study.participant import Outcome
from simrl.study.settings import TaskSettings

T = TypeVar('T')
PLACEHOLDER = re.compile(r'\{(\w+)\}')
NUMBERS = (
    'exchanges',
    'max_exchanges',
    'check_tries',
    'min_words',
    'message_chars',
    'text_chars',
    'reason_chars',
    'min_reason_chars',
)  # of TaskSettings


@dataclasses.dataclass(frozen=True)
class Task:
    """A text that a participant may choose to write. `brief`: Markdown, addressed to them."""

    id: str
    title: str
    brief: str


@dataclasses.dataclass(frozen=True)
class DocumentType:
    """A kind of text, the questions before writing one, and its tasks. `name`: with its article, 'a blog post'."""

    id: str
    name: str
    questions: tuple[str, ...]
    tasks: tuple[Task, ...]


@dataclasses.dataclass(frozen=True)
class Tasks:
    types: tuple[DocumentType, ...]

    def type(self, id: str) -> DocumentType:
        """The document type of an id; KeyError: there is none."""
        return {own.id: own for own in self.types}[id]

    def task(self, id: str) -> Task:
        """The task of an id; KeyError: there is none."""
        return self.tasks[id]

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of all types by id."""
        return {task.id: task for own in self.types for task in own.tasks}


@dataclasses.dataclass(frozen=True)
class CheckQuestion:
    """A question with one right answer. `right`: its number among the options, from 0."""

    text: str
    options: tuple[str, ...]
    right: int


@dataclasses.dataclass(frozen=True)
class Criterion:
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Fields:
    """The researcher fills these in; a live study needs those that its texts use."""

    organisation: str | None
    researchers: str | None
    contact: str | None  # an address that participants may write to
    ethics: str | None  # the board that approved the study, and the approval's number
    duration: str | None  # 'about 40 minutes'
    payment: str | None  # '£8'
    storage: str | None  # where data is kept, and for how long
    sharing: str | None  # with whom pseudonymous data is shared


@dataclasses.dataclass(frozen=True)
class Labels:
    """Plain texts of buttons, fields and headings of parts."""

    agree: str
    decline: str
    start: str
    send_answers: str
    start_writing: str
    your_task: str
    conversation: str
    you: str
    reply_a: str
    reply_b: str
    kept_reply: str
    message: str
    send: str
    waiting: str
    better_a: str
    tie: str
    better_b: str
    reason: str
    vote: str
    retry: str
    conclude: str
    final_text: str
    words: str
    submit: str
    withdraw: str
    withdraw_reason: str
    confirm_withdraw: str
    keep_on: str
    delete: str
    confirm_delete: str
    code: str
    back_to_panel: str
    criteria: str
    go_on: str
    practice: str
    choice: str
    step: str


@dataclasses.dataclass(frozen=True)
class Notices:
    """Plain texts above a page, by what happened."""

    out_of_date: str
    welcome_back: str
    wrong_check: str
    training_done: str
    waiting: str
    void: str
    refused: str
    no_more_tries: str
    enough_exchanges: str
    last_exchange: str
    connection_lost: str
    preview: str
    rehearsal: str
    no_script: str


@dataclasses.dataclass(frozen=True)
class Errors:
    """Plain texts beside a field that was filled in wrongly ({limit}, {found}: numbers), or of a request."""

    empty: str
    too_long: str
    too_few_words: str
    reason_too_short: str
    no_choice: str
    no_task: str
    unanswered: str
    no_token: str
    no_identity: str
    unknown_participant: str
    other_study: str
    no_deletion: str
    too_large: str
    not_found: str
    server: str


@dataclasses.dataclass(frozen=True)
class Closings:
    """The last page, by outcome; the completion code stands beneath, where the outcome has one.

    `cut_short`: as `closed`, of one who had begun, when what they need to continue was taken out of the study.
    """

    completed: str
    declined: str
    failed_check: str
    withdrawn: str
    closed: str
    cut_short: str
    deleted: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """All texts of the pages.

    Attributes:
        language: of the pages, as HTML names it: en, pt-BR.
        title: of every page.
        check: questions about the instructions, each with one right answer.
        criteria: what makes a reply better; the same three as in the reward's rubric.
        attention: an item beside the final text, whose text says which option to choose.
    """

    language: str
    title: str
    fields: Fields
    consent: str
    instructions: str
    criteria: tuple[Criterion, ...]
    check_intro: str
    check: tuple[CheckQuestion, ...]
    choose_task: str
    notes: str
    training: str
    conversation: str
    vote: str
    final: str
    attention: CheckQuestion
    withdraw: str
    delete: str
    closings: Closings
    notices: Notices
    errors: Errors
    labels: Labels

    def closing(self, outcome: Outcome) -> str:
        return str(getattr(self.closings, outcome))

    def filled(self, task: TaskSettings) -> 'Texts':
        """The texts with the settings' numbers, and the researcher's fields, in their places.

        A field that is not filled in is shown as its name in brackets.
        """
        fields = dataclasses.asdict(self.fields)
        values = {name: value or f'[{name}]' for name, value in fields.items()}
        values |= {name: format(getattr(task, name), ',') for name in NUMBERS}
        return _replaced(self, lambda text: PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text))

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a study has few texts)
    def of_type(self, name: str) -> 'Texts':
        """The texts with the name of a document type in its places."""
        return _replaced(self, lambda text: fill(text, document_type=name))

    def unfilled(self) -> tuple[str, ...]:
        """The fields that texts use and the researcher did not fill in: a live study may not begin."""
        used = {name for _, text in strings_of(self, '') for name in PLACEHOLDER.findall(text)}
        return tuple(name for name, value in dataclasses.asdict(self.fields).items() if value is None and name in used)


def fill(text: str, **values: object) -> str:
    """A text with {limit} and the like replaced."""
    return PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), text)


def number_of(number: int, noun: str) -> str:
    """'1 vote', '1,200 votes'."""
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def strings_of(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """All texts in a dataclass, with the dotted names of their fields."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, tuple):
        for i, x in enumerate(value):
            yield from strings_of(x, f'{field}[{i}]')
    elif dataclasses.is_dataclass(value):
        for own in dataclasses.fields(value):
            yield from strings_of(getattr(value, own.name), f'{field}.{own.name}' if field else own.name)


def _replaced(value: T, change: Callable[[str], str]) -> T:
    """The dataclass with each of its texts changed."""
    if isinstance(value, str):
        made: Any = change(value)
    elif isinstance(value, tuple):
        made = tuple(_replaced(x, change) for x in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: Mapping[str, Any] = {own.name: getattr(value, own.name) for own in dataclasses.fields(value)}
        made = dataclasses.replace(value, **{name: _replaced(x, change) for name, x in fields.items()})
    else:
        made = value
    return made
