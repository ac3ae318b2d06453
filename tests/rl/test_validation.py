"""The rule that chooses a checkpoint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from simrl.rl.validation import ValidationSettings, beats, plateau_onset, unbeaten

REWARDS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.sampled_from([0.0, 0.25, 1.0, np.nan])
)


def test_the_first_step_of_the_plateau_is_chosen():
    random = np.random.default_rng(0)
    people = random.normal(0, 1, 400)
    level = {0: 0.0, 10: 0.5, 20: 0.9, 30: 1.0, 40: 1.0, 50: 1.0}
    rewards = {step: people + mean + random.normal(0, 0.1, 400) for step, mean in level.items()}
    assert plateau_onset(rewards, margin=2.0) == 30
    assert plateau_onset(dict(reversed(rewards.items())), margin=2.0) == 30


def test_differences_are_paired():
    """What makes people differ hides a small gain that each of them has, unless steps are compared on the same ones."""
    people = np.random.default_rng(0).normal(0, 10, 50)
    assert beats(people + np.linspace(0.01, 0.03, 50), people, margin=2.0)
    assert not beats(np.roll(people, 1) + 0.02, people, margin=2.0)


def test_a_collapse_is_not_chosen_and_noise_is_no_gain():
    random = np.random.default_rng(1)
    rewards = {step: random.normal(mean, 0.1, 200) for step, mean in ((10, 0.0), (20, 1.0), (30, -5.0))}
    assert plateau_onset(rewards, margin=1.0) == 20
    assert plateau_onset({10: np.zeros(5), 20: np.zeros(5)}, margin=0.0) == 10


def test_conversations_without_a_reward_are_left_out_of_pairs():
    earlier, later = np.array([0.0, 0.0, np.nan, 9.0]), np.array([1.0, 1.1, 1.0, np.nan])
    assert beats(later, earlier, margin=1.0)
    assert not beats(np.array([1.0, np.nan]), np.array([0.0, 0.0]), margin=1.0)  # one pair has no spread


@given(REWARDS, st.sampled_from([0.0, 1.0, 2.0]))
def test_what_is_beaten_stays_beaten_so_that_its_checkpoint_may_go(rewards, margin):
    by_step = dict(enumerate(rewards, start=1))
    kept: dict[int, np.ndarray] = {}
    for step, values in by_step.items():  # as in training, where only those that are unbeaten so far are kept
        kept[step] = values
        seen = {s: by_step[s] for s in range(1, step + 1)}
        assert set(unbeaten(seen, margin)) <= set(kept)
        kept = {s: by_step[s] for s in unbeaten(seen, margin)}
    assert plateau_onset(by_step, margin) == min(kept)
    assert len(rewards) in kept  # nothing comes after the last one


def test_without_a_step_there_is_no_choice():
    with pytest.raises(ValueError, match='expected at least one validated step'):
        plateau_onset({}, 1.0)


@pytest.mark.parametrize('change', [{'every': 0}, {'examples': 1}, {'margin': -1.0}, {'margin': np.nan}], ids=str)
def test_impossible_settings_name_the_field(change):
    (field,) = change
    with pytest.raises(ValueError, match=rf'ValidationSettings\.{field}: expected'):
        ValidationSettings(**{'every': 1, 'examples': 2} | change)
