"""Tables of verdicts against a slow count of them, and against strengths, biases and labels that were planted."""

import dataclasses
import json

import numpy as np
import pytest

from simrl.conversations.records import Message
from simrl.evaluation.pairwise.judges import NOT_ASKED, Judged, Verdict
from simrl.evaluation.pairwise.responses import Pair, Response
from simrl.evaluation.pairwise.table import preferences_of, table
from simrl.evaluation.results.judges import PANEL
from simrl.run import config

CHOICES = {1.0: 'A', 0.5: 'tie', 0.0: 'B'}


def responses_of(names, number, lengths=None):
    lengths = lengths or {}
    return {
        name: {
            f'x{i}': Response(
                (Message('user', f'q{i}'), Message('assistant', 'a' * int(lengths.get(name, [9] * number)[i]))),
                *(1, None, None, 'here'),
            )
            for i in range(number)
        }
        for name in names
    }


def judged_of(two, single, *, people=None, causes=None):
    """Verdicts from {judge: [2, N] preferences for the first assistant}; NaN is a failure."""
    found = []
    for judge, values in single.items():
        for i in range(len(values[0])):
            person = None if people is None else people[i]
            pair = Pair(f'x{i}', f'opening q{i}' if person is None else f'person {person}', person, *two)
            for first_is_a, value in zip((True, False), (values[0][i], values[1][i]), strict=True):
                shown = None if np.isnan(value) else float(value if first_is_a else 1 - value)
                cause = '' if shown is not None else 'schema'
                if causes is not None and causes[i]:
                    cause = causes[i]
                choice = None if shown is None else CHOICES.get(shown)
                found.append(Judged(pair, first_is_a, judge, Verdict(shown, choice, cause)))
    return found


def test_a_judge_that_always_prefers_the_first_says_nothing() -> None:
    always = np.array([np.ones(20), np.zeros(20)])
    for combine, counts in (('mean', (0, 20, 0)), ('strict', (0, 20, 0))):
        (found,) = table(judged_of(('m', 'n'), {'j': always}), responses_of('mn', 20), combine=combine).comparisons
        (own,) = found.judges.values()
        assert own.win_rates.observed.by_participant.mean == 0.5
        assert (own.wins, own.ties, own.losses) == counts
        assert (own.position.consistent.mean, own.position.to_first.mean) == (0.0, 1.0)
        assert own.position.first_position.mean == 1.0
        assert (found.p_value, found.adjusted, found.agreement) == (None, None, None)
        assert own.length_controlled.startswith('length_term: expected length differences that vary')


def test_preferences_are_those_of_a_slow_count() -> None:
    random = np.random.default_rng(0)
    single = {judge: random.choice([0.0, 0.5, 1.0, np.nan], (2, 200), p=[0.35, 0.2, 0.4, 0.05]) for judge in 'jkl'}
    for combine in ('mean', 'strict'):
        found = preferences_of(single, combine)
        assert list(found) == ['j', 'k', 'l', PANEL]
        for i in range(200):
            own = {}
            for judge, values in single.items():
                x, y = values[:, i]
                own[judge] = (x + y) / 2 if combine == 'mean' or x == y or np.isnan(x + y) else 0.5
            mean = sum(own.values()) / 3
            if combine == 'strict' and not np.isnan(mean):
                mean = 1.0 if mean > 0.5 + 1e-9 else 0.0 if mean < 0.5 - 1e-9 else 0.5
            own[PANEL] = mean
            np.testing.assert_allclose([found[name][i] for name in own], list(own.values()))
    assert PANEL not in preferences_of({'j': single['j']}, 'mean')


