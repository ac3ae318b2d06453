"""Backups of a store, taken while its server runs or not.

A backup is an SQLite store in one file, whatever the store is in: a consistent state of one moment, row by row. It
needs no server to be looked at, can be served from, and is restored into SQLite or PostgreSQL.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import sqlalchemy as sa

from simrl.study import database
from simrl.study.database import StoreError

ROWS = 1000  # that are copied at a time


def backup(url: str, path: pathlib.Path) -> dict[str, int]:
    """Copies a store into a new file, which only its owner may read, as it holds the panel's ids and the secret.

    Returns:
        number of rows by table.

    Raises:
        StoreError: there is no store, the file exists, or it cannot be written.
    """
    source, new = database.parse(url), path.with_name(f'{path.name}.new')
    if path.exists():
        raise StoreError(f'{path}: expected a new file for the backup, found one')
    _remove(new)  # of a backup that was killed
    try:
        with _reading(source) as read:
            copied = _copy(read, database.parse(f'sqlite:///{new.absolute()}'))
        with database.translated(source), open(new, 'rb') as file:
            os.fsync(file)
            os.rename(new, path)
    finally:
        _remove(new)
    return copied


def restore(path: pathlib.Path, url: str) -> dict[str, int]:
    """Copies a backup into a new SQLite file or an empty PostgreSQL database; what failed leaves neither rows nor file.

    Returns:
        number of rows by table.

    Raises:
        StoreError: the backup is none or damaged, or there is a store already.
    """
    target, exists = database.parse(url), False
    with _reading(database.parse(f'sqlite:///{path.absolute()}')) as read:
        if database.is_sqlite(target):
            file = pathlib.Path(str(target.database))
            exists = file.exists()
        lock = database.lock_file(target)
        try:
            return _copy(read, target)
        except BaseException:
            if database.is_sqlite(target) and not exists:
                _remove(file)
            raise
        finally:
            if lock is not None:
                lock.close()


@contextlib.contextmanager
def _reading(url: sa.URL) -> Iterator[sa.Connection]:
    with database.connect(url, 'read') as connection, database.translated(url), connection.begin():
        if database.revision(connection) is None:
            raise StoreError(f'{database.shown(url)}: expected a store, found an empty database')
        yield connection


def _copy(source: sa.Connection, url: sa.URL) -> dict[str, int]:
    """Copies all rows, in one transaction, into an empty database of the source's revision."""
    copied = {}
    with database.connect(url, 'create') as target:
        database.lock_session(url, target)
        with database.translated(url), target.begin():
            if (found := database.revision(target)) is not None:
                raise StoreError(f'{database.shown(url)}: expected an empty database, found a store ({found})')
            database.migrate(target, database.revision(source) or 'head')
            tables = sa.MetaData()
            tables.reflect(source)
            for table in tables.sorted_tables:
                if table.name != database.REVISION_TABLE:
                    copied[table.name] = 0
                    for rows in source.execute(sa.select(table)).mappings().partitions(ROWS):
                        target.execute(sa.insert(table), [dict(row) for row in rows])
                        copied[table.name] += len(rows)
    return copied  # with the last connection SQLite's log of writes is closed: all is in the one file


def _remove(path: pathlib.Path) -> None:
    for suffix in ('', '-wal', '-shm'):
        pathlib.Path(f'{path}{suffix}').unlink(missing_ok=True)
