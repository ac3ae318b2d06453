"""The store: what is confirmed is stored once, in order, by one process, on SQLite and on PostgreSQL."""

import concurrent.futures
import contextlib
import json
import random
import resource
import secrets
import shutil
import sqlite3
import typing

import pytest
import sqlalchemy as sa

from simrl.study import database, store
from simrl.study.events import (
    STUDY,
    Arrived,
    Asked,
    Checked,
    Concluded,
    Conduct,
    Consented,
    Deleted,
    Event,
    Excluded,
    Flagged,
    Instructed,
    Looked,
    Opened,
    PairAssigned,
    PanelStatus,
    Paused,
    PlanFrozen,
    Preferred,
    Prepared,
    RecruitmentEnded,
    Replied,
    Retried,
    Returned,
    Stored,
    TurnedAway,
    TypeAssigned,
    Voided,
    Withdrew,
    Wrote,
)
from simrl.study.participant import fold_all
from simrl.study.rows import append_entries
from simrl.study.store import Arrival, ConflictError, Entry, Identity, Store, StoreError, read_events
from tests.study.postgres import postgres_server
from tests.study.studies import enter

PRLIMIT = shutil.which('prlimit')
SOMEBODY = Identity('5f1a', 'study', 'session')
ODD = 'a\0b \ud83d \U0001f600 \u202e "quoted" \'; DROP TABLE events; --\r\n'  # a NUL, half of a pair, a whole one
EVENTS = (
    Returned(True),
    Consented(True, 'hash'),
    Instructed(),
    Checked((1, 0, 2), False, True),
    TypeAssigned('letter'),
    Prepared('task', (ODD, '', 'c'), Conduct(3, 4, 5.5)),
    PairAssigned('main', 'a', 'b'),
    Asked(ODD, Conduct(1, 2, None)),
    Replied('a', 'b', ODD, 'x' * 50_000, 1 / 3, 1e-300, named=('left', 'right')),
    Voided(ODD, True),
    Retried(),
    Preferred('tie', 'left', ODD),
    Concluded(),
    Wrote(ODD, False),
    Withdrew(''),
    TurnedAway(),
    Flagged('off_task', ODD),
    Excluded(True, 'reason'),
    PanelStatus('RETURNED'),
    PlanFrozen({'looks': [0.5], 'effect': 0.58, 'nested': {'a': None}}, 'h', 'c'),
    Opened('1.0', 'c', ('a', 'b')),
    Paused(True, ODD),
    RecruitmentEnded(ODD),
    Looked(3, 15, True, 0.01),
)


def voided(participant: str, version: int, cause: str = 'cause') -> Entry:
    return Entry(participant, version, 1.0, (Voided(cause),))


def write(url: str, statement: str, **values: object) -> None:
    """Changes a store behind simrl's back."""
    with database.connect(database.parse(url), 'write') as connection, connection.begin():
        connection.execute(sa.text(statement), values)


def test_every_event_comes_back_as_it_was_stored(store_url):
    assert {type(event) for event in EVENTS} == set(typing.get_args(Event)) - {Arrived, Deleted}
    with Store(store_url, 'live') as opened:
        arrived = enter(opened, SOMEBODY, 'p', 0.1, 'live')
        [stored] = opened.append([Entry('p', 2, 1e9 + 1 / 3, EVENTS)])
        assert arrived == (Stored(1, 'p', 1, 0.1, Arrived('live')),)
        assert stored == tuple(Stored(n, 'p', n, 1e9 + 1 / 3, event) for n, event in enumerate(EVENTS, 2))
        assert opened.events() == [*arrived, *stored]
        assert opened.events(after=len(EVENTS)) == [stored[-1]]
        secret = opened.secret
    assert read_events(store_url) == [*arrived, *stored]
    with Store(store_url, 'live') as again:
        assert again.events() == [*arrived, *stored]
        assert again.secret == secret
        assert len(secret) == 32
    with pytest.raises(StoreError, match='closed'):
        again.append([voided('p', 100)])


