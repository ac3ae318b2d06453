"""Regressions of votes recover what was planted, agree with statsmodels, and refuse votes that determine nothing."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import statsmodels.api as sm
from scipy.special import expit, logit
from statsmodels.miscmodels.ordinal_model import OrderedModel

from simrl.evaluation.preferences import cluster_robust
from simrl.evaluation.vote_models import cumulative_logit, gee
from tests.evaluation.studies import study, true_win_rate


def test_planted_preference_position_bias_and_spread_are_recovered():
    """The model of one study, and over 40 small ones intervals that hold the truth at about their level."""
    votes = study(np.random.default_rng(0), people=500)
    found = cumulative_logit(votes.preferences, votes.people.tolist(), votes.a_first)
    for coefficient, truth in ((found.preference, 0.3), (found.position, 0.4), (found.win_rate, true_win_rate())):
        assert abs(coefficient.value - truth) < 3 * coefficient.standard_error
    assert (found.tie, found.participant_sd) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.2, abs=0.1))
    assert (found.num_votes, found.num_participants) == (len(votes.preferences), 500)
    assert found.preference.standard_error < 0.08
    random, covered = np.random.default_rng(1), 0
    for _ in range(40):
        votes = study(random, people=60)
        small = cumulative_logit(votes.preferences, votes.people.tolist(), votes.a_first)
        covered += small.preference.low <= 0.3 <= small.preference.high
    assert covered >= 34


@pytest.mark.parametrize('function', [cumulative_logit, gee])
def test_intervals_of_few_participants_are_those_of_few(function):
    """Student's of one degree of freedom less than participants; that of a win rate in log-odds."""
    votes = study(np.random.default_rng(8), people=7, sd=0.5)
    found = function(votes.preferences, votes.people.tolist(), votes.a_first)
    bound = scipy.stats.t.ppf(0.975, 6)
    for x in (found.preference, found.position):
        assert (x.low, x.high) == pytest.approx(
            (x.value - bound * x.standard_error, x.value + bound * x.standard_error)
        )
    rate = found.win_rate
    half = bound * rate.standard_error / (rate.value * (1 - rate.value))
    assert [logit(x) for x in (rate.low, rate.high)] == pytest.approx(
        [logit(rate.value) - half, logit(rate.value) + half]
    )
    assert 0 < rate.low < rate.value < rate.high < 1


@pytest.mark.parametrize('position', [0.0, 6.0])
def test_both_models_have_one_win_rate_whatever_the_position_bias(position):
    """That of both positions alike. It is not the rate at no position: logistic(b) is farther from 1/2."""
    truth = true_win_rate(preference=1.5, position=position)
    votes = study(np.random.default_rng(9), people=500, preference=1.5, position=position)
    people = votes.people.tolist()
    found = [function(votes.preferences, people, votes.a_first) for function in (cumulative_logit, gee)]
    for x in found:
        assert x.win_rate.value == pytest.approx(truth, abs=3 * x.win_rate.standard_error)
        assert x.win_rate.standard_error < 0.02
    assert found[0].win_rate.value == pytest.approx(found[1].win_rate.value, abs=0.01)
    if position == 6.0:
        assert expit(found[1].preference.value) > truth + 0.05
    plain = [votes.preferences[votes.a_first == first].mean() for first in (True, False)]
    assert found[1].win_rate.value == pytest.approx(np.mean(plain), abs=0.003), 'as counted in each position'


@pytest.mark.long
@pytest.mark.parametrize('people', [6, 10, 20])
def test_intervals_of_few_participants_cover(people):
    """500 studies; normal intervals, which take standard errors for certain, cover up to 7 points less."""
    random, truth = np.random.default_rng(people), true_win_rate(sd=0.8)
    covered, normal = {cumulative_logit: [], gee: []}, {cumulative_logit: [], gee: []}
    for _ in range(500):
        votes = study(random, people=people, sd=0.8)
        for function in covered:
            rate = function(votes.preferences, votes.people.tolist(), votes.a_first).win_rate
            covered[function].append(rate.low <= truth <= rate.high)
            normal[function].append(abs(rate.value - truth) <= 1.96 * rate.standard_error)
    for function, found in covered.items():
        assert 0.925 <= np.mean(found) <= 0.985
        assert np.mean(normal[function]) < np.mean(found)


