"""Tables -> files of them: JSON Lines, Parquet, CSV."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]
_FORMULA = ('=', '+', '-', '@', '\t', '\r')  # a cell that begins so is one to a spreadsheet
_TYPES: Mapping[str, pyarrow.DataType] = {
    'string': pyarrow.string(),
    'int64': pyarrow.int64(),
    'float64': pyarrow.float64(),
    'bool': pyarrow.bool_(),
    'list': pyarrow.list_(pyarrow.string()),
    'messages': pyarrow.list_(
        pyarrow.struct({'role': pyarrow.string(), 'content': pyarrow.string(), 'truncated': pyarrow.bool_()})
    ),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, and the kind of each of their columns."""

    columns: Mapping[str, str]
    rows: list[Row]


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Lines of JSON, in UTF-8."""
    return (json.dumps(_cleaned(row), ensure_ascii=False).encode() + b'\n' for row in rows)


def to_parquet(table: Table) -> bytes:
    """A Parquet file, with all columns even of no row."""
    schema = pyarrow.schema([(name, _TYPES[kind]) for name, kind in table.columns.items()])
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_cleaned(row) for row in table.rows], schema), written)
    return written.getvalue()


def to_csv(table: Table) -> str:
    """A CSV file for spreadsheets; what one would take for a formula is marked as text."""
    written = io.StringIO()
    writer = csv.DictWriter(written, list(table.columns))
    writer.writeheader()
    for row in table.rows:
        writer.writerow(
            {name: f"'{v}" if isinstance(v, str) and v.startswith(_FORMULA) else v for name, v in row.items()}
        )
    return written.getvalue()


def _cleaned(row: Mapping[str, Any]) -> Row:
    return {name: _storable(value) for name, value in row.items()}


def _storable(value: Any) -> Any:
    """A value whose texts a file in UTF-8 takes."""
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return _cleaned(value)
    return to_unicode(value) if isinstance(value, str) else value


def to_unicode(text: str) -> str:
    """A text in which half of a surrogate pair, which no file in UTF-8 has, is a question mark."""
    return text.encode('utf-8', 'replace').decode()
