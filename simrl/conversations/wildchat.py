"""WildChat as conversations: English, without duplicates and WildBench's tasks, split by user.

Rules, in this order; a dropped row counts under the first that drops it:

1. its language is not the one of the settings;
2. it is toxic or redacted, where the settings drop these;
3. its user, hash, time or messages are unusable: no messages, an empty one, roles that do not alternate, or another
   number of user messages than `turn` says;
4. its first user message is that of a WildBench task;
5. an earlier row that passed 1 to 4 has its conversation hash;
6. its first user message has an n-gram that is in more than `max_openings` first user messages of rows that passed 1
   to 5;
7. a draw of `max_conversations`, after users are split, so that the draw changes no split.

The first pass over the data finds out which rows stay and their splits, the second writes them. A killed first pass
starts anew; a finished one is kept in unfinished/, so that only the second pass is repeated.

A conversation ends naturally where the assistant had the last word (the data set has all that the user wrote), and is
cut where the last message is the user's.
"""

import array
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import tqdm

from simrl.conversations import manifest, raw_rows, records
from simrl.conversations.openings import NgramFiles, opening_key
from simrl.conversations.raw_rows import HubParts, RawData, read_time
from simrl.conversations.records import SPLITS, STRIPPED, Conversation, RowError
from simrl.conversations.splits import UserSplits, hash64, mix, split_users
from simrl.run.stage_files import named_errors

Policy = Literal['keep', 'drop']

SOURCE = 'allenai/WildChat-1M'
FIELDS = (
    *('conversation_hash', 'model', 'timestamp', 'conversation', 'turn', 'language'),
    *('toxic', 'redacted', 'country', 'hashed_ip'),
)
WILDBENCH, WILDBENCH_PARTS = 'allenai/WildBench', HubParts(splits=('test',), config='v2')
OUTPUT = 'conversations.jsonl.gz'
DECISIONS, NGRAMS = 'decisions.npz', 'ngrams'  # in unfinished/
DROPPED = -1  # beside indices into SPLITS


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


def prepare(
    source: str,
    output: pathlib.Path,
    settings: WildChatSettings = WildChatSettings(),
    *,
    wildbench: str | None = WILDBENCH,
    revision: str | None = None,
) -> dict[str, Any]:
    """Writes conversations.jsonl.gz and manifest.json, which it returns; the same command resumes.

    Args:
        source: a hub name, a file or a folder in WildChat's schema.
        wildbench: the tasks whose conversations are left out, in WildBench's schema; None: leaves none out.
        revision: of a source on the hub.

    Raises:
        FileNotFoundError: no such data.
        ValueError: the data is damaged or of another schema, no conversation stays, or `output` has other files.
    """
    data = raw_rows.open_data(source, FIELDS, HubParts(), revision)
    inputs, tasks = {'source': data.inputs}, set[int]()
    if wildbench is not None:
        of_wildbench = raw_rows.open_data(wildbench, ('conversation_input',), WILDBENCH_PARTS)
        inputs['wildbench'] = of_wildbench.inputs
        tasks = {opening_key(_task_opening(row)) for row in of_wildbench.rows()}
        if not tasks:
            raise ValueError(f'{wildbench}: expected at least one task, found none')

    def make(unfinished: pathlib.Path) -> dict[str, Any]:
        decisions = _read_decisions(unfinished / DECISIONS)
        if decisions is None:
            decisions = _first_pass(source, data, unfinished, settings, tasks)
            _write_decisions(unfinished / DECISIONS, decisions)
        shutil.rmtree(unfinished / NGRAMS, ignore_errors=True)
        return _second_pass(data, output / OUTPUT, decisions, settings)

    return manifest.prepare(output, 'wildchat', settings, inputs, make, [OUTPUT])


def _task_opening(row: Mapping[str, Any]) -> str:
    opening = first_user_text(row['conversation_input'])
    if opening is None:
        raise ValueError(f'WildBench: expected a user message in conversation_input, found {str(row)[:100]}')
    return opening


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


def read_facts(
    rows: Iterable[Mapping[str, Any]], settings: WildChatSettings, tasks: Collection[int], ngrams: NgramFiles
) -> Facts:
    """Applies rules 1 to 4, and counts the n-grams of the rows that pass."""
    fault, country = array.array('B'), array.array('H')
    id_, address = array.array('Q'), array.array('Q')
    reasons: dict[str, int] = {}
    countries: dict[str, int] = {}
    overlap: collections.Counter[int] = collections.Counter()
    for number, row in enumerate(rows):
        opening = first_user_text(row['conversation'])
        is_task = opening is not None and (key := opening_key(opening)) in tasks
        if is_task:
            overlap[key] += 1
        try:
            conversation, _ = parse_row(row, settings)
            if is_task:
                raise RowError('first message of a WildBench task', conversation.opening[:60])
        except RowError as error:
            fault.append(1 + reasons.setdefault(error.reason, len(reasons)))
            values = (0, 0, 0)
        else:
            fault.append(0)
            name = _country(row)
            values = hash64(conversation.id), hash64(row['hashed_ip']), countries.setdefault(name, len(countries))
            ngrams.add(number, conversation.opening)
        for column, value in zip((id_, address, country), values, strict=True):
            column.append(value)
    return Facts(
        np.array(fault), np.array(id_), np.array(address), np.array(country), tuple(reasons), tuple(countries), overlap
    )


