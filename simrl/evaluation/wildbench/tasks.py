"""Tasks of WildBench v2, and their overlap with training data.

A task is a conversation that ends with a user's message, a checklist for the reply to it, and tags of what it is about.
The benchmark sums tags up into five groups.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.conversations.openings import opening_key
from simrl.conversations.raw_rows import open_data
from simrl.conversations.records import STRIPPED, Conversation, Message, OnBadRows, parse_conversation
from simrl.conversations.row_files import RowError
from simrl.conversations.splits import hash64
from simrl.conversations.wildchat import WILDBENCH, WILDBENCH_PARTS

SOURCE = WILDBENCH
NO_TASK = 'no task'  # the cause of what is left out with a dropped row
NOT_MEASURED = 'not measured'  # the overlap without training data to compare with, which is none of 0
FIELDS = ('session_id', 'conversation_input', 'checklist', 'primary_tag', 'secondary_tags')
CREATIVE, PLANNING, MATH = 'Creative Tasks', 'Planning & Reasoning', 'Math & Data Analysis'
INFORMATION, CODING = 'Information/Advice seeking', 'Coding & Debugging'
GROUPS = {  # by tag
    **dict.fromkeys(('Creative Writing', 'Editing', 'Brainstorming', 'Role playing', 'Others'), CREATIVE),
    **dict.fromkeys(('Planning', 'Reasoning'), PLANNING),
    **dict.fromkeys(('Math', 'Data Analysis'), MATH),
    **dict.fromkeys(('Information seeking', 'Advice seeking'), INFORMATION),
    'Coding & Debugging': CODING,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        conversation: its id is the task's session_id; the last message is the user's.
        checklist: questions about the reply that a good one lets answer with yes.
        primary_tag: a key of `GROUPS`.
        groups: of all its tags, each once, the primary tag's first.
    """

    conversation: Conversation
    checklist: tuple[str, ...]
    primary_tag: str
    groups: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.conversation.id

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages

    @property
    def fingerprint(self) -> str:
        """A hash of the conversation and the checklist: verdicts of other tasks under this id differ in it."""
        whole = [*((message.role, message.content) for message in self.messages), self.checklist]
        return f'{hash64(json.dumps(whole)):016x}'


def read_tasks(
    source: str = SOURCE, *, on_bad_rows: OnBadRows = 'raise', revision: str | None = None
) -> tuple[dict[str, Task], collections.Counter[str], frozenset[str]]:
    """Reads tasks by id, from the hub or local files; also counts stripped texts and dropped rows by reason.

    Last come the ids of dropped rows, to which result files may have replies.

    Args:
        source: a hub name, or a .jsonl, .jsonl.gz or .parquet file in WildBench's schema, or a folder of them.
        on_bad_rows: 'drop' counts rows that are no tasks, among them those without a checklist.
        revision: of a source on the hub.

    Raises:
        RowError: a row is no task, or its id is also another's; it names the row and the field.
        ValueError: there is no task.
    """
    tasks: dict[str, Task] = {}
    counts, dropped = collections.Counter[str](), set[str]()
    for number, row in enumerate(open_data(source, FIELDS, WILDBENCH_PARTS, revision).rows(), start=1):
        try:
            task, stripped = parse_task(row)
            if task.id in tasks:
                raise RowError('duplicate id', f'session_id: expected another in each row, found {task.id!r} again')
        except RowError as error:
            if on_bad_rows == 'raise':
                raise RowError(error.reason, error.detail, f'{source}, row {number}: ') from None
            counts[error.reason] += 1
            dropped.add(str(row['session_id']))
            continue
        tasks[task.id] = task
        counts[STRIPPED] += stripped
    if not tasks:
        raise ValueError(f'{source}: expected at least one task, found none; rows dropped: {dict(counts)}')
    return tasks, +counts, frozenset(dropped - tasks.keys())


def parse_task(row: Mapping[str, Any]) -> tuple[Task, int]:
    """Parses a row; also counts its stripped texts.

    Raises:
        RowError: a field is missing or wrong; it names the field.
    """
    conversation, stripped = parse_conversation(
        {'id': row['session_id'], 'source': 'wildbench', 'split': 'test', 'messages': row['conversation_input']}
    )
    if (last := conversation.messages[-1].role) != 'user':
        raise RowError('no question', f"conversation_input: expected it to end with a user message, found the {last}'s")
    items, secondary = (_texts(row, field) for field in ('checklist', 'secondary_tags'))
    if not items:
        raise RowError('no checklist', 'checklist: expected at least one item, found none')
    tags = _texts({'primary_tag': [row['primary_tag']]}, 'primary_tag') + secondary
    if unknown := [tag for tag in tags if tag not in GROUPS]:
        raise RowError('unknown tag', f'expected tags of {", ".join(sorted(GROUPS))}, found {unknown[0]!r}')
    groups = dict.fromkeys(GROUPS[tag] for tag in tags)
    return Task(conversation, tuple(items), tags[0], tuple(groups)), stripped


def _texts(row: Mapping[str, Any], field: str) -> list[str]:
    """A list of texts that are not empty; null is an empty list."""
    values = [] if row[field] is None else row[field]
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise RowError('wrong type', f'{field}: expected texts that are not empty, found {str(values)[:60]}')
    return values


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Tasks whose first user message is also that of a training conversation, but for case and white space.

    WildBench is made of conversations of WildChat, so a simulator or assistant that was trained on them may have met a
    task. Ids do not tell: the data sets share none.

    Attributes:
        conversations: number of the training conversations.
        ids: of those tasks, in their order.
    """

    conversations: int
    ids: tuple[str, ...]

    def others(self, values: Mapping[str, float]) -> list[float]:
        """The values of the other tasks."""
        return [value for name, value in values.items() if name not in self.ids]

    def result(self, without: Any) -> dict[str, Any]:
        """The overlap as results have it.

        Args:
            without: the metric over the other tasks, a dataclass.
        """
        return {**dataclasses.asdict(self), 'tasks': len(self.ids), 'without them': dataclasses.asdict(without)}


def overlap_of(tasks: Mapping[str, Task], openings: Sequence[str]) -> Overlap:
    """The overlap with training conversations, of which these are the first user messages.

    Raises:
        ValueError: there is no conversation: that is no overlap of 0, but none that was measured.
    """
    if not openings:
        raise ValueError('overlap: expected at least one training conversation, found none')
    known = {opening_key(text) for text in openings}
    ids = tuple(task.id for task in tasks.values() if opening_key(task.conversation.opening) in known)
    return Overlap(len(openings), ids)


def by_group(tasks: Mapping[str, Task], values: Mapping[str, float]) -> dict[str, list[float]]:
    """The values of tasks by group; a task counts in each of its groups. Groups without a value are left out."""
    found: dict[str, list[float]] = {group: [] for group in dict.fromkeys(GROUPS.values())}
    for name, value in values.items():
        for group in tasks[name].groups:
            found[group].append(value)
    return {group: numbers for group, numbers in found.items() if numbers}


def check_known(tasks: Mapping[str, Task], names: Sequence[str], where: str) -> None:
    """Raises ValueError for ids that occur twice, or that no task has."""
    counted = collections.Counter(names)
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f'{where}: expected each session_id once, found {twice[0]!r} {counted[twice[0]]} times')
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(
            f'{where}: expected session_ids of the tasks, found {len(unknown)} others, for instance {unknown[0]!r}'
        )
