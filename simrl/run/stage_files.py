"""Files of a stage's folder: its records, its lock, and the hashes by which changes are found.

    stage.lock    flock: exclusive while a process runs the stage, shared while others read it; a kill releases it
    stage.json    the stage's settings and the hashes of its inputs, written when it starts
    done.json     the same, with hash, size and mtime of every output and the seconds it took; written last
    checkpoints/  what a started stage resumes from, or where that is; deleted once the stage is done

The hash of a file is the sha256 of its bytes; of a file over 64 MiB, of its size and its first and last MiB. The hash
of a folder covers the names and hashes of all its files; the hash of a stage covers its settings, inputs and outputs. A
rerun therefore invalidates the stages that read it only if it writes other bytes. (A training always does: its metrics
contain times.)

An output with the size and mtime of done.json is taken as unchanged and not hashed again. Files that others put into
the folder of a finished stage are ignored, and those that file managers leave (hidden ones, LITTER) everywhere. So are
tensorboard/ and profile/, which no stage reads and to which viewers add files.
"""

import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

STAGE_FILE, DONE_FILE, LOCK_FILE = 'stage.json', 'done.json', 'stage.lock'
EMPTYING_FILE = 'stage.emptying'  # what stage.json is renamed to while a stage is emptied
SCRATCH_FOLDER = 'checkpoints'
PLACE_FILE = 'place.json'  # in it, where checkpoints are elsewhere: {"folder": path or URL}
# Folders of a stage that nothing depends on.
NO_OUTPUTS = (SCRATCH_FOLDER, 'tensorboard', 'profile', 'profile.unfinished')
NEW_SUFFIX = '.new'  # of a file that is not renamed yet
NFS_PREFIX = '.nfs'  # of a deleted file that NFS keeps while a process, such as TensorBoard, has it open
LITTER = ('Thumbs.db', 'desktop.ini', '@eaDir')  # of file managers and network drives
POLL_SECONDS = 0.2  # between two attempts to take a lock
LARGE_FILE, FILE_END = 64 * 2**20, 2**20  # bytes


class WorkdirError(RuntimeError):
    """A run directory or stage does not fit the command: other settings, changed files, or no run at all."""


def read_started(folder: pathlib.Path) -> dict[str, Any] | None:
    """stage.json; None if the stage is not started."""
    started = read_json(folder / STAGE_FILE)
    if started is not None and not started.keys() >= {'settings', 'inputs'}:
        raise WorkdirError(
            f'{folder / STAGE_FILE}: expected settings and inputs, found {shorten(sorted(started)) or "none"}: it is '
            'of another version of simrl, or damaged'
        )
    return started


def is_done(folder: pathlib.Path) -> bool:
    return (folder / DONE_FILE).exists() and (folder / STAGE_FILE).exists()


def read_done(folder: pathlib.Path) -> dict[str, Any]:
    """done.json of a finished stage.

    Raises:
        WorkdirError: it is missing, or written by another version.
    """
    done = read_json(folder / DONE_FILE)
    if done is None:
        raise WorkdirError(f'{folder}: expected a finished stage, found no {DONE_FILE}')
    if missing := sorted({'name', 'settings', 'inputs', 'outputs', 'seconds'} - done.keys()):
        raise WorkdirError(
            f'{folder / DONE_FILE}: expected {", ".join(missing)}, found none: it is of another version of simrl, or '
            'damaged'
        )
    return done


def is_stage(path: pathlib.Path) -> bool:
    """True if the path is the folder of a stage, or of one that was emptied."""
    return (path / STAGE_FILE).exists() or (path / LOCK_FILE).exists()


def check_is_stage(folder: pathlib.Path) -> None:
    """Raises WorkdirError if the folder contains files but no stage."""
    paths = [path for path in folder.iterdir() if not is_foreign(path)]
    names = {path.name for path in paths if path.is_file() or _files(path)}
    if not names & {STAGE_FILE, EMPTYING_FILE} and (others := sorted(names - {LOCK_FILE})):
        raise WorkdirError(f'{folder}: expected an empty folder or a stage ({STAGE_FILE}), found {shorten(others)}')


