"""Davidson's model: planted strengths, a slow fit, statsmodels without ties, and votes without a finite fit."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.optimize
import statsmodels.api as sm
from evalica import Winner, newman
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.evaluation.ranking import davidson


def votes_of(random, strengths, nu, people, votes, spread=0.0):
    """Votes of people between random pairs, with strengths of their own around the models'."""
    models = len(strengths)
    one = random.integers(0, models, people * votes)
    other = (one + random.integers(1, models, people * votes)) % models
    who = np.repeat(np.arange(people), votes)
    own = np.asarray(strengths) + spread * random.normal(size=(people, models))
    half = (own[who, one] - own[who, other]) / 2
    win, loss = np.exp(half), np.exp(-half)
    total = win + loss + nu
    draw = random.random(len(who)) * total
    preference = np.where(draw < win, 1.0, np.where(draw < win + nu, 0.5, 0.0))
    return [f'm{x}' for x in one], [f'm{x}' for x in other], preference, who.tolist()


def test_planted_strengths_are_recovered_whatever_model_is_named_first():
    random = np.random.default_rng(0)
    first, second, preference, people = votes_of(random, [0.0, 0.5, -0.8, 1.1], 0.7, 500, 8)
    found = davidson(first, second, preference, people, resamples=200)
    assert found.models == ('m3', 'm1', 'm0', 'm2')
    for estimate, truth in zip(found.strengths, np.array([1.1, 0.5, 0.0, -0.8]) - 0.2, strict=True):
        assert estimate.mean == pytest.approx(truth, abs=0.12)
        assert estimate.low < truth < estimate.high
        assert estimate.num_clusters == 500
    assert found.ties == pytest.approx(0.7, abs=0.06)
    assert found.differences['m3', 'm2'].mean == pytest.approx(found.strengths[0].mean - found.strengths[3].mean)
    assert found.differences['m3', 'm2'].sign == 1
    assert sum(x.mean for x in found.strengths) == pytest.approx(0, abs=1e-9)
    half = found.differences['m3', 'm1'].mean / 2
    win, loss = math.exp(half), math.exp(-half)
    assert found.win_rates[0][1] == pytest.approx((win + found.ties / 2) / (win + loss + found.ties))
    assert found.win_rates[1][0] == pytest.approx(1 - found.win_rates[0][1])
    assert [found.win_rates[i][i] for i in range(4)] == pytest.approx([0.5] * 4)
    swapped = davidson(second, first, 1 - preference, people, resamples=200)
    assert swapped == found


def test_intervals_allow_for_people_who_agree_with_themselves():
    """Of 40 studies of 40 people with strong tastes of their own, most intervals over people hold the difference."""
    random, covered, alone = np.random.default_rng(1), 0, 0
    truth = 0.0
    for seed in range(40):
        votes = votes_of(random, [0.0, 0.0, 0.0], 0.5, 40, 12, spread=1.0)
        by_people = davidson(*votes, resamples=150, seed=seed)
        by_vote = davidson(*votes[:3], range(480), resamples=150, seed=seed)
        for pair in by_people.differences:
            covered += by_people.differences[pair].low <= truth <= by_people.differences[pair].high
            alone += by_vote.differences[pair].low <= truth <= by_vote.differences[pair].high
    assert covered / 120 >= 0.87
    assert alone / 120 < covered / 120 - 0.1


def slow_fit(first, second, preference):
    """Maximum likelihood with a general optimizer, vote by vote; returns strengths by name, and nu."""
    names = sorted({*first, *second})

    def loss(theta):
        total = 0.0
        for a, b, x in zip(first, second, preference, strict=True):
            p, q = (math.exp(theta[names.index(name)]) for name in (a, b))
            tie = math.exp(theta[-1]) * math.sqrt(p * q)
            total -= math.log({1.0: p, 0.0: q, 0.5: tie}[x] / (p + q + tie))
        return total + theta[:-1].sum() ** 2

    found = scipy.optimize.minimize(loss, np.zeros(len(names) + 1), method='BFGS', options={'gtol': 1e-7})
    return dict(zip(names, found.x[:-1], strict=True)), math.exp(found.x[-1])


def test_agrees_with_a_slow_fit():
    votes = votes_of(np.random.default_rng(2), [0.0, 0.4, 1.0], 0.8, 30, 4)
    found = davidson(*votes, resamples=20)
    strengths, nu = slow_fit(*votes[:3])
    assert {name: x.mean for name, x in zip(found.models, found.strengths, strict=True)} == pytest.approx(
        strengths, abs=1e-4
    )
    assert found.ties == pytest.approx(nu, abs=1e-4)


@pytest.mark.parametrize('nu', [0.0, 0.7])
def test_agrees_with_evalica(nu):
    """Whose algorithm is Newman's (2023), of the same likelihood; its tie parameter is half of nu."""
    first, second, preference, people = votes_of(np.random.default_rng(0), [0.0, 0.5, -0.8, 1.1], nu, 100, 8)
    found = davidson(first, second, preference, people, resamples=20)
    winners = [{1.0: Winner.X, 0.0: Winner.Y, 0.5: Winner.Draw}[x] for x in preference]
    other = newman(first, second, winners, tolerance=1e-12, limit=100_000)
    expected = np.log(other.scores) - np.log(other.scores).mean()
    assert [x.mean for x in found.strengths] == pytest.approx(expected[list(found.models)].tolist(), abs=1e-9)
    assert found.ties == pytest.approx(2 * other.v, abs=1e-9)


