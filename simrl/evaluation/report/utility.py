"""Utility against what is known of a simulator: its size, its fidelity, its forecast.

Utility is the win rate of the assistants that a simulator trained over the initial assistant, by the first measure. A
figure is drawn where arms differ in the number.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from simrl.evaluation.fidelity.features import FEATURES
from simrl.evaluation.fidelity.measure import EMBEDDING
from simrl.evaluation.report import drawing, summary
from simrl.evaluation.report.drawing import Drawing, Look, bounds_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Interval, number
from simrl.evaluation.report.tables import estimate_cell
from simrl.evaluation.results.files import Results
from simrl.evaluation.statistics import spearman

DISTANCE = 0.025  # of the axis, between points that would hide one another
FEWEST_RANKED = 4  # arms whose rank correlation is worth a number


@dataclasses.dataclass(frozen=True)
class Against:
    """A number that arms have, which utility is drawn against.

    Attributes:
        name: of the figure's files.
        title: the number, in the title of the figure.
        label: of its axis.
        read: results -> the number of each arm that has one.
        log: draw it on a logarithmic axis.
    """

    name: str
    title: str
    label: str
    read: Callable[[Results], Mapping[str, float]]
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm of a run in a figure."""

    name: str
    x: float
    utility: Interval
    look: Look


def _parameters(results: Results) -> dict[str, float]:
    arms = results.experiment.arms
    return {name: float(arm.parameters) for name, arm in arms.items() if arm.parameters is not None}


def _nats(results: Results) -> dict[str, float]:
    found = results.fidelity.simulators
    return {arm: x.nats_per_token.mean for arm, x in found.items() if x.nats_per_token is not None}


def _distributions(results: Results) -> dict[str, float]:
    """The mean excess, in bits, of the distributions that all simulators with replayed turns were measured on."""
    excess = _excess(results)
    names = [name for name, feature in FEATURES.items() if feature.kind == 'distribution']
    shared = [name for name in names if excess and all(name in found for found in excess.values())]
    return {arm: float(np.mean([found[name] for name in shared])) for arm, found in excess.items() if shared}


def _embedding(results: Results) -> dict[str, float]:
    return {arm: found[EMBEDDING] for arm, found in _excess(results).items() if EMBEDDING in found}


def _excess(results: Results) -> dict[str, dict[str, float]]:
    """Arm -> distance -> how much farther its simulator is from people than people are from one another.

    Of several data sets it is that of all together, which comes first.
    """
    first = {arm: next(iter(x.replayed.values())) for arm, x in results.fidelity.simulators.items() if x.replayed}
    return {
        arm: {name: x.excess.mean for name, x in found.distances.items() if x.excess is not None}
        for arm, found in first.items()
    }


def _forecast(results: Results, name: str) -> dict[str, float]:
    found = {} if results.forecast is None else results.forecast.simulators
    estimates = {arm: getattr(forecast, name) for arm, forecast in found.items()}
    return {arm: estimate.mean for arm, estimate in estimates.items() if estimate is not None}


AGAINST = (
    Against('utility_by_size', 'size of the simulator', 'parameters', _parameters, log=True),
    Against(
        *('utility_by_likelihood', 'how well the simulator predicts people’s messages'),
        *('nats per token (less is better)', _nats),
    ),
    Against(
        *('utility_by_distributions', 'how far the simulator’s turns are from people’s'),
        *('bits beyond people, mean over distributions (less is closer)', _distributions),
    ),
    Against(
        *('utility_by_embedding', 'how far the simulator’s turns are from people’s in meaning'),
        *('energy distance of embeddings beyond people (less is closer)', _embedding),
    ),
    Against(
        *('utility_by_cosine', 'a forecast: gradients under the simulator and under people'),
        *('cosine of the policy gradients', functools.partial(_forecast, name='cosine')),
    ),
    Against(
        *('utility_by_best_of_n', 'a forecast: the best of n replies by the simulator'),
        *('gain in what people make of them', functools.partial(_forecast, name='best_of_n')),
    ),
)


def drawings(results: Results, looks: Mapping[str, Look], caption: str) -> list[Drawing]:
    """Utility of a run's arms against each number in which they differ."""
    found = {against: points(results, against, looks) for against in AGAINST}
    return [
        scatter(against, of_arms, f'{_order(of_arms)}{caption}')
        for against, of_arms in found.items()
        if differ(of_arms)
    ]


def _order(found: Sequence[Point]) -> str:
    """The order of the arms of one run by the number, in words; those of several need not be comparable."""
    order = spearman([point.x for point in found], [point.utility.mean for point in found])
    return f'Rank correlation {number(order)}. ' if order is not None and len(found) >= FEWEST_RANKED else ''


def differ(found: Sequence[Point]) -> bool:
    """True if arms have numbers that differ by more than rounding: there is something to draw utility against."""
    return len({f'{point.x:.5g}' for point in found}) > 1


