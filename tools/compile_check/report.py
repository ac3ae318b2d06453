"""Tables of what was compiled, in Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from simrl.run.compiles import stated
from tools.compile_check.check import Checked
from tools.compile_check.hlo import ONCE, Found, Sent
from tools.compile_check.machines import GIB
from tools.compile_check.measure import Measured
from tools.compile_check.programs import PACES
from tools.compile_check.roofline import Group, sent_seconds, step_limits
from tools.compile_check.scaling import scaling_text

SHOWN = ('arguments', 'temporaries', 'outputs', 'aliased')


def text_of(checked: Checked, chips: Sequence[int] = ()) -> str:
    """All tables of an arm on a mesh.

    Args:
        chips: numbers of chips to show the step on as well (`scaling`), the first to compare with; none: not shown.
    """
    tables = [*_head(checked), '', *_programs(checked), '', *_loops(checked), *_kept(checked), *_roofline(checked)]
    return '\n'.join([*tables, *(['', *scaling_text(checked, chips)] if chips else [])])


def plain(checked: Checked) -> dict[str, Any]:
    """All numbers of an arm on a mesh, for JSON: bytes, operations and collectives of one device."""
    chip = checked.topology.chip
    group = None if chip is None else Group(chip, checked.data, checked.model)
    user = None if chip is None or checked.simulator is None else Group(chip, *checked.simulator)
    return {
        'arm': checked.work.name,
        'topology': checked.topology.name,
        'mesh': {'data': checked.data, 'model': checked.model},
        'simulator_mesh': checked.simulator,
        'layers': dict(checked.layers),
        'compiled_layers': [dict(depth) for depth in checked.depths],
        'notes': list(checked.work.notes),
        'programs': {
            name: {
                'calls': program.calls,
                'sizes': program.sizes,
                'bytes': dict(program.bytes),
                'needs': checked.needs(name),
                'operations': dict(program.operations),
                'collectives': [
                    {'scope': scope, 'kind': kind, 'devices': peers.number, 'reach': peers.reach, **found._asdict()}
                    for (scope, kind, peers), found in program.sent.items()
                ],
                'compiling_seconds': program.seconds,
            }
            for name, program in checked.programs.items()
        },
        'kept': dict(checked.kept),
        'passing': dict(checked.passing),
        'memory': None if chip is None else chip.memory,
        'fits': checked.fits,
        'bound': dict(checked.bound),
        'least_seconds': {}
        if group is None
        else {name: limit.seconds for name, limit in step_limits(checked.work, group, user).items()},
    }


def line_of(program: Measured) -> str:
    """One program, as soon as it is known."""
    return (
        f'{program.name}: {program.bytes["arguments"] / GIB:.2f} GiB of arguments, '
        f'{program.bytes["temporaries"] / GIB:.2f} of temporaries; compiled in {program.seconds:.0f} s of CPU'
    )


def layout_of(checked: Checked) -> str:
    """'8x1', data x model; '8x1, simulator 2x4'."""
    apart = '' if checked.simulator is None else ', simulator {}x{}'.format(*checked.simulator)
    return f'{checked.data}x{checked.model}{apart}'


def _head(checked: Checked) -> Iterator[str]:
    layers = ', '.join(f'{side} {number} layers' for side, number in checked.layers.items())
    rows = (
        f'{checked.work.rows} rows, {checked.work.rows_at_once} at once, {checked.work.rows_of_microbatch} a microbatch'
    )
    yield f'## {checked.work.name} on {checked.topology.name} as {layout_of(checked)}'
    yield ''
    yield f'{layers}; {rows}. Bytes and operations are of one device; GiB.'
    if len(checked.depths) > 1:
        yield (
            'Programs of a rollout were compiled with '
            f'{" and ".join("+".join(map(str, depth.values())) for depth in checked.depths)} layers and extrapolated '
            'linearly to all of them.'
        )
    yield from checked.work.notes


def _programs(checked: Checked) -> Iterator[str]:
    columns = ('program', 'calls a step', *SHOWN, 'with what is kept', 'TFLOP a call', 'collectives a call', 'CPU s')
    yield f'| {" | ".join(columns)} |'
    yield f'|{"---|" * len(columns)}'
    for program in checked.programs.values():
        sizes = ' | '.join(f'{program.bytes[part] / GIB:.2f}' for part in SHOWN)
        yield (
            f'| {program.name} | {program.calls} | {sizes} | {checked.needs(program.name) / GIB:.1f} | '
            f'{program.operations.get(ONCE, 0.0) / 1e12:.2f} | {sent_text(program.sent, ONCE)} | '
            f'{program.seconds:.0f} |'
        )
    if not set(PACES).intersection(checked.programs):  # whose sizes are those that windows happen to have
        yield ''
        yield first_step(checked)
    if checked.bound:
        yield ''
        yield f'Conversations of any lengths: {stated(checked.bound)}.'


def first_step(checked: Checked) -> str:
    """Counts programs and CPU time of a first step with messages at their budgets and rows of all lengths."""
    programs = checked.programs.values()
    several = ', '.join(f'{program.name} {program.sizes}' for program in programs if program.sizes > 1)
    minutes = sum(program.sizes * program.seconds for program in programs) / 60
    return (
        f'In a first step with all caches and lengths of rows: {sum(program.sizes for program in programs)} programs'
        f'{f" ({several})" if several else ""}, {minutes:.0f} minutes of CPU if each takes as long as the largest.'
    )


def _loops(checked: Checked) -> Iterator[str]:
    rows = []
    for program in checked.programs.values():
        scopes = dict.fromkeys([*program.operations, *(scope for scope, _, _ in program.sent)])
        for scope in scopes:
            if scope != ONCE:
                number = program.operations.get(scope, 0.0) / 1e9
                rows.append(f'| {program.name} | {scope} | {number:,.2f} | {sent_text(program.sent, scope)} |')
    if rows:
        yield 'One round of each loop that runs as long as rows need it:'
        yield ''
        yield '| program | loop | GFLOP | collectives |'
        yield '|---|---|---|---|'
        yield from rows
        yield ''


def sent_text(sent: Found, scope: str) -> str:
    """'2 all-gather 1.5 MB, 1 all-reduce 4 B'."""
    kinds: dict[str, list[Sent]] = {}
    for (of, kind, _), found in sorted(sent.items()):
        if of == scope:
            kinds.setdefault(kind, []).append(found)
    parts = [
        f'{sum(x.number for x in found):,.0f} {kind} {bytes_text(sum(x.size for x in found))}'
        for kind, found in kinds.items()
    ]
    return ', '.join(parts) or 'none'


def bytes_text(size: float) -> str:
    for unit, factor in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if size >= factor:
            return f'{size / factor:,.1f} {unit}'
    return f'{size:,.0f} B'


def _kept(checked: Checked) -> Iterator[str]:
    kept = {**checked.kept, **{f'({kind})': size for kind, size in checked.passing.items()}}
    yield 'By arithmetic: kept during a whole step, and (in brackets) while a program needs it.'
    yield ''
    yield f'| {" | ".join(kept)} |'
    yield f'|{"---|" * len(kept)}'
    yield f'| {" | ".join(f"{size / GIB:.2f}" for size in kept.values())} |'
    yield ''
    yield verdict(checked)


def verdict(checked: Checked) -> str:
    """Says in one line whether an arm fits, with the largest program's estimate by kind."""
    program = checked.programs[checked.most]
    chip = checked.topology.chip
    parts = {
        **{kind: size for kind, size in checked.kept.items() if kind not in program.holds},
        'arguments': program.bytes['arguments'],
        'temporaries': program.bytes['temporaries'],
        'outputs': program.bytes['outputs'] - program.bytes['aliased'],
        'code': program.bytes['code'],
        'the other side': program.beside,
    }
    kinds = ' + '.join(f'{kind} {size / GIB:.1f}' for kind, size in parts.items() if size >= 0.05 * GIB)
    needs = f'{program.name} needs {checked.needs(program.name) / GIB:.1f} GiB ({kinds})'
    where = f'{checked.work.name} on {checked.topology.name} as {layout_of(checked)}'
    if chip is None:
        return f'{where}: {needs}; the memory of the CPUs is not known.'
    return f'{where}: {"fits" if checked.fits else "does not fit"}: {needs} of {chip.memory / GIB:.1f}.'