def test_without_ties_it_is_the_bradley_terry_model_of_statsmodels():
    first, second, preference, people = votes_of(np.random.default_rng(3), [0.0, 0.5, -0.5, 0.2], 0.0, 100, 5)
    found = davidson(first, second, preference, people, resamples=20)
    assert found.ties == 0.0
    columns = np.zeros((len(first), 4))
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        columns[row, int(a[1])], columns[row, int(b[1])] = 1, -1
    fit = sm.Logit(preference, columns[:, 1:]).fit(disp=0)
    expected = np.array([0.0, *fit.params]) - np.mean([0.0, *fit.params])
    for name, estimate in zip(found.models, found.strengths, strict=True):
        assert estimate.mean == pytest.approx(expected[int(name[1])], abs=1e-8)


def no_finite_fit(first, second, preference):
    """A linear program: a direction in which no vote becomes less likely and some alternative does."""
    names = sorted({*first, *second})
    rows = []
    with_ties = 0.5 in preference
    for a, b, x in zip(first, second, preference, strict=True):
        features = {1.0: [0.5, -0.5, 0], 0.0: [-0.5, 0.5, 0], 0.5: [0, 0, 1]}
        for other in (1.0, 0.0) + ((0.5,) if with_ties else ()):
            row = np.zeros(len(names) + 1)
            for value, index in zip(
                np.subtract(features[x], features[other]), (names.index(a), names.index(b), -1), strict=True
            ):
                row[index] += value
            rows.append(row)
    rows = np.array(rows)
    if not with_ties:
        rows[:, -1] = 0
    best = scipy.optimize.linprog(-rows.sum(0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=(-1, 1))
    unseen = [pair for pair in itertools.combinations(names, 2) if not connected(*pair, first, second)]
    return -best.fun > 1e-9 or bool(unseen)


def connected(a, b, first, second):
    reached = {a}
    for _ in first:
        for x, y in zip(first, second, strict=True):
            if {x, y} & reached:
                reached |= {x, y}
    return b in reached


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from('abcd'), st.sampled_from('abcd'), st.sampled_from([0.0, 0.5, 1.0])).filter(
            lambda vote: vote[0] != vote[1]
        ),
        min_size=2,
        max_size=14,
    )
)
def test_votes_are_refused_if_and_only_if_they_have_no_finite_fit(rows):
    first, second, preference = zip(*rows, strict=True)
    if no_finite_fit(first, second, preference):
        with pytest.raises(ValueError, match='davidson: expected votes with a finite fit, found '):
            davidson(first, second, preference, range(len(rows)), resamples=1)
    else:
        found = davidson(first, second, preference, range(len(rows)), resamples=20)
        assert all(abs(x.mean) < 50 for x in found.strengths)


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([('a', 'b', 1), ('b', 'a', 1), ('c', 'd', 1), ('d', 'c', 1)], "never compared: [('a', 'b'), ('c', 'd')]"),
        ([('a', 'b', 1), ('b', 'c', 1), ('c', 'b', 1)], "found 'a', which never loses"),
        ([('a', 'b', 1), ('b', 'a', 1), ('b', 'c', 1)], "found 'c', which never wins"),
        ([('a', 'b', 0.5), ('a', 'b', 0.5)], 'found ties only'),
        (
            [('a', 'b', 1), ('b', 'a', 1), ('c', 'd', 1), ('d', 'c', 1), ('a', 'c', 1)],
            "never win or tie against the others: ['c', 'd']",
        ),
        ([('a', 'b', 1), ('a', 'b', 0.5), ('b', 'a', 0.5)], "found 'b', which never wins"),
        ([('a', 'a', 1)], "two different models in each vote, found 'a' against itself"),
        ([('a', 'b', 0.7)], 'preferences of 1, 1/2 or 0, found 0.7'),
        ([], 'at least one vote, found none'),
    ],
)
def test_bad_votes(rows, message):
    first, second, preference = zip(*rows, strict=True) if rows else ((), (), ())
    with pytest.raises(ValueError, match=re.escape(message)):
        davidson(first, second, preference, range(len(rows)))


def test_draws_without_a_fit_are_counted_and_leave_no_interval_if_many():
    few = davidson('aab', 'bba', [1.0, 0.0, 0.5], [0, 1, 2], resamples=200)
    assert few.draws_without_fit > 0.5
    assert few.strengths[0].low is None
    many = davidson('ab' * 40, 'ba' * 40, [1.0, 1.0] * 20 + [0.5] * 40, range(80), resamples=200)
    assert many.draws_without_fit == 0
    assert many.strengths[0].low < 0 < many.strengths[0].high
    assert davidson('ab', 'ba', [1.0, 1.0], ['one person'] * 2, resamples=20).strengths[0].low is None
    with pytest.raises(ValueError, match='expected two models of each vote, found 1 and 2 of 2'):
        davidson('a', 'bc', [1.0, 0.0], [0, 1])
