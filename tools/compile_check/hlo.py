"""Collectives in the text of a compiled program: how many there are of each kind, among which devices, and the bytes
of their results.

Of a reduce-scatter, whose result is a share, they are those of all shares.

What a loop of known length repeats counts as often. What a loop repeats whose length only running tells counts once, by
the loop's named scope. On a TPU XLA starts some collectives and joins them later, in pieces: they count where they
start.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from tools.compile_check.peers import Peers, peers_of

ITEM_BYTES = {
    **dict.fromkeys(('pred', 's8', 'u8', 'f8e4m3fn', 'f8e5m2'), 1),
    **dict.fromkeys(('s16', 'u16', 'bf16', 'f16'), 2),
    **dict.fromkeys(('s32', 'u32', 'f32'), 4),
    **dict.fromkeys(('s64', 'u64', 'f64', 'c64'), 8),
}
KINDS = (
    'all-gather',
    'all-reduce',
    'all-to-all',
    'collective-broadcast',
    'collective-permute',
    'ragged-all-to-all',
    'reduce-scatter',
)
ONCE = ''  # the scope of what every call does as often
ADDED_BY_JAX = re.compile(
    r'jit\(.*\)|jvp\(.*\)|transpose\(.*\)|while|body|cond|closed_call|checkpoint|shard_map|pjit|vmap\(.*\)'
)
_ARRAY = re.compile(r'\b(\w+)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|\s*$)')
_CALLED = re.compile(r'(?:calls|to_apply|true_computation|false_computation|branch_computations)=\{?([^}\s]*)')
_DEVICES = re.compile(r'num_partitions=(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Sent(NamedTuple):
    """Collectives of one kind: their number, and the bytes of their results on one device, or of all shares."""

    number: float
    size: float


Found = Mapping[tuple[str, str, Peers], Sent]  # by scope, kind and devices


class _Instruction(NamedTuple):
    shape: str
    op: str
    operands: tuple[str, ...]  # names; of a constant, its text
    line: str


@dataclasses.dataclass
class _Computation:
    instructions: dict[str, _Instruction]
    root: str = ''


def collectives(text: str) -> Found:
    """The collectives of a compiled program, by scope (`ONCE`, or that of a loop of unknown length), kind and devices.

    Raises:
        ValueError: the text is not of a program, or states the devices of a collective in a way that is not known.
    """
    computations, entry = _computations(text)
    stated = _DEVICES.search(text[: text.find('\n')])
    devices = 1 if stated is None else int(stated[1])
    found: dict[tuple[str, str, Peers], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def visit(name: str, scope: str, times: float) -> None:
        for result, instruction in computations[name].instructions.items():
            if instruction.op == 'while':
                trips = _trips(computations, computations[name], instruction)
                for part in ('condition', 'body'):
                    if trips is not None:
                        visit(_named(part, instruction.line), scope, times * trips)
                    else:
                        visit(_named(part, instruction.line), scope_of(_op_name(instruction.line)) or 'loop', 1.0)
            elif (collective := _collective(computations, result, instruction)) is not None:
                entries = found[scope, collective.op.removesuffix('-start'), peers_of(collective.line, devices)]
                entries[0] += times
                entries[1] += times * _result_bytes(computations[name], instruction)
            else:
                for called in _called(instruction.line):
                    visit(called, scope, times)

    visit(entry, ONCE, 1.0)
    return {key: Sent(*values) for key, values in found.items()}


def _trips(computations: Mapping[str, _Computation], outside: _Computation, loop: _Instruction) -> int | None:
    """Rounds of a loop: as XLA notes them, or as its counter is compared with a constant; None: unknown."""
    if noted := _TRIPS.search(loop.line):
        return int(noted.group(1))
    condition, body = (computations[_named(part, loop.line)] for part in ('condition', 'body'))
    test = condition.instructions[condition.root]
    if test.op != 'compare' or 'direction=LT' not in test.line:
        return None
    counter = condition.instructions[test.operands[0]]
    index = re.search(r'index=(\d+)', counter.line)
    following, first = body.instructions[body.root], outside.instructions[loop.operands[0]]
    if index is None or not following.op == first.op == 'tuple':
        return None
    at = int(index.group(1))
    added = body.instructions[following.operands[at]]
    start, end = _constant(outside, first.operands[at]), _constant(condition, test.operands[1])
    steps = [step for name in added.operands if (step := _constant(body, name)) is not None]
    if added.op != 'add' or start is None or end is None or len(steps) != 1:
        return None
    return max(0, -(-(end - start) // steps[0]))


def _constant(computation: _Computation, name: str) -> int | None:
    """The whole number that an instruction gives; None: it is no constant."""
    found = computation.instructions[name]
    if found.op in ('copy', 'bitcast'):
        return _constant(computation, found.operands[0])
    return int(found.operands[0]) if found.op == 'constant' and re.fullmatch(r'-?\d+', found.operands[0]) else None


def _collective(
    computations: Mapping[str, _Computation], result: str, instruction: _Instruction
) -> _Instruction | None:
    """The collective that an instruction is, or starts; None: none, or the rest of one that has started."""
    op = instruction.op
    if 'chain_id=' in instruction.line or op.endswith('-done'):  # pieces
        return None
    if op.removesuffix('-start') in KINDS:
        return instruction
    if result.startswith('async-collective-start'):
        inside = (x for name in _called(instruction.line) for x in computations[name].instructions.values())
        return next(x for x in inside if x.op in KINDS)
    return None


def _result_bytes(computation: _Computation, instruction: _Instruction) -> int:
    """Bytes of what a collective gives: of the largest array where operands stand beside results."""
    shape = instruction.shape
    if instruction.op == 'reduce-scatter':  # it gives a share of what it takes
        shape = ' '.join(computation.instructions[name].shape for name in instruction.operands)
    arrays = _ARRAY.findall(shape)
    sizes = [
        ITEM_BYTES.get(kind, 0) * math.prod(int(size) for size in dims.split(',') if size) for kind, dims in arrays
    ]
    largest = instruction.op.endswith('-start') or instruction.op == 'fusion'
    return max(sizes, default=0) if largest else sum(sizes)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a program by name, and the name of the first to run."""
    found: dict[str, _Computation] = {}
    entry, current = '', None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is not None:
            current = found[head.group(2)] = _Computation({})
            entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == '}':  # attributes of kernels have lines that begin with it
            current = None
        elif current is not None and (hit := _INSTRUCTION.match(line)) is not None:
            is_root, name, shape, op, inside = hit.groups()
            operands = (inside,) if op == 'constant' else tuple(re.findall(r'%([\w.\-]+)', inside))
            current.instructions[name] = _Instruction(shape, op, operands, line)
            current.root = name if is_root else current.root
    if not entry:
        raise ValueError('program: expected the text of a compiled program, with a line that begins with ENTRY')
    return found, entry


def _named(part: str, line: str) -> str:
    hit = re.search(rf'\b{part}=%?([\w.\-]+)', line)
    assert hit is not None
    return hit.group(1)


def _called(line: str) -> list[str]:
    return [name.strip().lstrip('%') for group in _CALLED.findall(line) for name in group.split(',') if name.strip()]


def _op_name(line: str) -> str:
    hit = re.search(r'op_name="([^"]*)"', line)
    return '' if hit is None else hit.group(1)


def scope_of(path: str) -> str:
    """The named scopes of a path of operations, without what JAX adds: 'jit(f)/send/decode/while' is 'send/decode'."""
    return '/'.join(part for part in path.split('/') if part and not ADDED_BY_JAX.fullmatch(part))
