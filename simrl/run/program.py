"""This process as a program at a terminal or pipe: the encoding of its output, the end of its terminal, Ctrl-C."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO


def run_program(main: Callable[[], object], *, advice: str = '') -> None:
    """Runs a program's main function.

    1. Streams that are closed lead nowhere. Characters that the encoding of the terminal or log lacks are replaced,
       which would else end the process.
    2. Once the terminal, or the reader of a pipe, is gone, a print is as SIGHUP: a training saves and stops. Where
       nothing handles SIGHUP, it is the error of the print.
    3. Ctrl-C ends the process with one line and exit code 130.

    Args:
        advice: ends the line of Ctrl-C.
    """
    open_missing_streams()
    tolerate_encoding()
    sys.stdout, sys.stderr = _until_gone(sys.stdout), _until_gone(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        print(f'stopped by SIGINT{advice}', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def open_missing_streams() -> None:
    """Opens the null device for streams that the process was started without, as by `<&- >&- 2>&-`.

    The next files to be opened would else have their numbers, and libraries would write messages into them.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            stream = open(number, 'w' if number else 'r', encoding='utf-8', closefd=False)  # noqa: SIM115 (it stays)
            setattr(sys, name, stream)


def tolerate_encoding() -> None:
    """Replaces characters that the encoding of the terminal or log lacks, which would else end the process."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's stream takes all characters
            stream.reconfigure(errors='replace')


class _Output(io.FileIO):
    """The terminal, pipe or file of a stream, which stays open; see `run_program`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), 'wb', closefd=False)
        self._stream = stream

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
                raise
            signal.raise_signal(signal.SIGHUP)
            return memoryview(data).nbytes


def _until_gone(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def run_child(command: Sequence[str]) -> None:
    """Runs another program, which reports its own errors; one that fails ends this process with its exit code.

    At Ctrl-C it may save before it ends; a second Ctrl-C kills it.
    """
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            raise
    if code:
        sys.exit(code if code > 0 else 128 - code)
