"""Rows of JSONL and Parquet files: read with their numbers, written atomically.

A file's name ends in one of `SUFFIXES`, which says how its rows are stored.
"""

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from simrl.run.stage_files import named_errors

SUFFIXES = ('.parquet', '.jsonl', '.jsonl.gz')
MESSAGE_FIELDS = ('role', 'content', 'truncated', 'truncated_chars')  # the columns of messages that are read
PARQUET_ROWS = 1000  # rows of a Parquet file that are in memory at once
# Bytes of a column that are read at once. Without it, all of a row group's are, and pandas writes one row group.
PARQUET_BUFFER = 2**20


class RowError(ValueError):
    """An invalid row. `reason` is a short text, equal for all rows with this fault."""

    def __init__(self, reason: str, detail: str, row: str = '') -> None:
        super().__init__(f'{row}{reason}: {detail}')
        self.reason = reason
        self.detail = detail


def numbered_rows(
    path: pathlib.Path, fields: Sequence[str]
) -> tuple[str, Iterator[tuple[int, bytes | Mapping[str, Any]]]]:
    """Reads rows with their numbers, counted from 1; also the word for such a number: 'line' or 'row'.

    Each is for `decode_row`. Of a Parquet file only the columns `fields` are read; others are None.
    """
    suffix = _suffix(path)
    if suffix == '.parquet':
        return 'row', _parquet_rows(path, fields)
    return 'line', _lines(path, path.open('rb') if suffix == '.jsonl' else gzip.open(path))


def _suffix(path: pathlib.Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise ValueError(f'{path}: expected a name that ends in .jsonl, .jsonl.gz or .parquet')


def _lines(path: pathlib.Path, file: Any) -> Iterator[tuple[int, bytes]]:
    number = 0
    with file:
        try:  # bytes split at "\n" only; text would also split at U+2028, which occurs inside strings
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path}: the compressed file is damaged after line {number}: {error}') from error


def _parquet_rows(path: pathlib.Path, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    with path.open('rb') as file:
        # Arrow raises any of these for a damaged file or an impossible value, and never names the file.
        try:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER)
            others = dict.fromkeys(name for name in parquet.schema_arrow.names if name not in fields)
            columns = _columns([parquet.schema.column(i).path for i in range(len(parquet.schema))], fields)
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for row in batch_rows(batch) if columns else [{}] * batch.num_rows:
                    number += 1
                    yield number, others | row
        except (pyarrow.ArrowException, ValueError, OSError, OverflowError) as error:
            raise ValueError(f'{path}: not a Parquet file, or damaged after row {number}: {error}') from error


def batch_rows(batch: Any) -> list[dict[str, Any]]:
    """Rows of an Arrow batch. Times are cut to microseconds, as Python's are."""
    for i, field in enumerate(batch.schema):
        if (kind := _in_microseconds(field.type)) != field.type:
            batch = batch.set_column(i, field.name, batch.column(i).cast(kind, safe=False))
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _in_microseconds(kind: Any) -> Any:
    """An Arrow type with every time of nanoseconds in it, however deep, as one of microseconds."""
    if pyarrow.types.is_timestamp(kind) and kind.unit == 'ns':
        return pyarrow.timestamp('us', kind.tz)
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_in_microseconds(field.type)) for field in kind])
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        make = pyarrow.list_ if pyarrow.types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    return kind


def _columns(paths: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Chooses the columns of `fields`, and of messages those that a message has."""
    columns: list[str] = []
    for field in fields:
        of_field = [path for path in paths if path.split('.')[0] == field]
        # Where messages are a list of objects, their fields' names are as deep as their shortest path: messages.list.
        # element.role. Any other column is read whole.
        depth = min((path.count('.') for path in of_field), default=0)
        of_message = [path for path in of_field if path.split('.')[depth] in MESSAGE_FIELDS]
        columns += of_message or of_field
    return columns


def decode_row(line: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """Parses a row of `raw_rows`. Raises `RowError` for one that is no JSON object."""
    if isinstance(line, Mapping):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, or deep nesting
        raise RowError('not JSON', f'expected an object a line, in UTF-8: {error}, found {line[:60]!r}') from None
    if not isinstance(row, dict):
        raise RowError('not JSON', f'expected an object, found {line[:60]!r}')
    return row


def placed_rows(path: pathlib.Path, fields: Sequence[str] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads a file's rows with their places, such as 'a.jsonl, line 3'.

    Args:
        fields: as for `numbered_rows`.

    Raises:
        RowError: a row is no JSON object; it names the place.
    """
    word, rows = numbered_rows(path, fields)
    for number, line in rows:
        place = f'{path}, {word} {number}'
        try:
            row = decode_row(line)
        except RowError as error:
            raise RowError(error.reason, error.detail, f'{place}: ') from None
        yield place, row


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows atomically, in the format of the file's suffix; one at a time, except into Parquet."""
    path = pathlib.Path(path)
    suffix = _suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.partial')
    try:
        with named_errors(path), partial.open('wb') as file:
            if suffix == '.parquet':
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
            elif suffix == '.jsonl.gz':
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
