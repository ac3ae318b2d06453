"""Results -> the sentences at the top of the report, a row per arm, and numbers as text.

An ordering is put into words only where an interval supports it; with one training seed it is of this checkpoint only.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from simrl.evaluation.gap_recovered import GapRecovered
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import (
    INITIAL,
    AssistantResult,
    Bounds,
    Difference,
    ExperimentResult,
    MeasureResult,
    SeedBounds,
)
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate

Interval = Estimate | SeedEstimate
Shown = Callable[[float | None], str]  # a number as text

NO_INTERVAL = 'no interval'

ENOUGH_SEEDS = 6  # with fewer no sign-flip test gives a p below .05
MAX_CAUSES = 3  # in words
MAX_PAIRS_IN_WORDS = 6  # differences between arms in the second sentence; the table has all
ENDS = {'signal': 'by the user', 'turns': 'max messages', 'budget': 'context full', 'failure': 'by a failure'}
OUTCOMES = {
    1: 'is significantly higher',
    -1: 'is significantly lower',
    0: 'is not significantly different',
    None: f'cannot be compared ({NO_INTERVAL})',
}  # by the sign of a gain's interval
# The same where no sign-flip test could agree with the interval.
FEW_SEEDS_OUTCOMES = {
    1: 'is higher by its interval',
    -1: 'is lower by its interval',
    0: 'is not different by its interval',
    None: OUTCOMES[None],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm over its seeds, or the initial assistant.

    Attributes:
        name: 'initial' or the arm.
        num_seeds: training seeds; 0 for the initial assistant. Intervals are over seeds from two on, else over
            clusters of examples.
        score, parts: means with intervals.
        gain, win_rate, strict_win_rate, gap_recovered: against the initial assistant; None for itself.
        turns, ends, labels, truncated, user_truncated: means over the arm's assistants.
        failures: examples without an outcome of it or of the initial assistant, over all seeds.
        bounds, strict_bounds: win rates with these lost, and won; None without any.
        message_tokens, length_correlation: the same, over those that have one; None without any.
    """

    name: str
    num_seeds: int
    score: Interval
    parts: Mapping[str, Interval]
    gain: Interval | None
    win_rate: Interval | None
    strict_win_rate: Interval | None
    gap_recovered: GapRecovered | None
    turns: float
    ends: dict[str, float]
    labels: dict[str, dict[str, float]]
    truncated: float
    user_truncated: float
    failures: int
    bounds: Bounds | SeedBounds | None
    strict_bounds: Bounds | SeedBounds | None
    message_tokens: float | None
    length_correlation: float | None


def rows_of(experiment: ExperimentResult, measure: MeasureResult) -> list[Row]:
    """The initial assistant, then the arms as the config lists them."""
    groups = {INITIAL: [INITIAL]} | {arm: experiment.assistants_of(arm) for arm in measure.arms}
    rows = []
    for name, assistants in groups.items():
        members = [measure.assistants[assistant] for assistant in assistants]
        # One run has no interval over seeds: its interval over clusters is shown.
        source = measure.arms[name] if len(members) > 1 else members[0]
        rows.append(
            Row(
                name=name,
                num_seeds=0 if name == INITIAL else len(members),
                score=source.score,
                parts=source.parts,
                gain=source.gain,
                win_rate=source.win_rate,
                strict_win_rate=source.strict_win_rate,
                gap_recovered=measure.arms[name].gap_recovered if name in measure.arms else None,
                turns=float(np.mean([member.assistant_turns for member in members])),
                ends=_mean_shares([member.ends for member in members]),
                labels={
                    label: _mean_shares([member.labels[label] for member in members]) for label in members[0].labels
                },
                truncated=float(np.mean([member.truncated for member in members])),
                user_truncated=float(np.mean([member.user_truncated for member in members])),
                failures=sum(measure.examples - x.gain.num_observations for x in members if x.gain),
                bounds=source.win_rate_bounds,
                strict_bounds=source.strict_win_rate_bounds,
                message_tokens=mean_of_known(member.message_tokens for member in members),
                length_correlation=mean_of_known(member.length_correlation for member in members),
            )
        )
    return rows


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def span(values: Iterable[int]) -> str:
    """'512', or '300–512' where numbers differ."""
    found = sorted(set(values))
    return '–'.join(f'{value:,}' for value in dict.fromkeys((found[0], found[-1])))


def end_words(end: str) -> str:
    """A reason for ending in words; a scene's own reasons are words already."""
    return ENDS.get(end, end)


def num_seeds(counts: Iterable[int]) -> str:
    """'1 training seed', or '2–3 training seeds'."""
    found = span(counts)
    return f'{found} training seed{"" if found == "1" else "s"}'


