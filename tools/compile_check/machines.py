"""Machines that are not here: chips with their peaks, and topologies as devices that programs can be compiled for."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from simrl.models import sharding
from simrl.run.config import ConfigError

GIB = 2**30
CPU = 'cpu'
INSTALL = "pip install '.[tpu]' installs the libtpu of this JAX, and no TPU is needed"
# libtpu asks a TPU's host what it is a part of, and locks the TPU for one process; here there is none.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_ACCELERATOR_TYPE': 'v5p-16',
    'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
        flops: bfloat16 operations per second, at most.
        bandwidth: bytes per second of its memory, at most.
        links: bytes per second that it sends to others at most, over all of its links.
        memory: bytes that programs can have; libtpu keeps a little of the stated memory.
        shape: the form of its topologies, as a pattern, and an example.
    """

    flops: float
    bandwidth: float
    links: float
    memory: float
    shape: tuple[str, str]


# https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e (2026-11): peaks, and half of what links carry in both
# directions. Memory is the limit that libtpu states when a program exceeds it.
CHIPS: Mapping[str, Chip] = {
    'v5e': Chip(197e12, 819e9, 200e9, 15.75 * GIB, (r'\d+x\d+', '4x4')),
    'v5p': Chip(459e12, 2765e9, 600e9, 95.74 * GIB, (r'\d+x\d+x\d+', '2x2x2')),
    'v6e': Chip(918e12, 1638e9, 400e9, 31.25 * GIB, (r'\d+x\d+', '4x4')),
}
KNOWN = ', '.join([*(f'{name}:{chip.shape[1]}' for name, chip in CHIPS.items()), f'{CPU}:8'])


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, or a number of CPU devices.

    Attributes:
        name: as it was asked for, 'v5p:2x2x2' or 'cpu:8'.
        num_devices: the product of its sizes.
        chip: None: CPUs, of which no peaks are known.
    """

    name: str
    num_devices: int
    chip: Chip | None


def topology_of(name: str) -> Topology:
    """Reads a topology's name.

    Raises:
        ConfigError: an unknown kind of chip, or a shape of another form than its slices have.
    """
    kind, _, shape = name.partition(':')
    if kind != CPU and kind not in CHIPS:
        raise ConfigError(f'--topology: expected a topology such as {KNOWN}, found {name!r}')
    pattern, example = (r'\d+', '8') if kind == CPU else CHIPS[kind].shape
    sizes = [int(size) for size in shape.split('x')] if re.fullmatch(pattern, shape) else [0]
    if not all(sizes):
        raise ConfigError(f'--topology: expected a shape such as {kind}:{example}, found {name!r}')
    number = 1
    for size in sizes:
        number *= size
    return Topology(name, number, CHIPS.get(kind))


def prepare_process(topologies: Sequence[Topology]) -> None:
    """Sets up JAX, before it starts: nothing runs on an accelerator, and there are as many CPU devices as asked for.

    Raises:
        ConfigError: libtpu is not installed.
    """
    if any(topology.chip is not None for topology in topologies):
        if importlib.util.find_spec('libtpu') is None:
            raise ConfigError(f'--topology: {topologies[0].name} needs libtpu, found none installed; {INSTALL}')
        os.environ.update(ENVIRONMENT)
    jax.config.update('jax_platforms', CPU)
    jax.config.update('jax_enable_compilation_cache', False)  # seconds are of compiling
    numbers = [topology.num_devices for topology in topologies if topology.chip is None]
    if numbers:
        jax.config.update('jax_num_cpu_devices', max(numbers))


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a topology, which need not exist; `prepare_process` comes first.

    Raises:
        ConfigError: libtpu knows no such slice, or JAX had started with fewer CPU devices.
    """
    if topology.chip is None:
        here = jax.devices(CPU)
        if len(here) < topology.num_devices:
            raise ConfigError(f'--topology: expected at most the {len(here)} CPU devices, found {topology.name}')
        return here[: topology.num_devices]
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology.name).devices
    except Exception as error:  # of libtpu, without a type of its own
        reason = ' '.join(str(error).split())[:300]
        raise ConfigError(f'--topology: libtpu does not make {topology.name}: {reason}') from error


def mesh_of(topology: Topology, shape: tuple[int | None, int], field: str = '--mesh') -> Mesh:
    """The mesh of all devices of a topology.

    Args:
        shape: sizes of the axes `data` and `model`; None: all that `model` leaves.
        field: what errors call it.

    Raises:
        ConfigError: they are not the number of devices.
    """
    number, (data, model) = topology.num_devices, shape
    data = number // model if data is None else data
    if data * model != number:
        raise ConfigError(f'{field}: expected data x model = {number} devices of {topology.name}, found {data}x{model}')
    return sharding.make_mesh(data, model, devices_of(topology))


def mesh_shape(text: str) -> tuple[int, int]:
    """Reads '8x1', data x model."""
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', text):
        raise ConfigError(f'--mesh: expected DATAxMODEL, for instance 8x1, found {text!r}')
    data, _, model = text.partition('x')
    return int(data), int(model)
