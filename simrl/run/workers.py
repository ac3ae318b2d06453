"""Stages side by side: several processes, each on CPUs of its own, work through the tasks of one job.

1. This process splits its CPUs evenly and starts a lane for each share, on these CPUs from its first moment, so that
   the lane's libraries count no others. All lanes have as many, and so give the same bytes whichever runs a stage.
2. Each lane makes the job's tasks anew and runs what it can (`stages.run_tasks`): it skips what is done, what rests on
   a stage that is not, and what another process holds, be it a lane of this command or of another one like it.
3. Lanes write what they print to lanes/lane-K.log in the run directory, and tell this process what starts and ends.
4. A lane that fails stops the others: they get SIGTERM, save, and end. So does SIGTERM or SIGINT to this process; where
   it is killed, the lanes notice and do the same by themselves.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import tqdm

from simrl.run import config, stages
from simrl.run.stages import Event, Task

LOGS_FOLDER = 'lanes'
LOOK_SECONDS = 0.5  # between two looks at how many stages are done


def _nothing(*_: Any) -> None:
    """What a job does that has nothing to set up."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What `config.job` names. Its functions are importable by name: other processes call them as well.

    Attributes:
        settings: the dataclass of the job's config.
        tasks: (settings, run directory) -> the stages, each after those that it reads. Each lane calls it, so what only
            a stage needs is better loaded by that stage.
        finish: (settings, run directory), called once all stages are done, by one process at a time, with a folder for
            results there: what is made of all of them. None: nothing.
        lanes: settings -> how many stages run side by side. None: one after the other, and it is an error if another
            process works in the run directory.
        setup: called first in every process, for instance to keep compiled programs in one place.
        exempt: dotted fields that may change in a run that goes on; see `stages.open_workdir`.
    """

    settings: type[Any]
    tasks: Callable[[Any, pathlib.Path], list[Task]]
    finish: Callable[[Any, pathlib.Path], None] | None = None
    lanes: Callable[[Any], int] | None = None
    setup: Callable[[], object] = _nothing
    exempt: tuple[str, ...] = ()


class LaneError(RuntimeError):
    """A lane ended before its time, for no error of its own."""


class _InLaneError(RuntimeError):
    """The traceback of an error in a lane: shown as the cause of the same error here."""

    def __str__(self) -> str:
        return f'\n{self.args[0]}'


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An error in a lane. Its message travels, and not the error itself: not every kind survives being copied."""

    kind: type[Exception]
    message: str
    trace: str

    def error(self) -> Exception:
        error = self.kind.__new__(self.kind)
        error.args = (self.message,)
        return error


@dataclasses.dataclass
class _Lane:
    """A lane as the process that started it sees it."""

    number: int
    process: SpawnProcess
    messages: connection.Connection
    stage: str | None = None  # that it works on


def run_side_by_side(job: Job, settings: Any, workdir: pathlib.Path, tasks: Sequence[Task], lanes: int) -> None:
    """Runs what is missing of a job's tasks in several processes; returns once all stages are done.

    Args:
        job: what the lanes make their tasks by.
        settings: the job's; they travel as plain values.
        workdir: the run directory, opened.
        tasks: the job's, as this process made them.
        lanes: how many processes.

    Raises:
        ConfigError: there are fewer CPUs than lanes.
        LaneError: a lane was killed.
        SystemExit: SIGTERM or SIGINT came to this process; the exit code is 128 + the signal.
        Exception: what a stage raised, with the traceback in its lane as the cause.
    """
    shares = cpu_shares(lanes)
    missing = [task.name for task in tasks if not stages.is_done(workdir / task.name)]
    if not missing:
        stages.run_tasks(workdir, tasks, held='wait')  # which holds their files against what they left
        return
    (workdir / LOGS_FOLDER).mkdir(exist_ok=True)
    print(f'{lanes} lanes of {len(shares[0])} CPUs each; what they print is in {workdir / LOGS_FOLDER}', flush=True)
    with _Signals() as signals, _bar(len(tasks), len(tasks) - len(missing)) as bar:
        crew: list[_Lane] = []
        try:
            for number in range(min(lanes, len(missing))):
                crew.append(_start(number, job, config.to_dict(settings), workdir, shares[number]))
            _watch(crew, workdir, tasks, signals, bar)
        finally:
            for lane in crew:
                lane.process.terminate()
            for lane in crew:
                lane.process.join()


def cpu_shares(lanes: int) -> list[frozenset[int]]:
    """As many CPUs for each lane, of those that this process may use; a remainder is left over.

    Raises:
        ConfigError: there are fewer CPUs than lanes.
    """
    own = cpus()
    size = len(own) // lanes
    if not size:
        raise config.ConfigError(f'config.lanes: expected at most {len(own)}, the number of CPUs, found {lanes}')
    return [frozenset(own[i * size : (i + 1) * size]) for i in range(lanes)]


