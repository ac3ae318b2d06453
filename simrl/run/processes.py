"""Several processes of one run: who leads, what all of them know, and how they end together.

JAX joins the processes (`join`). All of them run the same programs, on the devices of all, in the same order. Process 0
leads: it alone locks and writes files, and says which stage is next (`stages.run_stages`). What one process knows, the
others learn by `broadcast` and `gather`, which all of them call in the same order. Both use the key-value store of
JAX's coordination service: they need no device and wait for no computation.

A process that fails ends the others, which print its reason (`ending_together`). One that is killed can give none:
JAX's heartbeats miss it, or the others their connection to process 0, and JAX aborts the others. Their last line names
the lost one (`last_line`).

In a run of one process each function returns at once, and nothing is started.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the key-value store has no public interface

from simrl.run import config
from simrl.run.config import ConfigError
from simrl.run.last_line import last_line

T = TypeVar('T')

HEARTBEAT_SECONDS = 20  # without a heartbeat, after which JAX takes a process for lost
JOIN_SECONDS = 300  # until all processes must have been started
SILENT_SECONDS = 10.0  # after which a process that says nothing is named
GRACE_SECONDS = 5.0  # in which a process may come to its own end after another one failed
POLL_SECONDS = 0.5  # between two looks for the failure of another process
WAIT_SECONDS = 1.0  # of one request for a value, between which signals are handled
TEXT_CHARS = 1000  # of a reason
ROOT = 'simrl'
FAILED, ENDED, ALIVE, SIGNAL = (f'{ROOT}/{name}' for name in ('failed', 'ended/', 'alive/', 'signal'))
# In errors of which another process may be the cause: of JAX, and of what carries collectives in whichever error.
OF_OTHERS = re.compile('unavailable|deadline_exceeded|aborted|cancelled|gloo|nccl|connection|socket|barrier', re.I)
COLLECTIVES = re.compile(r'\bgloo\b|\bnccl', re.I)

_rounds = itertools.count()  # of exchanges, counted alike in all processes: no two have the same keys


def count() -> int:
    """The number of processes that are joined; does not start JAX's backend."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def leads() -> bool:
    """True in the process that locks, writes and decides: process 0, or the only one."""
    return index() == 0


