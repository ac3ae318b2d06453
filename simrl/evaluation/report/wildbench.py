"""A run's assistants on WildBench: numbers of each judge and panel, by group of tasks, and figures of each metric."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import drawing, page, summary
from simrl.evaluation.report.drawing import Drawing, Line, Look, Mark, bounds_of, look_at, look_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import number
from simrl.evaluation.report.tables import estimate_cell, votes_cell
from simrl.evaluation.results.judges import PANEL
from simrl.evaluation.results.wildbench import Metric, WildBenchNumber, WildBenchResult
from simrl.evaluation.statistics import Estimate

TITLE = 'On the tasks of WildBench'
ABOUT = (
    'Checklist: the share of a task’s questions that a reply satisfies; the panel’s is by the majority for each '
    'question. Win rate: more satisfied questions win a task, ties ½. WB-Score: from 1 to 10. WB-Reward: from −1 to 1 '
    'against a reference, the mean of both orders. Intervals are over tasks, of these checkpoints only: other training '
    'seeds may differ. Lost and won: all tasks that are not judged at the lowest value, and at the highest. Task '
    'macro: the leaderboard’s weighted mean over groups of tasks, of WB-Score from −8 to 10. '
)
VOTES = (
    'Independent votes: the number of judges without anything in common whose verdicts would vary as much; what judges '
    'are right about together counts as what they share. '
)
SETTINGS = 'Settings are those that are not the defaults: with them a number is read otherwise than is said here. '
GROUPS = 'A task counts in each of its groups. Checklist: the panel’s; WB-Score from −8 to 10. '
PANEL_LOOK = Look(drawing.SOFT, 'X', 'solid')
TITLES: Mapping[Metric, str] = {
    'checklist': 'Share of the checklist that is satisfied',
    'win rate': 'Win rate by satisfied checklist questions',
    'WB-Score': 'WB-Score (1 to 10)',
    'WB-Reward': 'WB-Reward (−1 to 1)',
}
GROUP_TITLES: Mapping[Metric, str] = {'WB-Score': 'WB-Score (−8 to 10)'}
REFERENCES: Mapping[Metric, float] = {'win rate': 0.5, 'WB-Reward': 0.0}
COLUMNS = (
    *('assistant', 'against', 'judge', 'mean', 'low', 'high', 'lost', 'won', 'tasks', 'judged', 'left_out'),
    *('macro', 'macro_low', 'macro_high'),
)
GROUP_COLUMNS = ('group', 'assistant', 'against', 'judge', 'mean', 'low', 'high', 'tasks')


def section(found: WildBenchResult, looks: Mapping[str, Look], drawn: str, output: pathlib.Path) -> str:
    """The section of the report.

    Args:
        drawn: the figures.
        output: the folder that the report is written into, for links.
    """
    every = [of for numbers in found.outputs.values() for of in numbers]
    without, settings, votes = (any(getattr(of, field) for of in every) for field in ('left_out', 'settings', 'votes'))
    header = (
        *('assistant', 'metric', 'judge', 'mean', 'lost', 'won', 'tasks', 'judged', 'task macro'),
        *(['independent votes'] if votes else []),
        *(['left out'] if without else []),
        *(['settings'] if settings else []),
        *(['verdicts'] if len(found.outputs) > 1 else []),
    )
    rows: list[Sequence[str | Cell]] = [
        (
            *_named(of, looks),
            estimate_cell(of.estimate),
            *map(number, (of.lost, of.won)),
            f'{of.tasks:,}',
            f'{_judged(of):,}',
            Cell(number(of.macro), under='' if of.macro_low is None else summary.bounds(of.macro_low, of.macro_high)),
            *([votes_cell(of.votes)] if votes else []),
            *([Cell(summary.causes_text(of.left_out) if of.left_out else '–', words=True)] if without else []),
            *([Cell(_settings(of) or '–', words=True)] if settings else []),
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
    about = page.paragraph(ABOUT + VOTES * votes + SETTINGS * settings, 'note')
    return page.section(TITLE, drawn, page.table(header, rows), about, *_groups(every, looks), *links)


def _groups(numbers: Sequence[WildBenchNumber], looks: Mapping[str, Look]) -> list[str]:
    """The numbers by group of tasks; nothing where there is none."""
    kept = [of for of in numbers if of.groups]
    groups = list(dict.fromkeys(group for of in kept for group in of.groups))
    rows: list[Sequence[str | Cell]] = [
        (*_named(of, looks), *(_of_group(of.groups.get(group)) for group in groups)) for of in kept
    ]
    if not rows:
        return []
    table = page.table(('assistant', 'metric', 'judge', *groups), rows)
    return [page.details('By group of tasks', table, page.paragraph(GROUPS, 'note'))]


def _named(of: WildBenchNumber, looks: Mapping[str, Look]) -> tuple[Cell, str, Cell]:
    over = '' if of.against is None else f'over {of.against}'
    return Cell(of.assistant, over, dot=look_of(looks, of.assistant).colour), of.metric, Cell(of.judge, words=True)


def _of_group(found: Estimate | None) -> str | Cell:
    if found is None:
        return '–'
    cell = estimate_cell(found)
    return dataclasses.replace(cell, under=f'{cell.under}\nn = {found.num_observations:,}')


def _settings(of: WildBenchNumber) -> str:
    return ', '.join(f'{name} {value}' for name, value in of.settings.items())


def drawings(found: WildBenchResult) -> list[Drawing]:
    """A figure of each metric, and of its numbers by group of tasks."""
    numbers = [of for own in found.outputs.values() for of in own]
    by_metric = {metric: [of for of in numbers if of.metric == metric] for metric in TITLES}
    return [one for metric, own in by_metric.items() if own for one in (_drawing(metric, own), *_by_group(metric, own))]


def _by_group(metric: Metric, numbers: Sequence[WildBenchNumber]) -> list[Drawing]:
    """A figure by group of tasks for each judge: a line of each group, with the numbers of all assistants."""
    found: list[Drawing] = []
    for judge in dict.fromkeys(of.judge for of in numbers if of.groups):
        own = [of for of in numbers if of.judge == judge and of.groups]
        each = dict[str, Look]()
        for position, of in enumerate(own):
            name = ' '.join(_name(of).split())
            # Of one assistant there may be several files of verdicts.
            each[f'{name} ({position + 1})' if name in each else name] = look_at(position)
        groups = list(dict.fromkeys(group for of in own for group in of.groups))
        sizes = [of.groups[group].num_observations for group in groups for of in own if group in of.groups]
        title = f'{GROUP_TITLES.get(metric, TITLES[metric])} by group of tasks: {judge}'
        caption = f'n = {summary.span(sizes)} judged tasks of a group. {_intervals(own)} {_lost(own)}'
        lines = [
            Line(group, [Mark(of.groups.get(group), look) for of, look in zip(own, each.values(), strict=True)])
            for group in groups
        ]
        draw = drawing.intervals(lines, title, caption, reference=REFERENCES.get(metric), names=each)
        cells = [
            (group, of.assistant, of.against, judge, *bounds_of(of.groups[group]), of.groups[group].num_observations)
            for group in groups
            for of in own
            if group in of.groups
        ]
        name = f'{_file(metric)}_groups{f"_{len(found) + 1}" if found else ""}'
        found.append(Drawing(name, f'{title}. {caption}', GROUP_COLUMNS, cells, draw))
    return found


def _intervals(numbers: Sequence[WildBenchNumber]) -> str:
    levels = {of.estimate.level for of in numbers if of.estimate}
    return f'{f"{levels.pop():.0%} intervals" if levels else "Intervals"} are over tasks: these checkpoints only.'


def _lost(numbers: Sequence[WildBenchNumber]) -> str:
    lost, total = sum(of.tasks - _judged(of) for of in numbers), sum(of.tasks for of in numbers)
    return f'Without a verdict: {f"{lost:,} of {total:,}, left out" if lost else "none"}.'


def _file(metric: Metric) -> str:
    return f'wildbench_{metric.lower().replace(" ", "_").replace("-", "_")}'


def _drawing(metric: Metric, numbers: Sequence[WildBenchNumber]) -> Drawing:
    """A line of each assistant, with the numbers of the panel and of each judge."""
    judges = list(dict.fromkeys(of.judge for of in numbers if of.judge != PANEL))
    each = {PANEL: PANEL_LOOK} if any(of.judge == PANEL for of in numbers) else {}
    each |= {judge: look_at(position) for position, judge in enumerate(judges)}
    by_name: dict[str, list[Mark]] = {}
    for of in numbers:
        by_name.setdefault(_name(of), []).append(Mark(of.estimate, each[of.judge]))
    lines = [Line(name, marks) for name, marks in by_name.items()]
    caption = f'n = {summary.span(of.tasks for of in numbers)} tasks. {_intervals(numbers)} {_lost(numbers)}'
    draw = drawing.intervals(lines, TITLES[metric], caption, reference=REFERENCES.get(metric), names=each)
    known = [(of, of.estimate) for of in numbers if of.estimate]
    said = '; '.join(f'{_name(of)} {number(estimate.mean)} ({of.judge})' for of, estimate in known).replace('\n', ' ')
    cells = [
        (
            *(of.assistant, of.against, of.judge, *bounds_of(of.estimate)),
            *(of.lost, of.won, of.tasks, _judged(of), sum(of.left_out.values())),
            *(of.macro, of.macro_low, of.macro_high),
        )
        for of in numbers
    ]
    return Drawing(_file(metric), f'{TITLES[metric]}: {said}. {caption}', COLUMNS, cells, draw)


def _name(of: WildBenchNumber) -> str:
    return of.assistant if of.against is None else f'{of.assistant}\nover {of.against}'


def _judged(of: WildBenchNumber) -> int:
    return of.estimate.num_observations if of.estimate else 0
