"""The negative control of one simulator twice: it rejects at its level where seeds are noise, and always where not."""

import numpy as np
import pytest

from simrl.evaluation.controls import same_simulator_twice


def test_every_halving_is_met_once():
    # Of 4 seeds there are 3 halvings, of 6 there are 10; fewer than 4 have none, and a fifth seed is left out.
    for seeds, splits in ((3, 0), (4, 3), (5, 3), (6, 10), (8, 35)):
        assert same_simulator_twice({'arm': list(np.arange(seeds) * 0.1)}).splits == splits


def test_noise_is_told_apart_at_the_level_of_the_test():
    random = np.random.default_rng(0)
    runs = {f'arm-{i}': random.normal(size=8).tolist() for i in range(200)}
    found = same_simulator_twice(runs, level=0.05)
    assert found.splits == 200 * 35
    assert found.told_apart == pytest.approx(0.05, abs=0.012)


def test_halves_that_differ_are_told_apart():
    found = same_simulator_twice({'arm': [0.0, 0.01, 1.0, 1.01]})
    assert found.told_apart == pytest.approx(1 / 3)  # the one halving that separates them
    assert found.largest == pytest.approx(1.0)


def test_equal_seeds_are_a_tie():
    assert same_simulator_twice({'arm': [0.5] * 4}).told_apart == 0


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="finite values of 'arm'"):
        same_simulator_twice({'arm': [0.1, float('nan'), 0.2, 0.3]})
