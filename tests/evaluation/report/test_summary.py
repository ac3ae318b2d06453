"""Sentences of the report: an ordering exactly where an interval supports it, one seed as this checkpoint only."""

import dataclasses
import re

import pytest

from simrl.evaluation.gap_recovered import GapRecovered
from simrl.evaluation.report import drawing, gallery, tables
from simrl.evaluation.report.drawing import looks_of
from simrl.evaluation.report.report import console_table
from simrl.evaluation.report.summary import MAX_PAIRS_IN_WORDS, interval, number, rows_of, sentences, significance
from simrl.evaluation.results.measures import Difference, SeedBounds
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.statistics import Estimate
from tests.evaluation.report.fake_run import fake_results, page_text


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=3)


def over_seeds(mean, low=None, high=None, seeds=1):
    return SeedEstimate(mean, low, high, (mean,) * seeds, None, 0.95)


def over_people(mean, low, high):
    return Estimate(mean, low, high, 9, 9, 0.95)


def with_people(results, gains, differences):
    """The results with other gains of arms and other differences."""
    people = results.measures['people']
    arms = {
        name: dataclasses.replace(arm, gain=gains[name]) if name in gains else arm for name, arm in people.arms.items()
    }
    people = dataclasses.replace(people, arms=arms, differences=differences)
    return dataclasses.replace(results, measures={'people': people})


def test_an_ordering_is_said_exactly_where_the_interval_over_seeds_supports_it(results):
    certain_people = over_people(0.2, 0.1, 0.3)  # many people do not make up for few seeds
    differences = tuple(
        Difference(*pair, (0, 1, 2), interval, interval, certain_people)
        for pair, interval in {
            ('persona', 'role_play'): over_seeds(0.2, -0.1, 0.5, seeds=3),
            ('sft 7b', 'role_play'): over_seeds(-0.2, -0.3, -0.1, seeds=3),
            ('sft 7b', 'persona'): over_seeds(0.2, 0.1, 0.3, seeds=3),
            ('truth', 'sft 7b'): over_seeds(0.0, -0.2, 0.2, seeds=3),
        }.items()
    )
    gains = {'persona': over_seeds(0.1, -0.01, 0.21, seeds=3), 'truth': over_seeds(-0.1, -0.2, -0.01, seeds=3)}
    outcome = sentences(with_people(results, gains, differences))[1]
    assert 'It is lower by its interval after training against truth (−0.100).' in outcome
    assert 'persona (+0.100)' in outcome.partition('not different by its interval after')[2].partition(' Of ')[0]
    pairs = 'role_play above sft 7b (by 0.200) and sft 7b above persona (by 0.200)'
    assert f'Of 4 pairs of arms 2 differ by the interval: {pairs}.' in outcome
    said = 'The 95% t-intervals are over training seeds, not adjusted for the number of comparisons, and assume normal'
    assert f'{said} spread: so few seeds cannot' in outcome
    assert 'checkpoint' not in outcome
    assert 'significant' not in outcome, 'no sign-flip test of three seeds could be'
    assert [significance(x.score, x.checkpoint_score) for x in differences] == ['no', 'yes', 'yes', 'no']


def test_without_an_interval_nothing_is_concluded(results):
    """Of one person, or where all are alike, a number is given and no verdict drawn."""
    one = Estimate(0.03, None, None, 1, 1, 0.95)
    alike = over_seeds(0.2, seeds=3)
    assert interval(one, 2, '+') == '+0.03 [no interval]'
    assert interval(alike) == '0.20 [no interval]'
    assert interval(over_seeds(0.2)) == '0.20'
    assert interval(GapRecovered(1.0, None, None, None, 9, 0.95)) == '1.00', 'the oracle’s own'
    assert interval(GapRecovered(0.5, None, None, 'all alike', 9, 0.95)) == '0.50 [no interval]'
    assert [significance(over_seeds(0.03), one), significance(alike, one)] == ['no interval'] * 2
    pairs = [('persona', 'role_play', alike), ('truth', 'persona', over_seeds(0.2, 0.1, 0.3, seeds=3))]
    differences = tuple(Difference(first, second, (0, 1, 2), x, x, one) for first, second, x in pairs)
    outcome = sentences(with_people(results, {'persona': alike}, differences))[1]
    assert 'It cannot be compared (no interval) after training against persona (+0.200).' in outcome
    assert 'Of 2 pairs of arms, 1 of them with no interval, 1 differs by the interval: truth above persona' in outcome


