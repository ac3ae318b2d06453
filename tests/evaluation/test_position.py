"""Verdicts in both orders, planted position bias, and panels worth fewer votes than they have judges."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.evaluation.position import both_orders, flips, panel_agreement, position_bias, votes_of

GRADES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan])
VERDICTS = st.lists(st.tuples(GRADES, GRADES), min_size=1, max_size=20)


def winner(verdict):
    return 'a' if verdict > 0.5 else 'b' if verdict < 0.5 else None


@given(VERDICTS)
def test_a_flip_counts_half_and_nothing_is_dropped(rows):
    """Two winners are a flip, a tie beside a win too; a slight and a clear win of one assistant are none."""
    a_first, b_first = zip(*rows, strict=True)
    mean, strict = both_orders(a_first, b_first), both_orders(a_first, b_first, combine='strict')
    found = flips(a_first, b_first)
    for (x, y), m, s, flip in zip(rows, mean, strict, found, strict=True):
        if math.isnan(x) or math.isnan(y):
            assert math.isnan(m)
            assert math.isnan(s)
            assert not flip
        else:
            assert m == (x + y) / 2
            assert flip == (winner(x) != winner(y))
            assert s == (0.5 if flip else m)
    both = [(winner(x), winner(y)) for x, y in rows if not math.isnan(x + y)]
    if both:
        bias = position_bias(a_first, b_first, range(len(rows)))
        assert bias.consistent.mean == pytest.approx(sum(x == y for x, y in both) / len(both))
        assert 1 - bias.consistent.mean == pytest.approx(bias.to_first.mean + bias.to_second.mean)
        assert bias.failures == len(rows) - len(both)
    swapped = both_orders([1 - y for y in b_first], [1 - x for x in a_first], combine='strict')
    np.testing.assert_array_equal(swapped, 1 - strict)


def test_another_way_to_combine_is_refused():
    with pytest.raises(ValueError, match="expected to combine by 'mean' or 'strict', found 'first'"):
        both_orders([1.0], [0.0], combine='first')


def judged(random, pairs, bias):
    """Verdicts of a judge without ties who takes the first position with probability `bias`, else decides."""
    better = (random.random(pairs) < 0.6).astype(float)
    first, second = (random.random((2, pairs)) < bias) * 1.0
    return np.where(first, 1.0, better), np.where(second, 0.0, better), better


def test_a_planted_position_bias_is_recovered():
    """Of pairs whose first assistant is better it takes a biased look with that one second to flip, and so on."""
    random = np.random.default_rng(0)
    a_first, b_first, _ = judged(random, 20_000, 0.3)
    found = position_bias(a_first, b_first, range(20_000))
    assert found.to_first.mean == pytest.approx(0.3, abs=0.01)
    assert found.to_second.mean == 0
    assert found.consistent.mean == pytest.approx(0.7, abs=0.01)
    assert found.first_position.mean == pytest.approx(0.5 + 0.3 / 2, abs=0.005)
    assert found.first_position.low > 0.5
    assert both_orders(a_first, b_first).mean() == pytest.approx(0.7 * 0.6 + 0.3 / 2, abs=0.01)
    none = position_bias(a_first, a_first, range(20_000))
    assert (none.consistent.mean, none.first_position.mean) == (1.0, 0.5)


def test_by_hand():
    found = position_bias([1.0, 0.5, 0.0, 1.0, math.nan], [1.0, 0.0, 1.0, 0.0, 1.0], ['p', 'p', 'q', 'r', 's'])
    assert (found.consistent.mean, found.to_first.mean, found.to_second.mean) == (0.25, 0.5, 0.25)
    assert found.first_position.mean == (0.5 + 0.75 + 0.0 + 1.0) / 4
    assert (found.failures, found.consistent.num_observations, found.consistent.num_clusters) == (1, 4, 3)


def test_a_judge_who_only_grades_by_position_never_flips():
    """A clear win first and a slight one second is a bias, of the mean, and no flip: `strict` leaves it as it is."""
    a_first, b_first = [1.0, 0.25], [0.75, 0.0]
    found = position_bias(a_first, b_first, range(2))
    assert (found.consistent.mean, found.to_first.mean, found.to_second.mean) == (1.0, 0.0, 0.0)
    assert found.first_position.mean == 0.625
    assert both_orders(a_first, b_first, combine='strict').tolist() == [0.875, 0.125]


def test_intervals_need_two_clusters():
    found = position_bias([1.0, 0.0], [0.0, 0.0], ['one prompt'] * 2)
    assert (found.consistent.mean, found.consistent.low) == (0.5, None)


@pytest.mark.parametrize(
    ('a_first', 'b_first', 'clusters', 'message'),
    [
        ([1.0], [1.0, 0.0], [0], "expected the same pairs in all, found {'a_first': 1, 'b_first': 2, 'clusters': 1}"),
        ([1.0], [1.0], [0, 1], "found {'a_first': 1, 'b_first': 1, 'clusters': 2}"),
        ([2.0], [1.0], [0], 'expected preferences from 0 to 1, found 2'),
        ([math.nan], [1.0], [0], 'expected a pair with all verdicts, found none among 1'),
        ([], [], [], 'expected at least one vote, found none'),
    ],
)
def test_bad_verdicts(a_first, b_first, clusters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        position_bias(a_first, b_first, clusters)


def panel(random, pairs, judges, correlation):
    """Graded verdicts whose errors correlate: a common part and one of each judge's own."""
    labels = random.integers(0, 2, pairs).astype(float)
    common, own = random.normal(size=pairs), random.normal(size=(judges, pairs))
    error = 0.05 * (math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own)
    inside = 0.25 + 0.5 * labels + np.clip(error, -0.25, 0.25)
    return {f'judge {number}': row for number, row in enumerate(inside)}, 0.25 + 0.5 * labels


