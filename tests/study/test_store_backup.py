"""Backups taken while the study runs, restored into either database; migrations up and down on a filled store."""

import collections
import json
import pathlib
import sqlite3
import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from simrl.study import database
from simrl.study.backup import backup, restore
from simrl.study.events import Flagged, Returned, Stored, Voided
from simrl.study.store import ConflictError, Entry, Identity, Store, StoreError, read_events
from tests.study.studies import enter
from tools import study_store

KNOWN = Identity('known', 'study', 'session')
DELETED = Identity('deleted', 'study', 'session')


def fill(store: Store) -> None:
    """Two participants, one of whom had their data deleted."""
    for identity in (KNOWN, DELETED):
        enter(store, identity, identity.panel_id[0], 1.0, 'live')
        store.append([Entry(identity.panel_id[0], 2, 2.0, (Returned(True), Flagged('judge', 'a\0\ud83d')))])
    store.delete('d', 4, 3.0)


def rows_of(url: str) -> dict[str, list[tuple[object, ...]]]:
    """All that is in a store, by table."""
    with database.connect(database.parse(url), 'read') as connection, connection.begin():
        tables = sa.MetaData()
        tables.reflect(connection)
        return {name: sorted(map(tuple, connection.execute(sa.select(table)))) for name, table in tables.tables.items()}


def check_whole(events: list[Stored]) -> None:
    """Each participant's events are there from the first on, and all numbers up to the last."""
    versions = collections.defaultdict(list)
    for event in events:
        versions[event.participant].append(event.version)
    assert all(found == list(range(1, len(found) + 1)) for found in versions.values())
    assert [event.number for event in events] == list(range(1, len(events) + 1))


@pytest.fixture
def other_url(store_url, tmp_path, postgres):
    """An empty database of the other kind."""
    return postgres.database() if store_url.startswith('sqlite') else f'sqlite:///{tmp_path}/other.sqlite'


def test_a_backup_of_a_running_study_is_one_moment_of_it(store_url, other_url, tmp_path):
    """Threads append while backups are taken: each has all that was confirmed before, and no half of a transaction."""
    confirmed: list[Stored] = []
    stop = threading.Event()

    def append(participant: str) -> None:
        version = 1
        while not stop.is_set():
            entry = Entry(participant, version, 1.0, (Voided('x' * 500), Voided('y')))
            [stored] = store.append([entry])
            assert not isinstance(stored, ConflictError)
            confirmed.extend(stored)
            version += 2

    with Store(store_url, 'live') as store:
        threads = [threading.Thread(target=append, args=(name,)) for name in 'abc']
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                while len(confirmed) < 30 * (number + 1):
                    assert any(thread.is_alive() for thread in threads)
                before = list(confirmed)
                path = tmp_path / f'backup-{number}'
                copied = backup(store_url, path)
                found = read_events(f'sqlite:///{path}')
                assert copied == {'events': len(found), 'identities': 0, 'study': 1}
                assert set(before) <= set(found)
                check_whole(found)
                assert all(found[n].participant == found[n + 1].participant for n in range(0, len(found), 2))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert set(found) < set(store.events())
        secret = store.secret

    restored = restore(path, other_url)
    assert restored == copied
    with Store(other_url, 'live') as store:
        assert store.events() == found
        assert store.secret == secret  # cookies stay valid
        assert not isinstance(store.append([Entry('d', 1, 1.0, (Voided(''),))])[0], ConflictError)
    # Any backup can be served from as it is, and nothing but the one file belongs to it.
    assert {name.name for name in tmp_path.iterdir() if name.name.startswith('backup')} == {
        f'backup-{number}' for number in range(3)
    }
    assert path.stat().st_mode & 0o777 == 0o600
    with Store(f'sqlite:///{path}', 'live') as store:
        assert store.events() == found


def test_all_that_is_in_a_store_comes_back(store_url, other_url, tmp_path):
    with Store(store_url, 'live') as store:
        fill(store)
    backup(store_url, tmp_path / 'backup')
    restore(tmp_path / 'backup', other_url)
    assert rows_of(other_url) == rows_of(f'sqlite:///{tmp_path}/backup') == rows_of(store_url)
    with Store(other_url, 'live') as store:
        assert store.find(DELETED, 'live') == ('d', Identity('', '', ''))


def test_backups_overwrite_nothing_and_leave_no_halves(tmp_path, monkeypatch):
    url, path = f'sqlite:///{tmp_path}/study.sqlite', tmp_path / 'backup'
    with pytest.raises(StoreError, match='unable to open database file'):
        backup(url, path)
    with Store(url, 'live') as store:
        fill(store)
        (tmp_path / 'backup.new').write_bytes(b'of one that was killed')
        backup(url, path)
        before = path.read_bytes()
        with pytest.raises(StoreError, match='expected a new file'):
            backup(url, path)
        with pytest.raises(StoreError, match='no other server'):
            restore(path, url)
    with pytest.raises(StoreError, match='expected an empty database, found a store'):
        restore(path, url)
    assert path.read_bytes() == before
    assert len(read_events(url)) == 5
    with pytest.raises(StoreError, match='No such file or directory'):
        backup(url, tmp_path / 'none' / 'backup')

    # A damaged backup is not restored by halves.
    raw = bytearray(before)
    raw[4096 * 2 :] = b'\xff' * (len(raw) - 4096 * 2)
    (tmp_path / 'damaged').write_bytes(raw)
    with pytest.raises(StoreError):
        restore(tmp_path / 'damaged', f'sqlite:///{tmp_path}/new.sqlite')
    sqlite3.connect(tmp_path / 'foreign').execute('CREATE TABLE t (x)').connection.close()
    with pytest.raises(StoreError, match='found tables'):
        restore(tmp_path / 'foreign', f'sqlite:///{tmp_path}/new.sqlite')
    assert not (tmp_path / 'new.sqlite').exists()
    assert not list(tmp_path.glob('*.new*'))


