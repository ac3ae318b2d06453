"""Stages side by side: several worker processes, each with its own CPUs, run the stages of one run.

1. The parent splits its CPUs evenly and starts a worker on each share. The affinity is set before the worker's first
   instruction, so that its libraries count no other CPUs. All shares have one size, so that a stage's outputs do not
   depend on its worker.
2. Each worker builds the list of stages anew and runs what it can (`stages.run_stages`). It skips stages that are done,
   that wait for others, or that another process has locked, be it of this command or of another one.
3. Workers write their output to workers/worker-K.log in the run directory and send their events to the parent.
4. If a worker fails, or the parent receives SIGTERM, SIGINT or SIGHUP, the workers get SIGTERM, save and exit. If the
   parent is killed, the workers notice and do the same. A second SIGINT kills them.
"""

import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, TextIO

import tqdm

from simrl.run import config, processes, stages
from simrl.run.runtime import enable_compilation_cache
from simrl.run.stages import Event, Stage

LOGS_FOLDER = 'workers'
POLL_SECONDS = 0.5  # between two counts of the stages that are done
CGROUPS = pathlib.Path('/sys/fs/cgroup')
OWN_CGROUPS = pathlib.Path('/proc/self/cgroup')
QUOTA = re.compile(r'\s*(?P<quota>[1-9]\d*)(\s+(?P<period>[1-9]\d*))?')  # microseconds of CPU time in each period
DEFAULT_PERIOD = 100_000  # of the kernel

Build = Callable[
    [Any, pathlib.Path], list[Stage]
]  # (settings, run directory) -> stages, each after those that it reads


class WorkerError(RuntimeError):
    """A worker process died without raising an error."""


