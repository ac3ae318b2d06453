"""Shared pytest set-up: parity tests may be required not to skip."""

import gc
import os
from collections.abc import Iterator

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'parity: compares with an independent implementation (torch, transformers)')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With SIMRL_REQUIRE_PARITY=1 a parity test that skips is a failure: CI must not pass without the comparison."""
    report = yield
    required = os.environ.get('SIMRL_REQUIRE_PARITY') == '1' and item.get_closest_marker('parity')
    if required and report.skipped and not hasattr(report, 'wasxfail'):
        report.outcome = 'failed'
        report.longrepr = f'{item.nodeid}: a parity test was skipped: {report.longrepr}'
    return report


@pytest.fixture(autouse=True, scope='module')
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs after each module: the kernel's number of memory maps bounds how many a process has."""
    yield
    jax.clear_caches()
    gc.collect()
