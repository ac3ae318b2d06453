"""The sections of the matrix: every assistant with every user, and what of a gain is kept with other simulators.

Scores of at most 1 are shown x 100 (`MatrixResult.times`), in the sections' titles and in every number.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import page, summary
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.summary import Interval, interval, number
from simrl.evaluation.report.tables import panel_text
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import INITIAL, ExperimentResult
from simrl.evaluation.results.simulators import MatrixResult
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate
from simrl.rewards.rubric import JUDGE_PART

MAX_ROWS = 24  # longer tables are folded
MATRIX = (
    'Rows are assistants, columns the users that they talk with, on the same examples; a simulator is named by its '
    'arm. A simulator that is trained anew for each seed is the one of the assistant’s own seed; the initial assistant '
    'meets all of them. Colours run from the lowest to the highest number. '
)
HELD_OUT = 'Held out: no assistant trained against it. '
TRANSFER = (
    'Gains over the initial assistant: with the simulator that the arm trains against, and with simulators of other '
    'kinds (their mean). The first interval is over training seeds, that of “checkpoints” over conversations. A gain '
    'with its own simulator alone does not transfer. The simulators of other kinds differ from arm to arm: do not '
    'compare that column between arms. '
)
TRANSFER_HELD_OUT = 'Held-out simulators (their mean) are the same for every arm. '
DIFFERENCES = (
    'With one simulator, paired conversation by conversation (the same example, the same seed of sampling); means over '
    'the training seeds that both sides have. The first interval is over these seeds; that of “checkpoints”, over '
    'conversations, is of these checkpoints only.'
)


Gain = tuple[SeedEstimate, Estimate | None]  # over training seeds; of these checkpoints, None in earlier results
OWN, OTHERS, HELD_OUT_USERS = 'its own simulator', 'simulators of other kinds', 'held-out simulators'


def titled(title: str, found: MatrixResult) -> str:
    """A title with the factor of the numbers below it."""
    return title if found.times == 1 else f'{title} (× {found.times})'


def matrix(experiment: ExperimentResult, found: MatrixResult, colours: Mapping[str, str], drawn: str) -> list[str]:
    """The parts of the section of the matrix; `drawn` is its figure."""
    low, high = min(map(min, found.mean)), max(map(max, found.mean))
    users = range(len(found.users))
    cells = [
        (
            Cell(assistant, dot=colours[assistant]),
            *(
                Cell(
                    number(found.mean[row][column] * found.times, mean_digits(found.times)),
                    under=f'{_bounds(found, row, column)} n={found.conversations[row][column]:,}'
                    f'{_failed(found, row, column)}',
                    shade=(found.mean[row][column] - low) / (high - low) if high > low else 0.0,
                )
                for row in users
            ),
        )
        for column, assistant in enumerate(found.assistants)
    ]
    table = page.table(('assistant', *(f'with {user_name(experiment, user)}' for user in found.users)), cells)
    times = '' if found.times == 1 else f' × {found.times}'
    about = f'Mean {found.score}{times}. {MATRIX}'
    if held_out(experiment, found):
        about += HELD_OUT
    if found.people:
        about += f'The last column is the measure “{found.people}”. '
    if found.causes:
        about += f'Conversations without a score are left out: {summary.causes_text(found.causes)}. '
    return [
        drawn,
        page.paragraph(about, 'note'),
        page.details('The numbers, a checkpoint a row (intervals over conversations)', table),
        *_by_judge(experiment, found, colours),
    ]


def _by_judge(experiment: ExperimentResult, found: MatrixResult, colours: Mapping[str, str]) -> list[str]:
    """The means by each judge of a panel; nothing without one."""
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(assistant, dot=colours[assistant]),
            judge.removeprefix(JUDGE_PART),
            *(number(row[column] * found.times, mean_digits(found.times)) for row in means),
        )
        for column, assistant in enumerate(found.assistants)
        for judge, means in found.judges.items()
    ]
    if not rows:
        return []
    users = [user_name(experiment, user) for user in found.users if user != found.people]
    table = page.table(('assistant', 'judge', *(f'with {user}' for user in users)), rows)
    about = panel_text(found.judges, found.votes)
    note = [page.paragraph(about, 'note')] if about else []
    return [page.details('The same means by each judge of the panel', table, *note)]


def transfers(results: Results, found: MatrixResult, colours: Mapping[str, str]) -> list[str]:
    """The parts of the section of gains and differences with each simulator."""
    experiment = results.experiment
    columns = gains_header(experiment, found)
    rows: list[Sequence[str | Cell]] = []
    for arm in found.transfers:
        gains = gains_of(results, found, arm)
        cells = [_difference(found, gains[words]) for words in columns]
        rows.append((Cell(arm, dot=colours[arm]), str(len(found.transfers[arm].seeds)), *cells))
    header = ('arm', 'seeds', *(f'with {words}' for words in columns))
    return [
        page.table(header, rows),
        page.paragraph(TRANSFER + (TRANSFER_HELD_OUT if held_out(experiment, found) else ''), 'note'),
        *_differences(experiment, found),
    ]


def gains_header(experiment: ExperimentResult, found: MatrixResult) -> list[str]:
    """The users, or groups of users, of `gains_of`."""
    some_held_out = [HELD_OUT_USERS] if held_out(experiment, found) else []
    return [OWN, OTHERS, *some_held_out, *([found.people] if found.people else [])]


def gains_of(results: Results, found: MatrixResult, arm: str) -> dict[str, Gain | None]:
    """An arm's gains over the initial assistant: over training seeds, and of these checkpoints."""
    gain = found.transfers[arm]

    def both(over_seeds: SeedEstimate | None, checkpoints: Estimate | None) -> Gain | None:
        return None if over_seeds is None else (over_seeds, checkpoints)

    gains = {
        OWN: both(gain.simulators.get(arm), gain.checkpoints.get(arm)),
        OTHERS: both(gain.other_kinds, gain.checkpoint_other_kinds),
        HELD_OUT_USERS: both(gain.held_out, gain.checkpoint_held_out),
    }
    if found.people:
        people = results.measures[found.people].arms[arm]
        gains[found.people] = both(people.gain, people.checkpoint_gain)
    return gains


