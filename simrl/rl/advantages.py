"""Advantages from rewards.

`gae` estimates an advantage per token with a critic. The critic-free estimators (`grpo`, `dr_grpo`, `rloo`,
`reinforce_pp`) estimate one advantage per conversation from the other conversations' rewards.

Every end of a conversation is terminal: no value is bootstrapped past it. Shapes: B rows, T tokens.
"""

import jax
import jax.numpy as jnp

from simrl.models.rows import scatter_per_row
from simrl.rl import masked

EPSILON = 1e-6  # added to standard deviations of rewards, as in the GRPO implementations of TRL and SkyRL


def place_rewards(
    value: jax.Array, valid: jax.Array, trained: jax.Array, turn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Places each reward on its token.

    Args:
        value: float32 `[B]` (for the row's last trained token) or `[B, turns]` (for each turn's last trained token).
        valid: bool, the shape of `value`; invalid rewards are not placed.
        trained: bool `[B, T]`.
        turn: int `[B, T]`, turn of each token from 0; read at trained tokens only.

    Returns:
        placed: float32 `[B, T]`, 0 at every token without a reward.
        unplaced: float32 scalar, number of valid rewards without a place: their turn has no trained token.

    Raises:
        TypeError: `value` is not floating point: fractions of rewards would be lost.
        ValueError: the shapes do not agree.
    """
    last = _last_trained(value, valid, trained, turn)
    value = jnp.where(valid, value, 0).astype(jnp.float32).reshape(last.shape)
    placed = scatter_per_row(jnp.zeros(trained.shape, jnp.float32), last, value)  # no token is in two turns
    return placed, masked.count(valid.reshape(last.shape) & (last == trained.shape[1]))


def _last_trained(value: jax.Array, valid: jax.Array, trained: jax.Array, turn: jax.Array) -> jax.Array:
    """Index of the token for each reward, int32 `[B, turns or 1]`; T if there is none."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f'rewards: expected a floating-point dtype, found {value.dtype}')
    if value.ndim not in (1, 2) or value.shape[0] != trained.shape[0] or valid.shape != value.shape:
        raise ValueError(
            f'rewards: expected value and valid of shape [B] or [B, turns] with B={trained.shape[0]}, '
            f'found {value.shape} and {valid.shape}'
        )
    time = trained.shape[1]
    candidates = trained[:, None, :]
    if value.ndim == 2:
        candidates = candidates & (turn[:, None, :] == jnp.arange(value.shape[1])[:, None])
    last = jnp.max(jnp.where(candidates, jnp.arange(time), -1), axis=-1)
    return jnp.where(last < 0, time, last)


def valid_rows(valid: jax.Array, trained: jax.Array, turn: jax.Array) -> jax.Array:
    """Mask of the rows with known returns, bool `[B]`, for `gae`.

    With `[B, turns]` rewards, a trained turn without a valid reward makes all earlier returns unknown, so its whole row
    is masked. Turns that never happened need no reward.
    """
    if valid.ndim == 1:
        return valid
    happened = jnp.any(trained[:, None, :] & (turn[:, None, :] == jnp.arange(valid.shape[1])[:, None]), axis=-1)
    return jnp.all(valid | ~happened, axis=-1) & jnp.any(valid, axis=-1)


def conversation_rewards(value: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reduces rewards to one per conversation, the mean over valid turns, for the critic-free estimators.

    Args:
        value: float32 `[B]` or `[B, turns]`.
        valid: bool, the shape of `value`.

    Returns:
        float32 `[B]`, and bool `[B]`: True if at least one turn is valid.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f'rewards: expected a floating-point dtype, found {value.dtype}')
    if value.ndim == 1:
        return jnp.where(valid, value, 0.0).astype(jnp.float32), valid
    return masked.mean(value, valid, axis=1), jnp.any(valid, axis=1)


def gae(
    reward: jax.Array, value: jax.Array, trained: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438) over the trained tokens of each row.

    Other tokens (the partner's, headers, padding) are not steps of the decision process. The scan passes them
    unchanged: gamma and lambda do not apply to them, and the result equals GAE on the trained tokens alone. The step
    after a message's last token is the first token of the same role's next message.

    Args:
        reward: float32 `[B, T]`; read at trained tokens only.
        value: float32 `[B, T]`, the critic's prediction before each token; read at trained tokens only.
        trained: bool `[B, T]`.
        gamma, lam: discount and trace decay per trained token.

    Returns:
        advantage, returns: float32 `[B, T]`, 0 at untrained tokens. `returns` is `advantage + value`.
    """

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        next_advantage, next_value = carry
        reward_t, value_t, trained_t = token
        delta = reward_t + gamma * next_value - value_t
        advantage = delta + gamma * lam * next_advantage
        carry = (jnp.where(trained_t, advantage, next_advantage), jnp.where(trained_t, value_t, next_value))
        return carry, jnp.where(trained_t, advantage, 0.0)

    zeros = jnp.zeros(reward.shape[0], jnp.float32)
    tokens = (reward.astype(jnp.float32).T, value.astype(jnp.float32).T, trained.T)
    _, advantage = jax.lax.scan(step, (zeros, zeros), tokens, reverse=True)
    return advantage.T, jnp.where(trained, advantage.T + value, 0.0)


def gae_of_turns(
    reward: jax.Array,
    value: jax.Array,
    trained: jax.Array,
    gamma: float,
    lam: float,
    *,
    turn: jax.Array,
    turns: int,
) -> tuple[jax.Array, jax.Array]:
    """`gae` where each turn is an episode of its own: what a later turn is worth is no part of an earlier one's return.

    Args:
        turn: int32 `[B, T]`, the turn of each trained token, below `turns`.
    """
    own = trained & (turn == jnp.arange(turns)[:, None, None])
    advantage, returns = jax.vmap(lambda mask: gae(reward, value, mask, gamma, lam))(own)
    return jnp.sum(advantage, axis=0), jnp.sum(returns, axis=0)


def whiten(advantage: jax.Array, trained: jax.Array) -> jax.Array:
    """Normalises the advantages of all trained tokens to mean 0 and variance 1; 0 elsewhere.

    The variance divides by the number of tokens, so a single token gives 0 without a division by zero.
    """
    centred = advantage - masked.mean(advantage, trained)
    return jnp.where(trained, centred * jax.lax.rsqrt(masked.variance(advantage, trained) + 1e-8), 0.0)


def _members(valid: jax.Array, group: jax.Array) -> jax.Array:
    """Mask bool `[B, B]`: row j is a valid member of row i's group. B^2 is small compared with a model."""
    return (group[:, None] == group[None, :]) & valid[None, :]


def _usable(valid: jax.Array, members: jax.Array) -> jax.Array:
    return valid & (masked.count(members, axis=1) >= 2)


def dr_grpo(reward: jax.Array, valid: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): r - group mean. Its paper pairs it with `constant` aggregation.

    Args:
        reward: float32 `[B]`.
        valid: bool `[B]`; invalid rows are left out of their group's baseline.
        group: int32 `[B]`, equal for conversations from the same example.

    Returns:
        advantage: float32 `[B]`, 0 in unused rows.
        used: bool `[B]`, valid rows of groups with at least two valid rows. Only these are trained on.
    """
    members = _members(valid, group)
    used = _usable(valid, members)
    rewards = jnp.broadcast_to(reward[None, :], members.shape)
    centred = reward - masked.mean(rewards, members, axis=1)
    # The mean of equal rewards has a rounding error, which a division by their spread would amplify.
    varied = _spread(rewards, members) > 0
    return jnp.where(used & varied, centred, 0.0), used


def grpo(reward: jax.Array, valid: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GRPO (Shao et al. 2024, arXiv:2402.03300): (r - group mean) / (group std + 1e-6), the std unbiased.

    Arguments and results as in `dr_grpo`. A group whose rewards are all equal gives exactly 0.
    """
    centred, used = dr_grpo(reward, valid, group)
    members = _members(valid, group)
    rewards = jnp.broadcast_to(reward[None, :], members.shape)
    std = jnp.sqrt(masked.variance(rewards, members, axis=1, ddof=1))
    return centred / (std + EPSILON), used


def rloo(reward: jax.Array, valid: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): r - mean of the group's other valid members.

    Arguments and results as in `dr_grpo`.
    """
    centred, used = dr_grpo(reward, valid, group)
    number = masked.count(_members(valid, group), axis=1)
    return centred * number / jnp.maximum(number - 1, 1), used


def reinforce_pp(reward: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """REINFORCE++ (Hu 2025, arXiv:2501.03262): (r - mean) / (std + 1e-6) over all valid rows of the batch.

    Groups are not read. Statistics are over rows, not tokens: long conversations do not weigh more. The std is
    unbiased; fewer than two valid rows, or equal rewards, give 0.

    Returns:
        advantage: float32 `[B]`; used: bool `[B]`; as in `dr_grpo`.
    """
    return grpo(reward, valid, jnp.zeros(reward.shape, jnp.int32))


def _spread(rewards: jax.Array, members: jax.Array) -> jax.Array:
    """Range of the rewards in each row's group, `[B]`; exactly 0 for equal rewards; -inf without members."""
    highest = jnp.max(jnp.where(members, rewards, -jnp.inf), axis=1)
    return highest - jnp.min(jnp.where(members, rewards, jnp.inf), axis=1)


def group_counts(reward: jax.Array, valid: jax.Array, present: jax.Array, group: jax.Array) -> dict[str, jax.Array]:
    """Counts groups, and groups that give no gradient, float32 scalars.

    Args:
        present: bool `[B]`, False in padding rows.

    Returns:
        `groups`; `groups_too_small`, with fewer than two valid members; `groups_zero_variance`, whose (two or more)
        valid members all have the same reward.
    """
    # Each group is counted at its first row.
    same = (group[:, None] == group[None, :]) & present[None, :]
    first = present & (jnp.argmax(same, axis=1) == jnp.arange(group.shape[0]))
    members = _members(valid & present, group)
    enough = masked.count(members, axis=1) >= 2
    flat = _spread(jnp.broadcast_to(reward[None, :], members.shape), members) <= 0
    return {
        'groups': masked.count(first),
        'groups_too_small': masked.count(first & ~enough),
        'groups_zero_variance': masked.count(first & enough & flat),
    }
