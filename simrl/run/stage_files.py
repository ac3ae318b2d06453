"""What a stage's folder holds besides the stage's own files, and what is hashed of files, folders and stages.

    stage.lock    held (flock) while a process works on the stage, shared by those that read it; a kill leaves no lock
    stage.json    the slice of the config that the stage depends on, and the hashes of its inputs
    done.json     the same, the hash of every file that the stage left, and how long its work took; written last
    checkpoints/  what only a stage in work needs: it goes once the stage is done

The hash of a file is the sha256 of its bytes, for one over 64 MiB that of its size and of its first and last MiB; of a
folder that of the names and hashes of all files in it; of a stage that of its slice, inputs and files as done.json has
them. So a stage that is run again makes what rests on it out of date where it leaves other bytes, and only there. (A
training always does: its parameters' folder and its metrics hold the time.)
"""

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
SCRATCH_FOLDER = 'checkpoints'
NEW_SUFFIX = '.new'  # of a file that is not renamed yet
POLL_SECONDS = 0.2  # between two looks at what other processes hold
LARGE_FILE, FILE_END = 64 * 2**20, 2**20  # bytes


class WorkdirError(RuntimeError):
    """A folder is not what a stage or a run may write to or read: of another config, changed, or something else."""


def is_done(folder: pathlib.Path) -> bool:
    return (folder / DONE_FILE).exists()


def read_done(folder: pathlib.Path) -> dict[str, Any]:
    """The done.json of a finished stage.

    Raises:
        WorkdirError: there is none, or it is of another version.
    """
    done = read_json(folder / DONE_FILE)
    if done is None:
        raise WorkdirError(f'{folder}: expected a finished stage, found no {DONE_FILE}')
    if missing := sorted({'name', 'slice', 'inputs', 'outputs', 'seconds'} - done.keys()):
        raise WorkdirError(f'{folder / DONE_FILE}: expected what this version writes, found no {", ".join(missing)}')
    return done


def is_stage(path: pathlib.Path) -> bool:
    """Whether it is the folder of a stage, or was and is cleared."""
    return (path / STAGE_FILE).exists() or (path / LOCK_FILE).exists()


def is_settled(folder: pathlib.Path) -> bool:
    """Whether a stage is done, and not about to be cleared."""
    return is_done(folder) and 'clearing' not in (read_json(folder / STAGE_FILE) or {})


def started_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """`read_started`, where nothing else may be in a new folder."""
    started = read_started(folder)
    others = [path.name for path in folder.iterdir() if path.name != LOCK_FILE and not is_new(path)]
    if started is None and others:
        raise WorkdirError(
            f'{folder}: expected an empty folder or a stage ({STAGE_FILE}), found {some(sorted(others))}'
        )
    return started


def read_started(folder: pathlib.Path) -> dict[str, Any] | None:
    """What stage.json says; None where there is none, as in a new folder."""
    started = read_json(folder / STAGE_FILE)
    if started is not None and 'clearing' not in started and not started.keys() >= {'slice', 'inputs'}:
        raise WorkdirError(f'{folder / STAGE_FILE}: expected slice and inputs, found {some(sorted(started)) or "none"}')
    return started


def remove_scratch(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / SCRATCH_FOLDER, ignore_errors=True)  # another process may be at it, too


def empty(folder: pathlib.Path) -> None:
    """Empties a stage's folder but for its lock; after a kill in between the stage is cleared before it starts."""
    write_json(folder / STAGE_FILE, {'clearing': True})
    (folder / DONE_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name in (LOCK_FILE, STAGE_FILE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / STAGE_FILE).unlink()


class Hashes:
    """Hashes of what stages read, each taken once: a change that comes later in this process's life is not seen.

    That a stage was run again is: what this process read of it before may still be in its memory.
    """

    def __init__(self) -> None:
        self._known: dict[pathlib.Path, tuple[str, int | None]] = {}

    def of(self, path: pathlib.Path) -> str:
        """The hash of a file, folder or finished stage, whose files are held against those that it left.

        Raises:
            WorkdirError: a file of the stage was changed, removed or added since; or the stage was run again.
        """
        path = path.absolute()
        ended = (path / DONE_FILE).stat().st_mtime_ns if is_done(path) else None
        if path not in self._known:
            self._known[path] = (hash_path(path) if ended is None else _hash_stage(path), ended)
        known, before = self._known[path]
        if ended != before:
            raise WorkdirError(f'{path}: another process ran this stage again since it was read; start this one anew')
        return known


def _hash_stage(folder: pathlib.Path) -> str:
    done = read_done(folder)
    left, found = done['outputs'], outputs_of(folder)
    faults = [f'{name} is missing' for name in sorted(left.keys() - found.keys())]
    faults += [f'{name} was added' for name in sorted(found.keys() - left.keys())]
    faults += [f'{name} was changed' for name in sorted(left.keys() & found.keys()) if left[name] != found[name]]
    if faults:
        raise WorkdirError(
            f'{folder}: expected the files that the stage {done["name"]} left, found that {some(faults)}; '
            f'--rerun={done["name"]} (of its own run) makes it anew'
        )
    identity = {key: done[key] for key in ('slice', 'inputs', 'outputs')}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def outputs_of(folder: pathlib.Path) -> dict[str, str]:
    """The hash of every file of a stage by its path in the folder, but for those that this module writes."""
    return {
        name: _hash_file(file)
        for name, file in _files(folder)
        if not (name in (STAGE_FILE, DONE_FILE, LOCK_FILE) or is_new(file) or name.startswith(f'{SCRATCH_FOLDER}/'))
    }


def hash_path(path: pathlib.Path) -> str:
    """A file's or folder's hash, as this module's docstring defines it: 64 hexadecimal digits."""
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for name, file in _files(path):
        digest.update(f'{name}\0{_hash_file(file)}\0'.encode())
    return digest.hexdigest()


def _files(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    return [(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob('*')) if file.is_file()]


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
    """Holds the folder's lock and gives None; or gives what is known of the process that holds it.

    Args:
        folder: a stage's, or another one.
        shared: with all others that hold it so, while none holds it alone. It needs only to be read.
    """
    path = folder / LOCK_FILE
    if shared and not path.exists() and not os.access(folder, os.W_OK):
        yield None  # a copy without a lock, which cannot be cleared either
        return
    with open(path, 'r' if shared and path.exists() else 'a+') as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or 'process unknown, which may only read it'
            return
        if shared:
            yield None
            return
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield None
        file.truncate(0)


@contextmanager
def alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds its lock; waits while another process does. What a kill left half-written goes."""
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        with lock(folder) as holder:
            if holder is None:
                for path in filter(is_new, list(folder.iterdir())):
                    path.unlink()
                yield
                return
        if not told:
            print(f'\n== {folder.name}: waits for {holder}', flush=True)
            told = True
        time.sleep(POLL_SECONDS)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(f'{path}: expected JSON, found {error}') from error
    if not isinstance(value, dict):
        raise WorkdirError(f'{path}: expected a JSON object, found {type(value).__name__}')
    return value


def write_json(path: pathlib.Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes, syncs and renames, so that the file is there whole or not at all, whenever the machine stops."""
    new = path.with_name(f'{path.name}.{os.getpid()}{NEW_SUFFIX}')
    with open(new, 'w') as file:
        file.write(json.dumps(value, indent=1) + '\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_new(path: pathlib.Path) -> bool:
    """Whether it is what a kill left of `write_json`."""
    return path.name.endswith(NEW_SUFFIX)


def some(names: list[str]) -> str:
    """The first five, and how many more there are."""
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
