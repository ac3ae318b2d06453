"""One page for several runs: the utility of every simulator, by what is known of it, and each run's curves and matrix.

Nothing here tests a difference between runs: they need not share the initial assistant, the people or the score. The
page lists the settings in which they differ.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from simrl.evaluation.report import drawing, figures, gallery, lengths, page, summary, utility, verdicts
from simrl.evaluation.report.browse import BROWSE_FILE, REPORT_FILE
from simrl.evaluation.report.drawing import MARKERS, Drawing, Look, bounds_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.report import write_page
from simrl.evaluation.report.sections import drawn_panels
from simrl.evaluation.report.summary import Row, number
from simrl.evaluation.report.tables import estimate_cell
from simrl.evaluation.results.files import Results, read_added
from simrl.evaluation.results.measures import MeasureResult
from simrl.evaluation.verdicts import verdicts_of

TITLE = 'User simulators in several runs'
ABOUT = (
    'Each run has an initial assistant, people and simulators of its own; a number is comparable with that of another '
    'run as far as they share these. Nothing here tests a difference between runs.'
)
WIN_RATE = (
    'Win rate: the mean probability that the assistants of an arm are preferred to the run’s initial assistant on the '
    'same example. Its intervals are over training seeds; of one seed, over examples: that checkpoint only. “Spread of '
    'all arms”: the same mean, with the spread between runs estimated from all arms of the run at once, and taken for '
    'the same in all of them: it tells more of few seeds.'
)
ABSENT = '–'

Runs = Mapping[str, tuple[pathlib.Path, Results]]  # by name: the run directory, and what is in it


def write_several(runs: Runs, output: pathlib.Path) -> pathlib.Path:
    """Writes the page and its figures into a folder; returns the page's path.

    Args:
        runs: at least two.
        output: a folder; made where there is none.

    Raises:
        ConfigError: a file that a tool has added to the results of a run is broken.
    """
    added = [(name, verdict) for name, (folder, _) in runs.items() for verdict in verdicts_of(read_added(folder))]
    looks = _looks(runs)
    drawings = {
        'utility': [win_rates(runs, looks)],
        'known': _by_what_is_known(runs, looks),
        **{name: _of_run(results, looks[name], name) for name, (_, results) in runs.items()},
    }
    gallery.write_figures(gallery.pngs(drawings), drawings.values(), output)
    parts = [
        f'<h1>{page.escape(TITLE)}</h1>',
        page.paragraph(ABOUT),
        page.section('Runs', *_runs(runs)),
        page.section('Settings that differ', *_differences(runs)),
        page.section(
            'Utility', drawn_panels(drawings['utility']), drawn_panels(drawings['known']), *_utilities(runs, looks)
        ),
        *([page.section(verdicts.TITLE, *verdicts.parts(added))] if added else []),
        *(
            page.section(
                name, *_run(folder, results, looks[name], drawn_panels(drawings[name], f'run-{number}-'), output)
            )
            for number, (name, (folder, results)) in enumerate(runs.items())
        ),
    ]
    return write_page(output / REPORT_FILE, page.document(TITLE, parts))


def names_of(folders: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Run directories by name: the end of the path, as long as it takes to tell them apart.

    Raises:
        ValueError: a folder is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder in resolved if resolved.count(folder) > 1]:
        raise ValueError(f'expected different run directories, found {twice[0]} twice')
    length = 1
    while len({folder.parts[-length:] for folder in resolved}) < len(resolved):
        length += 1
    return {'/'.join(folder.parts[-length:]): folder for folder in resolved}


def _looks(runs: Runs) -> dict[str, dict[str, Look]]:
    """Looks by run; an arm's name has the same one in all of them."""
    arms = list(dict.fromkeys(arm for _, results in runs.values() for arm in results.experiment.arms))
    found = {}
    for name, (_, results) in runs.items():
        found[name] = drawing.looks_of(results.experiment)
        for arm in results.experiment.arms:
            names = [arm, *results.experiment.assistants_of(arm)]
            found[name] |= dict.fromkeys(names, drawing.look_at(arms.index(arm)))
    return found


def _headline(results: Results) -> tuple[MeasureResult, list[Row]]:
    """The first measure, and a row for each of its arms, the initial assistant first."""
    measure = results.measures[results.experiment.measures[0]]
    return measure, summary.rows_of(results.experiment, measure)


def _caption(runs: Runs) -> str:
    headlines = [_headline(results) for _, results in runs.values()]
    sizes = ', '.join(dict.fromkeys(summary.size(measure) for measure, _ in headlines))
    seeds = summary.num_seeds(row.num_seeds for _, rows in headlines for row in rows if row.num_seeds)
    lost = sum(sum(found.causes.values()) for measure, _ in headlines for found in measure.assistants.values())
    return (
        f'n = {sizes}; {seeds} an arm. Intervals are over training seeds, of one seed over examples. '
        f'Examples without a score: {f"{lost:,}, left out" if lost else "none"}.'
    )