def join(processes: int | None, process: int | None, coordinator: str | None) -> None:
    """Joins this process with the others of its run. Call it before anything computes.

    Args:
        processes: their number. None: all three are those of the cluster that JAX detects (SLURM, Open MPI, Cloud TPU,
            also on GKE; jobs of Kubernetes).
        process: the number of this one, from 0.
        coordinator: HOST:PORT of process 0, the port a free one.

    Raises:
        ConfigError: there is no such cluster, or JAX could not join the processes.
    """
    # JAX's service for SIGTERM counts steps over all trainings: a signal between two of them would be lost.
    jax.config.update('jax_enable_preemption_service', False)
    how = f'--processes={"auto" if processes is None else processes}'
    who = '' if processes is None else f' as process {process}, with process 0 at {coordinator}'
    # JAX ends a process that waits for too long, and says no more than that it did.
    print(f'{how}: joining the others{who}; waiting for at most {JOIN_SECONDS} s', flush=True)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if processes is None else 'deactivate',
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f'{how}: expected a cluster that JAX knows (SLURM, Open MPI, Cloud TPU, GKE), found none ({error}). '
            'Elsewhere give --processes=N --process=K --coordinator=HOST:PORT'
        ) from error
    except RuntimeError as error:
        raise ConfigError(f'{how}: could not join the other processes: {_shorten(str(error))}') from error


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, by process, in each of them; also a barrier. All call it, in the same order.

    Args:
        name: of what they are, the same in all.
        value: plain JSON.

    Raises:
        RuntimeError: another process came to another point of the program.
    """
    if count() == 1:
        return [value]
    key = f'{ROOT}/{next(_rounds)}'
    _client().key_value_set(f'{key}/{index()}', json.dumps([name, value]))
    return [_received(name, f'{key}/{process}', process) for process in range(count())]


def broadcast(name: str, value: T) -> T:
    """The value of process 0 in every process, where that of the others is ignored. Arguments and error of `gather`."""
    if count() == 1:
        return value
    key = f'{ROOT}/{next(_rounds)}'
    if leads():
        _client().key_value_set(key, json.dumps([name, value]))
        return value
    found: T = _received(name, key, 0)
    return found


def barrier(name: str) -> None:
    """Waits for all processes."""
    gather(name, None)


def check_alike(what: str, facts: Mapping[str, Any]) -> None:
    """Refuses processes of which one knows other facts than process 0.

    Args:
        what: the facts are of, in the error.
        facts: plain JSON by name.

    Raises:
        ConfigError: in every process, with the differences.
    """
    if count() == 1:
        return
    (_, first), *others = gather(what, [socket.gethostname(), facts])
    lines = [
        f'process {process} on {host}: {line}'
        for process, (host, found) in enumerate(others, start=1)
        for line in config.differences(first, found)
    ]
    if lines:
        more = f'; and {len(lines) - 5} more' if len(lines) > 5 else ''
        raise ConfigError(
            f'{what}: expected the same in all {count()} processes, found others than in process 0: '
            f'{"; ".join(lines[:5])}{more}'
        )


def agree_on_signal(received: int | None) -> int | None:
    """The signal for which all processes stop at this point, once one of them has received it; None: they go on.

    All call it at the same points, for instance after each step.

    Args:
        received: the number of a signal that this process received.
    """
    if count() == 1:
        return received
    if received is not None:
        _client().key_value_set(SIGNAL, str(received), allow_overwrite=True)
    found = _value(SIGNAL) if leads() else None
    return broadcast('a signal', None if found is None else int(found))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes of the run once one of them fails, each with the reason, and not before all have finished.

    SIGTERM and SIGHUP end the process, where nothing else handles them, and by that the others.
    """
    if count() == 1:
        yield
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_by_signal)
    hosts: list[str] = gather('the hosts', socket.gethostname())
    places = ', '.join(f'{process} on {host}' for process, host in enumerate(hosts))
    print(f'process {index()} of {count()}: {places}; messages of JAX call process 0 the leader', flush=True)
    with last_line() as last:
        watcher = _Watcher(hosts, last)
        watcher.start()
        try:
            yield
            barrier('the end of the run')
        except BaseException as error:
            _fail(error, watcher)
        watcher.over.set()
        watcher.join()
        jax.distributed.shutdown()


class _Watcher(threading.Thread):
    """Ends this process if another one fails and it does not come to its own end; says which others are silent.

    A silent process may be gone, or not come to run this thread. JAX's heartbeats know: they end the others.

    Attributes:
        over: this process has come to its own end.
        silent: the processes that have not been heard of for `SILENT_SECONDS`, as text.
    """

    def __init__(self, hosts: Sequence[str], last: IO[str]) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.silent: list[str] = []
        self._names, self._last = [f'process {process} on {host}' for process, host in enumerate(hosts)], last
        self._heard = dict[str, tuple[str, float]]()  # by key: what was heard last, and when
        self._expect_abort()

    def _expect_abort(self) -> None:
        """Says who is lost if JAX aborts this process next: who is silent; process 0 may be lost before it is."""
        supposed = 'another process' if leads() else self._names[0]
        said = _lost(self.silent) if self.silent else _lost([supposed], ', unless an error is above')
        with contextlib.suppress(BrokenPipeError):  # without the shell that says it there is nothing to be said
            print(said, file=self._last, flush=True)

    def run(self) -> None:
        turn = 0
        while not self.over.wait(POLL_SECONDS):
            try:
                if turn % 4 == 0:
                    self._listen(turn)
                found = _value(FAILED)
            except jax.errors.JaxRuntimeError:  # process 0 is gone, and JAX ends this one
                return
            turn += 1
            if found is None:
                continue
            notice = json.loads(found)
            if notice['process'] == index() or self.over.wait(GRACE_SECONDS):
                return
            print(f'process {index()}: stopped, because of {notice["text"]}', file=sys.stderr, flush=True)
            _exit(notice['code'])

    def _listen(self, turn: int) -> None:
        """Says that this process is there, and which others have not said so for a while."""
        _client().key_value_set(f'{ALIVE}{index()}', str(turn), allow_overwrite=True)
        now = time.monotonic()
        for key, said in _client().key_value_dir_get(ALIVE):
            if self._heard.get(key, ('', 0.0))[0] != said:
                self._heard[key] = (said, now)
        late = [int(key.rpartition('/')[2]) for key, (_, at) in self._heard.items() if now - at > SILENT_SECONDS]
        silent = [self._names[process] for process in sorted(late)]
        for name in silent:
            if name not in self.silent:
                print(f'{name}: not heard of for {SILENT_SECONDS:.0f} s', file=sys.stderr, flush=True)
        if silent != self.silent:
            self.silent = silent
            self._expect_abort()


