"""Measured loads in; a Markdown table and the lines about memory out."""

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.serving_load.drive import Load

HEADER = (
    *('case', 'streams', 'side', 'tokens/s', 'ratio [pairs]', 'first text p50, ms', 'p95', 'p50 by turn'),
    *('gap p50, ms', 'p95', 'requests', 'failed', 'client'),
)
EXPLANATION = """\
Tokens are the answers' by the server's count. Ratio: the tokens/s of the first side over this one's, of the medians of
the repeats; in brackets the least and the largest of those that ran one after the other. First text: from a request to
the first piece of its answer, in all and by turn of the chat; gap: between two pieces, which may hold several tokens.
Failed: requests without an answer, or without a count of its tokens, by cause; `not asked` are the later ones of their
chats. Client: the share of one core that the measurement itself took."""
FLAT_SHARE, FLAT_BYTES = 0.01, 4 * 2**20  # what is called flat grows by less than the larger of both
LEAST_SIZES = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One side in one case.

    Attributes:
        loads: one for each repeat.
    """

    case: str
    streams: int
    side: str
    loads: tuple[Load, ...]

    @property
    def rate(self) -> float:
        return statistics.median(load.rate for load in self.loads)

    def ratio(self, first: 'Row') -> tuple[float, float, float] | None:
        """The rate of the first side over this one: of the medians, and the least and largest of the pairs."""
        if not all(load.tokens for load in self.loads):
            return None
        pairs = [other.rate / own.rate for other, own in zip(first.loads, self.loads, strict=True)]
        return first.rate / self.rate, min(pairs), max(pairs)

    def first_text(self, q: float, turn: int | None = None) -> float | None:
        """A percentile of the seconds to the first text, of all turns or of one."""
        turns = [load.first[turn : None if turn is None else turn + 1] for load in self.loads]
        return _percentile([x for of_load in turns for seconds in of_load for x in seconds], q)

    @property
    def turns(self) -> int:
        return max(len(load.first) for load in self.loads)

    def gap(self, q: float) -> float | None:
        return _percentile([x for load in self.loads for x in load.gaps], q)

    @property
    def failures(self) -> dict[str, int]:
        return dict(sum((collections.Counter(load.failures) for load in self.loads), collections.Counter()))

    @property
    def details(self) -> dict[str, str]:
        return {cause: detail for load in reversed(self.loads) for cause, detail in load.details.items()}


def _percentile(values: Sequence[float], q: float) -> float | None:
    return float(np.percentile(values, q)) if values else None


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, with what its columns mean. The first side of a case is that of its first row."""
    lines: list[tuple[str, ...]] = [HEADER, ('---', '--:', '---', *('--:',) * 8, '---', '--:')]
    lines += [_cells(row, _first(row, rows)) for row in rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) + f'\n\n{EXPLANATION}\n'


def _first(row: Row, rows: Sequence[Row]) -> Row:
    return next(other for other in rows if (other.case, other.streams) == (row.case, row.streams))


def _cells(row: Row, first: Row) -> tuple[str, ...]:
    ratio, failures = row.ratio(first), row.failures
    by_turn = [_milliseconds(row.first_text(50, turn)) for turn in range(row.turns)] if row.turns > 1 else ['–']
    causes = ', '.join(f'{cause} {count}' for cause, count in sorted(failures.items()))
    computed = sum(load.client_seconds for load in row.loads) / sum(load.seconds for load in row.loads)
    return (
        row.case,
        str(row.streams),
        row.side,
        f'{row.rate:,.1f}',
        '–' if row is first or ratio is None else f'{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]',
        _milliseconds(row.first_text(50)),
        _milliseconds(row.first_text(95)),
        ' '.join(by_turn),
        _milliseconds(row.gap(50)),
        _milliseconds(row.gap(95)),
        str(sum(load.requests for load in row.loads)),
        f'{sum(failures.values())} ({causes})' if failures else '0',
        f'{computed:.0%}',
    )


def _milliseconds(seconds: float | None) -> str:
    return '–' if seconds is None else f'{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f}'


def to_json(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """All that the table shows of a row, and each repeat's numbers; times are seconds."""
    ratio = row.ratio(_first(row, rows))
    percentiles = {f'p{q}': {'first_text': row.first_text(q), 'gap': row.gap(q)} for q in (50, 95)}
    by_turn = [{f'p{q}': row.first_text(q, turn) for q in (50, 95)} for turn in range(row.turns)]
    plain = ('seconds', 'client_seconds', 'requests', 'tokens', 'failures', 'details')
    return {
        **{'case': row.case, 'streams': row.streams, 'side': row.side, 'tokens_per_second': row.rate},
        'ratio': None if ratio is None else dict(zip(('of_medians', 'least', 'largest'), ratio, strict=True)),
        **percentiles,
        'first_text_by_turn': by_turn,
        'repeats': [{name: getattr(load, name) for name in plain} for load in row.loads],
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident bytes of a server's process.

    Attributes:
        before, after: the requests.
        sizes: meanwhile, at equal times.
    """

    before: int
    sizes: tuple[int, ...]
    after: int

    @property
    def growth(self) -> float | None:
        """The median of the last quarter over that of the second, bytes: the first fills what stays.

        None: there are too few sizes.
        """
        if len(self.sizes) < LEAST_SIZES:
            return None
        _, second, _, last = np.array_split(np.array(self.sizes), 4)
        return float(np.median(last) - np.median(second))

    @property
    def is_flat(self) -> bool | None:
        if self.growth is None:
            return None
        return self.growth <= max(FLAT_BYTES, FLAT_SHARE * statistics.median(self.sizes))

    def __str__(self) -> str:
        verdict = {None: f'fewer than {LEAST_SIZES} looks: no verdict', True: 'flat', False: 'not flat'}[self.is_flat]
        grown = '' if self.growth is None else f', from the second quarter to the last {self.growth / 2**20:+,.1f}'
        return (
            f'resident MiB: {self.before / 2**20:,.1f} before, {max(self.sizes, default=0) / 2**20:,.1f} at most, '
            f'{self.after / 2**20:,.1f} after{grown}: {verdict}'
        )
