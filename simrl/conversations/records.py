"""Conversations, preferences and examples as validated records; JSONL and Parquet (as of `datasets`) in and out.

A conversation row is `{id, source, split, messages: [{role, content, truncated?}], end?, intent?}`, a preference row
`{id, source, split, prompt: [{role, content}], chosen, rejected}`. Other keys of a row or a message are ignored, except
`truncated_chars` of a message, by which data sets say how much they cut off.

Readers are strict: the first bad row is an error that names its file and line. With `on_bad_rows='drop'` bad rows are
left out and counted by reason. Outer white space of texts is stripped, and counted.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pyarrow
import pyarrow.parquet

End = Literal['natural', 'cut', 'unknown']
OnBadRows = Literal['raise', 'drop']
Role = Literal['system', 'user', 'assistant']

ENDS = ('natural', 'cut', 'unknown')
ROLES = ('system', 'user', 'assistant')
SPLITS = ('train', 'dev', 'test')
STRIPPED = 'texts stripped of outer white space'  # the count's name beside the reasons for dropping


class RowError(ValueError):
    """A row that is not what it should be. `reason` is short and the same for all rows with this fault."""

    def __init__(self, reason: str, detail: str, place: str = '') -> None:
        super().__init__(f'{place}{reason}: {detail}')
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. `truncated`: the data set cut it off, so that its end is not where the speaker ended."""

    role: Role
    content: str
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a user and an assistant said, in turns that alternate from the user's opening, after any system message.

    Attributes:
        id: unique in its file.
        source: the data set it is from.
        split: 'train', 'dev' or 'test'.
        messages: an optional system message, then user, assistant, user, ...
        end: how it ended: 'natural', by the user; 'cut', by the collection; 'unknown'.
        intent: what the user wanted, in one sentence, where known.
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
        _check_turns(self.messages)

    @property
    def system(self) -> str | None:
        """The text of the leading system message, if there is one."""
        return self.messages[0].content if self.messages[0].role == 'system' else None

    @property
    def spoken(self) -> tuple[Message, ...]:
        """The turns without the system message: number 0 is the user's opening."""
        return self.messages[1:] if self.messages[0].role == 'system' else self.messages

    @property
    def opening(self) -> str:
        return self.spoken[0].content


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two replies to one prompt, of which a person chose the first. `prompt` ends with a user turn."""

    id: str
    source: str
    split: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise RowError('bad split', f'expected one of {SPLITS}, found {self.split!r}')
        _check_turns(self.prompt)
        if self.prompt[-1].role != 'user':
            raise RowError('bad prompt', f"expected it to end with a user turn, found the {self.prompt[-1].role}'s")
        for field in ('chosen', 'rejected'):
            _check_text(getattr(self, field), field)
        if self.chosen == self.rejected:
            raise RowError('equal replies', f'expected chosen and rejected to differ, found {self.chosen[:60]!r} twice')

    @property
    def opening(self) -> str:
        """The first user text: pairs that share it are not independent, so splits and intervals go by it."""
        return next(turn.content for turn in self.prompt if turn.role == 'user')


@dataclasses.dataclass(frozen=True)
class Example:
    """What one simulated conversation starts from. Without an opening the simulator writes it."""

    id: str
    opening: str | None
    intent: str | None
    persona_seed: int
    source: str
    split: str


def example_of(conversation: Conversation) -> Example:
    """The start of a person's conversation. The persona's seed is a hash of the id, the same in every run."""
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
    path: str | os.PathLike[str], *, on_bad_rows: OnBadRows = 'raise'
) -> tuple[list[Conversation], collections.Counter[str]]:
    """The conversations of a `.jsonl`, `.jsonl.gz` or `.parquet` file, and counts of what was stripped or dropped."""
    return _read(path, parse_conversation, on_bad_rows)


def read_preferences(
    path: str | os.PathLike[str], *, on_bad_rows: OnBadRows = 'raise'
) -> tuple[list[Preference], collections.Counter[str]]:
    """The preferences of a `.jsonl`, `.jsonl.gz` or `.parquet` file, and counts of what was stripped or dropped."""
    return _read(path, parse_preference, on_bad_rows)


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Writes what `read_conversations` reads; the suffix says the format. A file appears whole or not at all."""
    _write(
        path,
        [
            {
                'id': c.id,
                'source': c.source,
                'split': c.split,
                'end': c.end,
                'intent': c.intent,
                'messages': [dataclasses.asdict(turn) for turn in c.messages],
            }
            for c in conversations
        ],
    )


def write_preferences(path: str | os.PathLike[str], preferences: Iterable[Preference]) -> None:
    """Writes what `read_preferences` reads; the suffix says the format. A file appears whole or not at all."""
    _write(path, [dataclasses.asdict(preference) for preference in preferences])


def parse_conversation(row: Mapping[str, Any]) -> tuple[Conversation, int]:
    """A conversation row as a record, and how many of its texts were stripped. Raises `RowError`."""
    turns, stripped = _turns(row, 'messages')
    intent = row.get('intent')
    if intent is not None:
        intent, changed = _text(intent, 'intent')
        stripped += changed
    end = row.get('end')
    conversation = Conversation(
        id=_name(row, 'id'),
        source=_name(row, 'source'),
        split=_name(row, 'split'),
        messages=turns,
        end='unknown' if end is None else end,
        intent=intent,
    )
    return conversation, stripped


def parse_preference(row: Mapping[str, Any]) -> tuple[Preference, int]:
    """A preference row as a record, and how many of its texts were stripped. Raises `RowError`."""
    prompt, stripped = _turns(row, 'prompt')
    chosen, chosen_changed = _text(_field(row, 'chosen'), 'chosen')
    rejected, rejected_changed = _text(_field(row, 'rejected'), 'rejected')
    preference = Preference(
        id=_name(row, 'id'),
        source=_name(row, 'source'),
        split=_name(row, 'split'),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
    )
    return preference, stripped + chosen_changed + rejected_changed


