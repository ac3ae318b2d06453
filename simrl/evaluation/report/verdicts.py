"""Verdicts of judges and people as a small table, of a card, of several runs, or of text."""

from collections.abc import Iterable, Sequence

from simrl.evaluation.report import page, summary
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import number
from simrl.evaluation.verdicts import Verdict

TITLE = 'By judges and people'
HEADER = ('assistant', 'number', 'mean', 'by', 'over', 'failures lost to won')
ABOUT = (
    'Of an arm with several training seeds the interval is over these, else over what is named, of that checkpoint '
    'only. Failures lost to won: all that has no verdict at the lowest value, and at the highest; without it there is '
    'none. The report of the run has more.'
)


def parts(verdicts: Iterable[tuple[str, Verdict]]) -> list[str]:
    """The table and what it is; nothing without a verdict. Each comes with the name of its run, or ''."""
    rows: list[Sequence[str | Cell]] = []
    for run, of in verdicts:
        name, kind, mean, who, sample, failed = _texts(of)
        mean, _, bounds = mean.partition(' ')
        rows.append((Cell(name, run), kind, Cell(mean, bounds), Cell(who, words=True), sample, failed))
    return [page.table(HEADER, rows), page.paragraph(ABOUT, 'note')] if rows else []


def text_rows(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """The same as rows of text, the header first."""
    return [HEADER, *map(_texts, verdicts)]


def _texts(of: Verdict) -> tuple[str, ...]:
    name = of.assistant if of.against is None else f'{of.assistant} over {of.against}'
    mean = number(of.mean) if of.mean is None else f'{number(of.mean)} {summary.bounds(of.low, of.high)}'
    failed = '–' if of.lost is None else f'{number(of.lost)} to {number(of.won)}'
    return name, of.number, mean, of.judges, of.sample, failed
