"""Figures of win rates by judges: of pairs of assistants, by each judge, and over training seeds."""

from collections.abc import Mapping, Sequence

from simrl.evaluation.report import drawing, summary
from simrl.evaluation.report.drawing import Drawing, Line, Look, Mark, bounds_of, look_at, look_of
from simrl.evaluation.report.summary import number
from simrl.evaluation.results.judges import (
    PANEL,
    ArmWinRate,
    JudgedComparison,
    JudgedPair,
    JudgeNumbers,
    JudgesResult,
)

COLUMNS = (
    *('first', 'second', 'judge', 'win_rate', 'low', 'high', 'all_lost', 'all_won', 'equal_lengths'),
    *('prompts', 'clusters', 'failures'),
)


def drawings(result: JudgesResult, looks: Mapping[str, Look]) -> dict[str, list[Drawing]]:
    """The figures of each comparison, by its folder; names of those after the first end with a number."""
    return {
        folder: _figures(found, looks, f'_{position}' if position > 1 else '')
        for position, (folder, found) in enumerate(result.comparisons.items(), start=1)
    }


def _figures(found: JudgedComparison, looks: Mapping[str, Look], ending: str) -> list[Drawing]:
    each = [_of_pairs(found, looks, f'judges_win_rate{ending}')]
    if len(found.judges) > 1:
        each.append(_of_judges(found, f'judges_each{ending}'))
    if any(arm.win_rate.num_seeds > 1 for arm in found.arms):
        each.append(_of_arms(found, looks, f'judges_seeds{ending}'))
    return each


def _of_pairs(found: JudgedComparison, looks: Mapping[str, Look], name: str) -> Drawing:
    """Win rates of pairs by the panel, or the one judge; hollow at equal lengths."""
    over, names = _names(found.pairs)
    title = f'Win rate{over} by {found.who}'
    caption = f'{_sample(found)} {_intervals(found)} {_failures(found, [pair.primary for pair in found.pairs])}'
    of_lengths = any(pair.primary.rate_at_equal_lengths for pair in found.pairs)
    lines = []
    for line, pair in zip(names, found.pairs, strict=True):
        look, of = look_of(looks, pair.first), pair.primary
        at_equal_lengths = [Mark(of.rate_at_equal_lengths, look, filled=False)] if of_lengths else []
        lines.append(Line(line, [Mark(of.rate, look), *at_equal_lengths], of.failure_bounds))
    label = 'filled: as judged; hollow: at equal lengths' if of_lengths else ''
    draw = drawing.intervals(lines, title, caption, reference=0.5, label=label)
    said = '; '.join(
        f'{pair.first} over {pair.second} {number(rate.mean)}'
        for pair in found.pairs
        if (rate := pair.primary.rate) is not None
    )
    return Drawing(name, f'{title}: {said}. {caption}', COLUMNS, _cells(found), draw)


def _cells(found: JudgedComparison) -> list[Sequence[str | float | None]]:
    """Rows of a CSV file: each pair by each judge, and the panel."""
    return [
        (
            *(pair.first, pair.second, judge, *bounds_of(of.rate), *(of.failure_bounds or (None, None))),
            None if (equal := of.rate_at_equal_lengths) is None else equal.mean,
            *(pair.prompts, pair.clusters, of.failures),
        )
        for pair in found.pairs
        for judge, of in pair.judges.items()
    ]


def _of_judges(found: JudgedComparison, name: str) -> Drawing:
    """Win rates of pairs by each judge."""
    over, names = _names(found.pairs)
    title = f'Win rate{over} by each judge'
    looks = {judge: look_at(position) for position, judge in enumerate(found.judges)}
    each = [of for pair in found.pairs for judge, of in pair.judges.items() if judge != PANEL]
    caption = f'{_sample(found)} {_intervals(found)} {_failures(found, each)}'
    lines = [
        Line(line, [Mark(pair.judges[judge].rate, look) for judge, look in looks.items()])
        for line, pair in zip(names, found.pairs, strict=True)
    ]
    draw = drawing.intervals(lines, title, caption, reference=0.5, names=looks)
    said = '; '.join(
        f'{pair.first} over {pair.second} '
        + ', '.join(f'{number(rate.mean)} ({judge})' for judge in looks if (rate := pair.judges[judge].rate))
        for pair in found.pairs
    )
    return Drawing(name, f'{title}: {said}. {caption}', COLUMNS, _cells(found), draw)


def _of_arms(found: JudgedComparison, looks: Mapping[str, Look], name: str) -> Drawing:
    """Win rates of arms over their training seeds."""
    over, names = _names(found.arms)
    title = f'Win rate of arms{over} by {found.who}'
    seeds = summary.num_seeds(len(arm.seeds) for arm in found.arms)
    level = found.arms[0].win_rate.level
    lost = _failures(found, [pair.primary for pair in found.pairs])
    caption = f'{_sample(found)[:-1]}; {seeds} an arm. {level:.0%} intervals are over training seeds. {lost}'
    lines = [
        Line(
            line,
            [Mark(arm.win_rate, look_of(looks, arm.arm))],
            None if arm.bounds is None else (arm.bounds.lost.mean, arm.bounds.won.mean),
        )
        for line, arm in zip(names, found.arms, strict=True)
    ]
    draw = drawing.intervals(lines, title, caption, reference=0.5)
    said = '; '.join(f'{arm.arm} over {arm.other} {number(arm.win_rate.mean)}' for arm in found.arms)
    cells = [(arm.arm, arm.other, len(arm.seeds), *bounds_of(arm.win_rate)) for arm in found.arms]
    columns = ('arm', 'over', 'seeds', 'win_rate', 'low', 'high')
    return Drawing(name, f'{title}: {said}. {caption}', columns, cells, draw)


def _names(found: Sequence[JudgedPair] | Sequence[ArmWinRate]) -> tuple[str, list[str]]:
    """The words of a title, and names of lines: without the second assistant where all have the same."""
    both = [(of.first, of.second) if isinstance(of, JudgedPair) else (of.arm, of.other) for of in found]
    seconds = {second for _, second in both}
    if len(seconds) == 1:
        return f' over {seconds.pop()}', [first for first, _ in both]
    return '', [f'{first}\nover {second}' for first, second in both]


def _sample(found: JudgedComparison) -> str:
    prompts = summary.span(pair.prompts for pair in found.pairs)
    clusters = summary.span(pair.clusters for pair in found.pairs)
    of = '' if found.unit == 'prompts' else f' of {clusters} {found.unit}'
    return f'n = {prompts} prompts{of} for each pair, in both orders.'


def _intervals(found: JudgedComparison) -> str:
    levels = {rate.level for pair in found.pairs if (rate := pair.primary.rate) is not None}
    level = f'{levels.pop():.0%} intervals' if levels else 'Intervals'
    return f'{level} are over {found.unit}: these checkpoints only.'


def _failures(found: JudgedComparison, of: Sequence[JudgeNumbers]) -> str:
    """The prompts without a preference; with one number of each pair a grey bar shows them."""
    each = len(of) // len(found.pairs)
    total, lost = each * sum(pair.prompts for pair in found.pairs), sum(one.failures for one in of)
    if not lost:
        return f'Without a preference: none of {total:,}.'
    grey = '; grey: with all of them lost to all won' if each == 1 else ''
    return f'Without a preference: {lost:,} of {total:,}, left out{grey}.'
