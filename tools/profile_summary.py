"""Summary of the device's time in a profile: by named scope, by kind of operation and by program, in per cent.

    python -m tools.profile_summary FOLDER [--top=20]

Reads the newest `*.xplane.pb` below FOLDER, as `LoopSettings.profile_step` and `jax.profiler.trace` write it, and
prints Markdown tables. A time is an operation's own, without what it calls (a loop's body), summed over the device's
queues, or a CPU's threads: operations side by side count each for itself. Times between operations are in no table.

1. An event says which program (HLO module) and which operation of it ran; the profile holds the programs.
2. The operation's `op_name` is the path of `jax.named_scope`s that it was traced in. A fusion counts as a whole for the
   scope of its matrix product, or else of its result; what XLA adds without a name, for that of the loop it is in.
3. Of the path, scopes are kept, and what JAX adds (jit, while, an einsum's subscripts, ...) is left out. `(backward)`
   are the operations of a gradient, `(recomputed)` those that it does again for want of memory.

On a GPU, launches of CUDA graphs may hide which operation a kernel is of: they are in the scope `?`, and
--config.compute.xla_flags="('--xla_gpu_enable_command_buffer=',)" runs without them.
"""

import argparse
import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jax.profiler import ProfileData

from simrl.run.config import local_path
from simrl.run.program import run_program

UNKNOWN, OUTSIDE = '?', '(no scope)'
METADATA_PLANE, HOST_PLANE, DEVICE_PLANES = '/host:metadata', '/host:CPU', ('/device:GPU', '/device:TPU')
DEVICE_LINES = ('Stream', 'XLA Ops')  # a GPU's queues, a TPU's operations; the other lines show the same otherwise
# What says the most of a fusion that has one, the first of these first.
TELLING = ('dot', 'convolution', 'custom-call', 'sort', 'scatter', 'gather', 'dynamic-update-slice', 'reduce')
PRODUCTS = TELLING[:2]
ADDED_BY_JAX = re.compile(
    r'while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation|custom_[jv]+p_call|branch_\d+_fun'
    r'|[\w.,]+->[\w.]*'  # an einsum's subscripts
)
TRANSFORM = re.compile(r'(\w+)\((.*)\)')


@dataclasses.dataclass(frozen=True)
class Operation:
    """The operation that an event is an execution of."""

    program: str  # the name of its HLO module, such as jit_update
    scope: str
    kind: str  # its HLO opcode; of a fusion, with the most telling of what is fused


@dataclasses.dataclass(frozen=True)
class Event:
    """An execution of an operation on one line; times in nanoseconds."""

    start: float
    duration: float
    operation: Operation


@dataclasses.dataclass
class Total:
    nanoseconds: float = 0.0
    events: int = 0


# Programs, from the bytes of the profile: ProfileData shows no metadata. The numbers are those of the fields in
# xplane.proto, hlo.proto and xla_data.proto.


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a serialized protocol buffer: an int, or bytes of whatever they are."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f'expected a protocol buffer, found wire type {wire} at byte {position}')
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[position : position + size]
        position += size


def _all(message: bytes, number: int) -> list[Any]:
    return [value for found, value in fields(message) if found == number]


def _text(message: bytes, number: int) -> str:
    return b''.join(_all(message, number)[-1:]).decode()


def _ints(values: Iterable[int | bytes]) -> Iterator[int]:
    """A repeated integer, packed or not."""
    for value in values:
        yield from [value] if isinstance(value, int) else (x for _, x in fields(_unpacked(value)))


def _unpacked(packed: bytes) -> bytes:
    """Packed varints as fields of number 1."""
    ends = [i for i, byte in enumerate(packed) if byte < 128]
    starts = [0, *(end + 1 for end in ends)]
    return b''.join(b'\x08' + packed[i : end + 1] for i, end in zip(starts, ends, strict=False))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    op_name: str
    calls: tuple[int, ...]  # ids of computations
    target: str  # of a custom call


