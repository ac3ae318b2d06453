"""The report's figures, drawn with matplotlib's objects: no window, no global figure, equal bytes for equal results.

They are narrow, so that they can be read on a phone without being turned. Colours are of Okabe and Ito's palette, told
apart by colour-blind readers, and each arm has its own, with a marker beside it, in every figure.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from simrl.evaluation.report.summary import Interval, Row, label, number, ordered, parts_of
from simrl.evaluation.results import INITIAL, ORACLE, PEOPLE, MatrixResult, Results, TrainingResult

WIDTH = 4.8  # inches
FONT_SIZE = 10.0
PIXELS_PER_INCH = 150  # of a PNG
# sRGB, marker
LOOKS = {
    INITIAL: ('#6b6b6b', 'X'),
    'role_play': ('#d55e00', 'o'),
    'persona': ('#b8649a', 's'),
    'fine_tuned': ('#0072b2', '^'),
    ORACLE: ('#009e73', 'D'),
    PEOPLE: ('#a17a00', 'P'),
}
OTHER_LOOK = ('#56b4e9', 'v')
LINES = {'small': ':', '': '-', 'large': '--'}
GRID = '#dddddd'


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure and what it shows, in words."""

    figure: Figure
    text: str


def colour(name: str) -> str:
    return LOOKS.get(parts_of(name)[0], OTHER_LOOK)[0]


def marker(name: str) -> str:
    return LOOKS.get(parts_of(name)[0], OTHER_LOOK)[1]


def drawings_of(results: Results, rows: Sequence[Row]) -> dict[str, Drawing]:
    """The figures by name, those whose results are there."""
    drawings = {}
    if any(row.name != INITIAL for row in rows):
        drawings['win_rates'] = win_rates(rows)
    if results.training is not None and results.training.assistants:
        drawings['training'] = training_curves(results.training)
    if results.matrix is not None and results.matrix.users and results.matrix.assistants:
        drawings['matrix'] = matrix(results.matrix)
    return drawings


def win_rates(rows: Sequence[Row]) -> Drawing:
    """Win rates against the initial assistant and mean satisfaction, with their intervals, a line per arm."""
    arms = [row for row in rows if row.name != INITIAL]
    with _style():
        figure = Figure((WIDTH, 1.9 + 0.62 * len(rows) + 0.3 * len(arms)), layout=_layout())
        wins, satisfaction = figure.subplots(2, 1, height_ratios=(len(arms) + 0.5, 0.7 * len(rows) + 0.5))
        for place, row in enumerate(arms):
            _interval(wins, row.win_rate, place - 0.13, row.name, filled=True)
            _interval(wins, row.strict_win_rate, place + 0.2, row.name, filled=False)
        wins.axvline(0.5, color=LOOKS[INITIAL][0], linewidth=1, linestyle='--', zorder=0)
        _rows(wins, [label(row.name) for row in arms])
        wins.set_title('Win rate against the initial assistant')
        wins.set_xlabel('filled: expected votes; hollow: strict, ties ½')
        for place, row in enumerate(rows):
            _interval(satisfaction, row.satisfaction, place, row.name, filled=True)
        if rows[0].name == INITIAL:
            satisfaction.axvline(
                rows[0].satisfaction.mean, color=LOOKS[INITIAL][0], linewidth=1, linestyle='--', zorder=0
            )
        _rows(satisfaction, [label(row.name) for row in rows])
        satisfaction.set_title('Mean satisfaction of people')
    said = '; '.join(f'{label(row.name)} {number(row.win_rate.mean)}' for row in arms if row.win_rate)
    return Drawing(figure, f'Win rates against the initial assistant, by expected votes: {said}.')


