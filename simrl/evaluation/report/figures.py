"""Figures of a finished run: win rates and scores, curves of training, the matrix.

Each is a `Drawing`. `gallery.drawings_of` has all of them by section of the page; those of lengths and endings are in
`lengths`, those of utility against other numbers in `utility`. A caption in the figure states the sample, what
intervals are over, and what failed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simrl.evaluation.report import drawing, summary
from simrl.evaluation.report.drawing import Drawing, Line, Look, Mark, bounds_of
from simrl.evaluation.report.matrix import mean_digits, titled, user_name
from simrl.evaluation.report.summary import Row, number
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import INITIAL, ExperimentResult
from simrl.evaluation.results.simulators import MatrixResult
from simrl.evaluation.results.training import TrainingCurve, ValidationCurve

Values = Mapping[int, float]  # by step
PANELS: Mapping[str, str] = {  # fields of `TrainingCurve`, and the titles of their panels
    'reward': 'Reward under its own simulator',
    'validation': 'Validation reward (square: the step that was chosen)',
    'end_signal': 'Share of conversations that the user ended',
    'kl': 'KL to the initial assistant (nats per token)',
    'zero_variance': 'Share of groups without a gradient',
}


def win_rates(name: str, rows: Sequence[Row], looks: Mapping[str, Look], caption: str) -> Drawing:
    """Win rates of the arms against the initial assistant, with their intervals."""
    arms = rows[1:]
    strict = any(row.strict_win_rate for row in arms)
    title = 'Win rate against the initial assistant'
    lines = [
        Line(
            row.name,
            [
                Mark(row.win_rate, looks[row.name]),
                *([Mark(row.strict_win_rate, looks[row.name], filled=False)] if strict else []),
            ],
        )
        for row in arms
    ]
    label = 'filled: preferred; hollow: higher score, ties ½' if strict else ''
    draw = drawing.intervals(lines, title, caption, reference=0.5, label=label)
    said = '; '.join(f'{row.name} {number(row.win_rate.mean)}' for row in arms if row.win_rate)
    columns = ('arm', 'seeds', 'win_rate', 'low', 'high', 'strict_win_rate', 'strict_low', 'strict_high')
    cells = [(row.name, row.num_seeds, *bounds_of(row.win_rate), *bounds_of(row.strict_win_rate)) for row in arms]
    return Drawing(name, f'{title}: {said}. {caption}', columns, cells, draw)


def scores(name: str, rows: Sequence[Row], score: str, looks: Mapping[str, Look], caption: str) -> Drawing:
    """Mean scores of the initial assistant and the arms, with their intervals."""
    title = f'Mean {score}'
    lines = [Line(row.name, [Mark(row.score, looks[row.name])]) for row in rows]
    draw = drawing.intervals(lines, title, caption, reference=rows[0].score.mean)
    said = '; '.join(f'{row.name} {number(row.score.mean)}' for row in rows)
    cells = [(row.name, row.num_seeds, *bounds_of(row.score)) for row in rows]
    return Drawing(name, f'{title}: {said}. {caption}', ('assistant', 'seeds', 'score', 'low', 'high'), cells, draw)


def training_curves(results: Results, looks: Mapping[str, Look]) -> list[Drawing]:
    """Curves over training, a panel each."""
    found = {field: curves_of(results, functools.partial(values_of, field=field)) for field in PANELS}
    return [
        over_training(f'training_{field}', title, found[field], results, looks, chosen=field == 'validation')
        for field, title in PANELS.items()
        if any(values for curves in found[field].values() for values in curves)
    ]


def curves_of(results: Results, read: Callable[[TrainingCurve], Values]) -> dict[str, list[Values]]:
    """Arm -> what `read` returns for each of its assistants; arms without one are left out."""
    by_arm = {arm: results.experiment.assistants_of(arm) for arm in results.experiment.arms}
    return {arm: [read(results.training.assistants[x]) for x in names] for arm, names in by_arm.items() if names}


def values_of(curve: TrainingCurve, field: str) -> dict[int, float]:
    """A field of a curve by step, where there is a value."""
    steps, values = curve.step, getattr(curve, field) or ()
    if isinstance(values, ValidationCurve):
        steps, values = values.step, values.reward
    return present(steps, values)


def present(steps: Sequence[int], values: Sequence[float | None]) -> dict[int, float]:
    """Values by step, where there is one."""
    return {step: value for step, value in zip(steps, values, strict=False) if value is not None}


def over_training(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[Values]],
    results: Results,
    looks: Mapping[str, Look],
    *,
    chosen: bool = False,
) -> Drawing:
    """Curves of each arm over training; thick lines are means over seeds, thin ones single seeds.

    Args:
        curves: arm -> values of each of its assistants.
        chosen: mark the step that validation chose.
    """
    means = {arm: mean_over_seeds(found) for arm, found in curves.items()}
    caption = training_caption(results, curves)

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 2.5, title, caption)
        for arm, found in curves.items():
            look = looks[arm]
            line: dict[str, Any] = {'color': look.colour, 'linestyle': look.line}
            for values in found if len(found) > 1 else ():
                axis.plot(list(values), list(values.values()), linewidth=0.7, alpha=0.35, **line)
            marks: dict[str, Any] = {'marker': look.marker, 'markevery': max(1, len(means[arm]) // 5), 'markersize': 5}
            axis.plot(list(means[arm]), list(means[arm].values()), linewidth=2, label=arm, **line, **marks)
            for assistant, values in zip(results.experiment.assistants_of(arm), found, strict=True):
                validation = results.training.assistants[assistant].validation
                if chosen and validation is not None:
                    step = validation.chosen
                    square: dict[str, Any] = {'marker': 's', 'markersize': 9, 'fillstyle': 'none'}
                    axis.plot([step], [values[step]], color=look.colour, **square)
        axis.grid(axis='y', color=drawing.GRID, linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel('step')
        return figure

    said = '; '.join(_course(arm, found) for arm, found in curves.items())
    cells = [
        (arm, assistant, step, value)
        for arm, found in curves.items()
        for assistant, values in zip(results.experiment.assistants_of(arm), found, strict=True)
        for step, value in values.items()
    ]
    text = f'{title}, at the first and last step: {said}. {caption}'
    return Drawing(name, text, ('arm', 'assistant', 'step', 'value'), cells, draw)


def mean_over_seeds(curves: Sequence[Values]) -> dict[int, float]:
    """The mean of several curves at the steps that all have: seeds may have been logged at other intervals."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: float(np.mean([values[step] for values in curves])) for step in steps}


