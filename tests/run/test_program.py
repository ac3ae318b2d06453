"""A program at a terminal: characters that it lacks, its end, Ctrl-C, and programs that it runs."""

import io
import os
import pathlib
import pty
import signal
import sys
from collections.abc import Callable

import pytest

from simrl.run import program


def test_signs_that_a_terminal_lacks_are_replaced(monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'caf\xe9'), encoding='utf-8'))
    program.tolerate_encoding()
    print('win rate \u22120.5, \udce9', flush=True)  # a file's name may hold half surrogates
    assert terminal.buffer.getvalue() == b'win rate ?0.5, ?\n'
    assert sys.stdin.read() == 'caf\ufffd'


def test_streams_that_were_closed_are_the_null_device(monkeypatch) -> None:
    """Else the next file that is opened is the output of libraries."""
    saved = os.dup(0)
    try:
        os.close(0)
        monkeypatch.setattr(sys, 'stdin', None)
        program.open_missing_streams()
        assert os.path.samestat(os.fstat(0), os.stat(os.devnull))
        assert os.get_inheritable(0)
        assert sys.stdin.read() == ''
        standing = sys.stdout
        program.open_missing_streams()
        assert sys.stdout is standing
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    return writer, reader


def terminal() -> tuple[int, int]:
    master, slave = pty.openpty()
    return slave, master


@pytest.fixture(params=[pipe, terminal])
def begin(request, monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Runs a program whose output's reader is gone after its first line."""
    output, reader = request.param()

    def run(main: Callable[[], None]) -> None:
        monkeypatch.setattr(sys, 'stdout', os.fdopen(output, 'w'))  # not before: pytest replaces it
        monkeypatch.setattr(sys, 'stderr', sys.stderr)

        def until_gone() -> None:
            print('one', flush=True)
            assert os.read(reader, 9).split() == [b'one']
            os.close(reader)
            main()

        program.run_program(until_gone)

    return run


@pytest.mark.usefixtures('default_signals')
def test_a_print_is_as_sighup_once_nobody_reads_it(begin) -> None:
    received: list[int] = []

    def main() -> None:
        signal.signal(signal.SIGHUP, lambda number, _: received.append(number))
        for word in ('two', 'three'):
            print(word, flush=True)
            assert received == [signal.SIGHUP]  # once

    begin(main)


@pytest.mark.usefixtures('default_signals')
def test_a_print_that_nobody_reads_is_an_error_where_nothing_handles_sighup(begin) -> None:
    def main() -> None:
        with pytest.raises(OSError, match=r'Broken pipe|Input/output error'):
            print('two', flush=True)
        print('three', flush=True)  # at the end of the process Python writes what is left

    begin(main)


def test_nohup_goes_on_though_nobody_reads(begin) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        begin(lambda: print('two', flush=True))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_is_one_line(monkeypatch, capfd) -> None:
    for name in ('stdout', 'stderr'):  # the program replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        program.run_program(main, advice='; the same command resumes')
    assert ended.value.code == 130
    sys.stderr.flush()
    assert capfd.readouterr().err == 'stopped by SIGINT; the same command resumes\n'


def test_a_child_that_fails_ends_its_program() -> None:
    program.run_child(['true'])
    for command, code in (('exit 3', 3), ('kill -9 $$', 137)):
        with pytest.raises(SystemExit) as ended:
            program.run_child(['sh', '-c', command])
        assert ended.value.code == code


@pytest.mark.usefixtures('default_signals')
def test_a_child_saves_at_ctrl_c_and_is_killed_by_a_second_one(tmp_path: pathlib.Path) -> None:
    saves = 'trap "touch saved; exit" TERM; sleep .3; kill -INT $PPID; while :; do sleep .05; done'
    with pytest.raises(KeyboardInterrupt):
        program.run_child(['sh', '-c', f'cd {tmp_path}; {saves}'])
    assert (tmp_path / 'saved').exists()
    hangs = 'trap "kill -INT $PPID" TERM; sleep .3; kill -INT $PPID; while :; do sleep .05; done'
    with pytest.raises(KeyboardInterrupt):
        program.run_child(['sh', '-c', hangs])
