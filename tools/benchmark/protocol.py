"""Two processes that take turns: requests and replies, one JSON object a line, and what a process used in between.

1. A side loads, and says so (`Bench.ready`).
2. It waits for a request. The clock starts when one comes (`Bench.wait`) and stops when it is answered (`Bench.done`).
   So a training loop can be measured from inside a callback of its own, once a step.
3. Requests other than `run` are answered by functions that the case gives.

Nothing here needs simrl or torch: both sides import it.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.benchmark import job as job_lib
from tools.benchmark.job import Job

Message = dict[str, Any]

REPEATS = 5  # of a measurement of the machine, of which the best counts


class Finished(Exception):  # noqa: N818 (it is no error)
    """There is nothing more to measure."""


class SideError(RuntimeError):
    """A side of the comparison failed; the message has the end of its log."""


def resident_bytes(field: str = 'VmRSS', process: int | None = None) -> int:
    """A size of a process from /proc, bytes: 'VmRSS', or 'VmHWM' for its peak.

    Args:
        process: its id. None: this one, of which it is the peak of all time where there is no /proc.

    Raises:
        OSError: there is no other process of that id.
        KeyError: /proc has no such field.
    """
    try:
        lines = pathlib.Path(f'/proc/{process or "self"}/status').read_text(encoding='utf-8').splitlines()
    except OSError:
        if process is not None:
            raise
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = {name: value.split() for name, _, value in (line.partition(':') for line in lines)}
    return 1024 * int(sizes[field][0])


def reset_peak() -> str:
    """Lets the peak of the resident size start anew; says how peaks are measured: 'since reset' or 'of all time'."""
    try:
        pathlib.Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')
    except OSError:
        return 'of all time'
    return 'since reset'


def return_free_memory() -> None:
    """Gives back to the system what was freed, so that the resident size is what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL('libc.so.6').malloc_trim(0)


def rest(_: Message) -> Message:
    """Memory of the process between two runs."""
    return_free_memory()
    return {'rest_bytes': resident_bytes()}


def pin(threads: int) -> None:
    """Keeps this process on its first `threads` cores. Call it before anything makes a pool of threads."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def best_seconds(run: Callable[[], object]) -> float:
    """The least time of a call, the first one left out."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


class Bench:
    """The worker's end. `read` gives the next request, or None at the end; `write` sends a reply."""

    def __init__(self, read: Callable[[], Message | None], write: Callable[[Message], None]) -> None:
        self.handlers: dict[str, Callable[[Message], Message]] = {'rest': rest}  # other requests, by name
        self.device_peak: Callable[[], int | None] = lambda: None  # bytes of an accelerator, at the most so far
        self.running = False
        self._read, self._write = read, write
        self._started = 0.0
        self._peak_is = ''

    def ready(self, **facts: Any) -> None:
        """Tells that everything is loaded, and what that takes."""
        return_free_memory()
        self._write({'loaded_bytes': resident_bytes(), **facts})

    def wait(self) -> Message:
        """The next `run` request; the clock is on.

        Raises:
            Finished: there is none.
        """
        while True:
            request = self._read()
            if request is None or request['op'] == 'quit':
                raise Finished
            if request['op'] == 'run':
                break
            self._write(self.handlers[request['op']](request))
        self._peak_is = reset_peak()
        self.running = True
        self._started = time.perf_counter()
        return request

    def done(self, **facts: Any) -> None:
        """Stops the clock and answers. Call it when the results are there, not when they are only under way."""
        seconds = time.perf_counter() - self._started
        self.running = False
        self._write(
            {
                'seconds': seconds,
                'peak_bytes': resident_bytes('VmHWM'),
                'peak_is': self._peak_is,
                'device_peak_bytes': self.device_peak(),
                **facts,
            }
        )


def serve(case: Callable[[Bench], None]) -> None:
    """Runs a case with requests from standard input. What libraries print goes to standard error, not into replies."""
    replies = os.fdopen(os.dup(1), 'w', buffering=1, encoding='utf-8')
    os.dup2(2, 1)

    def read() -> Message | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def write(message: Message) -> None:
        replies.write(json.dumps(message) + '\n')
        replies.flush()

    try:
        case(Bench(read, write))
    except Finished:
        pass
    except Exception as error:
        traceback.print_exc()
        write({'error': f'{type(error).__name__}: {error}'})
        sys.exit(1)


def main(cases: Mapping[str, Callable[[Job, Bench], None]]) -> None:
    """The command of a side, one of whose cases its job is."""
    parser = argparse.ArgumentParser(description='One side of tools.benchmark, which starts it.')
    parser.add_argument('job', type=pathlib.Path, help='a file that tools.benchmark wrote')
    job = job_lib.read(parser.parse_args().job)
    pin(job.threads)
    serve(functools.partial(cases[job.case], job))


class Side:
    """The other end: a process that was started and waits for requests. Use it as a context."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: pathlib.Path,
    ) -> None:
        """Starts the process.

        Args:
            log: where its standard error goes.
        """
        self.name, self._log = name, log
        with log.open('ab') as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                encoding='utf-8',
                env=dict(environment),
            )
        self.loaded: Message = {}

    def __enter__(self) -> 'Side':
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        try:
            self._send({'op': 'quit'})
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def load(self) -> Message:
        """Waits until everything is loaded."""
        self.loaded = self._receive()
        return self.loaded

    def request(self, op: str, **fields: Any) -> Message:
        """Asks, and waits for the answer.

        Raises:
            SideError: the process failed.
        """
        with contextlib.suppress(OSError, ValueError):  # it has ended; what it said last tells why
            self._send({'op': op, **fields})
        return self._receive()

    def _send(self, message: Message) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + '\n')
        self._process.stdin.flush()

    def _receive(self) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            why = f'it ended with exit code {code}'
            raise SideError(f'{self.name}: expected a reply, but {why}; the end of {self._log}:\n{self._tail()}')
        reply: Message = json.loads(line)
        if 'error' in reply:
            raise SideError(f'{self.name}: {reply["error"]}; the end of {self._log}:\n{self._tail()}')
        return reply

    def _tail(self) -> str:
        return '\n'.join(self._log.read_text(encoding='utf-8', errors='replace').splitlines()[-12:])