def _roofline(checked: Checked) -> Iterator[str]:
    chip = checked.topology.chip
    if chip is None:
        return
    user = None if checked.simulator is None else Group(chip, *checked.simulator)
    limits = step_limits(checked.work, Group(chip, checked.data, checked.model), user)
    yield ''
    yield 'The least seconds of a step, all messages as long as they may be, at the peaks of the chip:'
    yield ''
    yield '| phase | seconds | limited by |'
    yield '|---|---|---|'
    for name, limit in limits.items():
        yield f'| {name} | {limit.seconds:.1f} | {limit.by} |'
    sent = {name: sent_seconds(checked.work, program, chip) for name, program in checked.programs.items()}
    yield f'| all | {sum(limit.seconds for limit in limits.values()):.1f} | |'
    found = ', '.join(f'{name} {seconds:.2f}' for name, seconds in sent.items() if seconds >= 0.005)
    yield ''
    yield f'Collectives at the peak of the links, seconds a step: {found or "none"}.'


def smallest(found: Sequence[Checked]) -> Iterator[str]:
    """The smallest slice that fits, for each arm of several that were checked on machines of known memory."""
    for name in dict.fromkeys(checked.work.name for checked in found):
        own = [checked for checked in found if checked.work.name == name and checked.fits is not None]
        fitting = [checked for checked in own if checked.fits]
        if own:
            best = min(fitting, key=lambda checked: checked.topology.num_devices, default=None)
            answer = 'none of those asked' if best is None else f'{best.topology.name} as {layout_of(best)}'
            yield f'{name}: smallest slice that fits: {answer}'
