"""Tables of comparisons: arms over their training seeds, by the primary interval and by others, and with failures."""

from collections.abc import Iterable, Sequence

from simrl.evaluation.gap_recovered import GapRecovered
from simrl.evaluation.position import PanelAgreement, Votes
from simrl.evaluation.report import page, summary
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Interval, Row, interval
from simrl.evaluation.results.measures import INITIAL, ArmResult, Difference, MeasureResult, OtherIntervals
from simrl.evaluation.seeds import SeedEstimate
from simrl.rewards.rubric import JUDGE_PART

MAX_ROWS = 24  # longer tables are folded
COMPARISONS = (
    'The unit is the training run: intervals and sign-flip tests are over training seeds, paired between arms, on the '
    'same examples. With n seeds p is at least 2 / 2ⁿ. Below it that of a pair of arms is adjusted for the number of '
    'pairs, of this measure, by Holm’s method; nothing else is adjusted for the number of comparisons. All seeds share '
    'the initial assistant and the data: intervals over seeds leave out what others of these would change. '
)
FAILED = (
    'An example without an outcome, of the assistant or of the initial one, is left out of the observed win rate. The '
    'other columns count all of these as lost, and as won. '
)
OTHER_INTERVALS = (
    'The t-interval over the training seeds of an arm, or of a pair of arms, is primary. “Spread of all arms” has the '
    'same mean, and the spread between runs estimated from all arms at once: few seeds get a shorter interval, which '
    'assumes that the runs of all arms spread alike. It is too short for an arm that has more than its share of the '
    'spread. “Seeds and {unit} at once” is of other training seeds and other {unit}; it is over the examples that all '
    'seeds have an outcome of. '
)


def estimate_cell(estimate: Interval | GapRecovered | None, digits: int = 2, sign: str = '') -> Cell:
    """A mean with its interval in small type below it; 'undefined' for a gap without a mean."""
    if isinstance(estimate, GapRecovered) and estimate.mean is None:
        return Cell('undefined')
    mean, _, bounds = interval(estimate, digits, sign).partition(' ')
    return Cell(mean, under=bounds)


def votes_cell(votes: Votes | PanelAgreement | None) -> Cell:
    """An effective number of votes with its interval."""
    if votes is None:
        return Cell('–')
    effective = votes.effective if isinstance(votes, Votes) else votes.effective_votes
    return Cell(summary.number(effective), under='' if effective is None else summary.bounds(votes.low, votes.high))


def panel_text(parts: Iterable[str], votes: Votes | None) -> str:
    """The worth of a panel's judges, whose scores are parts; empty without one."""
    if votes is None:
        return ''
    judges = sum(part.startswith(JUDGE_PART) for part in parts)
    correlate = (
        f'The score is the mean of {judges} judges, whose own are beside it. Their scores correlate at '
        f'{summary.number(votes.mean_correlation)}'
    )
    if votes.effective is None:
        return f'{correlate}, so that they cancel each other. '
    return (
        f'{correlate}: as votes they are worth {summary.number(votes.effective)} '
        f'{summary.bounds(votes.low, votes.high)} independent judges; what they are right about together counts as '
        'shared. '
    )


def comparisons(measure: MeasureResult) -> list[str]:
    words = measure.words
    header = (
        *('difference', 'significant', 'seeds', words.score, 'sign-flip p', 'win rate', 'sign-flip p'),
        f'these checkpoints only, over {words.unit}',
    )
    arms: list[Sequence[str | Cell]] = [
        (
            f'{name} − {INITIAL}',
            _significance(summary.significance(arm.gain, arm.checkpoint_gain)),
            str(arm.gain.num_seeds),
            *(estimate_cell(arm.gain, 3, '+'), summary.p_value(arm.gain.p_value)),
            *(estimate_cell(arm.win_rate), summary.p_value(arm.win_rate.p_value)),
            estimate_cell(arm.checkpoint_gain, 3, '+'),
        )
        for name, arm in measure.arms.items()
    ]
    pairs = [_pair(pair) for pair in measure.differences]
    note = (
        f'{COMPARISONS}The column over {words.unit} resamples {words.unit}: it is of these checkpoints only. '
        'Significant: the interval over training seeds excludes 0; with one seed only that of this checkpoint can. '
        'There is no interval from one alone, nor where all are alike.'
    )
    shown = [*arms, *pairs] if len(arms) + len(pairs) <= MAX_ROWS else arms
    folded = [] if shown is not arms else [page.details(f'All {len(pairs)} pairs of arms', page.table(header, pairs))]
    return [page.table(header, shown), *folded, page.paragraph(note, 'note'), *_other_intervals(measure)]


