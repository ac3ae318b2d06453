"""A job as stages that talk through the run directory: each runs once, and the same command runs only what is missing.

A `Task` says what a stage is: its folder in the run directory, the slice of the config that its results depend on, the
inputs that it reads, and its work. A job is a list of them, each after those that it reads.

A stage that was started goes on where it was; one that is done is skipped, once its files were held against what it
left. Where the slices of stages differ from what they were started with, all of them are refused with the differences
before anything is written; an input that differs is refused when its stage is reached, since hashing takes time. Stages
that are named to be run again are cleared with all that rest on them before anything runs, so that a kill later costs
nothing: the command without `--rerun` goes on. While a stage is worked on, no other process can clear what it reads.
What a stage's folder holds, and what is hashed: `stage_files.py`.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from simrl.run import config, stage_files
from simrl.run.stage_files import DONE_FILE, POLL_SECONDS, STAGE_FILE, Hashes, WorkdirError, is_done, some

CONFIG_FILE = 'config.json'
FORMAT = 3  # of run directories; counts up when an older version's can no longer be gone on with


class LockedError(WorkdirError):
    """Another process works on the stage."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message, holder)
        self.holder = holder  # what is known of that process

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Task:
    """A stage of a job.

    Attributes:
        name: its folder in the run directory, for instance 'rl/role_play/seed-0'.
        slice_: what of the config its results depend on: dataclasses and plain values by name.
        inputs: what it reads, by name: files or folders, and folders of stages. One inside the run directory is a
            stage that comes before it.
        work: does the work in the stage's folder, and goes on where a killed process left off. An exception leaves the
            stage started: the next call goes on.
    """

    name: str
    slice_: Mapping[str, Any]
    inputs: Mapping[str, pathlib.Path]
    work: Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens to a stage: it 'starts', it 'ran' to its end, it was 'done' before, or it 'waits' for a process."""

    stage: str
    what: Literal['starts', 'ran', 'done', 'waits']
    seconds: float = 0.0  # of a stage that ran: in this process
    holder: str = ''  # of a stage that waits: what is known of the process that works on it


def say(event: Event) -> None:
    """Prints it."""
    if event.what == 'waits':
        print(f'\n== {event.stage}: waits for {event.holder}', flush=True)
        return
    if event.what != 'ran':
        print(f'\n== {event.stage}', flush=True)
    if event.what != 'starts':
        print(f'== {event.stage}: {event.what}, {event.seconds:.0f} s', flush=True)


def run_tasks(
    workdir: pathlib.Path,
    tasks: Sequence[Task],
    *,
    held: Literal['error', 'wait'] = 'error',
    tell: Callable[[Event], None] = say,
) -> None:
    """Runs what is missing, in order; returns once all stages are done.

    Args:
        workdir: the run directory.
        tasks: each after those that it reads.
        held: what to do with a stage that another process works on: raise, or go on with the others and wait for it.
        tell: called with what happens.

    Raises:
        WorkdirError: a stage was started or done with another slice or other inputs; an input is missing, or a stage
            that is not done, or was run again by another process after it was read here; files of a done stage were
            changed; a folder holds something that is no stage; the tasks are not in order.
        LockedError: another process works on a stage, or on one that it reads, and `held` is 'error'.
        ValueError: a stage's folder is, or is in, another's.
    """
    _check_order(workdir, tasks)
    hashes, left, told = Hashes(), list(tasks), set[Event]()
    while left:
        waits = []
        for task in left:
            if not all(is_done(workdir / name) for name in _stages_read(workdir, task)):
                continue
            try:
                _run_task(workdir, task, hashes, tell)
            except LockedError as error:
                if held == 'error':
                    raise
                waits.append(Event(task.name, 'waits', holder=error.holder))
            else:
                left.remove(task)
                break  # and look again from the first on
        else:
            for event in waits:
                if event not in told:
                    tell(event)
                    told.add(event)
            time.sleep(POLL_SECONDS)


def _run_task(workdir: pathlib.Path, task: Task, hashes: Hashes, tell: Callable[[Event], None]) -> None:
    folder = workdir / task.name
    with ExitStack() as locks:
        for path in task.inputs.values():
            if stage_files.is_stage(path):
                _hold(locks, path, shared=True)  # so that nobody clears it meanwhile
        identity = {'slice': _plain(task.slice_), 'inputs': _hash_inputs(folder, task.inputs, hashes)}
        folder.mkdir(parents=True, exist_ok=True)
        settled = stage_files.is_settled(folder)
        _hold(locks, folder, shared=settled)  # a settled one is only looked at, and others may be reading it for long
        if settled and not stage_files.is_settled(folder):
            raise LockedError(f'{folder}: another process begins this stage anew; wait for it', 'process unknown')
        started = stage_files.started_in(folder)
        if started is not None and 'clearing' in started:  # a kill came in between
            stage_files.empty(folder)
            started = None
        if started is not None:
            done = is_done(folder)
            _check(folder, stage_files.read_done(folder) if done else started, identity, task.name)
            if done:
                hashes.of(folder)
                stage_files.remove_scratch(folder)
                tell(Event(task.name, 'done'))
                return
        tell(Event(task.name, 'starts'))
        if started is None:
            stage_files.write_json(folder / STAGE_FILE, identity)
        began = time.monotonic()
        task.work(folder)
        seconds = time.monotonic() - began
        outputs = stage_files.outputs_of(folder)
        stage_files.write_json(
            folder / DONE_FILE, {'name': task.name, **identity, 'outputs': outputs, 'seconds': seconds}
        )
        stage_files.remove_scratch(folder)  # not before: after a kill in between the work would begin again
    tell(Event(task.name, 'ran', seconds))


def _hold(locks: ExitStack, folder: pathlib.Path, *, shared: bool = False) -> None:
    holder = locks.enter_context(stage_files.lock(folder, shared=shared))
    if holder is not None:
        raise LockedError(f'{folder}: another process works on this stage ({holder}); wait for it, or stop it', holder)


def stage_seconds(folder: pathlib.Path) -> float:
    """How long the work of a finished stage took; where it went on after a kill, in the last process."""
    return float(stage_files.read_done(folder)['seconds'])


def to_run_again(workdir: pathlib.Path, tasks: Sequence[Task], rerun: Collection[str]) -> list[str]:
    """The stages that are named, and all that rest on them, in order.

    Args:
        workdir: the run directory; need not exist.
        tasks: each after those that it reads.
        rerun: names of stages, or of folders of stages ('rl' for 'rl/role_play/seed-0').

    Raises:
        WorkdirError: a name is that of no stage; the tasks are not in order.
        ValueError: a stage's folder is, or is in, another's.
    """
    _check_order(workdir, tasks)
    chosen: dict[str, None] = {}  # in order
    wanted = {name.strip('/') for name in rerun}
    met: set[str] = set()
    for task in tasks:
        named = {name for name in wanted if f'{task.name}/'.startswith(f'{name}/')}
        met |= named
        if named or any(name in chosen for name in _stages_read(workdir, task)):
            chosen[task.name] = None
    if unknown := sorted(wanted - met):
        raise WorkdirError(
            f'--rerun: expected names of stages, found {", ".join(unknown)}, which this run lacks; it has '
            f'{", ".join(task.name for task in tasks)}'
        )
    return list(chosen)


def clear(workdir: pathlib.Path, names: Sequence[str], *, before: Callable[[], object] = lambda: None) -> None:
    """Empties the folders of stages, so that they run again; a kill meanwhile is made up for by the next command.

    Args:
        workdir: the run directory.
        names: of stages, each after those that it reads.
        before: called before the first is emptied, once it is sure that all can be, and while all are held.

    Raises:
        WorkdirError: a folder holds something that is no stage. Nothing was cleared.
        LockedError: another process works on one of the stages, or on one that reads it. Nothing was cleared.
    """
    folders = [workdir / name for name in names if (workdir / name).exists()]
    with ExitStack() as stack:
        started = []
        for folder in folders:
            holder = stack.enter_context(stage_files.lock(folder))
            if holder is not None:
                raise LockedError(f'{folder}: another process works on this stage ({holder}); stop it first', holder)
            if stage_files.started_in(folder) is not None:
                started.append(folder)
        before()
        for folder in reversed(started):  # at no moment does one rest on an input that is gone
            stage_files.empty(folder)
    if started:
        again = some([folder.relative_to(workdir).as_posix() for folder in started])
        print(f'to be run again: {again}. After a kill the command without --rerun goes on', flush=True)


def open_workdir(
    workdir: pathlib.Path,
    config_dict: Mapping[str, Any],
    tasks: Sequence[Task] = (),
    *,
    exempt: Collection[str] = (),
    again: Sequence[str] = (),
) -> None:
    """Makes the run directory and its config.json, or checks that all that it holds is of the same config.

    Where stages are to be run again they are cleared, and config.json is replaced once it is sure that they can be. It
    is first, so that after a kill in between the same command goes on; the other way round none would.

    Args:
        workdir: the run directory.
        config_dict: the whole config as plain values (`config.to_dict`).
        tasks: all that are to be run. Stages of the run directory that they lack are left alone.
        exempt: dotted fields that may differ (with all below them), for instance what only says what is logged or
            which stages there are. Their new values replace those in config.json.
        again: names of stages that are to be run again, whatever they were run with, as `to_run_again` gives them. With
            them any difference between the configs is accepted and stored: what the other stages rest on is in their
            slices.

    Raises:
        WorkdirError: the directory is of another config or another format, or holds something that is no run; or
            stages were started or done with other slices; or a stage to be run again is none. Nothing was written.
        LockedError: another process works on a stage to be run again, or on one that reads it. Nothing was written.
    """
    version = importlib.metadata.version('simrl')
    wanted = {'format': FORMAT, 'version': version, **config_dict}
    stored = stage_files.read_json(workdir / CONFIG_FILE)
    if stored is None and workdir.exists():
        others = sorted(path.name for path in workdir.iterdir() if not stage_files.is_new(path))
        if others:
            raise WorkdirError(f'{workdir}: expected an empty folder or a run ({CONFIG_FILE}), found {some(others)}')
    if stored is not None and stored.get('format') != FORMAT:
        raise WorkdirError(
            f'{workdir}: expected a run of format {FORMAT} (simrl {version}), found one of format '
            f'{stored.get("format", "unknown")} (simrl {stored.get("version", "unknown")}). Choose another workdir, or '
            'go on with the version that made it'
        )
    _check_slices(workdir, tasks, again)
    if stored is not None and not again:
        lines = [
            line
            for line in config.differences(stored, wanted)
            if not any(line.split(': ')[0] == field or line.startswith(f'{field}.') for field in ('version', *exempt))
        ]
        if lines:
            raise WorkdirError(
                f'{workdir}: is the run of another config: {"; ".join(lines)}. Choose another workdir, or name the '
                'stages to run again (--rerun)'
            )

    def store() -> None:
        if stored != wanted:
            workdir.mkdir(parents=True, exist_ok=True)
            stage_files.write_json(workdir / CONFIG_FILE, wanted)

    clear(workdir, again, before=store)


def _check_slices(workdir: pathlib.Path, tasks: Sequence[Task], again: Collection[str]) -> None:
    """Holds the stages that there are against the tasks' slices, but for those to be run again."""
    stages_of: dict[str, list[str]] = {}  # by what differs: often the same for many
    equal = set[str]()
    for task in tasks:
        found = None if task.name in again else stage_files.read_started(workdir / task.name)
        if found is None or 'clearing' in found:
            continue
        if lines := config.differences(found['slice'], _plain(task.slice_)):
            stages_of.setdefault('; '.join(lines), []).append(task.name)
        else:
            equal.add(task.name)
    if stages_of:
        refused = {name for names in stages_of.values() for name in names}
        rerun = ','.join(_names_to_run_again(workdir, tasks, refused, equal))
        what = '; '.join(f'{some(names)} ({lines})' for lines, names in stages_of.items())
        raise WorkdirError(
            f'{workdir}: stages were started or done with other settings: {what}. Have them run again '
            f'(--rerun={rerun}), or use another workdir'
        )


