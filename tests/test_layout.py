"""Imports point one way, and what the project does not do is nowhere in its sources."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'simrl'

# Each room imports only rooms before it (and itself).
ROOMS = (
    'config',
    'compilation',
    'conversations',
    'models',
    'sources',
    'rollouts',
    'simulators',
    'rewards',
    'training',
    'worlds',
    'evaluation',
    'serve',
    'study',
    'jobs',
    'arms',
    'checks',
    'concierge_scene',
    'known_answer_stages',
    'known_answer',
    'known_answer_results',
    'experiment',
    'main',
)
FORBIDDEN = {('rollouts', 'simulators'), ('rollouts', 'rewards'), ('training', 'simulators')}
# How stages are run stands beside the rooms: it knows configs alone, and only jobs know it.
STAGES = ('stage_files', 'stages', 'lanes')
JOBS = ('known_answer', 'known_answer_results', 'experiment', 'main')
ALLOWED = {
    *((later, earlier) for i, later in enumerate(STAGES) for earlier in ('config', *STAGES[:i])),
    *((job, part) for job in JOBS for part in STAGES),
}


def imports(path: pathlib.Path) -> set[str]:
    """The dotted names that a source file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: expected absolute imports'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def arrow_is_allowed(source: str, target: str) -> bool:
    if source == target or (source, target) in ALLOWED:
        return True
    if source not in ROOMS or target not in ROOMS or (source, target) in FORBIDDEN:
        return False
    return ROOMS.index(target) < ROOMS.index(source)


SOURCES = sorted(PACKAGE.rglob('*.py'))


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in SOURCES} - {'__init__', *STAGES} <= set(ROOMS)
    assert len(SOURCES) > 10


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards(path: pathlib.Path) -> None:
    targets = {name.split('.')[1] for name in imports(path) if name.startswith('simrl.')}
    wrong = sorted(target for target in targets if not arrow_is_allowed(room(path), target))
    assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}'


def test_the_rule_tells_wrong_arrows() -> None:
    assert arrow_is_allowed('training', 'rewards')
    assert arrow_is_allowed('experiment', 'stages')
    for source, target in (
        ('rewards', 'training'),
        ('training', 'simulators'),
        ('training', 'stages'),
        ('stages', 'models'),
    ):
        assert not arrow_is_allowed(source, target)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_at_run_time(path: pathlib.Path) -> None:
    assert not {name for name in imports(path) if name.split('.')[0] in ('torch', 'tensorflow')}


ALL_SOURCES = [
    path
    for folder in ('simrl', 'tools', 'configs', 'tests')
    if (ROOT / folder).exists()
    for path in sorted((ROOT / folder).rglob('*.py'))
]


def faults(tree: ast.AST) -> list[str]:
    """Uses of `eval`, `exec`, pickle and `trust_remote_code=True`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ('eval', 'exec'):
            found.append(f'line {node.lineno}: {node.func.id}')
        if isinstance(node, ast.keyword) and node.arg in ('trust_remote_code', 'allow_pickle'):
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else [f'line {node.value.lineno}: {node.arg}']
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or '']
        found += [f'line {node.lineno}: {name}' for name in names if name.split('.')[0] in ('pickle', 'dill', 'joblib')]
    return found


@pytest.mark.parametrize('path', ALL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_data(path: pathlib.Path) -> None:
    assert not faults(ast.parse(path.read_text(), str(path)))


@pytest.mark.parametrize(
    'source',
    [
        'eval(x)',
        'exec(x)',
        'import pickle',
        'from pickle import loads',
        'f(trust_remote_code=True)',
        'f(allow_pickle=x)',
    ],
)
def test_the_rule_tells_code_from_data(source: str) -> None:
    assert faults(ast.parse(source))
    assert not faults(ast.parse('f(trust_remote_code=False); model.eval(); import json'))
