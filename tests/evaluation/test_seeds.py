"""Claims over training seeds cover as they say, count sign patterns as a slow loop does, and are not made up."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.evaluation.seeds import paired_difference, sign_flip_test, t_interval

FLOATS = st.floats(-10, 10).map(lambda x: round(x, 3))


@pytest.mark.parametrize('num_seeds', [2, 3, 8])
def test_the_t_interval_covers_at_the_nominal_rate_from_two_seeds_on(num_seeds):
    """2,000 experiments; the binomial spread of the coverage is half a point."""
    random = np.random.default_rng(num_seeds)
    covered = 0
    for values in random.normal(0.4, 0.07, (2000, num_seeds)):
        estimate = t_interval(values)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_the_t_interval_of_a_textbook():
    """Student's sleep data (1908): additional hours of sleep by two drugs in ten patients, mean 1.58, t = 4.06."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    estimate = paired_difference(second, first)
    assert estimate.mean == pytest.approx(1.58)
    assert (estimate.low, estimate.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert estimate.num_seeds == 10
    assert estimate.p_value == pytest.approx(4 / 1024)  # no patient lost sleep, one had no difference


def test_one_seed_has_a_mean_and_no_interval():
    estimate = t_interval([0.7], null=0.5)
    assert (estimate.mean, estimate.low, estimate.high, estimate.p_value) == (0.7, None, None, None)
    assert str(estimate) == '0.700 no interval (seeds=1)'


def test_seeds_that_do_not_differ_have_no_interval():
    """Two runs with one score say nothing of a third, and rounding is no difference."""
    for values in ([0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0]):
        estimate = t_interval(values, null=0.0)
        assert (estimate.low, estimate.high, estimate.sign) == (None, None, None)
        assert estimate.mean == pytest.approx(values[0])
        assert estimate.p_value == (0.25 if values[0] else 1.0), 'three seeds of one sign'
    assert paired_difference([0.5, 0.7, 0.9], [0.3, 0.5, 0.7]).sign is None
    assert t_interval([0.3, 0.3 + 1e-6]).sign == 1


def test_without_a_null_there_is_no_p_value():
    assert t_interval([0.1, 0.2]).p_value is None
    assert t_interval([0.6, 0.7], null=0.5).p_value == 0.5
    assert t_interval([0.4, 0.7], null=0.5).p_value == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8))
def test_sign_flips_are_counted_as_a_slow_loop_counts_them(differences):
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(total >= abs(sum(differences)) - 1e-6 for total in sums) / len(sums)
    assert sign_flip_test(differences) == pytest.approx(expected)
    assert sign_flip_test([-x for x in differences[::-1]]) == pytest.approx(expected)


def test_a_claim_by_five_seeds_of_one_sign_is_as_strong_as_five_seeds_can_be():
    assert sign_flip_test([0.1, 0.2, 0.3, 0.1, 0.4]) == 2 / 2**5
    assert sign_flip_test([1.0]) == 1.0


def test_under_no_effect_p_values_are_as_rare_as_they_say():
    random = np.random.default_rng(0)
    p_values = np.array([sign_flip_test(values) for values in random.normal(size=(1000, 8))])
    assert 0.03 <= (p_values <= 0.05).mean() <= 0.065
    assert 0.45 <= (p_values <= 0.5).mean() <= 0.55


def test_sampled_sign_patterns_agree_with_counted_ones():
    differences = np.random.default_rng(3).normal(0.4, 1, 16)
    exact = sign_flip_test(differences)
    # A zero changes no sum, so the share is the same, and 17 differences are sampled.
    sampled = sign_flip_test([*differences, 0.0])
    assert sampled == pytest.approx(exact, abs=0.005)
    assert 0 < sign_flip_test([1.0] * 30, resamples=99) == 0.01


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: t_interval([]), 't_interval: expected at least one observation, found none'),
        (lambda: t_interval([1.0, float('inf')]), 't_interval: expected finite values, found inf'),
        (lambda: t_interval([1.0, 2.0], level=95), r't_interval: expected a level in \(0, 1\), found 95'),
        (lambda: paired_difference([1.0, 2.0], [1.0]), 'expected the same seeds of both, found 2 and 1'),
        (lambda: sign_flip_test([float('nan')]), 'sign_flip_test: expected finite values, found nan'),
        (lambda: sign_flip_test([]), 'sign_flip_test: expected at least one observation'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
