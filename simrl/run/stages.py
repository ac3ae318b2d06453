"""Stages of a run: each runs once, resumes after a kill, and is skipped when it is done.

A `Stage` is a folder of the run directory, the settings and inputs that its outputs depend on, and a function that
writes them. A run is a list of stages, each after those that it reads.

1. `directory.open_workdir` refuses what cannot run, before anything is written.
2. `run_stages` runs what is missing. A stage's inputs are hashed, and refused if they changed, when it is its turn.
   While a stage runs or is read, no other process can empty it.
3. `select` keeps some stages and what they need (`--only`).

A run of several processes (`processes`) is one process here: process 0 locks, decides and records, and all of them run
the stages that it names.

`stage_files` says what a stage's folder contains and what is hashed.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from simrl.run import config, processes, stage_files
from simrl.run.runtime import numeric_defaults
from simrl.run.stage_files import (
    DONE_FILE,
    EMPTYING_FILE,
    POLL_SECONDS,
    STAGE_FILE,
    Hashes,
    WorkdirError,
    is_done,
)


class LockedError(WorkdirError):
    """Another process runs or reads the stage."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder  # a text about that process


def _no_check() -> None:
    """The check of a stage that needs none."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its folder in the run directory, for instance 'rl/role_play/seed-0'.
        settings: dataclasses and plain values by name: the part of the config that its outputs depend on. Fields that
            change no result (`config.NO_EFFECT`) do not count.
        inputs: files, folders and folders of stages by name. One in the run directory is an earlier stage of this run.
        run: (folder) -> None: writes the outputs; after a kill, resumes. If it raises, the next command resumes.
        check: raises ConfigError if `run` would fail. Cheap: it loads no model.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, pathlib.Path]
    run: Callable[[pathlib.Path], None]
    check: Callable[[], None] = _no_check


@dataclasses.dataclass(frozen=True)
class Event:
    """A stage started, finished, was skipped because it is done, or waits for another process."""

    stage: str
    kind: Literal['started', 'finished', 'skipped', 'waiting']
    seconds: float = 0.0  # in this process; finished stages only
    holder: str = ''  # a text about the other process; waiting stages only


def print_event(event: Event) -> None:
    lines = {
        'started': f'\n== {event.stage}',
        'finished': f'== {event.stage}: finished in {event.seconds:.0f} s',
        'skipped': f'\n== {event.stage}: already done',
        'waiting': f'\n== {event.stage}: waiting for {event.holder}',
    }
    print(lines[event.kind], flush=True)


def run_stages(
    workdir: pathlib.Path, stages: Sequence[Stage], *, on_event: Callable[[Event], None] = print_event
) -> None:
    """Runs the stages that are not done, in order; returns when all are. One that another process runs is awaited.

    Args:
        workdir: the run directory.
        stages: each after those that it reads.
        on_event: called when a stage starts, finishes, is skipped or waits.

    Raises:
        WorkdirError: a stage was started with other settings or inputs; an input is missing or unfinished, or was rerun
            by another process after it was read here; outputs of a finished stage were changed; a folder contains
            files but no stage; the stages are not in order.
        ConfigError: the processes of this run have different settings or inputs for a stage.
        ValueError: two stages have one folder, or one is inside the other's.
    """
    check_order(workdir, stages)
    if not processes.leads():
        _follow(workdir, {stage.name: stage for stage in stages}, on_event)
        return
    hashes, pending, announced = Hashes(), list(stages), set[Event]()
    while pending:
        waiting = []
        for stage in pending:
            if not all(is_done(workdir / name) for name in stages_read(workdir, stage)):
                continue
            try:
                _run_stage(workdir, stage, hashes, on_event)
            except LockedError as error:
                waiting.append(Event(stage.name, 'waiting', holder=error.holder))
            else:
                pending.remove(stage)
                break  # look again from the first pending stage on
        else:
            for event in waiting:
                if event not in announced:
                    on_event(event)
                    announced.add(event)
            time.sleep(POLL_SECONDS)
    _next(None)


def _follow(workdir: pathlib.Path, stages: Mapping[str, Stage], on_event: Callable[[Event], None]) -> None:
    """Runs the stages that process 0 runs."""
    hashes = Hashes()
    while (name := _next(None)) is not None:
        folder = workdir / name
        identity = _identity(folder, stages[name], hashes)
        on_event(Event(name, 'started'))
        _work(stages[name], folder, identity)


def _next(name: str | None) -> str | None:
    """The name of the stage that process 0 runs now, which alone gives it; None: there are no more."""
    return processes.broadcast('the next stage', name)


def _work(stage: Stage, folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """The work of a stage, which all processes begin and end together."""
    processes.check_alike(f'stage {stage.name}', identity)
    with numeric_defaults():
        stage.run(folder)
    processes.barrier(f'the end of stage {stage.name}')


def _identity(folder: pathlib.Path, stage: Stage, hashes: Hashes) -> dict[str, Any]:
    return {'settings': config.identity(stage.settings), 'inputs': hash_inputs(folder, stage, hashes)}


def _run_stage(workdir: pathlib.Path, stage: Stage, hashes: Hashes, on_event: Callable[[Event], None]) -> None:
    folder = workdir / stage.name
    with ExitStack() as locks:
        for path in stage.inputs.values():
            if stage_files.is_stage(path):
                lock(locks, path, shared=True)
        identity = _identity(folder, stage, hashes)
        folder.mkdir(parents=True, exist_ok=True)
        skip = is_done(folder)
        lock(locks, folder, shared=skip)  # others may read a finished stage for hours
        if skip and not is_done(folder):
            raise LockedError(f'{folder}: another process reruns this stage; wait for it', 'an unknown process')
        stage_files.check_is_stage(folder)
        if (folder / EMPTYING_FILE).exists():
            stage_files.empty(folder)  # a kill interrupted this
        started = stage_files.read_started(folder)
        if started is not None:
            done = is_done(folder)
            check_identity(stage.name, folder, stage_files.read_done(folder) if done else started, identity)
            if done:
                hashes.of(folder)
                stage_files.remove_scratch(folder)
                on_event(Event(stage.name, 'skipped'))
                return
        on_event(Event(stage.name, 'started'))
        if started is None:
            stage_files.write_json(folder / STAGE_FILE, identity)
        start = time.monotonic()
        _next(stage.name)
        _work(stage, folder, identity)
        seconds = time.monotonic() - start
        outputs = stage_files.describe_outputs(folder)
        stage_files.write_json(
            folder / DONE_FILE, {'name': stage.name, **identity, 'outputs': outputs, 'seconds': seconds}
        )
        stage_files.remove_scratch(folder)  # after done.json: a kill in between would else lose the stage's work
    on_event(Event(stage.name, 'finished', seconds))


def lock(locks: ExitStack, folder: pathlib.Path, *, shared: bool = False) -> None:
    holder = locks.enter_context(stage_files.lock(folder, shared=shared))
    if holder is not None:
        raise LockedError(f'{folder}: another process uses this stage ({holder}); wait for it, or stop it', holder)


def hash_inputs(folder: pathlib.Path, stage: Stage, hashes: Hashes) -> dict[str, str]:
    for name, path in sorted(stage.inputs.items()):
        if stage_files.is_stage(path) and not is_done(path):
            raise WorkdirError(f'{folder}: expected its input {name!r} to be done, found that {path} is not')
        if not path.exists():
            raise WorkdirError(f'{folder}: expected its input {name!r} at {path}, found nothing')
    return {name: hashes.of(path) for name, path in sorted(stage.inputs.items())}


def check_identity(name: str, folder: pathlib.Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    lines = config.differences(found['settings'], identity['settings'])
    lines += [f'input {line}' for line in config.differences(found['inputs'], identity['inputs'])]
    if lines:
        raise WorkdirError(
            f'{folder}: {"done" if is_done(folder) else "started"} with other settings or inputs: {"; ".join(lines)}. '
            f'Rerun it (--rerun={name}), or use another workdir'
        )


def check_same(
    folder: pathlib.Path, settings: Mapping[str, Any], inputs: Mapping[str, pathlib.Path], names: Collection[str]
) -> None:
    """Refuses a finished stage for which settings or inputs of some names were others; its other ones may differ.

    Args:
        settings, inputs: present ones, as those of a `Stage`.
        names: of those that must be the same. An input in several files is named by the first word, as 'model shard 2'.
    """
    done, hashes = stage_files.read_done(folder), Hashes()

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name.partition(' ')[0] in names}

    lines = config.differences(chosen(done['settings']), config.identity(chosen(settings)))
    present = {name: hashes.of(path) for name, path in chosen(inputs).items()}
    lines += [f'input {line}' for line in config.differences(chosen(done['inputs']), present)]
    if lines:
        raise WorkdirError(f'{folder}: made with another model or tokenizer than is here now: {"; ".join(lines)}')


def stage_seconds(folder: pathlib.Path) -> float:
    """Seconds that a finished stage took; if it was killed and resumed, in the last process."""
    return float(stage_files.read_done(folder)['seconds'])


def select(workdir: pathlib.Path, stages: Sequence[Stage], only: Collection[str]) -> list[Stage]:
    """The named stages and all that they need, in order.

    Args:
        workdir: the run directory; need not exist.
        stages: each after those that it reads.
        only: names of stages, or of folders of stages ('rl' for 'rl/role_play/seed-0').

    Raises:
        WorkdirError: there is no stage of a name.
    """
    needed = _named(stages, only, '--only')
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stages_read(workdir, stage))
    return [stage for stage in stages if stage.name in needed]


def stages_to_rerun(workdir: pathlib.Path, stages: Sequence[Stage], rerun: Collection[str]) -> list[str]:
    """Names of the named stages and all that depend on them, in order; arguments and errors as of `select`."""
    chosen = _named(stages, rerun, '--rerun')
    for stage in stages:
        if not chosen.isdisjoint(stages_read(workdir, stage)):
            chosen.add(stage.name)
    return [stage.name for stage in stages if stage.name in chosen]


def _named(stages: Sequence[Stage], names: Iterable[str], flag: str) -> set[str]:
    chosen = set[str]()
    for name in names:
        folder = name.strip('/')
        found = {stage.name for stage in stages if f'{stage.name}/'.startswith(f'{folder}/')}
        if not found:
            known = ', '.join(dict.fromkeys('/'.join(stage.name.split('/')[:2]) for stage in stages))
            raise WorkdirError(
                f'{flag}: expected names of stages or of their folders, found {folder}; there are {known}'
            )
        chosen |= found
    return chosen


def folders_of(name: str) -> list[str]:
    """The folders around a stage's folder, outermost first: 'rl', 'rl/a' for 'rl/a/seed-0'."""
    return [path.as_posix() for path in reversed(pathlib.PurePosixPath(name).parents)][1:]


