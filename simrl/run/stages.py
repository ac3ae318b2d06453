"""Stages of a run: each runs once, resumes after a kill, and is skipped when it is done.

A `Stage` is a folder of the run directory, the settings and inputs that its outputs depend on, and a function that
writes them. A run is a list of stages, each after those that it reads.

1. `open_workdir` refuses what cannot run, before anything is written: a run directory of another config, stages that
   were started with other settings, a `check` that fails. Then it empties the stages to rerun.
2. `run_stages` runs what is missing. A stage's inputs are hashed, and refused if they changed, when it is its turn.
   While a stage runs or is read, no other process can empty it.
3. `select` keeps some stages and what they need (`--only`). `plan_of` says what would run, and writes nothing.

`stage_files` says what a stage's folder contains and what is hashed.
"""

import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from simrl.run import config, stage_files
from simrl.run.runtime import numeric_defaults
from simrl.run.stage_files import (
    DONE_FILE,
    EMPTYING_FILE,
    POLL_SECONDS,
    STAGE_FILE,
    Hashes,
    WorkdirError,
    is_done,
    shorten,
)

CONFIG_FILE = 'config.json'
FORMAT = 4  # of run directories; goes up when runs of the version before cannot be resumed


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
        settings: dataclasses and plain values by name: the part of the config that its outputs depend on.
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
    workdir: pathlib.Path,
    stages: Sequence[Stage],
    *,
    if_locked: Literal['raise', 'wait'] = 'raise',
    on_event: Callable[[Event], None] = print_event,
) -> None:
    """Runs the stages that are not done, in order; returns when all are.

    Args:
        workdir: the run directory.
        stages: each after those that it reads.
        if_locked: what to do when another process runs a stage: raise, or run the others and wait.
        on_event: called when a stage starts, finishes, is skipped or waits.

    Raises:
        WorkdirError: a stage was started with other settings or inputs; an input is missing or unfinished, or was rerun
            by another process after it was read here; outputs of a finished stage were changed; a folder contains
            files but no stage; the stages are not in order.
        LockedError: another process runs a stage, or one that it reads, and `if_locked` is 'raise'.
        ValueError: two stages have one folder, or one is inside the other's.
    """
    _check_order(workdir, stages)
    hashes, pending, announced = Hashes(), list(stages), set[Event]()
    while pending:
        waiting = []
        for stage in pending:
            if not all(is_done(workdir / name) for name in _stages_read(workdir, stage)):
                continue
            try:
                _run_stage(workdir, stage, hashes, on_event)
            except LockedError as error:
                if if_locked == 'raise':
                    raise
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


def _run_stage(workdir: pathlib.Path, stage: Stage, hashes: Hashes, on_event: Callable[[Event], None]) -> None:
    folder = workdir / stage.name
    with ExitStack() as locks:
        for path in stage.inputs.values():
            if stage_files.is_stage(path):
                _lock(locks, path, shared=True)
        identity = {'settings': config.to_dict(stage.settings), 'inputs': _hash_inputs(folder, stage, hashes)}
        folder.mkdir(parents=True, exist_ok=True)
        skip = is_done(folder)
        _lock(locks, folder, shared=skip)  # others may read a finished stage for hours
        if skip and not is_done(folder):
            raise LockedError(f'{folder}: another process reruns this stage; wait for it', 'an unknown process')
        stage_files.check_is_stage(folder)
        if (folder / EMPTYING_FILE).exists():
            stage_files.empty(folder)  # a kill interrupted this
        started = stage_files.read_started(folder)
        if started is not None:
            done = is_done(folder)
            _check_identity(stage.name, folder, stage_files.read_done(folder) if done else started, identity)
            if done:
                hashes.of(folder)
                stage_files.remove_scratch(folder)
                on_event(Event(stage.name, 'skipped'))
                return
        on_event(Event(stage.name, 'started'))
        if started is None:
            stage_files.write_json(folder / STAGE_FILE, identity)
        start = time.monotonic()
        with numeric_defaults():
            stage.run(folder)
        seconds = time.monotonic() - start
        outputs = stage_files.describe_outputs(folder)
        stage_files.write_json(
            folder / DONE_FILE, {'name': stage.name, **identity, 'outputs': outputs, 'seconds': seconds}
        )
        stage_files.remove_scratch(folder)  # after done.json: a kill in between would else lose the stage's work
    on_event(Event(stage.name, 'finished', seconds))


