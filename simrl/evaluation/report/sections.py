"""The sections of the report, in the order in which one reads them: what came out, how sure, why, and what was run.

Each is made of the results that are there; where a file is missing, its section says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.evaluation.gap_recovered import RecoveredShare
from simrl.evaluation.report import figures, page, summary
from simrl.evaluation.report.figures import Drawing
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Interval, Row, interval, label, number, share
from simrl.evaluation.results import PEOPLE, RESULTS_FOLDER, Results, TurnStatistics

TITLE = 'Which simulated user trains the better assistant?'
LONG = 24  # rows; longer tables are folded away
ARMS = (
    'Satisfaction is the share of the intent met, 0 where the person left, less the effort it took. Win rate: how '
    'often people would prefer this assistant to the initial one, by expected votes; strict: higher satisfaction '
    'wins, ties count ½. Recovered: the gain over the initial assistant as a share of the gain of the oracle, which '
    'trained against people themselves; its interval is over people, and it may exceed 1. Cut: messages of the '
    'assistant that its budget cut short; below, conversations in which a message of the person was.'
)
WIN_RATES = (
    'The dashed line is the initial assistant. Win rates can mislead, strict ones most: of two assistants that fail '
    'the one that fails sooner wins, for it costs less effort. Satisfaction and who left show it.'
)
TRAINING = (
    'Rewards are under each arm’s own user, so they compare a run with itself and not arms with each other; thin lines '
    'are single seeds. A group is the conversations of one opening; where all have the same reward nothing is learnt.'
)
MATRIX = (
    'Mean satisfaction; rows are assistants, columns the users that they talked with, people last. A simulator that is '
    'trained anew for each seed is the one of the assistant’s own seed; the initial assistant met all of them.'
)
TRANSFER = (
    'Gains in mean satisfaction over the initial assistant, with intervals over training seeds: by the reckoning of '
    'the simulator that the arm trained against, of simulators of other kinds (their mean), and of people. A gain that '
    'the own simulator alone sees does not carry over. The simulators of other kinds are not the same for every arm: '
    'that column is not to be compared from arm to arm.'
)
CLAIMS = (
    'The unit of a claim about a simulator is the training run: intervals and sign-flip tests are over training seeds, '
    'paired between arms, on the same people throughout, and not adjusted for their number. With n seeds p is never '
    'below 2 / 2ⁿ. All seeds share one initial assistant, one base user model of each size and one set of logs: what '
    'others of these, or other people, would change is in no interval over seeds. The last column rests on people '
    'alone: it holds for these checkpoints only.'
)
FIDELITY = (
    'Means over conversations with the initial assistant. Perplexity is per token of messages of people that no '
    'simulator saw; opening: attributes told in the first message; against the intent: values told that are not wanted.'
)


def sections(results: Results, rows: Sequence[Row]) -> list[str]:
    """The body of the page."""
    drawings = figures.drawings_of(results, rows)
    return [
        f'<h1>{page.escape(TITLE)}</h1>',
        '<div class="lead">' + '\n'.join(page.paragraph(text) for text in summary.sentences(results, rows)) + '</div>',
        page.section('The assistants on people', *_arms(results, rows)),
        page.section('Win rates', _drawn(drawings, 'win_rates', 'people.json', WIN_RATES)),
        page.section('Training', _drawn(drawings, 'training', 'training.json', TRAINING)),
        page.section('Every assistant with every user', *_matrix(results, drawings)),
        page.section('What is claimed', *_claims(results)),
        page.section('Who else sees the gain', *_transfers(results)),
        page.section('How true the simulators are', *_fidelity(results)),
        page.section('What the assistant does first', *_first_acts(rows)),
        page.section('The same person with every assistant', *_conversations(results)),
        page.section('Settings', *_settings(results)),
        page.section('Where the time went', *_timings(results)),
    ]


def _arms(results: Results, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [_missing('people.json')]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.ends))
    header = (
        *('assistant', 'seeds', 'satisfaction', 'intent met', 'win rate', 'strict win rate', 'recovered', 'turns'),
        *(f'ended: {kind}' for kind in kinds),
        'cut',
    )
    table = page.table(
        header,
        [
            (
                Cell(label(row.name), dot=figures.colour(row.name)),
                str(row.num_seeds) if row.num_seeds else '–',
                _estimate(row.satisfaction),
                _estimate(row.share_met),
                _estimate(row.win_rate),
                _estimate(row.strict_win_rate),
                _recovered(row),
                number(row.turns, 1),
                *(share(row.ends.get(kind)) for kind in kinds),
                Cell(f'{row.truncated:.1%}', under=f'people {row.user_truncated:.1%}'),
            )
            for row in rows
        ],
    )
    world = results.people.world if results.people else None
    dial = f' The world’s dial is at {world.dial:g} (0: people are a stereotype).' if world and world.dial != 1 else ''
    reasons = {row.recovered.reason for row in rows if row.recovered and row.recovered.reason}
    undefined = f' Recovered shares are undefined: {"; ".join(sorted(reasons))}.' if reasons else ''
    parts = [table, page.paragraph(f'{summary.rests_on(rows)} {ARMS}{undefined}{dial}', 'note')]
    if results.people and max(row.num_seeds for row in rows) > 1:
        each: list[Sequence[str | Cell]] = [
            (
                Cell(label(name), dot=figures.colour(name)),
                *(_estimate(x) for x in (found.satisfaction, found.gain, found.win_rate, found.strict_win_rate)),
            )
            for name, found in (
                (name, results.people.assistants[name]) for name in summary.ordered(results.people.assistants)
            )
        ]
        table = page.table(('assistant', 'satisfaction', 'gain', 'win rate', 'strict win rate'), each)
        parts.append(page.details('Every checkpoint by itself (intervals over people: that checkpoint only)', table))
    return parts


def _estimate(estimate: Interval | RecoveredShare | None, digits: int = 2, sign: str = '') -> Cell:
    """A mean with its interval in small type below it."""
    mean, _, bounds = interval(estimate, digits, sign).partition(' ')
    return Cell(mean, under=bounds)


def _recovered(row: Row) -> Cell:
    return Cell('undefined') if row.recovered and row.recovered.mean is None else _estimate(row.recovered)


def _matrix(results: Results, drawings: Mapping[str, Drawing]) -> list[str]:
    if results.matrix is None:
        return [_missing('matrix.json')]
    found = results.matrix
    cells = []
    for column, assistant in sorted(
        enumerate(found.assistants), key=lambda x: summary.ordered(found.assistants).index(x[1])
    ):
        cells.append(
            (
                Cell(label(assistant), dot=figures.colour(assistant)),
                *(
                    Cell(
                        f'{number(found.mean[row][column])}',
                        under=f'[{number(found.low[row][column])}, {number(found.high[row][column])}] '
                        f'n={found.conversations[row][column]:,}',
                        shade=min(1.0, max(0.0, found.mean[row][column])),
                    )
                    for row in range(len(found.users))
                ),
            )
        )
    table = page.table(('assistant', *(f'with {label(user)}' for user in found.users)), cells)
    return [
        _drawn(drawings, 'matrix', 'matrix.json', MATRIX),
        page.details('The numbers, a checkpoint a row (intervals over conversations)', table),
    ]


def _claims(results: Results) -> list[str]:
    if results.claims is None:
        return [_missing('claims.json')]
    rows: list[Sequence[str | Cell]] = []
    for arm in summary.ordered(results.claims.arms):
        claim = results.claims.arms[arm]
        rows.append(
            (
                f'{label(arm)} − initial',
                str(claim.gain.num_seeds),
                _estimate(claim.gain, 3, '+'),
                summary.p_value(claim.gain),
                _estimate(claim.win_rate),
                summary.p_value(claim.win_rate),
                _estimate(claim.gain_over_people, 3, '+'),
            )
        )
    for pair, difference in results.claims.differences.items():
        rows.append(
            (
                ' − '.join(label(name) for name in pair.split(' - ')),
                str(difference.satisfaction.num_seeds),
                _estimate(difference.satisfaction, 3, '+'),
                summary.p_value(difference.satisfaction),
                _estimate(difference.win_rate, 2, '+'),
                summary.p_value(difference.win_rate),
                _estimate(difference.satisfaction_over_people, 3, '+'),
            )
        )
    header = (
        *('difference', 'seeds', 'satisfaction', 'sign-flip p', 'win rate', 'sign-flip p'),
        'satisfaction, these checkpoints',
    )
    seeds = ', '.join(map(str, results.claims.seeds))
    return [page.table(header, rows), page.paragraph(f'Training seeds: {seeds}. {CLAIMS}', 'note')]


def _transfers(results: Results) -> list[str]:
    if results.claims is None:
        return [_missing('claims.json')]
    transfers = results.claims.transfers
    if not transfers:
        return [page.paragraph('No assistant met a simulator.', 'note')]
    rows: list[Sequence[str | Cell]] = []
    each: list[Sequence[str | Cell]] = []
    users = summary.ordered(list(dict.fromkeys(user for found in transfers.values() for user in found.users)))
    for arm in summary.ordered(transfers):
        found, name = transfers[arm], Cell(label(arm), dot=figures.colour(arm))
        gains = (found.users.get(arm), found.others, results.claims.arms[arm].gain)
        rows.append((name, str(len(found.seeds)), *(_estimate(gain, 3, '+') for gain in gains)))
        each.append((name, *(_estimate(found.users.get(user), 3, '+') for user in users)))
    header = ('arm', 'seeds', 'with its own simulator', 'with simulators of other kinds', 'with people')
    return [
        page.table(header, rows),
        page.paragraph(TRANSFER, 'note'),
        page.details(
            'Gains with every simulator', page.table(('arm', *(f'with {label(user)}' for user in users)), each)
        ),
    ]


def _fidelity(results: Results) -> list[str]:
    if results.fidelity is None:
        return [_missing('fidelity.json')]

    def statistics(found: TurnStatistics) -> tuple[str, ...]:
        return (
            number(found.messages, 1),
            number(found.words_per_message, 1),
            number(found.opening_attributes),
            share(found.typo_rate),
            '–' if found.against_intent is None else f'{found.against_intent:.1%}',
            share(found.left),
            share(found.accepted),
        )

    rows: list[Sequence[str | Cell]] = [
        (Cell(label(PEOPLE), dot=figures.colour(PEOPLE)), '–', '–', *statistics(results.fidelity.people))
    ]
    for name in summary.ordered(results.fidelity.simulators):
        found = results.fidelity.simulators[name]
        rows.append(
            (
                Cell(label(name), dot=figures.colour(name)),
                number(found.perplexity),
                _estimate(found.nats_per_token),
                *statistics(found),
            )
        )
    header = (
        *('user', 'perplexity', 'nats a token', 'messages', 'words a message', 'opening', 'typos'),
        *('against the intent', 'left', 'accepted'),
    )
    return [page.table(header, rows), page.paragraph(FIDELITY, 'note')]


def _first_acts(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [_missing('people.json')]
    acts = list(dict.fromkeys(act for row in rows for act in row.first_acts))
    cells = [
        (
            Cell(label(row.name), dot=figures.colour(row.name)),
            *(Cell(share(row.first_acts.get(act, 0.0)), shade=row.first_acts.get(act, 0.0)) for act in acts),
        )
        for row in rows
    ]
    return [page.table(('assistant', *acts), cells), page.paragraph('Shares of conversations with people.', 'note')]


def _conversations(results: Results) -> list[str]:
    if results.conversations is None:
        return [_missing('conversations.json')]
    parts = []
    for place, person in enumerate(results.conversations.people):
        traits = ', '.join(f'{name.replace("_", " ")} {value:.2f}' for name, value in person.traits.items())
        talks = [
            page.talk(
                label(name),
                figures.colour(name),
                [('person' if x.role == 'user' else x.role, x.content) for x in person.talks[name].messages],
                f'ended: {person.talks[name].end}; met {share(person.talks[name].share_met)}, satisfaction '
                f'{number(person.talks[name].satisfaction)}',
            )
            for name in summary.ordered(person.talks)
        ]
        about = page.paragraph(f'Traits: {traits}.', 'note') if traits else ''
        parts.append(
            page.details(f'{person.person} wants: {person.intent}', about, page.side_by_side(talks), opened=place == 0)
        )
    note = 'The person, what they want and the seed are the same in every column; messages are as they were said.'
    return [page.paragraph(note, 'note'), *parts]


def _settings(results: Results) -> list[str]:
    if results.config is None:
        return [page.missing('config.json')]
    rows = [(name, Cell(value, words=True)) for name, value in _flat(results.config)]
    return [page.details(f'{len(rows)} settings, as config.json holds them', page.table(('field', 'value'), rows))]


def _timings(results: Results) -> list[str]:
    if results.timings is None:
        return [_missing('timings.json')]
    stages = results.timings.stages
    longest = max(stages.values(), default=0.0)
    rows = [
        (name, Cell(f'{seconds:,.1f}', shade=seconds / longest if longest else 0.0)) for name, seconds in stages.items()
    ]
    table = page.table(('stage', 'seconds'), rows)
    total = (
        f'All stages together: {sum(stages.values()):,.0f} s of work; workers run side by side, so less time passed.'
    )
    return [page.paragraph(total, 'note'), page.details(f'{len(rows)} stages', table, opened=len(rows) <= LONG)]


def _drawn(drawings: Mapping[str, Drawing], name: str, file: str, caption: str) -> str:
    if name not in drawings:
        return _missing(file)
    drawing = drawings[name]
    width = drawing.figure.get_figwidth() * 96  # CSS pixels
    return page.figure(figures.svg(drawing, name), drawing.text, width, caption)


def _missing(file: str) -> str:
    return page.missing(f'{RESULTS_FOLDER}/{file}')


def _flat(settings: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows.extend(_flat(value, f'{prefix}{name}.'))
        else:
            rows.append((f'{prefix}{name}', str(value)))
    return rows
