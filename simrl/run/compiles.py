"""The programs that this process compiles: which they are, and what they take.

JAX announces each program once XLA has compiled it, or once it was read from the cache on the disk (`runtime`).
"""

import collections
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
from jax.sharding import Mesh

Programs = Mapping[str, int]  # a bound: how many a stage compiles at most, by the name of their function

DONE = '/jax/core/compile/backend_compile_duration'
READ = '/jax/compilation_cache/cache_retrieval_time_sec'  # of a program, before the event that it is done
FUNCTION = re.compile(r'jit[(_](.*?)\)?')  # how JAX names the program of a function


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that a stage may compile.

    Attributes:
        name: of its function, as JAX announces it.
        lower: traces and lowers it from shapes. Until it is called, nothing is traced. None: it is left to its first
            call, as it has one size, or is called before others can be lowered.
        mesh: set while it is lowered and compiled; None: the caller's.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered] | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program.

    Attributes:
        name: of its function.
        seconds: that it took, tracing and lowering left out.
        read: whether it was read from the disk.
    """

    name: str
    seconds: float
    read: bool


@contextlib.contextmanager
def compilations() -> Iterator[Sequence[Compiled]]:
    """The programs that this process compiles meanwhile, in any of its threads, in the order in which they are done."""
    done: list[Compiled] = []
    reading = threading.local()  # a thread compiles one program at a time

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == READ:
            reading.read = True
        elif event == DONE:
            name = str(kwargs.get('fun_name', 'a function'))
            found = FUNCTION.fullmatch(name)
            done.append(Compiled(found[1] if found else name, duration_secs, getattr(reading, 'read', False)))
            reading.read = False

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield done
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


class Announcer:
    """Prints what a stage compiles: in its first step a number, after which each program is unexpected and named.

    Each process of a run compiles for itself, and prints it.

    Args:
        name: of the stage, printed first.
        programs: of `compilations`.
    """

    def __init__(self, name: str, programs: Sequence[Compiled]) -> None:
        self._name, self._programs, self._said, self._first = name, programs, 0, True

    def announce(self, step: str) -> None:
        """Prints what was compiled since the last call, where there is any; `step` is called so."""
        new, self._said = self._programs[self._said :], len(self._programs)
        if new:
            names = '' if self._first else f': {by_name(new)}'
            print(f'{self._name}: {step}: {summary(new)}{names}', flush=True)
        self._first = False


def summary(programs: Sequence[Compiled]) -> str:
    """The numbers of programs that were compiled and read, and the seconds of both."""
    read = sum(program.read for program in programs)
    return (
        f'{len(programs) - read} programs compiled in {sum(x.seconds for x in programs if not x.read):.1f} s, '
        f'{read} read from the disk in {sum(x.seconds for x in programs if x.read):.1f} s'
    )


def by_name(programs: Sequence[Compiled]) -> str:
    """The functions of some programs, with the number and the seconds of each."""
    seconds = collections.defaultdict[str, list[float]](list)
    for program in programs:
        seconds[program.name].append(program.seconds)
    return ', '.join(
        f'{name}{f" x {len(each)}" if len(each) > 1 else ""} ({sum(each):.2f} s)' for name, each in seconds.items()
    )


def program_of(function: Any, arguments: Callable[[], tuple[Any, ...]], **static: Any) -> Program:
    """The program of a jitted function."""
    return Program(function.__name__, lambda: function.lower(*arguments(), **static))


def counted(programs: Iterable[Program]) -> Programs:
    """The number of programs by the name of their function. None of them is traced."""
    return collections.Counter(program.name for program in programs)


def compared(bound: Programs, programs: Sequence[Compiled]) -> str:
    """Says how many programs there were of those that a bound is of, and of which there were more than it says."""
    number = collections.Counter(program.name for program in programs if program.name in bound)
    more = ', '.join(f'{name} {each}' for name, each in number.items() if each > bound[name])
    return (
        f'{number.total()} of at most {sum(bound.values())} programs that differ in their sizes'
        f'{f"; more than stated: {more}" if more else ""}'
    )


def stated(programs: Programs) -> str:
    """The bound as a stage prints it before its first step."""
    each = ', '.join(f'{name} {number}' for name, number in programs.items())
    return f'at most {sum(programs.values())} programs that differ in their sizes: {each}'


def abstract(tree: Any) -> Any:
    """Arrays as their shapes, dtypes and shards, by which a call of a program finds it compiled."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        sharding = x.sharding if x.committed else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)

    return jax.tree.map(one, tree)


def results(traced: jax.stages.Traced, shardings: Any) -> Any:
    """The results of a traced program as `abstract` has them; `shardings` is a tree like these."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type),
        traced.out_info,
        shardings,
    )


def lowered_with_results(traced: jax.stages.Traced) -> tuple[jax.stages.Lowered, Any]:
    """Compiles a traced program, whose results are arguments of others: it, lowered, and its abstract results."""
    lowered = traced.lower()
    return lowered, results(traced, lowered.compile().output_shardings)


def compile_ahead(name: str, programs: Iterable[Program], threads: int) -> None:
    """Compiles programs side by side, each as soon as it is lowered, waits for all of them, and prints what it took.

    A call of the same jitted function with arguments of these shapes, dtypes and shards, and with the same mesh set,
    then compiles nothing. Functions are traced and lowered in this thread; XLA compiles without Python's lock.

    Args:
        name: of the stage, printed first.

    Raises:
        Exception: of the first program that fails; those that have not begun then are left.
    """

    def compile_one(lowered: jax.stages.Lowered, mesh: Mesh) -> None:
        with jax.set_mesh(mesh):  # each thread has a mesh of its own, which is part of what a program is found by
            lowered.compile()

    started, programs = time.monotonic(), [program for program in programs if program.lower is not None]
    print(f'{name}: compiling {len(programs)} programs before the first step, in {threads} threads', flush=True)
    with compilations() as done, ThreadPoolExecutor(threads, thread_name_prefix='compile') as pool:
        jobs: list[Future[None]] = []
        try:
            for program in programs:
                assert program.lower is not None
                mesh = program.mesh or jax.sharding.get_mesh()
                with jax.set_mesh(mesh):
                    jobs.append(pool.submit(compile_one, program.lower(), mesh))
                for job in filter(Future.done, jobs):
                    job.result()
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # a signal, too, must not wait for hundreds of programs
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    passed = time.monotonic() - started
    print(f'{name}: before the first step, in {passed:.1f} s: {summary(done)}', flush=True)
