"""Every tool of users starts where only simrl is installed, without its test extra."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DEVELOPERS = {'soak'}


def test_tools_need_no_package_of_the_tests():
    names = {path.stem for path in (ROOT / 'tools').glob('*.py')} - DEVELOPERS
    names |= {f'{path.parent.name}.__main__' for path in (ROOT / 'tools').glob('*/__main__.py')}
    assert {'export', 'benchmark.__main__'} <= names
    lines = [
        'import sys',
        "sys.modules |= dict.fromkeys(('pytest', 'hypothesis', 'torch'))",  # each import of them fails
        *(f'import tools.{name}' for name in sorted(names)),
    ]
    done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
