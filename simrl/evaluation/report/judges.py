"""Win rates by judges who compared a run's assistants two by two, beside those that the run's own measures find."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import page, summary
from simrl.evaluation.report.drawing import Look, look_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.study import by_measure
from simrl.evaluation.report.summary import number
from simrl.evaluation.report.tables import MAX_ROWS, estimate_cell, votes_cell
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.judges import (
    PANEL,
    JudgedComparison,
    JudgedPair,
    JudgeNumbers,
    JudgesResult,
)

TITLE = 'Preferred by judges of two responses'
ABOUT = (
    'Judges saw the responses of two assistants to the same prompts, or their conversations with the same users, side '
    'by side and in both orders. Win rates are the first assistant’s over the second, ties ½; intervals are over '
    '{unit}, of these checkpoints only: other training seeds may differ. A prompt without a verdict of each judge in '
    'both orders is left out, and counted all lost and all won. At equal lengths: were the responses of both as long. '
    'p is of the sign test over {unit}; Holm p is adjusted for the pairs here. '
)
COMBINED = {
    'mean': 'The preference of a judge is the mean of both orders. ',
    'strict': 'A judge’s preference that changes with the order is a tie. ',
}
MEASURES = 'Win rates of the run’s measures are of the same checkpoints, against the initial assistant alone. '
JUDGES = (
    'Same in both orders: the share of prompts on which the order changes no winner. To the first: the mean preference '
    'for the response that is shown first, ½ without a bias. Both are over prompts that the judge was asked about. '
)
VOTES = (
    'Independent votes: the number of judges without anything in common whose mean would vary as much. By preferences, '
    'what judges are right about together counts as what they share; by errors only what they are wrong about. '
    'Agreement is 1 less the mean distance of two preferences. '
)
SEEDS = (
    'The unit is the training run: intervals and sign-flip tests are over training seeds; Holm p is adjusted for the '
    'arms here. '
)
STRENGTHS = 'Strengths of all assistants on one scale, in log-odds with mean 0 (Davidson’s model of wins and ties). '


def section(
    results: Results,
    found: JudgesResult,
    looks: Mapping[str, Look],
    drawn: Mapping[str, str],
    output: pathlib.Path,
) -> str:
    """The section of the report.

    Args:
        drawn: the figures of each comparison, by 'judges/FOLDER'.
        output: the folder that the report is written into, for links.
    """
    parts = []
    for folder, comparison in found.comparisons.items():
        parts += [page.heading(folder)] if len(found.comparisons) > 1 else []
        parts += [drawn[f'judges/{folder}'], *_pairs(results, comparison, looks), *_judges(comparison, looks)]
        parts += [*_votes(comparison), *_arms(comparison, looks), *_strengths(comparison, looks), *_reasons(comparison)]
        parts.append(page.link(os.path.relpath(folder, output.resolve()), 'Its verdicts and all numbers'))
    return page.section(TITLE, *parts)


def _pairs(results: Results, found: JudgedComparison, looks: Mapping[str, Look]) -> list[str]:
    measures = list(results.measures.values())
    some = [of for of in ('missing', 'empty') if any(any(getattr(pair, of).values()) for pair in found.pairs)]
    header = (
        *('pair', f'win rate by {found.who}', 'at equal lengths', 'all failures lost', 'all won'),
        *('p', 'Holm p', 'prompts', f'{found.unit} (resampled)', 'characters', *some),
        *(f'win rate: {measure.words.title}' for measure in measures),
    )
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(f'{pair.first} over {pair.second}', dot=look_of(looks, pair.first).colour),
            *_rates(pair.primary),
            summary.p_value(pair.p_value),
            summary.p_value(pair.adjusted_p),
            f'{pair.prompts:,}',
            f'{pair.clusters:,}',
            *(_of_both(getattr(pair, of), pair) for of in ('characters', *some)),
            *(estimate_cell(by_measure(measure, pair.first, pair.second)) for measure in measures),
        )
        for pair in found.pairs
    ]
    about = ABOUT.format(unit=found.unit) + COMBINED[found.combine] + MEASURES
    return [page.table(header, rows), page.paragraph(about, 'note')]


def _of_both(counts: Mapping[str, float], pair: JudgedPair) -> str:
    """'812, 530': a number of each assistant."""
    return ', '.join(f'{counts[name]:,.0f}' for name in (pair.first, pair.second))


def _rates(of: JudgeNumbers) -> tuple[Cell, str, str, str]:
    """Cells of a win rate: as judged, at equal lengths, with failures lost, and won."""
    equal, failed = of.rate_at_equal_lengths, of.failure_bounds
    bounds = ('–', '–') if failed is None else (number(failed[0]), number(failed[1]))
    return estimate_cell(of.rate), number(equal.mean if equal else None), *bounds


def _judges(found: JudgedComparison, looks: Mapping[str, Look]) -> list[str]:
    """The numbers of each judge, and of the panel."""
    header = (
        *('pair', 'judge', 'win rate', 'at equal lengths', 'all failures lost', 'all won', 'wins', 'ties', 'losses'),
        *('same in both orders', 'to the first', 'no preference', 'verdicts that could not be had'),
    )
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(f'{pair.first} over {pair.second}', dot=look_of(looks, pair.first).colour),
            Cell(judge, words=True),
            *_rates(of),
            *(f'{count:,}' for count in (of.wins, of.ties, of.losses)),
            estimate_cell(of.position.consistent if of.position else None),
            estimate_cell(of.position.first_position if of.position else None),
            f'{of.failures:,}',
            Cell(summary.causes_text(of.causes) if of.causes else '–', words=True),
        )
        for pair in found.pairs
        for judge, of in pair.judges.items()
    ]
    title = 'Each judge, and the panel' if len(found.judges) > 1 else 'The judge'
    table = page.details(title, page.table(header, rows), opened=len(rows) <= MAX_ROWS)
    return [table, page.paragraph(JUDGES, 'note')]


def _votes(found: JudgedComparison) -> list[str]:
    """The worth of a panel; nothing of one judge."""
    if len(found.judges) < 2:
        return []
    people = any(pair.errors is not None for pair in found.pairs)
    twos = list(dict.fromkeys(two for pair in found.pairs for two in pair.agreement))
    header = (
        *('pair', 'judges', 'correlation of preferences', 'independent votes'),
        *(f'agreement of {two}' for two in twos),
        *(('correlation of errors', 'independent votes by errors') if people else ()),
        *((f'agreement with people: {judge}' for judge in (*found.judges, PANEL)) if people else ()),
    )
    rows: list[Sequence[str | Cell]] = []
    for pair in found.pairs:
        votes, errors = pair.votes, pair.errors
        cells: list[str | Cell] = [
            f'{pair.first} over {pair.second}',
            str(len(found.judges)),
            number(votes.mean_correlation if votes else None),
            votes_cell(votes),
            *(estimate_cell(pair.agreement.get(two)) for two in twos),
        ]
        if people:
            cells += [number(errors.mean_correlation if errors else None), votes_cell(errors)]
            cells += [estimate_cell(errors.agreement.get(judge) if errors else None) for judge in found.judges]
            cells += [estimate_cell(errors.panel if errors else None)]
        rows.append(cells)
    title = 'The judges beside each other' + (', and people' if people else '')
    return [page.heading(title), page.table(header, rows), page.paragraph(VOTES, 'note')]


def _arms(found: JudgedComparison, looks: Mapping[str, Look]) -> list[str]:
    """Arms over their training seeds; nothing without two seeds of one."""
    if all(arm.win_rate.num_seeds < 2 for arm in found.arms):
        return []
    header = (
        *('arm', 'seeds', 'win rate', 'spread of all arms', f'seeds and {found.unit} at once'),
        *('all failures lost', 'all won', 'sign-flip p', 'Holm p'),
    )
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(f'{arm.arm} over {arm.other}', dot=look_of(looks, arm.arm).colour),
            str(arm.win_rate.num_seeds),
            *map(estimate_cell, (arm.win_rate, arm.intervals.pooled, arm.intervals.crossed)),
            *(estimate_cell(getattr(arm.bounds, side) if arm.bounds else None) for side in ('lost', 'won')),
            summary.p_value(arm.win_rate.p_value),
            summary.p_value(arm.adjusted),
        )
        for arm in found.arms
    ]
    return [page.heading('Over training seeds'), page.table(header, rows), page.paragraph(SEEDS, 'note')]


def _strengths(found: JudgedComparison, looks: Mapping[str, Look]) -> list[str]:
    if not found.strengths:
        return []
    rows = [
        (Cell(name, dot=look_of(looks, name).colour), estimate_cell(strength, 2, '+'))
        for name, strength in found.strengths.items()
    ]
    table = page.table(('assistant', 'strength'), rows)
    return [page.details('Strengths on one scale', table, page.paragraph(STRENGTHS, 'note'))]


def _reasons(found: JudgedComparison) -> list[str]:
    """Says why numbers are not there."""
    rows = [
        (f'{pair.first} over {pair.second}', Cell(who, words=True), Cell(what, words=True), Cell(why, words=True))
        for pair in found.pairs
        for who, reasons in ((PANEL, pair.reasons), *((judge, of.reasons) for judge, of in pair.judges.items()))
        for what, why in reasons.items()
    ]
    if not rows:
        return []
    return [page.details('Numbers that are not there', page.table(('pair', 'judge', 'number', 'reason'), rows))]