def test_a_conflict_leaves_the_other_entries(store_url):
    with Store(store_url, 'live') as opened:
        entries = [
            Entry('p', 1, 1.0, (Arrived('live'), Consented(True, ''))),
            voided('p', 2),  # is there
            voided('p', 4),  # what precedes it is not
            voided('q', 1),
            voided('p', 3),
            voided(STUDY, 1),
            voided('q', 1),
        ]
        results = opened.append(entries)
        assert [isinstance(result, ConflictError) for result in results] == [0, 1, 1, 0, 0, 0, 1]
        assert str(results[2]) == 'p: expected event 3 to follow, found 4'
        stored = opened.events()
        assert stored == [event for result in results if not isinstance(result, ConflictError) for event in result]
        assert [event.number for event in stored] == [1, 2, 3, 4, 5]
        assert opened.append([]) == []


def test_any_calls_do_what_a_list_would(store_url):
    """Random calls, some of which conflict, and openings anew, against a list of rows and a dict of who is known."""
    drawn, rows, known = random.Random(1), list[tuple[str, int, Event]](), dict[str, str]()
    opened = Store(store_url, 'live')
    for _ in range(70):
        name = drawn.choice('pqrstuvw')
        last = max((version for participant, version, _ in rows if participant == name), default=0)
        version = max(1 + (last > 0), last + drawn.choice((0, 1, 1, 1, 2)))
        match drawn.choice(('append', 'append', 'enter', 'enter', 'delete', 'open')):
            case 'append':
                entry = Entry(
                    name, version, 1.0, tuple(Voided(str(drawn.random())) for _ in range(drawn.randint(1, 3)))
                )
                [found] = opened.append([entry])
                assert isinstance(found, ConflictError) == (version != last + 1)
                if version == last + 1:
                    rows += [(name, version + n, event) for n, event in enumerate(entry.events)]
            case 'enter':
                panel_id = drawn.choice('123456')
                new = last == 0 and panel_id not in known
                with contextlib.nullcontext() if new else pytest.raises(ConflictError):
                    enter(opened, Identity(panel_id, '', ''), name, 1.0, 'live')
                if new:
                    rows.append((name, 1, Arrived('live')))
                    known[panel_id] = name
            case 'delete' if last == 0:
                with pytest.raises(ConflictError):
                    opened.delete(name, 2, 1.0)
            case 'delete':
                with contextlib.nullcontext() if version == last + 1 else pytest.raises(ConflictError):
                    opened.delete(name, version, 1.0)
                if version == last + 1:
                    rows = [row for row in rows if row[0] != name or row[1] == 1] + [(name, version, Deleted())]
            case _:
                opened.close()
                opened = Store(store_url, 'live')
        assert [(stored.participant, stored.version, stored.event) for stored in opened.events()] == rows
        for panel_id in '123456':
            found = opened.find(Identity(panel_id, '', ''), 'live')
            assert (found and found[0]) == known.get(panel_id)
    opened.close()
    assert len(known) > 1
    assert sum(isinstance(event, Deleted) for _, _, event in rows) > 1


def test_of_writers_at_once_one_has_each_version(store_url):
    """Eight threads race for every version of two participants: a version is confirmed once, to the one it is of."""

    def race(thread: int) -> set[tuple[str, int, str]]:
        won = set()
        for version in range(1, 9):
            entries = [voided(participant, version, f'{thread}') for participant in ('p', 'q')]
            for entry, result in zip(entries, opened.append(entries), strict=True):
                if not isinstance(result, ConflictError):
                    won.add((entry.participant, version, f'{thread}'))
        return won

    with Store(store_url, 'live') as opened, concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = [one for part in pool.map(race, range(8)) for one in part]
        stored = opened.events()
    assert sorted(won) == sorted((event.participant, event.version, event.event.cause) for event in stored)
    assert sorted((participant, version) for participant, version, _ in won) == [
        (participant, version) for participant in 'pq' for version in range(1, 9)
    ]
    assert [event.number for event in stored] == list(range(1, 17))


