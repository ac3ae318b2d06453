"""The sections of the report, in reading order: outcomes, how sure they are, why, and what was run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.evaluation.fidelity import table as fidelity_table
from simrl.evaluation.report import drawing, lengths, matrix, page, summary, tables, utility
from simrl.evaluation.report.browse import BROWSE_FILE
from simrl.evaluation.report.drawing import NARROW, WIDE, Drawing, Look
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Row, number, share
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import MeasureResult
from simrl.evaluation.results.simulators import FidelityResult

MAX_SHOWN = 12  # examples with every assistant; conversations.html has all
TITLE = 'Which user simulator trains the better assistant?'
WIN_RATE = 'Win rate: the mean probability that this assistant is preferred to the initial one on the same example. '
STRICT = 'Strict: the share of examples with a higher score, ties count ½. '
GAP_RECOVERED = (
    'Gap recovered: the gain over the initial assistant as a share of the gain of the arm that trains against people '
    'themselves; its interval is of these checkpoints only, and it may exceed 1. '
)
CUT = (
    'Cut: messages of the assistant that reached max_new_tokens; below, conversations in which a message of the user '
    'did. '
)
UTILITY = (
    'Win rates of the first measure, with its intervals. An arm without the number is in no figure: people have no '
    'parameters, and a simulator behind an endpoint has no likelihood. Arms of almost equal numbers are drawn side by '
    'side; of a number that all share there is no figure.'
)
BEYOND_PEOPLE = (
    'Beyond people: the excess of the fidelity table, how much farther a simulator’s replayed turns are from people’s '
    'than two halves of people’s are from each other; 0 for one that says what people say, and more is farther. '
    'Distributions: the mean over those that all arms have, in bits (Jensen-Shannon). Embeddings: the energy distance '
    'of sentence embeddings.'
)
TRAINING = (
    'Rewards are under each arm’s own simulator, so they compare a run with itself and not arms with each other. Thick '
    'lines are means over seeds, thin lines single seeds. A group is the conversations of one opening; where all have '
    'the same reward there is no gradient.'
)
VALIDATION = (
    ' Validation is on conversations that training does not start from, the same after every step. The square is the '
    'step whose checkpoint the run left: the first that no later one beats by a mean paired difference of more than '
    '{margin} × its standard error.'
)
FIDELITY = (
    'Rates are over conversations with the initial assistant. Perplexity is per token of people’s messages that no '
    'simulator was trained on; it is not known for simulators off the device.'
)


def report_page(
    results: Results,
    settings: Mapping[str, Any],
    looks: Mapping[str, Look],
    drawings: Mapping[str, Sequence[Drawing]],
    added: str = '',
) -> str:
    """The page.

    Args:
        settings: those of config.json.
        looks: of `looks_of`.
        drawings: of `gallery.drawings_of`.
        added: sections of what tools have added; '' for none.
    """
    lead = '\n'.join(page.paragraph(text) for text in summary.sentences(results))
    parts = [f'<h1>{page.escape(TITLE)}</h1>', f'<div class="lead">{lead}</div>']
    for name, measure in results.measures.items():
        drawn = drawn_panels(drawings[f'measure/{name}'])
        parts.append(page.section(measure.words.title, *_measure(results, measure, looks, drawn)))
    parts.append(added)
    header, rows = utility.table(results, looks)
    if rows:
        beyond = BEYOND_PEOPLE if any(name.startswith('beyond people') for name in header) else ''
        about = ' '.join(filter(None, (UTILITY, beyond, utility.about_forecast(results))))
        known = [page.table(header, rows), page.paragraph(about, 'note')]
        title = 'Utility by what is known of a simulator'
        parts.append(page.section(title, *known, drawn_panels(drawings['utility'])))
    trained = [arm for arm in results.experiment.arms if results.experiment.assistants_of(arm)]
    legend = page.legend({arm: (looks[arm].colour, looks[arm].line) for arm in trained})
    drawn = drawn_panels(drawings['training'])
    parts.append(page.section('Training', legend, drawn, page.paragraph(_about_training(results), 'note')))
    parts.append(page.section('Lengths and endings', *_lengths(results, looks, drawings, legend)))
    if results.matrix:
        drawn = drawn_panels(drawings['matrix'])
        found, colours = results.matrix, {name: look.colour for name, look in looks.items()}
        title = matrix.titled('Every assistant with every user', found)
        parts.append(page.section(title, *matrix.matrix(results.experiment, found, colours, drawn)))
        title = matrix.titled('Gains with other simulators', found)
        parts.append(page.section(title, *matrix.transfers(results, found, colours)))
    parts += [
        page.section('Simulators beside people', *_fidelity(results, looks)),
        *_conversations(results, looks),
        page.section('Settings', *_settings(settings)),
        page.section('Timings', *_timings(results)),
    ]
    return page.document(TITLE, parts)


def _measure(results: Results, measure: MeasureResult, looks: Mapping[str, Look], drawn: str) -> list[str]:
    rows = summary.rows_of(results.experiment, measure)
    parts = [*_arms(results, measure, rows, looks), drawn, page.heading('Comparisons'), *tables.comparisons(measure)]
    for label in rows[0].labels:
        kinds = list(rows[0].labels[label])
        cells = [
            (
                Cell(row.name, dot=looks[row.name].colour),
                *(Cell(share(row.labels[label][kind]), shade=row.labels[label][kind]) for kind in kinds),
            )
            for row in rows
        ]
        title = label.replace('_', ' ').capitalize()
        parts += [page.heading(f'{title}: share of conversations'), page.table(('assistant', *kinds), cells)]
    return parts


def _arms(results: Results, measure: MeasureResult, rows: Sequence[Row], looks: Mapping[str, Look]) -> list[str]:
    strict = any(row.strict_win_rate for row in rows)
    recovered = any(row.gap_recovered for row in rows)
    kinds = {name: arm.kind for name, arm in results.experiment.arms.items() if arm.kind != name}
    header = (
        *('assistant', 'seeds', measure.words.score),
        *(part.replace('_', ' ') for part in rows[0].parts),
        'win rate',
        *(['strict win rate'] if strict else []),
        *(['gap recovered'] if recovered else []),
        'messages of the assistant',
        *(f'ended: {summary.end_words(end)}' for end in rows[0].ends),
        'cut',
    )
    cells: list[Sequence[str | Cell]] = [
        (
            Cell(row.name, under=kinds.get(row.name, ''), dot=looks[row.name].colour),
            str(row.num_seeds) if row.num_seeds else '–',
            *map(tables.estimate_cell, (row.score, *row.parts.values(), row.win_rate)),
            *([tables.estimate_cell(row.strict_win_rate)] if strict else []),
            *([tables.estimate_cell(row.gap_recovered)] if recovered else []),
            number(row.turns, 1),
            *map(share, row.ends.values()),
            Cell(f'{row.truncated:.1%}', under=f'user {row.user_truncated:.1%}'),
        )
        for row in rows
    ]
    gaps = [row.gap_recovered for row in rows if row.gap_recovered and row.gap_recovered.mean is None]
    reasons = sorted({gap.reason for gap in gaps if gap.reason})
    note = ''.join(
        (
            f'{summary.basis(rows, measure.words.unit)} {measure.words.about} {WIN_RATE}',
            tables.panel_text(rows[0].parts, measure.votes),
            STRICT if strict else '',
            GAP_RECOVERED if recovered else '',
            f'It is undefined here: {"; ".join(reasons)}. ' if reasons else '',
            CUT,
            'Below an arm’s name: the kind of its simulator.' if kinds else '',
        )
    )
    parts = [page.table(header, cells), page.paragraph(note, 'note'), *tables.failure_bounds(rows)]
    if max(row.num_seeds for row in rows) > 1:
        each: list[Sequence[str | Cell]] = [
            (
                Cell(name, dot=looks[name].colour),
                *map(tables.estimate_cell, (found.score, found.gain, found.win_rate)),
                *([tables.estimate_cell(found.strict_win_rate)] if strict else []),
            )
            for name, found in measure.assistants.items()
        ]
        header = ('assistant', measure.words.score, 'gain', 'win rate', *(['strict win rate'] if strict else []))
        title = f'Every checkpoint by itself (intervals over {measure.words.unit}: that checkpoint only)'
        parts.append(page.details(title, page.table(header, each)))
    return parts


def _lengths(
    results: Results, looks: Mapping[str, Look], drawings: Mapping[str, Sequence[Drawing]], legend: str
) -> list[str]:
    header, rows = lengths.table(results, looks)
    parts = [page.table(header, rows), page.paragraph(lengths.ABOUT, 'note')] if rows else []
    if drawings['lengths']:
        parts += [legend, drawn_panels(drawings['lengths'])]
    for name, measure in results.measures.items():
        parts += [page.heading(measure.words.title), drawn_panels(drawings[f'ends/{name}'])]
    return parts


def _fidelity(results: Results, looks: Mapping[str, Look]) -> list[str]:
    found = results.fidelity
    names = [name for name, value in found.people.items() if value is not None]
    names += [x for simulator in found.simulators.values() for x, y in simulator.statistics.items() if y is not None]
    names = list(dict.fromkeys(names))
    rows: list[Sequence[str | Cell]] = []
    if any(value is not None for value in found.people.values()):
        colour = drawing.PEOPLE_COLOUR
        rows.append((Cell('people', dot=colour), '–', '–', *(_rate(found.people[name]) for name in names)))
    for arm, simulator in found.simulators.items():
        rows.append(
            (
                Cell(arm, dot=looks[arm].colour),
                number(simulator.perplexity),
                tables.estimate_cell(simulator.nats_per_token),
                *(_rate(simulator.statistics[name]) for name in names),
            )
        )
    header = ('user', 'perplexity', 'nats per token', *(name.replace('_', ' ') for name in names))
    parts = [page.table(header, rows), page.paragraph(FIDELITY, 'note')]
    sources = dict.fromkeys(source for simulator in found.simulators.values() for source in simulator.replayed)
    if sources:
        note = (
            'In people’s place, turn by turn, after what people and assistants had said. Below a number its interval, '
            'below a distance its excess; people’s numbers are of the turns compared with the first simulator. '
            f'{fidelity_table.ABOUT}'
        )
        parts += [page.heading('Turns of real conversations, replayed'), page.paragraph(note, 'note')]
    for position, source in enumerate(sources):
        parts.append(page.details(source, *_replayed(found, source), opened=position == 0))
    return parts


def _replayed(found: FidelityResult, source: str) -> list[str]:
    """Measures of the turns that simulators said in the place of people of one source, a column for each simulator."""
    measured = {arm: x.replayed[source] for arm, x in found.simulators.items() if source in x.replayed}
    lines = {arm: {line[0]: line for line in fidelity_table.lines_of(x)} for arm, x in measured.items()}
    rows: list[Sequence[str | Cell]] = []
    for name in dict.fromkeys(name for own in lines.values() for name in own):
        people = next(own[name][1] for own in lines.values() if name in own)
        rows.append((name, _split(people), *(_split(*own[name][2:]) if name in own else '–' for own in lines.values())))
    nats = {arm: found.simulators[arm].nats_by_source.get(source) for arm in measured}
    if any(nats.values()):
        perplexities = (number(math.exp(x.mean)) if x else '–' for x in nats.values())
        rows.append(('perplexity', '', *perplexities))
    notes = [page.paragraph(f'{arm}: {fidelity_table.about(x)}', 'note') for arm, x in measured.items()]
    return [page.table(('measure', 'people', *measured), rows), *notes]


def _split(text: str, excess: str = '') -> Cell:
    """A number with its interval, or its excess over people's, below it."""
    mean, _, bounds = text.partition(' [')
    return Cell(mean, under=excess or (f'[{bounds}' if bounds else ''))


