"""A simulator's card as one self-contained page, in the style of the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.evaluation.card import CardForecast, CardTransfer, MeasureUtility, SimulatorCard
from simrl.evaluation.fidelity import table as fidelity_table
from simrl.evaluation.report import matrix, page, summary, verdicts
from simrl.evaluation.report.card_failures import NOT_MEASURED, absent, conversations, cost, training
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Interval, interval, number
from simrl.evaluation.report.tables import estimate_cell, panel_text

UTILITY = (
    'The first row is over training seeds, the unit of a claim about a simulator. Rows of single assistants have '
    'intervals over {unit}: of that checkpoint only. '
)
TRANSFER = (
    'Gains in {score} of its assistants over the initial one, with each simulator, conversation by conversation; '
    'intervals over training seeds, in the last column over conversations, of these checkpoints only. '
)
MET = 'Every assistant with this simulator: mean {score}; intervals over conversations, of that checkpoint only. '
FIDELITY = (
    'Rates are over conversations with the initial assistant. Perplexity is per token of people’s messages that no '
    'simulator was trained on. '
)
FORECAST = (
    'Known before anything was trained against it, from {examples:,} examples of {samples:,} conversations or replies '
    'each. {people}'
)


def document(card: SimulatorCard) -> str:
    """The page of a card."""
    parts = [
        f'<h1>{page.escape(f"Simulator card: {card.name}")}</h1>',
        f'<div class="lead">{"".join(map(page.paragraph, sentences(card)))}</div>',
        page.section('The simulator', *_identity(card)),
        page.section('Utility', *_utility(card)),
        *([page.section(verdicts.TITLE, *_verdicts(card))] if card.verdicts else []),
        page.section(*_transfer(card)),
        page.section('Fidelity', *_fidelity(card)),
        page.section('Forecast', *_forecast(card)),
        page.section('Failures', *conversations(card), *training(card)),
        page.section('Cost', *cost(card.cost, card.training)),
        page.section('Not measured', *_missing(card.not_measured)),
    ]
    return page.document(f'Simulator card: {card.name}', parts)


def sentences(card: SimulatorCard) -> list[str]:
    """The card in short."""
    about, size = card.identity, card.parameters
    model = f', {about.model}' if about.model else ''
    parameters = f', {size:,} parameters' if size else ''
    said = [f'A simulator of the kind “{about.kind}”{model}{parameters}, of the run {about.run}.']
    if card.utility is None:
        said.append(f'Utility: {NOT_MEASURED}; {card.not_measured["utility"]}.')
    else:
        measure = next(iter(card.utility.values()))
        several = measure.arm.win_rate.num_seeds > 1
        one = next(iter(measure.assistants.values()))
        found: Interval | None = measure.arm.win_rate if several else one.win_rate
        over = f'{measure.arm.win_rate.num_seeds} training seeds' if several else f'{measure.words.unit}, one seed'
        said.append(
            f'Assistants that trained against it are preferred to the initial assistant at a rate of '
            f'{interval(found)} (interval over {over}; {measure.words.title}, {measure.clusters:,} '
            f'{measure.words.unit}).'
        )
    return [*said, card.caution]


def _identity(card: SimulatorCard) -> list[str]:
    about, size = card.identity, card.parameters
    none_told = 'those of its members' if 'members' in about.depends_on else 'none: it is told nothing'
    facts: dict[str, Any] = {
        'arm': card.name,
        'kind': about.kind,
        'model': about.model or 'none',
        'parameters': f'{size:,}' if size else NOT_MEASURED if 'parameters' in card.not_measured else 'none',
        'prompt version (fingerprint of what it is told)': about.depends_on.get('told', none_told),
        'trained against': 'no: it is held out' if about.held_out else 'yes',
        'run': f'{about.run}, the scene {about.scene}, simrl {about.version}',
    }
    rows = [(name, Cell(str(value), words=True)) for name, value in facts.items()]
    rows += [(f'sha256 of {name}', Cell(value, words=True)) for name, value in about.inputs.items()]
    settings = [(name, Cell(value, words=True)) for name, value in page.flat(about.settings)]
    depends = [(name, Cell(value, words=True)) for name, value in page.flat(about.depends_on)]
    return [
        page.table(('', 'value'), rows),
        page.details('The settings of its arm', page.table(('field', 'value'), settings)),
        page.details('What its messages depend on: model, prompts, sampling', page.table(('field', 'value'), depends)),
    ]


def _utility(card: SimulatorCard) -> list[str]:
    if card.utility is None:
        return [absent(card.not_measured['utility'])]
    return [part for measure in card.utility.values() for part in _measure(measure)]


def _measure(measure: MeasureUtility) -> list[str]:
    arm, words = measure.arm, measure.words
    strict, recovered = arm.strict_win_rate is not None, arm.gap_recovered is not None
    header = (
        *('', 'win rate'),
        *(['strict win rate'] if strict else []),
        *('gain', words.score),
        *(['gap recovered'] if recovered else []),
        *('n', f'without a {words.score}'),
    )
    over_seeds: list[str | Cell] = [
        f'{len(arm.seeds)} seed{"s" if len(arm.seeds) > 1 else ""}',
        estimate_cell(arm.win_rate),
        *([estimate_cell(arm.strict_win_rate)] if strict else []),
        *(estimate_cell(arm.gain, 3, '+'), estimate_cell(arm.score, 3)),
        *([estimate_cell(arm.gap_recovered)] if recovered else []),
        *(f'{measure.clusters:,} {words.unit}', '–'),
    ]
    rows: list[Sequence[str | Cell]] = [
        (
            name,
            estimate_cell(found.win_rate),
            *([estimate_cell(found.strict_win_rate)] if strict else []),
            *(estimate_cell(found.gain, 3, '+'), estimate_cell(found.score, 3)),
            *(['–'] if recovered else []),
            *(f'{found.score.num_observations:,}', f'{sum(found.causes.values()):,}'),
        )
        for name, found in measure.assistants.items()
    ]
    causes = summary.causes_of(measure.assistants.values())
    lost = f'Left out, without a {words.score}: {summary.causes_text(causes)}. ' if causes else ''
    panel = panel_text(arm.parts, measure.votes)
    return [
        page.heading(words.title),
        page.table(header, [over_seeds, *rows]),
        page.paragraph(f'{UTILITY.format(unit=words.unit)}{lost}{panel}{words.about}', 'note'),
        *_other_intervals(measure),
    ]


def _other_intervals(measure: MeasureUtility) -> list[str]:
    """The win rate over seeds with its further intervals, and with failures lost and won; nothing without any."""
    arm, others = measure.arm, measure.arm.win_rate_intervals
    found: dict[str, Interval | None] = {}
    if others is not None and len(arm.seeds) > 1:
        found = {
            'spread of all arms': others.pooled,
            f'seeds and {measure.words.unit} at once': others.crossed,
        }
    if arm.win_rate_bounds is not None:
        found |= {'failures all lost': arm.win_rate_bounds.lost, 'failures all won': arm.win_rate_bounds.won}
    rows = [(words, estimate_cell(estimate)) for words, estimate in found.items() if estimate is not None]
    return [page.details('The win rate with other intervals', page.table(('', 'win rate'), rows))] if rows else []


def _verdicts(card: SimulatorCard) -> list[str]:
    return verdicts.parts(('', verdict) for verdict in card.verdicts)


def _transfer(card: SimulatorCard) -> list[str]:
    """The title of the section, then its parts."""
    found = card.transfer
    if found is None:
        return ['Transfer', absent(card.not_measured['transfer'])]
    score = found.score if found.times == 1 else f'{found.score} × {found.times}'
    title = 'Transfer' if found.times == 1 else f'Transfer (× {found.times})'
    return [title, *_gains(card, found, score), *_met(card, found, score)]


def _gains(card: SimulatorCard, found: CardTransfer, score: str) -> list[str]:
    if found.gains is None:
        return [absent(card.not_measured.get('transfer') or card.not_measured['utility'])]
    gains = found.gains
    rows: list[Sequence[str | Cell]] = [
        (f'{words} (mean)', _score(found, over_seeds), _score(found, checkpoints))
        for words, over_seeds, checkpoints in (
            (matrix.OTHERS, gains.other_kinds, gains.checkpoint_other_kinds),
            (matrix.HELD_OUT_USERS, gains.held_out, gains.checkpoint_held_out),
        )
    ]
    rows += [
        (
            f'{user}{" (its own)" if user == card.name else ""}',
            _score(found, gain),
            _score(found, gains.checkpoints.get(user)),
        )
        for user, gain in gains.simulators.items()
    ]
    return [
        page.table(('with', f'{len(gains.seeds)} training seeds', 'these checkpoints only'), rows),
        page.paragraph(TRANSFER.format(score=score), 'note'),
    ]


def _met(card: SimulatorCard, found: CardTransfer, score: str) -> list[str]:
    if found.met is None:
        return [absent(card.not_measured['assistants with it'])] if 'assistants with it' in card.not_measured else []
    digits = matrix.mean_digits(found.times)
    rows = []
    for assistant, cell in found.met.items():
        low, high = (None if bound is None else bound * found.times for bound in (cell.low, cell.high))
        mean = Cell(number(cell.mean * found.times, digits), under=summary.bounds(low, high, digits))
        rows.append((assistant, mean, f'{cell.conversations:,}', f'{cell.failed:,}'))
    header = ('assistant', score, 'conversations', 'without a score')
    return [page.table(header, rows), page.paragraph(MET.format(score=score), 'note')]


def _fidelity(card: SimulatorCard) -> list[str]:
    found = card.fidelity
    if found is None:
        return [absent(card.not_measured['fidelity'])]
    nats = found.nats_per_token
    rows: list[Sequence[str | Cell]] = [
        ('perplexity per token', NOT_MEASURED if found.perplexity is None else number(found.perplexity), '–'),
        ('nats per token', NOT_MEASURED if nats is None else estimate_cell(nats), '–'),
    ]
    rows += [
        (name.replace('_', ' '), _rate(value), _rate(card.people.get(name))) for name, value in found.statistics.items()
    ]
    parts = [page.table(('', 'simulator', 'people'), rows), page.paragraph(FIDELITY, 'note')]
    if found.replayed:
        parts += [page.heading('Turns of real conversations, replayed'), page.paragraph(fidelity_table.ABOUT, 'note')]
    for position, (source, measured) in enumerate(found.replayed.items()):
        lines = fidelity_table.lines_of(measured)
        if source in found.nats_by_source:
            lines.append(('perplexity', '', number(math.exp(found.nats_by_source[source].mean)), ''))
        table = page.table(('measure', 'people', 'simulator', 'excess'), lines)
        about = page.paragraph(fidelity_table.about(measured), 'note')
        parts.append(page.details(source, table, about, opened=position == 0))
    return parts


def _forecast(card: SimulatorCard) -> list[str]:
    found = card.forecast
    if found is None:
        return [absent(card.not_measured['forecast'])]
    rows: list[Sequence[str | Cell]] = [
        (words, NOT_MEASURED if estimate is None else estimate_cell(estimate, 3), known)
        for words, estimate, known in (
            ('cosine of the policy gradients', found.own.cosine, _correlated(found, 'cosine')),
            (f'gain by its best of {found.n}', found.own.best_of_n, _correlated(found, 'best_of_n')),
        )
    ]
    note = FORECAST.format(examples=found.examples, samples=found.samples, people=found.people)
    header = ('forecast', 'interval over examples', 'rank correlation with the utility, over the arms of the run')
    why = [page.paragraph(f'No cosine, or no interval: {found.own.reason}.', 'note')] if found.own.reason else []
    return [page.table(header, rows), page.paragraph(note, 'note'), *why]


def _correlated(found: CardForecast, forecast: str) -> Cell:
    known = [
        f'{x.utility.replace("_", " ")}: {number(x.mean)} {summary.bounds(x.low, x.high)} ({x.num_arms} arms)'
        for x in found.correlations
        if x.forecast == forecast and x.mean is not None
    ]
    return Cell('; '.join(known) or NOT_MEASURED, words=True)


def _missing(missing: Mapping[str, str]) -> list[str]:
    if not missing:
        return [page.paragraph('All that a card has is measured.')]
    return [page.table(('number', 'why'), [(name, Cell(why, words=True)) for name, why in missing.items()])]


def _score(found: CardTransfer, estimate: Interval | None) -> Cell | str:
    """A difference of scores, multiplied as the card says."""
    shown = estimate_cell(matrix.scaled(estimate, found.times), matrix.gain_digits(found.times), '+')
    return NOT_MEASURED if estimate is None else shown


def _rate(value: float | None) -> str:
    return NOT_MEASURED if value is None else number(value, 2 if abs(value) >= 1 else 3)
