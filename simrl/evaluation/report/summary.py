"""Results -> what is said of them: a row per arm, names and numbers as words, the three sentences on top of the report.

An ordering is put into words only where an interval supports it, and with one training seed only of that checkpoint.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from simrl.evaluation.gap_recovered import RecoveredShare
from simrl.evaluation.people import split_name
from simrl.evaluation.results import INITIAL, ORACLE, PEOPLE, RESULTS_FOLDER, ResultError, Results
from simrl.evaluation.statistics import Estimate, SeedEstimate

Interval = Estimate | SeedEstimate

NAMES = {'role_play': 'role-play', 'persona': 'persona', 'fine_tuned': 'fine-tuned', ORACLE: 'oracle'}
SIZES = ('small', '', 'large')
# Of the differences between arms, those that the second sentence speaks of.
IN_WORDS = ('persona - role_play', 'fine_tuned - role_play', 'fine_tuned - persona', f'{ORACLE} - fine_tuned')
ENOUGH_SEEDS = 6  # with fewer no sign-flip test can give a p below .05
SHORT_OF_THE_WORLD = (
    'The world is a program with a known answer: it checks the instrument and is no evidence about real people, and '
    'the gap between simulators partly restates how its stereotypes were written.'
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm over its seeds, or one assistant.

    Attributes:
        name: 'initial', ARM, or ARM/seed-K where there are no claims over seeds.
        num_seeds: training seeds; 0 of the initial assistant. Intervals are over seeds from two on, else over people.
        satisfaction, share_met: means with intervals.
        gain, win_rate, strict_win_rate, recovered: against the initial assistant; None for itself.
        turns, ends, first_acts, truncated, user_truncated: means over the arm's assistants.
    """

    name: str
    num_seeds: int
    satisfaction: Interval
    share_met: Interval
    gain: Interval | None
    win_rate: Interval | None
    strict_win_rate: Interval | None
    recovered: RecoveredShare | None
    turns: float
    ends: dict[str, float]
    first_acts: dict[str, float]
    truncated: float
    user_truncated: float


def rows_of(results: Results, workdir: pathlib.Path) -> list[Row]:
    """A row per arm, the initial assistant first; a row per assistant where claims.json is not there.

    Raises:
        ResultError: an arm of claims.json without an assistant in people.json, or an assistant without a proper name.
    """
    if results.people is None:
        return []
    groups: dict[str, list[str]] = {}
    for assistant in results.people.assistants:
        try:
            arm = INITIAL if assistant == INITIAL else split_name(assistant)[0]
        except ValueError as error:
            raise ResultError(f'{workdir / RESULTS_FOLDER / "people.json"}.assistants: {error}') from error
        groups.setdefault(arm if results.claims else assistant, []).append(assistant)
    arms = {} if results.claims is None else results.claims.arms
    for arm in arms:
        if arm not in groups:
            raise ResultError(
                f'{workdir / RESULTS_FOLDER / "claims.json"}.arms.{arm}: expected an assistant {arm}/seed-K in '
                f'people.json, found {", ".join(results.people.assistants)}'
            )
    rows = []
    for name in ordered(groups):
        members = [results.people.assistants[assistant] for assistant in groups[name]]
        # A single run is shown with its intervals over people: over seeds there is none.
        source = arms[name] if name in arms and len(members) > 1 else members[0]
        rows.append(
            Row(
                name=name,
                num_seeds=0 if name == INITIAL else len(members),
                satisfaction=source.satisfaction,
                share_met=source.share_met,
                gain=source.gain,
                win_rate=source.win_rate,
                strict_win_rate=source.strict_win_rate,
                recovered=arms[name].recovered if name in arms else None,
                turns=float(np.mean([member.assistant_turns for member in members])),
                ends=_mean_shares([member.ends for member in members]),
                first_acts=_mean_shares([member.first_acts for member in members]),
                truncated=float(np.mean([member.truncated for member in members])),
                user_truncated=float(np.mean([member.user_truncated for member in members])),
            )
        )
    return rows


