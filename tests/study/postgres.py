"""A PostgreSQL server of its own for tests: Debian's programs, a temporary folder, an unprivileged user, no port."""

import contextlib
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

RUNUSER = shutil.which('runuser', path=f'{os.environ.get("PATH", "")}:/usr/sbin:/sbin')
PROGRAMS = sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin'), key=lambda path: float(path.parent.name))


class PostgresServer:
    """A running server, reached by a socket in its folder."""

    def __init__(self, programs: pathlib.Path, folder: pathlib.Path, user: str) -> None:
        self.folder, self._programs, self._user, self._made = folder, programs, user, 0

    def run(self, program: str, *words: str) -> None:
        """Runs one of PostgreSQL's programs, which refuse to be root."""
        as_user = [str(RUNUSER), '-u', self._user, '--'] if os.getuid() == 0 else []
        done = subprocess.run(
            [*as_user, str(self._programs / program), *words],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program != 'pg_ctl' else subprocess.DEVNULL,  # the server would keep the pipe
            stderr=subprocess.STDOUT if program != 'pg_ctl' else subprocess.DEVNULL,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (program, words, done.stdout)

    def start(self) -> None:
        # No fsync: tests kill processes, not machines.
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off -c max_connections=20"
        self.run('pg_ctl', '--pgdata=data', '--log=log', '--wait', f'--options={options}', 'start')

    def stop(self, mode: str = 'immediate') -> None:
        self.run('pg_ctl', '--pgdata=data', f'--mode={mode}', '--wait', 'stop')

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._made += 1
        self.run('createdb', f'--host={self.folder}', '--username=simrl', f'study{self._made}')
        return f'postgresql://simrl@/study{self._made}?host={self.folder}'


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Starts a server; skips the test where there is none to start."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL's programs (Debian: postgresql) are not installed")
    user = 'postgres' if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0 and (user not in [entry.pw_name for entry in pwd.getpwall()] or not RUNUSER):
        pytest.skip('root cannot run PostgreSQL, and there is no user postgres')
    with tempfile.TemporaryDirectory(prefix='simrl-postgres-', ignore_cleanup_errors=True) as name:
        if os.getuid() == 0:
            shutil.chown(name, user)
        server = PostgresServer(PROGRAMS[-1], pathlib.Path(name), user)
        server.run('initdb', '--pgdata=data', '--username=simrl', '--auth=trust', '--no-sync', '--encoding=UTF8')
        server.start()
        try:
            yield server
        finally:
            server.stop()