@pytest.mark.parametrize(('correlation', 'votes'), [(0.0, 9.0), (0.4375, 2.0)])
def test_nine_judges_are_worth_the_votes_of_their_errors(correlation, votes):
    random = np.random.default_rng(1)
    verdicts, labels = panel(random, 4_000, 9, correlation)
    found = panel_agreement(verdicts, labels, range(4_000), resamples=200)
    assert found.mean_correlation == pytest.approx(correlation, abs=0.02)
    assert found.effective_votes == pytest.approx(votes, rel=0.1)
    assert found.low < votes < found.high
    errors = np.stack(list(verdicts.values())) - labels
    np.testing.assert_allclose(np.array(found.correlations), np.corrcoef(errors))
    of_votes = votes_of({name: 0.5 + own for name, own in zip(verdicts, errors, strict=True)}, range(4_000))
    assert (of_votes.mean_correlation, of_votes.effective) == (
        pytest.approx(found.mean_correlation),
        pytest.approx(found.effective_votes),
    )
    independent = (errors / errors.std(1, keepdims=True)).mean(0).var()
    assert found.effective_votes == pytest.approx(1 / independent), 'the variance of a mean of that many'


def test_draws_without_a_number_of_votes_are_counted_and_leave_no_interval_if_many():
    """Judges who err once each in ten pairs: a third of the draws miss the one pair, or the other, or both."""
    verdicts = {'x': [0.0] + [1.0] * 9, 'y': [1.0, 0.0] + [1.0] * 8}
    found = panel_agreement(verdicts, [1.0] * 10, range(10))
    missed = 2 * 0.9**10 - 0.8**10
    assert found.undefined_draws == pytest.approx(missed, abs=0.03)
    assert (found.low, found.high) == (None, None)
    many = panel_agreement({name: row * 9 for name, row in verdicts.items()}, [1.0] * 90, range(90))
    assert many.undefined_draws < 0.005
    assert many.low < many.effective_votes < many.high
    opposed = panel_agreement({'x': [0.75, 0.25] * 20, 'y': [0.25, 0.75] * 20}, [0.5] * 40, range(40))
    assert opposed.mean_correlation == pytest.approx(-1)
    assert (opposed.effective_votes, opposed.undefined_draws, opposed.low) == (None,) * 3, 'errors cancel'


def test_a_panel_beside_its_judges():
    verdicts = {'x': [1, 1, 0, math.nan], 'y': [1, 0, 1, 1], 'z': [1, 1, 1, 1]}
    found = panel_agreement(verdicts, [1, 1, 1, 1], range(4), resamples=50)
    assert {name: estimate.mean for name, estimate in found.agreement.items()} == {
        'x': pytest.approx(2 / 3),
        'y': pytest.approx(2 / 3),
        'z': 1.0,
    }
    assert (found.panel.mean, found.failures) == (1.0, 1)
    assert found.correlations[0][1] == pytest.approx(-0.5)
    assert found.correlations[2] == (None, None, None), 'a judge without an error has no correlation'
    assert (found.mean_correlation, found.effective_votes, found.low, found.undefined_draws) == (None,) * 4
    with pytest.raises(ValueError, match=r"expected at least two judges, found \['x'\]"):
        panel_agreement({'x': [1]}, [1], [0])
    with pytest.raises(ValueError, match=re.escape("found {'x': 1, 'y': 1, 'labels': 2, 'clusters': 2}")):
        panel_agreement({'x': [1], 'y': [1]}, [1, 1], [0, 1])