def training_curves(training: TrainingResult) -> Drawing:
    """Reward under the arm's own user, and how often users end, by step; thin lines are single seeds."""
    arms: dict[str, list[str]] = {}
    for name in ordered(training.assistants):
        arm, size, _ = parts_of(name)
        arms.setdefault(f'{arm}-{size}' if size else arm, []).append(name)
    panels = {'reward': 'Reward under its own user', 'end_signal': 'Share of conversations that the user ended'}
    if any(curve.kl is not None for curve in training.assistants.values()):
        panels['kl'] = 'KL to the initial assistant (nats a token)'
    if any(curve.no_spread is not None for curve in training.assistants.values()):
        panels['no_spread'] = 'Share of groups of equal rewards'
    with _style():
        figure = Figure((WIDTH, 0.8 + 2.1 * len(panels)), layout=_layout())
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for (field, title), axis in zip(panels.items(), axes, strict=True):
            for arm, members in arms.items():
                curves = {name: _curve(training, name, field) for name in members}
                style = {'color': colour(arm), 'linestyle': LINES.get(parts_of(arm)[1], '-.')}
                if len(members) > 1:
                    for curve in curves.values():
                        axis.plot(list(curve), list(curve.values()), linewidth=0.7, alpha=0.35, **style)
                steps = sorted({step for curve in curves.values() for step in curve})
                mean = [np.mean([curve[step] for curve in curves.values() if step in curve]) for step in steps]
                every = max(1, len(steps) // 5)
                axis.plot(
                    steps,
                    mean,
                    linewidth=2,
                    marker=marker(arm),
                    markevery=every,
                    markersize=5,
                    label=label(arm),
                    **style,
                )
            axis.set_title(title)
            axis.grid(axis='y', color=GRID, linewidth=0.8)
        axes[-1].set_xlabel('step')
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside upper center', ncols=2, frameon=False, handlelength=3)
    said = '; '.join(_course(training, arm, members) for arm, members in arms.items())
    return Drawing(figure, f'Reward under its own user at the first and last step: {said}.')


def matrix(result: MatrixResult) -> Drawing:
    """Mean satisfaction by assistant (rows) and user (columns, people last), in means over training seeds."""
    assistants, users, values = by_arm(result)
    with _style():
        figure = Figure((max(WIDTH, 1.9 + 0.55 * len(users)), 1.5 + 0.42 * len(assistants)), layout=_layout())
        axis = figure.subplots()
        edges = (np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5)
        axis.pcolormesh(
            *edges, values, cmap='cividis', vmin=0, vmax=1, edgecolors='white'
        )  # drawn as shapes: no picture within the SVG
        axis.invert_yaxis()
        for (row, column), value in np.ndenumerate(values):
            ink = 'black' if value > 0.48 else 'white'
            axis.text(column, row, number(float(value)), ha='center', va='center', color=ink)
        axis.set_xticks(
            range(len(users)), [label(user) for user in users], rotation=35, ha='left', rotation_mode='anchor'
        )
        axis.set_yticks(range(len(assistants)), [label(name) for name in assistants])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if PEOPLE in users and len(users) > 1:
            axis.axvline(users.index(PEOPLE) - 0.5, color='white', linewidth=4)
    said = '; '.join(
        f'{label(name)} with {", ".join(f"{label(u)} {number(float(x))}" for u, x in zip(users, row, strict=True))}'
        for name, row in zip(assistants, values, strict=True)
    )
    return Drawing(figure, f'Mean satisfaction by assistant and user: {said}.')


def by_arm(result: MatrixResult) -> tuple[list[str], list[str], np.ndarray]:
    """Assistants, users, and [assistants, users] mean satisfaction, each in means over its training seeds."""
    means = np.array(result.mean, np.float64).reshape(len(result.users), len(result.assistants))
    arms, users = (_groups(names) for names in (result.assistants, result.users))
    values = [[means[np.ix_(users[user], arms[arm])].mean() for user in users] for arm in arms]
    return list(arms), list(users), np.array(values)


def svg(drawing: Drawing, name: str) -> str:
    """The figure as an element of a page, its ids starting with `name`: several may stand on one page."""
    file = io.StringIO()
    with _style(name):
        drawing.figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    text = file.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
    return re.sub(r'( id="| xlink:href="#|url\(#)', rf'\g<1>{name}-', text)


def png(drawing: Drawing) -> bytes:
    file = io.BytesIO()
    with _style():
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


def _layout() -> ConstrainedLayoutEngine:
    """Room between the panels: a title must not touch the axis above it."""
    return ConstrainedLayoutEngine(h_pad=0.09, hspace=0.02)


def _interval(axis: Axes, estimate: Interval | None, place: float, name: str, *, filled: bool) -> None:
    if estimate is None:
        return
    if estimate.low is not None and estimate.high is not None:
        axis.plot([estimate.low, estimate.high], [place, place], color=colour(name), linewidth=2 if filled else 1)
    face = colour(name) if filled else 'white'
    axis.plot(
        [estimate.mean], [place], marker=marker(name), markersize=7, color=colour(name), markerfacecolor=face, zorder=3
    )


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis='y', length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis='x', color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _curve(training: TrainingResult, name: str, field: str) -> dict[int, float]:
    """step -> value, where there is one."""
    curve = training.assistants[name]
    values = getattr(curve, field) or ()
    return {step: value for step, value in zip(curve.step, values, strict=False) if value is not None}


def _course(training: TrainingResult, arm: str, members: Sequence[str]) -> str:
    curves = [list(_curve(training, name, 'reward').values()) for name in members]
    curves = [curve for curve in curves if curve]
    first, last = (number(float(np.mean([curve[at] for curve in curves])) if curves else None) for at in (0, -1))
    return f'{label(arm)} {first} to {last}'


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Names without their seed -> where they are, in the report's order."""
    groups: dict[str, list[int]] = {}
    for name in ordered(names):
        arm, size, _ = parts_of(name)
        groups.setdefault(f'{arm}-{size}' if size else arm, []).append(names.index(name))
    return groups