def _names_to_run_again(
    workdir: pathlib.Path, tasks: Sequence[Task], refused: Collection[str], equal: Collection[str]
) -> list[str]:
    """What to name so that the refused stages run again, with all that rest on them and no other of the equal ones."""
    resting, first = set[str](), list[str]()  # on a refused one; and those that rest on none
    for task in tasks:
        if any(name in resting or name in refused for name in _stages_read(workdir, task)):
            resting.add(task.name)
        elif task.name in refused:
            first.append(task.name)
    kept = {folder for name in equal if name not in resting for folder in (name, *_folders_of(name))}
    names = (next((folder for folder in _folders_of(name) if folder not in kept), name) for name in first)
    return list(dict.fromkeys(names))


def _folders_of(name: str) -> list[str]:
    """The folders that a stage's folder lies in, from the outermost: 'rl', 'rl/a' for 'rl/a/seed-0'."""
    return [path.as_posix() for path in reversed(pathlib.PurePosixPath(name).parents)][1:]


def _plain(slice_: Mapping[str, Any]) -> dict[str, Any]:
    """A slice as stage.json has it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(slice_)))
    return plain


def _stages_read(workdir: pathlib.Path, task: Task) -> list[str]:
    """Names of the stages of this run that a task reads."""
    root = workdir.resolve()
    paths = [path.resolve() for path in task.inputs.values()]
    return [path.relative_to(root).as_posix() for path in paths if path.is_relative_to(root)]


def _check_order(workdir: pathlib.Path, tasks: Sequence[Task]) -> None:
    before, above = set[str](), dict[str, str]()  # the stages; and the folders that they lie in, each with one of them
    for task in tasks:
        folders = _folders_of(task.name)
        taken = [name for name in (task.name, *folders) if name in before]
        if task.name in above:
            taken.append(above[task.name])
        if taken:
            raise ValueError(f'{task.name}: expected a folder of its own, found that {taken[0]} has it')
        for name in _stages_read(workdir, task):
            if name not in before:
                raise WorkdirError(
                    f'{task.name}: expected what it reads in {workdir} to be stages that come before it, found {name}'
                )
        before.add(task.name)
        above.update(dict.fromkeys(folders, task.name))


def _hash_inputs(folder: pathlib.Path, inputs: Mapping[str, pathlib.Path], hashes: Hashes) -> dict[str, str]:
    for name, path in sorted(inputs.items()):
        if stage_files.is_stage(path) and not stage_files.is_settled(path):
            raise WorkdirError(f'{folder}: expected its input {name!r} to be done, found that {path} is not')
        if not path.exists():
            raise WorkdirError(f'{folder}: expected its input {name!r} at {path}, found nothing')
    return {name: hashes.of(path) for name, path in sorted(inputs.items())}


def _check(folder: pathlib.Path, started: Mapping[str, Any], identity: Mapping[str, Any], name: str) -> None:
    lines = config.differences(started['slice'], identity['slice'])
    lines += [f'input {line}' for line in config.differences(started['inputs'], identity['inputs'])]
    if lines:
        state = 'done' if is_done(folder) else 'started'
        raise WorkdirError(
            f'{folder}: was {state} with other settings or inputs: {"; ".join(lines)}. Have it run again '
            f'(--rerun={name}), or use another workdir'
        )
