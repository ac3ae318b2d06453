"""Rows in the schemas of WildChat and WildBench, and files of them."""

import datetime
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

WHEN = datetime.datetime(2023, 4, 9, 0, 2, 53, tzinfo=datetime.UTC)
MODERATION = [{'categories': {'harassment': False, 'hate': False}, 'flagged': False}]
HEADER = {'accept-language': 'en-US', 'user-agent': 'Mozilla'}


def raw_message(role: str, content: str | None, number: int = 0) -> dict[str, Any]:
    """A message with all that WildChat has beside role and content."""
    return {
        'content': content,
        'country': 'France',
        'hashed_ip': 'in a message',
        'header': HEADER,
        'language': 'English',
        'redacted': False,
        'role': role,
        'state': 'Paris',
        'timestamp': WHEN if role == 'assistant' else None,
        'toxic': False,
        'turn_identifier': number,
    }


def raw_row(
    name: str, *contents: str | None, user: str = 'alice', country: str | None = 'France', **fields: Any
) -> dict:
    """A conversation whose contents are the user's and the assistant's in turn."""
    messages = [raw_message(('user', 'assistant')[i % 2], content, i) for i, content in enumerate(contents)]
    return {
        'conversation_hash': name,
        'model': 'gpt-4',
        'timestamp': WHEN,
        'conversation': messages,
        'turn': (len(messages) + 1) // 2,
        'language': 'English',
        'openai_moderation': MODERATION,
        'detoxify_moderation': [{'toxicity': 0.5}],
        'toxic': False,
        'redacted': False,
        'state': 'Paris',
        'country': country,
        'hashed_ip': user,
        'header': HEADER,
    } | fields


def write_parquet(path: pathlib.Path, rows: Sequence[dict], **times: Any) -> pathlib.Path:
    """Writes rows; `timestamp`, where given, is the Arrow type of that column."""
    table = pyarrow.Table.from_pylist(list(rows))
    for name, kind in times.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, table.column(i).cast(kind))
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def write_jsonl(path: pathlib.Path, rows: Sequence[dict]) -> pathlib.Path:
    lines = b''.join(json.dumps(row, default=str).encode() + b'\n' for row in rows)
    path.write_bytes(gzip.compress(lines) if path.suffix == '.gz' else lines)
    return path


def wildbench_row(opening: str) -> dict:
    messages = [{'role': 'user', 'content': opening, 'language': 'English', 'redacted': False, 'toxic': False}]
    return {'id': opening[:8], 'session_id': opening[:8], 'conversation_input': messages, 'checklist': ['Is it right?']}


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).split(b'\n') if line]