def test_nobody_enters_twice(store_url):
    with Store(store_url, 'rehearsal') as opened, concurrent.futures.ThreadPoolExecutor(6) as pool:

        def try_to_enter(n: int) -> bool:
            try:
                return bool(enter(opened, SOMEBODY, f'p{n}', 1.0, 'rehearsal'))
            except ConflictError:
                return False

        assert sum(pool.map(try_to_enter, range(6))) == 1
        [first] = opened.events()
        assert opened.find(SOMEBODY, 'rehearsal') == (first.participant, SOMEBODY)
        assert opened.find(Identity('5f1a', 'another', 'another'), 'rehearsal') == (first.participant, SOMEBODY)
        assert opened.find(Identity('5f1b', 'study', 'session'), 'rehearsal') is None
        # A preview by the same person is somebody else.
        assert opened.find(SOMEBODY, 'preview') is None
        enter(opened, SOMEBODY, 'previewed', 1.0, 'preview')
        assert opened.find(SOMEBODY, 'preview') == ('previewed', SOMEBODY)
        with pytest.raises(StoreError, match='expected mode rehearsal or preview, found live'):
            enter(opened, Identity('other', '', ''), 'x', 1.0, 'live')
        # Where anyone may enter, everybody is new.
        for name in ('x', 'y'):
            enter(opened, Identity('', '', ''), name, 1.0, 'rehearsal')
        assert opened.find(Identity('', '', ''), 'rehearsal') is None
        with pytest.raises(ConflictError):
            enter(opened, Identity('other', '', ''), 'x', 1.0, 'rehearsal')
        assert opened.identities() == {first.participant: SOMEBODY, 'previewed': SOMEBODY}
        assert len(opened.events()) == 4


def test_many_enter_in_one_transaction(store_url):
    somebody, nobody = [Identity(name, 's', 's') for name in 'abc'], Identity('', '', '')
    with Store(store_url, 'live') as opened:
        enter(opened, somebody[0], 'p0', 1.0, 'live')
        whom = [somebody[1], somebody[0], somebody[2], somebody[1], nobody, nobody, somebody[0]]
        modes = ['live'] * 6 + ['preview']
        arrivals = [Arrival(*one) for one in zip(whom, 'uvwxyz0', [2.0] * 7, modes, strict=True)]
        results = opened.enter_all(arrivals)
        assert [isinstance(result, ConflictError) for result in results] == [0, 1, 0, 1, 0, 0, 0]
        assert [event.participant for event in opened.events()] == ['p0', 'u', 'w', 'y', 'z', '0']
        stored = [event for result in results if not isinstance(result, ConflictError) for event in result]
        assert stored == opened.events(after=1)
        found = {'p0': somebody[0], 'u': somebody[1], 'w': somebody[2], '0': somebody[0]}
        assert opened.identities() == found
        with pytest.raises(StoreError, match='expected mode live or preview'):
            opened.enter_all([Arrival(Identity('d', '', ''), 'd', 1.0, mode) for mode in ('live', 'rehearsal')])
        assert opened.identities() == found
        assert opened.enter_all([]) == []


@pytest.mark.parametrize('ids', [('a\0', '', ''), ('a', 'b c', ''), ('a' * 129, '', ''), ('a', '', 'é'), ('', 's', '')])
def test_ids_that_no_panel_has_are_refused(ids):
    with pytest.raises(ValueError, match='Identity'):
        Identity(*ids)


@pytest.mark.parametrize(
    'bad', [(0, (Retried(),)), (1, ()), (1, (Voided('x'), Wrote('', True, Conduct(0, 0, 1e999)))), (1, (Voided(3),))]
)
def test_entries_that_cannot_be_stored_are_refused(bad):
    with pytest.raises(ValueError, match=r'Entry|not JSON compliant|Voided.cause: expected'):
        Entry('p', bad[0], 1.0, bad[1])


