"""The file of answers: shared by processes, whole after a kill, and no other file."""

import pathlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from simrl.remote import cache as cache_lib
from simrl.remote.cache import Cache, CacheError

WRITER = """
import pathlib, sys
from simrl.remote import cache as cache_lib
path, name, count, shared = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == 'shared'
cache_lib.LOCAL = () if shared else (cache_lib.file_system(pathlib.Path(path).parent),)
cache = cache_lib.Cache(path)
for i in range(count):
    kept = cache.put(f'key {i}', {'text': f'{name} {i}'}, model='m', cost=0.5)
    print(kept['text'], flush=True)
"""


FOLDERS = pytest.mark.parametrize('folder', ['local', 'shared'])  # 'shared': with other machines


def writer(path: pathlib.Path, name: str, count: int, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', WRITER, str(path), name, str(count), folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@FOLDERS
def test_two_processes_share_a_file_and_read_the_same_answers(tmp_path, folder) -> None:
    path = tmp_path / 'cache'
    both = [writer(path, name, 200, folder) for name in 'ab']
    first, second = (process.communicate(timeout=60)[0].splitlines() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert path.read_bytes()[18:20] == (b'\2\2' if folder == 'local' else b'\1\1')  # versions: 2 with a log
    assert first == second
    assert len(first) == 200
    with Cache(path) as cache:
        assert len(cache) == 200
        assert cache.spent('m') == 200.0  # both paid for each
        assert cache.get('key 7') == {'text': first[7]}


@FOLDERS
def test_a_kill_loses_no_answer_that_was_kept(tmp_path, folder) -> None:
    path = tmp_path / 'cache'
    process = writer(path, 'a', 10**6, folder)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait(timeout=60)
    whole = [line for line in lines if line.endswith('\n')]
    with Cache(path) as cache:
        assert len(cache) - len(whole) in (0, 1)
        assert cache.spent('m') == 0.5 * len(cache)
        assert cache.get(f'key {len(whole) - 1}') == {'text': f'a {len(whole) - 1}'}


def test_a_file_goes_to_a_folder_of_many_machines_and_back(tmp_path, monkeypatch) -> None:
    path = tmp_path / 'cache'
    here = (cache_lib.file_system(tmp_path),)
    for number, local in enumerate([here, (), here]):
        monkeypatch.setattr(cache_lib, 'LOCAL', local)
        with Cache(path) as cache:
            assert cache.put('k', {'text': str(number)}, model='m') == {'text': '0'}
        assert path.read_bytes()[18] == (2 if local else 1)


def test_the_file_system_of_a_folder(tmp_path, monkeypatch) -> None:
    """That of its innermost mount, the last one there; names may have spaces, and a link leads elsewhere."""
    (tmp_path / 'a b' / 'runs').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'a b' / 'runs')
    kinds = [('/', 'ext4'), (f'{tmp_path}/a\\040b', 'xfs'), (f'{tmp_path}/a\\040b', 'nfs4'), ('/elsewhere', 'btrfs')]
    text = ''.join(f'{i} 1 0:{i} / {place} rw - {kind} from rw\n' for i, (place, kind) in enumerate(kinds))
    monkeypatch.setattr(cache_lib, 'MOUNTS', tmp_path / 'mountinfo')
    assert cache_lib.file_system(tmp_path) == '', 'another system'
    (tmp_path / 'mountinfo').write_text(text)
    assert cache_lib.file_system(tmp_path / 'a b' / 'runs') == 'nfs4'
    assert cache_lib.file_system(tmp_path / 'link') == 'nfs4'
    assert cache_lib.file_system(tmp_path / 'a') == 'ext4'


def test_the_first_answer_to_a_key_stays(tmp_path) -> None:
    with Cache(tmp_path / 'new' / 'cache') as cache:
        assert cache.get('k') is None
        assert cache.put('k', {'text': 'a'}, model='m') == {'text': 'a'}
        assert cache.put('k', {'text': 'b'}, model='m') == {'text': 'a'}
        cache.put_failure('j', 'schema', 'detail', 'raw', model='m', cost=2.0)
        assert cache.get('j') is None
        assert cache.failures() == [('j', 'schema', 'detail', 'raw')]
        assert (cache.spent('m'), cache.spent('n')) == (2.0, 0.0)


def other_sqlite(path: pathlib.Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute('CREATE TABLE t (x)')
    connection.commit()
    connection.close()


def other_version(path: pathlib.Path) -> None:
    Cache(path).close()
    connection = sqlite3.connect(path)
    connection.execute('PRAGMA user_version = 7')
    connection.close()


def damaged(path: pathlib.Path) -> None:
    with Cache(path) as cache:
        for i in range(200):
            cache.put(str(i), {'text': 'x' * 100}, model='m')
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b'\xff' * 8192 + content[12288:])


@pytest.mark.parametrize(
    ('make', 'found'),
    [
        (lambda path: path.write_bytes(b'no database' * 100), 'not a database'),
        (other_sqlite, 'found another sqlite file'),
        (other_version, 'expected a cache of format 1, found 7'),
        (damaged, 'malformed'),
        (lambda path: path.mkdir(), 'unable to open'),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, make, found: str) -> None:
    path = tmp_path / 'file'
    make(path)
    with pytest.raises(CacheError, match=rf'{path}.*{found}'), Cache(path) as cache:
        cache.get('7')
