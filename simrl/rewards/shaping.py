"""Changes to rewards by length and by cut messages, each by name and off by default; what they change is a part."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from simrl.rewards.rewards import CAUSES, TRUNCATED, Rewards
from simrl.rollouts.state import Transcript


@dataclasses.dataclass(frozen=True)
class ShapingSettings:
    """Changes to rewards. Rewards of turns are changed by their own reply, those of conversations by all replies."""

    # linear: length_coef x (tokens of the assistant's replies) / 1,000 is subtracted.
    length_penalty: Literal['none', 'linear'] = 'none'
    length_coef: float = 0.0  # units of reward per 1,000 tokens of the assistant
    # Rewards with a reply that its budget cut are kept; masked, so that nothing is learned from them; or set to 0.
    truncated: Literal['keep', 'mask', 'zero'] = 'keep'

    def __post_init__(self) -> None:
        if (self.length_penalty == 'linear') != (self.length_coef > 0):
            raise ValueError(
                f"ShapingSettings.length_coef: expected above 0 if and only if length_penalty is 'linear', "
                f'found {self.length_coef:g} with {self.length_penalty!r}'
            )


def shaped(rewards: Rewards, transcript: Transcript, settings: ShapingSettings) -> Rewards:
    """Shapes rewards, `[B]` or `[B, turns]`.

    With `linear`, reward' = reward - length_coef x tokens / 1000. A cut reply is handled after that, so `zero` is 0
    whatever its length. Parts: `unshaped`, the reward before, and `length_penalty`, what is added; only where one of
    the changes is asked for.
    """
    if settings == ShapingSettings():
        return rewards
    num_replies = transcript.messages.shape[1] // 2
    replied = 2 * jnp.arange(num_replies) + 1 < transcript.num_messages[:, None]
    tokens = jnp.where(replied, jnp.asarray(transcript.message_length)[:, 1::2], 0).astype(jnp.float32)
    cut = replied & jnp.asarray(transcript.truncated)[:, 1::2]
    if rewards.value.ndim == 1:
        tokens, cut = jnp.sum(tokens, axis=1), jnp.any(cut, axis=1)
    coef = {'none': 0.0, 'linear': settings.length_coef}[settings.length_penalty]
    penalty = -coef / 1000 * tokens
    value, valid, cause = rewards.value + penalty, jnp.asarray(rewards.valid), jnp.asarray(rewards.cause)
    if settings.truncated == 'zero':
        value = jnp.where(cut, 0.0, value)
    if settings.truncated == 'mask':
        lost = (valid & cut).reshape(len(cause), -1).any(axis=1)
        valid = valid & ~cut
        cause = jnp.where(lost & (cause == 0), CAUSES.index(TRUNCATED), cause)
    return Rewards(
        value=jnp.where(valid, value, 0.0),
        valid=valid,
        parts={**rewards.parts, 'unshaped': jnp.asarray(rewards.value), 'length_penalty': penalty},
        cause=cause,
    )
