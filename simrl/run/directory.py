"""A run directory: whether a command fits it, and what the command would do.

1. `open_workdir` refuses what cannot run, before anything is written: a run directory of another config, stages that
   were started with other settings, a `check` that fails. Then it empties the stages to rerun.
2. `plan_of` says what the next command would do with each stage, and writes nothing.

Of several processes of one run each does the checks, and process 0 alone writes.
"""

import dataclasses
import functools
import pathlib
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import simrl
from simrl.run import config, processes, stage_files
from simrl.run import stages as stages_lib
from simrl.run.stage_files import STAGE_FILE, Hashes, WorkdirError, is_done, shorten
from simrl.run.stages import Stage, check_order, files_read, stages_read

CONFIG_FILE = 'config.json'
SHARED_SECONDS = 30.0  # until a file of process 0 must be seen by the others
FORMAT = 5  # of run directories; goes up when runs of the version before cannot be resumed


def open_workdir(
    workdir: pathlib.Path,
    config_dict: Mapping[str, Any],
    stages: Sequence[Stage] = (),
    *,
    fixed: Collection[str] = (),
    rerun: Sequence[str] = (),
) -> None:
    """Makes the run directory and its config.json, or checks that they fit; empties the stages to rerun.

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
    check_order(workdir, stages)
    stored, missing = None, list[str]()
    if processes.leads():
        stored = _fitting_config(workdir, config_dict, fixed)
        check_settings(workdir, stages, rerun)
        missing = [stage.name for stage in stages if stage.name in rerun or not is_done(workdir / stage.name)]
    missing = processes.broadcast('the stages to check', missing)
    for stage in stages:
        if stage.name in missing:
            stage.check()
    if processes.leads():
        _write(workdir, stored, {'format': FORMAT, 'version': simrl.__version__, **config_dict}, rerun)
    _check_shared(workdir)


def _write(
    workdir: pathlib.Path, stored: Mapping[str, Any] | None, wanted: Mapping[str, Any], rerun: Sequence[str]
) -> None:
    """Writes config.json where it is another, and empties the stages to rerun."""
    folders = [workdir / name for name in rerun if (workdir / name).exists()]
    with ExitStack() as locks:
        for folder in folders:
            stages_lib.lock(locks, folder)
            stage_files.check_is_stage(folder)
        if stored != wanted:
            workdir.mkdir(parents=True, exist_ok=True)
            stage_files.write_json(workdir / CONFIG_FILE, wanted)
        emptied = [folder for folder in folders if (folder / STAGE_FILE).exists()]
        for folder in reversed(emptied):  # downstream first, so that no stage ever depends on a missing input
            stage_files.empty(folder)
    if emptied:
        names = shorten([folder.relative_to(workdir).as_posix() for folder in emptied])
        print(f'to rerun: {names}. After a kill, the command without --rerun resumes', flush=True)


def _check_shared(workdir: pathlib.Path) -> None:
    """Refuses a run directory that is not the same one for all processes.

    Raises:
        WorkdirError: in every process.
    """
    if processes.count() == 1:
        return
    file = workdir / processes.broadcast('a file', f'.{uuid.uuid4().hex}')
    if processes.leads():
        file.touch()
    processes.barrier('the file is written')
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(stage_files.POLL_SECONDS)
    seen = processes.gather('the file is seen', file.exists())
    if processes.leads():
        file.unlink()
    if not all(seen):
        without = ', '.join(str(process) for process, sees in enumerate(seen) if not sees)
        raise WorkdirError(
            f'{workdir}: expected one directory for all processes, on a file system that they share, found that '
            f'process {without} does not see what process 0 writes there'
        )


def _fitting_config(
    workdir: pathlib.Path, config_dict: Mapping[str, Any], fixed: Collection[str]
) -> dict[str, Any] | None:
    """`stored_config`, with the same `fixed` fields as `config_dict`."""
    stored = stored_config(workdir)
    if stored is not None:
        kept, wanted = ({field: plain.get(field) for field in fixed} for plain in (stored, config_dict))
        if lines := config.differences(kept, wanted):
            raise WorkdirError(f'{workdir}: is the run of another config: {"; ".join(lines)}. Use another workdir')
    return stored


def stored_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """config.json of the run directory; None if it is empty or missing."""
    stored = stage_files.read_json(workdir / CONFIG_FILE)
    if stored is None and workdir.exists():
        others = sorted(path.name for path in workdir.iterdir() if not stage_files.is_foreign(path))
        if others:
            raise WorkdirError(f'{workdir}: expected an empty folder or a run ({CONFIG_FILE}), found {shorten(others)}')
    if stored is not None and stored.get('format') != FORMAT:
        made_by = f'simrl {stored.get("version", "unknown")}'
        raise WorkdirError(
            f'{workdir}: expected a run of format {FORMAT}, found {stored.get("format", "another")}. Use another '
            f'workdir, or resume it with the version that made it ({made_by})'
        )
    return stored


def check_settings(workdir: pathlib.Path, stages: Sequence[Stage], rerun: Collection[str]) -> None:
    """Refuses stages that were started with other settings, all at once; arguments and error as of `open_workdir`."""
    changed: dict[str, list[str]] = {}  # the differences as text -> stages
    equal = set[str]()
    for stage in stages:
        if stage.name not in rerun and (found := stage_files.read_started(workdir / stage.name)):
            if lines := config.differences(found['settings'], config.identity(stage.settings)):
                changed.setdefault('; '.join(lines), []).append(stage.name)
            else:
                equal.add(stage.name)
    if changed:
        selected = {stage.name for stage in stages}
        started = {path.parent.relative_to(workdir).as_posix() for path in workdir.rglob(STAGE_FILE)}
        equal |= started - selected  # as far as is known
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
        if any(name in dependent or name in refused for name in stages_read(workdir, stage)):
            dependent.add(stage.name)
        elif stage.name in refused:
            first.append(stage.name)
    kept = {folder for name in equal if name not in dependent for folder in (name, *stages_lib.folders_of(name))}
    names = (next((folder for folder in stages_lib.folders_of(name) if folder not in kept), name) for name in first)
    return list(dict.fromkeys(names))


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


def plan_of(
    workdir: pathlib.Path,
    config_dict: Mapping[str, Any],
    stages: Sequence[Stage],
    *,
    fixed: Collection[str] = (),
    rerun: Collection[str] = (),
) -> list[PlannedStage]:
    """The state of every stage; arguments as of `open_workdir`. Writes nothing; stages of `rerun` count as missing.

    Raises:
        WorkdirError: the directory is of another config or format, or contains files but no run; the stages are not
            in order.
    """
    check_order(workdir, stages)
    _fitting_config(workdir, config_dict, fixed)
    hashes, plan = Hashes(), dict[str, PlannedStage]()

    @functools.cache  # most stages share one check, which may take long
    def refusal(check: Callable[[], None]) -> str:
        try:
            check()
        except (WorkdirError, config.ConfigError) as error:
            return str(error)
        return ''

    for stage in stages:
        folder, read, files = workdir / stage.name, stages_read(workdir, stage), files_read(workdir, stage)
        unfinished = [name for name in read if plan[name].state != 'done']
        try:
            state, reason = _state_of(stage, folder, unfinished, hashes, stage.name in rerun)
        except WorkdirError as error:
            state, reason = 'refused', str(error)
        if state in ('started', 'missing', 'waits') and (refused := refusal(stage.check)):
            state, reason = 'refused', refused
        seconds = stages_lib.stage_seconds(folder) if state == 'done' else None
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
    settings = config.identity(stage.settings)
    if started and (lines := config.differences(started['settings'], settings)):
        return 'refused', f'other settings: {"; ".join(lines)}'
    if not unfinished:
        identity = {'settings': settings, 'inputs': stages_lib.hash_inputs(folder, stage, hashes)}
        if started and is_done(folder):
            stages_lib.check_identity(stage.name, folder, stage_files.read_done(folder), identity)
            hashes.of(folder)
            return 'done', ''
        if started:
            stages_lib.check_identity(stage.name, folder, started, identity)
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