def test_deleted_data_is_in_no_file(tmp_path, postgres):
    secret_words = 'what nobody should know'
    heap = "SELECT pg_relation_filepath('events') UNION ALL SELECT pg_relation_filepath('identities')"
    for url in (f'sqlite:///{tmp_path}/study.sqlite', postgres.database()):
        sqlite = url.startswith('sqlite')
        with Store(url, 'live') as opened:

            def bytes_of(url: str = url, sqlite: bool = sqlite) -> bytes:
                if sqlite:
                    return b''.join(path.read_bytes() for path in tmp_path.iterdir())
                with database.connect(database.parse(url), 'read') as connection:
                    connection.exec_driver_sql('SELECT 1')
                    paths = connection.scalars(sa.text(heap)).all()
                with database.connect(database.parse(url), 'write') as connection:
                    connection.execution_options(isolation_level='AUTOCOMMIT').exec_driver_sql('CHECKPOINT')
                return b''.join((postgres.folder / 'data' / path).read_bytes() for path in paths)

            enter(opened, SOMEBODY, 'p', 1.0, 'live')
            enter(opened, Identity('other', 's', 's'), 'q', 1.0, 'live')
            opened.append([voided('p', 2, secret_words), voided('q', 2, 'kept')])
            assert secret_words.encode() in bytes_of()
            with pytest.raises(ConflictError):
                opened.delete('p', 2, 2.0)
            with pytest.raises(ValueError, match='study'):
                opened.delete(STUDY, 2, 2.0)
            with pytest.raises(ValueError, match='expected a participant who came'):
                opened.delete('nobody', 1, 2.0)
            assert len(opened.events()) == 4
            deleted = opened.delete('p', 3, 2.0)
            assert deleted == (Stored(5, 'p', 3, 2.0, Deleted()),)
            left = bytes_of()
            assert secret_words.encode() not in left
            assert SOMEBODY.panel_id.encode() not in left
            assert b'kept' in left
            # They are known all the same, their state can be folded, and events that come late are refused.
            assert opened.find(SOMEBODY, 'live') == ('p', Identity('', '', ''))
            assert opened.identities() == {'q': Identity('other', 's', 's')}
            assert [event.version for event in opened.events() if event.participant == 'p'] == [1, 3]
            assert fold_all([e for e in opened.events() if e.participant == 'p'])['p'].outcome == 'deleted'
            assert all(isinstance(found, ConflictError) for found in opened.append([voided('p', 2), voided('p', 3)]))
            assert not isinstance(opened.append([Entry('p', 4, 3.0, (Returned(False),))])[0], ConflictError)


def test_a_reader_delays_no_writer_and_sees_one_moment(store_url):
    with Store(store_url, 'live') as opened:
        opened.append([voided('p', 1)])
        with database.connect(database.parse(store_url), 'read') as connection, connection.begin():
            count = sa.select(sa.func.count()).select_from(database.events)
            assert connection.scalar(count) == 1
            opened.append([voided('p', 2)])
            assert connection.scalar(count) == 1
        assert len(read_events(store_url)) == 2


def test_one_process_writes(store_url, monkeypatch):
    monkeypatch.setattr(database, 'LOCK_SECONDS', 0.0)
    with Store(store_url, 'live'):
        for mode in ('live', 'rehearsal'):
            with pytest.raises(StoreError, match=r'no other server writes to, found .*process \d+ on '):
                Store(store_url, mode)
    with pytest.raises(StoreError, match='mode rehearsal, found live'):
        Store(store_url, 'rehearsal')
    Store(store_url, 'live').close()  # the lock was given back, by the refused one too


