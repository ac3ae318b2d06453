"""Imports point one way, and what the project does not do is nowhere in its sources."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'simrl'

# Each room imports only rooms before it (and itself).
ROOMS = (
    'run',
    'conversations',
    'models',
    'rollouts',
    'remote',
    'simulators',
    'rewards',
    'training',
    'rl',
    'worlds',
    'evaluation',
    'experiments',
    'serving',
    'study',
    'main',
)
# The core and the simulators know nothing of each other: a rollout takes agents, whoever they are.
FORBIDDEN = {('rewards', 'simulators'), ('training', 'simulators'), ('rl', 'simulators')}


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def imports(path: pathlib.Path) -> set[str]:
    """The dotted names that a source file imports, wherever in the file."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: expected absolute imports'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def arrow_is_allowed(source: str, target: str) -> bool:
    if source == target:
        return True
    if source not in ROOMS or target not in ROOMS or (source, target) in FORBIDDEN:
        return False
    return ROOMS.index(target) < ROOMS.index(source)


SOURCES = sorted(PACKAGE.rglob('*.py'))


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in SOURCES} - {'__init__'} <= set(ROOMS)
    assert {path.name for path in PACKAGE.glob('*.py')} == {'__init__.py', 'main.py'}
    assert len(SOURCES) > 10


def test_every_room_says_what_it_is() -> None:
    for path in PACKAGE.rglob('__init__.py'):
        assert ast.get_docstring(parsed(path)), f'{path}: expected a docstring'


def test_docstrings_begin_with_a_verb_or_a_name() -> None:
    questions = ('What', 'Which', 'Who', 'Whose', 'Where', 'Whether', 'When', 'How', 'Why')
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f'{path.relative_to(ROOT)}: {text.splitlines()[0]}'
        for path in (*SOURCES, *sorted((ROOT / 'tools').rglob('*.py')))
        for node in ast.walk(parsed(path))
        if isinstance(node, nodes) and (text := ast.get_docstring(node)) and text.split()[0] in questions
    ]
    assert not found


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards(path: pathlib.Path) -> None:
    targets = {name.split('.')[1] for name in imports(path) if name.startswith('simrl.')}
    wrong = sorted(target for target in targets if not arrow_is_allowed(room(path), target))
    assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}'


def test_the_rule_tells_wrong_arrows() -> None:
    assert arrow_is_allowed('training', 'rewards')
    assert arrow_is_allowed('experiments', 'run')
    for source, target in (
        ('rewards', 'training'),
        ('rl', 'simulators'),
        ('run', 'models'),
        ('rollouts', 'simulators'),
    ):
        assert not arrow_is_allowed(source, target)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_at_run_time(path: pathlib.Path) -> None:
    assert not {name for name in imports(path) if name.split('.')[0] in ('torch', 'tensorflow')}


def test_only_servers_need_their_packages() -> None:
    packages = {'fastapi', 'h11', 'prometheus_client', 'pydantic', 'starlette', 'uvicorn'}
    users = {room(path) for path in SOURCES if {name.split('.')[0] for name in imports(path)} & packages}
    assert users == {'serving', 'study'}


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


def opened_without_encoding(tree: ast.AST) -> list[str]:
    """Text files opened in the encoding of the user's terminal, which is not UTF-8 everywhere."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == 'encoding' for keyword in node.keywords):
            continue
        match node.func:
            case ast.Name('open') | ast.Attribute(ast.Name('os'), 'fdopen'):
                mode = node.args[1:2]
            case ast.Attribute(value, 'open') if not (
                isinstance(value, ast.Name) and value.id in ('os', 'gzip', 'archive')
            ):
                mode = node.args[:1]
            case ast.Attribute(_, 'read_text' | 'write_text'):
                mode = []
            case _:
                continue
        if not (mode and isinstance(mode[0], ast.Constant) and 'b' in str(mode[0].value)):
            found.append(f'line {node.lineno}: {ast.unparse(node.func)}')
    return found


@pytest.mark.parametrize('path', [*SOURCES, *sorted((ROOT / 'tools').rglob('*.py'))], ids=lambda path: str(path))
def test_text_files_are_utf_8_whatever_the_terminal_is(path: pathlib.Path) -> None:
    assert not opened_without_encoding(parsed(path))


@pytest.mark.parametrize(
    'source', ['open(x)', "open(x, 'w')", 'open(x, mode)', 'p.open()', 'p.read_text()', 'os.fdopen(1)']
)
def test_the_rule_finds_text_files_without_an_encoding(source: str) -> None:
    assert opened_without_encoding(ast.parse(source))
    assert not opened_without_encoding(
        ast.parse("open(x, 'rb'); p.open('ab'); open(x, 'w', encoding='utf-8'); os.open(x, 0)")
    )


@pytest.mark.parametrize('path', ALL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_data(path: pathlib.Path) -> None:
    assert not faults(parsed(path))


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
