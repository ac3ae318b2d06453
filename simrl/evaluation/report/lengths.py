"""Lengths and endings: does the reward grow because messages do, and how do conversations end?

Figures and rows of a table, over training and in the evaluation, by arm. Results of an earlier version have no lengths.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simrl.evaluation.report import drawing, figures, summary
from simrl.evaluation.report.drawing import Drawing, Look
from simrl.evaluation.report.figures import Values
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Row, Shown, mean_of_known, number, share
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.training import TrainingCurve
from simrl.evaluation.statistics import spearman

PANELS: Mapping[str, str] = {  # fields of `TrainingCurve`, and the titles of their panels
    'message_tokens': 'Mean tokens of the assistant’s messages',
    'truncated': 'Share of its messages that were cut at max_new_tokens',
}
ENDS = {  # reasons for ending beside the user's own, which is among the curves
    'turns': 'Share of conversations whose turns ran out',
    'budget': 'Share of conversations whose context was full',
    'failure': 'Share of conversations that a failure ended',
}
SHADES = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00')
TOO_SMALL = 0.04  # shares that have no room for their number
ENDS_OF_TRAINING = 5  # the first and the last of so many parts of a run are compared
ABOUT = (
    'The first and the last fifth of training, means over seeds. ρ of steps: the rank correlation of a step’s mean '
    'reward with the mean length of its messages; of conversations: that of the score with all tokens of the '
    'assistant, in the evaluation. A ρ near 1 over steps says that reward and length grew together, not that one '
    'caused the other.'
)


def drawings(results: Results, looks: Mapping[str, Look]) -> list[Drawing]:
    """Panels over training."""
    read = {
        f'training_{field}': (title, functools.partial(figures.values_of, field=field))
        for field, title in PANELS.items()
    } | {f'training_end_{end}': (title, functools.partial(_ended, end=end)) for end, title in ENDS.items()}
    found = {name: (title, figures.curves_of(results, of)) for name, (title, of) in read.items()}
    panels = [
        figures.over_training(name, title, curves, results, looks)
        for name, (title, curves) in found.items()
        if any(value for values in curves.values() for curve in values for value in curve.values())
    ]
    paths = {arm: path for arm, path in _paths(results).items() if path}
    return [*panels, *([reward_by_length(results, paths, looks)] if paths else [])]


def _ended(curve: TrainingCurve, end: str) -> Values:
    return figures.present(curve.step, curve.ends.get(end, ()))


def _paths(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Arm -> (mean tokens of a message, mean reward) of its steps, in means over seeds."""
    lengths, rewards = (
        figures.curves_of(results, functools.partial(figures.values_of, field=field))
        for field in ('message_tokens', 'reward')
    )
    paths = {}
    for arm in rewards:
        length, reward = (figures.mean_over_seeds(of[arm]) for of in (lengths, rewards))
        paths[arm] = [(length[step], reward[step]) for step in length if step in reward]
    return paths


def reward_by_length(
    results: Results, paths: Mapping[str, Sequence[tuple[float, float]]], looks: Mapping[str, Look]
) -> Drawing:
    """The course of each arm's training in the plane of length and reward."""
    title = 'Reward by length of messages, over training (hollow: first step, filled: last)'
    curves = figures.curves_of(results, functools.partial(figures.values_of, field='reward'))
    caption = figures.training_caption(results, curves, 'averaged')

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 2.5, title, caption)
        for arm, path in paths.items():
            lengths, rewards = zip(*path, strict=True)
            look = looks[arm]
            axis.plot(lengths, rewards, color=look.colour, linestyle=look.line, linewidth=1, alpha=0.6)
            axis.plot(lengths[:1], rewards[:1], zorder=3, **drawing.marker_style(look, filled=False))
            axis.plot(lengths[-1:], rewards[-1:], zorder=4, label=arm, **drawing.marker_style(look), linestyle='none')
        axis.grid(color=drawing.GRID, linewidth=0.8)
        axis.set_xlabel('mean tokens of the assistant’s messages')
        axis.set_ylabel('mean reward')
        return figure

    said = '; '.join(
        f'{arm} from {number(path[0][0], 1)} tokens and {number(path[0][1])} to {number(path[-1][0], 1)} and '
        f'{number(path[-1][1])}'
        for arm, path in paths.items()
    )
    cells = [(arm, *point) for arm, path in paths.items() for point in path]
    return Drawing('reward_by_length', f'{title}: {said}. {caption}', ('arm', 'message_tokens', 'reward'), cells, draw)