def _client() -> Any:
    return distributed.global_state.client


def _received(name: str, key: str, process: int) -> Any:
    """Waits for a value of another process."""
    while True:
        try:
            theirs, value = json.loads(_client().blocking_key_value_get(key, int(1000 * WAIT_SECONDS)))
            break
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
    if theirs != name:
        raise RuntimeError(
            f'expected all processes at one point of the program, found process {index()} at {name!r} and process '
            f'{process} at {theirs!r}'
        )
    return value


def _value(key: str) -> str | None:
    """The value of a key; None: there is none yet."""
    try:
        found: str = _client().key_value_try_get(key)
        return found
    except jax.errors.JaxRuntimeError as error:
        if 'NOT_FOUND' in str(error):
            return None
        raise


def _fail(error: BaseException, watcher: _Watcher) -> NoReturn:
    """Ends this process with an error, and tells the others."""
    code, said = _said(error)
    reason = said or f'{type(error).__name__}: {error}'
    if _may_be_of_others(error):
        print(f'process {index()}: {_shorten(reason)}\nAnother one may be the cause.', file=sys.stderr, flush=True)
        # Meanwhile the notice of another process, or JAX's heartbeats, end this one.
        deadline = time.monotonic() + HEARTBEAT_SECONDS + 2 * GRACE_SECONDS
        while not watcher.silent and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if watcher.silent:
            said = reason = _lost(watcher.silent)
    watcher.over.set()
    if said:
        print(said, file=sys.stderr, flush=True)
    elif isinstance(error, SystemExit):
        reason = f'stopped by {signal.Signals(code - 128).name}' if code > 128 else f'exit code {code}'
    else:
        traceback.print_exception(error)
    text = _shorten(f'process {index()} on {socket.gethostname()}: {reason}')
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was the first
        _client().key_value_set(FAILED, json.dumps({'process': index(), 'code': code, 'text': text}))
    _exit(code)


def _lost(names: Sequence[str], unless: str = '') -> str:
    return f'error: {", ".join(names)}: lost{unless}. The same command resumes'


def _said(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and the line that stands for it; '' where its traceback does, or nothing."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, 'stopped by SIGINT; the same command resumes'
    if isinstance(error, SystemExit):
        return (error.code, '') if isinstance(error.code, int) else (1, str(error.code))
    return 1, ''


def _may_be_of_others(error: BaseException | None) -> bool:
    while error is not None:
        kinds = OF_OTHERS if isinstance(error, jax.errors.JaxRuntimeError) else COLLECTIVES
        if kinds.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit(code: int) -> NoReturn:
    """Ends this process at once, as JAX's own end would wait for others that hang; process 0, with the store, last."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f'{ENDED}{index()}', '')
        deadline = time.monotonic() + GRACE_SECONDS + 4 * POLL_SECONDS
        while leads() and len(_client().key_value_dir_get(ENDED)) < count() and time.monotonic() < deadline:
            time.sleep(0.1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_by_signal(number: int, _: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # the signal may have ended the terminal or pipe as well
        print(f'stopped by {signal.Signals(number).name}; the same command resumes', file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def _shorten(text: str) -> str:
    return ' '.join(text.split())[:TEXT_CHARS]
