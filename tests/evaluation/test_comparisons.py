"""Comparisons over training seeds: paired by seed and by person, of every pair of arms."""

import numpy as np
import pytest

from simrl.evaluation.blocks import block_spread, pooled_interval
from simrl.evaluation.crossed import crossed_mean
from simrl.evaluation.multiplicity import holm
from simrl.evaluation.outcomes import compare
from simrl.evaluation.seeds import t_interval
from tests.evaluation.made_up import compared_arms, outcomes, vote


def test_differences_are_paired_by_seed_and_by_person():
    """Arms whose seeds swing together: the difference is sure where each alone is not."""
    base = np.linspace(0.1, 0.6, 50)
    found = outcomes(
        initial=base,
        role_play_2=base + 0.3,
        role_play_0=base + 0.1,
        role_play_1=base + 0.2,
        persona_0=base + 0.15,
        persona_1=base + 0.26,
        persona_2=base + 0.34,
        fine_tuned_7=base + 0.3,
    )
    arms, differences = compared_arms(found, resamples=200)
    (difference,) = differences
    assert (difference.first, difference.second) == ('persona', 'role_play'), 'no seed in common, no difference'
    assert difference.seeds == (0, 1, 2)
    assert difference.score.values == pytest.approx((0.05, 0.06, 0.04))
    assert difference.score.mean == pytest.approx(0.05)
    assert difference.score.low > 0.02
    assert difference.score.p_value == 0.25, 'three seeds cannot give less'
    assert arms['persona'].score.low < arms['role_play'].score.high
    checkpoint = difference.checkpoint_score
    assert checkpoint.mean == pytest.approx(0.05)
    assert checkpoint.sign is None, 'people cancel within a pair: all are alike'
    assert arms['role_play'].seeds == (0, 1, 2), 'in their order, however they came'
    assert arms['role_play'].gain.values == pytest.approx((0.1, 0.2, 0.3))
    assert arms['role_play'].parts['share_met'].values == arms['role_play'].score.values
    alone = arms['fine_tuned']
    assert (alone.gain.mean, alone.gain.low, alone.gain.p_value) == (pytest.approx(0.3), None, None)
    assert alone.checkpoint_gain.mean == pytest.approx(0.3)
    assert arms['role_play'].checkpoint_gain.mean == pytest.approx(0.2)
    assert alone.win_rate.mean == pytest.approx(vote(0.3, 0.0))
    assert alone.gap_recovered is None, 'there is no oracle'


def test_the_gap_that_the_oracle_recovers_is_one_by_definition():
    found = outcomes(initial=[0.1, 0.2] * 3, best_0=[0.5, 0.7] * 3, persona_0=[0.3, 0.5] * 3)
    arms, _ = compared_arms(found, oracle='best', resamples=50)
    oracle = arms['best'].gap_recovered
    assert (oracle.mean, oracle.low, oracle.high, oracle.reason) == (1.0, None, None, None)
    assert arms['persona'].gap_recovered.mean == pytest.approx(0.25 / 0.45)


def test_all_pairs_are_compared_whatever_the_names_the_later_arm_first():
    base = [0.2, 0.3]
    _, differences = compared_arms(outcomes(initial=base, b_0=base, zz_0=base, a_0=base), resamples=20)
    assert [(x.first, x.second) for x in differences] == [('zz', 'b'), ('a', 'b'), ('a', 'zz')]
    assert compared_arms(outcomes(initial=base), resamples=20) == ({}, ())


def three_arms(seeds=3, people=40):
    random = np.random.default_rng(5)
    base = random.normal(0.5, 0.2, people)
    return outcomes(
        initial=base,
        **{
            f'{arm}_{seed}': base + gain + random.normal(0, 0.05) + random.normal(0, 0.1, people)
            for arm, gain in (('a', 0.0), ('b', 0.1), ('c', 0.3))
            for seed in range(seeds)
        },
    )


def test_other_intervals_are_those_of_their_functions():
    """The pooled one has the spread of all arms; the crossed one is over seeds and people; the t-interval stays."""
    found = three_arms()
    arms, differences = compared_arms(found, resamples=20)
    gains = np.array([[found[f'{arm}/seed-{k}'].score - found['initial'].score for k in range(3)] for arm in 'abc'])
    rates = np.array([[compare(found, vote)[f'{arm}/seed-{k}'].preferred for k in range(3)] for arm in 'abc'])
    people = found['initial'].clusters
    for row, arm in enumerate('abc'):
        for own, others, values, null in (
            (arms[arm].gain, arms[arm].gain_intervals, gains, 0.0),
            (arms[arm].win_rate, arms[arm].win_rate_intervals, rates, 0.5),
        ):
            spread = block_spread(values.mean(2))
            assert own == t_interval(values[row].mean(1), null=null)
            assert others.pooled == pooled_interval(values[row].mean(1), spread.run)
            assert others.pooled.alone == (own.low, own.high)
            assert others.crossed == crossed_mean(values[row], people)
    for pair in differences:
        first, second = 'abc'.index(pair.first), 'abc'.index(pair.second)
        for own, others, values in (
            (pair.score, pair.score_intervals, gains),
            (pair.win_rate, pair.win_rate_intervals, rates),
        ):
            pooled = pooled_interval(own.values, block_spread(values.mean(2)).difference)
            assert (others.pooled.low, others.pooled.high) == pytest.approx((pooled.low, pooled.high))
            crossed = crossed_mean(values[first] - values[second], people)
            assert (others.crossed.low, others.crossed.high) == pytest.approx((crossed.low, crossed.high))


def test_the_p_values_of_all_pairs_of_arms_are_one_family():
    _, differences = compared_arms(three_arms(seeds=6), resamples=20)
    p_values = {(x.first, x.second): x.score.p_value for x in differences}
    assert min(p_values.values()) == 2 / 2**6
    assert {(x.first, x.second): x.adjusted_p for x in differences} == holm(p_values)
    assert max(x.adjusted_p / x.score.p_value for x in differences) == 3
    _, alone = compared_arms(three_arms(seeds=1), resamples=20)
    assert [x.adjusted_p for x in alone] == [None] * 3, 'one seed has no p-value'


def test_runs_without_an_example_in_common_are_named():
    found = outcomes(initial=[0.1, 0.2], a_0=[0.3, None], b_0=[None, 0.1])
    with pytest.raises(ValueError, match=r'^b/seed-0 and a/seed-0: expected an example with an outcome of both, found'):
        compared_arms(found, resamples=20)


def test_arms_that_share_nothing_have_no_other_intervals():
    """No two arms with two seeds in common: no pooled spread. No example that all seeds have: no crossed interval."""
    found = outcomes(
        initial=[0.1, 0.2, 0.3], a_0=[0.3, None, 0.1], a_1=[None, 0.4, None], b_2=[0.5, 0.6, 0.7], b_3=[0.2, 0.2, 0.5]
    )
    arms, differences = compared_arms(found, resamples=20)
    assert differences == ()
    assert (arms['a'].gain_intervals.pooled, arms['a'].gain_intervals.crossed) == (None, None)
    assert arms['b'].gain_intervals.pooled is None
    assert arms['b'].gain_intervals.crossed.num_observations == 3
    assert arms['a'].compared == (2, 1)