def remove_scratch(folder: pathlib.Path) -> None:
    place = read_json(folder / SCRATCH_FOLDER / PLACE_FILE)
    if place is not None:
        from etils import epath  # which takes a moment

        try:
            epath.Path(place['folder']).rmtree(missing_ok=True)
        except Exception as error:  # of a bucket, of whichever library
            print(f'{place["folder"]}: not deleted ({error})', flush=True)
    shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)  # another process may delete it at the same time


def empty(folder: pathlib.Path) -> None:
    """Deletes all files of a stage but its lock. The stage is at once not started; after a kill, call it again."""
    if (folder / STAGE_FILE).exists():
        os.replace(folder / STAGE_FILE, folder / EMPTYING_FILE)
        sync(folder)
    remove_scratch(folder)
    for path in list(folder.iterdir()):
        if path.name not in (LOCK_FILE, EMPTYING_FILE):
            _delete(path)
    (folder / EMPTYING_FILE).unlink()


def _delete(path: pathlib.Path) -> None:
    """Deletes a file or a folder, except what NFS keeps and the folders around it."""
    if path.name.startswith(NFS_PREFIX):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for inner in list(path.iterdir()):
        _delete(inner)
    if not any(path.iterdir()):
        path.rmdir()


class Hashes:
    """Hashes of inputs, each computed once per process. A later change to a file is not noticed; a rerun stage is."""

    def __init__(self) -> None:
        self._known: dict[pathlib.Path, tuple[str, int | None]] = {}

    def of(self, path: pathlib.Path) -> str:
        """The hash of a file, a folder, or a finished stage.

        Raises:
            WorkdirError: an output of the stage was changed or removed; or the stage was rerun after it was hashed
                here: this process may still hold its old outputs in memory.
        """
        path = path.absolute()
        finished_at = (path / DONE_FILE).stat().st_mtime_ns if is_done(path) else None
        if path not in self._known:
            self._known[path] = (hash_path(path) if finished_at is None else _hash_stage(path), finished_at)
        known, before = self._known[path]
        if finished_at != before:
            raise WorkdirError(f'{path}: another process reran this stage after it was read here; start again')
        return known


def _hash_stage(folder: pathlib.Path) -> str:
    done = read_done(folder)
    faults = []
    for name, output in done['outputs'].items():
        path = folder / name
        if not path.is_file():
            faults.append(f'{name} is missing')
        elif _size_and_mtime(path) != [output['size'], output['mtime_ns']] and _hash_file(path) != output['hash']:
            faults.append(f'{name} was changed')
    if faults:
        raise WorkdirError(
            f'{folder}: expected the outputs of stage {done["name"]}, found that {shorten(faults)}; '
            f'--rerun={done["name"]} (in its own run) makes them again'
        )
    hashes = {name: output['hash'] for name, output in done['outputs'].items()}
    identity = {'settings': done['settings'], 'inputs': done['inputs'], 'outputs': hashes}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def describe_outputs(folder: pathlib.Path) -> dict[str, Any]:
    """Hash, size and mtime of every file that a stage wrote, by its path in the folder."""
    outputs = {}
    for name, file in _files(folder):
        if not (name in (STAGE_FILE, DONE_FILE, LOCK_FILE) or is_new(file) or name.split('/')[0] in NO_OUTPUTS):
            size, mtime_ns = _size_and_mtime(file)
            outputs[name] = {'hash': _hash_file(file), 'size': size, 'mtime_ns': mtime_ns}
    return outputs


def hash_path(path: pathlib.Path) -> str:
    """The hash of a file or folder, 64 hexadecimal digits; see the module's docstring."""
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for name, file in _files(path):
        digest.update(f'{name}\0{_hash_file(file)}\0'.encode())
    return digest.hexdigest()


