"""The sections of a study's report: win rates, with and without what is flagged, how sure they are, and of whom."""

import datetime
from collections.abc import Callable, Mapping, Sequence

from simrl.evaluation.report import page, summary
from simrl.evaluation.report.browse import REPORT_FILE as REPORT_FILE
from simrl.evaluation.report.drawing import Drawing, look_at
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.sections import drawn_panels
from simrl.evaluation.report.summary import number
from simrl.evaluation.report.tables import estimate_cell
from simrl.study.analysis import FIRST_TURNS, TOO_FEW, Analysis, PairResult, Rate
from simrl.study.events import PlanFrozen
from simrl.study.flags import MEANINGS
from simrl.study.report.figures import FEWEST, level_of, title_of
from simrl.study.settings import PlanSettings
from simrl.study.texts import number_of

REASONS_FILE = 'reasons.html'
TITLE = 'A blind user study: whose replies do people prefer?'
UNITS = {
    'participant': 'the mean over participants of each one’s mean vote: whoever votes more often counts once',
    'vote': 'the mean over votes, in which participants weigh as much as they vote',
}
SHARED = (
    'Both models continue from the reply that was preferred. From the second turn on their replies share a history, of '
    'which the better model has written more: a win rate over all turns is of replies, not of whole conversations. '
    'First turns are free of it.'
)
LATER = (
    'Later turns share a history, see above; and they are of those who went on: of other participants than the first.'
)
CRITERIA = (
    'Participants were told by which criteria to judge. Where a model was trained on a reward with the same criteria, '
    'people and reward measure the same construct, and their agreement says nothing about others.'
)
SAMPLES = (
    'The analysis that was planned comes first. The others state what it would be with other participants, or other '
    'turns; their p-values are not adjusted.'
)
SURE = (
    'The plan’s own is that of the section above. “Votes as independent” takes each vote for that of another '
    'participant: too narrow where votes of one participant are alike. GEE and the cumulative logit model have the '
    'position as a covariate; the latter has an intercept of each participant, and none of the task: each participant '
    'writes on one task, so that what is of the task is within their intercept, and intervals are of the tasks of this '
    'study. The sign test asks which model each participant prefers on the mean.'
)
POSITION = (
    'Sides are drawn anew, and balanced within each participant: a preference for a side does not favour a model. On '
    'the left: mean preference for the reply on the left, ½ without a bias. In log-odds: the effect of that side by '
    'the cumulative logit model. Longer: mean preference for the longer of two replies, whatever else they differ in.'
)
GROUPS = (
    f'Of a part of the votes, by the same unit; of fewer than {FEWEST} participants there is none. None of these is '
    'adjusted for their number.'
)
RANKING = (
    'Davidson’s model with ties on all votes of the analysis: of two models whose strengths differ by d, the stronger '
    'wins exp(d) times as often as it loses. Intervals resample participants.'
)


def report_page(
    analysis: Analysis,
    drawings: Mapping[str, Sequence[Drawing]],
    plan: PlanSettings,
    frozen: PlanFrozen | None,
    departed: Sequence[str],
    about: Sequence[str],
    names: Mapping[str, str],
) -> str:
    """The page.

    Args:
        plan, frozen: of the analysis, and as it was frozen.
        departed: sentences of `departures`.
        about: sentences on the study that come first: its name, its look, its dates.
        names: titles of document types and tasks by id.
    """
    departs = f'It departs from the frozen plan in {number_of(len(departed), "point")}, see below.' if departed else ''
    lead = [
        *(sentence(pair, len(analysis.pairs)) for pair in analysis.pairs),
        ' '.join(filter(None, (*about, departs))),
    ]
    if not analysis.pairs:
        lead.insert(0, 'No participant of the analysis has voted.')
    parts = [
        f'<h1>{page.escape(TITLE)}</h1>',
        f'<div class="lead">{"".join(page.paragraph(text) for text in lead if text)}</div>',
    ]
    if analysis.pairs:
        parts += [
            page.section('Win rates', *_win_rates(analysis), drawn_panels(drawings['win_rates']), *_notes(analysis)),
            page.section('With and without what is flagged', *_samples(analysis)),
            page.section('Other estimates', *_sure(analysis, plan)),
            page.section('Position and length', *_position(analysis)),
            page.section('By document type', *_groups(analysis, names, drawn_panels(drawings['types']))),
            page.section('By turn', *_turns(analysis, drawn_panels(drawings['turns']))),
        ]
    if analysis.ranking is not None:
        parts.append(page.section('All models on one scale', *_ranking(analysis)))
    parts += [
        page.section('Participants', *_flow(analysis)),
        page.section('Single votes', page.link(REASONS_FILE, 'All votes with their replies and reasons')),
        page.section('The plan, and departures from it', *_plan(plan, frozen, departed)),
    ]
    return page.document(TITLE, parts)


