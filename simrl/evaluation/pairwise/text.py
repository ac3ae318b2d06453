"""Tables of verdicts as text for a console."""

from collections.abc import Sequence

from simrl.evaluation.pairwise.table import Comparison, Table
from simrl.evaluation.ranking import Ranking
from simrl.evaluation.results.judges import ArmWinRate
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate


def console_table(result: Table) -> str:
    """The table as text."""
    lines: list[str] = []
    family = sum(of.p_value is not None for of in result.comparisons)
    for of in result.comparisons:
        lines += ['', *comparison_lines(of, family)]
    if result.seeds:
        lines += ['', 'over training seeds:', *seeds_lines(result.seeds)]
    for source, ranking in result.rankings.items():
        lines += ['', f'strengths by {source}, in log-odds:', *ranking_lines(ranking)]
    return '\n'.join(lines).strip('\n')


def comparison_lines(of: Comparison, family: int) -> list[str]:
    """Two assistants as text; `family` is the number of tests that p-values are adjusted for."""
    header = ('judge', 'win rate', 'failures lost, won', 'equal lengths', 'wins', 'ties', 'losses', 'same', 'to first')
    rows: list[tuple[str, ...]] = [header]
    for name, counted in of.judges.items():
        rates, length, position = counted.win_rates, counted.length_controlled, counted.position
        rows.append(
            (
                name,
                'none' if isinstance(rates, str) else rate_text(rates.observed.by_participant),
                '-'
                if isinstance(rates, str) or not rates.failures
                else f'{rates.all_lost.by_participant.mean:.3f}, {rates.all_won.by_participant.mean:.3f}',
                '-' if isinstance(length, str) else f'{length.controlled:.3f}',
                *map(str, (counted.wins, counted.ties, counted.losses)),
                *(
                    ('-', '-')
                    if position is None or isinstance(position, str)
                    else (f'{position.consistent.mean:.0%}', f'{position.first_position.mean:.3f}')
                ),
            )
        )
    about = f'{of.first} over {of.second}: {of.pairs} prompts of {of.clusters} people or openings; characters: '
    about += ' and '.join(f'{count:.0f}' for count in of.characters.values())
    for what, counts in (('empty', of.empty), ('missing', of.missing)):
        about += ''.join(f'; {what}: {count} of {name}' for name, count in counts.items() if count)
    lines = [about, *columns(rows)]
    if of.agreement is not None:
        votes, errors = of.agreement.votes, of.agreement.errors
        if not isinstance(votes, str) and votes.effective is not None:
            lines.append(
                f'{len(of.judges) - 1} judges vary as {votes.effective:.2f} independent ones (correlation '
                f'{votes.mean_correlation:.2f})'
            )
        if errors is not None and not isinstance(errors, str):
            each = ', '.join(f'{name} {rate_text(found)}' for name, found in errors.agreement.items())
            lines.append(f'agreement with people: {each}; panel {rate_text(errors.panel)}')
            if errors.effective_votes is not None:
                lines.append(f'by the correlation of errors {errors.effective_votes:.2f} independent votes')
    if of.p_value is not None:
        lines.append(f'sign test: p = {of.p_value:.3g}; Holm over {family}: {of.adjusted:.3g}')
    return lines


def seeds_lines(arms: Sequence[ArmWinRate]) -> list[str]:
    """Arms over their training seeds as text."""
    header = ('arm', 'seeds', 'win rate', 'pooled spread', 'seeds and people at once', 'p', 'Holm')
    rows: list[tuple[str, ...]] = [header]
    for of in arms:
        others = (of.intervals.pooled, of.intervals.crossed)
        tests = (of.win_rate.p_value, of.adjusted)
        rows.append(
            (
                f'{of.arm} over {of.other}',
                str(len(of.seeds)),
                rate_text(of.win_rate),
                *('-' if x is None else x.bounds_text() for x in others),
                *('-' if x is None else f'{x:.3g}' for x in tests),
            )
        )
    return columns(rows)


def ranking_lines(ranking: Ranking | str) -> list[str]:
    if isinstance(ranking, str):
        return [f'none: {ranking}']
    return columns([(name, rate_text(of)) for name, of in zip(ranking.models, ranking.strengths, strict=True)])


def rate_text(of: Estimate | SeedEstimate) -> str:
    return f'{of.mean:.3f} {of.bounds_text()}'


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells with equal widths; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  ' + '  '.join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