def ends(name: str, rows: Sequence[Row], sample: str) -> Drawing:
    """The reasons for ending of each assistant's conversations in the evaluation, as parts of a bar."""
    kinds = list(rows[0].ends)
    title, caption = 'How conversations end', f'{sample} No intervals here.'

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 0.7 + 0.42 * len(rows), title, caption)
        for number_of_kind, kind in enumerate(kinds):
            lefts = [sum(row.ends[before] for before in kinds[:number_of_kind]) for row in rows]
            colour = SHADES[number_of_kind % len(SHADES)]
            shares = [row.ends[kind] for row in rows]
            bar: dict[str, Any] = {
                'color': colour,
                'height': 0.62,
                'edgecolor': 'white',
                'label': summary.end_words(kind),
            }
            axis.barh(range(len(rows)), shares, left=lefts, **bar)
            for position, (left, found) in enumerate(zip(lefts, shares, strict=True)):
                if found >= TOO_SMALL:
                    ink = 'black' if colour in ('#e69f00', '#56b4e9', '#cc79a7') else 'white'
                    axis.text(left + found / 2, position, share(found), ha='center', va='center', color=ink, fontsize=9)
        drawing.name_rows(axis, [row.name for row in rows])
        axis.set_xlim(0, 1)
        axis.grid(visible=False)
        drawing.legend(axis)
        return figure

    said = '; '.join(
        f'{row.name} {", ".join(f"{summary.end_words(kind)} {share(x)}" for kind, x in row.ends.items())}'
        for row in rows
    )
    cells: list[tuple[str | float, ...]] = [(row.name, *(row.ends[kind] for kind in kinds)) for row in rows]
    return Drawing(name, f'{title}: {said}. {caption}', ('assistant', *kinds), cells, draw)


def table(results: Results, looks: Mapping[str, Look]) -> tuple[tuple[str, ...], list[Sequence[str | Cell]]]:
    """Header and rows: each arm over training, and in the first measure's evaluation. No rows without lengths."""
    measure = results.measures[results.experiment.measures[0]]
    evaluated = {row.name: row for row in summary.rows_of(results.experiment, measure)}
    rows: list[Sequence[str | Cell]] = []
    for arm, names in ((arm, results.experiment.assistants_of(arm)) for arm in results.experiment.arms):
        curves = [results.training.assistants[name] for name in names]
        row = evaluated.get(arm)
        if row is None or (row.message_tokens is None and not any(curve.message_tokens for curve in curves)):
            continue
        tokens, rewards, cut = (
            [figures.values_of(curve, field) for curve in curves] for field in ('message_tokens', 'reward', 'truncated')
        )
        together = [
            spearman([length[x] for x in shared], [reward[x] for x in shared])
            for length, reward in zip(tokens, rewards, strict=True)
            if (shared := sorted(length.keys() & reward.keys()))
        ]
        rows.append(
            (
                Cell(arm, dot=looks[arm].colour),
                _from_to(tokens, lambda x: number(x, 1)),
                _from_to(rewards, number),
                number(mean_of_known(together)),
                _from_to(cut, lambda x: '–' if x is None else f'{x:.1%}'),
                number(row.message_tokens, 1),
                number(row.length_correlation),
            )
        )
    header = (
        *('arm', 'tokens a message, in training', 'reward', 'ρ of steps', 'cut'),
        *('tokens a message, in the evaluation', 'ρ of conversations'),
    )
    return header, rows


def _from_to(curves: Sequence[Values], shown: Shown) -> str:
    """The means of a run's first and last part, over seeds."""
    parts: tuple[list[float], list[float]] = ([], [])
    for curve in filter(None, curves):
        values = list(curve.values())
        some = -(-len(values) // ENDS_OF_TRAINING)
        parts[0].append(float(np.mean(values[:some])))
        parts[1].append(float(np.mean(values[-some:])))
    first, last = map(mean_of_known, parts)
    return '–' if first is None else f'{shown(first)} → {shown(last)}'