def _files(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """All files below a folder by path, but those that file managers leave."""
    paths = ((path.relative_to(folder), path) for path in sorted(folder.rglob('*')) if path.is_file())
    return [(name.as_posix(), path) for name, path in paths if not any(map(_is_litter, name.parts))]


def _is_litter(name: str) -> bool:
    return name.startswith('.') or name in LITTER


def _size_and_mtime(path: pathlib.Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _hash_file(path: pathlib.Path) -> str:
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        if size <= LARGE_FILE:
            return hashlib.file_digest(file, 'sha256').hexdigest()
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(FILE_END))
        file.seek(size - FILE_END)
        digest.update(file.read())
        return digest.hexdigest()


@contextmanager
def lock(folder: pathlib.Path, *, shared: bool = False) -> Iterator[str | None]:
    """Tries to lock a folder, without waiting. Yields None if it is locked now, else a text about the lock's holder.

    Args:
        folder: of a stage, or another one.
        shared: as a reader: many may read at once, while none runs or empties the stage.

    Raises:
        WorkdirError: the folder's file system supports no locks.
    """
    path = folder / LOCK_FILE
    if shared and not path.exists() and not os.access(folder, os.W_OK):
        yield None  # a read-only copy, which no process can empty either
        return
    with open(path, 'r' if shared and path.exists() else 'a+', encoding='utf-8') as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or 'an unknown process, maybe only a reader'
            return
        except OSError as error:
            raise WorkdirError(
                f'{folder}: its file system supports no locks (flock: {error.strerror}), which keep two processes from '
                'writing one stage. Use a workdir on another file system'
            ) from error
        if shared:
            yield None
            return
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield None
        file.truncate(0)


def lock_holder(folder: pathlib.Path) -> str | None:
    """The process that runs the stage; None if there is none. Writes nothing."""
    path = folder / LOCK_FILE
    if not path.exists() or not path.stat().st_size:  # a process that runs a stage writes its name
        return None
    with lock(folder, shared=True) as holder:  # fails unless the name is that of a killed process
        return holder


@contextmanager
def wait_for_lock(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder and locks it, waiting while another process has it. Half-written files of a kill are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    announced = False
    while True:
        with lock(folder) as holder:
            if holder is None:
                for path in filter(is_new, list(folder.iterdir())):
                    path.unlink()
                yield
                return
        if not announced:
            print(f'\n== {folder.name}: waiting for {holder}', flush=True)
            announced = True
        time.sleep(POLL_SECONDS)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file."""
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f'{path}: expected JSON, found {error}') from error
    if not isinstance(value, dict):
        raise WorkdirError(f'{path}: expected a JSON object, found {type(value).__name__}')
    return value


def write_json(path: pathlib.Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes atomically (write, fsync, rename): after a crash the file is complete or not there."""
    new = path.with_name(f'{path.name}.{os.getpid()}{NEW_SUFFIX}')
    with named_errors(path), open(new, 'w', encoding='utf-8') as file:
        file.write(json.dumps(value, indent=1) + '\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


@contextmanager
def named_errors(path: pathlib.Path) -> Iterator[None]:
    """Adds the file's path to an OSError; that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f'could not write {path}: {error.strerror or error}') from error


def sync(path: pathlib.Path) -> None:
    """Flushes a file, or the names in a folder, to the disk. Some file systems (SMB, FUSE) flush no folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def is_new(path: pathlib.Path) -> bool:
    """True if the file is a leftover of a killed `write_json`."""
    return path.name.endswith(NEW_SUFFIX)


def is_foreign(path: pathlib.Path) -> bool:
    """True if the file is one that file managers and editors leave, or a leftover of a killed process."""
    return _is_litter(path.name) or is_new(path)


def shorten(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