def _pair(pair: Difference) -> Sequence[str | Cell]:
    adjusted = '' if pair.adjusted_p is None else f'adjusted {summary.p_value(pair.adjusted_p)}'
    return (
        f'{pair.first} − {pair.second}',
        _significance(summary.significance(pair.score, pair.checkpoint_score)),
        str(pair.score.num_seeds),
        *(estimate_cell(pair.score, 3, '+'), Cell(summary.p_value(pair.score.p_value), under=adjusted)),
        *(estimate_cell(pair.win_rate, 2, '+'), summary.p_value(pair.win_rate.p_value)),
        estimate_cell(pair.checkpoint_score, 3, '+'),
    )


def _other_intervals(measure: MeasureResult) -> list[str]:
    """The intervals beside the primary one; nothing with one seed, or in results of an earlier version."""
    differences: list[tuple[str, ArmResult | Difference, SeedEstimate, OtherIntervals | None, str]] = [
        *((f'{name} − {INITIAL}', x, x.gain, x.gain_intervals, '') for name, x in measure.arms.items()),
        *((f'{x.first} − {x.second}', x, x.score, x.score_intervals, '+') for x in measure.differences),
    ]
    rows: list[Sequence[str | Cell]] = [
        (
            name,
            *_intervals(score, others, 3, '+'),
            *_intervals(found.win_rate, found.win_rate_intervals, 2, sign),
            _compared(found.compared, measure.examples, others),
        )
        for name, found, score, others, sign in differences
        if others and found.win_rate_intervals and score.num_seeds > 1
    ]
    if not rows:
        return []
    kinds = ('training seeds', 'spread of all arms', f'seeds and {measure.words.unit} at once')
    header = ('difference', *(f'{number}: {kind}' for number in (measure.words.score, 'win rate') for kind in kinds))
    table = page.table((*header, 'examples'), rows)
    note = page.paragraph(OTHER_INTERVALS.format(unit=measure.words.unit), 'note')
    return [page.details('The same differences with other intervals', table, note)]


def _intervals(own: SeedEstimate, others: OtherIntervals, digits: int, sign: str) -> Iterable[Cell]:
    return (estimate_cell(found, digits, sign) for found in (own, others.pooled, others.crossed))


def _compared(numbers: Sequence[int], examples: int, others: OtherIntervals) -> Cell:
    """The examples that a comparison is over, by seed, and with all seeds where these are fewer."""
    each = '–'.join(dict.fromkeys(f'{x:,}' for x in (min(numbers), max(numbers))))
    in_all = others.crossed.num_observations if others.crossed else 0
    return Cell(
        each if min(numbers) == examples else f'{each} of {examples:,}',
        under=f'{in_all:,} with all seeds' if in_all < min(numbers) else '',
    )


def _significance(words: str) -> Cell:
    return Cell(words, shade={'yes': 1.0, 'this checkpoint only': 0.4}.get(words, 0.0))


def failure_bounds(rows: Sequence[Row]) -> list[str]:
    """Win rates with failures lost, and won; nothing where there is none."""
    cells: list[Sequence[str | Cell]] = []
    for row in rows:
        for words, rate, found in (
            ('', row.win_rate, row.bounds),
            ('strict', row.strict_win_rate, row.strict_bounds),
        ):
            if found:
                estimates = map(estimate_cell, (rate, found.lost, found.won))
                cells.append((Cell(row.name, under=words), f'{row.failures:,}', *estimates))
    if not cells:
        return []
    table = page.table(('win rate', 'failures', 'observed', 'all lost', 'all won'), cells)
    return [page.details('Win rates with failures all lost, and all won', table, page.paragraph(FAILED, 'note'))]