def sentence(pair: PairResult, pairs: int) -> str:
    """A pair in words: a preference only where it is significant."""
    rate, estimate = pair.rate, pair.rate.estimate
    if isinstance(estimate, str):
        return f'{title_of(pair)}: {estimate}.'
    winner, loser = (pair.first, pair.second) if estimate.mean > 0.5 else (pair.second, pair.first)
    if rate.untested:
        said = f'Whether participants prefer {pair.first} or {pair.second} cannot be said: {rate.untested}'
    elif pair.significant:
        said = f'Participants prefer {winner} to {loser}'
    else:
        said = f'Participants do not significantly prefer {pair.first} or {pair.second}'
    holm = f', adjusted for {pairs} pairs {summary.p_value(pair.adjusted_p)}' if pairs > 1 else ''
    p_value = '' if rate.p_value is None else f'; p {_equals(rate.p_value)}{holm}'
    return (
        f'{said}{";" if rate.untested else ":"} the win rate of {pair.first} is {summary.interval(estimate, 3)} '
        f'({number_of(rate.participants, "participant")}, {number_of(rate.votes, "vote")}{p_value}).'
    )


def _equals(p_value: float) -> str:
    text = summary.p_value(p_value)
    return text if text.startswith('<') else f'= {text}'


def rate_cell(rate: Rate | None) -> Cell:
    if rate is None:
        return Cell('–')
    return Cell('–', under='too few votes') if isinstance(rate.estimate, str) else estimate_cell(rate.estimate, 3)


def _dotted(position: int, text: str, under: str = '') -> Cell:
    return Cell(text, under=under, dot=look_at(position).colour)


def _win_rates(analysis: Analysis) -> list[str]:
    header = (
        *('pair', 'win rate', 'p', 'Holm p', 'significant', 'participants', 'votes', 'wins', 'ties', 'losses'),
        'first turns alone',
    )
    rows: list[Sequence[str | Cell]] = [
        (
            _dotted(position, title_of(pair)),
            rate_cell(pair.rate),
            summary.p_value(pair.rate.p_value),
            '–' if pair.rate.untested else summary.p_value(pair.adjusted_p),
            Cell(pair.rate.untested or ('yes' if pair.significant else 'no'), shade=float(pair.significant)),
            f'{pair.rate.participants:,}',
            f'{pair.rate.votes:,}',
            *(f'{count:,}' for count in (pair.wins, pair.ties, pair.losses)),
            rate_cell(analysis.samples[FIRST_TURNS].get((pair.first, pair.second))),
        )
        for position, pair in enumerate(analysis.pairs)
    ]
    return [page.table(header, rows)]


def _notes(analysis: Analysis) -> list[str]:
    about = (
        f'Win rate: {UNITS[analysis.unit]}; ties count ½. {level_of(analysis)} intervals are over participants, each '
        'by itself; p-values are of Student’s t over participants, that the win rate is ½. Holm: adjusted for all '
        'pairs; significant by that procedure at the level of this look.'
    )
    return [page.paragraph(text, 'note') for text in (about, SHARED, CRITERIA)]


def _samples(analysis: Analysis) -> list[str]:
    rows: list[Sequence[str | Cell]] = []
    for name, rates in analysis.samples.items():
        participants, votes = sum(x.participants for x in rates.values()), sum(x.votes for x in rates.values())
        cells: list[str | Cell] = []
        for pair in analysis.pairs:
            rate = rates.get((pair.first, pair.second))
            p_value = f'\np {_equals(rate.p_value)}' if rate and rate.p_value is not None else ''
            cell = rate_cell(rate)
            cells.append(Cell(cell.text, under=f'{cell.under}{p_value}'))
        rows.append((name, *cells, f'{participants:,}', f'{votes:,}'))
    header = ('sample', *(title_of(pair) for pair in analysis.pairs), 'participants', 'votes')
    return [page.table(header, rows), page.paragraph(SAMPLES, 'note')]


