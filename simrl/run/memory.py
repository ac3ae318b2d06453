"""Memory that there is: of this machine, and of JAX's devices."""

import pathlib

import jax

from simrl.run.workers import cgroups

MEMINFO = pathlib.Path('/proc/meminfo')


def available_bytes() -> int | None:
    """The memory that this machine can still give, bytes; that of a control group where it is less; None if unknown."""
    return _least('MemAvailable:')


def total_bytes() -> int | None:
    """All memory of this machine, bytes, with what it can swap; that of a control group where it is less; or None."""
    return _least('MemTotal:', 'SwapTotal:')


def _least(*names: str) -> int | None:
    """The sum of lines of /proc/meminfo, or the limit of a control group where it is less."""
    limits = []
    if MEMINFO.exists():
        lines = [line.split() for line in MEMINFO.read_text(encoding='utf-8').splitlines()]
        if found := [1024 * int(line[1]) for line in lines if line[0] in names]:
            limits.append(sum(found))
    for folder in cgroups('memory'):
        for file in (folder / 'memory.max', folder / 'memory.limit_in_bytes'):  # version 2, version 1
            if file.exists() and (text := file.read_text(encoding='utf-8').strip()).isdigit():
                limits.append(int(text))
    # Without a limit the file of version 1 has the largest whole number of pages.
    return min((limit for limit in limits if limit < 2**62), default=None)


def device_limit(used: int) -> int | None:
    """Bytes of each device that a program can have at most; None: unknown.

    An accelerator's is what JAX took of it, and of several the least. CPU devices of a process share its machine.

    Args:
        used: devices of this process that the program has arrays on.
    """
    devices = jax.local_devices()
    if devices[0].platform == 'cpu':
        total = total_bytes()
        return None if total is None else total // used
    limits = [(device.memory_stats() or {}).get('bytes_limit') for device in devices]
    known = [limit for limit in limits if limit]
    return min(known) if len(known) == len(limits) else None
