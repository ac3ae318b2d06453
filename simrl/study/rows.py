"""Events as rows of the store's table: entries are appended to it, and rows read back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from simrl.study import database
from simrl.study.database import StoreError
from simrl.study.events import Event, EventError, Stored, from_row, to_row


class ConflictError(RuntimeError):
    """A participant's event of this version is stored already, or those before it are not; or they are known."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Events that are stored together or not at all.

    Attributes:
        participant: their id; `STUDY` for events of the study itself.
        version: number of the first event among the participant's, from 1.
        at: time in seconds since 1970, UTC.
    """

    participant: str
    version: int
    at: float
    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        if self.version < 1 or not self.events:
            raise ValueError(f'Entry: expected events from version 1 on, found {len(self.events)} from {self.version}')
        for event in self.events:
            _to_json(event)


def append_entries(
    connection: sa.Connection, entries: Sequence[Entry], again: bool
) -> list[tuple[Stored, ...] | ConflictError]:
    """Stores entries, in the transaction of a connection.

    Args:
        again: the transaction was tried before, and may be stored: entries that are stored just so are no conflicts.

    Returns:
        [entries], what was stored of each, or why it was not.
    """
    table = database.events
    versions = sa.select(table.c.participant, sa.func.max(table.c.version)).group_by(table.c.participant)
    versions = versions.where(table.c.participant.in_({entry.participant for entry in entries}))
    last = {row.participant: row[1] for row in connection.execute(versions)}
    number = connection.scalar(sa.select(sa.func.max(table.c.number))) or 0
    results: list[tuple[Stored, ...] | ConflictError] = []
    rows: list[Mapping[str, Any]] = []
    for entry in entries:
        expected = last.get(entry.participant, 0) + 1
        if entry.version != expected:
            found = _stored_before(connection, entry) if again else None
            results.append(
                found
                or ConflictError(f'{entry.participant}: expected event {expected} to follow, found {entry.version}')
            )
            continue
        stored = []
        for version, event in enumerate(entry.events, entry.version):
            number += 1
            stored.append(Stored(number, entry.participant, version, entry.at, event))
            kind, _ = to_row(event)
            row = {'number': number, 'participant': entry.participant, 'version': version, 'at': entry.at}
            rows.append(row | {'kind': kind, 'body': _to_json(event)})
        last[entry.participant] = entry.version + len(entry.events) - 1
        results.append(tuple(stored))
    if rows:
        connection.execute(sa.insert(table), rows)
    return results


def _stored_before(connection: sa.Connection, entry: Entry) -> tuple[Stored, ...] | None:
    """An entry as it is stored, if it is just that."""
    columns = database.events.c
    versions = range(entry.version, entry.version + len(entry.events))
    query = sa.select(columns.number, columns.at, columns.body).where(
        columns.participant == entry.participant, columns.version.in_(versions)
    )
    rows = connection.execute(query.order_by(columns.version)).all()
    if [(row.at, row.body) for row in rows] != [(entry.at, _to_json(event)) for event in entry.events]:
        return None
    return tuple(
        Stored(row.number, entry.participant, version, entry.at, event)
        for row, version, event in zip(rows, versions, entry.events, strict=True)
    )


def read_rows(url: sa.URL, connection: sa.Connection, after: int) -> list[Stored]:
    columns = database.events.c
    query = sa.select(columns.number, columns.participant, columns.version, columns.at, columns.kind, columns.body)
    found = []
    for row in connection.execute(query.where(columns.number > after).order_by(columns.number)):
        try:
            event = from_row(row.kind, json.loads(row.body))
        except (EventError, ValueError, TypeError) as error:
            raise StoreError(
                f'{database.shown(url)}: event {row.number} (participant {row.participant or "none"}, version '
                f'{row.version}): {error}'
            ) from error
        found.append(Stored(row.number, row.participant, row.version, row.at, event))
    return found


def _to_json(event: Event) -> str:
    """The body of an event's row.

    Raises:
        ValueError: it could not be read again, by a field of another type or a number that is not finite.
    """
    kind, body = to_row(event)
    from_row(kind, body)
    return json.dumps(body, allow_nan=False)