def training_caption(results: Results, curves: Mapping[str, Sequence[Values]], how: str = 'thick: their mean') -> str:
    """The sample of curves over training, how seeds are drawn, and the conversations without a reward."""
    seeds = summary.num_seeds(len(found) for found in curves.values())
    shares = [x for curve in results.training.assistants.values() for x in curve.unjudged or () if x is not None]
    lost = 'unknown' if not shares else f'{np.mean(shares):.2%}' if any(shares) else 'none'
    return f'n = {seeds} an arm, {how}; no intervals. Conversations without a reward: {lost}.'


def matrix(experiment: ExperimentResult, result: MatrixResult) -> Drawing:
    """Mean score by assistant (rows) and user (columns, people last), in means over training seeds."""
    arms, values = by_arm(experiment, result)
    users = result.users
    names = [user_name(experiment, user) for user in users]
    title = titled(f'Mean {result.score} of each assistant (row) with each user (column)', result)
    low, high = float(values.min()), float(values.max())

    def shown(value: float) -> str:
        return number(value * result.times, mean_digits(result.times))

    high = high if high > low else low + 1
    each = summary.span(count for row in result.conversations for count in row)
    lost = sum(map(sum, result.failed))
    caption = (
        f'n = {each} conversations of each assistant with each user; means over training seeds, no intervals here. '
        f'Conversations without a score: {f"{lost:,}, left out" if lost else "none"}.'
    )

    def draw(width: float) -> Figure:
        room = max(width, 1.8 + 0.62 * len(users))
        figure, axis = drawing.panel(room, 1.2 + 0.42 * len(arms), title, caption)
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
        return figure

    said = '; '.join(
        f'{name} with {", ".join(f"{u} {shown(float(x))}" for u, x in zip(names, row, strict=True))}'
        for name, row in zip(arms, values, strict=True)
    )
    cells = [(name, *row) for name, row in zip(arms, values.tolist(), strict=True)]
    text = f'{title}: {said}. {caption}'
    return Drawing('matrix', text, ('assistant', *users), cells, draw)


def by_arm(experiment: ExperimentResult, result: MatrixResult) -> tuple[list[str], np.ndarray]:
    """'initial' and the arms, and [arms, users] mean scores, in means over training seeds."""
    means = np.array(result.mean, np.float64)
    groups = {INITIAL: [INITIAL]} | {arm: experiment.assistants_of(arm) for arm in experiment.arms}
    groups = {arm: names for arm, names in groups.items() if names}
    columns = [[result.assistants.index(name) for name in names] for names in groups.values()]
    return list(groups), np.array([means[:, own].mean(1) for own in columns])


def _course(arm: str, curves: Sequence[Values]) -> str:
    ends = [list(curve.values()) for curve in curves if curve]
    first, last = (number(float(np.mean([values[at] for values in ends])) if ends else None) for at in (0, -1))
    return f'{arm} {first} to {last}'
