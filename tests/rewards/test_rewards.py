"""Failures have no reward, whatever was made of them."""

import jax.numpy as jnp
import numpy as np

from simrl.rewards.rewards import CAUSES, FAILED, NOT_FINITE, Rewards, mask_invalid
from simrl.rollouts.state import EndReason


def test_a_failure_masks_every_reward_of_its_conversation() -> None:
    ends = jnp.array([EndReason.SIGNAL, EndReason.FAILURE, EndReason.TURNS], jnp.int8)
    for shape in ((3,), (3, 2)):
        valid = jnp.ones(shape, bool).at[2].set(False)
        rewards = Rewards(jnp.full(shape, 0.5), valid, {}, jnp.array([0, 0, 1]))
        masked = mask_invalid(rewards, ends)
        assert masked.valid.reshape(3, -1).all(axis=1).tolist() == [True, False, False]
        np.testing.assert_array_equal(masked.value, np.where(masked.valid, 0.5, 0.0))
        assert [CAUSES[cause] for cause in masked.cause.tolist()][:2] == ['', FAILED]


def test_a_reward_that_is_not_finite_is_none() -> None:
    ends = jnp.array([EndReason.SIGNAL, EndReason.FAILURE, EndReason.TURNS, EndReason.TURNS], jnp.int8)
    value = jnp.array([jnp.nan, jnp.nan, -jnp.inf, 0.5])
    masked = mask_invalid(Rewards(value, jnp.ones(4, bool), {}, jnp.zeros(4, jnp.int32)), ends)
    assert masked.valid.tolist() == [False, False, False, True]
    assert masked.value.tolist() == [0.0, 0.0, 0.0, 0.5]
    assert [CAUSES[cause] for cause in masked.cause.tolist()] == [NOT_FINITE, FAILED, NOT_FINITE, '']
    by_turn = jnp.stack([value, jnp.zeros(4)], axis=1)
    masked = mask_invalid(Rewards(by_turn, jnp.ones((4, 2), bool), {}, jnp.zeros(4, jnp.int32)), ends)
    assert masked.valid.tolist() == [[False, False], [False, False], [False, False], [True, True]]
    assert [CAUSES[cause] for cause in masked.cause.tolist()] == [NOT_FINITE, FAILED, NOT_FINITE, '']
