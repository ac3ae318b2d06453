"""The virtual environment that the peers run in, made once and kept."""

import pathlib
import subprocess
import sys

from simrl.run.runtime import cache_folder

REQUIREMENTS = pathlib.Path(__file__).parent / 'peers' / 'requirements.txt'
MADE_OF = 'made-of.txt'  # in the environment, once it is whole: what it was made of
SHOWN_LINES = 8  # of a command that failed


class PeerError(SystemExit):
    """There is no environment for the peers."""


def default_folder() -> pathlib.Path:
    return cache_folder() / 'benchmark-peers'


def make(folder: pathlib.Path, requirements: pathlib.Path = REQUIREMENTS) -> pathlib.Path:
    """Makes the environment, unless it is there and made of the same requirements.

    Returns:
        Its Python.

    Raises:
        PeerError: it could not be made, and why.
    """
    wanted = sys.version + '\n' + requirements.read_text(encoding='utf-8')
    python = folder / 'bin' / 'python'
    made_of = folder / MADE_OF
    if made_of.exists() and made_of.read_text(encoding='utf-8') == wanted and python.exists():
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / 'pyvenv.cfg').exists():
        raise PeerError(
            f'--peer-env: expected {folder} to be a virtual environment or nothing, found other files in it'
        )
    print(f"making the peers' environment in {folder}", flush=True)
    _run(folder, [sys.executable, '-m', 'venv', '--clear', str(folder)])
    _run(folder, [str(python), '-m', 'pip', 'install', '--disable-pip-version-check', '-r', str(requirements)])
    made_of.write_text(wanted, encoding='utf-8')
    return python


def _run(folder: pathlib.Path, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding='utf-8', errors='replace'
        )
        failed, said = done.returncode != 0, done.stdout
    except OSError as error:
        failed, said = True, str(error)
    if failed:
        lines = '\n'.join(said.strip().splitlines()[-SHOWN_LINES:])
        raise PeerError(
            f"the peers' environment {folder} cannot be made: `{' '.join(command)}` failed:\n{lines}\n"
            f'--peers=none measures simrl alone'
        )
