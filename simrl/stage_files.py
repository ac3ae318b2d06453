"""What a stage's folder holds besides the stage's own files, and what is hashed of files, folders and stages.

    stage.lock    held (flock) while a process works on the stage; a kill leaves no lock behind
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
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STAGE_FILE, DONE_FILE, LOCK_FILE = 'stage.json', 'done.json', 'stage.lock'
SCRATCH_FOLDER = 'checkpoints'
NEW_SUFFIX = '.new'  # of a file that is not renamed yet
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


class Hashes:
    """Hashes of what stages read, each taken once: a change that comes later in this process's life is not seen."""

    def __init__(self) -> None:
        self._known: dict[pathlib.Path, str] = {}

    def of(self, path: pathlib.Path) -> str:
        """The hash of a file, folder or finished stage, whose files are held against those that it left.

        Raises:
            WorkdirError: a file of the stage was changed, removed or added since.
        """
        path = path.absolute()
        if path not in self._known:
            self._known[path] = _hash_stage(path) if is_done(path) else hash_path(path)
        return self._known[path]


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
def lock(folder: pathlib.Path) -> Iterator[str | None]:
    """Holds the folder's lock and gives None; or gives what is known of the process that holds it."""
    with open(folder / LOCK_FILE, 'a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or 'process unknown'
            return
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield None
        file.truncate(0)


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


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes, syncs and renames, so that the file is there whole or not at all, whenever the machine stops."""
    new = path.with_name(f'{path.name}.{os.getpid()}{NEW_SUFFIX}')
    with open(new, 'w') as file:
        json.dump(value, file, indent=1)
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
