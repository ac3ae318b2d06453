"""Progress as a bar on a terminal and as lines in a log."""

import io

import pytest

from simrl.run import progress
from simrl.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, 'time', clock)
    log = io.StringIO()
    with Progress('sft', 40, done=10, file=log) as shown:
        for _ in range(30):
            clock.now += 2.0
            shown.update(tokens=300, note='loss 1.5')
    lines = log.getvalue().splitlines()
    assert lines[0] == 'sft: step 18/40, 150 tokens/s, 00:44 left, loss 1.5'  # the first after 15 seconds
    assert lines[-1] == 'sft: step 40/40, 150 tokens/s, 00:00 left, loss 1.5'
    assert len(lines) == 4


def test_a_bar_on_a_terminal() -> None:
    terminal = Terminal()
    with Progress('sft', 4, done=1, file=terminal) as shown:
        shown.update(3, tokens=300, note='loss 1.5')
    text = terminal.getvalue()
    assert '| 4/4 [' in text
    assert 'tokens/s, loss 1.5' in text
