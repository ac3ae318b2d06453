"""One figure: drawn with matplotlib's objects, as wide as the place for it; as SVG, PNG and CSV.

No window and no global figure; equal results give equal bytes. A figure is one panel: narrow enough for a phone at
`NARROW`, and as wide as the page's main column at `WIDE`. Colours are of Okabe and Ito's palette, told apart by
colour-blind readers, and never alone: markers, lines or words say the same.
"""

import contextlib
import csv
import dataclasses
import io
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from simrl.evaluation.report.summary import Interval
from simrl.evaluation.results.measures import INITIAL, ExperimentResult

NARROW, WIDE = 4.8, 9.8  # inches: half of the main column, or a phone; the whole of it
FONT_SIZE = 10.0
CAPTION_SIZE = 9.0
CHARACTERS = {FONT_SIZE + 1: 11.5, CAPTION_SIZE: 15.5}  # of a line, by inch, at a font size
BESIDE_AXIS = 0.45  # inches left of the tick labels, of an axis' own label, and right of an axis
BESIDE_LABEL = 2.8  # font sizes between a legend's line and its label, and between its columns
LINE_HEIGHT = 0.17  # inches
LINE_LENGTH = 26  # characters of a name beside a line
PIXELS_PER_INCH = 150  # of a PNG
SOFTWARE = 'simrl'  # in the metadata of each PNG: a report replaces those of the one before, and no others
COLOURS = ('#d55e00', '#b8649a', '#0072b2', '#009e73', '#56b4e9', '#e69f00', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', '*', '<', '>')
LINES = ('solid', 'dashed', 'dotted')  # for matplotlib and CSS
INITIAL_COLOUR, PEOPLE_COLOUR, GRID, SOFT = '#6b6b6b', '#a17a00', '#dddddd', '#555555'


@dataclasses.dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    line: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure, and the same in words and as a table.

    Attributes:
        name: of its files.
        text: for those who cannot see it.
        columns: of its CSV file.
        rows: of its CSV file; None is empty there.
        draw: its width in inches -> the figure. One with wide contents may be wider.
    """

    name: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    draw: Callable[[float], Figure]


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mean with its interval, in a line of `intervals`; what is not filled is thinner."""

    estimate: Interval | None
    look: Look
    filled: bool = True


@dataclasses.dataclass(frozen=True)
class Line:
    """A named line of `intervals`.

    Attributes:
        marks: from its top to its bottom.
        failures: the first mark's means with all failures lost, and all won, which a grey bar joins; None: no bar.
    """

    name: str
    marks: Sequence[Mark]
    failures: tuple[float, float] | None = None


def look_at(position: int) -> Look:
    """The look of the arm at a position."""
    line = LINES[position // len(COLOURS) % len(LINES)]
    return Look(COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)], line)


def looks_of(experiment: ExperimentResult) -> dict[str, Look]:
    """The look of every arm, every assistant and every measure, by name; the same in all figures."""
    looks = {INITIAL: Look(INITIAL_COLOUR, 'X', 'solid')}
    looks |= {measure: Look(PEOPLE_COLOUR, 'P', 'solid') for measure in experiment.measures}
    for position, arm in enumerate(experiment.arms):
        looks[arm] = look_at(position)
        looks |= dict.fromkeys(experiment.assistants_of(arm), looks[arm])
    return looks


def look_of(looks: Mapping[str, Look], name: str) -> Look:
    """The look of an assistant or arm, also of one that the run had before."""
    return looks.get(name, Look(SOFT, 'd', 'solid'))


def svg(drawing: Drawing, name: str, width: float) -> str:
    """The figure as an element of a page, its ids starting with `name`: a page holds several."""
    file, name = io.StringIO(), re.sub(r'[^\w-]', '-', name)  # which may be that of a folder
    with style(name):
        drawing.draw(width).savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    text = file.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
    return re.sub(r'( id="| xlink:href="#|url\(#)', rf'\g<1>{name}-', text)


def png(drawing: Drawing) -> bytes:
    """The figure as a PNG, with a legend where its lines have labels: the page has one for all panels."""
    file = io.BytesIO()
    with style():
        figure = drawing.draw(NARROW)
        axis = figure.axes[0]
        if axis.get_legend_handles_labels()[1] and axis.get_legend() is None:
            legend(axis)
        figure.savefig(file, format='png', dpi=PIXELS_PER_INCH, metadata={'Software': SOFTWARE})
    return file.getvalue()


def is_own(picture: bytes) -> bool:
    """True for a PNG that `png` made."""
    return f'Software\0{SOFTWARE}'.encode() in picture


def csv_text(drawing: Drawing) -> str:
    """The figure's numbers as a table of comma-separated values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerows([drawing.columns, *drawing.rows])
    return file.getvalue()


def style(salt: str = '') -> contextlib.AbstractContextManager[None]:
    """matplotlib's settings while a figure is drawn or written; `salt` fixes the ids in an SVG."""
    return matplotlib.rc_context(
        {
            'font.size': FONT_SIZE,
            'font.family': 'DejaVu Sans',  # comes with matplotlib: the same glyphs everywhere
            'svg.fonttype': 'path',
            'svg.hashsalt': salt,
            'text.parse_math': False,  # names are no formulas
            'axes.spines.top': False,
            'axes.spines.right': False,
            'axes.edgecolor': '#888888',
        }
    )


