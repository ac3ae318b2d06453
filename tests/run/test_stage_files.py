"""Files of a stage's folder: what is an output, what is hashed, and writes that a kill leaves whole."""

import errno
import fcntl
import json
import os
import pathlib
import stat
import subprocess
import sys
from typing import Any

import pytest

from simrl.run import stage_files
from simrl.run.stages import WorkdirError
from tests.run.five_stages import SETTINGS, Work, run_one


def test_changed_and_missing_outputs_are_named_and_other_files_are_ignored(tmp_path: pathlib.Path) -> None:
    folder, work = tmp_path / 'run' / 'sft', Work()
    run_one(folder, SETTINGS, {}, work)
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / '.ipynb_checkpoints' / 'result.json').write_text('foreign')
    os.utime(folder / 'result.json', ns=(0, 0))  # as after a copy: the same bytes of another time
    assert run_one(folder, SETTINGS, {}, work) == 'skipped'

    text = (folder / 'result.json').read_text()
    (folder / 'result.json').write_text(text[::-1])  # of the same size
    (folder / 'half').unlink()
    named = r'sft: expected the outputs of stage sft, found that half is missing, result\.json was changed; --rerun=sft'
    with pytest.raises(WorkdirError, match=named):
        run_one(folder, SETTINGS, {}, work)
    with pytest.raises(WorkdirError, match=named):
        run_one(tmp_path / 'other' / 'rl', SETTINGS, {'simulator': folder}, work)
    assert work.calls == 1
    assert run_one(folder, SETTINGS, {}, work, rerun=True) == 'finished'
    assert not (folder / '.ipynb_checkpoints').exists()


def test_unchanged_outputs_are_hashed_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    monkeypatch.setattr(stage_files, '_hash_file', lambda path: pytest.fail(f'{path} was hashed again'))
    assert run_one(tmp_path / 'sft', SETTINGS, {}, Work()) == 'skipped'


