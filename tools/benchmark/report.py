"""Results in; JSON, a Markdown table and plots out."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from tools.benchmark.limits import Limit
from tools.benchmark.measure import SideResult
from tools.benchmark.plan import SWEPT

HEADER = (
    'case',
    'model',
    'batch',
    'context',
    'turns',
    'peer',
    'tokens/s',
    "peer's",
    'ratio [pairs]',
    'memory, MiB',
    "peer's",
    'ratio',
    'limited by',
    'share of limit',
    "peer's",
    'warm-up, s',
    "peer's",
)
EXPLANATION = """\
Ratio: the peer's median time over simrl's, above 1 where simrl is faster; in brackets the least and the largest of the
pairs that ran one after the other. Memory: the peak resident size over that at rest, after the
warm-up (on an accelerator, the peak of its own memory); its ratio is simrl's over the peer's. The resident size after
loading, without compiled programs, is in the JSON file. Share of limit: the least time that the machine allows (bytes
over the measured bandwidth or operations over the measured rate of matrix products, phase by phase) over the median
time. Warm-up, compilation included, is in no other number."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One case at one size against one peer, or alone.

    Attributes:
        tokens: what a run's speed is told in; see `plan.processed_tokens`.
        memory: whether it is this row's; that of a part of a run is not measured apart.
    """

    case: str
    model: str
    dtype: str
    batch: int
    context: int
    turns: int
    new_tokens: int
    tokens: int
    limit: Limit
    ours: SideResult
    peer: SideResult | None
    memory: bool = True

    def speed(self, side: SideResult) -> float:
        """Tokens per second."""
        return self.tokens / side.median

    def share(self, side: SideResult) -> float:
        """The share of the limit that is reached."""
        return self.limit.seconds / side.median

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Speed over the peer's: of the medians, and the least and the largest of the pairs."""
        if self.peer is None:
            return None
        pairs = [peer / own for own, peer in zip(self.ours.seconds, self.peer.seconds, strict=True)]
        return self.peer.median / self.ours.median, min(pairs), max(pairs)

    @property
    def memory_ratio(self) -> float | None:
        if self.peer is None or not self.memory or not self.peer.memory:
            return None
        return self.ours.memory / self.peer.memory


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, with what its columns mean."""
    lines: list[tuple[str, ...]] = [
        HEADER,
        ('---',) * 2 + ('--:',) * 3 + ('---',) + ('--:',) * 6 + ('---',) + ('--:',) * 4,
    ]
    lines += [_cells(row) for row in rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) + f'\n\n{EXPLANATION}\n'


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return '–' if value is None else format(value, form)

    peer, memory, ratio = row.peer, row.memory, row.ratio
    return (
        row.case,
        f'{row.model} {row.dtype}',
        str(row.batch),
        str(row.context),
        str(row.turns),
        '–' if peer is None else peer.name,
        f'{row.speed(row.ours):,.0f}',
        number(None if peer is None else row.speed(peer), ',.0f'),
        '–' if ratio is None else f'{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]',
        number(row.ours.memory / 2**20 if memory else None, ',.0f'),
        number(peer.memory / 2**20 if peer is not None and memory else None, ',.0f'),
        number(row.memory_ratio, '.2f'),
        row.limit.by,
        f'{row.share(row.ours):.0%}',
        number(None if peer is None else row.share(peer), '.0%'),
        f'{row.ours.warm_up_seconds:.1f}',
        number(None if peer is None else peer.warm_up_seconds, '.1f'),
    )


def to_json(row: Row) -> dict[str, Any]:
    """All of a row, the numbers that the table shows of it included."""
    ratio = row.ratio
    return dataclasses.asdict(row) | {
        'limited_by': row.limit.by,
        'tokens_per_second': {'ours': row.speed(row.ours), 'peer': None if row.peer is None else row.speed(row.peer)},
        'share_of_limit': {'ours': row.share(row.ours), 'peer': None if row.peer is None else row.share(row.peer)},
        'ratio': None if ratio is None else dict(zip(('of_medians', 'least', 'largest'), ratio, strict=True)),
        'memory_ratio': row.memory_ratio,
    }


def write(folder: pathlib.Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """`benchmark.json`, `benchmark.md` and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({'machine': machine, 'rows': [to_json(row) for row in rows]}, indent=1, default=str)
    (folder / 'benchmark.json').write_text(text + '\n', encoding='utf-8')
    (folder / 'benchmark.md').write_text(_machine_lines(machine) + '\n' + table(rows), encoding='utf-8')
    plot(folder, rows)


