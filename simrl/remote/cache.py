"""Answers in a sqlite file, shared by threads and processes.

Keys are those of `requests.key_of`. What a model answered is found again, and so is an answer that cannot be read
(`answers.ANSWERED`): another one would make what follows differ from an unbroken run. What a server failed is asked for
anew. The first answer to a key stays, so that all who ask for it read the same. Failures with a text or a cost are also
kept apart, for people to read.

Every answer is a transaction of its own: a kill loses at most the one that is being written. The journal is a
write-ahead log, which needs memory that all processes share: where the file system is not known to be of this machine
alone, it is a rollback journal. That is slower, and needs locks that hold between machines, as those of stages do.
"""

import contextlib
import json
import os
import pathlib
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

FORMAT = 1  # goes up when files of the version before cannot be read
APPLICATION = 0x73726C63  # tells a cache from the sqlite files of others
WAIT_SECONDS = 60.0  # for another process that writes
MOUNTS = pathlib.Path('/proc/self/mountinfo')
LOCAL = frozenset(('bcachefs', 'btrfs', 'ext2', 'ext3', 'ext4', 'f2fs', 'overlay', 'tmpfs', 'xfs', 'zfs'))
TABLES = (
    'CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID',
    'CREATE TABLE failures (key TEXT NOT NULL, cause TEXT NOT NULL, detail TEXT NOT NULL, raw TEXT NOT NULL)',
    'CREATE TABLE spend (model TEXT PRIMARY KEY, cost REAL NOT NULL) WITHOUT ROWID',
)


class CacheError(RuntimeError):
    """A file that is no cache, of another version, or damaged."""


class Cache:
    """A file of answers.

    Raises:
        CacheError: it is another file, of another version, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with self._named_errors():
            self._connection = sqlite3.connect(
                self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._named_errors():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> 'Cache':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer of a key."""
        found = self._one('SELECT answer FROM answers WHERE key = ?', key)
        return None if found is None else json.loads(found)

    def put(self, key: str, answer: Mapping[str, Any], *, model: str, cost: float = 0.0) -> dict[str, Any]:
        """Keeps an answer and what it cost, and returns the one that is kept: the first of its key."""
        with self._writing():
            self._connection.execute('INSERT OR IGNORE INTO answers VALUES (?, ?)', (key, json.dumps(answer)))
            self._pay(model, cost)
        kept = self.get(key)
        assert kept is not None
        return kept

    def put_failure(self, key: str, cause: str, detail: str, raw: str, *, model: str, cost: float = 0.0) -> None:
        """Keeps a failure, for people to read, and what it cost."""
        with self._writing():
            self._connection.execute('INSERT INTO failures VALUES (?, ?, ?, ?)', (key, cause, detail, raw))
            self._pay(model, cost)

    def failures(self) -> list[tuple[str, str, str, str]]:
        """All (key, cause, detail, raw), in the order of their coming."""
        with self._lock, self._named_errors():
            return self._connection.execute('SELECT * FROM failures ORDER BY rowid').fetchall()

    def spent(self, model: str) -> float:
        """All that was ever paid for a model through this file."""
        return self._one('SELECT cost FROM spend WHERE model = ?', model) or 0.0

    def __len__(self) -> int:
        return self._one('SELECT COUNT(*) FROM answers') or 0

    def _pay(self, model: str, cost: float) -> None:
        if cost:
            self._connection.execute(
                'INSERT INTO spend VALUES (?, ?) ON CONFLICT (model) DO UPDATE SET cost = cost + excluded.cost',
                (model, cost),
            )

    def _one(self, query: str, *values: str) -> Any:
        with self._lock, self._named_errors():
            row = self._connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction."""
        with self._lock, self._named_errors():
            self._connection.execute('BEGIN IMMEDIATE')
            try:
                yield
            except BaseException:
                self._connection.execute('ROLLBACK')
                raise
            self._connection.execute('COMMIT')

    def _open(self) -> None:
        """Makes the tables of a new file, or checks those of an old one."""
        run = self._connection.execute
        local = file_system(self.path.parent) in LOCAL
        self._keep_journal('WAL' if local else 'DELETE')
        # With a write-ahead log a loss of power, not a kill, may lose the newest answers.
        run(f'PRAGMA synchronous = {"NORMAL" if local else "FULL"}')
        run('BEGIN IMMEDIATE')  # one process makes the tables
        try:
            application, version = (run(f'PRAGMA {name}').fetchone()[0] for name in ('application_id', 'user_version'))
            tables = {name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables and not application:
                for table in TABLES:
                    run(table)
                run(f'PRAGMA application_id = {APPLICATION}')
                run(f'PRAGMA user_version = {FORMAT}')
            elif application != APPLICATION:
                raise CacheError(f'{self.path}: expected a cache of answers, found another sqlite file')
            elif version != FORMAT:
                raise CacheError(
                    f'{self.path}: expected a cache of format {FORMAT}, found {version}: it is of another version of '
                    'simrl; use another path'
                )
        except BaseException:
            run('ROLLBACK')
            raise
        run('COMMIT')

    def _keep_journal(self, mode: str) -> None:
        """Switches to a kind of journal; sqlite does not wait for other processes here."""
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._connection.execute(f'PRAGMA journal_mode = {mode}')
                return
            except sqlite3.OperationalError as error:
                if 'locked' not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Names the file in the errors of sqlite."""
        try:
            yield
        except sqlite3.Error as error:
            raise CacheError(
                f'{self.path}: expected a cache of answers that can be read and written: {error}'
            ) from error


def file_system(folder: pathlib.Path) -> str:
    """The kind of file system that a folder is on, in Linux's words; empty where the system does not say."""
    if not MOUNTS.exists():
        return ''
    mounts: dict[pathlib.Path, str] = {}
    for line in MOUNTS.read_text(encoding='utf-8', errors='surrogateescape').splitlines():
        place, kind = line.split()[4], line.partition(' - ')[2].split()[0]
        mounts[pathlib.Path(re.sub(r'\\(\d{3})', lambda code: chr(int(code[1], 8)), place))] = kind
    own = folder.resolve()
    return next((mounts[path] for path in (own, *own.parents) if path in mounts), '')
