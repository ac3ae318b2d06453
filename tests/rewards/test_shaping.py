"""Length penalty and cut replies: against a loop, for conversations and turns; off, nothing changes."""

import dataclasses
import itertools

import numpy as np
import pytest

from simrl.rewards.rewards import CAUSES, NO_REPLY, TRUNCATED, Rewards
from simrl.rewards.shaping import ShapingSettings, shaped
from simrl.rollouts.state import Transcript

ROWS, TURNS = 16, 3
COEF = 2.0


def batch(by_turn):
    random = np.random.default_rng(0)
    num_messages = random.integers(0, 2 * TURNS + 1, ROWS)
    there = np.arange(1, 2 * TURNS, 2) < num_messages[:, None]
    said = {
        'messages': np.zeros((ROWS, 2 * TURNS, 4), np.int32),
        'message_length': random.integers(0, 900, (ROWS, 2 * TURNS)).astype(np.int32),
        'truncated': random.random((ROWS, 2 * TURNS)) < 0.3,
        'num_messages': num_messages,
    }
    unread = {field.name for field in dataclasses.fields(Transcript)} - said.keys()
    transcript = Transcript(**said, **dict.fromkeys(unread, np.zeros(ROWS, np.int32)))
    valid = there if by_turn else there.any(axis=1)
    value = np.where(valid, random.random(valid.shape), 0).astype(np.float32)
    cause = np.where(there.any(axis=1), 0, CAUSES.index(NO_REPLY)).astype(np.int32)
    return Rewards(value, valid, {'part': value}, cause), transcript


@pytest.mark.parametrize(
    ('by_turn', 'truncated', 'coef'), list(itertools.product((False, True), ('keep', 'mask', 'zero'), (0.0, COEF)))[1:]
)
def test_shapes_as_a_loop_does(by_turn, truncated, coef):
    rewards, transcript = batch(by_turn)
    found = shaped(rewards, transcript, ShapingSettings('linear' if coef else 'none', coef, truncated))
    if (truncated, coef) == ('keep', 0.0):
        assert found is rewards
        return
    masked = 0
    for row, turn in np.ndindex(ROWS, TURNS if by_turn else 1):
        place = (row, turn) if by_turn else row
        own = range(2 * turn + 1, 2 * turn + 2) if by_turn else range(1, 2 * TURNS, 2)
        replies = [m for m in own if m < transcript.num_messages[row]]
        tokens = sum(int(transcript.message_length[row, m]) for m in replies)
        cut = any(transcript.truncated[row, m] for m in replies)
        expected = rewards.value[place] - coef * tokens / 1000 if rewards.valid[place] else 0.0
        valid = rewards.valid[place] and not (truncated == 'mask' and cut)
        if cut and truncated != 'keep':
            expected = 0.0
        masked += bool(rewards.valid[place]) and not valid
        assert bool(found.valid[place]) == valid
        np.testing.assert_allclose(found.value[place], expected, atol=1e-6)
        np.testing.assert_allclose(found.parts['length_penalty'][place], -coef * tokens / 1000, atol=1e-6)
        if not by_turn:
            assert CAUSES[int(found.cause[row])] == (
                TRUNCATED if rewards.valid[row] and not valid else CAUSES[rewards.cause[row]]
            )
    assert (masked > 0) == (truncated == 'mask')
    assert np.isfinite(found.value).all()
    np.testing.assert_array_equal(found.parts['unshaped'], rewards.value)


@pytest.mark.parametrize(('name', 'coef'), [('linear', 0.0), ('none', 0.5), ('linear', -1.0)])
def test_a_coefficient_belongs_to_a_penalty(name, coef):
    with pytest.raises(ValueError, match=r'ShapingSettings\.length_coef: expected above 0 if and only if'):
        ShapingSettings(name, coef)