def cpus() -> list[int]:
    """The CPUs that this process may use. Where a system does not let processes choose (macOS), they only count."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(os.cpu_count() or 1))


def _start(number: int, job: Job, plain: Mapping[str, Any], workdir: pathlib.Path, share: Collection[int]) -> _Lane:
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(number, job, plain, workdir, sender), name=f'lane-{number}')
    resource_tracker.ensure_running()  # not by `start`: it would be on the CPUs of the first lane
    with _inherited(share):
        process.start()
    sender.close()  # so that the lane has the only one, and its end is the end of the messages
    return _Lane(number, process, receiver)


@contextmanager
def _inherited(share: Collection[int]) -> Iterator[None]:
    """A process started inside runs on these CPUs, and takes no SIGINT: a terminal sends it to lanes as well."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if not hasattr(os, 'sched_setaffinity'):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, share)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _watch(
    crew: Sequence[_Lane], workdir: pathlib.Path, tasks: Sequence[Task], signals: '_Signals', bar: tqdm.tqdm
) -> None:
    """Shows what happens until all lanes have ended."""
    working = {lane.messages: lane for lane in crew}
    while working:
        ready = connection.wait(list(working), timeout=LOOK_SECONDS)
        if signals.received is not None:
            name = signal.Signals(signals.received).name
            tqdm.tqdm.write(f'stopped by {name}: the lanes save, and the same command goes on')
            raise SystemExit(128 + signals.received)
        done = sum(stages.is_done(workdir / task.name) for task in tasks)  # by whichever process
        bar.update(done - bar.n)
        for lane in [lane for messages, lane in working.items() if messages in ready]:
            try:
                message = lane.messages.recv()
            except (EOFError, OSError):  # it ended; OSError: amidst a message
                _check_end(lane, workdir)
                del working[lane.messages]
                continue
            if isinstance(message, _Failure):
                raise message.error() from _InLaneError(message.trace)
            _show(lane, message, [other.process.pid for other in crew], f'{done} of {len(tasks)} stages done')


def _check_end(lane: _Lane, workdir: pathlib.Path) -> None:
    lane.process.join()
    code = lane.process.exitcode or 0
    if code:
        how = f'was killed by {signal.Signals(-code).name}' if code < 0 else f'ended with exit code {code}'
        what = f'while it worked on {lane.stage}' if lane.stage else 'outside of a stage'
        log = workdir / LOGS_FOLDER / f'lane-{lane.number}.log'
        raise LaneError(f'lane {lane.number} {how} {what}; see {log}. The same command goes on')


def _show(lane: _Lane, event: Event, crew: Collection[int | None], so_far: str) -> None:
    line = ''
    if event.what == 'starts':
        lane.stage = event.stage
        line = f'== {event.stage} (lane {lane.number})'
    elif event.what == 'ran':
        lane.stage = None
        line = f'== {event.stage}: ran, {event.seconds:.0f} s (lane {lane.number}; {so_far})'
    elif event.what == 'waits' and not any(event.holder.startswith(f'process {pid} on') for pid in crew):
        line = f'== {event.stage}: waits for {event.holder} (lane {lane.number})'
    if line:
        tqdm.tqdm.write(line)  # above the bar, where there is one
        sys.stdout.flush()


def _bar(total: int, done: int) -> tqdm.tqdm:
    """Stages done, on a terminal; elsewhere the lines that say so are enough."""
    return tqdm.tqdm(
        total=total, initial=done, desc='stages', unit='stage', dynamic_ncols=True, disable=not sys.stderr.isatty()
    )


class _Signals:
    """Remembers SIGTERM or SIGINT, for as long as lanes run."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> '_Signals':
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number


def _work(
    number: int, job: Job, plain: Mapping[str, Any], workdir: pathlib.Path, messages: connection.Connection
) -> None:
    """What a lane's process does."""
    log = open(workdir / LOGS_FOLDER / f'lane-{number}.log', 'a', buffering=1)  # noqa: SIM115  (its output to the end)
    for stream in (1, 2):  # what libraries print in C++ goes there, too
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(event: Event) -> None:
        stages.say(event)
        messages.send(event)

    try:
        job.setup()
        settings = config.from_config_dict(job.settings, plain, 'config')
        stages.run_tasks(workdir, job.tasks(settings, workdir), held='wait', tell=tell)
    except Exception as error:
        traceback.print_exc()
        messages.send(_Failure(type(error), str(error), traceback.format_exc()))
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """Ends a lane whose parent is gone, however it went, as the parent would have: a stage that can save does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
