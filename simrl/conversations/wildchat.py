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

The first pass over the data finds out which rows stay and their splits, the second writes them. What the first one has
found is kept in unfinished/ every 100,000 rows: after a kill it goes on there, without the files before, and
without the work on earlier rows of the same file, which are read again. A killed second pass starts anew.

A conversation ends naturally where the assistant had the last word (the data set has all that the user wrote), and is
cut where the last message is the user's.
"""

import collections
import dataclasses
import datetime
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from simrl.conversations import manifest, raw_rows, records
from simrl.conversations.openings import NgramFiles, opening_key
from simrl.conversations.raw_rows import HubParts, RawData, read_time
from simrl.conversations.records import SPLITS, STRIPPED
from simrl.conversations.row_files import write_rows
from simrl.conversations.splits import hash64, mix, split_users
from simrl.conversations.wildchat_facts import (
    Facts,
    WildChatSettings,
    first_user_text,
    parse_row,
    read_arrays,
    read_facts,
    shown,
    write_arrays,
)

SOURCE = 'allenai/WildChat-1M'
FIELDS = (
    *('conversation_hash', 'model', 'timestamp', 'conversation', 'turn', 'language'),
    *('toxic', 'redacted', 'country', 'hashed_ip'),
)
WILDBENCH, WILDBENCH_PARTS = 'allenai/WildBench', HubParts(splits=('test',), config='v2')
OUTPUT = 'conversations.jsonl.gz'
DECISIONS, NGRAMS = 'decisions.npz', 'ngrams'  # in unfinished/
DROPPED = -1  # beside indices into SPLITS


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
    facts, ngrams = read_facts(data, settings, tasks, unfinished / NGRAMS)
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
        for row, split in zip(shown(data.rows(), 'writing'), decisions.split, strict=True):
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

    write_rows(path, kept())
    return {
        **decisions.counts,
        'conversations': {name: splits[name] for name in SPLITS},
        STRIPPED: stripped,
        'period': [when.isoformat() for when in times],
    }


def _write_decisions(path: pathlib.Path, decisions: Decisions) -> None:
    write_arrays(path, decisions.counts, split=decisions.split)


def _read_decisions(path: pathlib.Path) -> Decisions | None:
    stored = read_arrays(path)
    return None if stored is None else Decisions(stored[1]['split'], stored[0])
