"""Results -> report.html, conversations.html, figures/, a table for the terminal, and pictures for TensorBoard."""

import json
import os
import pathlib
import textwrap
import types
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import browse, gallery, judges, matrix, sections, study, summary, verdicts, wildbench
from simrl.evaluation.report.browse import BROWSE_FILE, REPORT_FILE
from simrl.evaluation.report.drawing import looks_of
from simrl.evaluation.report.summary import interval, number
from simrl.evaluation.results.files import Added, Results, read_added
from simrl.evaluation.results.measures import MeasureResult
from simrl.evaluation.results.simulators import MatrixResult
from simrl.evaluation.verdicts import verdicts_of
from simrl.run.stage_files import named_errors

CONSOLE_WIDTH = 120  # columns
MAX_LINES = 24  # of a table in the terminal; report.html has all


def write_report(
    results: Results,
    workdir: pathlib.Path,
    output: pathlib.Path | None = None,
    kept: Mapping[str, pathlib.Path] = types.MappingProxyType({}),
) -> tuple[pathlib.Path, dict[str, bytes]]:
    """Writes report.html and conversations.html, each a file that needs no other, and figures/NAME.png and .csv.

    Equal results give equal bytes.

    Args:
        workdir: the run directory.
        output: where they are written; None: into the run directory.
        kept: by assistant, a file of the conversations that its training kept.

    Returns:
        The path of report.html, and the figures' PNG files by name.

    Raises:
        WorkdirError: a line of a file of conversations is broken.
        ConfigError: a file that a tool has added to the results is broken.
    """
    output = workdir if output is None else output
    config_file = workdir / 'config.json'
    settings = json.loads(config_file.read_text(encoding='utf-8')) if config_file.exists() else {}
    looks = looks_of(results.experiment)
    added = read_added(workdir)
    drawings = gallery.drawings_of(results, looks, added)
    pictures = gallery.pngs(drawings)
    gallery.write_figures(pictures, drawings.values(), output)
    drawn = {name: sections.drawn_panels(found) for name, found in drawings.items() if name.startswith('judges/')}
    parts = (
        '' if added.study is None else study.section(results, added.study, looks, output),
        '' if added.judges is None else judges.section(results, added.judges, looks, drawn, output),
        ''
        if added.wildbench is None
        else wildbench.section(added.wildbench, looks, sections.drawn_panels(drawings['wildbench']), output),
    )
    page = sections.report_page(results, settings, looks, drawings, '\n'.join(filter(None, parts)))
    report = write_page(output / REPORT_FILE, page)
    write_page(output / BROWSE_FILE, browse.browse_page(results, kept, looks))
    return report, pictures


def write_page(path: pathlib.Path, text: str) -> pathlib.Path:
    """Replaces a page as a whole."""
    draft = path.with_suffix('.partial')
    with named_errors(path):
        draft.write_text(text, encoding='utf-8', errors='xmlcharrefreplace')  # half of a surrogate pair
        os.replace(draft, path)
    return path


def console_table(results: Results, added: Added | None = None) -> str:
    """The arms, their comparisons and what tools have added as plain text, at most 120 columns wide."""
    lines: list[str] = []
    for measure in results.measures.values():
        lines += ['', measure.words.title, *_arms(results, measure), '', *_differences(measure)]
    if results.matrix:
        lines += ['', *_transfers(results, results.matrix)]
        if results.matrix.causes:
            said = f'Conversations without a score: {summary.causes_text(results.matrix.causes)}.'
            lines += textwrap.wrap(said, CONSOLE_WIDTH)
    if found := verdicts_of(added or Added()):
        more = [f'{len(found) - MAX_LINES} more in {REPORT_FILE}'] if len(found) > MAX_LINES else []
        lines += ['', verdicts.TITLE, *_columns(verdicts.text_rows(found[:MAX_LINES])), *more]
    for sentence in summary.sentences(results):
        lines += ['', *textwrap.wrap(sentence, CONSOLE_WIDTH)]
    return '\n'.join(lines).strip('\n')


def _arms(results: Results, measure: MeasureResult) -> list[str]:
    rows = summary.rows_of(results.experiment, measure)
    strict = any(row.strict_win_rate for row in rows)
    recovered = any(row.gap_recovered for row in rows)
    header = (
        *('assistant', 'score', 'win rate'),
        *(['strict'] if strict else []),
        *(['gap recovered'] if recovered else []),
        'messages',
        *(part.replace('_', ' ') for part in rows[0].parts),
        *rows[0].ends,
    )
    cells = [
        (
            *(row.name, interval(row.score, 3), interval(row.win_rate, 3)),
            *([number(row.strict_win_rate.mean if row.strict_win_rate else None)] if strict else []),
            *([interval(row.gap_recovered)] if recovered else []),
            number(row.turns, 1),
            *(number(part.mean) for part in row.parts.values()),
            *(summary.share(end) for end in row.ends.values()),
        )
        for row in rows
    ]
    lines = [*_columns([header, *cells]), summary.basis(rows, measure.words.unit)]
    if any(row.gap_recovered and row.gap_recovered.low is not None for row in rows):
        lines.append(f'Intervals of gap recovered are over {measure.words.unit}: these checkpoints only.')
    return lines + textwrap.wrap(summary.bounds_text(rows), CONSOLE_WIDTH)


def _differences(measure: MeasureResult) -> list[str]:
    differ = len({pair.score.num_seeds for pair in measure.differences}) > 1  # else a sentence has their number
    header = (
        *('difference', 'significant', measure.words.score, 'p', 'Holm p', 'win rate'),
        *(['seeds'] if differ else []),
        'these checkpoints',
    )
    rows = [
        (
            f'{pair.first} - {pair.second}',
            summary.significance(pair.score, pair.checkpoint_score),
            interval(pair.score, 3, '+'),
            summary.p_value(pair.score.p_value),
            summary.p_value(pair.adjusted_p),
            interval(pair.win_rate, 2, '+'),
            *([str(pair.score.num_seeds)] if differ else []),
            interval(pair.checkpoint_score, 2, '+'),
        )
        for pair in measure.differences
    ]
    more = [f'{len(rows) - MAX_LINES} more in {REPORT_FILE}'] if len(rows) > MAX_LINES else []
    return [*_columns([header, *rows[:MAX_LINES]]), *more] if rows else []


def _transfers(results: Results, found: MatrixResult) -> list[str]:
    columns = matrix.gains_header(results.experiment, found)
    shorter = {matrix.OTHERS: 'other kinds'}
    header = (matrix.titled('gain over initial with', found), *(shorter.get(words, words) for words in columns))
    rows, alone = [header], []
    for arm, transfer in found.transfers.items():
        gains = matrix.gains_of(results, found, arm)
        rows.append((arm, *(matrix.primary_text(found, gains[words]) for words in columns)))
        alone += [arm] if len(transfer.seeds) == 1 else []
    note = f'Intervals of {summary.listed(alone)} are over conversations: of one checkpoint only.' if alone else ''
    return [*_columns(rows), *textwrap.wrap(note, CONSOLE_WIDTH)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned text; the last columns are left out where they do not fit, and named below it."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > CONSOLE_WIDTH:
        widths.pop()
    left_out = ', '.join(rows[0][len(widths) :])
    lines = [
        '  '.join(row[i].ljust(width) if i == 0 else row[i].rjust(width) for i, width in enumerate(widths)).rstrip()
        for row in rows
    ]
    return lines + textwrap.wrap(f'In {REPORT_FILE} too: {left_out}.' if left_out else '', CONSOLE_WIDTH)