def test_agrees_with_statsmodels_where_people_do_not_differ():
    votes = study(np.random.default_rng(2), people=200, sd=0.0)
    people = np.random.default_rng(0).permutation(votes.people)
    found = cumulative_logit(votes.preferences, people.tolist(), votes.a_first)
    x = votes.a_first - 0.5
    fit = OrderedModel(votes.preferences, x[:, None], distr='logit').fit(method='bfgs', disp=0, gtol=1e-8)
    slope, first, gap = fit.params
    second = first + math.exp(gap)
    assert found.participant_sd < 0.01
    assert found.log_likelihood == pytest.approx(fit.llf, abs=1e-5)
    assert found.position.value == pytest.approx(slope, abs=0.02)
    assert found.position.standard_error == pytest.approx(fit.bse[0], rel=0.03)
    assert found.preference.value == pytest.approx(-(first + second) / 2, abs=0.01)
    assert found.tie == pytest.approx((second - first) / 2, abs=0.01)


def slow_log_likelihood(votes, preference, position, tie, sd):
    """Adaptive integration, person by person."""
    total = 0.0
    for who in set(votes.people.tolist()):
        rows = votes.people == who
        at = preference + position * (votes.a_first[rows] - 0.5)
        kinds = votes.preferences[rows]

        def density(u, at=at, kinds=kinds):
            above, below = expit(at + u - tie), expit(-at - u - tie)
            chosen = np.where(kinds == 1, above, np.where(kinds == 0, below, 1 - above - below))
            return chosen.prod() * math.exp(-u * u / (2 * sd * sd)) / (sd * math.sqrt(2 * math.pi))

        total += math.log(scipy.integrate.quad(density, -10 * sd, 10 * sd, epsabs=1e-14, limit=200)[0])
    return total


def test_the_likelihood_is_that_of_adaptive_integration_and_highest_at_the_fit():
    votes = study(np.random.default_rng(3), people=14, sd=2.0, votes=(8, 16))
    found = cumulative_logit(votes.preferences, votes.people.tolist(), votes.a_first)
    at = [found.preference.value, found.position.value, found.tie, found.participant_sd]
    best = slow_log_likelihood(votes, *at)
    assert found.log_likelihood == pytest.approx(best, abs=1e-5)
    for number in range(4):
        for factor in (0.95, 1.05):
            moved = [value * (factor if number == i else 1.0) for i, value in enumerate(at)]
            assert slow_log_likelihood(votes, *moved) < best + 1e-7


def test_exchanging_assistants_changes_signs_only():
    votes = study(np.random.default_rng(4), people=60)
    people = votes.people.tolist()
    one = cumulative_logit(votes.preferences, people, votes.a_first)
    other = cumulative_logit(1 - votes.preferences, people, ~votes.a_first)
    assert other.preference.value == pytest.approx(-one.preference.value, abs=1e-4)
    assert other.position.value == pytest.approx(one.position.value, abs=1e-4)
    assert other.win_rate.value == pytest.approx(1 - one.win_rate.value, abs=1e-5)
    first, second = gee(votes.preferences, people, votes.a_first), gee(1 - votes.preferences, people, ~votes.a_first)
    assert second.preference.value == pytest.approx(-first.preference.value)
    assert second.position.value == pytest.approx(first.position.value)


def test_without_ties_and_positions_it_is_a_logistic_model_with_intercepts():
    votes = study(np.random.default_rng(5), people=400, tie=0.0, position=0.0)
    found = cumulative_logit(votes.preferences, votes.people.tolist())
    assert (found.tie, found.position) == (0.0, None)
    assert abs(found.preference.value - 0.3) < 3 * found.preference.standard_error
    assert found.participant_sd == pytest.approx(1.2, abs=0.25)


