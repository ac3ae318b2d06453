"""Processes with many devices, many processes, and what a compiled program sends between devices."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

# Each device's programs run on threads of XLA's pools, which have as many threads as there are cores or devices, and a
# collective holds a thread until all devices have come. The pools are made larger (NPROC) so that threads are left to
# those that are waited for, no program is begun while one is under way, and a late device is waited for longer.
EIGHT_DEVICES = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '8',
    'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
    'NPROC': '32',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_collective_call_warn_stuck_timeout_seconds=60 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=500',
}
ROOT = pathlib.Path(__file__).parent.parent


def run(module: str, *arguments: str) -> str:
    """What a module of the tests prints that runs, and ends well, in a process with eight devices of its own."""
    done = subprocess.run(
        [sys.executable, '-W', 'error::DeprecationWarning:simrl', '-m', module, *arguments],
        env=os.environ | EIGHT_DEVICES,
        cwd=ROOT,  # where `-m` finds the tests
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended: exit code, stdout, stderr, and when, by `time.monotonic`."""

    code: int
    output: str
    errors: str
    at: float


def run_processes(module: str, number: int, **variables: str) -> list[str]:
    """Runs a module of the tests in `number` processes that JAX joins over loopback, one device each.

    Returns:
        The output of each process; all of them ended well.
    """
    address = free_address()
    ended = end(start_processes([[module, address, str(number), str(index)] for index in range(number)], **variables))
    assert not any(process.code for process in ended), '\n'.join(process.errors[-2000:] for process in ended)
    return [process.output for process in ended]


def free_address() -> str:
    """An address of this machine for the first of several processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{free.getsockname()[1]}'


def slurm(number: int) -> list[dict[str, str]]:
    """The variables that SLURM sets for each of `number` tasks of a job on this machine."""
    ports = range(65536 - 2**12, 65536)  # one of these, by the number of the job
    for job in itertools.count(random.randrange(2**12)):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(('127.0.0.1', ports[job % 2**12]))
            break
    of_job = {'SLURM_JOB_ID': str(job), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': str(number)}
    return [of_job | {'SLURM_PROCID': str(index), 'SLURM_LOCALID': str(index)} for index in range(number)]


def start_processes(
    arguments: Sequence[Sequence[str]],
    devices: int = 1,
    own: Sequence[Mapping[str, str]] | None = None,
    **variables: str,
) -> list[subprocess.Popen]:
    """Starts a process for each module with its arguments; each has `devices` devices.

    Args:
        own: the variables of each process.
        variables: of all of them.
    """
    return [
        subprocess.Popen(
            [sys.executable, '-W', 'error::DeprecationWarning:simrl', '-m', *of_process],
            env=os.environ
            | EIGHT_DEVICES
            | {'JAX_NUM_CPU_DEVICES': str(devices)}
            | variables
            | (own[number] if own else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, of_process in enumerate(arguments)
    ]


def end(processes: Sequence[subprocess.Popen]) -> list[Ended]:
    """Waits for processes, at most ten minutes; none is left."""

    def wait(process: subprocess.Popen) -> Ended:
        output, errors = process.communicate(timeout=600)
        return Ended(process.returncode, output, errors, time.monotonic())

    try:
        with ThreadPoolExecutor(len(processes)) as threads:
            return list(threads.map(wait, processes))
    finally:
        for process in processes:
            process.kill()


def join() -> None:
    """Joins this process, started by `run_processes`, with the others. Call it before anything computes."""
    address, number, index = sys.argv[1:]
    jax.distributed.initialize(address, int(number), int(index))


def meet() -> None:
    """Waits for the other processes. Gloo, which joins them at their first exchange, gives up after 30 seconds."""
    from jax._src import distributed  # no public barrier is without Gloo

    distributed.global_state.client.wait_at_barrier('meet', timeout_in_ms=500_000)


def collectives(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of every array that a compiled program, as text, sends between devices."""
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    lines = re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', program)
    return [
        (kind, tuple(int(size) for size in shape.split(',') if size))
        for results, kind in lines
        for shape in re.findall(r'\w+\[([\d,]*)\]', results)
    ]
