"""A run directory's results -> report.html, a table for the terminal, and pictures for TensorBoard.

1. `results.read` checks what is there; what is not there is said to be missing, never an error.
2. `summary` turns it into a row per arm and three sentences, `figures` into drawings.
3. `sections` puts them in order, `page` makes one file of them.
"""

import os
import pathlib
import textwrap
from collections.abc import Sequence

from simrl.evaluation import results as results_lib
from simrl.evaluation.report import figures, page, sections, summary
from simrl.evaluation.report.summary import interval, number, share

REPORT_FILE = 'report.html'
CONSOLE_WIDTH = 120  # columns


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into the run directory, one file that needs no other; equal results give equal bytes.

    Raises:
        ResultError: a result that is there is not what it should be; names the file and the key.
    """
    results = results_lib.read(workdir)
    rows = summary.rows_of(results, workdir)
    path = workdir / REPORT_FILE
    draft = path.with_suffix('.partial')
    draft.write_text(page.document(sections.TITLE, sections.sections(results, rows)), encoding='utf-8')
    os.replace(draft, path)
    return path


def figure_pngs(workdir: pathlib.Path) -> dict[str, bytes]:
    """The report's figures as PNG files by name, those whose results are there.

    Raises:
        ResultError: as `write_report`.
    """
    results = results_lib.read(workdir)
    drawings = figures.drawings_of(results, summary.rows_of(results, workdir))
    return {name: figures.png(drawing) for name, drawing in drawings.items()}


def console_table(workdir: pathlib.Path) -> str:
    """The arms and what is claimed of them as plain text, at most 120 columns wide.

    Raises:
        ResultError: as `write_report`.
    """
    results = results_lib.read(workdir)
    rows = summary.rows_of(results, workdir)
    lines = []
    if rows:
        columns = ('assistant', 'satisfaction', 'met', 'win rate', 'strict', 'recovered', 'turns', 'left')
        cells = [
            (
                row.name,
                interval(row.satisfaction, 3),
                share(row.share_met.mean),
                interval(row.win_rate, 3),
                number(row.strict_win_rate.mean if row.strict_win_rate else None),
                interval(row.recovered),
                number(row.turns, 1),
                share(row.ends.get('left')),
            )
            for row in rows
        ]
        lines.extend([*_columns([columns, *cells]), summary.rests_on(rows)])
        lines.append('Intervals of recovered are over people: these checkpoints only, whatever the number of seeds.')
    if results.claims and results.claims.differences:
        names = ('difference', 'satisfaction', 'p', 'win rate', 'seeds', 'these checkpoints')
        claims = [
            (
                pair,
                interval(claim.satisfaction, 3, '+'),
                summary.p_value(claim.satisfaction),
                interval(claim.win_rate, 2, '+'),
                str(claim.satisfaction.num_seeds),
                interval(claim.satisfaction_over_people, 2, '+'),
            )
            for pair, claim in results.claims.differences.items()
        ]
        lines.extend(['', *_columns([names, *claims])])
    if results.claims and results.claims.transfers:
        users = ('gain over initial', 'its own simulator', 'other kinds', 'people')
        gains = [
            (
                arm,
                interval(found.users.get(arm), 3, '+'),
                interval(found.others, 3, '+'),
                interval(results.claims.arms[arm].gain, 3, '+'),
            )
            for arm, found in (
                (arm, results.claims.transfers[arm]) for arm in summary.ordered(results.claims.transfers)
            )
        ]
        lines.extend(['', *_columns([users, *gains])])
    for sentence in summary.sentences(results, rows):
        lines.extend(['', *textwrap.wrap(sentence, CONSOLE_WIDTH)])
    return '\n'.join(lines).strip('\n')


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        '  '.join(cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