def _sure(analysis: Analysis, plan: PlanSettings) -> list[str]:
    found = analysis.clustering
    header = ('pair', 'by participant', 'by vote', 'votes as independent', 'GEE', 'cumulative logit', 'sign test')
    rows: list[Sequence[str | Cell]] = []
    for position, pair in enumerate(analysis.pairs):
        by_unit, sign = pair.by_unit, pair.majorities
        units = (
            [Cell('–')] * 3
            if isinstance(by_unit, str)
            else [estimate_cell(x, 3) for x in (by_unit.by_participant, by_unit.by_vote, by_unit.naive)]
        )
        models = [
            Cell('–', under='no fit')
            if isinstance(x, str)
            else Cell(number(x.win_rate.value, 3), under=summary.bounds(x.win_rate.low, x.win_rate.high, 3))
            for x in (pair.gee, pair.cumulative_logit)
        ]
        signs = (
            Cell('–')
            if isinstance(sign, str)
            else Cell(
                f'{sign.first} : {sign.second}',
                under=f'neither {sign.neither}' + ('' if sign.p_value is None else f'\np {_equals(sign.p_value)}'),
            )
        )
        rows.append((_dotted(position, title_of(pair)), *units, *models, signs))
    reasons = sorted(
        f'{title_of(pair)}: {x}.'
        for pair in analysis.pairs
        for x in (pair.gee, pair.cumulative_logit)
        if isinstance(x, str)
    )
    clustering = (
        'The correlation of two votes of one participant cannot be estimated.'
        if found.icc is None
        else (
            f'Two votes of one participant correlate by {found.icc:.2f} [{found.low:.2f}, {found.high:.2f}] (80% '
            f'interval, pooled over pairs; {plan.clustering:.2f} was planned with). Ties are {found.ties:.0%} of votes '
            f'({plan.tie_share:.0%}).'
        )
    )
    return [
        page.table(header, rows),
        page.paragraph(f'{SURE} {clustering}', 'note'),
        *(page.paragraph(reason, 'note') for reason in reasons),
    ]


def _position(analysis: Analysis) -> list[str]:
    header = ('pair', 'on the left', 'p', 'in log-odds', 'longer reply', 'characters of the first', 'of the second')
    rows: list[Sequence[str | Cell]] = []
    for position, pair in enumerate(analysis.pairs):
        logit = None if isinstance(pair.cumulative_logit, str) else pair.cumulative_logit.position
        rows.append(
            (
                _dotted(position, title_of(pair)),
                rate_cell(pair.left),
                summary.p_value(pair.left.p_value),
                '–'
                if logit is None
                else Cell(number(logit.value, 2, '+'), under=summary.bounds(logit.low, logit.high)),
                rate_cell(pair.longer),
                *(f'{pair.characters[model]:,.0f}' for model in (pair.first, pair.second)),
            )
        )
    if len(rows) > 1 and analysis.left:
        rows.append(('all pairs', rate_cell(analysis.left), summary.p_value(analysis.left.p_value), *['–'] * 4))
    return [page.table(header, rows), page.paragraph(POSITION, 'note')]


def _groups(analysis: Analysis, names: Mapping[str, str], drawn: str) -> list[str]:
    by_task = _grouped(analysis, lambda pair: pair.tasks, names, 'task')
    return [
        _grouped(analysis, lambda pair: pair.types, names, 'document type'),
        drawn,
        page.paragraph(GROUPS, 'note'),
        page.details('By task', by_task),
    ]


def _grouped(
    analysis: Analysis, read: Callable[[PairResult], Mapping[str, Rate]], names: Mapping[str, str], title: str
) -> str:
    keys = sorted({key for pair in analysis.pairs for key in read(pair)}, key=lambda key: names.get(key, key))
    rows = [
        (names.get(key, key), *(cell for pair in analysis.pairs for cell in _sized(read(pair).get(key))))
        for key in keys
    ]
    return page.table((title, *_headers(analysis)), rows)


def _turns(analysis: Analysis, drawn: str) -> list[str]:
    turns = sorted({turn for pair in analysis.pairs for turn in pair.turns})
    rows = [(str(turn), *(cell for pair in analysis.pairs for cell in _sized(pair.turns.get(turn)))) for turn in turns]
    table = page.details('Every turn', page.table(('turn', *_headers(analysis)), rows))
    return [drawn, page.paragraph(LATER, 'note'), table]