def _check_turns(turns: Sequence[Message]) -> None:
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise RowError('unknown role', f'message {i}: expected one of {ROLES}, found {turn.role!r}')
        _check_text(turn.content, f'message {i}')
    start = 1 if turns and turns[0].role == 'system' else 0
    spoken = turns[start:]
    if not spoken:
        raise RowError('no messages', f'expected at least one user turn, found {[turn.role for turn in turns]}')
    for i, turn in enumerate(spoken):
        expected = ('user', 'assistant')[i % 2]
        if turn.role == expected:
            continue
        where = f'message {start + i}: expected role {expected!r}, found {turn.role!r}'
        if turn.role == 'system':
            raise RowError('system message after the start', where)
        raise RowError(f'two {turn.role} turns in a row' if i else 'the assistant speaks first', where)


def _check_text(text: str, where: str) -> None:
    if not text:
        raise RowError('empty content', f'{where}: expected text, found none')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError('not Unicode', f'{where}: found half of a surrogate pair at {error.start}') from None


def _text(value: Any, where: str) -> tuple[str, bool]:
    """The text stripped, and whether that changed it."""
    if not isinstance(value, str):
        raise RowError('wrong type', f'{where}: expected a string, found {type(value).__name__}')
    text = value.strip()
    _check_text(text, where)
    return text, text != value


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError('missing field', f'expected {name!r}, found only {sorted(row)}')
    return row[name]


def _name(row: Mapping[str, Any], field: str) -> str:
    value = _field(row, field)
    if not isinstance(value, str) or not value:
        raise RowError('wrong type', f'{field}: expected a string, found {value!r}')
    return value


def _turns(row: Mapping[str, Any], field: str) -> tuple[tuple[Message, ...], int]:
    messages = _field(row, field)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RowError('wrong type', f'{field}: expected a list of objects, found {str(messages)[:60]}')
    turns, stripped = [], 0
    for i, message in enumerate(messages):
        content, changed = _text(_field(message, 'content'), f'message {i}')
        truncated, cut = message.get('truncated') or False, message.get('truncated_chars') or 0
        if not isinstance(truncated, bool) or not isinstance(cut, int):
            raise RowError('wrong type', f'message {i}: expected truncated true or false and truncated_chars a number')
        turns.append(Message(role=_field(message, 'role'), content=content, truncated=truncated or cut > 0))
        stripped += changed
    return tuple(turns), stripped


_Record = TypeVar('_Record', Conversation, Preference)


def _read(
    path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any]], tuple[_Record, int]], on_bad_rows: OnBadRows
) -> tuple[list[_Record], collections.Counter[str]]:
    if on_bad_rows not in ('raise', 'drop'):
        raise ValueError(f"on_bad_rows: expected 'raise' or 'drop', found {on_bad_rows!r}")
    records: list[_Record] = []
    places: dict[str, int] = {}
    counts: collections.Counter[str] = collections.Counter()
    place_name, rows = _rows(pathlib.Path(path))
    for number, line in rows:
        try:
            record, stripped = parse(_decode(line))
            if record.id in places:
                raise RowError('duplicate id', f'{record.id!r} is also at {place_name} {places[record.id]}')
        except RowError as error:
            if on_bad_rows == 'raise':
                raise RowError(error.reason, error.detail, f'{path}, {place_name} {number}: ') from None
            counts[error.reason] += 1
            continue
        places[record.id] = number
        records.append(record)
        if stripped:
            counts[STRIPPED] += stripped
    return records, counts


def _rows(path: pathlib.Path) -> tuple[str, Iterator[tuple[int, bytes | Mapping[str, Any]]]]:
    """What a place in the file is called, and its rows with their places, from 1."""
    if path.suffix == '.parquet':
        return 'row', _parquet_rows(path)
    if path.name.endswith('.jsonl'):
        return 'line', _lines(path, path.open('rb'))
    if path.name.endswith('.jsonl.gz'):
        return 'line', _lines(path, gzip.open(path))
    raise ValueError(f'{path}: expected a name that ends in .jsonl, .jsonl.gz or .parquet')


def _lines(path: pathlib.Path, file: Any) -> Iterator[tuple[int, bytes]]:
    number = 0
    with file:
        try:  # bytes are split at "\n" alone; text would also be split at U+2028, which occurs inside strings
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path}: the compressed file is damaged after line {number}: {error}') from error


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    with path.open('rb') as file:
        # Arrow tells of damage by whichever of these the damaged part leads to, and never names the file.
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise ValueError(f'{path}: not a Parquet file, or damaged after row {number}: {error}') from error


def _decode(line: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(line, Mapping):
        return line
    try:
        row = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise RowError('not JSON', f'{error}, found {line[:60]!r}') from None
    if not isinstance(row, dict):
        raise RowError('not JSON', f'expected an object, found {line[:60]!r}')
    return row


def _write(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    path = pathlib.Path(path)
    if path.suffix != '.parquet' and not path.name.endswith(('.jsonl', '.jsonl.gz')):
        raise ValueError(f'{path}: expected a name that ends in .jsonl, .jsonl.gz or .parquet')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.partial')
    try:
        with partial.open('wb') as file:
            if path.suffix == '.parquet':
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            elif path.suffix == '.gz':
                with gzip.GzipFile(filename='', mode='wb', fileobj=file, mtime=0) as zipped:  # equal rows, equal bytes
                    zipped.writelines(_json_lines(rows))
            else:
                file.writelines(_json_lines(rows))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    return (json.dumps(row, ensure_ascii=False).encode() + b'\n' for row in rows)
