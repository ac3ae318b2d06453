"""Generators in, their results out: while one waits for a call in a thread, another is advanced."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

_Result = TypeVar('_Result')


def interleave(generators: Iterable[Generator[None, None, _Result]], at_once: int) -> Iterator[_Result]:
    """Yields the result of each generator, in their order. Up to `at_once` of them are in progress, advanced in turns.

    What is done in which order depends on the generators' own yields and never on time: it is the same in every
    process.
    """
    queue = collections.deque(enumerate(generators))  # the first `at_once` are in progress
    results: dict[int, _Result] = {}
    first = 0  # whose result is yielded next
    while queue:
        number, generator = queue.popleft()
        try:
            next(generator)
        except StopIteration as stop:
            results[number] = stop.value
        else:
            queue.insert(at_once - 1, (number, generator))
        while first in results:
            yield results.pop(first)
            first += 1


class Threads:
    """Calls functions in threads that keep no process from its end, as those of an executor do."""

    def __init__(self, calls_at_once: int) -> None:
        self._slots, self._closed = threading.Semaphore(calls_at_once), threading.Event()

    def start(self, function: Callable[[], _Result]) -> Callable[[], _Result]:
        """Returns a function that waits for the result, and raises what `function` raised."""
        future = concurrent.futures.Future[_Result]()

        def call() -> None:
            with self._slots:
                if self._closed.is_set():
                    return
                try:
                    future.set_result(function())
                except BaseException as error:  # raised where the result is waited for
                    future.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        return future.result

    def close(self) -> None:
        """Begins no further call. One in progress ends by itself, or with the process."""
        self._closed.set()
