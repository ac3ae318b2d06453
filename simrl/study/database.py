"""The database of a study: its tables, how it is connected to, which revision it is of, and who may write to it.

SQLite writes ahead (WAL) and syncs at every commit, PostgreSQL commits synchronously: what is committed survives a kill
and a loss of power. Revisions are those of Alembic in `migrations`.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import socket
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator
from typing import IO, Any, Literal

import sqlalchemy as sa

MIGRATIONS = pathlib.Path(__file__).parent / 'migrations'
REVISION_TABLE = 'study_revision'
WAIT_SECONDS = 10.0  # for a connection, or for another process's transaction
LOCK_SECONDS = 5.0  # until PostgreSQL has noticed that a killed server is gone
LOCK_KEY = int.from_bytes(hashlib.sha256(b'simrl study').digest()[:8], signed=True)

metadata = sa.MetaData()
events = sa.Table(
    'events',
    metadata,
    sa.Column('number', sa.BigInteger().with_variant(sa.Integer, 'sqlite'), primary_key=True, autoincrement=False),
    sa.Column('participant', sa.String(64), nullable=False),
    sa.Column('version', sa.Integer, nullable=False),
    sa.Column('at', sa.Double, nullable=False),
    sa.Column('kind', sa.String(64), nullable=False),
    sa.Column('body', sa.Text, nullable=False),  # JSON in ASCII: PostgreSQL's text has no NUL, UTF-8 no lone surrogate
    sa.UniqueConstraint('participant', 'version', name='events_once'),
)
identities = sa.Table(
    'identities',
    metadata,
    sa.Column('participant', sa.String(64), primary_key=True),
    sa.Column('mode', sa.String(16), nullable=False),
    # The panel's ids; empty once the participant's data is deleted.
    sa.Column('panel_id', sa.String(128), nullable=False),
    sa.Column('study_id', sa.String(128), nullable=False),
    sa.Column('session_id', sa.String(128), nullable=False),
    sa.Column('known_by', sa.String(64), nullable=False),  # keyed hash of panel_id, which stays
    sa.Index('identities_once', 'known_by', unique=True),
)
study = sa.Table(  # one row
    'study',
    metadata,
    sa.Column('mode', sa.String(16), primary_key=True),
    sa.Column('secret', sa.String(64), nullable=False),  # 32 bytes in hex
)


class StoreError(RuntimeError):
    """A store cannot be opened, read or written: the message says which one and why."""


class LostError(StoreError):
    """The connection was lost; a transaction that was being committed may be stored or not."""


def parse(url: str) -> sa.URL:
    """The address of a store.

    Raises:
        StoreError: it is neither sqlite:///FILE nor postgresql://..., or has a password in it, which would reach logs.
    """
    try:
        found = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StoreError(f'store: expected sqlite:///FILE or postgresql://USER@HOST/NAME, found {url!r}') from None
    if found.password is not None:
        raise StoreError(
            f'store: expected no password in the URL, found one in {found.render_as_string()!r}: PGPASSWORD or '
            '~/.pgpass give it'
        )
    if found.drivername == 'sqlite' and found.database and found.database != ':memory:' and not found.query:
        return found.set(database=str(pathlib.Path(found.database).expanduser().resolve()))
    if found.drivername == 'postgresql' and found.database:
        return found.set(drivername='postgresql+psycopg')
    raise StoreError(f'store: expected sqlite:///FILE or postgresql://USER@HOST/NAME, found {url!r}')


def shown(url: sa.URL) -> str:
    """The address as messages give it."""
    return str(url.database) if is_sqlite(url) else url.set(drivername='postgresql').render_as_string()


def is_sqlite(url: sa.URL) -> bool:
    return url.drivername == 'sqlite'


def connect(url: sa.URL, access: Literal['read', 'write', 'create']) -> sa.Connection:
    """A connection of its own.

    A transaction of `read` sees one state of the store and delays nobody who writes. SQLite's file is made by `create`
    where it is missing.

    Raises:
        StoreError: there is no such file or server, or a package is missing.
    """
    with translated(url):
        if is_sqlite(url):
            if access == 'create':  # it holds the panel's ids: for the user alone
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL, 0o600))
            engine = sa.create_engine('sqlite://', creator=lambda: _open_sqlite(url, access), poolclass=sa.NullPool)
            # Python's own handling of transactions would commit before a change of a table.
            begin = 'BEGIN' if access == 'read' else 'BEGIN IMMEDIATE'
            sa.event.listen(engine, 'begin', lambda connection: connection.exec_driver_sql(begin))
            return engine.connect()
        options: dict[str, Any] = {
            'application_name': f'simrl study, process {os.getpid()} on {socket.gethostname()}'[:63],
            'connect_timeout': int(WAIT_SECONDS),
            'keepalives_idle': 30,  # a network that is gone is noticed
            'tcp_user_timeout': int(1000 * WAIT_SECONDS),
            'options': '-c synchronous_commit=on -c client_encoding=utf8',
        }
        try:
            engine = sa.create_engine(url, connect_args=options, poolclass=sa.NullPool)
        except ModuleNotFoundError:
            raise StoreError(f"{shown(url)}: PostgreSQL needs a package: pip install 'simrl[postgres]'") from None
        connection = engine.connect()
        if access == 'read':
            connection.execution_options(isolation_level='REPEATABLE READ', postgresql_readonly=True)
        return connection


def _open_sqlite(url: sa.URL, access: str) -> sqlite3.Connection:
    """SQLite's own connection; `isolation_level=None`: it begins no transaction by itself."""
    path = urllib.parse.quote(str(url.database))
    connection = sqlite3.connect(
        f'file:{path}?mode=rw', uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        mode = 'wal' if access == 'read' else connection.execute('PRAGMA journal_mode=WAL').fetchone()[0]
        if mode != 'wal':
            raise StoreError(f'{url.database}: expected to write ahead, found journal mode {mode}: is it on a network?')
        for setting in ('synchronous=FULL', 'fullfsync=ON', 'checkpoint_fullfsync=ON', 'secure_delete=ON'):
            connection.execute(f'PRAGMA {setting}')
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def translated(url: sa.URL) -> Iterator[None]:
    """Errors of the database and the file system as `StoreError`, in one line and without the rows' contents."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        cause = ' '.join(str(error.orig).split())
        if error.connection_invalidated:
            raise LostError(f'{shown(url)}: the connection was lost: {cause}') from error
        raise StoreError(f'{shown(url)}: {cause}') from error
    except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StoreError(f'{shown(url)}: {" ".join(str(error).split())}') from error


def place(url: sa.URL) -> tuple[int, int] | None:
    """Identifies the file of an SQLite store, so that one in its place is noticed; None of PostgreSQL."""
    if not is_sqlite(url):
        return None
    with translated(url):
        found = os.stat(str(url.database))
    return found.st_dev, found.st_ino


def lock_file(url: sa.URL) -> IO[bytes] | None:
    """The open lock of an SQLite store, exclusive until it is closed or its process ends; None of PostgreSQL.

    Raises:
        StoreError: another process holds it, or the folder is missing.
    """
    if not is_sqlite(url):
        return None
    path = pathlib.Path(f'{url.database}.lock')
    with translated(url):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 'rb+', buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            holder = file.read().decode().strip() if isinstance(error, BlockingIOError) else str(error)
        raise StoreError(f'{url.database}: expected a store that no other server writes to, found {holder}') from None
    try:
        with translated(url):
            file.truncate()
            file.write(f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
    except StoreError:  # the disk is full
        file.close()
        raise
    return file


def lock_session(url: sa.URL, connection: sa.Connection) -> None:
    """Takes PostgreSQL's lock for as long as the connection lasts; none of SQLite.

    Raises:
        StoreError: another connection holds it.
    """
    if is_sqlite(url):
        return
    until = time.monotonic() + LOCK_SECONDS
    while True:
        with translated(url), connection.begin():
            if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(LOCK_KEY))):
                return
            holder = connection.scalar(
                sa.text(
                    'SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE granted '
                    "AND locktype = 'advisory' AND ((classid::bigint << 32) | objid::bigint) = :key "
                    'AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())'
                ),
                {'key': LOCK_KEY},
            )
        if time.monotonic() > until:
            raise StoreError(f'{shown(url)}: expected a store that no other server writes to, found {holder}')
        time.sleep(0.2)


def revision(connection: sa.Connection) -> str | None:
    """The store's revision; None of an empty database.

    Raises:
        StoreError: the database is another program's.
    """
    url, tables = connection.engine.url, set(sa.inspect(connection).get_table_names())
    if REVISION_TABLE in tables:
        found: str | None = connection.scalar(sa.text(f'SELECT version_num FROM {REVISION_TABLE}'))
        if found is not None:
            return found
    if tables - {REVISION_TABLE}:
        raise StoreError(f'{shown(url)}: expected a study or an empty database, found tables {sorted(tables)}')
    return None


def latest() -> str:
    """The revision that this version of simrl reads and writes."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    assert head is not None
    return head


def check_revision(url: sa.URL, connection: sa.Connection) -> None:
    """Raises `StoreError` unless the store is of the latest revision."""
    found, expected = revision(connection), latest()
    if found != expected:
        raise StoreError(
            f'{shown(url)}: expected a store of revision {expected}, found {found or "an empty database"}; '
            '`python -m tools.study_store migrate` brings an older one there'
        )


def migrate(connection: sa.Connection, target: str = 'head') -> None:
    """Brings the tables to a revision, up or down, within the transaction of the connection.

    Raises:
        StoreError: the store is of a revision that this version of simrl does not know.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    found = revision(connection)
    known = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]  # latest first
    if found is not None and found not in known:
        raise StoreError(
            f'{shown(connection.engine.url)}: expected a store of revision {known[0]} or earlier, found {found}: it is '
            'of a newer version of simrl'
        )
    if (target := known[0] if target == 'head' else target) not in known:
        raise StoreError(f'expected a revision of {", ".join(known)} (latest first), found {target!r}')
    config = Config()
    config.set_main_option('script_location', str(MIGRATIONS).replace('%', '%%'))
    config.attributes['connection'] = connection
    down = found is not None and known.index(target) > known.index(found)
    (command.downgrade if down else command.upgrade)(config, target)
