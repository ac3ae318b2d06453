"""What is imported is declared: what simrl needs to run in install_requires, what only tests need in an extra."""

import ast
import configparser
import pathlib
import re
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Packages that are imported by another name than they are installed by.
INSTALLED_AS = {
    'PIL': 'pillow',
    'absl': 'absl-py',
    'axe_playwright_python': 'axe-playwright-python',
    'markdown_it': 'markdown-it-py',
    'ml_collections': 'ml-collections',
    'orbax': 'orbax-checkpoint',
    'prometheus_client': 'prometheus-client',
    'xdist': 'pytest-xdist',
    'yaml': 'pyyaml',
}
# What they need is installed apart from simrl, into an environment that the tool makes.
PEERS = ROOT / 'tools' / 'benchmark' / 'peers'
OWN = {'simrl', 'configs', 'tests', 'tools', *(path.stem for path in (ROOT / 'tools').glob('*.py'))}


def declared(section: str, field: str) -> set[str]:
    """The names of the packages that setup.cfg lists in a field."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    return {match[0] for line in config[section][field].splitlines() if (match := re.match(r'[\w-]+', line))}


def imported(*folders: str) -> set[str]:
    """The packages that the files of some folders import, but for peers; the standard library and our own left out."""
    return packages_of(
        path for folder in folders for path in (ROOT / folder).rglob('*.py') if not path.is_relative_to(PEERS)
    )


def packages_of(paths: Iterable[pathlib.Path]) -> set[str]:
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split('.')[0])
    return {INSTALLED_AS.get(name, name) for name in names - set(sys.stdlib_module_names) - OWN}


@pytest.mark.parametrize(
    ('folders', 'extras'),
    [(('simrl', 'configs', 'tools'), ('serve', 'study', 'submit')), (('tests',), ('test', 'parity'))],
    ids=['to run', 'to test'],
)
def test_what_is_imported_is_declared(folders, extras):
    listed = declared('options', 'install_requires')
    for extra in extras:
        listed |= declared('options.extras_require', extra)
    found = imported(*folders)
    assert 'jax' in found
    assert found <= listed, f'setup.cfg lacks {sorted(found - listed)}'


def test_what_peers_import_is_listed_beside_them():
    lines = (PEERS / 'requirements.txt').read_text().splitlines()
    listed = {match[0] for line in lines if (match := re.match(r'[\w-]+', line))}
    found = packages_of(PEERS.rglob('*.py'))
    assert {'torch', 'trl'} <= found
    assert found - {'numpy'} <= listed  # torch brings numpy
