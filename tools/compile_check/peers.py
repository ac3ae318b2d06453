"""The devices that a collective is among, as the text of a compiled program states them."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_PAIRS = re.compile(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[.*?)\))? \{([^}]*)\}')
_IOTA = re.compile(r'replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)')
_LIST = re.compile(r'replica_groups=\{(?:\{([\d,]*)\})?')
_SIZE = re.compile(r"'(\w+)'=(\d+)")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")  # of a part of an axis: what is before it, and its size


class Peers(NamedTuple):
    """A group of devices; all groups of a collective are alike.

    Attributes:
        number: how many they are; of a permutation 2.
        reach: from the first to the last, counted in the order of the mesh: at most `model` among those that have the
            same rows.
    """

    number: int
    reach: int


def peers_of(line: str, devices: int) -> Peers:
    """The group of the first device, by the line of a collective.

    Args:
        devices: all of the program's.

    Raises:
        ValueError: the line states groups in a way that is not known.
    """
    if (pairs := _PAIRS.search(line)) is not None:
        steps = [abs(int(source) - int(target)) for source, target in re.findall(r'(\d+),(\d+)', pairs[1])]
        return Peers(2, 1 + max(steps, default=0))
    group = _first_group(line, devices)
    return Peers(len(group), 1 + max(group) - min(group))


def _first_group(line: str, devices: int) -> list[int]:
    """Indices of devices in the mesh."""
    if (found := _MESH.search(line)) is not None:
        sizes = {name: int(size) for name, size in _SIZE.findall(found[1])}
        ids = _indices(found[2] or str([*sizes.values()])).reshape(tuple(sizes.values()))
        places: dict[str, Sequence[int]] = dict.fromkeys(sizes, (0,))
        for name, before, size in _AXIS.findall(found[3]):
            part = sizes[name] // int(before or 1)
            number = int(size or part)
            places[name] = range(0, part, part // number)
        group: list[int] = ids[np.ix_(*places.values())].ravel().tolist()
        return group
    if (found := _IOTA.search(line)) is not None:
        group = _indices(found[2])[: int(found[1])].tolist()
        return group
    if (found := _LIST.search(line)) is not None:
        return [int(x) for x in found[1].split(',')] if found[1] else list(range(devices))
    raise ValueError(f'collective: expected replica_groups that are known, found {line.strip()[:200]!r}')


def _indices(text: str) -> Any:
    """'[4,2]T(1,0)': the numbers from 0 in that shape, its axes put in that order, as one list."""
    shape, _, order = text.partition('T')
    ids = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _numbers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r'\d+', text)]