def test_a_run_of_one_person_says_so_everywhere():
    results = fake_results(seeds=1, people=1)
    people = results.measures['people']
    assert all(found.score.low is None for found in people.assistants.values())
    outcome = sentences(results)[1]
    assert 'significantly' not in outcome.replace('differs significantly', '').replace('differ significantly', '')
    assert 'cannot be compared (no interval) after training against role_play' in outcome
    assert f'{len(people.differences)} of them with no interval, none differs significantly' in outcome
    text = page_text(results)
    assert '<small>[no interval]</small>' in text
    assert 'this checkpoint only</td>' not in text
    assert '[no interval]' in console_table(results)
    drawings = gallery.drawings_of(results, looks_of(results.experiment))
    assert all(drawing.svg(one, one.name, drawing.NARROW) for one in drawings['measure/people'])


def test_only_so_many_differences_are_put_into_words(results):
    interval = over_seeds(0.2, 0.1, 0.3, seeds=3)
    pair = Difference('persona', 'role_play', (0, 1, 2), interval, interval, over_people(0.2, 0.1, 0.3))
    outcome = sentences(with_people(results, {}, (pair,) * (MAX_PAIRS_IN_WORDS + 3)))[1]
    assert outcome.count(' above ') == MAX_PAIRS_IN_WORDS
    assert 'and 3 more in the table.' in outcome


def lines_of(html_text):
    """The rows of all tables: the name of each, and the text of its cells."""
    rows = re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', html_text)
    return {name: re.findall('<td.*?>(.*?)</td>', cells) for name, cells in rows}


def test_the_adjusted_p_stands_beside_p(results):
    people = results.measures['people']
    pair = dataclasses.replace(people.differences[0], adjusted_p=0.75)
    text = ''.join(tables.comparisons(dataclasses.replace(people, differences=(pair,))))
    p = pair.score.p_value
    assert lines_of(text.partition('<details>')[0])['persona − role_play'][3] == f'{p:.3f}<small>adjusted 0.750</small>'
    header, line = console_table(results).split('difference')[1].splitlines()[:2]
    assert header.split()[2:] == ['p', 'Holm', 'p', 'win', 'rate', 'these', 'checkpoints'], 'nothing is cut off'
    adjusted = people.differences[0].adjusted_p
    assert re.search(rf' {p:.3f} +{adjusted:.3f} ', line)


def test_other_intervals_are_folded_and_say_what_they_assume(results):
    people = results.measures['people']
    text = ''.join(tables.comparisons(people)).partition('<details>')[2]
    assert 'The same differences with other intervals</summary>' in text
    assert 'assumes that the runs of all arms spread alike' in text
    shown = lines_of(text)
    assert len(shown) == len(people.arms) + len(people.differences)
    for name, own, others, digits in (
        ('persona − initial', people.arms['persona'].gain, people.arms['persona'].gain_intervals, 3),
        ('truth − sft 7b', people.differences[-1].score, people.differences[-1].score_intervals, 3),
    ):
        for cell, x in zip(shown[name], (own, others.pooled, others.crossed), strict=False):
            assert cell == f'{number(x.mean, digits, "+")}<small>{interval(x, digits, "+").partition(" ")[2]}</small>'
        assert shown[name][-1] == '300'
    assert 'other intervals' not in ''.join(tables.comparisons(fake_results(seeds=1, people=20).measures['people']))


