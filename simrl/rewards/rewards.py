"""The reward of a conversation, and the one place where conversations without one are masked."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from simrl.conversations.records import Example
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories
from simrl.run.compiles import Program

NO_REPLY = 'the conversation holds no assistant message'
FAILED = 'a failure ended the conversation'
NOT_FINITE = 'the reward is not finite'
INCOMPLETE = 'an assistant turn has no reward'
TOO_LONG = 'the conversation is too long for the judge'
JUDGE_FAILED = 'a judge failed'
TRUNCATED = 'a budget cut a message of the assistant'
# Indexed by `Rewards.cause`.
CAUSES = ('', NO_REPLY, FAILED, NOT_FINITE, INCOMPLETE, TOO_LONG, JUDGE_FAILED, TRUNCATED)


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


@dataclasses.dataclass(frozen=True)
class Judging:
    """Judges off the step's programs, which score a piece of a batch while the next one is sampled.

    Attributes:
        start: (conversations, the example of each) -> a function that waits for their rewards, on the host, and for
            the reasons of those without one by row, in the judge's words.
    """

    start: Callable[[Trajectories, Sequence[Example]], Callable[[], tuple[Rewards, Mapping[int, str]]]]


@dataclasses.dataclass(frozen=True)
class ModelScore:
    """A score by a model on the devices.

    Attributes:
        score: conversations -> their rewards.
        programs: those of `score` that differ in their sizes. Takes what makes abstract conversations, and the shape
            `[B, M, L]` of their messages.
    """

    score: Callable[[Trajectories], Rewards]
    programs: Callable[[Callable[[], Trajectories], tuple[int, int, int]], Iterator[Program]]

    def __call__(self, batch: Trajectories) -> Rewards:
        return self.score(batch)


Score = Callable[[Trajectories], Rewards] | Judging


def unscored(batch: Trajectories) -> Rewards:
    """A score of nothing: only conversations that fail have none."""
    nothing = jnp.zeros(batch.end_reason.shape[0])
    return Rewards(nothing, nothing == 0, {}, nothing.astype(jnp.int32))


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
