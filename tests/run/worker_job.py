"""A job of trivial stages, for tests of lanes; started as a command it is what `simrl.main` is to real jobs.

    python -m tests.lane_job WORKDIR LOG LANES [--seconds=0.1] [--fails=NAME] [--rerun=NAME]

LOG gets a line of each work of a stage: its name, the process, its CPUs, and 'saved' where SIGTERM came meanwhile.
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

from simrl.run import stages, workers
from simrl.run.stages import Task
from simrl.run.workers import Job

NAMES = ('first', *(f'side/{i}' for i in range(6)), 'last')


class PickyError(ValueError):
    """An error that cannot be copied by its arguments."""

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(f'{place}: {reason}')


@dataclasses.dataclass(frozen=True)
class Settings:
    log: pathlib.Path
    seconds: float = 0.1  # that a stage takes
    fails: str | None = None  # the stage that does


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


def tasks(settings: Settings, workdir: pathlib.Path) -> list[Task]:
    """One stage, six that rest on it, and one that rests on these."""

    def task(name: str, *reads: str) -> Task:
        inputs = {read: workdir / read for read in reads}
        return Task(name, {}, inputs, lambda folder: _work(folder, name, settings))

    first, *sides, last = NAMES
    return [task(first), *(task(side, first) for side in sides), task(last, *sides)]


JOB = Job(Settings, tasks)


def run(settings: Settings, workdir: pathlib.Path, num_lanes: int, rerun: tuple[str, ...] = ()) -> None:
    plan = tasks(settings, workdir)
    again = stages.to_run_again(workdir, plan, rerun)
    stages.open_workdir(workdir, {}, again=again)
    workers.run_side_by_side(JOB, settings, workdir, plan, num_lanes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('workdir', type=pathlib.Path)
    parser.add_argument('log', type=pathlib.Path)
    parser.add_argument('lanes', type=int)
    parser.add_argument('--seconds', type=float, default=0.1)
    parser.add_argument('--fails')
    parser.add_argument('--rerun', action='append', default=[])
    options = parser.parse_args()
    try:
        run(Settings(options.log, options.seconds, options.fails), options.workdir, options.lanes, tuple(options.rerun))
    except workers.LaneError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
