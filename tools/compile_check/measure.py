"""A program compiled: bytes of a device by kind, operations and collectives; and from few layers to all of them."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tools.compile_check.hlo import Found, Sent, collectives
from tools.compile_check.operations import operations
from tools.compile_check.programs import Program

PARTS = ('arguments', 'outputs', 'aliased', 'temporaries', 'code')  # bytes, as the compiler names them


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program.

    Attributes:
        name, calls, holds, beside, sizes: of the `Program`.
        bytes: of one device, by `PARTS`. Outputs that take the place of arguments are aliased.
        operations: of one device, by scope.
        sent: of one device, by scope, kind of collective and devices.
        seconds: of CPU that compiling took.
    """

    name: str
    calls: int
    holds: tuple[str, ...]
    bytes: Mapping[str, float]
    operations: Mapping[str, float]
    sent: Found
    seconds: float
    beside: int = 0
    sizes: int = 1

    @property
    def peak(self) -> float:
        """Bytes of a device while the program runs."""
        return sum(self.bytes.values()) - 2 * self.bytes['aliased']


def compiled(program: Program, mesh: Mesh) -> tuple[Measured, Any]:
    """Compiles a program. Returns what it takes, and JAX's own object."""
    start = time.process_time()
    result = program.traced.lower().compile()
    seconds = time.process_time() - start
    memory = result.memory_analysis()
    sizes = {
        'arguments': memory.argument_size_in_bytes,
        'outputs': memory.output_size_in_bytes,
        'aliased': memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'code': memory.generated_code_size_in_bytes,
    }
    counted = {scope: number / mesh.size for scope, number in operations(program.traced.jaxpr).items()}
    sent = collectives(result.as_text())
    of = (program.name, program.calls, program.holds)
    return Measured(*of, sizes, counted, sent, seconds, program.beside, program.sizes), result


def fewer_layers(layers: Mapping[str, int], few: int) -> list[dict[str, int]]:
    """Numbers of layers to compile with, from which all layers follow by a line: at least `few` of each side.

    Two numbers suffice where the sides have few layers in the ratio of their own, as 3 and 4 of 36 and 48. Else there
    are `few` of each, and twice as many of one side after the other.
    """
    divisor = math.gcd(*layers.values())
    unit = {side: number // divisor for side, number in layers.items()}
    if max(unit.values()) <= 2 * few:
        times = -(-few // min(unit.values()))
        return [{side: number * of * times for side, number in unit.items()} for of in (1, 2)]
    least = dict.fromkeys(layers, few)
    return [least, *({**least, side: 2 * few} for side in layers)]


def extrapolated(
    points: Sequence[Measured], depths: Sequence[Mapping[str, int]], layers: Mapping[str, int]
) -> Measured:
    """A program with all layers, if each layer of a side adds as much as the next.

    Args:
        points: the program as it was compiled, with the layers of `depths` (`fewer_layers`).
        layers: of each side.
    """
    # Weights w of the points: sum w = 1, and of each side sum w x layers = all layers.
    rows = [[1.0] * len(depths), *([float(depth[side]) for depth in depths] for side in layers)]
    target = [1.0, *map(float, layers.values())]
    weights = np.linalg.lstsq(np.array(rows), np.array(target), rcond=None)[0].tolist()

    def joined(found: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
        keys = dict.fromkeys(key for one in found for key in one)
        return {key: sum(w * one.get(key, 0.0) for w, one in zip(weights, found, strict=True)) for key in keys}

    counts = joined([{key: sent.number for key, sent in point.sent.items()} for point in points])
    sizes = joined([{key: sent.size for key, sent in point.sent.items()} for point in points])
    return dataclasses.replace(
        points[0],
        bytes=joined([point.bytes for point in points]),
        operations=joined([point.operations for point in points]),
        sent={key: Sent(counts[key], sizes[key]) for key in counts},
        seconds=sum(point.seconds for point in points),
        beside=round(sum(w * point.beside for w, point in zip(weights, points, strict=True))),
    )