def held_out(experiment: ExperimentResult, found: MatrixResult) -> list[str]:
    """The held-out simulators of a matrix."""
    return [user for user in found.users if user != found.people and experiment.arms[user].held_out]


def user_name(experiment: ExperimentResult, user: str) -> str:
    """A user of the matrix, marked where it is a held-out simulator."""
    marked = user in experiment.arms and experiment.arms[user].held_out
    return f'{user} (held out)' if marked else user


def mean_digits(times: int) -> int:
    return max(1, 2 - round(math.log10(times)))


def gain_digits(times: int) -> int:
    return max(1, 3 - round(math.log10(times)))


def scaled(estimate: Interval | None, times: float) -> Interval | None:
    """The estimate of a score that is multiplied by a factor."""
    if estimate is None:
        return None

    def by(value: float | None) -> float | None:
        return None if value is None else value * times

    mean, low, high = estimate.mean * times, by(estimate.low), by(estimate.high)
    if isinstance(estimate, Estimate):
        return dataclasses.replace(estimate, mean=mean, low=low, high=high)
    values = tuple(value * times for value in estimate.values)
    alone = None if estimate.alone is None else tuple(bound * times for bound in estimate.alone)
    return dataclasses.replace(estimate, mean=mean, low=low, high=high, values=values, alone=alone)


def gain_text(found: MatrixResult, estimate: Interval | None) -> str:
    """A difference of scores with its interval."""
    return interval(scaled(estimate, found.times), gain_digits(found.times), '+')


def primary_text(found: MatrixResult, gain: Gain | None) -> str:
    """A gain with its interval over training seeds; of one seed with that over conversations, where it is known."""
    if gain is None:
        return gain_text(found, None)
    over_seeds, checkpoint = gain
    return gain_text(found, over_seeds if over_seeds.num_seeds > 1 or checkpoint is None else checkpoint)


def _gain(found: MatrixResult, estimate: Interval | None, under: str = '') -> Cell:
    mean, _, bounds = gain_text(found, estimate).partition(' ')
    return Cell(mean, under='\n'.join(part for part in (bounds, under) if part))


def _differences(experiment: ExperimentResult, found: MatrixResult) -> list[str]:
    """A row for each difference, a column for each simulator."""
    users = [user for user in found.users if user != found.people]
    cells: dict[str, dict[str, Gain]] = {}
    for arm, gain in found.transfers.items():
        cells[f'{arm} − {INITIAL}'] = {
            user: (estimate, gain.checkpoints.get(user)) for user, estimate in gain.simulators.items()
        }
    for pair in found.differences:
        cells.setdefault(f'{pair.first} − {pair.second}', {})[pair.user] = (pair.score, pair.checkpoint_score)
    rows = [(name, *(_difference(found, by_user.get(user)) for user in users)) for name, by_user in cells.items()]
    header = ('difference', *(f'with {user_name(experiment, user)}' for user in users))
    return [
        page.details(
            f'Differences with each simulator ({len(rows)})', page.table(header, rows), opened=len(rows) <= MAX_ROWS
        ),
        page.paragraph(DIFFERENCES, 'note'),
    ]


def _difference(found: MatrixResult, estimates: Gain | None) -> str | Cell:
    if estimates is None:
        return '–'
    over_seeds, checkpoint = estimates
    if checkpoint is None:
        return _gain(found, over_seeds)
    _, _, bounds = gain_text(found, checkpoint).partition(' ')
    return _gain(found, over_seeds, f'checkpoints {bounds}')


def _bounds(found: MatrixResult, row: int, column: int) -> str:
    low, high = (None if x is None else x * found.times for x in (found.low[row][column], found.high[row][column]))
    return summary.bounds(low, high, mean_digits(found.times))


def _failed(found: MatrixResult, row: int, column: int) -> str:
    lost = found.failed[row][column] if found.failed else 0
    return f', {lost:,} without a score' if lost else ''