def _machine_lines(machine: dict[str, Any]) -> str:
    return ''.join(f'- {name}: {value}\n' for name, value in machine.items())


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows that differ in one of `SWEPT`, by (case, model, name of it), in its order, of one peer each.

    A sweep over turns varies the context with them.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for name in SWEPT:
        varied = {name, 'context'} if name == 'turns' else {name}
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            fixed = tuple(getattr(row, other) for other in SWEPT if other not in varied)
            key = (row.case, row.model, None if row.peer is None else row.peer.name, fixed)
            groups.setdefault(key, []).append(row)
        for (case, model, peer, _), members in groups.items():
            values = {getattr(row, name): row for row in members}
            label = f'{case} vs {peer}' if peer is not None else case
            if len(values) > 1:
                found[label, model, name] = [values[value] for value in sorted(values)]
    return found


def plot(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """`ratios.png`, where there are peers, and a picture for each sweep."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    compared = [(row, row.ratio) for row in rows if row.ratio is not None]
    if compared:
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(compared)), layout='constrained')
        names = [f'{row.case}, {row.batch} x {row.context}\n{row.peer.name if row.peer else ""}' for row, _ in compared]
        middle = [ratio[0] for _, ratio in compared if ratio]
        below = [ratio[0] - min(ratio) for _, ratio in compared if ratio]
        above = [max(ratio) - ratio[0] for _, ratio in compared if ratio]
        positions = range(len(compared))
        axes.barh(positions, middle, xerr=[below, above], color='#4878a8', capsize=3)
        axes.axvline(1, color='black', linewidth=0.8)
        axes.set_yticks(positions, names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel('times as fast as the peer (median; whiskers: all pairs)')
        figure.savefig(folder / 'ratios.png', dpi=150)
        plt.close(figure)
    for (label, model, name), members in sweeps(rows).items():
        figure, axes = plt.subplots(figsize=(5, 3.5), layout='constrained')
        values = [getattr(row, name) for row in members]
        axes.plot(values, [row.speed(row.ours) for row in members], marker='o', label='simrl')
        peers = [(value, row.speed(row.peer)) for value, row in zip(values, members, strict=True) if row.peer]
        if peers:
            axes.plot(*zip(*peers, strict=True), marker='s', label=members[0].peer.name if members[0].peer else '')
        limits = [row.tokens / row.limit.seconds for row in members]
        axes.plot(values, limits, linestyle='--', color='gray', label='limit')
        axes.set_xscale('log', base=2)
        axes.set_yscale('log')
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xlabel({'batch': 'rows', 'context': 'tokens of a row', 'turns': 'turns'}[name])
        axes.set_ylabel('tokens per second')
        axes.set_title(f'{label}\n{model}', fontsize=9)
        axes.legend(fontsize=7)
        slug = ''.join(c if c.isalnum() else '-' for c in f'{label} {model} {name}')
        figure.savefig(folder / f'sweep-{slug}.png', dpi=150)
        plt.close(figure)


def summary(row: Row) -> str:
    """One line, as a case ends."""
    line = f'{row.case} {row.batch} x {row.context}'
    line += f': {row.speed(row.ours):,.0f} tokens/s, {row.share(row.ours):.0%} of the limit by {row.limit.by}'
    if row.ratio is not None and row.peer is not None:
        line += f'; {row.ratio[0]:.2f}x {row.peer.name}'
    spread = statistics.pstdev(row.ours.seconds) / row.ours.median if len(row.ours.seconds) > 1 else 0.0
    line += f'; runs vary by {spread:.0%}'
    if any(row.share(side) > 1 for side in (row.ours, row.peer) if side is not None):
        line += '; faster than the limit: the rates were measured while the machine was busy'
    return line