def test_gee_of_a_mean_alone_is_the_cluster_robust_mean():
    """With votes of equal numbers the estimate is the plain mean, its error that of clusters."""
    votes = study(np.random.default_rng(6), people=80, votes=(6, 7))
    people = votes.people.tolist()
    found, mean = gee(votes.preferences, people), cluster_robust(votes.preferences, people)
    assert found.win_rate.value == pytest.approx(mean.mean)
    assert found.win_rate.high - found.win_rate.low == pytest.approx(mean.high - mean.low, rel=0.03)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high
    assert 0.05 < found.correlation < 0.5
    assert found.position is None


def test_gee_of_few_people_whose_votes_repel_each_other_has_a_solution():
    """A free correlation, below -1/7, lets the steps of some of these studies end at 1e142, or nowhere."""
    random, correlations = np.random.default_rng(106), []
    for _ in range(14):
        votes = study(random, people=6, sd=0.8)
        found = gee(votes.preferences, votes.people.tolist(), votes.a_first)
        plain = [votes.preferences[votes.a_first == first].mean() for first in (True, False)]
        assert found.win_rate.value == pytest.approx(np.mean(plain), abs=0.04)
        correlations.append(found.correlation)
    assert min(correlations) == 0.0 < max(correlations) < 1


def test_gee_recovers_marginal_effects_and_does_not_depend_on_the_order_of_votes():
    votes = study(np.random.default_rng(7), people=300)
    found = gee(votes.preferences, votes.people.tolist(), votes.a_first)
    assert abs(found.win_rate.value - true_win_rate()) < 3 * found.win_rate.standard_error
    model = cumulative_logit(votes.preferences, votes.people.tolist(), votes.a_first)
    assert found.win_rate.value == pytest.approx(model.win_rate.value, abs=0.01)
    assert 0 < found.position.value < model.position.value, 'effects over all people are nearer to 0'
    order = np.random.default_rng(0).permutation(len(votes.people))
    mixed = gee(votes.preferences[order], [f'p{x}' for x in votes.people[order]], votes.a_first[order])
    assert mixed.preference.value == pytest.approx(found.preference.value)
    assert mixed.position.standard_error == pytest.approx(found.position.standard_error)
    alone = gee(votes.preferences, range(len(votes.people)), votes.a_first)
    fit = sm.GLM(votes.preferences, sm.add_constant(votes.a_first - 0.5), family=sm.families.Binomial()).fit()
    assert (alone.preference.value, alone.position.value) == pytest.approx(tuple(fit.params), abs=1e-6)


@pytest.mark.parametrize('function', [cumulative_logit, gee])
@pytest.mark.parametrize(
    ('votes', 'people', 'a_first', 'message'),
    [
        ([], [], None, 'expected at least one vote, found none'),
        ([1.0, 0.0], [0], None, 'expected a participant of each vote, found 1 of 2'),
        ([1.0, 0.0], [0, 0], None, 'expected at least two participants, found 1'),
        ([0.5] * 4, [0, 0, 1, 1], None, 'expected votes for both assistants, found 0.5 to 0.5'),
        ([1.0, 0.5, 1.0, 1.0], [0, 0, 1, 1], None, 'expected votes for both assistants, found 0.5 to 1'),
        ([1.0, 0.0], [0, 1], [True], 'expected a position of each vote, found 1 of 2'),
        ([1.0, 0.0], [0, 1], [True, True], 'expected votes with each assistant first, found one position only'),
        ([1.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], [True, True, False, False], 'is in the first position, found 1 only'),
    ],
)
def test_votes_that_determine_nothing(function, votes, people, a_first, message):
    with pytest.raises(ValueError, match=f'{function.__name__}: .*{message}|{function.__name__}: {message}'):
        function(votes, people, a_first)


def test_people_who_never_change_their_vote_have_no_finite_spread():
    votes, people = [1.0] * 9 + [0.0] * 6 + [0.5, 1.0], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]
    with pytest.raises(ValueError, match='expected participants whose own votes vary, found a standard deviation'):
        cumulative_logit(votes, people)