def stages_read(workdir: pathlib.Path, stage: Stage) -> list[str]:
    """Names of the stages of this run that a stage reads."""
    names = (_name_in(workdir, path) for path in stage.inputs.values())
    return [name for name in names if name is not None]


def files_read(workdir: pathlib.Path, stage: Stage) -> list[str]:
    """Paths of the inputs that are no stages of this run."""
    return [str(path) for path in stage.inputs.values() if _name_in(workdir, path) is None]


def _name_in(workdir: pathlib.Path, path: pathlib.Path) -> str | None:
    """The name of a path in the run directory, in which folders may be links to other places; None: it is elsewhere."""
    for absolute in (os.path.abspath, os.path.realpath):
        root, found = pathlib.Path(absolute(workdir)), pathlib.Path(absolute(path))
        if found.is_relative_to(root):
            return found.relative_to(root).as_posix()
    return None


def check_order(workdir: pathlib.Path, stages: Sequence[Stage]) -> None:
    before, above = set[str](), dict[str, str]()  # names of stages; folders around them, each with one of its stages
    for stage in stages:
        folders = folders_of(stage.name)
        taken = [name for name in (stage.name, *folders) if name in before]
        if stage.name in above:
            taken.append(above[stage.name])
        if taken:
            raise ValueError(f'{stage.name}: expected a folder of its own, found that of {taken[0]}')
        for name in stages_read(workdir, stage):
            if name not in before:
                raise WorkdirError(f'{stage.name}: expected its inputs in {workdir} to be earlier stages, found {name}')
        before.add(stage.name)
        above.update(dict.fromkeys(folders, stage.name))