@pytest.mark.parametrize(
    ('statement', 'message'),
    [
        ("UPDATE events SET kind = 'Levitated' WHERE version = 2", "found 'Levitated'"),
        ("UPDATE events SET body = '{' WHERE version = 2", 'Expecting property name'),
        ("UPDATE events SET body = '[]' WHERE version = 2", 'expected an object'),
        ("UPDATE events SET body = '{}' WHERE version = 2", 'cause'),
        (
            'UPDATE events SET body = \'{"cause": 3}\' WHERE version = 2',
            'Voided.cause: expected .*str.*, found another int',
        ),
        ('UPDATE events SET body = \'{"cause": "", "refused": 1}\' WHERE version = 2', 'Voided.refused: expected'),
        ('UPDATE events SET body = \'{"cause": "", "extra": 1}\' WHERE version = 2', 'extra'),
    ],
)
def test_a_damaged_row_is_named(tmp_path, statement, message):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    with Store(url, 'live') as opened:
        opened.append([voided('p', 1), voided('p', 2), voided('p', 3)])
        write(url, statement)
        with pytest.raises(StoreError, match=message) as error:
            opened.events()
    assert str(error.value).startswith(f'{tmp_path}/study.sqlite: event 2 (participant p, version 2): ')
    with pytest.raises(StoreError, match='event 2'):
        read_events(url)


def test_a_damaged_file_is_not_opened(tmp_path):
    path = tmp_path / 'study.sqlite'
    with Store(f'sqlite:///{path}', 'live') as opened:
        opened.append(
            [voided('p', 1, 'x' * 2000) for _ in range(1)] + [voided(f'p{n}', 1, 'x' * 2000) for n in range(40)]
        )
    content = bytearray(path.read_bytes())
    pages = len(content) // 4096
    for page in range(pages // 2, pages):
        content[page * 4096 : page * 4096 + 64] = b'\xff' * 64
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r'study\.sqlite: .*(malformed|whole database)'):
        Store(f'sqlite:///{path}', 'live')


def test_a_store_of_a_newer_version_is_left_as_it_is(store_url):
    with Store(store_url, 'live') as opened:
        opened.append([voided('p', 1)])
    write(store_url, f"UPDATE {database.REVISION_TABLE} SET version_num = 'later'")
    for action in (lambda: Store(store_url, 'live'), lambda: read_events(store_url)):
        with pytest.raises(StoreError, match=r'expected a store of revision known_by.* found later'):
            action()
    write(store_url, f"UPDATE {database.REVISION_TABLE} SET version_num = '{database.latest()}'")
    assert len(read_events(store_url)) == 1


def test_another_programs_database_is_left_as_it_is(store_url):
    with database.connect(database.parse(store_url), 'create') as connection, connection.begin():
        connection.exec_driver_sql('CREATE TABLE alembic_version (version_num TEXT)')
    for action in (lambda: Store(store_url, 'live'), lambda: read_events(store_url)):
        with pytest.raises(
            StoreError, match=r"expected a study or an empty database, found tables \['alembic_version'\]"
        ):
            action()


