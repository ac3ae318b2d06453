"""The reward of a conversation, and the one place where conversations without one are masked."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from simrl.rollouts.state import EndReason

NO_REPLY = 'the conversation holds no assistant message'
FAILED = 'a failure ended the conversation'
NOT_FINITE = 'the reward is not finite'
INCOMPLETE = 'an assistant turn has no reward'
CAUSES = ('', NO_REPLY, FAILED, NOT_FINITE, INCOMPLETE)  # indexed by `Rewards.cause`


@flax.struct.dataclass
class Rewards:
    """The reward of each of B conversations, and the cause where there is none.

    Attributes:
        value: float32 `[B]`, or `[B, turns]` for one reward per assistant turn; 0 where not valid.
        valid: bool, the shape of `value`. A conversation that could not be judged is masked, never scored 0.
        parts: the parts of `value` by name, each float32 of the shape of `value`; for logging.
        cause: int32 `[B]`, an index into `CAUSES`.
    """

    value: jax.Array
    valid: jax.Array
    parts: dict[str, jax.Array]
    cause: jax.Array


def mask_invalid(rewards: Rewards, end_reason: jax.Array) -> Rewards:
    """Masks conversations that a failure ended, whatever a score function made of them, and those with NaN or infinity.

    Args:
        end_reason: int `[B]`, an `EndReason`.
    """
    failed = end_reason == EndReason.FAILURE
    broken = jnp.any((rewards.valid & ~jnp.isfinite(rewards.value)).reshape(len(failed), -1), axis=1)
    valid = rewards.valid & ~(failed | broken).reshape(-1, *[1] * (rewards.valid.ndim - 1))
    cause = jnp.where(broken, CAUSES.index(NOT_FINITE), rewards.cause)
    return dataclasses.replace(
        rewards,
        valid=valid,
        value=jnp.where(valid, rewards.value, 0.0),
        cause=jnp.where(failed, CAUSES.index(FAILED), cause),
    )
