"""WildChat's first pass: rules 1 to 4 of `wildchat`, which look at one row each, and the facts that the others need.

NGRAMS/                 in the folder of what is unfinished: n-grams of first messages, see `openings`
NGRAMS/reading.npz      the facts so far, and the place of the next row; written every CHECKPOINT_ROWS rows
"""

import array
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tqdm

from simrl.conversations import raw_rows, records
from simrl.conversations.openings import NgramFiles, opening_key
from simrl.conversations.raw_rows import RawData, read_time
from simrl.conversations.records import Conversation
from simrl.conversations.row_files import RowError
from simrl.conversations.splits import UserSplits, hash64
from simrl.run.stage_files import named_errors

Policy = Literal['keep', 'drop']

READING = 'reading.npz'
CHECKPOINT_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class WildChatSettings:
    """The conversations that stay, and their splits."""

    language: str = 'English'
    toxic: Policy = 'drop'  # conversations that the data set flags as toxic
    redacted: Policy = 'keep'  # conversations in which the data set replaced personal data by placeholders
    ngram: int = 7  # words
    max_openings: int = 100  # a conversation whose first message has an n-gram of more first messages is dropped
    splits: UserSplits = UserSplits()
    max_conversations: int | None = None  # at most so many, drawn by seed; None: all

    def __post_init__(self) -> None:
        for field in ('ngram', 'max_openings', 'max_conversations'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f'WildChatSettings.{field}: expected at least 1, found {getattr(self, field)}')


