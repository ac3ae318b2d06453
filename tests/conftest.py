"""Shared pytest set-up: programs are compiled quickly and once, and comparisons may be required not to skip.

Compilation is most of the tests' time. Programs are not optimized, which takes a fifth of the time, and the test
processes and the commands that tests start share them, in a folder of this run; JAX_COMPILATION_CACHE_DIR names
another, which a developer keeps between runs.
"""

import gc
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

from configs.quickstart import FAST_COMPILATION
from simrl.run.workers import cpus

if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # else a worker of pytest-xdist, whose parent made the folder
    _programs = tempfile.TemporaryDirectory(prefix='simrl-programs-', ignore_cleanup_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.05')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# JAX read its variables when it was imported; XLA reads its own when it starts.
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', float(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'])
)
jax.config.update('jax_disable_most_optimizations', os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1')
# From when on programs are dropped: memory maps, of at most 65,530 by default, and pages of resident memory (2.5 GB).
MAPS, PAGES = 20_000, 2_500_000_000 // os.sysconf('SC_PAGE_SIZE')
# Tracing makes many objects and few cycles, and what the libraries hold is searched for cycles again and again.
gc.set_threshold(100_000, 20, 20)
QUICK = ' '.join(FAST_COMPILATION)
if QUICK not in (_flags := os.environ.get('XLA_FLAGS', '')):
    os.environ['XLA_FLAGS'] = f'{QUICK} {_flags}'.strip()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'parity: compares with an independent implementation (torch, transformers)')
    config.addinivalue_line('markers', 'long: takes minutes; `python -m tools.soak tests` runs it')


class _ByPackage(LoadScopeScheduling):
    """Keeps a package in one process: what its modules trace and compile is then traced once."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition('::')[0].rpartition('/')[0]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return len(cpus())  # a CPU quota counts, as that of a container on a large machine


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByPackage(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With SIMRL_REQUIRE_PARITY=1 a parity test that skips is a failure: CI must not pass without the comparison."""
    report = yield
    required = os.environ.get('SIMRL_REQUIRE_PARITY') == '1' and item.get_closest_marker('parity')
    if required and report.skipped and not hasattr(report, 'wasxfail'):
        report.outcome = 'failed'
        report.longrepr = f'{item.nodeid}: a parity test was skipped: {report.longrepr}'
    return report


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Handles signals as in a terminal. Background jobs of a shell, tests among them, ignore SIGINT; `nohup` SIGHUP."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs after a module once there are many: the kernel bounds the memory maps of a process.

    Modules share programs, and loading one again takes time. Where there is no /proc they are dropped always.
    """
    yield
    maps, memory = pathlib.Path('/proc/self/maps'), pathlib.Path('/proc/self/statm')
    if not maps.exists() or maps.read_bytes().count(b'\n') > MAPS or int(memory.read_text().split()[1]) > PAGES:
        jax.clear_caches()
        gc.collect()
