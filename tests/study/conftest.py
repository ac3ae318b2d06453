"""Databases for the tests of the study: SQLite files, and one PostgreSQL server where its programs are installed."""

import pathlib
from collections.abc import Iterator

import pytest

from tests.study.postgres import PostgresServer, postgres_server


@pytest.fixture(scope='session')
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=['sqlite', 'postgres'])
def store_url(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """A database that is empty or, of SQLite, not there yet."""
    if request.param == 'sqlite':
        return f'sqlite:///{tmp_path}/study.sqlite'
    url: str = request.getfixturevalue('postgres').database()
    return url