def _instruction(message: bytes) -> _Instruction:
    values = collections.defaultdict(list)
    for number, value in fields(message):
        values[number].append(value)
    return _Instruction(
        name=values[1][0].decode(),
        opcode=values[2][0].decode(),
        op_name=_text(values[7][-1], 2) if values[7] else '',
        calls=tuple(_ints(values[38])),
        target=b''.join(values[28]).decode(),
    )


def programs(profile: bytes) -> dict[str, dict[str, Operation]]:
    """The operations of each program that a profile holds, by 'MODULE(PROGRAM ID)' and by name."""
    found: dict[str, dict[str, Operation]] = {}
    for plane in _all(profile, 1):
        if _text(plane, 2) != METADATA_PLANE:
            continue
        for entry in _all(plane, 4):
            metadata = _all(entry, 2)[0]
            for hlo in (hlo for stat in _all(metadata, 5) for hlo in _all(stat, 6)):
                found[_text(metadata, 2)] = _operations(_all(hlo, 1)[0])
    return found


def _operations(module: bytes) -> dict[str, Operation]:
    computations = {
        _all(computation, 5)[0]: [_instruction(message) for message in _all(computation, 2)]
        for computation in _all(module, 3)
    }
    caller = {
        called: (number, instruction)
        for number, instructions in computations.items()
        for instruction in instructions
        for called in instruction.calls
    }

    def op_name(number: int, instruction: _Instruction) -> str:
        """Its own, or that of what calls its computation."""
        inner = [other for called in instruction.calls for other in computations[called]]
        if instruction.opcode == 'fusion':
            product = next((other for other in inner if other.opcode in PRODUCTS and other.op_name), instruction)
            named = next((other for other in reversed(inner) if other.op_name), instruction)
            name = product.op_name or named.op_name
        else:
            name = instruction.op_name
        if name or number not in caller:
            return name
        return op_name(*caller[number])

    def kind(instruction: _Instruction) -> str:
        inner = {other.opcode for called in instruction.calls for other in computations[called]}
        if instruction.opcode == 'fusion':
            telling = next((opcode for opcode in TELLING if opcode in inner), None)
            return 'fusion' if telling is None else f'fusion of {telling}'
        return f'{instruction.opcode} {instruction.target}'.strip()

    program = _text(module, 1)
    return {
        instruction.name: Operation(program, scope_of(op_name(number, instruction)), kind(instruction))
        for number, instructions in computations.items()
        for instruction in instructions
    }


def scope_of(op_name: str) -> str:
    """The named scopes of an operation: 'jit(f)/jvp(update)/while/body/attention/dot_general' -> 'update/attention'."""
    scopes, marks = [], set()
    for part in _parts(op_name)[:-1]:  # the last one is the operation itself
        while match := TRANSFORM.fullmatch(part):
            marks |= {match[1]}
            part = '' if match[1] in ('jit', 'pjit') else match[2]
        if part == 'rematted_computation':
            marks |= {part}
        if part and not ADDED_BY_JAX.fullmatch(part):
            scopes.append(part)
    path = '/'.join(scopes) or OUTSIDE
    if 'rematted_computation' in marks:
        return f'{path} (recomputed)'
    return f'{path} (backward)' if 'transpose' in marks else path


def _parts(op_name: str) -> list[str]:
    """Split at each '/' that is in no parentheses: scopes may have a '/' of their own, and stand in transforms."""
    parts, depth = [''], 0
    for letter in op_name:
        depth += (letter == '(') - (letter == ')')
        if letter == '/' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def events_of(data: ProfileData, known: Mapping[str, Mapping[str, Operation]]) -> list[list[Event]]:
    """The device's events by line: a GPU's or TPU's, or where there is none the CPU's."""
    planes = [plane for plane in data.planes if plane.name.startswith(DEVICE_PLANES)]
    on_host = not planes
    if on_host:
        planes = [plane for plane in data.planes if plane.name == HOST_PLANE]
    modules: dict[str, dict[str, Operation]] = {}  # by name alone, for events that name no program's id
    for name, operations in known.items():
        modules.setdefault(name.rpartition('(')[0], {}).update(operations)
    lines = []
    for plane in planes:
        for line in plane.lines:
            if not on_host and not line.name.startswith(DEVICE_LINES):
                continue
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if on_host and 'hlo_op' not in stats:
                    continue  # Python, threads, ...
                module, name = str(stats.get('hlo_module', UNKNOWN)), str(stats.get('hlo_op', UNKNOWN))
                operations = known.get(f'{module}({stats.get("program_id")})') or modules.get(module, {})
                operation = operations.get(name) or Operation(module, UNKNOWN, UNKNOWN)
                events.append(Event(event.start_ns, event.duration_ns, operation))
            if events:
                lines.append(events)
    return lines