def win_rates(runs: Runs, looks: Mapping[str, Mapping[str, Look]]) -> Drawing:
    """Win rates of all arms of all runs."""
    lines = [(name, row) for name, (_, results) in runs.items() for row in _headline(results)[1][1:]]
    title, caption = 'Win rate against the initial assistant of the run', _caption(runs)

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 0.9 + 0.3 * len(lines), title, caption)
        for position, (name, row) in enumerate(lines):
            drawing.draw_interval(axis, row.win_rate, position, looks[name][row.name], filled=True)
            if position and lines[position - 1][0] != name:
                axis.axhline(position - 0.5, color='#888888', linewidth=0.8)
        axis.axvline(0.5, color=drawing.INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        drawing.name_rows(axis, [f'{row.name} ({name})' for name, row in lines])
        return figure

    said = '; '.join(f'{row.name} of {name} {number(row.win_rate.mean)}' for name, row in lines if row.win_rate)
    cells = [(name, row.name, row.num_seeds, *bounds_of(row.win_rate)) for name, row in lines]
    return Drawing(
        'win_rates', f'{title}: {said}. {caption}', ('run', 'arm', 'seeds', 'win_rate', 'low', 'high'), cells, draw
    )


def _by_what_is_known(runs: Runs, looks: Mapping[str, Mapping[str, Look]]) -> list[Drawing]:
    """Utility of all arms against what is known of their simulators: a colour an arm's name, a marker a run."""
    found = {
        against: [
            dataclasses.replace(point, look=dataclasses.replace(point.look, marker=MARKERS[number % len(MARKERS)]))
            for number, (name, (_, results)) in enumerate(runs.items())
            for point in utility.points(results, against, looks[name], f' ({name})')
        ]
        for against in utility.AGAINST
    }
    caption = _caption(runs)
    return [utility.scatter(against, points, caption) for against, points in found.items() if utility.differ(points)]


def _of_run(results: Results, looks: Mapping[str, Look], name: str) -> list[Drawing]:
    """The reward over training, ends and the matrix of a run; their files' names end with the run's."""
    measure, rows = _headline(results)
    found = [one for one in figures.training_curves(results, looks) if one.name == 'training_reward']
    found.append(lengths.ends('ends', rows, summary.sample(measure, rows)))
    if results.matrix is not None:
        found.append(figures.matrix(results.experiment, results.matrix))
    return [Drawing(f'{one.name}_{name.replace("/", "_")}', one.text, one.columns, one.rows, one.draw) for one in found]


def _runs(runs: Runs) -> list[str]:
    rows: list[Sequence[str | Cell]] = []
    for name, (_, results) in runs.items():
        measure, of_arms = _headline(results)
        seeds = summary.span(row.num_seeds for row in of_arms if row.num_seeds)
        arms = ', '.join(row.name for row in of_arms[1:])
        rows.append((name, seeds, summary.size(measure), measure.words.score, Cell(arms, words=True)))
    return [page.table(('run', 'training seeds', 'measured on', 'score', 'arms'), rows)]


def _differences(runs: Runs) -> list[str]:
    """The fields of config.json in which runs differ."""
    settings: dict[str, dict[str, str]] = {}
    without = []
    for name, (folder, _) in runs.items():
        file = folder / 'config.json'
        settings[name] = dict(page.flat(json.loads(file.read_text(encoding='utf-8')))) if file.exists() else {}
        without += [] if file.exists() else [str(file)]
    fields = dict.fromkeys(field for found in settings.values() for field in found)
    values = {field: [found.get(field, ABSENT) for found in settings.values()] for field in fields}
    rows: list[Sequence[str | Cell]] = [
        (field, *(Cell(value, words=True) for value in found)) for field, found in values.items() if len({*found}) > 1
    ]
    notes = [page.paragraph(f'Not there: {", ".join(without)}.', 'note')] if without else []
    if not rows:
        return [page.paragraph('None: the runs have the same config.json.', 'note'), *notes]
    return [page.details(f'{len(rows)} fields of config.json', page.table(('field', *settings), rows)), *notes]


def _utilities(runs: Runs, looks: Mapping[str, Mapping[str, Look]]) -> list[str]:
    rows: list[Sequence[str | Cell]] = []
    for name, (_, results) in runs.items():
        measure, of_arms = _headline(results)
        for row in of_arms:
            arm, over_seeds = results.experiment.arms.get(row.name), measure.arms.get(row.name)
            others = over_seeds.win_rate_intervals if over_seeds else None
            size = utility.short(arm.parameters) if arm is not None and arm.parameters is not None else ABSENT
            rows.append(
                (
                    Cell(row.name, under=name, dot=looks[name][row.name].colour),
                    '' if arm is None else arm.kind,
                    size,
                    str(row.num_seeds) if row.num_seeds else ABSENT,
                    *map(estimate_cell, (row.win_rate, others.pooled if others else None, row.score)),
                    estimate_cell(row.gain, 3, '+'),
                )
            )
    header = ('assistant', 'kind', 'parameters', 'seeds', 'win rate', 'spread of all arms', 'score', 'gain')
    return [page.table(header, rows), page.paragraph(WIN_RATE, 'note')]


def _run(
    folder: pathlib.Path, results: Results, looks: Mapping[str, Look], drawn: str, output: pathlib.Path
) -> list[str]:
    links = [
        page.link(os.path.relpath(folder / file, output.resolve()), text)
        for file, text in ((REPORT_FILE, 'The report of this run'), (BROWSE_FILE, 'Its conversations'))
        if (folder / file).exists()
    ]
    arms = [arm for arm in results.experiment.arms if results.experiment.assistants_of(arm)]
    header, rows = lengths.table(results, looks)
    return [
        *links,
        *(page.paragraph(text) for text in summary.sentences(results)),
        page.legend({arm: (looks[arm].colour, looks[arm].line) for arm in arms}),
        drawn,
        *([page.table(header, rows), page.paragraph(lengths.ABOUT, 'note')] if rows else []),
    ]
