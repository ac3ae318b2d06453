"""Comparisons over training seeds: paired by seed and by person, of every pair of arms, and with every simulator."""

import numpy as np
import pytest

from simrl.evaluation.comparisons import transfers
from simrl.evaluation.results import Arm
from tests.evaluation.made_up import compared_arms, outcomes, runs_of, vote


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


def scores_of(met):
    """Scores of one example each."""
    return {who: {user: np.array([mean]) for user, mean in users.items()} for who, users in met.items()}


def test_transfer_is_the_gain_with_the_same_simulator_of_the_same_seed():
    """A simulator that is trained anew for each seed is another user in each: the initial assistant met both."""
    base = [0.2, 0.3]
    found = outcomes(initial=base, small_0=base, small_1=base, tuned_0=base, best_1=base)
    arms = {'small': Arm('prompted'), 'large': Arm('prompted'), 'tuned': Arm('tuned'), 'best': Arm('people', True)}
    simulators = {'small': 'small', 'large': 'large', 'tuned/seed-0': 'tuned', 'tuned/seed-1': 'tuned'}
    met = {
        'initial': {'small': 0.5, 'large': 0.6, 'tuned/seed-0': 0.1, 'tuned/seed-1': 0.3},
        'small/seed-0': {'small': 0.9, 'large': 0.9, 'tuned/seed-0': 0.1},
        'small/seed-1': {'small': 0.8, 'large': 0.7, 'tuned/seed-1': 0.5},
        'tuned/seed-0': {'small': 0.5, 'large': 0.8, 'tuned/seed-0': 0.7},
        'best/seed-1': {'small': 0.4, 'large': 0.9, 'tuned/seed-1': 0.5},
    }
    found = transfers(runs_of(found), arms, simulators, scores_of(met))
    small = found['small']
    assert small.seeds == (0, 1)
    assert {user: gain.values for user, gain in small.simulators.items()} == {
        'small': pytest.approx((0.4, 0.3)),
        'large': pytest.approx((0.3, 0.1)),
        'tuned': pytest.approx((0.0, 0.2)),
    }
    assert small.other_kinds.values == pytest.approx((0.0, 0.2)), 'another simulator of its own kind is no other kind'
    assert small.other_kinds.low < 0.1 < small.other_kinds.high
    assert found['tuned'].other_kinds.values == pytest.approx(((0.0 + 0.2) / 2,))
    assert found['best'].other_kinds.values == pytest.approx(((-0.1 + 0.3 + 0.2) / 3,)), 'all are others'
    alone = transfers(
        {'one': {0: 'one/seed-0'}},
        {'one': Arm('x')},
        {'one': 'one'},
        scores_of({'initial': {'one': 0.1}, 'one/seed-0': {'one': 0.2}}),
    )
    assert alone['one'].other_kinds is None