def own_times(events: Iterable[Event]) -> Iterator[tuple[Operation, float]]:
    """Each event's operation and its duration without the events inside it, in nanoseconds; of one line."""
    open_: list[tuple[Event, list[float]]] = []
    done: list[tuple[Event, list[float]]] = []
    for event in sorted(events, key=lambda event: (event.start, -event.duration)):
        while open_ and event.start >= open_[-1][0].start + open_[-1][0].duration:
            open_.pop()
        if open_:
            open_[-1][1].append(event.duration)
        open_.append((event, []))
        done.append(open_[-1])
    return ((event.operation, max(event.duration - sum(inside), 0.0)) for event, inside in done)


def totals(lines: Iterable[Iterable[Event]], key: Callable[[Operation], str]) -> dict[str, Total]:
    """Own times by what `key` says of operations, the longest first."""
    found: dict[str, Total] = collections.defaultdict(Total)
    for events in lines:
        for operation, nanoseconds in own_times(events):
            total = found[key(operation)]
            total.nanoseconds += nanoseconds
            total.events += 1
    return dict(sorted(found.items(), key=lambda item: -item[1].nanoseconds))


def table(title: str, found: Mapping[str, Total], top: int) -> str:
    """The `top` rows, and the sum of the others."""
    whole = sum(total.nanoseconds for total in found.values()) or 1.0
    rows = list(found.items())
    rest = rows[top:]
    if rest:
        others = Total(sum(total.nanoseconds for _, total in rest), sum(total.events for _, total in rest))
        rows = [*rows[:top], (f'({len(rest)} others)', others)]
    lines = [f'| {title} | % | ms | events |', '| --- | ---: | ---: | ---: |']
    for name, total in rows:
        share, milliseconds = 100 * total.nanoseconds / whole, total.nanoseconds / 1e6
        lines.append(f'| {name} | {share:.1f} | {milliseconds:.3f} | {total.events} |')
    return '\n'.join(lines)


def newest(folder: pathlib.Path) -> pathlib.Path:
    """The newest profile below a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(folder.rglob('*.xplane.pb'), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(f'{folder}: expected a profile, *.xplane.pb, found none')
    return found[-1]


def summary(path: pathlib.Path, top: int) -> str:
    """The tables of a profile.

    Raises:
        ValueError: nothing that a device did is in it.
    """
    profile = path.read_bytes()
    lines = events_of(ProfileData.from_serialized_xspace(profile), programs(profile))
    if not lines:
        raise ValueError(f'{path}: expected operations of a device, found none')
    start = min(event.start for events in lines for event in events)
    end = max(event.start + event.duration for events in lines for event in events)
    by_scope = totals(lines, lambda operation: operation.scope)
    own = sum(total.nanoseconds for total in by_scope.values())
    return '\n\n'.join(
        [
            f'{path}: {own / 1e6:.3f} ms of operations on {len(lines)} lines, in {(end - start) / 1e6:.3f} ms',
            table('scope', by_scope, top),
            table('kind', totals(lines, lambda operation: operation.kind), top),
            table('program', totals(lines, lambda operation: operation.program), top),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=local_path, help='with a profile somewhere below')
    parser.add_argument('--top', type=int, default=20, help='rows of a table')
    options = parser.parse_args()
    try:
        print(summary(newest(options.folder), options.top))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
    run_program(main)
