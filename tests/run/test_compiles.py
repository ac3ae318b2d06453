"""Programs compiled ahead: one that fails, or a signal, leaves those that have not begun."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from simrl.models import sharding
from simrl.run.compiles import Program, compile_ahead

NUMBER = 200


@pytest.mark.parametrize('ends', [RuntimeError('out of memory'), SystemExit(143)])
def test_programs_that_have_not_begun_are_left(ends: BaseException) -> None:
    """One thread has all of them before it, when the first program fails or a signal arrives."""
    begun: list[int] = []
    waiting = threading.Event()

    def compiled(number: int) -> None:
        begun.append(number)
        waiting.wait(10)
        time.sleep(0.005)
        if number == 0 and isinstance(ends, RuntimeError):
            raise ends

    def program(number: int) -> Program:
        lowered: Any = SimpleNamespace(compile=lambda: compiled(number))
        return Program('add_message', lambda: lowered)

    def programs() -> Iterator[Program]:
        yield from map(program, range(NUMBER))
        waiting.set()
        if isinstance(ends, SystemExit):
            raise ends

    with jax.set_mesh(sharding.make_mesh(1, 1, jax.devices()[:1])), pytest.raises(type(ends)):
        compile_ahead('rl', programs(), threads=1)
    assert len(begun) < NUMBER // 2