def points(results: Results, against: Against, looks: Mapping[str, Look], label: str = '') -> list[Point]:
    """The arms of a run that have both a utility and the number; `label` ends their names."""
    known = against.read(results)
    measure = results.measures[results.experiment.measures[0]]
    return [
        Point(f'{row.name}{label}', known[row.name], row.win_rate, looks[row.name])
        for row in summary.rows_of(results.experiment, measure)
        if row.name in known and row.win_rate is not None
    ]


def scatter(against: Against, found: Sequence[Point], caption: str) -> Drawing:
    """Utility against a number, an arm a point."""
    title = f'Utility by {against.title}'
    below = f'{len(found)} arms. {caption}'

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 2.6, title, below)
        axis.axhline(0.5, color=drawing.INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        for point, x in zip(found, beside([point.x for point in found], log=against.log), strict=True):
            drawing.draw_interval(axis, point.utility, x, point.look, filled=True, upright=True)
            axis.plot([], [], label=point.name, linestyle='none', **drawing.marker_style(point.look))
        if against.log:
            axis.set_xscale('log')
            sizes = sorted({point.x for point in found})
            axis.set_xticks(sizes, list(map(short, sizes)))
            axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.15)
        axis.set_xlabel(against.label)
        axis.set_ylabel('win rate')
        axis.grid(color=drawing.GRID, linewidth=0.8)
        drawing.legend(axis)
        return figure

    said = '; '.join(f'{point.name} {number(point.utility.mean)} at {point.x:,.4g}' for point in found)
    cells = [(point.name, point.x, *bounds_of(point.utility)) for point in found]
    return Drawing(against.name, f'{title}: {said}. {below}', ('arm', 'x', 'win_rate', 'low', 'high'), cells, draw)


def beside(values: Sequence[float], *, log: bool) -> list[float]:
    """The places of points on an axis: those that would hide one another are next to each other, in their order."""
    places = np.log(values) if log else np.array(values, np.float64)
    step = DISTANCE * (np.ptp(places) or 1.0)
    order = np.argsort(places, kind='stable')
    for group in np.split(order, 1 + np.flatnonzero(np.diff(places[order]) >= step)):
        places[group] = places[group].mean() + step * (np.arange(len(group)) - (len(group) - 1) / 2)
    return [float(x) for x in (np.exp(places) if log else places)]


def table(results: Results, looks: Mapping[str, Look]) -> tuple[tuple[str, ...], list[Sequence[str | Cell]]]:
    """Header and rows: all that is known of each arm's simulator; columns that no arm has are left out."""
    forecasts = {} if results.forecast is None else results.forecast.simulators
    columns: dict[str, dict[str, str | Cell]] = {
        'parameters': {arm: short(x) for arm, x in _parameters(results).items()},
        'nats per token': {
            arm: estimate_cell(x.nats_per_token)
            for arm, x in results.fidelity.simulators.items()
            if x.nats_per_token is not None
        },
        'beyond people: distributions (bits)': {arm: f'{x:.3f}' for arm, x in _distributions(results).items()},
        'beyond people: embeddings': {arm: f'{x:.3f}' for arm, x in _embedding(results).items()},
        'forecast: cosine of gradients': {arm: estimate_cell(x.cosine) for arm, x in forecasts.items() if x.cosine},
        'forecast: gain of the best of n': {
            arm: estimate_cell(x.best_of_n, 3, '+') for arm, x in forecasts.items() if x.best_of_n
        },
        'no forecast, or no interval of it': {
            arm: Cell(x.reason, words=True) for arm, x in forecasts.items() if x.reason
        },
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    measure = results.measures[results.experiment.measures[0]]
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(row.name, dot=looks[row.name].colour),
            estimate_cell(row.win_rate),
            *(cells.get(row.name, '–') for cells in columns.values()),
        )
        for row in summary.rows_of(results.experiment, measure)[1:]
    ]
    return ('arm', 'win rate', *columns), rows if columns else []


def about_forecast(results: Results) -> str:
    """The sample of the forecast, and how well it orders arms; empty without one."""
    found = results.forecast
    if found is None:
        return ''
    said = [
        f'{one.forecast.replace("_", " ")} with {one.utility.replace("_", " ")} {number(one.mean)} '
        f'{summary.bounds(one.low, one.high)} over {one.num_arms} arms'
        + ('' if one.p_value is None else f', permutation p {number(one.p_value, 3)}')
        for one in found.correlations
        if one.mean is not None
    ]
    orders = f' Rank correlations by {found.measure}: {"; ".join(said)}.' if said else ''
    return (
        f'Forecasts are from {found.examples:,} examples, {found.samples} samples of each, best of {found.n}. '
        f'{found.people}{orders}'
    )


def short(value: float) -> str:
    """A number of parameters: '135M'."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if value >= size:
            return f'{value / size:.3g}{unit}'
    return f'{value:.3g}'
