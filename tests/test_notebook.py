"""Notebooks open anywhere and hold no outputs; cells may run again, in the same kernel, and with another size."""

import json
import os
import pathlib
import re
import sys
from typing import Any

import pytest

from simrl.experiments import experiment

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def cells_of(path: pathlib.Path, kind: str) -> list[str]:
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(cell['source']) for cell in cells if cell['cell_type'] == kind]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_badge_opens_it_and_its_first_cell_installs_the_package(path: pathlib.Path) -> None:
    badge = (
        r'\[!\[Open in Colab\]\(\S+\)\]\(https://colab\.research\.google\.com/github/(\S+)/blob/main/notebooks/(\S+)\)'
    )
    (found,) = re.findall(badge, cells_of(path, 'markdown')[0])
    repository, file = found
    assert file == path.name
    first = cells_of(path, 'code')[0]
    assert f'git clone --quiet https://github.com/{repository}\n' in first
    assert '%pip install --quiet ./simrl\n' in first
    assert first == cells_of(NOTEBOOKS[0], 'code')[0]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: pathlib.Path) -> None:
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert [cell['id'] for cell in cells] == [f'cell-{i}' for i in range(len(cells))]
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert all((cell['outputs'], cell['execution_count']) == ([], None) for cell in code)


@pytest.fixture
def shell(monkeypatch, tmp_path: pathlib.Path) -> Any:
    """IPython without a run, in a folder of its own."""
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # a shell replaces it
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    monkeypatch.setenv('SIMRL_NOTEBOOK_RUN', '')
    monkeypatch.delenv('SIMRL_NOTEBOOK_RUN')
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip('IPython.core.interactiveshell').InteractiveShell()


@pytest.mark.parametrize('name', ['quickstart', 'build_a_simulator'])
def test_cells_run_again_and_each_size_has_a_run_of_its_own(
    monkeypatch, tmp_path: pathlib.Path, shell: Any, name: str
) -> None:
    """Of the one that sets the size, after the one that installs, to that of the run."""
    _, *code = cells_of(ROOT / 'notebooks' / f'{name}.ipynb', 'code')
    ran: list[tuple[str, tuple[str, ...]]] = []

    def run(config: Any, workdir: pathlib.Path) -> None:
        ran.append((workdir.as_posix(), tuple(config.compute.xla_flags)))

    monkeypatch.setattr(experiment, 'run', run)
    for variable in ('PYTHONPATH', 'XLA_FLAGS'):
        monkeypatch.setenv(variable, '')
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')  # what is written lies here
    full = code[0].replace("SIZE = 'smoke'", "SIZE = ''")
    assert full != code[0]
    run_cells = code[1 : next(i for i, cell in enumerate(code) if 'experiment.run(' in cell) + 1]
    for cell in (code[0], *run_cells, *run_cells, full, *run_cells):
        shell.run_cell(cell).raise_error()
    flags = ran[-1][1]
    assert flags
    assert ran == [('runs/notebook-smoke', ()), ('runs/notebook-smoke', ()), ('runs/notebook-full', flags)]
    assert os.environ['XLA_FLAGS'] == ' '.join(flags)


def test_conversations_of_a_file_are_inspected_without_a_run(
    monkeypatch, tmp_path: pathlib.Path, shell: Any, capsys
) -> None:
    """The third user repeats itself, the fourth the assistant; one message is cut, one row has a reward."""
    talks = [['hi', 'which?', 'red'], ['hello', 'which?', 'blue'], ['hi', 'which?', 'hi'], ['ahoy', 'ahoy?', 'ahoy?']]
    rows = [
        {
            'id': f'talk {i}',
            'messages': [{'role': ('user', 'assistant')[k % 2], 'content': x} for k, x in enumerate(talk)],
            'end': ('natural', 'cut')[i % 2],
        }
        for i, talk in enumerate(talks)
    ]
    rows[1]['messages'][1]['truncated'] = True
    rows[3] |= {'reward': -0.25, 'parts': {'effort': 0.25}}
    (tmp_path / 'talks.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    monkeypatch.setenv('SIMRL_NOTEBOOK_RUN', str(tmp_path / 'talks.jsonl'))
    pyplot = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setattr(pyplot, 'show', pyplot.close)
    for cell in cells_of(ROOT / 'notebooks' / 'inspect_conversations.ipynb', 'code'):
        shell.run_cell(cell).raise_error()
    assert shell.user_ns['ends'] == {'file': {'signal': 2, 'turns': 2}}
    printed = capsys.readouterr().out
    assert re.search(r' file +3 of 4 +25\.0% +25\.0%', printed)
    assert 'file: reward -0.25, effort 0.25; without 3 of 4' in printed
    assert "== the lowest rewards of all arms: 1 of 4 {'file': 1}\nfile, talk 3, reward -0.25" in printed
    assert "== a cut message: 1 of 4 {'file': 1}\nfile, talk 1, reward nan" in printed


def test_conversations_with_tied_rewards_are_counted_in_all_arms(shell: Any, capsys) -> None:
    """Twelve of the lowest reward, in two arms; the three of a list in the arms' order are in the first alone."""
    (cell,) = [x for x in cells_of(ROOT / 'notebooks' / 'inspect_conversations.ipynb', 'code') if 'FILTERS' in x]
    arms = {'first': [0.0] * 8 + [1.0], 'second': [0.0] * 4 + [0.5], 'third': [None, 2.0]}
    names: dict[str, Any] = {
        'kept': {arm: [{'reward': x, 'messages': []} for x in found] for arm, found in arms.items()},
        'number': lambda value: float('nan') if value is None else value,
        'said': lambda row: [],
        'end_of': lambda row: 'turns',
        'side_by_side': lambda found: None,
    }
    shell.user_ns.update(names)
    shell.run_cell('import collections\nimport numpy as np\n' + cell).raise_error()
    printed = capsys.readouterr().out
    assert "== the lowest rewards of all arms: 12 of 16 {'first': 8, 'second': 4}" in printed
    assert "== no reward: 1 of 16 {'third': 1}" in printed
