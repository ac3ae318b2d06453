"""The rule that chooses a checkpoint, and the rewards that it chooses by."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from simrl.conversations.records import Example
from simrl.models import sharding
from simrl.rewards.rewards import CAUSES, JUDGE_FAILED, Judging, Rewards
from simrl.rl import judged
from simrl.rl.validation import Validation, ValidationSettings, beats, plateau_onset, unbeaten, validation_rewards
from simrl.rollouts.collect import ConversationError
from simrl.rollouts.state import EndReason

REWARDS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(2, 6)), elements=st.sampled_from([0.0, 0.25, 1.0, np.nan])
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


def test_conversations_without_a_reward_are_left_out_of_pairs(capsys):
    earlier, later = np.array([0.0, 0.0, np.nan, 9.0]), np.array([1.0, 1.1, 1.0, np.nan])
    assert beats(later, earlier, margin=1.0)
    assert not beats(np.array([1.0, np.nan]), np.array([0.0, 0.0]), margin=1.0)  # one pair has no spread
    assert capsys.readouterr().out.startswith('validation: 1 of 2 examples have a reward after both of two steps')


@given(REWARDS, st.sampled_from([0.0, 1.0, 2.0]))
def test_what_is_beaten_stays_beaten_so_that_its_checkpoint_may_go(rewards, margin):
    rewards[:, :2] = np.nan_to_num(rewards[:, :2])  # two examples that all steps have
    by_step = dict(enumerate(rewards, start=1))
    kept: dict[int, np.ndarray] = {}
    for step, values in by_step.items():  # as in training, where only those that are unbeaten so far are kept
        kept[step] = values
        seen = {s: by_step[s] for s in range(1, step + 1)}
        assert set(unbeaten(seen, margin)) <= set(kept)
        kept = {s: by_step[s] for s in unbeaten(seen, margin)}
    assert plateau_onset(by_step, margin) == min(kept)
    assert len(rewards) in kept  # nothing comes after the last one


def validated(monkeypatch, failing, examples=5, batch_size=4, max_unjudged=0.5):
    """Rewards of a validation whose judge fails these examples, and whose user fails the last one.

    A reward is the number of its example.
    """
    of = [Example(f'e{i}', 'hi', None, i, 'test', 'dev') for i in range(examples)]
    asked = []

    def collect(user, assistant, chosen, *, padding, on_piece, **_):
        failures = {row: 'no line' for row, example in enumerate(chosen) if example is of[-1]}
        ends = [EndReason.FAILURE if row in failures else EndReason.TURNS for row in range(len(chosen) + padding)]
        batch = SimpleNamespace(end_reason=np.array(ends))
        on_piece(batch, [*chosen, *chosen[-1:] * padding])
        return batch, failures

    def start(piece, chosen):
        asked.extend(chosen)
        numbers = np.array([int(example.id[1:]) for example in chosen])
        valid = ~np.isin(numbers, failing)
        reasons = dict.fromkeys(np.flatnonzero(~valid).tolist(), 'a judge failed: judge a: timeout')
        rewards = Rewards(
            numbers.astype(np.float32), valid, {}, np.where(valid, 0, CAUSES.index(JUDGE_FAILED)).astype(np.int32)
        )
        return lambda: (rewards, reasons)

    monkeypatch.setattr(judged, 'collect', collect)
    return validation_rewards(
        *(None, None),
        Validation(ValidationSettings(1, examples), of, Judging(start), lambda *_: None),
        name='validation after step 20',
        max_unjudged=max_unjudged,
        chat=None,
        limits=None,
        seed=0,
        view=0,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
        batch_size=batch_size,
        rows_in_flight=None,
        batching='static',
    )


def test_a_validation_is_over_what_has_a_reward_and_says_what_has_none(monkeypatch, capsys):
    """Padding counts for nothing: of five examples in batches of four there are three copies of the last."""
    found = validated(monkeypatch, failing=[1])
    np.testing.assert_array_equal(found, [0, np.nan, 2, 3, np.nan])
    assert capsys.readouterr().out.splitlines() == [
        'validation after step 20: 1 conversations have no reward: a judge failed: judge a: timeout',
        'validation after step 20: 1 conversations have no reward: no line',
    ]


@pytest.mark.parametrize(
    ('failing', 'share', 'found'),
    [([0, 1, 2, 3], 0.5, '4 of 5'), ([0, 2], 0.6, '3 of 5'), ([0, 1, 2, 3], 1.0, '5 of 5'), ([0, 1], 0.4, '2 of 5')],
)
def test_a_validation_without_rewards_chooses_no_checkpoint(monkeypatch, failing, share, found):
    """A judge that is down at one step would make it the plateau: every later comparison would be False."""
    with pytest.raises(
        ConversationError, match=rf'^validation after step 20: {found} conversations have no reward .*judge a: timeout'
    ):
        validated(monkeypatch, failing, max_unjudged=share)


def test_without_a_step_there_is_no_choice():
    with pytest.raises(ValueError, match='expected at least one validated step'):
        plateau_onset({}, 1.0)


@pytest.mark.parametrize('change', [{'every': 0}, {'examples': 1}, {'margin': -1.0}, {'margin': np.nan}], ids=str)
def test_impossible_settings_name_the_field(change):
    (field,) = change
    with pytest.raises(ValueError, match=rf'ValidationSettings\.{field}: expected'):
        ValidationSettings(**{'every': 1, 'examples': 2} | change)