def _rate(value: float | None) -> str:
    return number(value, 2 if value is not None and abs(value) >= 1 else 3)


def _conversations(results: Results, looks: Mapping[str, Look]) -> list[str]:
    parts = []
    for name, examples in results.conversations.measures.items():
        words = results.measures[name].words
        shown = []
        for position, example in enumerate(examples[:MAX_SHOWN]):
            traits = summary.traits_text(example.traits)
            talks = [
                page.talk(
                    assistant,
                    looks[assistant].colour,
                    [(message.role, message.content) for message in found.messages],
                    '; '.join(
                        (
                            f'ended: {summary.end_words(found.end)}',
                            f'{words.score} {number(found.score)}',
                            *(f'{part.replace("_", " ")} {number(value)}' for part, value in found.parts.items()),
                        )
                    ),
                )
                for assistant, found in example.conversations.items()
            ]
            about = page.paragraph(f'Traits: {traits}.', 'note') if traits else ''
            title = f'{example.example}: {example.intent}' if example.intent else example.example
            shown.append(page.details(title, about, page.side_by_side(talks), opened=position == 0))
        if shown:
            about = 'The example and the seed are the same in every column; messages are verbatim.'
            if len(examples) > MAX_SHOWN:
                about += f' Here are the first {MAX_SHOWN} of {len(examples):,}.'
            more = page.link(BROWSE_FILE, 'All conversations that the run kept, to browse and filter')
            title = f'{words.title}: the same example with every assistant'
            parts.append(page.section(title, page.paragraph(about, 'note'), more, *shown))
    return parts


