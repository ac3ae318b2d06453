"""The last line of a process that its runtime aborts, which runs no more Python: a shell beside it prints that line.

JAX aborts a process once another one is lost, and ends its messages with a dump of stack frames. The dump that Python's
`faulthandler` makes on the same signal goes to the shell and tells it of the abort.
"""

import contextlib
import faulthandler
import subprocess
from collections.abc import Iterator
from typing import IO

# Prints the lines that it reads, and of those with an error the last one in the end, if there was an abort. A signal to
# all processes of a terminal or job leaves it.
SCRIPT = """
trap '' INT TERM HUP
while IFS= read -r line; do
  case $line in
    error:*) said=$line;;
    *) echo "$line" >&2;;
  esac
  case $line in 'Fatal Python error: Aborted'*) aborted=1;; esac
done
if [ -n "$aborted" ] && [ -n "$said" ]; then echo "$said" >&2; fi
"""


@contextlib.contextmanager
def last_line() -> Iterator[IO[str]]:
    """Yields a file whose last line, which begins with 'error:', ends stderr if this process is aborted."""
    enabled = faulthandler.is_enabled()  # by absl
    with subprocess.Popen(
        ['/bin/sh', '-c', SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as shell:
        assert shell.stdin is not None
        faulthandler.enable(shell.stdin)
        try:
            yield shell.stdin
        finally:
            faulthandler.disable()
            if enabled:
                faulthandler.enable()
