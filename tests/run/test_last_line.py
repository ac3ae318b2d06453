"""A process that is aborted ends its stderr with the line that it left; one that ends otherwise does not."""

import subprocess
import sys

import pytest

SCRIPT = """
import os
from simrl.run.last_line import last_line
with last_line() as last:
    for name in (1, 2):
        print(f'error: process {name}: lost', file=last, flush=True)
    print('dump', flush=True)
    END
"""


@pytest.mark.parametrize(
    ('end', 'code', 'left'), [('os.abort()', -6, 'error: process 2: lost'), ('os._exit(3)', 3, ''), ('pass', 0, '')]
)
def test_the_line_of_an_abort_is_the_last(end: str, code: int, left: str) -> None:
    ended = subprocess.run(
        [sys.executable, '-c', SCRIPT.replace('END', end)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert ended.stdout == 'dump\n'
    assert ended.stderr.rpartition('\n')[0].rpartition('\n')[2] == left
    assert ended.stderr.startswith('Fatal Python error: Aborted') == (left != '')
