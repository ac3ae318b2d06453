"""The store of a study: an append-only table of events, and who the participants are to their panel.

One process writes; a method returns after its commit. The only thing that is ever changed is what a participant wants
deleted: their events but the first (which says no more than that someone came), and the ids that the panel gave them.
A keyed hash of the panel's id stays, so that nobody takes part twice.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import sqlalchemy as sa

from simrl.study import database
from simrl.study.database import LostError, StoreError
from simrl.study.events import STUDY, Arrived, Deleted, Mode, Stored
from simrl.study.rows import ConflictError, Entry, append_entries, read_rows

__all__ = ['Arrival', 'ConflictError', 'Entry', 'Identity', 'Store', 'StoreError', 'read_events']

T = TypeVar('T')
RECONNECT_SECONDS = 30.0  # for which a lost connection to PostgreSQL is tried again


@dataclasses.dataclass(frozen=True)
class Identity:
    """A participant's ids of their panel: PROLIFIC_PID, STUDY_ID, SESSION_ID. All empty if anyone may enter."""

    panel_id: str
    study_id: str
    session_id: str

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            if not re.fullmatch(r'[!-~]{0,128}', value):
                raise ValueError(
                    f'Identity.{field}: expected at most 128 letters, digits and signs, found {value[:200]!r}'
                )
        if not self.panel_id and (self.study_id or self.session_id):
            raise ValueError('Identity.panel_id: expected an id beside those of the study and the session, found none')


@dataclasses.dataclass(frozen=True)
class Arrival:
    """Somebody new. `participant`: the id that they get; `at`: seconds since 1970, UTC."""

    identity: Identity
    participant: str
    at: float
    mode: Mode


