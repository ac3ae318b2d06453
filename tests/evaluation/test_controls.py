"""Negative controls reject at their level where there is nothing, see what there is, and are not passed for free."""

import numpy as np
import pytest

from simrl.evaluation.controls import opening, same_simulator_twice


def runs(random, seeds=8, people=60, spread=0.05):
    """[seeds, people] satisfactions: people differ, and so do checkpoints."""
    return (
        random.normal(0.5, 0.2, people) + random.normal(0, spread, (seeds, 1)) + random.normal(0, 0.1, (seeds, people))
    )


def test_every_halving_is_met_once():
    # Of 4 seeds there are 3 halvings, of 6 there are 10; a fifth seed is left out.
    random = np.random.default_rng(0)
    for seeds, splits in ((4, 3), (5, 3), (6, 10), (8, 35)):
        assert same_simulator_twice(runs(random, seeds), resamples=20).splits == splits


def test_one_simulator_twice_ties_at_the_nominal_rate_over_seeds_and_not_over_people():
    """200 arms whose checkpoints scatter: who takes people for the unit tells an arm from itself most of the time."""
    random = np.random.default_rng(0)
    found = [same_simulator_twice(runs(random), resamples=100) for _ in range(200)]
    assert np.mean([x.over_seeds for x in found]) == pytest.approx(0.05, abs=0.012)
    assert np.mean([x.over_people for x in found]) > 0.5


def test_halves_that_differ_are_told_apart():
    # Of the three halvings one separates them by about the same in both pairs.
    found = same_simulator_twice(np.array([0.0, 0.01, 1.0, 1.02])[:, None] + np.zeros((4, 10)), resamples=20)
    assert found.over_seeds == pytest.approx(1 / 3)
    assert found.largest == pytest.approx(1.005)


def test_equal_seeds_are_a_tie():
    found = same_simulator_twice(np.full((4, 10), 0.5), resamples=20)
    assert (found.over_seeds, found.over_people, found.largest) == (0.0, 0.0, 0.0)


NOISE = np.array([0.0, 0.01, -0.01, 0.005])


@pytest.mark.parametrize(
    ('means', 'monotone', 'closed'),
    [
        ((0.0, 0.1, 0.3), True, True),
        ((0.2, 0.1, 0.3), False, False),  # open from the start, and it narrows
        ((0.0, 0.0, 0.0), False, True),  # nothing opens
        ((0.3, 0.1, 0.0), False, False),
        ((0.0, 0.4, 0.3), False, True),  # a step that is certainly narrower
    ],
)
def test_a_dial_opens_a_gap_or_does_not(means, monotone, closed):
    noise = np.stack([NOISE, NOISE[::-1], np.roll(NOISE, 1)])
    found = opening((0.0, 0.5, 1.0), np.array(means)[:, None] + noise)
    assert (found.monotone, found.closed) == (monotone, closed)
    assert len(found.steps) == 2
    if means[-1] == 0.3:
        assert found.steps[1].mean == pytest.approx(means[2] - means[1])


def test_seeds_that_do_not_differ_give_no_verdict():
    found = opening((0.0, 1.0), np.stack([np.zeros(4), NOISE]))
    assert (found.closed, found.at_most, found.monotone) == (None, None, False)
    found = opening((0.0, 1.0), np.stack([NOISE, NOISE + 0.4]))
    assert (found.closed, found.monotone) == (True, None), 'a slope that all seeds share'


def test_nothing_gained_has_a_bound():
    found = opening((0.0, 1.0), np.stack([NOISE, NOISE + 0.4]))
    assert 0.02 < found.at_most < 0.04
    assert found.slope.values == pytest.approx((0.4,) * 4)
    assert opening((0.0, 1.0), np.stack([NOISE, NOISE - 0.4])).at_most is None


def test_a_loss_at_the_first_dial_is_no_gain():
    found = opening((0.0, 1.0), np.stack([NOISE - 0.4, NOISE + 0.4]))
    assert (found.closed, found.at_most, found.first.mean) == (True, 0.0, pytest.approx(NOISE.mean() - 0.4))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: same_simulator_twice(np.zeros((3, 5))), 'expected at least 4 training seeds, found 3'),
        (lambda: same_simulator_twice(np.full((4, 5), np.nan)), 'expected finite values, found nan'),
        (lambda: same_simulator_twice(np.zeros((4, 0))), r'expected scores \[seeds, people\], found \[4, 0\]'),
        (lambda: opening((1.0, 0.0), np.zeros((2, 2))), r'ascending dials, found \[1.0, 0.0\]'),
        (lambda: opening((0.0,), np.zeros((1, 2))), r'at least two ascending dials, found \[0.0\]'),
        (lambda: opening((0.0, 1.0), np.zeros((2, 1))), r'at least 2 seeds, found \(2, 1\)'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
