"""How XLA compiles: where programs are kept, and with what flags of its own it is started."""

import hashlib
import logging
import os
import pathlib
import platform
import re
from collections.abc import Sequence

import jax
from jax._src import xla_bridge  # nothing public tells whether a backend was started without starting one

FLAG = re.compile(r'--xla_\w+(=[^\s\'"]*)?')
VARIABLE = 'XLA_FLAGS'


def check_xla_flags(flags: Sequence[str]) -> None:
    """Raises ValueError unless these are flags as XLA writes them, each name once: '--xla_name=value'."""
    malformed = [flag for flag in flags if not FLAG.fullmatch(flag)]
    if malformed or isinstance(flags, str):
        found = repr(flags if isinstance(flags, str) else malformed[0])
        raise ValueError(f"xla_flags: expected flags such as '--xla_name=value', found {found}")
    names = [_name(flag) for flag in flags]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'xla_flags: expected each flag once, found {twice[0]} {names.count(twice[0])} times')


def use_xla_flags(flags: Sequence[str]) -> None:
    """Adds flags to those in the environment variable XLA_FLAGS, from which processes started later inherit them.

    XLA reads the variable once, when the first backend starts: call it before anything computes. Of a name that is
    there already the last value counts, which is that of `flags`. XLA knows which flags there are: at one that is
    unknown it ends the whole process, with a message of its own ("Unknown flag in XLA_FLAGS").

    Args:
        flags: such as '--xla_gpu_enable_latency_hiding_scheduler=true'.

    Raises:
        ValueError: a flag is malformed or there twice, or the variable names a file, which nothing can be added to.
        RuntimeError: a backend has started with other flags.
    """
    check_xla_flags(flags)
    missing = missing_xla_flags(flags)
    if not missing:
        return
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            f'xla_flags: expected to set {" ".join(missing)} before a backend of JAX starts, found one that has started'
        )
    present = os.environ.get(VARIABLE, '').strip()
    if present and not present.startswith('-'):
        raise ValueError(f'xla_flags: expected flags in the environment variable {VARIABLE}, found the file {present}')
    os.environ[VARIABLE] = ' '.join([*present.split(), *missing])


def missing_xla_flags(flags: Sequence[str]) -> list[str]:
    """Those of `flags` that the environment variable XLA_FLAGS does not set, or sets to another value later on.

    What the variable says is in force, as long as it is changed by `use_xla_flags` alone.
    """
    in_force = {_name(flag): flag for flag in os.environ.get(VARIABLE, '').split()}
    return [flag for flag in flags if in_force.get(_name(flag)) != flag]


def _name(flag: str) -> str:
    return flag.partition('=')[0]


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/simrl` (XDG_CACHE_HOME defaults to ~/.cache): for what can be made again, and may be deleted."""
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    return home / 'simrl'


def enable_compilation_cache(folder: pathlib.Path | None = None) -> pathlib.Path | None:
    """Keeps compiled programs on the disk, so that the next process starts at once. Call it before anything compiles.

    The environment variable JAX_COMPILATION_CACHE_DIR goes before `folder`; without either it is
    `$XDG_CACHE_HOME/simrl/xla/CPU` (XDG_CACHE_HOME defaults to ~/.cache), where CPU stands for this machine's kind of
    processor: machines that share a home folder must not run each other's machine code. It may be deleted at any time.

    Returns:
        The folder, or None where it cannot be written to (a warning says so): it is a convenience.
    """
    chosen = os.environ.get('JAX_COMPILATION_CACHE_DIR')
    place = pathlib.Path(chosen) if chosen else folder or cache_folder() / 'xla' / _processor()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(f'{place} is not writable')
    except OSError as error:
        logging.getLogger(__name__).warning('no compilation cache: %s', error)
        return None
    jax.config.update('jax_compilation_cache_dir', str(place))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)  # the default, 1 s, skips tiny models
    return place


def _processor() -> str:
    """A short name of this kind of processor: its instruction set and extensions."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
    return f'{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}'