def test_gee_of_almost_nothing_is_refused():
    votes, first = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [True, False, False, True, True, True]
    with pytest.raises(ValueError, match='gee: expected more than 2 participants, as many as coefficients, found 2'):
        gee(votes, [0, 1, 1, 0, 0, 0], first)


@pytest.mark.parametrize(
    ('votes', 'people', 'first'),
    [
        ('011010111', [0, 3, 1, 0, 0, 3, 2, 3, 3], '000001010'),
        ('01111001', [0, 2, 2, 0, 1, 0, 0, 2], '11101101'),
    ],
)
def test_gee_whose_steps_may_diverge_is_refused_or_has_an_interval(votes, people, first):
    """Rounding, which is the processor's, decides whether the steps find a solution from so few votes."""
    refusal, found = '', None
    try:
        found = gee([float(vote) for vote in votes], people, [side == '1' for side in first])
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert refusal.startswith('gee: expected estimating equations with a solution, found')
    else:
        assert 0 <= found.win_rate.low <= found.win_rate.value <= found.win_rate.high <= 1
        assert max(found.preference.standard_error, found.position.standard_error) < 100


def test_gee_of_people_who_never_change_their_vote_counts_each_once():
    votes, people = [1.0] * 6 + [0.0] * 2 + [1.0] * 3 + [0.0] * 4, [0] * 6 + [1] * 2 + [2] * 3 + [3] * 4
    found = gee(votes, people)
    assert found.win_rate.value == pytest.approx(0.5, abs=2e-3), 'two of four people, if nine of 15 votes'
    assert found.correlation > 0.9


def test_people_who_are_alike_say_nothing_of_others():
    """Each votes once for either, or for the first in two of three, whatever the position: no interval."""
    for votes, times in (([1.0, 0.0], 3), ([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], 6)):
        people = np.repeat(range(times), len(votes)).tolist()
        positions = [[True] * 3 + [False] * 3] if len(votes) == 6 else []
        for first in (None, *positions):
            found = gee(votes * times, people, None if first is None else first * times)
            assert found.win_rate.value == pytest.approx(np.mean(votes))
            for x in (found.win_rate, found.position, found.preference):
                assert x is None or (x.standard_error, x.low, x.high) == (0.0, None, None)


def test_a_judge_that_no_position_sways_has_no_interval_of_a_position():
    random = np.random.default_rng(3)
    votes = np.repeat(random.choice([0.0, 1.0], 40), 2)
    found = gee(votes, np.repeat(range(20), 4).tolist(), [True, False] * 40)
    assert found.position.value == pytest.approx(0, abs=1e-12)
    assert (found.position.low, found.position.high) == (None, None)
    assert found.win_rate.low < votes.mean() < found.win_rate.high


def test_a_likelihood_that_rises_without_bound_is_refused():
    """People who each always vote alike; the steps go beyond what floats hold."""
    votes, first = [0.0, 1.0, 0.5, 0.5, 0.0, 0.0], [False, True, False, False, True, True]
    with pytest.raises(
        ValueError, match='cumulative_logit: expected a likelihood with a maximum, found one that rises'
    ):
        cumulative_logit(votes, [1, 0, 3, 3, 2, 2], first)


def test_as_few_pairs_of_votes_as_coefficients_have_no_correlation():
    votes, first = [1.0, 0.0, 1.0, 0.0, 1.0], [True, False, False, True, True]
    found = gee(votes, [0, 0, 1, 1, 2], first)
    assert found.correlation == 0.0


def test_cumulative_logit_needs_whole_votes_and_people_who_vote_twice():
    with pytest.raises(ValueError, match='expected preferences of 1, 1/2 or 0, found'):
        cumulative_logit([1.0, 0.0, 0.3], [0, 0, 1])
    with pytest.raises(ValueError, match='expected a participant with at least two votes, found none'):
        cumulative_logit([1.0, 0.0, 0.5], [0, 1, 2])
