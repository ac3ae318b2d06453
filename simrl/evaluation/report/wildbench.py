"""A run's assistants on WildBench: numbers of each judge and panel, and figures, one for each metric."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import drawing, page, summary
from simrl.evaluation.report.drawing import Drawing, Line, Look, Mark, bounds_of, look_at, look_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import number
from simrl.evaluation.report.tables import estimate_cell
from simrl.evaluation.results.judges import PANEL
from simrl.evaluation.results.wildbench import Metric, WildBenchNumber, WildBenchResult

TITLE = 'On the tasks of WildBench'
ABOUT = (
    'Checklist: the share of a task’s questions that a reply satisfies; the panel’s is by the majority for each '
    'question. Win rate: more satisfied questions win a task, ties ½. WB-Score: from 1 to 10. WB-Reward: from −1 to 1 '
    'against a reference, both orders averaged. Intervals are over tasks, of these checkpoints only: other training '
    'seeds may differ. Lost and won: all tasks that are not judged at the lowest value, and at the highest. Task '
    'macro: the leaderboard’s weighted mean over groups of tasks, of WB-Score from −8 to 10. '
)
PANEL_LOOK = Look(drawing.SOFT, 'X', 'solid')
TITLES: Mapping[Metric, str] = {
    'checklist': 'Share of the checklist that is satisfied',
    'win rate': 'Win rate by satisfied checklist questions',
    'WB-Score': 'WB-Score (1 to 10)',
    'WB-Reward': 'WB-Reward (−1 to 1)',
}
REFERENCES: Mapping[Metric, float] = {'win rate': 0.5, 'WB-Reward': 0.0}
COLUMNS = ('assistant', 'against', 'judge', 'mean', 'low', 'high', 'lost', 'won', 'tasks', 'judged', 'macro')


def section(found: WildBenchResult, looks: Mapping[str, Look], drawn: str, output: pathlib.Path) -> str:
    """The section of the report.

    Args:
        drawn: the figures.
        output: the folder that the report is written into, for links.
    """
    header = (
        *('assistant', 'metric', 'judge', 'mean', 'lost', 'won', 'tasks', 'judged', 'task macro'),
        *(['verdicts'] if len(found.outputs) > 1 else []),
    )
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(
                of.assistant,
                under='' if of.against is None else f'over {of.against}',
                dot=look_of(looks, of.assistant).colour,
            ),
            of.metric,
            Cell(of.judge, words=True),
            estimate_cell(of.estimate),
            *map(number, (of.lost, of.won)),
            f'{of.tasks:,}',
            f'{_judged(of):,}',
            number(of.macro),
            *([Cell(place, words=True)] if len(found.outputs) > 1 else []),
        )
        for place, numbers in found.outputs.items()
        for of in numbers
    ]
    links = [
        page.link(os.path.relpath(place, output.resolve()), f'Verdicts: {pathlib.Path(place).name}')
        for place in found.outputs
        if pathlib.Path(place).exists()  # a win rate has no file of its own
    ]
    return page.section(TITLE, drawn, page.table(header, rows), page.paragraph(ABOUT, 'note'), *links)


def drawings(found: WildBenchResult) -> list[Drawing]:
    """A figure of each metric."""
    numbers = [of for own in found.outputs.values() for of in own]
    return [
        _drawing(metric, [of for of in numbers if of.metric == metric])
        for metric in TITLES
        if any(of.metric == metric for of in numbers)
    ]


def _drawing(metric: Metric, numbers: Sequence[WildBenchNumber]) -> Drawing:
    """A line of each assistant, with the numbers of the panel and of each judge."""
    judges = list(dict.fromkeys(of.judge for of in numbers if of.judge != PANEL))
    each = {PANEL: PANEL_LOOK} if any(of.judge == PANEL for of in numbers) else {}
    each |= {judge: look_at(position) for position, judge in enumerate(judges)}
    by_name: dict[str, list[Mark]] = {}
    for of in numbers:
        by_name.setdefault(_name(of), []).append(Mark(of.estimate, each[of.judge]))
    lines = [Line(name, marks) for name, marks in by_name.items()]
    lost = sum(of.tasks - _judged(of) for of in numbers)
    total = sum(of.tasks for of in numbers)
    levels = {of.estimate.level for of in numbers if of.estimate}
    intervals = f'{levels.pop():.0%} intervals' if levels else 'Intervals'
    caption = (
        f'n = {summary.span(of.tasks for of in numbers)} tasks. {intervals} are over tasks: these checkpoints only. '
        f'Without a verdict: {f"{lost:,} of {total:,}, left out" if lost else "none"}.'
    )
    draw = drawing.intervals(lines, TITLES[metric], caption, reference=REFERENCES.get(metric), names=each)
    known = [(of, of.estimate) for of in numbers if of.estimate]
    said = '; '.join(f'{_name(of)} {number(estimate.mean)} ({of.judge})' for of, estimate in known).replace('\n', ' ')
    cells = [
        (
            *(of.assistant, of.against, of.judge, *bounds_of(of.estimate)),
            *(of.lost, of.won, of.tasks, _judged(of), of.macro),
        )
        for of in numbers
    ]
    name = f'wildbench_{metric.lower().replace(" ", "_").replace("-", "_")}'
    return Drawing(name, f'{TITLES[metric]}: {said}. {caption}', COLUMNS, cells, draw)


def _name(of: WildBenchNumber) -> str:
    return of.assistant if of.against is None else f'{of.assistant}\nover {of.against}'


def _judged(of: WildBenchNumber) -> int:
    return of.estimate.num_observations if of.estimate else 0