def ordered(names: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Assistants, arms or users as the report lists them: initial, the arms as design.md does, people last."""

    def place(name: str) -> tuple[int, str, int, int]:
        arm, size, seed = parts_of(name)
        first = {INITIAL: 0, PEOPLE: 9}.get(arm, 1 + list(NAMES).index(arm) if arm in NAMES else 8)
        return first, arm, SIZES.index(size) if size in SIZES else len(SIZES), seed

    return sorted(names, key=place)


def parts_of(name: str) -> tuple[str, str, int]:
    """'ARM-SIZE/seed-K' -> (ARM, SIZE, K); SIZE is '' and K -1 where the name has none."""
    try:
        name, seed = split_name(name)
    except ValueError:
        seed = -1
    arm, _, size = name.partition('-')
    return arm, size, seed


def label(name: str) -> str:
    """A name for people: 'fine_tuned-large/seed-1' -> 'fine-tuned large, seed 1'."""
    arm, size, seed = parts_of(name)
    words = NAMES.get(arm, arm.replace('_', ' ')) + (f' {size}' if size else '')
    return words if seed < 0 else f'{words}, seed {seed}'


def number(value: float | None, digits: int = 2, sign: str = '') -> str:
    """A rounded number; a dash where there is none, no minus before 0. `sign` is '+' where a plus is wanted."""
    return '–' if value is None else f'{round(value, digits) + 0.0:{sign}.{digits}f}'.replace('-', '−')


def share(value: float | None) -> str:
    return '–' if value is None else f'{value:.0%}'


def interval(estimate: Interval | RecoveredShare | None, digits: int = 2, sign: str = '') -> str:
    """'0.52 [0.48, 0.56]', without the bracket where there is no interval."""
    if estimate is None or estimate.mean is None:
        return '–'
    if estimate.low is None or estimate.high is None:
        return number(estimate.mean, digits, sign)
    low, high = (number(bound, digits, sign) for bound in (estimate.low, estimate.high))
    return f'{number(estimate.mean, digits, sign)} [{low}, {high}]'


def p_value(estimate: Interval) -> str:
    """The sign-flip p of a `SeedEstimate`; never '0.000'."""
    if isinstance(estimate, Estimate) or estimate.p_value is None:
        return '–'
    return '< 0.001' if estimate.p_value < 0.001 else number(estimate.p_value, 3)


def verdict(difference: Interval) -> int:
    """1 or -1 where the whole interval is above or below 0, 0 where the sign is not certain."""
    if difference.low is None or difference.high is None:
        return 0
    return int(difference.low > 0) - int(difference.high < 0)


def listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f'{", ".join(words[:-1])} and {words[-1]}'


def rests_on(rows: Sequence[Row]) -> str:
    """What the intervals of a table of rows rest on."""
    level = rows[0].satisfaction.level
    seeds = sorted({row.num_seeds for row in rows if row.num_seeds})
    if seeds and seeds[0] > 1:
        return f'{level:.0%} intervals are over training seeds (the initial assistant’s over people).'
    if seeds and seeds[-1] > 1:
        return (
            f'{level:.0%} intervals are over training seeds; with one seed, and for the initial assistant, over '
            f'people: this checkpoint only.'
        )
    return f'{level:.0%} intervals are over people: this checkpoint only.'


def sentences(results: Results, rows: Sequence[Row]) -> tuple[str, str, str]:
    """What was asked, what came out, and what that does not say."""
    arms = [row for row in rows if row.name != INITIAL]
    if results.people is None or not arms:
        nothing = 'Nothing came out so far: no trained assistant has met people yet.'
        return 'Which simulated user trains the better assistant?', nothing, SHORT_OF_THE_WORLD
    seeds = sorted({row.num_seeds for row in arms})
    each = '–'.join(dict.fromkeys(str(count) for count in (seeds[0], seeds[-1])))
    each = 'one training seed' if seeds == [1] else f'{each} training seeds'
    kinds, sized = (len({parts_of(row.name)[:fields] for row in arms}) for fields in (1, 2))
    sizes = '' if sized == kinds else f' ({_counted(sized, "arm")} with their sizes)'
    oracle = '; the oracle trained against people themselves' if ORACLE in [row.name for row in arms] else ''
    asked = (
        f'From one initial assistant, others were trained by reinforcement learning against '
        f'{_counted(kinds, "kind")} of user{sizes}, all else equal ({each} each), and all of them then talked with the '
        f'same {results.people.world.people:,} new people{oracle}.'
    )
    return asked, _outcome(results, rows, arms), SHORT_OF_THE_WORLD


def _outcome(results: Results, rows: Sequence[Row], arms: Sequence[Row]) -> str:
    """The second sentence: arms against the initial assistant, then arms against each other."""
    several = any(row.num_seeds > 1 for row in arms)

    def named(row: Row) -> str:
        alone = ', one seed' if several and row.num_seeds == 1 else ''
        return f'{label(row.name)} ({number(row.gain.mean if row.gain else None, 2, "+")}{alone})'

    by_verdict = {sign: [named(row) for row in arms if row.gain and verdict(row.gain) == sign] for sign in (1, -1, 0)}
    parts = []
    if by_verdict[1]:
        parts.append(f'higher after training against {listed(by_verdict[1])}')
    if by_verdict[-1]:
        parts.append(f'lower after {listed(by_verdict[-1])}')
    if by_verdict[0]:
        parts.append(f'not told apart from it after {listed(by_verdict[0])}')
    parts.extend(_orderings(results, several))
    with_one = '; with one seed over people, so of that checkpoint only' if min(x.num_seeds for x in arms) == 1 else ''
    start = rows[0].satisfaction.mean if rows[0].name == INITIAL else None
    level = arms[0].satisfaction.level
    few = max(x.num_seeds for x in arms) < ENOUGH_SEEDS
    normal = ', which rest on normal spread: so few seeds cannot give a sign-flip p below .05' if few else ''
    basis = (
        f'{level:.0%} t-intervals over training seeds{normal}{with_one}'
        if several
        else f'{level:.0%} intervals over people, so of this checkpoint only: another training seed may differ'
    )
    return f'Mean satisfaction was {number(start)} with the initial assistant; {"; ".join(parts)} ({basis}).'


def _orderings(results: Results, several: bool) -> list[str]:
    """What the differences between arms support, and what they leave open; `several`: most rest on several seeds.

    Only those of `IN_WORDS`, and of the largest and smallest of a kind: the table has all.
    """
    below: dict[str, list[str]] = {}  # an arm -> those that it is above
    left_open = []
    for pair, claim in (results.claims.differences if results.claims else {}).items():
        if pair not in IN_WORDS and not re.fullmatch(r'(.*)-large - \1-small', pair):
            continue
        first, second = (label(name) for name in pair.split(' - '))
        difference = claim.satisfaction if claim.satisfaction.num_seeds > 1 else claim.satisfaction_over_people
        alone = ', one seed' if several and claim.satisfaction.num_seeds == 1 else ''
        sign = verdict(difference)
        if sign:
            above, under = (first, second) if sign > 0 else (second, first)
            below.setdefault(above, []).append(f'{under} (by {number(abs(difference.mean))}{alone})')
        else:
            left_open.append(f'{first} and {second}')
    found = [f'{above} came out above {listed(arms)}' for above, arms in below.items()]
    return found + ([f'not told apart: {", ".join(left_open)}'] if left_open else [])


def _counted(count: int, word: str) -> str:
    words = ('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
    return f'{words[count] if count < len(words) else count} {word}{"" if count == 1 else "s"}'


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for found in shares for kind in found)
    return {kind: float(np.mean([found.get(kind, 0.0) for found in shares])) for kind in kinds}
