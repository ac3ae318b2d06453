"""Win rates over participants: by hand, against statsmodels, and over simulated studies of people who vote again."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from simrl.evaluation.preferences import (
    align,
    cluster_robust,
    independent_votes,
    majorities,
    standard_error,
    trinomial,
    win_rates,
    winners,
)
from simrl.evaluation.statistics import cluster_bootstraps, resampled_means
from tests.evaluation.studies import study, true_win_rate

VOTES = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.integers(0, 4)), min_size=1, max_size=25)


def test_wins_ties_and_losses_by_hand():
    found = trinomial(50, 20, 30)
    assert found.mean == 0.6
    assert found.high - found.mean == pytest.approx(1.959964 * math.sqrt(((50 + 20 / 4) / 100 - 0.36) / 100))
    votes = [1.0] * 50 + [0.5] * 20 + [0.0] * 30
    assert found == independent_votes(votes)
    assert found.high - found.mean == pytest.approx(1.959964 * standard_error(votes))
    assert (found.low, found.high) == pytest.approx((found.mean * 2 - found.high, found.high))


def test_without_ties_it_is_the_interval_of_a_proportion():
    found = trinomial(58, 0, 42, level=0.9)
    assert (found.low, found.high) == pytest.approx(proportion_confint(58, 100, alpha=0.1, method='normal'))


def test_the_published_study_has_the_widths_of_independent_votes():
    """58.1% [54.3, 61.8] and 50.6% [46.5, 54.9] have the widths of some 600 and 500 votes with a fifth of ties."""
    for rate, low, high, votes in ((0.581, 0.543, 0.618, 530), (0.506, 0.465, 0.549, 435)):
        wins = round(votes * (rate - 0.1))
        found = trinomial(wins, votes // 5, votes - wins - votes // 5)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.003)


@settings(max_examples=50, deadline=None)
@given(VOTES.filter(lambda rows: len({who for _, who in rows}) > 1))
def test_agrees_with_statsmodels_on_the_cluster_robust_error(rows):
    votes, people = np.array([vote for vote, _ in rows]), np.array([who for _, who in rows])
    votes = np.nan_to_num(votes, nan=0.25)
    found = cluster_robust(votes, people.tolist())
    fit = sm.OLS(votes, np.ones(len(votes))).fit(cov_type='cluster', cov_kwds={'groups': people}, use_t=True)
    assert found.mean == pytest.approx(fit.params[0])
    if found.low is None:
        assert fit.bse[0] == pytest.approx(0, abs=1e-9)
    else:
        assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]))
    assert found.num_clusters == len(set(people))


def slow_win_rate(rows, value_of_failures):
    """The primary estimand as a loop; None of a failure leaves it out."""
    votes = {}
    for vote, who in rows:
        vote = value_of_failures if math.isnan(vote) else vote
        if vote is not None:
            votes.setdefault(who, []).append(vote)
    return sum(sum(x) / len(x) for x in votes.values()) / len(votes)


@settings(max_examples=50, deadline=None)
@given(VOTES.filter(lambda rows: not all(math.isnan(vote) for vote, _ in rows)))
def test_the_primary_rate_is_the_mean_over_participants_and_failures_bound_it(rows):
    votes, people = [vote for vote, _ in rows], [f'person {who}' for _, who in rows]
    found = win_rates(votes, people, resamples=50)
    known = [vote for vote in votes if not math.isnan(vote)]
    assert found.failures == len(votes) - len(known)
    for rate, value in ((found.observed, None), (found.all_lost, 0.0), (found.all_won, 1.0)):
        assert rate.by_participant.mean == pytest.approx(slow_win_rate(rows, value))
        assert rate.by_vote.mean == rate.naive.mean
        if rate.by_participant.low is not None:
            assert 0 <= rate.by_participant.low <= rate.by_participant.high <= 1
    assert found.observed.by_vote.mean == pytest.approx(sum(known) / len(known))
    assert found.all_lost.by_vote.mean == pytest.approx(sum(known) / len(votes))
    assert found.all_lost.by_vote.mean <= found.observed.by_vote.mean <= found.all_won.by_vote.mean
    other = win_rates([1 - vote for vote in votes], people, resamples=50)
    assert other.observed.by_participant.mean == pytest.approx(1 - found.observed.by_participant.mean)
    assert other.all_won.by_participant.mean == pytest.approx(1 - found.all_lost.by_participant.mean)


@given(VOTES)
def test_the_sign_test_is_that_of_scipy(rows):
    votes, people = [0.5 if math.isnan(vote) else vote for vote, _ in rows], [who for _, who in rows]
    found = majorities(votes, people)
    means = [np.mean([v for v, w in zip(votes, people, strict=True) if w == who]) for who in set(people)]
    assert found.first == sum(mean > 0.5 for mean in means)
    assert found.second == sum(mean < 0.5 for mean in means)
    assert found.first + found.second + found.neither == len(means)
    if found.neither == len(means):
        assert found.p_value is None
    else:
        assert found.p_value == pytest.approx(scipy.stats.binomtest(found.first, found.first + found.second).pvalue)


def test_winners_are_told_but_for_rounding():
    found = winners([1.0, 0.75, 0.5, 0.1 + 0.2 + 0.2, 0.49, 0.0, math.nan])
    np.testing.assert_array_equal(found, [1, 1, 0, 0, -1, -1, math.nan])


def test_who_votes_often_counts_once():
    found = win_rates([1.0] * 8 + [0.0, 0.0], ['often'] * 8 + ['once', 'twice']).observed
    assert (found.by_participant.mean, found.by_vote.mean) == (pytest.approx(1 / 3), 0.8)
    assert (found.by_participant.num_observations, found.by_participant.num_clusters) == (10, 3)
    assert (found.naive.num_observations, found.naive.num_clusters) == (10, 10)


@pytest.mark.parametrize(
    ('votes', 'people', 'naive'),
    [
        ([1.0, 0.0, 0.5], ['one person'] * 3, True),
        ([0.5] * 4, [0, 1, 2, 3], False),  # all ties
        ([1.0] * 4, [0, 1, 2, 3], False),
        ([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], True),  # no person differs from another
    ],
)
def test_one_person_all_ties_or_people_who_are_alike_have_no_interval(votes, people, naive):
    found = win_rates(votes, people, resamples=50).observed
    for estimate in (found.by_participant, found.by_vote):
        assert (estimate.mean, estimate.low, estimate.high, estimate.sign) == (np.mean(votes), None, None, None)
    assert (found.naive.low is not None) == naive


@pytest.mark.parametrize(
    ('votes', 'people', 'message'),
    [
        ([], [], 'win_rates: expected at least one vote, found none'),
        ([math.nan] * 2, [0, 1], 'win_rates: expected a vote that did not fail, found 2 failures'),
        ([1.0], [0, 1], 'win_rates: expected a participant of each vote, found 2 of 1'),
        ([1.5, 0.5], [0, 1], 'win_rates: expected preferences from 0 to 1, found 1.5'),
        ([math.inf], [0], 'win_rates: expected preferences from 0 to 1, found inf'),
    ],
)
def test_bad_votes(votes, people, message):
    with pytest.raises(ValueError, match=message):
        win_rates(votes, people)


def test_bad_counts_and_levels():
    with pytest.raises(ValueError, match=r'trinomial: expected counts of at least 0, found \(1, -1, 0\)'):
        trinomial(1, -1, 0)
    with pytest.raises(ValueError, match='independent_votes: expected at least one vote, found none'):
        trinomial(0, 0, 0)
    for function in (win_rates, cluster_robust):
        with pytest.raises(ValueError, match=r'expected a level in \(0, 1\), found 95'):
            function([1.0, 0.0], [0, 1], level=95)


def test_sources_are_aligned_by_id():
    ids, values = align({'a': [('x', 1.0), ('y', 0.5)], 'b': [('y', 0.0), ('x', 0.25)]})
    assert ids == ('x', 'y')
    assert values.tolist() == [[1.0, 0.5], [0.25, 0.0]]


@pytest.mark.parametrize(
    ('sources', 'message'),
    [
        ({}, 'align: expected at least one source, found none'),
        ({'a': [('x', 1.0), ('x', 1.0)]}, "align: expected each id once in 'a', found 'x' twice"),
        ({'a': [('x', 1.0)], 'b': [('y', 1.0)]}, "expected the ids of 'a' in 'b', found 'x' in 'a' alone"),
        ({'a': [('x', 1.0)], 'b': [('x', 1.0), ('y', 1.0), ('z', 1.0)]}, r"found 'y' in 'b' alone \(one of 2\)"),
    ],
)
def test_ids_that_differ_or_come_twice_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        align(sources)


def coverage_of_few(people, kind, studies):
    """The share of studies whose primary interval holds the truth, beside that of plain percentiles.

    Studies whose people all agree have no interval, and are left out.
    """
    random, truth = np.random.default_rng(people), true_win_rate(**{k: v for k, v in kind.items() if k != 'votes'})
    means = np.empty((studies, people))
    for number in range(studies):
        votes = study(random, people=people, **kind)
        means[number] = np.bincount(votes.people, votes.preferences) / np.bincount(votes.people)
    means = means[np.ptp(means, axis=1) > 1e-9]
    found = cluster_bootstraps(means, range(people), resamples=2_000)
    low, high = np.quantile(resampled_means(means, range(people), resamples=2_000, seed=0), [0.025, 0.975], axis=1)
    votes = win_rates(means[-1], range(people), resamples=2_000).observed.by_participant
    assert (votes.low, votes.high) == pytest.approx((max(0, found[-1].low), min(1, found[-1].high)))
    return np.mean([x.low <= truth <= x.high for x in found]), ((low <= truth) & (truth <= high)).mean()


KEEN = {'preference': 2.0, 'sd': 1.0}


@pytest.mark.parametrize(
    ('people', 'kind', 'studies', 'least', 'plain'),
    [
        (4, {}, 300, 0.90, 0.86),
        (8, {}, 300, 0.90, 0.93),
        *(
            pytest.param(people, kind, 2_000, least, plain, marks=pytest.mark.long)
            for people, plain in ((4, 0.83), (5, 0.86), (6, 0.89), (10, 0.92), (15, 0.935))
            for kind, least in (({}, 0.925), (KEEN, 0.90))
        ),
    ],
)
def test_the_primary_interval_covers_also_of_few_people(people, kind, studies, least, plain):
    """Plain percentiles are far too short; of win rates near .8 these are so by a few points, too."""
    covered, percentiles = coverage_of_few(people, kind, studies)
    assert least <= covered <= 0.97
    assert percentiles < plain
    assert covered > percentiles + 0.01


@pytest.mark.parametrize(('studies', 'margin'), [(250, 0.045), pytest.param(2_000, 0.015, marks=pytest.mark.long)])
@pytest.mark.parametrize('more_if_keen', [False, True])
def test_the_primary_interval_covers_where_the_naive_one_does_not(studies, margin, more_if_keen):
    """Studies of 283 people with ties and a position bias, in one case also with more votes of who likes the first.

    The mean over votes is then of something else, and no interval of it helps.
    """
    random, truth = np.random.default_rng(0), true_win_rate()
    means, found = np.empty((studies, 283)), {'naive': [], 'by_vote': []}
    for number in range(studies):
        votes = study(random, people=283, more_if_keen=more_if_keen)
        found['naive'].append(independent_votes(votes.preferences))
        found['by_vote'].append(cluster_robust(votes.preferences, votes.people.tolist()))
        means[number] = np.bincount(votes.people, votes.preferences) / np.bincount(votes.people)
    found['primary'] = cluster_bootstraps(means, range(283), resamples=2_000)
    last = win_rates(votes.preferences, votes.people.tolist(), resamples=2_000).observed.by_participant
    assert (last.mean, last.low, last.high) == pytest.approx(dataclasses.astuple(found['primary'][-1])[:3])
    covered = {name: np.mean([x.low <= truth <= x.high for x in estimates]) for name, estimates in found.items()}
    assert covered['primary'] == pytest.approx(0.95, abs=margin)
    assert covered['naive'] < 0.85
    assert covered['by_vote'] < 0.5 if more_if_keen else covered['by_vote'] == pytest.approx(0.95, abs=margin)