def test_nothing_is_dropped_and_failures_bound_the_win_rate() -> None:
    """A failure in one order is one of the pair; the panel fails where a judge does. Empty responses count as told."""
    single = {
        'j': np.array([[1, 1, np.nan, 1, 0.0], [1, 0, 1, 1, 0.0]]),
        'k': np.array([[1, 1, 1, np.nan, 0.0], [1, 0, 1, np.nan, 0.0]]),
    }
    causes = ['', '', '', '', NOT_ASKED]
    lengths = {'m': [5, 1, 4, 2, 0], 'n': [3, 3, 3, 3, 3]}
    (found,) = table(
        judged_of(('m', 'n'), single, causes=causes), responses_of('mn', 5, lengths), combine='mean'
    ).comparisons
    assert (found.pairs, found.clusters, found.empty, found.missing) == (5, 5, {'m': 1, 'n': 0}, {'m': 0, 'n': 0})
    assert found.characters == {'m': 2.4, 'n': 3.0}
    for name, values, failures in (
        ('j', [1, 0.5, None, 1, 0], {'schema': 1}),
        ('k', [1, 0.5, 1, None, 0], {'schema': 2}),
        (PANEL, [1, 0.5, None, None, 0], {'schema': 3}),
    ):
        own = found.judges[name]
        there = [value for value in values if value is not None]
        lost = len(values) - len(there)
        rates = own.win_rates
        assert rates.failures == lost
        assert rates.observed.by_participant.mean == pytest.approx(sum(there) / len(there))
        assert rates.all_lost.by_participant.mean == pytest.approx(sum(there) / 5)
        assert rates.all_won.by_participant.mean == pytest.approx((sum(there) + lost) / 5)
        assert own.failures == failures
    assert found.judges['j'].position.consistent.num_observations == 3, 'of those that were asked about'
    assert found.judges[PANEL].position is None


def test_planted_strengths_are_recovered_whatever_the_position() -> None:
    """Three assistants of log strengths 0.8, 0, -0.8, judged by two judges with a bias for the one shown first."""
    random, number = np.random.default_rng(1), 120
    strength = {'l': 0.8, 'm': 0.0, 'n': -0.8}
    bias = {'j': 0.7, 'k': -0.3}
    judged = []
    for a, b in (('l', 'm'), ('l', 'n'), ('m', 'n')):
        gap = strength[a] - strength[b]
        single = {
            judge: (random.random((2, number)) < 1 / (1 + np.exp(-(gap + np.array([[own], [-own]]))))).astype(float)
            for judge, own in bias.items()
        }
        judged += judged_of((a, b), single)
    found = table(judged, responses_of('lmn', number), combine='mean')
    ranking = found.rankings[PANEL]
    assert ranking.models == ('l', 'm', 'n')
    for name, of in zip(ranking.models, ranking.strengths, strict=True):
        # The bias flattens preferences: of a gap of 0.8 the mean over judges and orders has the log-odds 0.75.
        assert of.mean == pytest.approx(strength[name], abs=0.2)
        assert of.low < strength[name] * 0.75 / 0.8 < of.high
    by_two = {(of.first, of.second): of for of in found.comparisons}
    assert by_two['l', 'n'].judges[PANEL].win_rates.observed.by_participant.mean == pytest.approx(0.83, abs=0.05)
    for judge, own in bias.items():
        at = 0.8 + np.array([own, -own])
        expected = 1 / (1 + np.exp(-at))
        place = by_two['l', 'm'].judges[judge].position.first_position
        assert place.mean == pytest.approx((expected[0] + 1 - expected[1]) / 2, abs=0.08)
    p_values = {two: of.p_value for two, of in by_two.items()}
    assert all(p < 1e-3 for p in p_values.values())
    smallest = min(p_values, key=p_values.get)
    assert by_two[smallest].adjusted == pytest.approx(3 * p_values[smallest])
    agreement = by_two['l', 'm'].agreement
    assert 1 < agreement.votes.effective <= 2.3
    assert agreement.errors is None


def test_a_taste_for_length_is_taken_out() -> None:
    random, number = np.random.default_rng(2), 500
    lengths = {'m': random.integers(100, 400, number), 'n': random.integers(50, 350, number)}
    gap = np.tanh((lengths['m'] - lengths['n']) / (lengths['m'] - lengths['n']).std(ddof=1))
    chosen = (random.random((2, number)) < 1 / (1 + np.exp(-2 * gap))).astype(float)
    (found,) = table(
        judged_of(('m', 'n'), {'j': chosen}), responses_of('mn', number, lengths), combine='mean'
    ).comparisons
    own = found.judges['j']
    assert own.length_controlled.length > 1
    assert own.win_rates.observed.by_participant.low > 0.55
    assert own.length_controlled.controlled == pytest.approx(0.5, abs=0.04)