class _RemoteError(RuntimeError):
    """The traceback of an error in a worker: the cause of the error that the parent raises."""

    def __str__(self) -> str:
        return f'\n{self.args[0]}'


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An error in a worker. Only its type and message are sent: some exceptions cannot be unpickled."""

    kind: type[Exception]
    message: str
    trace: str

    def error(self) -> Exception:
        error = self.kind.__new__(self.kind)
        error.args = (self.message,)
        return error


@dataclasses.dataclass
class _Worker:
    """A worker, in the parent."""

    number: int
    process: SpawnProcess
    messages: connection.Connection
    stage: str | None = None  # the one that it runs
    began: bool = False  # it has sent a message


def run_side_by_side(
    build: Build, settings: Any, workdir: pathlib.Path, names: Collection[str], num_workers: int
) -> None:
    """Runs the stages that are not done in several processes; returns when all are.

    Args:
        build: an importable function; every worker calls it, so it loads no model.
        settings: its argument; can be pickled.
        workdir: the run directory, opened (`directory.open_workdir`).
        names: of the stages to run, with all that they need.
        num_workers: how many processes.

    Raises:
        ConfigError: there are fewer CPUs than workers.
        WorkerError: a worker was killed.
        SystemExit: this process received SIGTERM, SIGINT or SIGHUP; the exit code is 128 + the signal.
        KeyboardInterrupt: it received a second SIGINT.
        Exception: what a stage raised, with the worker's traceback as its cause.
    """
    shares = cpu_shares(num_workers)
    missing = [name for name in names if not stages.is_done(workdir / name)]
    if not missing:
        _run(build, settings, workdir, names, stages.print_event)  # checks their files
        return
    (workdir / LOGS_FOLDER).mkdir(exist_ok=True)
    print(
        f'{num_workers} workers of {len(shares[0])} CPUs each; their output is in {workdir / LOGS_FOLDER}', flush=True
    )
    workers: list[_Worker] = []
    with _recorded_signals(workers) as signals, _bar(len(names), len(names) - len(missing)) as bar:
        try:
            for number in range(min(num_workers, len(missing))):
                _open_log(workdir, number).close()  # a worker without a log cannot say why
                workers.append(_start(number, shares[number], (build, settings, workdir, names)))
            _watch(workers, workdir, names, signals, bar)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join()


@contextmanager
def own_output(workdir: pathlib.Path) -> Iterator[None]:
    """Leads the prints of all processes of a run but process 0 into workers/process-K.log: they would say the same."""
    if processes.leads():
        yield
        return
    (workdir / LOGS_FOLDER).mkdir(exist_ok=True)
    with _open(workdir / LOGS_FOLDER / f'process-{processes.index()}.log') as log, redirect_stdout(log):
        yield


def cpu_shares(num_workers: int) -> list[frozenset[int]]:
    """The CPUs of each worker: as many for each, of those that this process may use; a remainder is unused.

    Raises:
        ConfigError: there are fewer CPUs than workers.
    """
    own = cpus()
    size = len(own) // num_workers
    if not size:
        raise config.ConfigError(
            f'config.workers: expected at most {len(own)}, the number of CPUs, found {num_workers}'
        )
    return [frozenset(own[i * size : (i + 1) * size]) for i in range(num_workers)]


def cpus() -> list[int]:
    """The CPUs that this process may use: by its affinity, and as many as its quota is worth, but at least one."""
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(range(os.cpu_count() or 1))
    quota = cpu_quota()
    if quota >= len(own):
        return own
    start = zlib.crc32(socket.gethostname().encode()) % len(own)  # so that containers of a host use different ones
    return sorted((own + own)[start : start + max(1, int(quota))])


def cpu_quota() -> float:
    """The CPUs whose time the control groups of this process may use (`docker --cpus`); inf if that is not limited."""
    return min(map(_quota_of, cgroups('cpu')), default=math.inf)


def cgroups(controller: str) -> list[pathlib.Path]:
    """The folders of the control groups that may limit this process, its own and those around it.

    Args:
        controller: the resource, such as 'cpu' or 'memory'.
    """
    folders: list[pathlib.Path] = []
    lines = OWN_CGROUPS.read_text(encoding='utf-8').splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers == '' or controller in controllers.split(','):  # version 2; version 1
            root = CGROUPS / controller if controllers else CGROUPS
            folder = root / path.lstrip('/')
            folders += [each for each in (folder, *folder.parents) if each.is_relative_to(root)]
    return folders


def _quota_of(cgroup: pathlib.Path) -> float:
    """The quota of one control group. Sandboxes may write the file empty, or without the period."""
    names = ('cpu.max',) if (cgroup / 'cpu.max').exists() else ('cpu.cfs_quota_us', 'cpu.cfs_period_us')
    files = [cgroup / name for name in names]
    text = ' '.join(file.read_text(encoding='utf-8') for file in files if file.exists())
    found = QUOTA.match(text)  # not where it is 'max', or -1
    return int(found['quota']) / int(found['period'] or DEFAULT_PERIOD) if found else math.inf


def _run(
    build: Build,
    settings: Any,
    workdir: pathlib.Path,
    names: Collection[str],
    on_event: Callable[[Event], None],
) -> None:
    chosen = [stage for stage in build(settings, workdir) if stage.name in names]
    stages.run_stages(workdir, chosen, on_event=on_event)


def _start(number: int, share: Collection[int], job: tuple[Build, Any, pathlib.Path, Collection[str]]) -> _Worker:
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(number, sender, *job), name=f'worker-{number}')
    resource_tracker.ensure_running()  # `start` would run it on the CPUs of the first worker
    with _inherited(share):
        process.start()
    sender.close()  # the worker has the only one, so that its death ends the messages
    return _Worker(number, process, receiver)


@contextmanager
def _inherited(share: Collection[int]) -> Iterator[None]:
    """A process started inside runs on these CPUs and blocks what a terminal sends to the workers, too."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
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
    workers: Sequence[_Worker], workdir: pathlib.Path, names: Collection[str], signals: Sequence[int], bar: tqdm.tqdm
) -> None:
    """Prints events until all workers have ended."""
    running = {worker.messages: worker for worker in workers}
    while running or signals:
        ready = connection.wait(list(running), timeout=POLL_SECONDS) if running else []
        if signals:
            name = signal.Signals(signals[0]).name
            with suppress(OSError):  # the signal may have ended the terminal or pipe as well
                again = '; Ctrl-C again: at once, without saving' if signals[0] == signal.SIGINT else ''
                tqdm.tqdm.write(f'stopped by {name}: the workers save; the same command resumes{again}')
            raise SystemExit(128 + signals[0])
        done = sum(stages.is_done(workdir / name) for name in names)  # by any process
        bar.update(done - bar.n)
        for worker in [worker for messages, worker in running.items() if messages in ready]:
            try:
                message = worker.messages.recv()
                worker.began = True
            except (EOFError, OSError):  # it ended; OSError: in the middle of a message
                _check_exit(worker, workdir)
                del running[worker.messages]
                continue
            if isinstance(message, _Failure):
                raise message.error() from _RemoteError(message.trace)
            _show(worker, message, [other.process.pid for other in workers], f'{done} of {len(names)} stages done')


