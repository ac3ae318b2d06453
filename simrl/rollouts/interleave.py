"""Generators in, their results out: while one waits, another is advanced."""

import collections
from collections.abc import Generator, Iterable, Iterator
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
