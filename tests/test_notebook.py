"""Cells of the notebooks may run again, in the same kernel, and with another size."""

import json
import os
import pathlib
import sys
from typing import Any

import pytest

from simrl.experiments import experiment

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('name', ['quickstart', 'build_a_simulator'])
def test_cells_run_again_and_each_size_has_a_run_of_its_own(monkeypatch, tmp_path: pathlib.Path, name: str) -> None:
    """Of the first one, which sets the size, to that of the run."""
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # a shell replaces it
    shell = pytest.importorskip('IPython.core.interactiveshell').InteractiveShell()
    notebook = json.loads((ROOT / 'notebooks' / f'{name}.ipynb').read_text(encoding='utf-8'))
    code = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    ran: list[tuple[str, tuple[str, ...]]] = []

    def run(config: Any, workdir: pathlib.Path) -> None:
        ran.append((workdir.as_posix(), tuple(config.compute.xla_flags)))

    monkeypatch.setattr(experiment, 'run', run)
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    for variable in ('PYTHONPATH', 'XLA_FLAGS', 'SIMRL_NOTEBOOK_RUN'):
        monkeypatch.setenv(variable, '')
    monkeypatch.delenv('SIMRL_NOTEBOOK_RUN')
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')  # what is written lies here
    monkeypatch.chdir(tmp_path)
    full = code[0].replace("SIZE = 'smoke'", "SIZE = ''")
    assert full != code[0]
    run_cells = code[1 : next(i for i, cell in enumerate(code) if 'experiment.run(' in cell) + 1]
    for cell in (code[0], *run_cells, *run_cells, full, *run_cells):
        shell.run_cell(cell).raise_error()
    flags = ran[-1][1]
    assert flags
    assert ran == [('runs/notebook-smoke', ()), ('runs/notebook-smoke', ()), ('runs/notebook-full', flags)]
    assert os.environ['XLA_FLAGS'] == ' '.join(flags)
