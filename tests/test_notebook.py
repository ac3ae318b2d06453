"""Cells of the notebook may run again, in the same kernel, and with another size."""

import json
import os
import pathlib
import sys
from typing import Any

import pytest

from simrl.experiments import experiment

ROOT = pathlib.Path(__file__).parent.parent


def test_cells_run_again_and_each_size_has_a_run_of_its_own(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # a shell replaces it
    shell = pytest.importorskip('IPython.core.interactiveshell').InteractiveShell()
    notebook = json.loads((ROOT / 'notebooks' / 'quickstart.ipynb').read_text(encoding='utf-8'))
    code = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    ran: list[tuple[str, tuple[str, ...]]] = []

    def run(config: Any, workdir: pathlib.Path) -> None:
        ran.append((workdir.as_posix(), tuple(config.compute.xla_flags)))

    monkeypatch.setattr(experiment, 'run', run)
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    for name in ('PYTHONPATH', 'XLA_FLAGS', 'SIMRL_NOTEBOOK_RUN'):
        monkeypatch.setenv(name, '')
    monkeypatch.delenv('SIMRL_NOTEBOOK_RUN')
    monkeypatch.chdir(ROOT / 'notebooks')
    full = code[0].replace("SIZE = 'smoke'", "SIZE = ''")
    assert full != code[0]
    for cell in (code[0], code[1], code[1], full, code[1]):
        shell.run_cell(cell).raise_error()
    flags = ran[-1][1]
    assert flags
    assert ran == [('runs/notebook-smoke', ()), ('runs/notebook-smoke', ()), ('runs/notebook-full', flags)]
    assert os.environ['XLA_FLAGS'] == ' '.join(flags)