class Store:
    """The store, open for writing by this process alone; a context manager. Its methods may be called by any thread.

    Attributes:
        secret: random bytes, made with the store; they sign cookies.
    """

    secret: bytes

    def __init__(self, url: str, mode: Literal['live', 'rehearsal']) -> None:
        """Opens a store, of an older revision after bringing it up to date; makes one where there is none.

        Raises:
            StoreError: another process writes to it, it is of the other mode or of a newer version of simrl, it is no
                store, it is damaged, or it cannot be reached.
        """
        if mode not in ('live', 'rehearsal'):
            raise StoreError(f'store: expected mode live or rehearsal, found {mode!r}')
        self._url, self._mode, self._mutex = database.parse(url), mode, threading.Lock()
        self._given_up: str | None = None
        self._connection: sa.Connection | None = None
        self._lock = database.lock_file(self._url)
        try:
            self._connection = self._connect()
            self._place = database.place(self._url)
            with database.translated(self._url), self._connection.begin():
                self.secret = _prepare(self._url, self._connection, mode)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and gives the lock back; further calls raise `StoreError`."""
        with self._mutex:
            self._given_up = 'the store is closed'
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._lock is not None:
                self._lock.close()

    @property
    def lost(self) -> str | None:
        """The cause for which it is closed for good, while its process goes on; None of a store that works."""
        return self._given_up

    def events(self, after: int = 0) -> list[Stored]:
        """The events whose number is above `after`, in their order.

        Raises:
            StoreError: a row is damaged.
        """
        return self._transact(lambda connection, _: read_rows(self._url, connection, after))

    def append(self, entries: Sequence[Entry]) -> list[tuple[Stored, ...] | ConflictError]:
        """Stores entries in one transaction, in their order.

        Returns:
            [entries], what was stored of each, or why it was not: one that conflicts leaves the others.

        Raises:
            StoreError: nothing was stored, or (the connection was lost for long) it is unknown.
        """
        return self._transact(lambda connection, again: append_entries(connection, entries, again))

    def find(self, identity: Identity, mode: Mode) -> tuple[str, Identity] | None:
        """The participant of the mode with this panel id, and the identity of the first time, empty once it is deleted.

        None of somebody new, and always where anyone may enter.
        """
        if not identity.panel_id:
            return None
        columns, table = database.identities.c, database.identities
        query = sa.select(columns.participant, columns.panel_id, columns.study_id, columns.session_id).select_from(
            table
        )
        query = query.where(columns.known_by == self._known_by(identity, mode))
        row = self._transact(lambda connection, _: connection.execute(query).one_or_none())
        return None if row is None else (row[0], Identity(*row[1:]))

    def enter_all(self, arrivals: Sequence[Arrival]) -> list[tuple[Stored, ...] | ConflictError]:
        """Stores new participants in one transaction: who they are, and that they arrived.

        Returns:
            [arrivals], what was stored of each; a conflict if they are known, or another has the id.

        Raises:
            StoreError: as of `append`; or a mode is not the store's and no preview.
        """
        for arrival in arrivals:
            if arrival.mode not in (self._mode, 'preview'):
                address = database.shown(self._url)
                raise StoreError(f'{address}: expected mode {self._mode} or preview, found {arrival.mode}')
        keys = [self._known_by(arrival.identity, arrival.mode) for arrival in arrivals]
        columns = database.identities.c
        query = sa.select(columns.known_by, columns.participant).where(columns.known_by.in_(set(keys)))

        def work(connection: sa.Connection, again: bool) -> list[tuple[Stored, ...] | ConflictError]:
            before = {row.known_by: row.participant for row in connection.execute(query)}
            known, entries, rows = dict(before), list[Entry](), list[dict[str, str]]()
            others = dict[int, ConflictError]()
            for number, (arrival, key) in enumerate(zip(arrivals, keys, strict=True)):
                identity, participant = arrival.identity, arrival.participant
                if identity.panel_id and known.setdefault(key, participant) != participant:
                    others[number] = ConflictError(f'expected somebody new, found participant {known[key]}')
                    continue
                entries.append(Entry(participant, 1, arrival.at, (Arrived(arrival.mode),)))
                row = {'participant': participant, 'mode': arrival.mode, 'known_by': key}
                rows.append(row | dataclasses.asdict(identity))
            stored = append_entries(connection, entries, again)
            new = [
                row
                for row, found in zip(rows, stored, strict=True)
                if row['panel_id'] and row['known_by'] not in before and not isinstance(found, ConflictError)
            ]
            if new:
                connection.execute(sa.insert(database.identities), new)
            in_order = iter(stored)
            return [others[number] if number in others else next(in_order) for number in range(len(arrivals))]

        return self._transact(work)

    def delete(self, participant: str, version: int, at: float) -> tuple[Stored, ...]:
        """Deletes what is stored of a participant, but that they came, and stores `Deleted` as their event `version`.

        It is gone from SQLite's files, and from the files of PostgreSQL's tables; PostgreSQL's log of writes keeps it
        until it is recycled. Backups made before keep it.

        Raises:
            ConflictError: as of `append`; nothing was deleted.
            StoreError: as of `append`.
        """
        if participant == STUDY or version < 2:
            raise ValueError(f'expected a participant who came, found {participant or "the study"}, event {version}')

        def work(connection: sa.Connection, again: bool) -> tuple[Stored, ...]:
            [stored] = append_entries(connection, [Entry(participant, version, at, (Deleted(),))], again)
            if isinstance(stored, ConflictError):
                raise stored
            table, identities = database.events, database.identities
            connection.execute(
                sa.delete(table).where(
                    table.c.participant == participant, table.c.version > 1, table.c.version < version
                )
            )
            connection.execute(
                sa.update(identities)
                .where(identities.c.participant == participant)
                .values(panel_id='', study_id='', session_id='')
            )
            return stored

        stored = self._transact(work)
        try:
            _overwrite(self._url)
        except StoreError as error:  # it is deleted all the same
            logging.getLogger(__name__).warning('%s: what was deleted may still be in its files', error)
        return stored

    def identities(self) -> dict[str, Identity]:
        """The panel's ids of participants, by our ids; those who had themselves deleted are left out."""
        columns = database.identities.c
        query = sa.select(columns.participant, columns.panel_id, columns.study_id, columns.session_id)
        query = query.where(columns.panel_id != '')
        rows = self._transact(lambda connection, _: connection.execute(query).all())
        return {participant: Identity(*ids) for participant, *ids in rows}

    def _known_by(self, identity: Identity, mode: Mode) -> str:
        return hmac.new(self.secret, f'{mode} {identity.panel_id}'.encode(), hashlib.sha256).hexdigest()

    def _connect(self) -> sa.Connection:
        connection = database.connect(self._url, 'create')
        try:
            database.lock_session(self._url, connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _transact(self, work: Callable[[sa.Connection, bool], T]) -> T:
        """The result of work in a transaction, after its commit.

        A lost connection is made anew, and the work done again: `True` tells it that its first try may be stored. Once
        that fails for `RECONNECT_SECONDS` nobody knows what is stored, and the store is closed for good.
        """
        with self._mutex:
            until, again = time.monotonic() + RECONNECT_SECONDS, False
            while True:
                if self._given_up is not None:
                    raise StoreError(f'{database.shown(self._url)}: {self._given_up}')
                try:
                    if self._connection is None:
                        self._connection = self._connect()
                    if database.place(self._url) != self._place:
                        raise StoreError(
                            f'{database.shown(self._url)}: another file was put in its place while the study ran; move '
                            'stores only once their server has ended'
                        )
                    with database.translated(self._url), self._connection.begin():
                        return work(self._connection, again)
                except StoreError as error:
                    if not again and not isinstance(error, LostError):
                        raise
                    if self._connection is not None:
                        with contextlib.suppress(sa.exc.SQLAlchemyError):  # it is lost
                            self._connection.close()
                        self._connection = None
                    again = True
                    if time.monotonic() > until:
                        self._given_up = f'{error}; the server of the study must be started again'
                time.sleep(0.2)


def _overwrite(url: sa.URL) -> None:
    """Has the database's files without what was deleted: SQLite's log of writes emptied, PostgreSQL's tables anew."""
    with database.connect(url, 'write') as connection, database.translated(url):
        driver: Any = connection.connection.driver_connection
        if database.is_sqlite(url):
            driver.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        else:
            driver.autocommit = True
            driver.execute(f"SET lock_timeout = '{database.WAIT_SECONDS}s'")
            driver.execute('VACUUM FULL events, identities')


def read_events(url: str) -> list[Stored]:
    """All events of a store in their order, while a server may write to it or not.

    Raises:
        StoreError: there is none, it is of another revision, or a row is damaged.
    """
    address = database.parse(url)
    with database.connect(address, 'read') as connection, database.translated(address), connection.begin():
        database.check_revision(address, connection)
        return read_rows(address, connection, 0)


def _prepare(url: sa.URL, connection: sa.Connection, mode: str) -> bytes:
    """Makes the tables, or brings them up to date; the store's secret."""
    if database.is_sqlite(url):
        found = connection.exec_driver_sql('PRAGMA quick_check(1)').scalar()
        if found != 'ok':
            raise StoreError(f'{database.shown(url)}: expected a whole database, found: {found}')
    database.migrate(connection)
    row = connection.execute(sa.select(database.study.c.mode, database.study.c.secret)).one_or_none()
    if row is None:
        secret = secrets.token_bytes(32)
        connection.execute(sa.insert(database.study), {'mode': mode, 'secret': secret.hex()})
        return secret
    if row.mode != mode:
        raise StoreError(
            f'{database.shown(url)}: expected a store of mode {mode}, found {row.mode}: give each a store of its own'
        )
    return bytes.fromhex(row.secret)