def _headers(analysis: Analysis) -> list[str]:
    """Of each pair its win rate and its number of participants."""
    return [text for pair in analysis.pairs for text in (title_of(pair), 'participants')]


def _sized(rate: Rate | None) -> tuple[Cell, str]:
    """A part's win rate and its number of participants."""
    if rate is None:
        return Cell('–'), '0'
    cell = rate_cell(rate) if rate.participants >= FEWEST else Cell('–', under=TOO_FEW)
    return cell, f'{rate.participants:,}'


def _ranking(analysis: Analysis) -> list[str]:
    ranking = analysis.ranking
    if ranking is None or isinstance(ranking, str):
        return [page.paragraph(f'There is none: {ranking}.')]
    rows: list[Sequence[str | Cell]] = [
        (
            model,
            estimate_cell(strength, 3, '+'),
            *('–' if model == other else number(rate, 3) for other, rate in zip(ranking.models, rates, strict=True)),
        )
        for model, strength, rates in zip(ranking.models, ranking.strengths, ranking.win_rates, strict=True)
    ]
    header = ('model', 'strength', *(f'win rate over {model}' for model in ranking.models))
    return [page.table(header, rows), page.paragraph(RANKING, 'note')]


def _flow(analysis: Analysis) -> list[str]:
    flow = analysis.flow
    rows: list[Sequence[str | Cell]] = [
        ('arrived', f'{flow.arrived:,}', Cell('entered from the panel’s link, or opened the page', words=True)),
        *(
            (name.replace('_', ' '), f'{count:,}', Cell(ENDS.get(name, ''), words=True))
            for name, count in flow.ends.items()
        ),
        *(
            ('excluded', f'{count:,}', Cell(f'by an administrator: {reason}', words=True))
            for reason, count in flow.excluded.items()
        ),
        ('excluded by flag', f'{flow.excluded_by_flag:,}', Cell('by the plan; see the flags below', words=True)),
        ('in the analysis', f'{flow.primary:,}', Cell('', words=True)),
    ]
    of_pair = [
        (title_of(pair), f'{pair.assigned:,}', f'{pair.completed:,}', f'{pair.rate.participants:,}')
        for pair in analysis.pairs
    ]
    flags = [(name, f'{count:,}', Cell(MEANINGS.get(name, ''), words=True)) for name, count in flow.flags.items()]
    said = (
        f'Of participants who did not complete: {number_of(flow.unfinished_votes, "vote")}. '
        f'{number_of(flow.reentered, "participant")} came back by another session of the panel, and continued where '
        f'they were. In {number_of(flow.named, "turn")} of the analysis a reply may name its model.'
    )
    return [
        page.table(('participants', 'number', 'what it means'), rows),
        page.paragraph(said, 'note'),
        page.heading('By pair'),
        page.table(('pair', 'assigned', 'completed', 'in the analysis'), of_pair),
        page.heading('Flags of those who completed'),
        page.table(('flag', 'participants', 'what it means'), flags) if flags else page.paragraph('None.', 'note'),
    ]


ENDS = {
    'completed': 'wrote the final text',
    'declined': 'did not consent',
    'failed_check': 'did not pass the comprehension check',
    'withdrawn': 'left by their own wish',
    'closed': 'came when the study was paused or had all its participants, or lost a model of theirs',
    'deleted': 'had their data deleted',
}


def _plan(plan: PlanSettings, frozen: PlanFrozen | None, departed: Sequence[str]) -> list[str]:
    points = ''.join(f'<li>{page.escape(text)}</li>' for text in departed)
    parts = [f'<ul>{points}</ul>' if departed else page.paragraph('The analysis is as it was planned.')]
    if frozen is not None:
        rows = [(name, Cell(value, words=True)) for name, value in page.flat(frozen.plan)]
        parts.append(
            page.details(
                f'The plan, frozen at the first consent (SHA-256 {frozen.plan_hash})',
                page.table(('field', 'value'), rows),
            )
        )
    return parts


def dates(first: float, last: float) -> str:
    """'2026-11-30 to 2026-12-02 (UTC)'."""
    days = [datetime.datetime.fromtimestamp(at, datetime.UTC).strftime('%Y-%m-%d') for at in (first, last)]
    return f'{" to ".join(dict.fromkeys(days))} (UTC)'
