"""Figures of a study: win rates of pairs, by document type and by turn."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simrl.evaluation.report import drawing, summary
from simrl.evaluation.report.drawing import Drawing, Look, bounds_of
from simrl.evaluation.statistics import Estimate
from simrl.study.analysis import FIRST_TURNS, Analysis, PairResult, Rate
from simrl.study.texts import number_of

FEWEST = 6  # participants of a part of the votes with a win rate of its own: of fewer an interval says little
COLUMNS = ('win_rate', 'low', 'high')


def drawings_of(analysis: Analysis, types: Mapping[str, str]) -> dict[str, list[Drawing]]:
    """The figures of each section: 'win_rates', 'types' and 'turns'.

    Args:
        types: names of document types by id.
    """
    looks = [drawing.look_at(position) for position in range(len(analysis.pairs))]
    if not analysis.pairs:
        return {'win_rates': [], 'types': [], 'turns': []}
    votes = sum(pair.rate.votes for pair in analysis.pairs)
    caption = (
        f'n = {number_of(analysis.flow.primary, "participant")}, {number_of(votes, "vote")}. {level_of(analysis)} '
        'intervals over participants, each by itself.'
    )
    return {
        'win_rates': [win_rates(analysis, looks, caption)],
        'types': [by_type(analysis, types, looks, caption)],
        'turns': [by_turn(analysis, looks, caption)],
    }


def level_of(analysis: Analysis) -> str:
    return f'{100 * analysis.level:.4g}%'


def known(rate: Rate | None) -> Estimate | None:
    return None if rate is None or isinstance(rate.estimate, str) else rate.estimate


def of_part(rate: Rate) -> Estimate | None:
    """The win rate of a part of the votes; None of too few participants."""
    return known(rate) if rate.participants >= FEWEST else None


def title_of(pair: PairResult) -> str:
    return f'{pair.first} over {pair.second}'


def win_rates(analysis: Analysis, looks: Sequence[Look], caption: str) -> Drawing:
    """Win rates of all pairs, and those of first turns alone."""
    title = 'Win rate of the first model with participants'
    pairs = analysis.pairs
    first_turns = [known(analysis.samples[FIRST_TURNS].get((pair.first, pair.second))) for pair in pairs]

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 0.9 + 0.5 * len(pairs), title, caption)
        for position, (pair, alone, look) in enumerate(zip(pairs, first_turns, looks, strict=True)):
            drawing.draw_interval(axis, known(pair.rate), position - 0.13, look, filled=True)
            drawing.draw_interval(axis, alone, position + 0.2, look, filled=False)
        axis.axvline(0.5, color=drawing.INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        drawing.name_rows(axis, [title_of(pair) for pair in pairs])
        axis.set_xlabel('filled: all turns; hollow: first turns alone')
        return figure

    said = '; '.join(f'{title_of(pair)} {_mean(known(pair.rate))}' for pair in pairs)
    cells = [
        (pair.first, pair.second, pair.rate.participants, *bounds_of(known(pair.rate)), *bounds_of(alone))
        for pair, alone in zip(pairs, first_turns, strict=True)
    ]
    columns = ('first', 'second', 'participants', *COLUMNS, *(f'first_turns_{name}' for name in COLUMNS))
    return Drawing('win_rates', f'{title}: {said}. {caption}', columns, cells, draw)


def by_type(analysis: Analysis, types: Mapping[str, str], looks: Sequence[Look], caption: str) -> Drawing:
    """Win rates of all pairs by document type."""
    title = 'Win rate by document type'
    caption += f' Types of at least {FEWEST} participants.'
    rows = [
        (pair, look, types.get(kind, kind), rate)
        for pair, look in zip(analysis.pairs, looks, strict=True)
        for kind, rate in pair.types.items()
    ]

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 0.9 + 0.32 * len(rows), title, caption)
        for position, (pair, look, _, rate) in enumerate(rows):
            drawing.draw_interval(axis, of_part(rate), position, look, filled=True)
            if position and rows[position - 1][0] is not pair:
                axis.axhline(position - 0.5, color='#888888', linewidth=0.8)
        axis.axvline(0.5, color=drawing.INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        several = len(analysis.pairs) > 1
        drawing.name_rows(axis, [f'{title_of(pair)}\n{name}' if several else name for pair, _, name, _ in rows])
        return figure

    said = '; '.join(f'{title_of(pair)} on {name} {_mean(of_part(rate))}' for pair, _, name, rate in rows)
    cells = [
        (pair.first, pair.second, name, rate.participants, *bounds_of(of_part(rate))) for pair, _, name, rate in rows
    ]
    columns = ('first', 'second', 'document_type', 'participants', *COLUMNS)
    return Drawing('win_rates_by_type', f'{title}: {said}. {caption}', columns, cells, draw)


def by_turn(analysis: Analysis, looks: Sequence[Look], caption: str) -> Drawing:
    """Win rates of all pairs over the turns of a conversation."""
    title = 'Win rate by turn; replies of later turns share a history'
    caption += f' Turns of at least {FEWEST} participants.'
    rows = [
        (pair, look, {turn: rate for turn, rate in pair.turns.items() if rate.participants >= FEWEST})
        for pair, look in zip(analysis.pairs, looks, strict=True)
    ]

    def draw(width: float) -> Figure:
        figure, axis = drawing.panel(width, 2.6, title, caption)
        axis.axhline(0.5, color=drawing.INITIAL_COLOUR, linewidth=1, linestyle='--', zorder=0)
        for position, (pair, look, rates) in enumerate(rows):
            beside = 0.12 * (position - (len(rows) - 1) / 2)
            means = {turn: of.mean for turn, rate in rates.items() if (of := known(rate))}
            axis.plot([turn + beside for turn in means], list(means.values()), color=look.colour, linewidth=0.8)
            for turn, rate in rates.items():
                drawing.draw_interval(axis, known(rate), turn + beside, look, filled=True, upright=True)
            axis.plot([], [], label=title_of(pair), linestyle='none', **drawing.marker_style(look))
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_xlabel('turn')
        axis.set_ylabel('win rate')
        axis.grid(axis='y', color=drawing.GRID, linewidth=0.8)
        drawing.legend(axis)
        return figure

    said = '; '.join(
        f'{title_of(pair)} {", ".join(f"{turn}: {_mean(known(rate))}" for turn, rate in rates.items())}'
        for pair, _, rates in rows
    )
    cells = [
        (pair.first, pair.second, turn, rate.participants, *bounds_of(known(rate)))
        for pair, _, rates in rows
        for turn, rate in rates.items()
    ]
    columns = ('first', 'second', 'turn', 'participants', *COLUMNS)
    return Drawing('win_rates_by_turn', f'{title}: {said}. {caption}', columns, cells, draw)


def _mean(estimate: Estimate | None) -> str:
    return summary.number(None if estimate is None else estimate.mean)