def _settings(settings: Mapping[str, Any]) -> list[str]:
    rows = [(name, Cell(value, words=True)) for name, value in page.flat(settings)]
    return [page.details(f'{len(rows)} settings, from config.json', page.table(('field', 'value'), rows))]


def _timings(results: Results) -> list[str]:
    stages = results.timings.stages
    longest = max(stages.values(), default=0.0)
    rows = [
        (name, Cell(f'{seconds:,.1f}', shade=seconds / longest if longest else 0.0)) for name, seconds in stages.items()
    ]
    total = f'All stages together: {sum(stages.values()):,.0f} s of work; stages run side by side take less time.'
    table = page.table(('stage', 'seconds'), rows)
    return [
        page.paragraph(total, 'note'),
        page.details(f'{len(rows)} stages', table, opened=len(rows) <= tables.MAX_ROWS),
    ]


def drawn_panels(drawings: Sequence[Drawing], prefix: str = '') -> str:
    """Figures in rows of two, of which the last has both columns if it is alone; `prefix` begins the ids in them."""
    lone = len(drawings) - 1 if len(drawings) % 2 else None
    return page.panels(
        page.Panel(
            one.text,
            drawing.svg(one, f'{prefix}{one.name}', NARROW),
            drawing.svg(one, f'{prefix}{one.name}-wide', WIDE) if position == lone else None,
        )
        for position, one in enumerate(drawings)
    )


def _about_training(results: Results) -> str:
    margins = {f'{curve.validation.margin:g}' for curve in results.training.assistants.values() if curve.validation}
    text = TRAINING + ''.join(VALIDATION.format(margin=margin) for margin in sorted(margins))
    without = []
    for name, curve in results.training.assistants.items():
        found = curve.validation
        if found and found.judged and found.examples and (lost := sum(found.examples - x for x in found.judged)):
            without.append(f'{name} {lost:,} of {found.examples * len(found.judged):,}')
    return text + (f' Validation conversations without a reward, left out: {", ".join(without)}.' if without else '')