def first_user_text(messages: Any) -> str | None:
    """Text of the first user message of raw messages; None where there is none."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping) and message.get('role') == 'user':
            content = message.get('content')
            return content if isinstance(content, str) else None
    return None


def parse_row(row: Mapping[str, Any], settings: WildChatSettings, split: str = 'train') -> tuple[Conversation, int]:
    """Parses a row by rules 1 to 3; also counts its stripped texts.

    Raises:
        RowError: a rule drops it.
    """
    if row['language'] != settings.language:
        raise RowError(f'language is not {settings.language}', f'found {row["language"]!r}')
    for field in ('toxic', 'redacted'):
        flag = row[field]
        if getattr(settings, field) == 'drop' and flag is not False:
            if flag is not True:
                raise RowError('wrong type', f'{field}: expected true or false, found {flag!r}')
            raise RowError(field, 'expected false, found true')
    if not isinstance(row['hashed_ip'], str) or not row['hashed_ip']:
        raise RowError('no user', f'hashed_ip: expected a string, found {row["hashed_ip"]!r}')
    if row['timestamp'] is not None:
        read_time(row['timestamp'])
    messages = row['conversation']
    last = messages[-1] if isinstance(messages, list) and messages else None
    end = 'cut' if isinstance(last, Mapping) and last.get('role') == 'user' else 'natural'
    conversation, stripped = records.parse_conversation(
        {'id': row['conversation_hash'], 'source': 'wildchat', 'split': split, 'messages': messages, 'end': end}
    )
    said = sum(message.role == 'user' for message in conversation.messages)
    if row['turn'] is not None and row['turn'] != said:
        raise RowError('another number of turns', f'turn: expected {said}, found {row["turn"]!r}')
    return conversation, stripped


@dataclasses.dataclass(frozen=True)
class Facts:
    """One number a row of what is known before rows are compared.

    Attributes:
        fault: uint8 [rows], 0, or 1 + the index in `reasons` of the rule that drops the row.
        id: uint64 [rows], hash of the conversation hash. This and the next two are 0 where there is a fault.
        address: uint64 [rows], hash of the user's address.
        country: uint16 [rows], index in `countries`.
        reasons, countries: names.
        overlap: which tasks of WildBench open how many rows, in whatever language.
    """

    fault: np.ndarray
    id: np.ndarray
    address: np.ndarray
    country: np.ndarray
    reasons: tuple[str, ...]
    countries: tuple[str, ...]
    overlap: Mapping[int, int]


@dataclasses.dataclass
class _Reading:
    """Facts about the rows so far, as in `Facts`.

    Attributes:
        reasons, countries: indices by name.
        part, row: the place of the next row: which of the data's parts, and its number there.
    """

    fault: 'array.array[int]' = dataclasses.field(default_factory=lambda: array.array('B'))
    id: 'array.array[int]' = dataclasses.field(default_factory=lambda: array.array('Q'))
    address: 'array.array[int]' = dataclasses.field(default_factory=lambda: array.array('Q'))
    country: 'array.array[int]' = dataclasses.field(default_factory=lambda: array.array('H'))
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    countries: dict[str, int] = dataclasses.field(default_factory=dict)
    overlap: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    part: int = 0
    row: int = 0

    def add(
        self, row: Mapping[str, Any], settings: WildChatSettings, tasks: Collection[int], ngrams: NgramFiles
    ) -> None:
        """Applies rules 1 to 4 to the next row, and counts its n-grams if it passes."""
        opening = first_user_text(row['conversation'])
        is_task = opening is not None and (key := opening_key(opening)) in tasks
        if is_task:
            self.overlap[key] += 1
        try:
            conversation, _ = parse_row(row, settings)
            if is_task:
                raise RowError('first message of a WildBench task', conversation.opening[:60])
        except RowError as error:
            fault, values = 1 + self.reasons.setdefault(error.reason, len(self.reasons)), (0, 0, 0)
        else:
            fault, country = 0, self.countries.setdefault(_country(row), len(self.countries))
            values = hash64(conversation.id), hash64(row['hashed_ip']), country
            ngrams.add(len(self.fault), conversation.opening)
        for column, value in zip(self._columns(), (fault, *values), strict=True):
            column.append(value)

    def _columns(self) -> 'tuple[array.array[int], ...]':
        return self.fault, self.id, self.address, self.country

    def facts(self) -> Facts:
        fault, id_, address, country = map(np.array, self._columns())
        return Facts(fault, id_, address, country, tuple(self.reasons), tuple(self.countries), self.overlap)

    def save(self, path: pathlib.Path, lengths: Sequence[int]) -> None:
        """Keeps it, with the lengths of the files of n-grams."""
        names = {'reasons': [*self.reasons], 'countries': [*self.countries], 'overlap': [*self.overlap.items()]}
        plain = {**names, 'part': self.part, 'row': self.row, 'lengths': list(lengths)}
        write_arrays(path, plain, **{str(i): np.array(column) for i, column in enumerate(self._columns())})

    @classmethod
    def load(cls, path: pathlib.Path) -> 'tuple[_Reading, list[int] | None]':
        """Reads what was saved, and the lengths; nothing and None where nothing was."""
        reading = cls()
        if (stored := read_arrays(path)) is None:
            return reading, None
        plain, arrays = stored
        for i, column in enumerate(reading._columns()):
            column.frombytes(arrays[str(i)].tobytes())
        for indices, name in ((reading.reasons, 'reasons'), (reading.countries, 'countries')):
            indices.update({x: i for i, x in enumerate(plain[name])})
        reading.overlap.update(dict(plain['overlap']))
        reading.part, reading.row = plain['part'], plain['row']
        return reading, plain['lengths']


def read_facts(
    data: RawData, settings: WildChatSettings, tasks: Collection[int], folder: pathlib.Path
) -> tuple[Facts, NgramFiles]:
    """Applies rules 1 to 4, and counts the n-grams of the rows that pass; goes on after the last checkpoint.

    Args:
        folder: of n-grams and the checkpoint.
    """
    reading, lengths = _Reading.load(folder / READING)
    ngrams = NgramFiles(folder, settings.ngram, lengths)
    if reading.fault:
        print(f'reading: continues after {len(reading.fault):,} rows', flush=True)

    def rows() -> raw_rows.Rows:
        parts = data.parts()
        while reading.part < len(parts):
            for row in itertools.islice(parts[reading.part](), reading.row, None):
                yield row
                reading.row += 1
                if len(reading.fault) % CHECKPOINT_ROWS == 0:
                    reading.save(folder / READING, ngrams.kept_lengths())
            reading.part, reading.row = reading.part + 1, 0

    for row in shown(rows(), 'reading'):
        reading.add(row, settings, tasks, ngrams)
    return reading.facts(), ngrams


def _country(row: Mapping[str, Any]) -> str:
    return row['country'] if isinstance(row['country'], str) else 'unknown'


def write_arrays(path: pathlib.Path, plain: Mapping[str, Any], **arrays: Any) -> None:
    """Writes arrays and what is JSON beside them, atomically."""
    partial = path.with_name(path.name + '.partial')
    with named_errors(path), partial.open('wb') as file:
        np.savez(file, counts=np.array(json.dumps(plain)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_arrays(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return json.loads(str(stored['counts'])), {name: stored[name] for name in stored.files if name != 'counts'}


def shown(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """Shows progress on a terminal, and afterwards the rate."""
    begin, number = time.monotonic(), 0
    for number, row in enumerate(tqdm.tqdm(rows, name, unit=' rows', disable=None), start=1):  # noqa: B007
        yield row
    print(f'{name}: {number:,} rows, {number / max(time.monotonic() - begin, 1e-9):,.0f} rows/s', flush=True)
