"""Stages that need no model, and a run of them: what the tests of run directories share."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.run import stage_files
from simrl.run.directory import open_workdir
from simrl.run.stages import Event, Stage, run_stages, stages_to_rerun

SETTINGS = {'sft': {'learning_rate': 0.1, 'steps': 10}}


class Work:
    """Counts its calls and writes a result; can fail after half of it."""

    def __init__(self, result: str = 'fine') -> None:
        self.calls, self.result, self.fails = 0, result, False

    def __call__(self, folder: pathlib.Path) -> None:
        self.calls += 1
        (folder / 'half').write_text('half')
        if self.fails:
            raise KeyError('half-way')
        (folder / 'result.json').write_text(json.dumps(self.result))


def run(
    workdir: pathlib.Path, plan: Sequence[Stage], *rerun: str, config: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, str]:
    """Runs stages as the main program does; the last event of each."""
    events = list[Event]()
    open_workdir(workdir, config or {}, plan, rerun=stages_to_rerun(workdir, plan, rerun))
    run_stages(workdir, plan, on_event=events.append, **options)
    return {event.stage: event.kind for event in events}


def run_one(folder: pathlib.Path, settings, inputs, work, *, rerun: bool = False) -> str:
    stage = Stage(folder.name, settings, inputs, work)
    return run(folder.parent, [stage], *([stage.name] if rerun else []))[stage.name]


def five_stages(workdir: pathlib.Path, settings: Mapping[str, Any] | None = None, **works: Any) -> list[Stage]:
    """Two arms, an evaluation of one of them, a summary of the evaluation, and a stage of its own.

    Args:
        settings: changed fields of `sft`, by the first part of a stage's name.
        works: by the first part of a stage's name.
    """
    reads = {'rl/a/seed-0': [], 'rl/b/seed-0': [], 'evaluate': ['rl/a/seed-0'], 'summary': ['evaluate'], 'other': []}
    kinds = {name: name.split('/')[0] for name in reads}
    return [
        Stage(
            name,
            {'sft': SETTINGS['sft'] | (settings or {}).get(kinds[name], {})},
            {read: workdir / read for read in inputs},
            works.get(kinds[name], Work()),
        )
        for name, inputs in reads.items()
    ]


def files(workdir: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """mtime and content of every file but the locks."""
    paths = [path for path in workdir.rglob('*') if path.is_file() and path.name != stage_files.LOCK_FILE]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
