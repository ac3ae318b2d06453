"""Serves models for the program that started it, and ends with it.

The first line of stdin is a `ServeSettings` as JSON. The end of stdin is that of the program: the server drains and
ends, as by SIGTERM.
"""

import json
import os
import signal
import sys
import threading

from absl import logging

from simrl.models.checkpoint import CheckpointError
from simrl.run.config import from_config_dict
from simrl.run.program import run_program
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.run.stages import WorkdirError
from simrl.serving.settings import ServeSettings


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    try:
        settings = from_config_dict(ServeSettings, json.loads(sys.stdin.readline()), 'settings')
    except ValueError as error:
        sys.exit(f'error: {error}')
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        from simrl.serving.start import serve
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is not installed: pip install -e '.[serve]'")
    try:
        start_backend()
        enable_compilation_cache()
        with numeric_defaults():
            serve(settings)
    except (CheckpointError, WorkdirError, OSError, ValueError) as error:
        sys.exit(f'error: {error}')


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    run_program(main)
