"""The report's figures, drawn with matplotlib's objects: no window, no global figure, equal bytes for equal results.

A figure is one panel, narrow enough for a phone; the page puts panels side by side where there is room. Colours are of
Okabe and Ito's palette, told apart by colour-blind readers. An arm has the same colour, marker and line everywhere.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simrl.evaluation.report.matrix import mean_digits, titled, user_name
from simrl.evaluation.report.summary import Interval, Row, number, rows_of
from simrl.evaluation.results import (
    INITIAL,
    ExperimentResult,
    MatrixResult,
    Results,
    TrainingCurve,
    ValidationCurve,
)

WIDTH = 4.8  # inches
FONT_SIZE = 10.0
PIXELS_PER_INCH = 150  # of a PNG
COLOURS = ('#d55e00', '#b8649a', '#0072b2', '#009e73', '#56b4e9', '#e69f00', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', '*', '<', '>')
LINES = ('solid', 'dashed', 'dotted')  # for matplotlib and CSS
INITIAL_COLOUR, PEOPLE_COLOUR, GRID = '#6b6b6b', '#a17a00', '#dddddd'
PANELS = {
    'reward': 'Reward under its own simulator',
    'validation': 'Validation reward (square: the step that was chosen)',
    'end_signal': 'Share of conversations that the user ended',
    'kl': 'KL to the initial assistant (nats per token)',
    'zero_variance': 'Share of groups without a gradient',
}


@dataclasses.dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    line: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure, and the same in words."""

    figure: Figure
    text: str


def looks_of(experiment: ExperimentResult) -> dict[str, Look]:
    """The look of every arm, every assistant and every measure, by name."""
    looks = {INITIAL: Look(INITIAL_COLOUR, 'X', 'solid')}
    looks |= {measure: Look(PEOPLE_COLOUR, 'P', 'solid') for measure in experiment.measures}
    for position, arm in enumerate(experiment.arms):
        line = LINES[position // len(COLOURS) % len(LINES)]
        looks[arm] = Look(COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)], line)
        looks |= dict.fromkeys(experiment.assistants_of(arm), looks[arm])
    return looks


def drawings_of(results: Results) -> dict[str, list[Drawing]]:
    """The panels of each figure, by name."""
    looks = looks_of(results.experiment)
    drawings = {
        f'win_rates_{name}': win_rates(rows_of(results.experiment, measure), measure.words.score, looks)
        for name, measure in results.measures.items()
    }
    drawings['training'] = training_curves(results, looks)
    if results.matrix is not None:
        drawings['matrix'] = [matrix(results.experiment, results.matrix)]
    return drawings