@pytest.mark.parametrize(
    ('name', 'field', 'message'),
    [
        ('stage.json', 'settings', r'stage\.json: expected settings and inputs, found inputs'),
        ('done.json', 'outputs', r'done\.json: expected outputs, found none: it is of another version of simrl'),
    ],
)
def test_damaged_records(tmp_path: pathlib.Path, name: str, field: str, message: str) -> None:
    run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    path = tmp_path / 'sft' / name
    path.write_text(json.dumps({key: x for key, x in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(WorkdirError, match=message):
        run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    path.write_text('[]')
    with pytest.raises(WorkdirError, match='expected a JSON object, found list'):
        run_one(tmp_path / 'sft', SETTINGS, {}, Work())


def test_scratch_and_half_written_records_are_no_outputs(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'sft'

    def work(where: pathlib.Path) -> None:
        for name in ('checkpoints', 'params'):
            (where / name).mkdir()
            (where / name / 'checkpoints').write_text('large')

    run_one(folder, SETTINGS, {}, work)
    assert not (folder / 'checkpoints').exists()
    assert set(json.loads((folder / 'done.json').read_text())['outputs']) == {'params/checkpoints'}
    (folder / 'checkpoints').mkdir()  # as after a kill before it was deleted
    assert run_one(folder, SETTINGS, {}, work) == 'skipped'
    assert not (folder / 'checkpoints').exists()


def test_files_of_viewers_are_no_outputs(tmp_path: pathlib.Path) -> None:
    """They are there before the stage is done, and are changed or deleted afterwards."""
    folder = tmp_path / 'sft'
    names = (
        *('.DS_Store', 'params/.ipynb_checkpoints/x', 'tensorboard/events', 'profile/plugins/ALL_HOSTS.op_stats.pb'),
        *('Thumbs.db', 'params/@eaDir/x'),
    )

    def work(where: pathlib.Path) -> None:
        for name in (*names, 'params/x'):
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text('first')

    run_one(folder, SETTINGS, {}, work)
    assert set(json.loads((folder / 'done.json').read_text())['outputs']) == {'params/x'}
    for name in names[::2]:
        (folder / name).write_text('another')
    for name in names[1::2]:
        (folder / name).unlink()
    assert run_one(folder, SETTINGS, {}, work) == 'skipped'


def test_a_file_that_nfs_keeps_does_not_stop_a_rerun(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a deleted file that a process has open becomes a hidden one, which cannot be deleted until that ends."""
    folder, kept = tmp_path / 'sft', '.nfs0001'

    def work(where: pathlib.Path) -> None:
        (where / 'tensorboard').mkdir(exist_ok=True)
        (where / 'tensorboard' / 'events').write_text('first')
        (where / 'result.json').write_text('first')

    def unlink(path: pathlib.Path, missing_ok: bool = False) -> None:
        if path.name == kept:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        os.rename(path, path.with_name(kept)) if path.name == 'events' else os.unlink(path)

    run_one(folder, SETTINGS, {}, work)
    monkeypatch.setattr(pathlib.Path, 'unlink', unlink)
    stage_files.empty(folder)
    assert sorted(path.name for path in folder.rglob('*')) == [kept, 'stage.lock', 'tensorboard']
    monkeypatch.undo()
    assert run_one(folder, SETTINGS, {}, work) == 'finished'


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders(tmp_path: pathlib.Path, monkeypatch, number: int) -> None:
    """SMB and some FUSE file systems; a failing disk is an error, and so are files that are not flushed."""

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'fsync', fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match='Input/output error'):
            stage_files.write_json(tmp_path / 'a.json', {})
    else:
        stage_files.write_json(tmp_path / 'a.json', {'a': 1})
        assert stage_files.read_json(tmp_path / 'a.json') == {'a': 1}
    monkeypatch.setattr(os, 'fsync', lambda _: fsync(os.open(tmp_path, os.O_RDONLY)))
    with pytest.raises(OSError, match=os.strerror(number)):
        stage_files.sync(tmp_path / 'a.json')


def test_hash_of_folders_and_large_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'model'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'sub' / 'a').write_bytes(b'a' * 100)
    first = stage_files.hash_path(folder)
    (folder / 'sub' / 'a').rename(folder / 'sub' / 'b')
    assert (renamed := stage_files.hash_path(folder)) != first  # names count
    (folder / '.cache').mkdir()
    (folder / '.cache' / 'downloaded').write_text('today')
    assert stage_files.hash_path(folder) == renamed  # hidden files do not
    monkeypatch.setattr(stage_files, 'LARGE_FILE', 50)
    monkeypatch.setattr(stage_files, 'FILE_END', 10)
    whole = stage_files.hash_path(folder / 'sub' / 'b')
    for changed in (b'b' + b'a' * 99, b'a' * 99 + b'b', b'a' * 101):
        (folder / 'sub' / 'b').write_bytes(changed)
        assert stage_files.hash_path(folder / 'sub' / 'b') != whole


WRITE_RESULTS = """
import json, os, pathlib, sys, time
from simrl.run import stage_files

results, value = pathlib.Path(sys.argv[1]), [os.getpid()] * 20000
for _ in range(int(sys.argv[2])):
    with stage_files.wait_for_lock(results):
        os.close(os.open(results.parent / 'busy', os.O_CREAT | os.O_EXCL))  # fails where another is in here
        for name in 'abcde':
            stage_files.write_json(results / f'{name}.json', value)
            print(name, flush=True)
        assert all(json.loads((results / f'{name}.json').read_text()) == value for name in 'abcde')
        (results.parent / 'busy').unlink()
"""


def write_results(results: pathlib.Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', WRITE_RESULTS, str(results), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_write_results_take_turns(tmp_path: pathlib.Path) -> None:
    processes = [write_results(tmp_path / 'results', 3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(''.join(line for line in text.split() if len(line) == 1) == 3 * 'abcde' for text in outputs)


def test_a_killed_writer_leaves_whole_files(tmp_path: pathlib.Path) -> None:
    results = tmp_path / 'results'
    for lines in (1, 7, 8, 14, 20):
        process = write_results(results, 1000)
        assert process.stdout is not None
        assert all(process.stdout.readline() for _ in range(lines))
        process.kill()
        process.communicate()
        for path in results.glob('*.json'):
            assert len(set(json.loads(path.read_text()))) == 1
        (tmp_path / 'busy').unlink(missing_ok=True)
    (results / 'a.json.1.new').write_text('[1, ')  # as after a kill before it was renamed
    with stage_files.wait_for_lock(results):
        assert {path.name for path in results.iterdir()} == {'stage.lock', *(f'{name}.json' for name in 'abcde')}


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, 'flock', flock)
    for shared in (False, True):
        with (
            pytest.raises(
                WorkdirError, match=rf'^{tmp_path}: its file system supports no locks \(flock: Operation not'
            ),
            stage_files.lock(tmp_path, shared=shared),
        ):
            pass


def test_a_full_disk_is_named(tmp_path) -> None:
    new = tmp_path / f'a.json.{os.getpid()}.new'
    new.symlink_to('/dev/full')
    with pytest.raises(OSError, match=rf'could not write {tmp_path}/a\.json: No space left on device'):
        stage_files.write_json(tmp_path / 'a.json', {})