def test_failures_are_shown_lost_and_won_where_there_are_any(results):
    people = results.measures['people']
    assert tables.failure_bounds(rows_of(results.experiment, people)) == []
    assert 'failures all lost' not in console_table(results)
    arm = people.arms['persona']
    bounds = SeedBounds(lost=over_seeds(0.5, 0.4, 0.6, seeds=3), won=over_seeds(0.6, 0.5, 0.7, seeds=3))
    arm = dataclasses.replace(arm, compared=(299, 300, 298), win_rate_bounds=bounds, strict_win_rate_bounds=bounds)
    lost = {
        f'persona/seed-{seed}': dataclasses.replace(
            found, causes={'no line': n}, gain=dataclasses.replace(found.gain, num_observations=300 - n)
        )
        for seed, n in ((0, 1), (2, 2))
        for found in [people.assistants[f'persona/seed-{seed}']]
    }
    changed = dataclasses.replace(
        people, arms=people.arms | {'persona': arm}, assistants=people.assistants | lost, without_outcome=1
    )
    (folded,) = tables.failure_bounds(rows_of(results.experiment, changed))
    row = ['3', interval(arm.win_rate), '0.50 [0.40, 0.60]', '0.60 [0.50, 0.70]']
    shown = lines_of(folded)
    assert [re.sub('<small>(.*?)</small>', r' \1', cell) for cell in shown['persona']] == row
    assert list(shown) == ['persona', 'persona<small>strict</small>']
    assert lines_of(''.join(tables.comparisons(changed)))['persona − initial'][-1].startswith('298–300 of 300')
    results = dataclasses.replace(results, measures={'people': changed})
    printed = ' '.join(console_table(results).split())
    assert 'Win rates with failures all lost to all won (failures): persona 0.500 to 0.600 (3).' in printed
    assert 'Each is left out, and with it its comparisons; 1 have none with any assistant.' in printed


def test_one_seed_speaks_of_this_checkpoint_only():
    results = fake_results(seeds=1, people=100)
    asked, outcome, caution = sentences(results)
    assert 'one training seed each' in asked
    assert 'role_play, persona, sft 7b and truth (truth trains against people themselves)' in asked
    assert 'on the same 100 people.' in asked
    assert 'this checkpoint only' in outcome
    assert 'over training seeds' not in outcome
    assert caution == results.experiment.caution
    text = page_text(results)
    assert '95% intervals are over people: this checkpoint only.' in text
    row = re.search(r'persona − role_play</th>(.*?)</tr>', text).group(1)
    cells = re.findall('<td.*?>(.*?)</td>', row)
    assert cells[0] in ('no', 'this checkpoint only')
    assert cells[1] == '1'
    assert '[' not in cells[2], 'one seed has no interval over seeds'
    assert cells[3] == '–', 'and no p-value'


def test_seeds_that_differ_are_told_apart_from_those_that_are_several(results):
    dropped = ('truth/seed-1', 'truth/seed-2')
    runs = {name: run for name, run in results.experiment.runs.items() if name not in dropped}
    people = results.measures['people']
    assistants = {name: found for name, found in people.assistants.items() if name not in dropped}
    arms = people.arms | {'truth': dataclasses.replace(people.arms['truth'], seeds=(0,))}
    alone = Difference(*('truth', 'sft 7b', (0,)), over_seeds(0.1), over_seeds(0.1), over_people(0.1, 0.05, 0.15))
    people = dataclasses.replace(people, assistants=assistants, arms=arms, differences=(alone,))
    experiment = dataclasses.replace(results.experiment, runs=runs)
    changed = dataclasses.replace(results, experiment=experiment, measures={'people': people})
    asked, outcome, _ = sentences(changed)
    assert '1–3 training seeds each' in asked
    gain = assistants['truth/seed-0'].gain.mean  # of the checkpoint on people, where there is one seed
    assert f'truth ({gain:+.3f}, one seed)' in outcome
    assert 'Of 1 pair of arms 1 differs by the interval: truth above sft 7b (by 0.100, one seed).' in outcome
    assert outcome.endswith('a sign-flip p below .05; with one seed they are over people: of that checkpoint only.')
    assert 'with one seed, and for the initial assistant, over people: this checkpoint only' in console_table(changed)


def test_rows_are_the_arms_as_the_config_lists_them(results):
    rows = rows_of(results.experiment, results.measures['people'])
    assert [row.name for row in rows] == ['initial', 'role_play', 'persona', 'sft 7b', 'truth']
    assert [row.num_seeds for row in rows] == [0, 3, 3, 3, 3]


def test_numbers():
    assert [number(x) for x in (0.125, -0.125, -0.001, None)] == ['0.12', '−0.12', '0.00', '–']
    assert [number(x, 3, '+') for x in (0.5, -0.5, -0.0, -0.0001)] == ['+0.500', '−0.500', '+0.000', '−0.000']
