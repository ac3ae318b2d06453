"""Conversations, preferences and examples as validated records, read from and written to JSONL and Parquet.

A conversation row is `{id, source, split, messages: [{role, content, truncated?}], end?, intent?}`, a preference row
`{id, source, split, prompt: [{role, content}], chosen, rejected}`. Other keys are ignored, except `truncated_chars` of
a message: the number of characters that the data set cut off.

Readers are strict: the first bad row raises an error with its file and line. With `on_bad_rows='drop'` bad rows are
dropped and counted by reason. Outer white space of texts is stripped and counted.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from simrl.conversations.row_files import RowError, decode_row, numbered_rows, write_rows

Check = Callable[[str], None]
End = Literal['natural', 'cut', 'unknown']
OnBadRows = Literal['raise', 'drop']
Role = Literal['system', 'user', 'assistant']

ENDS = ('natural', 'cut', 'unknown')
ROLES = ('system', 'user', 'assistant')
SPLITS = ('train', 'dev', 'test')
STRIPPED = 'texts stripped of outer white space'  # key of this count, beside the reasons for dropped rows


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. `truncated` marks a message that the data set cut off before the speaker's end."""

    role: Role
    content: str
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation of a user and an assistant; roles alternate from the user's opening.

    Attributes:
        id: unique in its file.
        source: name of the data set.
        split: 'train', 'dev' or 'test'.
        messages: an optional system message, then user, assistant, user, ...
        end: 'natural' (the user ended it), 'cut' (the data set cut it off) or 'unknown'.
        intent: the user's goal in one sentence, if known.
    """

    id: str
    source: str
    split: str
    messages: tuple[Message, ...]
    end: End = 'unknown'
    intent: str | None = None

    def __post_init__(self) -> None:
        if self.end not in ENDS:
            raise RowError('bad end', f'expected one of {ENDS}, found {self.end!r}')
        if self.split not in SPLITS:
            raise RowError('bad split', f'expected one of {SPLITS}, found {self.split!r}')
        _check_messages(self.messages)

    @property
    def system(self) -> str | None:
        """Text of the leading system message, if any."""
        return self.messages[0].content if self.messages[0].role == 'system' else None

    @property
    def spoken(self) -> tuple[Message, ...]:
        """Messages without the system message; number 0 is the user's opening."""
        return self.messages[1:] if self.messages[0].role == 'system' else self.messages

    @property
    def opening(self) -> str:
        return self.spoken[0].content


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two replies to one prompt and a person's choice between them. `prompt` ends with a user message."""

    id: str
    source: str
    split: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise RowError('bad split', f'expected one of {SPLITS}, found {self.split!r}')
        _check_messages(self.prompt)
        if self.prompt[-1].role != 'user':
            raise RowError('bad prompt', f"expected it to end with a user message, found the {self.prompt[-1].role}'s")
        for field in ('chosen', 'rejected'):
            _check_text(getattr(self, field), field)
        if self.chosen == self.rejected:
            raise RowError('equal replies', f'expected chosen and rejected to differ, found {self.chosen[:60]!r} twice')

    @property
    def opening(self) -> str:
        """The first user text. Pairs that share it are not independent: splits and intervals group by it."""
        return next(message.content for message in self.prompt if message.role == 'user')


@dataclasses.dataclass(frozen=True)
class Example:
    """The start of one simulated conversation. With opening None the simulator writes the opening."""

    id: str
    opening: str | None
    intent: str | None
    persona_seed: int
    source: str
    split: str


def example_of(conversation: Conversation) -> Example:
    """Makes the example that a person's conversation starts from. The persona's seed is a hash of the id."""
    digest = hashlib.sha256(conversation.id.encode()).digest()
    return Example(
        id=conversation.id,
        opening=conversation.opening,
        intent=conversation.intent,
        persona_seed=int.from_bytes(digest[:4]) >> 1,
        source=conversation.source,
        split=conversation.split,
    )