def win_rates(rows: Sequence[Row], score: str, looks: Mapping[str, Look]) -> list[Drawing]:
    """Win rates against the initial assistant, and mean scores, with their intervals, a line per arm."""
    initial, *arms = rows
    strict = any(row.strict_win_rate for row in arms)
    with _style():
        wins_figure, wins = _panel(1.2 + 0.5 * len(rows), 'Win rate against the initial assistant')
        for position, row in enumerate(arms):
            _interval(wins, row.win_rate, position - 0.13 * strict, looks[row.name], filled=True)
            _interval(wins, row.strict_win_rate, position + 0.2, looks[row.name], filled=False)
        wins.axvline(0.5, color=INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        _rows(wins, [row.name for row in arms])
        if strict:
            wins.set_xlabel('filled: preferred; hollow: higher score, ties ½')
        scores_figure, scores = _panel(1.2 + 0.5 * len(rows), f'Mean {score}')
        for position, row in enumerate(rows):
            _interval(scores, row.score, position, looks[row.name], filled=True)
        scores.axvline(initial.score.mean, color=INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        _rows(scores, [row.name for row in rows])
    said = '; '.join(f'{row.name} {number(row.win_rate.mean)}' for row in arms if row.win_rate)
    means = '; '.join(f'{row.name} {number(row.score.mean)}' for row in rows)
    return [
        Drawing(wins_figure, f'Win rates against the initial assistant: {said}.'),
        Drawing(scores_figure, f'Mean {score}: {means}.'),
    ]


def training_curves(results: Results, looks: Mapping[str, Look]) -> list[Drawing]:
    """Curves over training, a panel each; thick lines are means over seeds, thin ones single seeds."""
    training = results.training.assistants
    groups = {arm: results.experiment.assistants_of(arm) for arm in results.experiment.arms}
    groups = {arm: assistants for arm, assistants in groups.items() if assistants}
    drawings = []
    for field, title in PANELS.items():
        found = {arm: [_curve(training[name], field) for name in names] for arm, names in groups.items()}
        if not any(curve for curves in found.values() for curve in curves):
            continue
        with _style():
            figure, axis = _panel(2.6, title)
            for arm, curves in found.items():
                look = looks[arm]
                style: dict[str, Any] = {'color': look.colour, 'linestyle': look.line}
                if len(curves) > 1:
                    for curve in curves:
                        axis.plot(list(curve), list(curve.values()), linewidth=0.7, alpha=0.35, **style)
                steps = sorted(set.intersection(*map(set, curves)))  # seeds may have been logged at other intervals
                mean = [np.mean([curve[step] for curve in curves]) for step in steps]
                every = max(1, len(steps) // 5)
                style |= {'marker': look.marker, 'markevery': every, 'markersize': 5}
                axis.plot(steps, mean, linewidth=2, label=arm, **style)
                for name, curve in zip(groups[arm], curves, strict=True):
                    validation = training[name].validation
                    if field == 'validation' and validation is not None:
                        chosen = validation.chosen
                        axis.plot(
                            [chosen], [curve[chosen]], marker='s', markersize=9, color=look.colour, fillstyle='none'
                        )
            axis.grid(axis='y', color=GRID, linewidth=0.8)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_xlabel('step')
        said = '; '.join(_course(arm, curves) for arm, curves in found.items())
        drawings.append(Drawing(figure, f'{title}, at the first and last step: {said}.'))
    return drawings


def matrix(experiment: ExperimentResult, result: MatrixResult) -> Drawing:
    """Mean score by assistant (rows) and user (columns, people last), in means over training seeds."""
    arms, values = by_arm(experiment, result)
    users = result.users
    names = [user_name(experiment, user) for user in users]
    low, high = float(values.min()), float(values.max())

    def shown(value: float) -> str:
        return number(value * result.times, mean_digits(result.times))

    high = high if high > low else low + 1
    with _style():
        figure, axis = _panel(1.5 + 0.42 * len(arms), '', width=max(WIDTH, 2.2 + 0.75 * len(users)))
        edges = (np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5)
        axis.pcolormesh(  # drawn as shapes: no bitmap within the SVG
            *edges, values, cmap='cividis', vmin=low, vmax=high, edgecolors='white'
        )
        axis.invert_yaxis()
        for (row, column), value in np.ndenumerate(values):
            ink = 'black' if value > low + 0.48 * (high - low) else 'white'
            axis.text(column, row, shown(float(value)), ha='center', va='center', color=ink)
        axis.set_xticks(range(len(users)), names, rotation=35, ha='left', rotation_mode='anchor')
        axis.set_yticks(range(len(arms)), arms)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if result.people is not None and len(users) > 1:
            axis.axvline(users.index(result.people) - 0.5, color='white', linewidth=4)
    said = '; '.join(
        f'{name} with {", ".join(f"{u} {shown(float(x))}" for u, x in zip(names, row, strict=True))}'
        for name, row in zip(arms, values, strict=True)
    )
    return Drawing(figure, f'Mean {titled(result.score, result)} by assistant and user: {said}.')


def by_arm(experiment: ExperimentResult, result: MatrixResult) -> tuple[list[str], np.ndarray]:
    """'initial' and the arms, and [arms, users] mean scores, in means over training seeds."""
    means = np.array(result.mean, np.float64)
    groups = {INITIAL: [INITIAL]} | {arm: experiment.assistants_of(arm) for arm in experiment.arms}
    groups = {arm: names for arm, names in groups.items() if names}
    columns = [[result.assistants.index(name) for name in names] for names in groups.values()]
    return list(groups), np.array([means[:, own].mean(1) for own in columns])


def svg(drawing: Drawing, name: str) -> str:
    """The figure as an element of a page, its ids starting with `name`: a page holds several."""
    file = io.StringIO()
    with _style(name):
        drawing.figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    text = file.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
    return re.sub(r'( id="| xlink:href="#|url\(#)', rf'\g<1>{name}-', text)


def png(drawing: Drawing) -> bytes:
    """The figure as a PNG, with a legend where its lines have labels: the page has one for all panels."""
    file = io.BytesIO()
    handles, labels = drawing.figure.axes[0].get_legend_handles_labels()
    with _style():
        if labels:
            drawing.figure.legend(handles, labels, loc='outside upper center', ncols=2, frameon=False, handlelength=3)
        drawing.figure.savefig(file, format='png', dpi=PIXELS_PER_INCH, metadata={'Software': None})
    return file.getvalue()


def _style(salt: str = '') -> contextlib.AbstractContextManager[None]:
    """matplotlib's settings while a figure is drawn or written; `salt` fixes the ids in an SVG."""
    return matplotlib.rc_context(
        {
            'font.size': FONT_SIZE,
            'font.family': 'DejaVu Sans',  # comes with matplotlib: the same glyphs everywhere
            'svg.fonttype': 'path',
            'svg.hashsalt': salt,
            'axes.spines.top': False,
            'axes.spines.right': False,
            'axes.edgecolor': '#888888',
            'axes.titlesize': FONT_SIZE + 1,
            'axes.titlelocation': 'left',
        }
    )


def _panel(height: float, title: str, *, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout='constrained')
    axis = figure.subplots()
    axis.set_title(title)
    return figure, axis


def _interval(axis: Axes, estimate: Interval | None, position: float, look: Look, *, filled: bool) -> None:
    if estimate is None:
        return
    if estimate.low is not None and estimate.high is not None:
        axis.plot([estimate.low, estimate.high], [position, position], color=look.colour, linewidth=2 if filled else 1)
    face = look.colour if filled else 'white'
    style: dict[str, Any] = {'marker': look.marker, 'markersize': 7, 'color': look.colour, 'markerfacecolor': face}
    axis.plot([estimate.mean], [position], zorder=3, **style)


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis='y', length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis='x', color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _curve(curve: TrainingCurve, field: str) -> dict[int, float]:
    """step -> value, where there is one."""
    steps, values = curve.step, getattr(curve, field) or ()
    if isinstance(values, ValidationCurve):
        steps, values = values.step, values.reward
    return {step: value for step, value in zip(steps, values, strict=False) if value is not None}


def _course(arm: str, curves: Sequence[Mapping[int, float]]) -> str:
    ends = [list(curve.values()) for curve in curves if curve]
    first, last = (number(float(np.mean([values[at] for values in ends])) if ends else None) for at in (0, -1))
    return f'{arm} {first} to {last}'
