"""Run by `test_processes.py` in two tasks of SLURM: stages that need no device; the second process breaks the last.

python -m tests.run.two_processes WORKDIR
"""

import json
import os
import pathlib
import sys
import time

from simrl.run import processes
from simrl.run.config import ConfigError
from simrl.run.directory import open_workdir
from simrl.run.stages import Stage, run_stages

processes.GRACE_SECONDS = 0.3


def main() -> None:
    processes.join(None, None, None)
    index = processes.index()
    workdir, checked, done = pathlib.Path(sys.argv[1]), list[str](), list[str]()

    def write(stage: pathlib.Path) -> None:
        done.append(stage.name)
        if processes.leads():
            time.sleep(0.2)  # the other one waits for it
            (stage / 'result').write_text('fine')

    def read(stage: pathlib.Path) -> None:
        assert (workdir / 'first' / 'result').read_text() == 'fine'
        write(stage)

    def break_down(stage: pathlib.Path) -> None:
        if processes.leads():
            time.sleep(60)  # as in a program on the devices of both
        raise OSError('no line')

    def check() -> None:
        checked.append('again')

    def stages(*works: Stage) -> list[Stage]:
        return [Stage('first', {'x': 1}, {}, write, check), *works]

    second = Stage('second', {}, {'first': workdir / 'first'}, read, check)
    differing = Stage('differing', {'x': index}, {}, write)
    found: dict[str, object] = {'gathered': processes.gather('numbers', index + 1)}
    found['broadcast'] = processes.broadcast('a number', index + 1)
    points = 0  # until the leader hears of the other one's signal
    while processes.agree_on_signal(15 if points and not processes.leads() else None) is None:
        points += 1
    found['points'] = points
    with processes.ending_together():
        for listed in (stages(), stages(second)):
            open_workdir(workdir, {}, listed)
            run_stages(workdir, listed)
        found |= {'checked': len(checked), 'done': done, 'pid': os.getpid()}
        try:
            run_stages(workdir, stages(differing))
        except ConfigError as error:
            found['differing'] = str(error)
        print(json.dumps(found), flush=True)
        run_stages(workdir, stages(Stage('broken', {}, {}, break_down)))


if __name__ == '__main__':
    main()