def _lock(locks: ExitStack, folder: pathlib.Path, *, shared: bool = False) -> None:
    holder = locks.enter_context(stage_files.lock(folder, shared=shared))
    if holder is not None:
        raise LockedError(f'{folder}: another process uses this stage ({holder}); wait for it, or stop it', holder)


def _hash_inputs(folder: pathlib.Path, stage: Stage, hashes: Hashes) -> dict[str, str]:
    for name, path in sorted(stage.inputs.items()):
        if stage_files.is_stage(path) and not is_done(path):
            raise WorkdirError(f'{folder}: expected its input {name!r} to be done, found that {path} is not')
        if not path.exists():
            raise WorkdirError(f'{folder}: expected its input {name!r} at {path}, found nothing')
    return {name: hashes.of(path) for name, path in sorted(stage.inputs.items())}


def _check_identity(name: str, folder: pathlib.Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    lines = config.differences(found['settings'], identity['settings'])
    lines += [f'input {line}' for line in config.differences(found['inputs'], identity['inputs'])]
    if lines:
        raise WorkdirError(
            f'{folder}: {"done" if is_done(folder) else "started"} with other settings or inputs: {"; ".join(lines)}. '
            f'Rerun it (--rerun={name}), or use another workdir'
        )


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
            needed.update(_stages_read(workdir, stage))
    return [stage for stage in stages if stage.name in needed]


def stages_to_rerun(workdir: pathlib.Path, stages: Sequence[Stage], rerun: Collection[str]) -> list[str]:
    """Names of the named stages and all that depend on them, in order; arguments and errors as of `select`."""
    chosen = _named(stages, rerun, '--rerun')
    for stage in stages:
        if not chosen.isdisjoint(_stages_read(workdir, stage)):
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


def open_workdir(
    workdir: pathlib.Path,
    config_dict: Mapping[str, Any],
    stages: Sequence[Stage] = (),
    *,
    fixed: Collection[str] = (),
    rerun: Sequence[str] = (),
) -> None:
    """Makes the run directory and its config.json, or checks that it fits; empties the stages to rerun.

    config.json is replaced before stages are emptied, so that the same command resumes after a kill in between.

    Args:
        workdir: the run directory.
        config_dict: the whole config as plain values (`config.to_dict`).
        stages: all that are to run. Others of the run directory are left alone.
        fixed: fields of the config that the run keeps, for instance the scene. Any other may change: the settings of
            each stage say what it depends on, and the new config replaces the stored one.
        rerun: names from `stages_to_rerun`.

    Raises:
        ConfigError: the check of a stage fails.
        WorkdirError: the directory is of another config or format, or contains files but no run; stages were started
            with other settings.
        LockedError: another process runs or reads a stage to rerun. Nothing was written in any of these cases.
    """
    _check_order(workdir, stages)
    stored = stored_config(workdir)
    _check_settings(workdir, stages, rerun)
    if stored is not None:
        _check_config(workdir, {field: stored.get(field) for field in fixed}, config_dict)
    for stage in stages:
        if stage.name in rerun or not is_done(workdir / stage.name):
            stage.check()
    folders = [workdir / name for name in rerun if (workdir / name).exists()]
    with ExitStack() as locks:
        for folder in folders:
            _lock(locks, folder)
            stage_files.check_is_stage(folder)
        wanted = {'format': FORMAT, 'version': importlib.metadata.version('simrl'), **config_dict}
        if stored != wanted:
            workdir.mkdir(parents=True, exist_ok=True)
            stage_files.write_json(workdir / CONFIG_FILE, wanted)
        emptied = [folder for folder in folders if (folder / STAGE_FILE).exists()]
        for folder in reversed(emptied):  # downstream first, so that no stage ever depends on a missing input
            stage_files.empty(folder)
    if emptied:
        names = shorten([folder.relative_to(workdir).as_posix() for folder in emptied])
        print(f'to rerun: {names}. After a kill, the command without --rerun resumes', flush=True)


def _check_config(workdir: pathlib.Path, fixed: Mapping[str, Any], config_dict: Mapping[str, Any]) -> None:
    if lines := config.differences(fixed, {field: config_dict.get(field) for field in fixed}):
        raise WorkdirError(f'{workdir}: is the run of another config: {"; ".join(lines)}. Use another workdir')


def stored_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """config.json of the run directory; None if it is empty or missing."""
    stored = stage_files.read_json(workdir / CONFIG_FILE)
    if stored is None and workdir.exists():
        others = sorted(path.name for path in workdir.iterdir() if not stage_files.is_new(path))
        if others:
            raise WorkdirError(f'{workdir}: expected an empty folder or a run ({CONFIG_FILE}), found {shorten(others)}')
    if stored is not None and stored.get('format') != FORMAT:
        made_by = f'simrl {stored.get("version", "unknown")}'
        raise WorkdirError(
            f'{workdir}: expected a run of format {FORMAT}, found {stored.get("format", "another")}. Use another '
            f'workdir, or resume it with the version that made it ({made_by})'
        )
    return stored


def _check_settings(workdir: pathlib.Path, stages: Sequence[Stage], rerun: Collection[str]) -> None:
    """Refuses stages that were started with other settings, all at once; stages to rerun may differ."""
    changed: dict[str, list[str]] = {}  # the differences as text -> stages
    equal = set[str]()
    for stage in stages:
        if stage.name not in rerun and (found := stage_files.read_started(workdir / stage.name)):
            if lines := config.differences(found['settings'], config.to_dict(stage.settings)):
                changed.setdefault('; '.join(lines), []).append(stage.name)
            else:
                equal.add(stage.name)
    if changed:
        refused = {name for names in changed.values() for name in names}
        flag = ','.join(_names_to_rerun(workdir, stages, refused, equal))
        what = '; '.join(f'{shorten(names)} ({lines})' for lines, names in changed.items())
        raise WorkdirError(
            f'{workdir}: stages were started with other settings: {what}. Rerun them (--rerun={flag}), or use another '
            'workdir'
        )


def _names_to_rerun(
    workdir: pathlib.Path, stages: Sequence[Stage], refused: Collection[str], equal: Collection[str]
) -> list[str]:
    """Few names that rerun the refused stages and what depends on them, but no other of the equal ones."""
    dependent, first = set[str](), list[str]()  # on a refused stage; and the refused stages that are not
    for stage in stages:
        if any(name in dependent or name in refused for name in _stages_read(workdir, stage)):
            dependent.add(stage.name)
        elif stage.name in refused:
            first.append(stage.name)
    kept = {folder for name in equal if name not in dependent for folder in (name, *_folders_of(name))}
    names = (next((folder for folder in _folders_of(name) if folder not in kept), name) for name in first)
    return list(dict.fromkeys(names))


def _folders_of(name: str) -> list[str]:
    """The folders around a stage's folder, outermost first: 'rl', 'rl/a' for 'rl/a/seed-0'."""
    return [path.as_posix() for path in reversed(pathlib.PurePosixPath(name).parents)][1:]


def _stages_read(workdir: pathlib.Path, stage: Stage) -> list[str]:
    """Names of the stages of this run that a stage reads."""
    root = workdir.resolve()
    paths = [path.resolve() for path in stage.inputs.values()]
    return [path.relative_to(root).as_posix() for path in paths if path.is_relative_to(root)]


def _check_order(workdir: pathlib.Path, stages: Sequence[Stage]) -> None:
    before, above = set[str](), dict[str, str]()  # names of stages; folders around them, each with one of its stages
    for stage in stages:
        folders = _folders_of(stage.name)
        taken = [name for name in (stage.name, *folders) if name in before]
        if stage.name in above:
            taken.append(above[stage.name])
        if taken:
            raise ValueError(f'{stage.name}: expected a folder of its own, found that of {taken[0]}')
        for name in _stages_read(workdir, stage):
            if name not in before:
                raise WorkdirError(f'{stage.name}: expected its inputs in {workdir} to be earlier stages, found {name}')
        before.add(stage.name)
        above.update(dict.fromkeys(folders, stage.name))


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """The state of a stage: what the next command would do with it.

    Attributes:
        state: 'done'; 'started' or 'missing': it runs now; 'waits': for stages that are not done; 'running': in another
            process; 'refused': the command would fail.
        seconds: that it took, if it is done.
        inputs: names of the stages that it reads, and paths of other inputs.
        reason: the stages that it waits for, the process that runs it, or the error.
    """

    name: str
    state: Literal['done', 'started', 'missing', 'waits', 'running', 'refused']
    seconds: float | None
    inputs: tuple[str, ...]
    reason: str = ''


def plan_of(workdir: pathlib.Path, stages: Sequence[Stage], *, rerun: Collection[str] = ()) -> list[PlannedStage]:
    """The state of every stage. Writes nothing; stages of `rerun` (from `stages_to_rerun`) count as missing.

    Raises:
        WorkdirError: the directory is of another format, or contains files but no run; the stages are not in order.
    """
    _check_order(workdir, stages)
    stored_config(workdir)
    hashes, plan = Hashes(), dict[str, PlannedStage]()
    for stage in stages:
        folder, read = workdir / stage.name, _stages_read(workdir, stage)
        files = [str(path) for path in stage.inputs.values() if not path.resolve().is_relative_to(workdir.resolve())]
        unfinished = [name for name in read if plan[name].state != 'done']
        try:
            state, reason = _state_of(stage, folder, unfinished, hashes, stage.name in rerun)
        except (WorkdirError, config.ConfigError) as error:
            state, reason = 'refused', str(error)
        seconds = stage_seconds(folder) if state == 'done' else None
        plan[stage.name] = PlannedStage(stage.name, state, seconds, (*read, *files), reason)
    return list(plan.values())


def _state_of(
    stage: Stage, folder: pathlib.Path, unfinished: list[str], hashes: Hashes, rerun: bool
) -> tuple[Literal['done', 'started', 'missing', 'waits', 'running', 'refused'], str]:
    if holder := stage_files.lock_holder(folder):
        return 'running', holder
    if folder.exists():
        stage_files.check_is_stage(folder)
    started = None if rerun else stage_files.read_started(folder)
    settings = config.to_dict(stage.settings)
    if started and (lines := config.differences(started['settings'], settings)):
        return 'refused', f'other settings: {"; ".join(lines)}'
    if not unfinished:
        identity = {'settings': settings, 'inputs': _hash_inputs(folder, stage, hashes)}
        if started and is_done(folder):
            _check_identity(stage.name, folder, stage_files.read_done(folder), identity)
            hashes.of(folder)
            return 'done', ''
        if started:
            _check_identity(stage.name, folder, started, identity)
    stage.check()
    return ('waits', shorten(unfinished)) if unfinished else ('started' if started else 'missing', '')


def plan_text(plan: Sequence[PlannedStage]) -> str:
    """A table of the stages, sums, and what the next command would do."""
    names = [stage.name for stage in plan]
    width = max(map(len, ['stage', *names]))
    lines = [f'{"stage":<{width}}  {"state":<8}{"seconds":>9}  reads']
    for stage in plan:
        seconds = '' if stage.seconds is None else f'{stage.seconds:,.0f}'
        read = shorten([name for name in stage.inputs if name in names])
        lines.append(f'{stage.name:<{width}}  {stage.state:<8}{seconds:>9}  {read}'.rstrip())
    total = sum(stage.seconds or 0.0 for stage in plan)
    lines += ['', f'done: {sum(stage.state == "done" for stage in plan)} of {len(plan)} stages, {total:,.0f} s']
    what = {
        'refused': 'refused ({})',
        'running': 'running now ({})',
        'started': 'to resume now',
        'missing': 'to run now',
        'waits': 'to run later',
    }
    for state, text in what.items():
        chosen: dict[str, list[str]] = {}  # stages with one reason are on one line
        for stage in plan:
            if stage.state == state:
                chosen.setdefault(text.format(stage.reason), []).append(stage.name)
        lines += [f'{line}: {shorten(found)}' for line, found in chosen.items()]
    return '\n'.join(lines)
