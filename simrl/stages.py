"""A job as stages that talk through the run directory: each runs once, and the same command runs only what is missing.

A stage is a folder of the run directory. It holds, besides what the stage writes:

    stage.lock    held (flock) while a process works on the stage; a kill leaves no lock behind
    stage.json    the slice of the config that the stage depends on, and the hashes of its inputs
    done.json     the same and an id of this run of the stage; written last, when all is complete

A stage that was started goes on where it was; one that is done is skipped. Where its slice or an input differs from
what it was started with, it is refused with the difference, unless it is to be run again, which clears its folder.

What is hashed: of a file the sha256 of its bytes, for one over 64 MiB that of its size and of its first and last MiB;
of a folder the names and hashes of all files in it; of a stage its done.json, so that running a stage again makes the
results that rest on it out of date, whatever it writes.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from simrl import config

CONFIG_FILE, STAGE_FILE, DONE_FILE, LOCK_FILE = 'config.json', 'stage.json', 'done.json', 'stage.lock'
NEW_SUFFIX = '.new'  # of a file that is not renamed yet
LARGE_FILE, FILE_END = 64 * 2**20, 2**20  # bytes

Outcome = Literal['ran', 'done', 'locked']


class WorkdirError(RuntimeError):
    """A folder is not what a stage or a run may write to: of another config, or of something else."""


class LockedError(WorkdirError):
    """Another process works on the stage."""


def open_workdir(
    workdir: pathlib.Path, config_dict: Mapping[str, Any], *, exempt: Collection[str] = (), changed: bool = False
) -> None:
    """Makes the run directory and its config.json, or checks that it is of the same config.

    Args:
        config_dict: the whole config as plain values (`config.to_dict`).
        exempt: dotted fields that may differ (with all below them), for instance what only says what is logged or
            which stages there are. Their new values replace those in config.json.
        changed: accept any difference and store it. For a run with stages to be done again: each stage still checks
            its own slice.

    Raises:
        WorkdirError: the directory is of another config, or holds something that is no run.
    """
    stored = _read_json(workdir / CONFIG_FILE)
    if stored is None and workdir.exists():
        others = sorted(path.name for path in workdir.iterdir() if not _is_new(path))
        if others:
            raise WorkdirError(f'{workdir}: expected an empty folder or a run ({CONFIG_FILE}), found {_some(others)}')
    if stored is not None and not changed:
        lines = [
            line
            for line in config.differences(stored, config_dict)
            if not any(line.split(': ')[0] == field or line.startswith(f'{field}.') for field in exempt)
        ]
        if lines:
            raise WorkdirError(
                f'{workdir}: is the run of another config: {"; ".join(lines)}. Choose another workdir, or name the '
                'stages to run again (--rerun)'
            )
    if stored != config_dict:
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(workdir / CONFIG_FILE, config_dict)


def stage(
    folder: pathlib.Path,
    slice_: Mapping[str, Any],
    inputs: Mapping[str, pathlib.Path],
    run: Callable[[pathlib.Path], None],
    *,
    rerun: bool = False,
    locked: Literal['error', 'skip'] = 'error',
) -> Outcome:
    """Runs one stage, unless it is done.

    Args:
        folder: the stage's own; made where missing.
        slice_: the part of the config that its results depend on, as plain values (`config.to_dict`).
        inputs: files, folders or other stages' folders that it reads, by name.
        run: does the work in `folder`, and goes on where a killed process left off. An exception leaves the stage
            started: the next call goes on.
        rerun: clear the folder first. A kill during the clearing is made up for by the next call; a kill later is not
            known here, so the same call would begin again.
        locked: what to do while another process works on it.

    Returns:
        'ran', 'done' (it was before), or 'locked' (skipped).

    Raises:
        WorkdirError: started or done with another slice or other inputs; an input is missing or a stage that is not
            done; the folder holds something that is no stage.
        LockedError: another process works on it, and `locked` is 'error'.
    """
    identity = {'slice': json.loads(json.dumps(slice_)), 'inputs': _hashes(folder, inputs)}
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as holder:
        if holder is not None:
            if locked == 'skip':
                return 'locked'
            raise LockedError(f'{folder}: another process works on this stage ({holder}); wait for it, or stop it')
        started = _started(folder)
        if started is not None and (rerun or 'clearing' in started):
            _write_json(
                folder / STAGE_FILE, {'clearing': True}
            )  # from here on a kill leaves nothing that looks started
            _clear(folder)
            started = None
        if started is None:
            _write_json(folder / STAGE_FILE, identity)
        else:
            _check(folder, started, identity)
            if (folder / DONE_FILE).exists():
                return 'done'
        run(folder)
        _write_json(folder / DONE_FILE, identity | {'run': uuid.uuid4().hex})
    return 'ran'


def is_done(folder: pathlib.Path) -> bool:
    return (folder / DONE_FILE).exists()


class Stages:
    """The stages of a run directory, some of which are to be run again with those that rest on them.

    Args:
        workdir: the run directory.
        rerun: names of stages, or of folders of stages ('rl' for 'rl/role_play/seed-0').
    """

    def __init__(self, workdir: pathlib.Path, rerun: Collection[str] = ()) -> None:
        self.workdir = pathlib.Path(workdir)
        self._rerun = {name.strip('/') for name in rerun}
        self._met: set[str] = set()
        self._redone: set[pathlib.Path] = set()

    def run(
        self,
        name: str,
        slice_: Mapping[str, Any],
        inputs: Mapping[str, pathlib.Path],
        run: Callable[[pathlib.Path], None],
        *,
        locked: Literal['error', 'skip'] = 'error',
    ) -> Outcome:
        """`stage` for the folder `name`; run again if it was named, or if one of its inputs was run again."""
        folder = self.workdir / name
        named = {wanted for wanted in self._rerun if name == wanted or name.startswith(f'{wanted}/')}
        self._met |= named
        redone_input = any(path in self._redone or self._redone & set(path.parents) for path in inputs.values())
        rerun = bool(named) or redone_input
        outcome = stage(folder, slice_, inputs, run, rerun=rerun, locked=locked)
        if rerun and outcome == 'ran':
            self._redone.add(folder)
        return outcome

    def finish(self) -> None:
        """Call it after the last stage.

        Raises:
            WorkdirError: a name to run again was that of no stage.
        """
        if unknown := sorted(self._rerun - self._met):
            raise WorkdirError(f'--rerun: expected names of stages, found {", ".join(unknown)}, which this run lacks')


def _started(folder: pathlib.Path) -> dict[str, Any] | None:
    """What stage.json says; None for a new folder."""
    started = _read_json(folder / STAGE_FILE)
    others = [path.name for path in folder.iterdir() if path.name != LOCK_FILE and not _is_new(path)]
    if started is None and others:
        raise WorkdirError(
            f'{folder}: expected an empty folder or a stage ({STAGE_FILE}), found {_some(sorted(others))}'
        )
    return started


def _check(folder: pathlib.Path, started: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    lines = config.differences(started['slice'], identity['slice'])
    lines += [f'input {line}' for line in config.differences(started['inputs'], identity['inputs'])]
    if lines:
        state = 'done' if is_done(folder) else 'started'
        raise WorkdirError(
            f'{folder}: was {state} with other settings or inputs: {"; ".join(lines)}. Name it to be run again '
            '(--rerun), or use another workdir'
        )


def _clear(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.name in (LOCK_FILE, STAGE_FILE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _lock(folder: pathlib.Path) -> Iterator[str | None]:
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


def _hashes(folder: pathlib.Path, inputs: Mapping[str, pathlib.Path]) -> dict[str, str]:
    hashes = {}
    for name, path in sorted(inputs.items()):
        if (path / STAGE_FILE).exists() and not is_done(path):
            raise WorkdirError(f'{folder}: expected its input {name!r} to be done, found that {path} is not')
        if not path.exists():
            raise WorkdirError(f'{folder}: expected its input {name!r} at {path}, found nothing')
        hashes[name] = hash_path(path)
    return hashes


def hash_path(path: pathlib.Path) -> str:
    """A file's, folder's or stage's hash, as this module's docstring defines it: 64 hexadecimal digits."""
    if is_done(path):
        path = path / DONE_FILE
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob('*') if file.is_file()):
        digest.update(f'{file.relative_to(path).as_posix()}\0{_hash_file(file)}\0'.encode())
    return digest.hexdigest()


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


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(f'{path}: expected JSON, found {error}') from error


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
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


def _is_new(path: pathlib.Path) -> bool:
    """Whether it is what a kill left of `_write_json`."""
    return path.name.endswith(NEW_SUFFIX)


def _some(names: list[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
