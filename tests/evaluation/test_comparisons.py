"""Comparisons over training seeds: paired by seed and by person, of every pair of arms."""

import numpy as np
import pytest

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
    found = outcomes(initial=[0.1, 0.2], best_0=[0.5, 0.7], persona_0=[0.3, 0.5])
    arms, _ = compared_arms(found, oracle='best', resamples=50)
    oracle = arms['best'].gap_recovered
    assert (oracle.mean, oracle.low, oracle.high, oracle.reason) == (1.0, None, None, None)
    assert arms['persona'].gap_recovered.mean == pytest.approx(0.25 / 0.45)


def test_all_pairs_are_compared_whatever_the_names_the_later_arm_first():
    base = [0.2, 0.3]
    _, differences = compared_arms(outcomes(initial=base, b_0=base, zz_0=base, a_0=base), resamples=20)
    assert [(x.first, x.second) for x in differences] == [('zz', 'b'), ('a', 'b'), ('a', 'zz')]
    assert compared_arms(outcomes(initial=base), resamples=20) == ({}, ())
