"""Compiled programs are cached, XLA gets the flags of a config, JAX its devices, terminals their characters."""

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from simrl import main
from simrl.experiments import checks, experiment
from simrl.experiments.settings import Compute, MeshSettings
from simrl.models.transformer import Execution
from simrl.run import runtime
from simrl.run.config import ConfigError, from_config_dict, identity, to_dict
from simrl.run.directory import open_workdir
from simrl.run.runtime import missing_xla_flags, use_xla_flags
from simrl.run.stages import Stage, run_stages
from simrl.training.loop import LoopSettings

ROOT = pathlib.Path(__file__).parents[2]
HARMLESS = '--xla_cpu_enable_fast_math=false'
COMPUTE = Compute(Execution(), Execution(), LoopSettings(), MeshSettings(1, 1))

COMPILE = """
import pathlib, sys
import jax
from simrl.run.runtime import enable_compilation_cache
folder = enable_compilation_cache(pathlib.Path(sys.argv[1]) if sys.argv[1] else None)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(jax.jit(lambda x: (x * 2 + 1).sum())(jax.numpy.arange(8.0)))
print(folder, hits.count('/jax/compilation_cache/cache_hits'))
"""


def compile_with(folder: str, **environment: str) -> tuple[str, int, str]:
    done = subprocess.run(
        [sys.executable, '-c', COMPILE, folder],
        capture_output=True,
        text=True,
        check=True,
        env={key: x for key, x in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'} | environment,
    )
    result, last = done.stdout.split('\n')[:2]
    assert float(result) == 64.0
    place, hits = last.split()
    return place, int(hits), done.stderr


def test_compiled_programs_are_cached(tmp_path: pathlib.Path) -> None:
    place, hits, _ = compile_with('', XDG_CACHE_HOME=str(tmp_path))
    assert pathlib.Path(place).is_relative_to(tmp_path / 'simrl' / 'xla')
    assert hits == 0
    assert compile_with('', XDG_CACHE_HOME=str(tmp_path))[:2] == (place, compiled := compile_count(pathlib.Path(place)))
    assert compiled >= 1
    # A kill may leave half of an entry: a warning and a compilation, no error.
    for entry in pathlib.Path(place).glob('*-cache'):
        os.truncate(entry, entry.stat().st_size // 2)
    assert compile_with('', XDG_CACHE_HOME=str(tmp_path))[1] == 0
    # The environment overrides the argument.
    other = tmp_path / 'other'
    assert compile_with(str(tmp_path / 'argument'), JAX_COMPILATION_CACHE_DIR=str(other))[0] == str(other)
    assert compile_count(other) >= 1


def test_a_user_without_a_home_folder_compiles_anew(monkeypatch, caplog) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    monkeypatch.setattr(pathlib.Path, 'home', no_home)
    assert runtime.enable_compilation_cache() is None
    assert 'no compilation cache: no home folder for caches; set HOME or XDG_CACHE_HOME' in caplog.text


@pytest.fixture
def cache_setting():
    """Restores the folder of JAX's cache."""
    before = jax.config.values['jax_compilation_cache_dir']
    yield
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.mark.usefixtures('cache_setting')
def test_the_place_of_the_cache_is_a_folder_of_the_user_or_a_url_for_jax(tmp_path, monkeypatch, caplog) -> None:
    def chosen(place: str) -> str | None:
        monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', place)
        found = runtime.enable_compilation_cache()
        assert jax.config.values['jax_compilation_cache_dir'] == (None if found is None else str(found))
        return None if found is None else str(found)

    home, here = tmp_path / 'home', tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('XDG_CACHE_HOME', '~/.cache')  # no absolute path: the default counts
    assert chosen('gs://bucket/jax') == 'gs://bucket/jax'
    assert chosen('~/jax') == str(home / 'jax')
    assert chosen('$SCRATCH/jax') is None
    assert 'no compilation cache: expected a path, found' in caplog.text
    assert runtime.cache_folder() == home / '.cache' / 'simrl'
    assert list(here.iterdir()) == []


def test_devices_that_are_not_there_are_named_with_their_variable(monkeypatch) -> None:
    def fail(error: Exception) -> None:
        def devices() -> None:
            raise error

        monkeypatch.setattr(jax, 'devices', devices)

    unknown = RuntimeError("Unable to initialize backend 'foo': not known. (set JAX_PLATFORMS='' to choose another)")
    monkeypatch.setenv('JAX_PLATFORMS', 'foo')
    fail(unknown)
    expected = r'^JAX_PLATFORMS=foo: expected devices .* found none \(Unable .*: not known\.\)\. Unset JAX_PLATFORMS '
    with pytest.raises(ConfigError, match=expected):
        runtime.start_backend()
    fail(AssertionError())  # what JAX raises where the plugin for cuda is not installed
    with pytest.raises(ConfigError, match=r'^JAX_PLATFORMS=foo: expected devices that JAX finds here, found none\. '):
        runtime.start_backend()
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.delenv('JAX_PLATFORM_NAME', raising=False)
    fail(unknown)
    with pytest.raises(RuntimeError, match='foo'):  # nobody asked: it is JAX's own
        runtime.start_backend()


def test_the_command_can_be_imported_anew() -> None:
    """As a notebook's %autoreload does."""
    importlib.reload(main)


def compile_count(folder: pathlib.Path) -> int:
    return len(list(folder.glob('*-cache')))


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """XLA_FLAGS with these flags, restored after the test; JAX starts before, since XLA knows no such flags."""
    jax.devices()
    monkeypatch.setenv('XLA_FLAGS', f'--xla_a=1 {HARMLESS} --xla_a=2 --xla_b')
    return monkeypatch


def test_the_last_value_of_a_flag_counts(flags: pytest.MonkeyPatch) -> None:
    assert missing_xla_flags([HARMLESS, '--xla_a=2', '--xla_b']) == []
    assert missing_xla_flags(['--xla_b=']) == ['--xla_b=']  # a list that is empty
    asked = ['--xla_a=1', '--xla_b=true', '--xla_c', HARMLESS]
    assert missing_xla_flags(asked) == asked[:3]
    flags.delenv('XLA_FLAGS')
    assert missing_xla_flags(asked) == asked


def test_flags_that_are_set_are_not_appended_again(flags: pytest.MonkeyPatch) -> None:
    before = os.environ['XLA_FLAGS']
    use_xla_flags([])
    use_xla_flags([HARMLESS, '--xla_a=2'])
    assert os.environ['XLA_FLAGS'] == before
    use_xla_flags([HARMLESS, '--xla_c=3'])
    assert os.environ['XLA_FLAGS'] == f'{before} --xla_c=3'


MALFORMED = {
    'nothing': (('',), "''"),
    'quoted': (('--xla_a="1"',), '\'--xla_a="1"\''),
    'no dashes': (('xla_a=1',), "'xla_a=1'"),
    'not of XLA': (('--jax_a=1',), "'--jax_a=1'"),
    'two in one': (('--xla_a=1 --xla_b=2',), "'--xla_a=1 --xla_b=2'"),
    'a text': ('--xla_a=1', "'--xla_a=1'"),
    'twice': (('--xla_a=1', '--xla_a=2'), '--xla_a 2 times'),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed_flags_are_named(case: str) -> None:
    flags, found = MALFORMED[case]
    with pytest.raises(ValueError, match=f'^xla_flags: expected .* found {found}$'):
        use_xla_flags(flags)
    if not isinstance(flags, str):
        with pytest.raises(ConfigError, match=f'^config.compute.xla_flags: expected .* found {found}$'):
            from_config_dict(Compute, to_dict(COMPUTE) | {'xla_flags': flags}, 'config.compute')


def test_a_job_refuses_flags_that_are_not_set(flags: pytest.MonkeyPatch) -> None:
    checks.check_runtime(COMPUTE)
    checks.check_runtime(dataclasses.replace(COMPUTE, xla_flags=(HARMLESS,)))
    with pytest.raises(ConfigError, match=r'^config\.compute\.xla_flags: .* found --xla_c=3 missing\. `simrl\.main`'):
        checks.check_runtime(dataclasses.replace(COMPUTE, xla_flags=(HARMLESS, '--xla_c=3')))


def test_flags_are_in_no_stages_settings_and_may_change(flags: pytest.MonkeyPatch) -> None:
    settings = experiment.settings_of(quickstart.get_config('smoke'))
    changed = dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, xla_flags=(HARMLESS,)))
    plans = [experiment.build_stages(each, pathlib.Path('run')) for each in (settings, changed)]
    assert [identity(stage.settings) for stage in plans[0]] == [identity(stage.settings) for stage in plans[1]]
    flags.delenv('XLA_FLAGS')
    with pytest.raises(ConfigError, match='missing'):
        plans[1][0].check()


def run(program: str, *arguments: str, flags: str | None) -> subprocess.CompletedProcess[str]:
    tests_own = ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')
    environment = {key: x for key, x in os.environ.items() if key not in tests_own} | {'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(
        [sys.executable, '-c', program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment | ({} if flags is None else {'XLA_FLAGS': flags}),
    )


SET = """
import os, subprocess, sys
import jax
from jax.extend.backend import get_compile_options
from simrl.run.runtime import use_xla_flags
use_xla_flags(sys.argv[1:])
options = get_compile_options(1, 1).executable_build_options.debug_options
print(options.xla_cpu_enable_fast_math, options.xla_backend_optimization_level, len(jax.devices()))
print(subprocess.run([sys.executable, '-c', 'import os; print(os.environ["XLA_FLAGS"])'], stdout=-1).stdout.decode())
"""


def test_flags_override_those_of_the_user() -> None:
    """In XLA of this process, and in the environment of later processes."""
    user = '--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=2'
    own = ['--xla_cpu_enable_fast_math=true', '--xla_backend_optimization_level=2']
    done = run(SET, *own, flags=user)
    assert done.stdout.splitlines()[:2] == ['True 2 2', f'{user} {" ".join(own)}'], done.stderr
    done = run(SET, HARMLESS, flags=None)
    assert done.stdout.splitlines()[:2] == ['False 3 1', HARMLESS], done.stderr


def test_a_file_of_flags_and_an_unknown_flag_end_the_process() -> None:
    done = run(SET, HARMLESS, flags='/some/file')
    assert 'ValueError: xla_flags: expected flags in the environment variable XLA_FLAGS, found the file' in done.stderr
    done = run(SET, '--xla_no_such_flag=1', flags=None)
    assert done.returncode
    assert done.stdout == ''
    assert 'Unknown flag in XLA_FLAGS: --xla_no_such_flag=1' in done.stderr


MAIN = """
import os, sys
import jax
from absl import app
from simrl import main
from simrl.experiments import experiment

def run(config, workdir, **options):
    print(os.environ.get('XLA_FLAGS'), config.compute.xla_flags, *options['only'])

experiment.run = run
main.define_flags()
app.run(main.main)
"""


def test_main_sets_the_flags_of_a_config(tmp_path: pathlib.Path) -> None:
    command = [f'--workdir={tmp_path}', '--config=configs/quickstart.py:smoke']
    done = run(MAIN, *command, f"--config.compute.xla_flags=('{HARMLESS}',)", flags=None)
    assert done.stdout.splitlines() == [f"{HARMLESS} ('{HARMLESS}',)"], done.stderr
    done = run(MAIN, *command, '--only=a,b', '--only=c', flags=None)  # a flag of names may be given several times
    assert done.stdout.splitlines() == ['None () a b c'], done.stderr
    done = run(MAIN, *command, "--config.compute.xla_flags=('xla_a',)", flags=None)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: config.compute.xla_flags: expected flags such as')


def test_what_decides_numbers_is_the_same_whatever_the_environment_says(tmp_path: pathlib.Path) -> None:
    """Of a stage's work, and of a default process."""

    def drawn() -> tuple[list[str], list[list[float]]]:
        key = jax.random.key(3)
        found = (jax.random.bits(key, (2,)), jax.random.normal(key, (2,)), jnp.arange(2) / 3)
        return [str(x.dtype) for x in found], [x.tolist() for x in found]

    expected = drawn()
    seen = []
    with jax.enable_x64(True), jax.threefry_partitionable(False), jax.default_prng_impl('rbg'):
        assert drawn() != expected
        jax.config.update('jax_random_seed_offset', 1)
        stage = Stage('stage', {}, {}, lambda folder: seen.append(drawn()))
        open_workdir(tmp_path, {}, [stage])
        run_stages(tmp_path, [stage])
        assert jax.config.values['jax_random_seed_offset'] == 1
        jax.config.update('jax_random_seed_offset', 0)
    assert seen == [expected]
    with jax.numpy_rank_promotion('raise'), jax.transfer_guard('disallow'), runtime.numeric_defaults():
        assert (jnp.ones((2, 3)) + np.ones(3)).shape == (2, 3)
