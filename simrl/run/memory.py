"""Memory that there is: of this machine, and of JAX's devices."""

import pathlib

import jax

from simrl.run.workers import cgroups

MEMINFO = pathlib.Path('/proc/meminfo')
# Files of a control group with a limit, of memory alone or of memory and swap: of version 2, and two of version 1.
LIMITS = {'memory.max': True, 'memory.limit_in_bytes': True, 'memory.memsw.limit_in_bytes': False}


def available_bytes() -> int | None:
    """The memory that this machine can still give, bytes; that of a control group where it is less; None if unknown."""
    return _least('MemAvailable:', 0)


def total_bytes() -> int | None:
    """All memory of this machine with what it can swap, bytes; that of a control group where it is less; or None."""
    return _least('MemTotal:', _of_machine('SwapTotal:') or 0)


def _of_machine(name: str) -> int | None:
    """A line of /proc/meminfo, bytes."""
    lines = [line.split() for line in MEMINFO.read_text(encoding='utf-8').splitlines()] if MEMINFO.exists() else []
    return next((1024 * int(line[1]) for line in lines if line[0] == name), None)


def _least(name: str, swap: int) -> int | None:
    """A line of /proc/meminfo and the swap beside it, or the limit of a control group where it is less."""
    found = _of_machine(name)
    limits = [] if found is None else [found + swap]
    for folder in cgroups('memory'):
        for file, of_memory in LIMITS.items():
            if (limit := _limit(folder / file)) is not None:
                own = _limit(folder / 'memory.swap.max')
                limits.append(limit + (swap if own is None else min(own, swap)) * of_memory)
    return min(limits, default=None)


def _limit(file: pathlib.Path) -> int | None:
    """The limit in a file of a control group; None where there is no file, or no limit."""
    text = file.read_text(encoding='utf-8').strip() if file.exists() else 'max'
    # Without a limit the files of version 1 have the largest whole number of pages.
    return int(text) if text.isdigit() and int(text) < 2**62 else None


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
