"""OASST1 and hh-rlhf as conversations and as choices between two replies, split by the opening.

Both data sets end wherever nobody wrote on, so the ends of conversations are unknown.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from simrl.conversations import manifest, raw_rows, records
from simrl.conversations.openings import opening_key
from simrl.conversations.raw_rows import HubParts
from simrl.conversations.records import SPLITS, Conversation, Preference
from simrl.conversations.row_files import RowError
from simrl.conversations.splits import SplitSettings, hash64, split_of

Row = Mapping[str, Any]
Counts = collections.Counter[str]
Built = tuple[list[Conversation], list[Preference]]

OASST1, HH_RLHF = 'OpenAssistant/oasst1', 'Anthropic/hh-rlhf'  # on the hub
OASST1_FIELDS = ('message_id', 'parent_id', 'message_tree_id', 'text', 'role', 'lang', 'deleted', 'rank')
OASST1_ROLES = {'prompter': 'user', 'assistant': 'assistant'}
UNRANKED = 10**6  # after every ranked reply
HH_ROLES = {'Human': 'user', 'Assistant': 'assistant'}
HH_HEADER = re.compile(r'\n\n(Human|Assistant):')
CONVERSATIONS, PREFERENCES = 'conversations.jsonl.gz', 'preferences.jsonl.gz'


@dataclasses.dataclass(frozen=True)
class Oasst1Settings:
    """The messages and pairs that stay."""

    language: str = 'en'
    pairs: Literal['all', 'best_and_worst'] = 'all'  # of the ranked replies to one message
    splits: SplitSettings = SplitSettings()


@dataclasses.dataclass(frozen=True)
class HHSettings:
    """The part of hh-rlhf that is read from the hub."""

    folder: str = 'helpful-base'
    splits: SplitSettings = SplitSettings()


def prepare_oasst1(
    source: str, output: pathlib.Path, settings: Oasst1Settings, *, revision: str | None = None
) -> dict[str, Any]:
    """Writes conversations, preferences and the manifest, which it returns.

    Raises:
        FileNotFoundError: no such data.
        ValueError: the data is damaged or of another schema, nothing stays, or `output` has other files.
    """
    parts = HubParts(splits=('train', 'validation'))
    data = raw_rows.open_data(source, OASST1_FIELDS, parts, revision)
    return _prepare('oasst1', source, output, settings, data, functools.partial(build_oasst1, settings=settings))


def prepare_hh_rlhf(
    source: str, output: pathlib.Path, settings: HHSettings, *, revision: str | None = None
) -> dict[str, Any]:
    """Writes conversations, preferences and the manifest as `prepare_oasst1` does."""
    parts = HubParts(splits=('train', 'test'), folder=settings.folder)
    data = raw_rows.open_data(source, ('chosen', 'rejected'), parts, revision)
    return _prepare('hh-rlhf', source, output, settings, data, functools.partial(build_hh_rlhf, settings=settings))


def _prepare(
    tool: str,
    source: str,
    output: pathlib.Path,
    settings: Oasst1Settings | HHSettings,
    data: raw_rows.RawData,
    build: Callable[[Iterable[Row], Counts], Built],
) -> dict[str, Any]:
    def make(_: pathlib.Path) -> dict[str, Any]:
        dropped: Counts = collections.Counter()
        conversations, preferences = build(data.rows(), dropped)
        if not conversations or not preferences:
            raise ValueError(f'{source}: expected conversations and pairs that stay, found none: {dict(dropped)}')
        records.write_conversations(output / CONVERSATIONS, conversations)
        records.write_preferences(output / PREFERENCES, preferences)
        counts = {'dropped': dict(sorted(dropped.items()))}
        for name, kept in (('conversations', conversations), ('preferences', preferences)):
            counts[name] = {split: sum(record.split == split for record in kept) for split in SPLITS}
        return counts

    return manifest.prepare(output, tool, settings, {'source': data.inputs}, make, (CONVERSATIONS, PREFERENCES))


def build_oasst1(rows: Iterable[Row], dropped: Counts, settings: Oasst1Settings) -> Built:
    """Builds one conversation a tree, its longest path, and pairs of ranked replies to one message.

    Of equally long paths that of the better ranked replies is taken. Deleted messages and those in another language are
    left out with all that answer them.

    Args:
        rows: messages in any order.
        dropped: counts messages, trees and pairs that are left out, by reason.
    """
    answers: dict[str | None, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row['deleted']:
            dropped['deleted message'] += 1
        elif row['lang'] != settings.language:
            dropped[f'language is not {settings.language}'] += 1
        else:
            answers[row['parent_id']].append(row)
    for found in answers.values():
        found.sort(key=_rank)
    paths: list[tuple[Row, ...]] = []
    queue: collections.deque[tuple[Row, ...]] = collections.deque((root,) for root in answers[None])
    while queue:
        paths.append(path := queue.popleft())
        queue += [(*path, row) for row in answers.get(path[-1]['message_id'], ())]
    if lost := sum(map(len, answers.values())) - len(paths):
        dropped['answer to a message that is left out'] += lost
    longest: dict[str, tuple[Row, ...]] = {}
    for path in sorted(paths, key=lambda path: (-len(path), *map(_rank, path))):
        longest.setdefault(path[0]['message_id'], path)
    conversations: list[Conversation] = []
    preferences: list[Preference] = []
    for tree, path in sorted(longest.items()):
        row = _head(tree, 'oasst1', path[0]['text'], settings.splits) | {'messages': _oasst1_messages(path)}
        _add(conversations, records.parse_conversation, row, dropped)
    for path in paths:
        ranked = [row for row in answers.get(path[-1]['message_id'], ()) if row['rank'] is not None]
        if len(ranked) < 2 or path[-1]['role'] != 'prompter':
            continue
        pairs = itertools.combinations(ranked, 2)
        for better, worse in pairs if settings.pairs == 'all' else [(ranked[0], ranked[-1])]:
            if better['rank'] == worse['rank']:
                dropped['replies of equal rank'] += 1
                continue
            name = f'{better["message_id"]}-{worse["message_id"]}'
            row = _head(name, 'oasst1', path[0]['text'], settings.splits)
            row |= {'prompt': _oasst1_messages(path), 'chosen': better['text'], 'rejected': worse['text']}
            _add(preferences, records.parse_preference, row, dropped)
    return conversations, preferences


def _rank(row: Row) -> tuple[int, str]:
    return (UNRANKED if row['rank'] is None else row['rank']), row['message_id']


def _oasst1_messages(path: Iterable[Row]) -> list[Row]:
    return [{'role': OASST1_ROLES.get(row['role'], row['role']), 'content': row['text']} for row in path]


def build_hh_rlhf(rows: Iterable[Row], dropped: Counts, settings: HHSettings) -> Built:
    """Builds a pair of every row, and a conversation of the longest chosen transcript of every opening.

    The data set has a conversation again for each of its replies, up to that reply, hence one an opening.

    Args:
        rows: chosen and rejected transcripts.
        dropped: counts rows and conversations that are left out, by reason.
    """
    preferences: dict[str, Preference] = {}
    longest: dict[int, tuple[int, str, Row]] = {}
    for row in rows:
        try:
            chosen, rejected = (_transcript(row[field], field) for field in ('chosen', 'rejected'))
            if chosen[:-1] != rejected[:-1] or chosen[-1]['role'] != 'assistant':
                raise RowError('transcripts differ before the last reply', row['chosen'][:60])
            name = f'hh-{hash64(row["chosen"] + row["rejected"]):016x}'
            head = _head(name, 'hh-rlhf', chosen[0]['content'], settings.splits)
            pair, _ = records.parse_preference(
                {**head, 'prompt': chosen[:-1], 'chosen': chosen[-1]['content'], 'rejected': rejected[-1]['content']}
            )
            if name in preferences:
                raise RowError('duplicate pair', row['chosen'][:60])
        except RowError as error:
            dropped[error.reason] += 1
            continue
        preferences[name] = pair
        candidate = (-len(chosen), name, {**head, 'messages': chosen})
        key = opening_key(pair.opening)
        if key in longest:
            dropped['another conversation with this opening'] += 1
        longest[key] = min(longest.get(key, candidate), candidate, key=lambda x: x[:2])
    conversations: list[Conversation] = []
    for _, _, found in sorted(longest.values(), key=lambda x: x[1]):
        _add(conversations, records.parse_conversation, found, dropped)
    return conversations, list(preferences.values())


def _transcript(text: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(text, str):
        raise RowError('wrong type', f'{field}: expected a string, found {text!r}')
    before, *rest = HH_HEADER.split(text)
    if before.strip() or not rest:
        raise RowError('no transcript', f'{field}: expected it to begin with "Human:", found {text[:60]!r}')
    return [{'role': HH_ROLES[name], 'content': content} for name, content in zip(rest[::2], rest[1::2], strict=True)]


def _head(name: str, source: str, opening: Any, settings: SplitSettings) -> dict[str, Any]:
    return {'id': name, 'source': source, 'split': split_of(opening_key(str(opening)), settings)}


def _add(kept: list[Any], parse: Callable[[Row], tuple[Any, int]], row: Row, dropped: Counts) -> None:
    try:
        kept.append(parse(row)[0])
    except RowError as error:
        dropped[error.reason] += 1
