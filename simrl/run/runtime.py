"""This process: XLA's flags, JAX's devices, the cache of compiled programs on the disk."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Sequence

import jax

import simrl
from simrl.run.config import URL, ConfigError, local_path

FLAG = re.compile(r'--xla_\w+(=[^\s\'"]*)?')
VARIABLE = 'XLA_FLAGS'
PLATFORM_VARIABLES = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME')


def check_xla_flags(flags: Sequence[str]) -> None:
    """Raises ValueError unless the flags have the form '--xla_name=value', each name once."""
    malformed = [flag for flag in flags if not FLAG.fullmatch(flag)]
    if malformed or isinstance(flags, str):
        found = repr(flags if isinstance(flags, str) else malformed[0])
        raise ValueError(f"xla_flags: expected flags such as '--xla_name=value', found {found}")
    names = [_name(flag) for flag in flags]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'xla_flags: expected each flag once, found {twice[0]} {names.count(twice[0])} times')


def use_xla_flags(flags: Sequence[str]) -> None:
    """Appends flags to the environment variable XLA_FLAGS; later processes inherit them.

    XLA reads the variable once, when JAX starts its first backend: call this before anything computes. Afterwards it
    has no effect, and JAX has no public way to find that out. If a name is repeated, its last value counts. XLA itself
    ends the process at an unknown flag ("Unknown flag in XLA_FLAGS").

    Args:
        flags: such as '--xla_gpu_enable_latency_hiding_scheduler=true'.

    Raises:
        ValueError: a flag is malformed or repeated, or the variable names a file.
    """
    check_xla_flags(flags)
    missing = missing_xla_flags(flags)
    present = os.environ.get(VARIABLE, '').strip()
    if missing and present and not present.startswith('-'):
        raise ValueError(f'xla_flags: expected flags in the environment variable {VARIABLE}, found the file {present}')
    if missing:
        os.environ[VARIABLE] = ' '.join([*present.split(), *missing])


def missing_xla_flags(flags: Sequence[str]) -> list[str]:
    """The flags that the environment variable XLA_FLAGS lacks, or overrides with a later value."""
    last = {_name(flag): flag for flag in os.environ.get(VARIABLE, '').split()}
    return [flag for flag in flags if last.get(_name(flag)) != flag]


def _name(flag: str) -> str:
    return flag.partition('=')[0]


def start_backend() -> None:
    """Starts JAX's default backend.

    Raises:
        ConfigError: an environment variable such as JAX_PLATFORMS asks for devices that JAX does not find.
    """
    asked = [f'{name}={os.environ[name]}' for name in PLATFORM_VARIABLES if os.environ.get(name)]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a plugin that is not installed: AssertionError
        if not asked:
            raise
        reason = str(error).partition(' (set JAX_PLATFORMS')[0]
        raise ConfigError(
            f'{" ".join(asked)}: expected devices that JAX finds here, found none{f" ({reason})" if reason else ""}. '
            f'Unset {asked[0].partition("=")[0]} to use what there is, or set it to cpu'
        ) from error


def versions() -> dict[str, str]:
    """Versions that all processes of a run have alike, and a hash of simrl's own code."""
    root, digest = pathlib.Path(simrl.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob('*.py')):
        digest.update(file.relative_to(root).as_posix().encode() + b'\0' + file.read_bytes())
    return {
        'version of jax': jax.__version__,
        'version of jaxlib': importlib.metadata.version('jaxlib'),
        'version of simrl': simrl.__version__,
        "simrl's code": digest.hexdigest()[:16],
    }


@contextlib.contextmanager
def numeric_defaults() -> Iterator[None]:
    """Sets what decides JAX's numbers to its defaults, whatever the environment says: a run is the same everywhere.

    JAX_ENABLE_X64, JAX_THREEFRY_PARTITIONABLE, JAX_DEFAULT_PRNG_IMPL, JAX_NUMPY_DTYPE_PROMOTION and
    JAX_RANDOM_SEED_OFFSET would otherwise change what people and models say, within one run unnoticed.
    JAX_NUMPY_RANK_PROMOTION and JAX_TRANSFER_GUARD, set for code of another style, would end it.
    """
    offset = jax.config.values['jax_random_seed_offset']
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.default_prng_impl('threefry2x32'),
        jax.numpy_dtype_promotion('standard'),
        jax.numpy_rank_promotion('allow'),
        jax.transfer_guard('allow'),
    ):
        jax.config.update('jax_random_seed_offset', 0)  # it has no public context manager
        try:
            yield
        finally:
            jax.config.update('jax_random_seed_offset', offset)


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/simrl`; may be deleted at any time. XDG_CACHE_HOME is ~/.cache where it is no absolute path.

    Raises:
        OSError: the user has no home folder, as in some containers.
    """
    chosen = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))
    try:
        return (chosen if chosen.is_absolute() else pathlib.Path.home() / '.cache') / 'simrl'
    except RuntimeError as error:
        raise OSError('no home folder for caches; set HOME or XDG_CACHE_HOME') from error


def enable_compilation_cache(folder: pathlib.Path | None = None) -> pathlib.Path | str | None:
    """Caches compiled programs on the disk, so that later processes need not compile. Call it before anything compiles.

    The environment variable JAX_COMPILATION_CACHE_DIR overrides `folder`. The default is `cache_folder()/xla/CPU`, with
    CPU the kind of processor: machines that share a home folder must not run each other's machine code.

    Returns:
        The folder, or the URL of the variable, which JAX opens itself; None, with a warning, if there is none or it is
        not writable: then every process compiles.
    """
    chosen = os.environ.get('JAX_COMPILATION_CACHE_DIR')
    cache: pathlib.Path | str | None = chosen
    if not (chosen and URL.match(chosen)):
        cache = _local_cache(chosen, folder)
    jax.config.update('jax_compilation_cache_dir', None if cache is None else str(cache))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)  # the default, 1 s, skips tiny models
    return cache


def _local_cache(chosen: str | None, folder: pathlib.Path | None) -> pathlib.Path | None:
    try:
        cache = local_path(chosen) if chosen else folder or cache_folder() / 'xla' / _processor()
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(f'{cache} is not writable')
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning('no compilation cache: %s', error)
        return None
    return cache


def _processor() -> str:
    """A short name of the kind of processor: its instruction set and a hash of its extensions."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
    return f'{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}'