def test_migrations_up_and_down_on_a_filled_store(store_url):
    with Store(store_url, 'live') as store:
        fill(store)
        events, secret = store.events(), store.secret
    full = rows_of(store_url)
    address = database.parse(store_url)

    def migrate(revision: str) -> None:
        with database.connect(address, 'write') as connection, connection.begin():
            database.migrate(connection, revision)

    with database.connect(address, 'read') as connection, connection.begin():
        options = {'version_table': database.REVISION_TABLE}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), database.metadata) == []
    migrate('events')
    older = rows_of(store_url)
    assert older['identities'] == [row[:-1] for row in full['identities']]
    assert older['events'] == full['events']
    with pytest.raises(StoreError, match='expected a store of revision known_by, found events; `python'):
        read_events(store_url)
    migrate('events')
    assert rows_of(store_url) == older
    migrate('head')
    assert read_events(store_url) == events

    migrate('events')
    with Store(store_url, 'live') as store:  # brings it up to date by itself
        assert (store.events(), store.secret) == (events, secret)
        assert store.find(KNOWN, 'live') == ('k', KNOWN)
        assert store.find(DELETED, 'live') is None  # as that revision says
        with pytest.raises(ConflictError):
            enter(store, KNOWN, 'another', 4.0, 'live')
    after = rows_of(store_url)
    assert [row for row in after['identities'] if row[0] == 'k'] == [row for row in full['identities'] if row[0] == 'k']
    with pytest.raises(StoreError, match='expected a revision of known_by, events'):
        migrate('base')


def test_a_failed_migration_changes_nothing(store_url, monkeypatch):
    with Store(store_url, 'live') as store:
        fill(store)
    address = database.parse(store_url)
    with database.connect(address, 'write') as connection, connection.begin():
        database.migrate(connection, 'events')
        connection.execute(  # somebody who is there twice: the index of the next revision cannot be made
            sa.text(
                "INSERT INTO identities SELECT 'twice', mode, panel_id, study_id, session_id FROM identities"
                " WHERE participant = 'k'"
            )
        )
    older = rows_of(store_url)
    with pytest.raises(StoreError, match=r'(?i)unique'):
        Store(store_url, 'live')
    assert rows_of(store_url) == older


def test_the_tool(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store('sqlite:///study.sqlite', 'live') as store:
        fill(store)

        def run(*words: str) -> dict[str, object]:
            study_store.main(words)
            found: dict[str, object] = json.loads(capsys.readouterr().out)
            return found

        shown = run('show', '--store=sqlite:///study.sqlite')
        assert shown == {
            'revision': database.latest(),
            'events': 5,
            'participants': {'live: consent': 1, 'live: deleted': 1},
        }
        assert run('backup', '--store=sqlite:///study.sqlite', '--output=copy')['events'] == 5
        assert run('restore', '--backup=copy', '--store=sqlite:///new.sqlite')['identities'] == 2
        assert run('show', '--store=sqlite:///new.sqlite') == shown
        assert run('migrate', '--store=sqlite:///new.sqlite', '--revision=events') == {
            'from': 'known_by',
            'to': 'events',
        }
        for words, message in (
            (('backup', '--store=sqlite:///study.sqlite', '--output=copy'), 'expected a new file'),
            (('restore', '--backup=none', '--store=sqlite:///x.sqlite'), 'unable to open'),
            (('migrate', '--store=sqlite:///study.sqlite'), 'no other server'),
            (('migrate', '--store=sqlite:///new.sqlite', '--revision=x'), 'expected a revision'),
            (('show', '--store=sqlite:///new.sqlite'), 'found events'),
        ):
            with pytest.raises(SystemExit) as exit:
                study_store.main(words)
            assert str(exit.value.code).startswith('error: ')
            assert message in str(exit.value.code)
    assert not pathlib.Path('x.sqlite').exists()
    assert run('delete', '--store=sqlite:///study.sqlite', '--panel-id=known') == {
        'participant': 'k',
        'events deleted': 2,
    }
    assert run('show', '--store=sqlite:///study.sqlite')['participants'] == {'live: deleted': 2}
    for id, message in (('nobody', 'expected the panel id of a participant'), ('a b', 'Identity.panel_id: expected')):
        with pytest.raises(SystemExit, match=f'error: .*{message}'):
            study_store.main(['delete', '--store=sqlite:///study.sqlite', f'--panel-id={id}'])