def _country(row: Mapping[str, Any]) -> str:
    return row['country'] if isinstance(row['country'], str) else 'unknown'


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The outcome of the first pass.

    Attributes:
        split: int8 [rows], an index into SPLITS, or DROPPED.
        counts: for the manifest.
    """

    split: np.ndarray
    counts: Mapping[str, Any]


def decide(facts: Facts, settings: WildChatSettings, ngrams: NgramFiles) -> Decisions:
    """Applies rules 5 to 7, and splits the users of the rows that stay."""
    dropped = {reason: int(np.sum(facts.fault == i)) for i, reason in enumerate(facts.reasons, start=1)}
    stays = facts.fault == 0
    duplicate = stays.copy()
    passed = np.flatnonzero(stays)
    duplicate[passed[np.unique(facts.id[passed], return_index=True)[1]]] = False
    stays &= ~duplicate
    frequent = ngrams.frequent_rows(stays, settings.max_openings)
    stays &= ~frequent
    split = np.full(len(stays), DROPPED, np.int8)
    split[stays] = split_users(facts.address[stays], facts.country[stays], facts.countries, settings.splits)
    undrawn = np.zeros(len(stays), bool)
    if settings.max_conversations is not None:
        order = mix(facts.id ^ np.uint64(settings.splits.seed))[passed := np.flatnonzero(stays)].argsort()
        undrawn[passed[order[settings.max_conversations :]]] = True
    stays &= ~undrawn
    split[undrawn] = DROPPED
    reasons = ('duplicate conversation', 'frequent first message', 'not drawn')
    for reason, rows in zip(reasons, (duplicate, frequent, undrawn), strict=True):
        if rows.any():
            dropped[reason] = int(rows.sum())
    pairs = np.unique(np.stack([facts.address[stays], split[stays].astype(np.uint64)]), axis=1)
    _, splits_of_address = np.unique(pairs[0], return_counts=True)
    counts = {
        'rows': len(stays),
        'kept': int(stays.sum()),
        'dropped': dict(sorted(dropped.items())),
        'addresses': {name: int(np.sum(pairs[1] == i)) for i, name in enumerate(SPLITS)},
        'addresses in several splits': int(np.sum(splits_of_address > 1)),
    }
    return Decisions(split, counts)


def _first_pass(
    source: str, data: RawData, unfinished: pathlib.Path, settings: WildChatSettings, tasks: set[int]
) -> Decisions:
    ngrams = NgramFiles(unfinished / NGRAMS, settings.ngram)
    facts = read_facts(_shown(data.rows(), 'reading'), settings, tasks, ngrams)
    decisions = decide(facts, settings, ngrams)
    if not decisions.counts['kept']:
        raise ValueError(
            f'{source}: expected conversations that pass all rules, found none: {decisions.counts["dropped"]}'
        )
    found = {'tasks': len(tasks), 'tasks found': len(facts.overlap), 'rows': sum(facts.overlap.values())}
    return dataclasses.replace(decisions, counts={**decisions.counts, 'wildbench': found if tasks else None})


def _second_pass(data: RawData, path: pathlib.Path, decisions: Decisions, settings: WildChatSettings) -> dict[str, Any]:
    """Writes the rows that stay."""
    splits: collections.Counter[str] = collections.Counter()
    times: list[datetime.datetime] = []
    stripped = 0

    def kept() -> Iterator[dict[str, Any]]:
        nonlocal stripped
        for row, split in zip(_shown(data.rows(), 'writing'), decisions.split, strict=True):
            if split == DROPPED:
                continue
            conversation, changed = parse_row(row, settings, SPLITS[split])
            when = None if row['timestamp'] is None else read_time(row['timestamp'])
            if when is not None:
                times[:] = [min([when, *times]), max([when, *times])]
            stripped += changed
            splits[conversation.split] += 1
            yield records.conversation_row(conversation) | {
                'user': f'{hash64(row["hashed_ip"]):016x}',
                'country': row['country'],
                'model': row['model'],
                'timestamp': None if when is None else when.isoformat(),
            }

    records.write_rows(path, kept())
    return {
        **decisions.counts,
        'conversations': {name: splits[name] for name in SPLITS},
        STRIPPED: stripped,
        'period': [when.isoformat() for when in times],
    }


def _write_decisions(path: pathlib.Path, decisions: Decisions) -> None:
    partial = path.with_name(path.name + '.partial')
    with named_errors(path), partial.open('wb') as file:
        np.savez(file, split=decisions.split, counts=np.array(json.dumps(decisions.counts)))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_decisions(path: pathlib.Path) -> Decisions | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return Decisions(stored['split'], json.loads(str(stored['counts'])))


def _shown(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """Shows progress on a terminal, and afterwards the rate."""
    begin, number = time.monotonic(), 0
    for number, row in enumerate(tqdm.tqdm(rows, name, unit=' rows', disable=None), start=1):  # noqa: B007
        yield row
    print(f'{name}: {number:,} rows, {number / max(time.monotonic() - begin, 1e-9):,.0f} rows/s', flush=True)