def number(value: float | None, digits: int = 2, sign: str = '') -> str:
    """A rounded number, a dash for None. With '+' as `sign` all have one, also what is 0 but for rounding."""
    if value is None:
        return '–'
    shown = (value if sign else round(value, digits)) + 0.0  # no negative zero
    return f'{shown:{sign}.{digits}f}'.replace('-', '−')


def share(value: float | None) -> str:
    return '–' if value is None else f'{value:.0%}'


def interval(estimate: Interval | GapRecovered | None, digits: int = 2, sign: str = '') -> str:
    """'0.52 [0.48, 0.56]'; without the bracket for one seed, and for the oracle's own gap."""
    if estimate is None or estimate.mean is None:
        return '–'
    mean = number(estimate.mean, digits, sign)
    if isinstance(estimate, SeedEstimate) and estimate.num_seeds == 1:
        return mean
    if isinstance(estimate, GapRecovered) and estimate.low is None and estimate.reason is None:
        return mean
    return f'{mean} {bounds(estimate.low, estimate.high, digits, sign)}'


def bounds(low: float | None, high: float | None, digits: int = 2, sign: str = '') -> str:
    """'[0.48, 0.56]', or that there is no interval."""
    if low is None or high is None:
        return f'[{NO_INTERVAL}]'
    return f'[{number(low, digits, sign)}, {number(high, digits, sign)}]'


def p_value(p: float | None) -> str:
    """A p-value; never '0.000'."""
    return '< 0.001' if p is not None and p < 0.001 else number(p, 3)


def significance(over_seeds: SeedEstimate, checkpoint: Estimate) -> str:
    """Names the significance of a difference; an interval over clusters only counts where there is one seed."""
    several = over_seeds.num_seeds > 1
    sign = (over_seeds if several else checkpoint).sign
    if sign is None:
        return NO_INTERVAL
    return 'no' if sign == 0 else 'yes' if several else 'this checkpoint only'


def listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f'{", ".join(words[:-1])} and {words[-1]}'


def basis(rows: Sequence[Row], unit: str) -> str:
    """The unit that the intervals of a table of rows are over."""
    level = rows[0].score.level
    seeds = sorted({row.num_seeds for row in rows if row.num_seeds})
    if seeds and seeds[0] > 1:
        return f'{level:.0%} intervals are over training seeds (the initial assistant’s over {unit}).'
    if seeds and seeds[-1] > 1:
        return (
            f'{level:.0%} intervals are over training seeds; with one seed, and for the initial assistant, over '
            f'{unit}: this checkpoint only.'
        )
    return f'{level:.0%} intervals are over {unit}: this checkpoint only.'


def sample(measure: MeasureResult, rows: Sequence[Row]) -> str:
    """The sample of a measure's figures, and failures."""
    seeds = num_seeds(row.num_seeds for row in rows if row.num_seeds)
    total = measure.examples * len(measure.assistants)
    lost = sum(sum(found.causes.values()) for found in measure.assistants.values())
    without = f'{lost:,} of {total:,}, left out' if lost else f'none of {total:,}'
    return f'n = {size(measure)}, {seeds} an arm. Without a {measure.words.score}: {without}.'


def traits_text(traits: Mapping[str, float]) -> str:
    """Traits of a person: 'tell more 0.21, typo 0.40'."""
    return ', '.join(f'{trait.replace("_", " ")} {value:.2f}' for trait, value in traits.items())


def sentences(results: Results) -> list[str]:
    """Names what was compared, the result by each measure, and what it does not show."""
    experiment = results.experiment
    headline = results.measures[experiment.measures[0]]
    arms = list(headline.arms)
    each = span(len(arm.seeds) for arm in headline.arms.values())
    each = 'one training seed' if each == '1' else f'{each} training seeds'
    against = f'{len(arms)} user simulators' if len(arms) > 1 else 'one user simulator'
    oracles = [name for name, arm in experiment.arms.items() if arm.oracle and name in arms]
    oracle = f' ({oracles[0]} trains against people themselves)' if oracles else ''
    asked = (
        f'From one initial assistant, one assistant was trained by reinforcement learning against each of {against}, '
        f'all else equal ({each} each): {listed(arms)}{oracle}. All assistants were then measured on the same '
        f'{size(headline)}.'
    )
    return [asked, *(_outcome(experiment, measure) for measure in results.measures.values()), experiment.caution]


def size(measure: MeasureResult) -> str:
    """The sample of a measure: '2,000 people', or '300 examples of 283 people'."""
    clusters = f'{measure.clusters:,} {measure.words.unit}'
    return clusters if measure.clusters == measure.examples else f'{measure.examples:,} examples of {clusters}'