def test_judges_are_held_against_people_where_these_were_asked() -> None:
    """Of two judges with independent errors and one that copies the first."""
    random, number = np.random.default_rng(3), 120
    truth = random.integers(0, 2, number).astype(float)
    right = {judge: random.random(number) < 0.8 for judge in 'jk'}
    single = {judge: np.array([np.where(of, truth, 1 - truth)] * 2) for judge, of in right.items()}
    single['copy'] = single['j']
    labels = {(f'x{i}', 'm', 'n'): truth[i] for i in range(0, number, 2)}
    (found,) = table(
        judged_of(('m', 'n'), single), responses_of('mn', number), combine='mean', labels=labels
    ).comparisons
    errors = found.agreement.errors
    assert errors.failures == number // 2, 'no label'
    for judge, of in right.items():
        assert errors.agreement[judge].mean == pytest.approx(of[::2].mean())
    assert errors.correlations[0][2] == pytest.approx(1)
    assert found.agreement.equal['j and copy'].mean == 1.0
    assert found.agreement.equal['j and k'].mean == pytest.approx((right['j'] == right['k']).mean())
    assert errors.effective_votes < 2.2


def test_people_add_regressions_of_single_verdicts() -> None:
    random, number = np.random.default_rng(4), 150
    chosen = (random.random((2, number)) < np.array([[0.75], [0.55]])).astype(float)
    people = [f'p{i // 3}' for i in range(number)]
    (found,) = table(
        judged_of(('m', 'n'), {'j': chosen}, people=people), responses_of('mn', number), combine='mean'
    ).comparisons
    own = found.judges['j']
    assert found.clusters == own.win_rates.observed.by_participant.num_clusters == 50
    assert own.gee.num_votes == own.cumulative_logit.num_votes == 2 * number
    assert own.gee.position.value == pytest.approx(np.log(0.75 / 0.25) - np.log(0.55 / 0.45), abs=0.6)
    assert own.gee.win_rate.value == pytest.approx(chosen.mean(), abs=0.02)
    assert own.gee.position.low > 0


def test_the_unit_is_the_person_everywhere() -> None:
    """Of 12 people with 10 prompts each, whose judges agree by half where one flips."""
    random, number = np.random.default_rng(6), 120
    people = [f'p{i // 10}' for i in range(number)]
    judged, single = [], {}
    for two in (('l', 'm'), ('l', 'n'), ('m', 'n')):
        single[two] = {judge: random.integers(0, 2, (2, number)).astype(float) for judge in 'jk'}
        judged += judged_of(two, single[two], people=people)
    whole = table(judged, responses_of('lmn', number), combine='mean')
    for of in whole.comparisons:
        own = of.judges['j']
        voters = own.majorities.first + own.majorities.second + own.majorities.neither
        units = [own.win_rates.observed.by_participant, own.position.consistent, of.agreement.equal['j and k']]
        assert (of.clusters, voters, [x.num_clusters for x in units]) == (12, 12, [12] * 3)
        first, second = (values.mean(0) for values in single[of.first, of.second].values())
        assert of.agreement.equal['j and k'].mean == pytest.approx(1 - np.abs(first - second).mean())
    assert {x.num_clusters for ranking in whole.rankings.values() for x in ranking.strengths} == {12}


def test_what_verdicts_do_not_determine_is_a_reason() -> None:
    """One prompt; a judge without any verdict; one that always prefers the same."""
    (one,) = table(
        judged_of(('m', 'n'), {'j': np.ones((2, 1))}, people=['p']), responses_of('mn', 1), combine='mean'
    ).comparisons
    own = one.judges['j']
    assert own.win_rates.observed.by_participant.low is None
    assert own.gee.startswith('gee: expected at least two participants, found 1')
    assert own.length_controlled.startswith('length_term: ')
    assert one.p_value == 1.0
    judged = judged_of(('m', 'n'), {'j': np.ones((2, 3)), 'k': np.full((2, 3), np.nan)})
    (none,) = table(judged, responses_of('mn', 3), combine='mean').comparisons
    assert none.judges['k'].win_rates == none.judges[PANEL].win_rates
    assert none.judges['k'].win_rates.startswith('win_rates: expected a vote that did not fail, found 3 failures')
    assert none.judges['k'].failures == {'schema': 6}
    assert none.judges['k'].position.startswith('position_bias: expected a pair with all verdicts')
    assert isinstance(none.agreement.votes, str)
    assert none.p_value is None
    three = [
        dataclasses.replace(of, pair=dataclasses.replace(of.pair, first=a, second=b))
        for a, b in (('l', 'm'), ('l', 'n'), ('m', 'n'))
        for of in judged_of((a, b), {'j': np.ones((2, 3))})
    ]
    ranking = table(three, responses_of('lmn', 3), combine='mean').rankings['j']
    assert ranking.startswith('davidson: expected votes with a finite fit')


