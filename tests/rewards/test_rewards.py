"""Failures have no reward, whatever was made of them."""

import jax.numpy as jnp
import numpy as np

from simrl.rewards.rewards import CAUSES, FAILED, Rewards, mask_failures
from simrl.rollouts.state import EndReason


def test_a_failure_masks_every_reward_of_its_conversation() -> None:
    ends = jnp.array([EndReason.SIGNAL, EndReason.FAILURE, EndReason.TURNS], jnp.int8)
    for shape in ((3,), (3, 2)):
        valid = jnp.ones(shape, bool).at[2].set(False)
        rewards = Rewards(jnp.full(shape, 0.5), valid, {}, jnp.array([0, 0, 1]))
        masked = mask_failures(rewards, ends)
        assert masked.valid.reshape(3, -1).all(axis=1).tolist() == [True, False, False]
        np.testing.assert_array_equal(masked.value, np.where(masked.valid, 0.5, 0.0))
        assert [CAUSES[cause] for cause in masked.cause.tolist()][:2] == ['', FAILED]