def _outcome(experiment: ExperimentResult, measure: MeasureResult) -> str:
    """Each arm against the initial assistant, then arms against each other."""
    initial, *arms = rows_of(experiment, measure)
    most_seeds = max(row.num_seeds for row in arms)
    several = most_seeds > 1

    def named(row: Row) -> str:
        alone = ', one seed' if several and row.num_seeds == 1 else ''
        return f'{row.name} ({number(row.gain.mean if row.gain else None, 3, "+")}{alone})'

    said = [f'Mean {measure.words.score} is {number(initial.score.mean)} with the initial assistant']
    few = several and most_seeds < ENOUGH_SEEDS
    for sign, words in (FEW_SEEDS_OUTCOMES if few else OUTCOMES).items():
        if found := [named(row) for row in arms if row.gain and row.gain.sign == sign]:
            said.append(f'It {words} after training against {listed(found)}')
    if measure.differences:
        said.append(_orderings(measure.differences, several, 'by the interval' if few else 'significantly'))
    if lost := failures(measure):
        said.append(lost)
    level, unit = initial.score.level, measure.words.unit
    if several:
        normal = ', and assume normal spread: so few seeds cannot give a sign-flip p below .05'
        alone = f'; with one seed they are over {unit}: of that checkpoint only'
        said.append(
            f'The {level:.0%} t-intervals are over training seeds, not adjusted for the number of comparisons'
            f'{normal if few else ""}{alone if min(row.num_seeds for row in arms) == 1 else ""}'
        )
    else:
        said.append(
            f'The {level:.0%} intervals are over {unit}: this checkpoint only, another training seed may differ'
        )
    return '. '.join(said) + '.'


def failures(measure: MeasureResult) -> str:
    """The examples without an outcome, by assistant and by cause; empty where all have one."""
    numbers = {name: sum(found.causes.values()) for name, found in measure.assistants.items()}
    if not (total := sum(numbers.values())):
        return ''
    most = max(numbers, key=lambda name: numbers[name])
    nobody = f'; {measure.without_outcome:,} have none with any assistant' if measure.without_outcome else ''
    causes = causes_text(causes_of(measure.assistants.values()))
    return (
        f'{total:,} of {measure.examples * len(numbers):,} have no {measure.words.score}, at most {numbers[most]:,} of '
        f'{measure.examples:,} with one assistant ({most}): {causes}. Each is left out, and with it its '
        f'comparisons{nobody}'
    )


def bounds_text(rows: Sequence[Row]) -> str:
    """Win rates with failures lost, and won; empty where there is none."""
    found = [
        f'{row.name} {number(row.bounds.lost.mean, 3)} to {number(row.bounds.won.mean, 3)} ({row.failures:,})'
        for row in rows
        if row.bounds
    ]
    return f'Win rates with failures all lost to all won (failures): {"; ".join(found)}.' if found else ''


def causes_of(assistants: Iterable[AssistantResult]) -> collections.Counter[str]:
    """The examples of assistants without an outcome, by cause."""
    return sum((collections.Counter(found.causes) for found in assistants), collections.Counter[str]())


def causes_text(causes: Mapping[str, int]) -> str:
    """The most frequent causes, with their numbers."""
    most = sorted(causes.items(), key=lambda item: -item[1])[:MAX_CAUSES]
    more = [f'{len(causes) - len(most)} other causes'] if len(causes) > len(most) else []
    return listed([*(f'{cause} ({count:,})' for cause, count in most), *more])


def _orderings(differences: Sequence[Difference], several: bool, how: str) -> str:
    """The differences between arms that have an interval beside 0, at most `MAX_PAIRS_IN_WORDS` of them by name."""
    found, unknown = [], 0
    for pair in differences:
        difference = pair.score if pair.score.num_seeds > 1 else pair.checkpoint_score
        sign = difference.sign
        unknown += sign is None
        if sign:
            above, below = (pair.first, pair.second) if sign > 0 else (pair.second, pair.first)
            alone = ', one seed' if several and pair.score.num_seeds == 1 else ''
            found.append(f'{above} above {below} (by {number(abs(difference.mean), 3)}{alone})')
    named = found[:MAX_PAIRS_IN_WORDS]
    if more := len(found) - len(named):
        named.append(f'{more} more in the table')
    pairs = f'{len(differences)} {"pair" if len(differences) == 1 else "pairs"} of arms'
    if unknown:
        pairs += f', {unknown} of them with {NO_INTERVAL},'
    if not found:
        return f'Of {pairs} none differs {how}'
    return f'Of {pairs} {len(found)} {"differs" if len(found) == 1 else "differ"} {how}: {listed(named)}'


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: float(np.mean([found[kind] for found in shares])) for kind in shares[0]}