def read_conversations(
    path: str | os.PathLike[str], *, on_bad_rows: OnBadRows = 'raise', check: Check | None = None
) -> tuple[list[Conversation], collections.Counter[str]]:
    """Reads a `.jsonl`, `.jsonl.gz` or `.parquet` file; also counts stripped texts and dropped rows.

    Args:
        on_bad_rows: 'raise' an error for the first bad row, or 'drop' and count bad rows.
        check: raises ValueError for a text that cannot be used, such as `Chat.check`; its row is a bad row.
    """
    return _read(path, Conversation, parse_conversation, on_bad_rows, check)


def read_preferences(
    path: str | os.PathLike[str], *, on_bad_rows: OnBadRows = 'raise', check: Check | None = None
) -> tuple[list[Preference], collections.Counter[str]]:
    """Reads preferences as `read_conversations` reads conversations."""
    return _read(path, Preference, parse_preference, on_bad_rows, check)


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Writes a file for `read_conversations`, atomically, in the format of its suffix."""
    write_rows(path, map(conversation_row, conversations))


def conversation_row(conversation: Conversation) -> dict[str, Any]:
    """The row of a conversation in a file."""
    c = conversation
    messages = [dataclasses.asdict(message) for message in c.messages]
    return {'id': c.id, 'source': c.source, 'split': c.split, 'end': c.end, 'intent': c.intent, 'messages': messages}


def write_preferences(path: str | os.PathLike[str], preferences: Iterable[Preference]) -> None:
    """Writes a file for `read_preferences`, atomically, in the format of its suffix."""
    write_rows(path, map(dataclasses.asdict, preferences))


def parse_conversation(row: Mapping[str, Any]) -> tuple[Conversation, int]:
    """Parses a conversation row; also counts its stripped texts. Raises `RowError`."""
    messages, stripped = _messages(row, 'messages')
    intent = row.get('intent')
    if intent is not None:
        intent, changed = _text(row, 'intent')
        stripped += changed
    end = row.get('end')
    conversation = Conversation(
        id=_name(row, 'id'),
        source=_name(row, 'source'),
        split=_name(row, 'split'),
        messages=messages,
        end='unknown' if end is None else end,
        intent=intent,
    )
    return conversation, stripped


def parse_preference(row: Mapping[str, Any]) -> tuple[Preference, int]:
    """Parses a preference row; also counts its stripped texts. Raises `RowError`."""
    prompt, stripped = _messages(row, 'prompt')
    chosen, chosen_changed = _text(row, 'chosen')
    rejected, rejected_changed = _text(row, 'rejected')
    preference = Preference(
        id=_name(row, 'id'),
        source=_name(row, 'source'),
        split=_name(row, 'split'),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
    )
    return preference, stripped + chosen_changed + rejected_changed


def _check_messages(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise RowError('unknown role', f'message {i}: expected one of {ROLES}, found {message.role!r}')
        _check_text(message.content, f'message {i}')
    start = 1 if messages and messages[0].role == 'system' else 0
    if not messages[start:]:
        roles = [message.role for message in messages]
        raise RowError('no messages', f'expected at least one user message, found {roles}')
    for i, message in enumerate(messages[start:]):
        expected = ('user', 'assistant')[i % 2]
        if message.role == expected:
            continue
        where = f'message {start + i}: expected role {expected!r}, found {message.role!r}'
        if message.role == 'system':
            raise RowError('system message after the start', where)
        raise RowError(f'two {message.role} messages in a row' if i else 'the assistant speaks first', where)


def _check_text(text: str, where: str) -> None:
    if not text:
        raise RowError('empty content', f'{where}: expected text, found none')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError('not Unicode', f'{where}: found half of a surrogate pair at {error.start}') from None


def _text(row: Mapping[str, Any], field: str, where: str = '') -> tuple[str, bool]:
    """Strips a text; also says whether that changed it."""
    value = _field(row, field, where)
    where += field
    if not isinstance(value, str):
        raise RowError('wrong type', f'{where}: expected a string, found {type(value).__name__}')
    text = value.strip()
    _check_text(text, where)
    return text, text != value


def _field(row: Mapping[str, Any], name: str, where: str = '', expected: str = 'a string') -> Any:
    if name not in row:
        raise RowError('missing field', f'{where}expected {name!r}, found only {sorted(row)}')
    if row[name] is None:  # in Parquet, also a field that only other rows have
        raise RowError('missing field', f'{where}{name}: expected {expected}, found null')
    return row[name]


def _name(row: Mapping[str, Any], field: str) -> str:
    value = _field(row, field)
    if not isinstance(value, str) or not value:
        raise RowError('wrong type', f'{field}: expected a string, found {value!r}')
    _check_text(value, field)
    return value


def _messages(row: Mapping[str, Any], field: str) -> tuple[tuple[Message, ...], int]:
    given = _field(row, field, expected='a list')
    if isinstance(given, Mapping):
        given = _transposed(given, field)
    if not isinstance(given, list) or not all(isinstance(message, Mapping) for message in given):
        raise RowError('wrong type', f'{field}: expected a list of objects, found {str(given)[:60]}')
    messages, stripped = [], 0
    for i, message in enumerate(given):
        where = f'message {i}: '
        content, changed = _text(message, 'content', where)
        truncated, cut = message.get('truncated') or False, message.get('truncated_chars') or 0
        if not isinstance(truncated, bool) or not isinstance(cut, int):
            raise RowError('wrong type', f'{where}expected truncated true or false and truncated_chars a number')
        messages.append(Message(role=_field(message, 'role', where), content=content, truncated=truncated or cut > 0))
        stripped += changed
    return tuple(messages), stripped


def _transposed(columns: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Makes objects of an object of lists, in which `datasets` stores a list of objects."""
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if len(set(map(len, lists.values()))) != 1:
        expected = 'a list of objects, or an object of lists of one length'
        raise RowError('wrong type', f'{field}: expected {expected}, found {str(columns)[:60]}')
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


