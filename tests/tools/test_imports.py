"""Every tool of users starts where only simrl is installed, without its test extra."""

import pathlib
import subprocess
import sys

from tests.test_requirements import declared

ROOT = pathlib.Path(__file__).parents[2]
DEVELOPERS = {'soak'}
NEEDED_BY_OTHERS = {'pillow', 'h11', 'markupsafe'}  # by matplotlib; by clients of the hub and of endpoints; by Jinja


def test_tools_need_no_package_of_the_tests():
    names = {path.stem for path in (ROOT / 'tools').glob('*.py')} - DEVELOPERS
    names |= {f'{path.parent.name}.__main__' for path in (ROOT / 'tools').glob('*/__main__.py')}
    assert {'export', 'benchmark.__main__'} <= names
    alone = declared('options.extras_require', 'test') - declared('options', 'install_requires')
    absent = sorted({name.replace('-', '_') for name in alone} - NEEDED_BY_OTHERS | {'torch', 'xdist'})
    lines = [
        'import sys',
        f'sys.modules |= dict.fromkeys({absent})',  # each import of them fails
        *(f'import tools.{name}' for name in sorted(names)),
    ]
    done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
