"""What is claimed over training seeds: paired by seed and by person, of every pair, and by every user's reckoning."""

import numpy as np
import pytest

from simrl.evaluation.comparisons import pairs_of
from tests.evaluation.made_up import claims_of, outcomes, vote


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
    claims = claims_of(found, range(50), resamples=200)
    assert claims.seeds == (0, 1, 2, 7)
    assert list(claims.differences) == ['persona - role_play'], 'no seed in common, no difference'
    difference = claims.differences['persona - role_play']
    assert difference.seeds == (0, 1, 2)
    assert difference.satisfaction.values == pytest.approx((0.05, 0.06, 0.04))
    assert difference.satisfaction.mean == pytest.approx(0.05)
    assert difference.satisfaction.low > 0.02
    assert difference.satisfaction.p_value == 0.25, 'three seeds cannot say more'
    assert claims.arms['persona'].satisfaction.low < claims.arms['role_play'].satisfaction.high
    over_people = difference.satisfaction_over_people
    assert (over_people.low, over_people.high) == pytest.approx((0.05, 0.05)), 'people cancel within a pair'
    assert claims.arms['role_play'].seeds == (0, 1, 2), 'in their order, however they came'
    assert claims.arms['role_play'].gain.values == pytest.approx((0.1, 0.2, 0.3))
    alone = claims.arms['fine_tuned']
    assert (alone.gain.mean, alone.gain.low, alone.gain.p_value) == (pytest.approx(0.3), None, None)
    over_people = alone.gain_over_people
    assert (over_people.low, over_people.high) == pytest.approx((0.3, 0.3))
    assert claims.arms['role_play'].gain_over_people.mean == pytest.approx(0.2)
    assert alone.win_rate.mean == pytest.approx(vote(0.3, 0.0))
    assert alone.recovered.mean is None
    assert alone.recovered.reason == 'no assistant was trained against people'
    assert claims.transfers == {}


def test_the_share_of_the_oracle_is_one_by_definition():
    claims = claims_of(outcomes(initial=[0.1, 0.2], oracle_0=[0.5, 0.7], persona_0=[0.3, 0.5]), 'ab', resamples=50)
    oracle = claims.arms['oracle'].recovered
    assert (oracle.mean, oracle.low, oracle.high, oracle.reason) == (1.0, None, None, None)
    assert claims.arms['persona'].recovered.mean == pytest.approx(0.25 / 0.45)


def test_transfer_is_the_gain_with_the_same_simulator_of_the_same_seed():
    """A simulator that is trained anew for each seed is another user in each: the initial assistant met both."""
    base = [0.2, 0.3]
    found = outcomes(initial=base, role_play_0=base, role_play_1=base, fine_tuned_0=base, oracle_1=base)
    met = {
        'initial': {'role_play': 0.5, 'role_play-large': 0.6, 'fine_tuned/seed-0': 0.1, 'fine_tuned/seed-1': 0.3},
        'role_play/seed-0': {'role_play': 0.9, 'role_play-large': 0.9, 'fine_tuned/seed-0': 0.1},
        'role_play/seed-1': {'role_play': 0.8, 'role_play-large': 0.7, 'fine_tuned/seed-1': 0.5},
        'fine_tuned/seed-0': {'role_play': 0.5, 'role_play-large': 0.8, 'fine_tuned/seed-0': 0.7},
        'oracle/seed-1': {'role_play': 0.4, 'role_play-large': 0.9, 'fine_tuned/seed-1': 0.5},
    }
    claims = claims_of(found, 'ab', met, resamples=50)
    role_play = claims.transfers['role_play']
    assert role_play.seeds == (0, 1)
    assert {user: gain.values for user, gain in role_play.users.items()} == {
        'role_play': pytest.approx((0.4, 0.3)),
        'role_play-large': pytest.approx((0.3, 0.1)),
        'fine_tuned': pytest.approx((0.0, 0.2)),
    }
    assert role_play.others.values == pytest.approx((0.0, 0.2)), 'another size of its own kind is no other kind'
    assert role_play.others.low < 0.1 < role_play.others.high
    assert claims.transfers['fine_tuned'].others.values == pytest.approx(((0.0 + 0.2) / 2,))
    assert claims.transfers['oracle'].others.values == pytest.approx(((-0.1 + 0.3 + 0.2) / 3,)), 'all are others'
    alone = claims_of(
        outcomes(initial=base, persona_0=base), 'ab', {'initial': {'persona': 0.1}, 'persona/seed-0': {'persona': 0.2}}
    )
    assert alone.transfers['persona'].others is None


def test_pairs_are_kinds_at_equal_size_sizes_of_a_kind_and_the_distance_to_the_oracle():
    arms = ('role_play', 'role_play-large', 'fine_tuned-small', 'oracle', 'fine_tuned-large', 'fine_tuned')
    assert pairs_of(arms) == (
        ('fine_tuned', 'role_play'),
        ('fine_tuned-large', 'role_play-large'),
        ('role_play-large', 'role_play'),
        ('fine_tuned-large', 'fine_tuned'),
        ('fine_tuned', 'fine_tuned-small'),
        ('fine_tuned-large', 'fine_tuned-small'),
        *(('oracle', arm) for arm in arms if arm != 'oracle'),
    )
    assert pairs_of(('persona',)) == pairs_of(()) == ()