_Record = TypeVar('_Record', Conversation, Preference)


def _read(
    path: str | os.PathLike[str],
    kind: type[_Record],
    parse: Callable[[Mapping[str, Any]], tuple[_Record, int]],
    on_bad_rows: OnBadRows,
    check: Check | None,
) -> tuple[list[_Record], collections.Counter[str]]:
    if on_bad_rows not in ('raise', 'drop'):
        raise ValueError(f"on_bad_rows: expected 'raise' or 'drop', found {on_bad_rows!r}")
    records: list[_Record] = []
    numbers: dict[str, int] = {}
    counts: collections.Counter[str] = collections.Counter()
    unit, rows = numbered_rows(pathlib.Path(path), [field.name for field in dataclasses.fields(kind)])
    for number, line in rows:
        try:
            record, stripped = parse(decode_row(line))
            if record.id in numbers:
                raise RowError('duplicate id', f'{record.id!r} is also at {unit} {numbers[record.id]}')
            if check is not None:
                _check_record(record, check)
        except RowError as error:
            if on_bad_rows == 'raise':
                raise RowError(error.reason, error.detail, f'{path}, {unit} {number}: ') from None
            counts[error.reason] += 1
            continue
        numbers[record.id] = number
        records.append(record)
        if stripped:
            counts[STRIPPED] += stripped
    return records, counts


def _check_record(record: Conversation | Preference, check: Check) -> None:
    if isinstance(record, Conversation):
        messages, texts = record.messages, {} if record.intent is None else {'intent': record.intent}
    else:
        messages, texts = record.prompt, {'chosen': record.chosen, 'rejected': record.rejected}
    texts = {f'message {i}': message.content for i, message in enumerate(messages)} | texts
    for where, text in texts.items():
        try:
            check(text)
        except ValueError as error:
            raise RowError('unusable text', f'{record.id!r}, {where}: {error}') from None