def _log_file(workdir: pathlib.Path, number: int) -> pathlib.Path:
    return workdir / LOGS_FOLDER / f'worker-{number}.log'


def _open_log(workdir: pathlib.Path, number: int) -> TextIO:
    return _open(_log_file(workdir, number))


def _open(file: pathlib.Path) -> TextIO:
    return open(file, 'a', 1, encoding='utf-8', errors='backslashreplace')


def _check_exit(worker: _Worker, workdir: pathlib.Path) -> None:
    worker.process.join()
    code = worker.process.exitcode or 0
    if code:
        how = f'was killed by {signal.Signals(-code).name}' if code < 0 else f'exited with code {code}'
        when = f'while it ran {worker.stage}' if worker.stage else 'outside of a stage'
        if not worker.began and code > 0:  # it imports the program that was started, which may be a script
            when += (
                ", before its first; a script that runs an experiment needs `if __name__ == '__main__':` around that"
            )
        log = _log_file(workdir, worker.number)
        raise WorkerError(f'worker {worker.number} {how} {when}; see {log}. The same command resumes')


def _show(worker: _Worker, event: Event, pids: Collection[int | None], progress: str) -> None:
    line = ''
    if event.kind == 'started':
        worker.stage = event.stage
        line = f'== {event.stage} (worker {worker.number})'
    elif event.kind == 'finished':
        worker.stage = None
        line = f'== {event.stage}: finished in {event.seconds:.0f} s (worker {worker.number}; {progress})'
    elif event.kind == 'waiting' and not any(event.holder.startswith(f'process {pid} on') for pid in pids):
        line = f'== {event.stage}: waiting for {event.holder} (worker {worker.number})'
    if line:
        tqdm.tqdm.write(line)  # above the bar
        sys.stdout.flush()


def _bar(total: int, done: int) -> tqdm.tqdm:
    """A bar of stages done; only on a terminal, since elsewhere lines say it."""
    return tqdm.tqdm(
        total=total, initial=done, desc='stages', unit='stage', dynamic_ncols=True, disable=not sys.stderr.isatty()
    )


@contextmanager
def _recorded_signals(workers: Sequence[_Worker]) -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGHUP while workers run; what is ignored (`nohup`) stays ignored.

    A second SIGINT kills the workers.
    """
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            for worker in workers:
                worker.process.kill()
            raise KeyboardInterrupt
        received.append(number)

    previous = {
        number: signal.signal(number, record)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _work(
    number: int,
    messages: connection.Connection,
    build: Build,
    settings: Any,
    workdir: pathlib.Path,
    names: Collection[str],
) -> None:
    """The worker's process."""
    log = _open_log(workdir, number)
    for stream in (1, 2):  # the output of C++ libraries, too
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def on_event(event: Event) -> None:
        stages.print_event(event)
        messages.send(event)

    try:
        enable_compilation_cache()
        _run(build, settings, workdir, names, on_event)
    except Exception as error:
        traceback.print_exc()
        messages.send(_Failure(type(error), str(error), traceback.format_exc()))
        raise SystemExit(1) from error


def _exit_with_parent() -> None:
    """Sends SIGTERM to this worker when its parent is gone, so that a stage saves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
