"""A run of trivial stages, for tests of workers; also a command, as `simrl.main` is for real runs.

    python -m tests.run.worker_job WORKDIR LOG WORKERS [--seconds=0.1] [--fails=NAME] [--rerun=NAME]

LOG gets a line for each run of a stage: its name, process and CPUs; and 'saved' if it receives SIGTERM.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

from simrl.run import directory, stages, workers
from simrl.run.stages import Stage

NAMES = ('first', *(f'side/{i}' for i in range(6)), 'last')


class PickyError(ValueError):
    """An error that cannot be unpickled."""

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(f'{place}: {reason}')


@dataclasses.dataclass(frozen=True)
class Settings:
    log: pathlib.Path
    seconds: float = 0.1  # duration of each stage
    fails: str | None = None  # a stage that raises


def _note(settings: Settings, *words: Any) -> None:
    with open(settings.log, 'a') as file:
        file.write(' '.join(map(str, words)) + '\n')


def _work(folder: pathlib.Path, name: str, settings: Settings) -> None:
    def save(*_: object) -> None:
        _note(settings, name, os.getpid(), 'saved')
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, save)
    _note(settings, name, os.getpid(), *sorted(os.sched_getaffinity(0)))
    if name == settings.fails:
        raise PickyError('expected to go well', f'stage {name}')
    time.sleep(settings.seconds)
    (folder / 'result.json').write_text(json.dumps(name))
    signal.signal(signal.SIGTERM, previous)


def build(settings: Settings, workdir: pathlib.Path) -> list[Stage]:
    """One stage, six that depend on it, and one that depends on these."""

    def stage(name: str, *reads: str) -> Stage:
        inputs = {read: workdir / read for read in reads}
        return Stage(name, {}, inputs, lambda folder: _work(folder, name, settings))

    first, *sides, last = NAMES
    return [stage(first), *(stage(side, first) for side in sides), stage(last, *sides)]


def run(
    settings: Settings, workdir: pathlib.Path, num_workers: int, rerun: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> None:
    plan = build(settings, workdir)
    again = stages.stages_to_rerun(workdir, plan, rerun)
    directory.open_workdir(workdir, {}, plan, rerun=again)
    chosen = stages.select(workdir, plan, only) if only else plan
    workers.run_side_by_side(build, settings, workdir, [stage.name for stage in chosen], num_workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('workdir', type=pathlib.Path)
    parser.add_argument('log', type=pathlib.Path)
    parser.add_argument('workers', type=int)
    parser.add_argument('--seconds', type=float, default=0.1)
    parser.add_argument('--fails')
    parser.add_argument('--rerun', action='append', default=[])
    options = parser.parse_args()
    try:
        settings = Settings(options.log, options.seconds, options.fails)
        run(settings, options.workdir, options.workers, tuple(options.rerun))
    except workers.WorkerError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