def panel(width: float, height: float, title: str, caption: str) -> tuple[Figure, Axes]:
    """A figure of one panel.

    Args:
        width, height: in inches, without the lines of title and caption, which are added.
        title: above it; '' for none.
        caption: below it: the sample, what intervals are over, and failures.
    """
    above = _lines(title, width, FONT_SIZE + 1) if title else []
    below = _lines(caption, width, CAPTION_SIZE)
    figure = Figure((width, height + LINE_HEIGHT * (len(above) + len(below))), layout='constrained')
    axis = figure.subplots()
    if above:
        figure.suptitle('\n'.join(above), x=0.01, ha='left', fontsize=FONT_SIZE + 1)
    figure.supxlabel('\n'.join(below), x=0.01, ha='left', fontsize=CAPTION_SIZE, color=SOFT, linespacing=1.25)
    return figure, axis


def legend(axis: Axes) -> None:
    """A legend above what is drawn, with room of its own; as many columns as the width has room for."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    handles, labels = axis.get_legend_handles_labels()
    length = 3 if any(isinstance(x, Line2D) and x.get_linestyle() != 'None' for x in handles) else 1
    most = 2 if figure.get_figwidth() < (NARROW + WIDE) / 2 else 4
    ticks = [_inches(tick.get_text()) for tick in axis.get_yticklabels()]
    room = figure.get_figwidth() - max(ticks, default=0.0) - BESIDE_AXIS
    around = (length + BESIDE_LABEL) * FONT_SIZE / 72  # inches of a column that are not its label's
    longest = max(map(_inches, labels))
    columns = min(most, int(room / (longest + around)))
    if columns < 1:  # the longest label alone has too little room
        widest = max(_inches(label) / len(label) for label in labels if label)  # inches of a character
        columns, labels = 1, [textwrap.fill(label, int((room - around) / widest)) for label in labels]
    rows = -(-len(labels) // columns) + sum(label.count('\n') for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.08 + 1.3 * LINE_HEIGHT * rows)
    axis.legend(
        handles,
        labels,
        loc='lower left',
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        handlelength=length,
        borderaxespad=0,
    )


def intervals(
    lines: Sequence[Line],
    title: str,
    caption: str,
    *,
    reference: float | None,
    label: str = '',
    names: Mapping[str, Look] = types.MappingProxyType({}),
) -> Callable[[float], Figure]:
    """Means with their intervals, a line below the other: width in inches -> the figure.

    Args:
        title, caption: as of `panel`.
        reference: a number that a dashed line marks; None: no line.
        label: of the axis.
        names: of looks, for a legend; empty: none.
    """
    most = max((len(line.marks) for line in lines), default=1)
    shown = ['\n'.join(textwrap.fill(part, LINE_LENGTH) for part in line.name.split('\n')) for line in lines]
    highest = max((name.count('\n') + 1 for name in shown), default=1)

    def draw(width: float) -> Figure:
        height = max(0.42, 0.2 * most, 1.2 * LINE_HEIGHT * highest)
        figure, axis = panel(width, 0.9 + height * len(lines), title, caption)
        for position, line in enumerate(lines):
            above = (len(line.marks) - 1) / 2
            places = [position + 0.8 / max(most, 3) * (number - above) for number in range(len(line.marks))]
            for mark, place in zip(line.marks, places, strict=True):
                draw_interval(axis, mark.estimate, place, mark.look, filled=mark.filled)
            if line.failures is not None:
                bar: dict[str, Any] = {'color': SOFT, 'alpha': 0.25, 'linewidth': 9, 'solid_capstyle': 'butt'}
                axis.plot(line.failures, places[:1] * 2, zorder=1, **bar)
        if reference is not None:
            axis.axvline(reference, color=INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        name_rows(axis, shown)
        axis.set_xlabel(label)
        for name, look in names.items():
            axis.plot([], [], label=name, linestyle='none', **marker_style(look))
        if names:
            legend(axis)
        return figure

    return draw


def draw_interval(
    axis: Axes, estimate: Interval | None, position: float, look: Look, *, filled: bool, upright: bool = False
) -> None:
    """A mean with its interval, along x at a position of y, or `upright` the other way round."""
    if estimate is None:
        return

    def along(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
        across = [position] * len(values)
        return (across, values) if upright else (values, across)

    if estimate.low is not None and estimate.high is not None:
        axis.plot(*along([estimate.low, estimate.high]), color=look.colour, linewidth=2 if filled else 1)
    axis.plot(*along([estimate.mean]), zorder=3, **marker_style(look, filled=filled))


def marker_style(look: Look, *, filled: bool = True) -> dict[str, Any]:
    face = look.colour if filled else 'white'
    return {'marker': look.marker, 'markersize': 7, 'color': look.colour, 'markerfacecolor': face}


def name_rows(axis: Axes, labels: Sequence[str]) -> None:
    """A labelled line for each row, the first one on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis='y', length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis='x', color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def bounds_of(estimate: Interval | None) -> tuple[float | None, float | None, float | None]:
    """Mean and bounds as cells of a CSV file."""
    return (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)


def _inches(text: str) -> float:
    """The width of text, its longest line, at the size of labels."""
    lines = [line for line in text.split('\n') if line.strip()]
    return max((float(TextPath((0, 0), line, size=FONT_SIZE).get_extents().width) / 72 for line in lines), default=0.0)


def _lines(text: str, width: float, size: float) -> list[str]:
    return textwrap.wrap(text, max(16, int(CHARACTERS[size] * width)))