@pytest.mark.parametrize(
    ('url', 'message'),
    [
        ('study.sqlite', 'expected sqlite:///FILE or postgresql://USER@HOST/NAME'),
        ('sqlite://', 'expected sqlite:///FILE'),
        ('sqlite:///:memory:', 'expected sqlite:///FILE'),
        ('mysql://host/name', 'expected sqlite:///FILE'),
        ('postgresql://host', 'expected sqlite:///FILE'),
        ('postgresql://user:hunter2@host/name', 'expected no password'),
        ('sqlite:///{tmp}/none/study.sqlite', 'No such file or directory'),
        ('sqlite:///{tmp}', 'Is a directory|unable to open'),
        ('sqlite:///{tmp}/text', 'file is not a database'),
        ('postgresql://nobody@/none?host={tmp}', 'connection .*failed|No such file'),
    ],
)
def test_what_cannot_be_opened_is_said_in_a_line(tmp_path, url, message):
    (tmp_path / 'text').write_text('some text\n' * 1000)
    url = url.format(tmp=tmp_path)
    with pytest.raises(StoreError, match=message) as error:
        Store(url, 'live')
    assert '\n' not in str(error.value)
    assert 'hunter2' not in str(error.value)
    with pytest.raises(StoreError):
        read_events(url)
    assert {path.name for path in tmp_path.iterdir()} <= {'text', 'text.lock', f'{tmp_path.name}.lock'}


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(StoreError, match='unable to open database file'):
        read_events(f'sqlite:///{tmp_path}/study.sqlite')
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_moved_or_replaced_is_written_no_more(tmp_path):
    path = tmp_path / 'study.sqlite'
    with Store(f'sqlite:///{path}', 'live') as opened:
        opened.append([voided('p', 1)])
        path.rename(tmp_path / 'moved')
        with pytest.raises(StoreError, match=r'study\.sqlite.*No such file'):
            opened.append([voided('p', 2)])
        path.write_bytes((tmp_path / 'moved').read_bytes())
        with pytest.raises(StoreError, match='another file was put in its place'):
            opened.append([voided('p', 2)])
        path.unlink()
        (tmp_path / 'moved').rename(path)
        opened.append([voided('p', 2)])
    assert len(read_events(f'sqlite:///{path}')) == 2


def test_only_its_owner_may_read_a_store(tmp_path):
    with Store(f'sqlite:///{tmp_path}/study.sqlite', 'live') as opened:
        opened.append([voided('p', 1)])
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        assert len(list(tmp_path.iterdir())) == 4  # its log of writes, that one's index, and the lock