def test_runs_of_an_arm_are_its_seeds() -> None:
    """Each run against the initial assistant, whichever of both comes first; runs among themselves are no arm."""
    random, number = np.random.default_rng(5), 30
    people = [f'p{i // 2}' for i in range(number)]
    rates = {'x/seed-0': 0.8, 'x/seed-2': 0.7, 'x/seed-1': 0.9, 'y/seed-0': 0.5, 'y/seed-1': 0.4, 'z': 0.5}
    judged, means, bounds = [], {}, {}
    for name, rate in rates.items():
        chosen = (random.random(number) < rate).astype(float)
        chosen[0] = np.nan if name == 'y/seed-1' else chosen[0]
        first = name.startswith('x')
        two = (name, 'initial') if first else ('initial', name)
        judged += judged_of(two, {'j': np.array([chosen if first else 1 - chosen] * 2)}, people=people)
        by_person = [np.nanmean(chosen[i : i + 2]) for i in range(0, number, 2)]
        means[name] = np.mean(by_person)
        bounds[name] = [np.where(np.isnan(chosen), to, chosen).mean() for to in (0.0, 1.0)]
    judged += judged_of(('x/seed-0', 'x/seed-1'), {'j': np.ones((2, number))}, people=people)
    whole = table(judged, responses_of(['initial', *rates], number), combine='mean')
    json.dumps(config.to_dict(dataclasses.replace(whole, rankings={})), allow_nan=False)
    found = whole.seeds
    assert [(of.arm, of.other, of.seeds) for of in found] == [('x', 'initial', (0, 1, 2)), ('y', 'initial', (0, 1))]
    x, y = found
    assert x.win_rate.values == pytest.approx([means[f'x/seed-{seed}'] for seed in range(3)])
    assert y.win_rate.mean == pytest.approx((means['y/seed-0'] + means['y/seed-1']) / 2)
    assert x.bounds is None
    assert y.bounds.lost.values == pytest.approx([bounds[f'y/seed-{seed}'][0] for seed in range(2)])
    assert y.bounds.won.values == pytest.approx([bounds[f'y/seed-{seed}'][1] for seed in range(2)])
    assert (x.win_rate.p_value, x.adjusted) == (0.25, 0.5)
    assert x.intervals.crossed.num_people == number // 2
    assert x.intervals.crossed.mean == pytest.approx(x.win_rate.mean)
    assert x.intervals.pooled.alone == pytest.approx((x.win_rate.low, x.win_rate.high))


def test_a_run_without_a_verdict_is_in_the_bounds_of_its_arm_alone() -> None:
    """All its verdicts failed: lost it has a rate of 0, won of 1."""
    chosen = {0: np.array([1.0, 1.0, 0.0, 1.0]), 1: np.full(4, np.nan)}
    judged = [
        one
        for seed, values in chosen.items()
        for one in judged_of((f'x/seed-{seed}', 'initial'), {'j': np.array([values] * 2)})
    ]
    (found,) = table(judged, responses_of(['initial', 'x/seed-0', 'x/seed-1'], 4), combine='mean').seeds
    assert (found.seeds, found.win_rate.values) == ((0,), (0.75,))
    assert (found.bounds.lost.values, found.bounds.won.values) == ((0.75, 0.0), (0.75, 1.0))


def test_without_any_pair_to_ask_about_there_are_reasons() -> None:
    """All responses of one assistant are empty; all of both tie."""
    for value, counts in ((1.0, (3, 0, 0)), (0.5, (0, 3, 0))):
        single = {judge: np.full((2, 3), value) for judge in 'jk'}
        judged = judged_of(('m', 'n'), single, people=['p', 'p', 'q'], causes=[NOT_ASKED] * 3)
        (found,) = table(judged, responses_of('mn', 3), combine='mean').comparisons
        own = found.judges[PANEL]
        assert (own.wins, own.ties, own.losses) == counts
        assert own.win_rates.observed.by_participant.mean == value
        for reason in (found.judges['j'].position, own.gee, found.agreement.votes, found.agreement.equal['j and k']):
            assert ': expected ' in reason