@pytest.mark.parametrize('limit', ['disk', 'file size'])
def test_a_full_disk_stores_nothing_by_halves_and_ends_once_there_is_room(tmp_path, limit):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    confirmed: list[Stored] = []
    with Store(url, 'live') as opened:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        connection = typing.cast(sqlite3.Connection, opened._connection.connection.driver_connection)
        [pages] = connection.execute('PRAGMA page_count').fetchone()
        try:
            if limit == 'disk':
                connection.execute(f'PRAGMA max_page_count = {pages + 20}')
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
            for version in range(1, 1000):
                try:
                    [stored] = opened.append([voided('p', version, 'x' * 3000)])
                except StoreError as error:
                    failed = str(error)
                    break
                confirmed += stored
            with pytest.raises(StoreError):
                opened.append([voided('q', 1, 'x' * 300_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            connection.execute(f'PRAGMA max_page_count = {2**30}')
        assert failed.endswith('database or disk is full' if limit == 'disk' else 'disk I/O error')
        assert 3 < len(confirmed) < 100
        assert opened.events() == confirmed
        confirmed += opened.append([voided('p', version, 'later')])[0]
    assert read_events(url) == confirmed


@pytest.mark.long
@pytest.mark.skipif(PRLIMIT is None, reason='needs prlimit, of util-linux')
def test_a_full_disk_under_postgresql_stores_nothing_by_halves_and_ends_once_there_is_room():
    """The server's files may grow no further, as on a full disk: tables are extended, and logs written, by one way."""
    with postgres_server() as server:
        url = server.database()
        pid = int((server.folder / 'data' / 'postmaster.pid').read_text().split()[0])
        server.run(PRLIMIT, f'--pid={pid}', f'--fsize={17 * 2**20}:')  # a segment of its log has 16
        with Store(url, 'live') as opened:
            confirmed = [*opened.append([voided('p', 1)])[0]]
            for version in range(2, 200):
                try:
                    [stored] = opened.append([voided('p', version, secrets.token_urlsafe(300_000))])
                except StoreError as error:
                    failed = str(error)
                    break
                confirmed += stored
            assert 'could not extend file' in failed
            assert '\n' not in failed
            assert 10 < len(confirmed) < 100
            assert opened.events() == confirmed
            with pytest.raises(StoreError, match='could not extend file'):
                opened.append([voided('q', 1, secrets.token_urlsafe(300_000))])
            server.stop('fast')
            server.start()
            confirmed += opened.append([voided('p', version, secrets.token_urlsafe(300_000))])[0]
            assert opened.events() == confirmed


def test_the_store_is_append_only(store_url):
    """Statements of every method but `delete` only insert and select."""
    statements: list[str] = []
    with Store(store_url, 'live') as opened:
        sa.event.listen(
            opened._connection.engine, 'before_cursor_execute', lambda _, __, text, *rest: statements.append(text)
        )
        enter(opened, SOMEBODY, 'p', 1.0, 'live')
        opened.append([voided('p', 2), voided('p', 2)])
        opened.find(SOMEBODY, 'live')
        opened.events()
        opened.identities()
    assert {text.split()[0] for text in statements} <= {'INSERT', 'SELECT', 'BEGIN'}


def test_commits_are_on_disk(store_url):
    """The databases are told to sync at every commit: what a test can see of a loss of power."""
    with Store(store_url, 'live') as opened:
        driver = opened._connection.connection.driver_connection
        if store_url.startswith('sqlite'):
            settings = {
                name: driver.execute(f'PRAGMA {name}').fetchone()[0] for name in ('journal_mode', 'synchronous')
            }
            assert settings == {'journal_mode': 'wal', 'synchronous': 2}
        else:
            assert driver.execute('SHOW synchronous_commit').fetchone()[0] == 'on'


def test_a_row_is_json_that_any_program_reads(tmp_path):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    with Store(url, 'live') as opened:
        opened.append([Entry('p', 1, 1.0, (Asked(ODD), Paused(True, 'é')))])
        rows = sqlite3.connect(tmp_path / 'study.sqlite').execute('SELECT kind, body FROM events').fetchall()
    assert [kind for kind, _ in rows] == ['Asked', 'Paused']
    assert all(body.isascii() for _, body in rows)
    assert json.loads(rows[0][1])['message'] == ODD


def test_retries_are_bounded(postgres, monkeypatch):
    """A connection that is lost is made anew; a server that stays away ends the store, as nobody knows what it has."""
    monkeypatch.setattr(store, 'RECONNECT_SECONDS', 0.5)
    store_url = postgres.database()
    other = database.parse(store_url)

    def drop() -> None:
        with database.connect(other, 'write') as connection, connection.begin():
            connection.execute(
                sa.text('SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = :kind'), {'kind': 'advisory'}
            )

    with Store(store_url, 'live') as opened:
        opened.append([voided('p', 1)])
        drop()
        [stored] = opened.append([voided('p', 2)])
        assert [event.number for event in stored] == [2]
        # The lock is held again.
        monkeypatch.setattr(database, 'LOCK_SECONDS', 0.0)
        with pytest.raises(StoreError, match='no other server'):
            Store(store_url, 'live')

        # The commit was done, and its confirmation lost: the second try finds it and stores nothing.
        entries = [voided('p', 3), voided('p', 1), voided(STUDY, 1)]

        def lost(connection: sa.Connection, again: bool) -> list[tuple[Stored, ...] | ConflictError]:
            if not again:
                with database.connect(other, 'write') as second, second.begin():
                    append_entries(second, entries, False)
                drop()
            return append_entries(connection, entries, again)

        first, found, third = opened._transact(lost)
        assert [event.number for event in (*first, *found, *third)] == [3, 1, 4]
        assert [event.number for event in opened.events()] == [1, 2, 3, 4]

        postgres.stop()
        try:
            with pytest.raises(StoreError, match='connection') as error:
                opened.append([voided('p', 4)])
        finally:
            postgres.start()
        assert '\n' not in str(error.value)
        with pytest.raises(StoreError, match='must be started again'):
            opened.append([voided('p', 4)])
    with Store(store_url, 'live') as opened:
        assert len(opened.events()) == 4
