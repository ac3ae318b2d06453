"""Rewards to advantages: how much better than expected each trained token, or each conversation, turned out.

`gae` gives every token its own advantage with the help of a critic. The critic-free estimators (`grpo`, `dr_grpo`,
`rloo`, `reinforce_pp`) give one number to a whole conversation, from the other conversations' rewards.

Every end of a conversation is terminal: nothing is bootstrapped past it, whatever its reason. Shapes: B rows, T tokens.
"""

import jax
import jax.numpy as jnp

from simrl.models.rows import scatter_per_row
from simrl.rl import masked

EPSILON = 1e-6  # added to standard deviations of rewards, as in the GRPO implementations of TRL and SkyRL


def place_rewards(
    value: jax.Array, valid: jax.Array, trained: jax.Array, turn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts each reward on the token that it rewards.

    Args:
        value: float32 `[B]`: on the row's last trained token; or `[B, turns]`: on each turn's last trained token.
        valid: bool, the shape of `value`; a reward that is not valid is placed nowhere.
        trained: bool `[B, T]`.
        turn: int `[B, T]`, the turn that each token belongs to, 0 the first; read at trained tokens only.

    Returns:
        placed: float32 `[B, T]`, 0 at every token without a reward.
        unplaced: float32 scalar, the number of valid rewards that are not in it: their turn has no trained token.

    Raises:
        TypeError: `value` is not floating point; whole numbers would have lost the fraction before coming here.
        ValueError: the shapes do not fit.
    """
    last = _last_trained(value, valid, trained, turn)
    value = jnp.where(valid, value, 0).astype(jnp.float32).reshape(last.shape)
    placed = scatter_per_row(jnp.zeros(trained.shape, jnp.float32), last, value)  # no token is of two turns
    return placed, masked.count(valid.reshape(last.shape) & (last == trained.shape[1]))


def _last_trained(value: jax.Array, valid: jax.Array, trained: jax.Array, turn: jax.Array) -> jax.Array:
    """The index of the token that carries each reward, int32 `[B, turns or 1]`; T where there is none."""
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
    """The rows whose return is known, bool `[B]`; for `gae`.

    With `[B, turns]` rewards a turn that was trained on but has no valid reward makes every return before it unknown,
    so its row is masked whole. Turns that never happened need no reward.
    """
    if valid.ndim == 1:
        return valid
    happened = jnp.any(trained[:, None, :] & (turn[:, None, :] == jnp.arange(valid.shape[1])[:, None]), axis=-1)
    return jnp.all(valid | ~happened, axis=-1) & jnp.any(valid, axis=-1)


def conversation_rewards(value: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One reward a conversation, for the critic-free estimators: the mean over the valid turns.

    Args:
        value: float32 `[B]` or `[B, turns]`.
        valid: bool, the shape of `value`.

    Returns:
        float32 `[B]`, and bool `[B]`: where at least one turn is valid.
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

    Other tokens (the partner's, headers, padding) are no steps of the decision process: the scan passes them by
    unchanged, so gamma and lambda do not tick on them, and the result equals GAE on the row with them cut out. In
    multi-turn rows the token after a message's last one is therefore the first one of the same role's next message.

    Args:
        reward: float32 `[B, T]`; read at trained tokens only.
        value: float32 `[B, T]`, the critic's prediction for the token, made before it; read at trained tokens only.
        trained: bool `[B, T]`.
        gamma, lam: discount and trace per trained token.

    Returns:
        advantage, returns: float32 `[B, T]`, 0 at tokens not trained. `returns` is `advantage + value`.
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


def whiten(advantage: jax.Array, trained: jax.Array) -> jax.Array:
    """Shifts and scales the advantages of all trained tokens to mean 0 and variance 1; 0 elsewhere.

    The variance divides by the number of tokens, so that a single one gives 0 and no division by zero.
    """
    centred = advantage - masked.mean(advantage, trained)
    return jnp.where(trained, centred * jax.lax.rsqrt(masked.variance(advantage, trained) + 1e-8), 0.0)


def _members(valid: jax.Array, group: jax.Array) -> jax.Array:
    """bool `[B, B]`: row j is a valid member of row i's group. Ids need not be dense; B^2 is nothing beside a model."""
    return (group[:, None] == group[None, :]) & valid[None, :]


def _usable(valid: jax.Array, members: jax.Array) -> jax.Array:
    return valid & (masked.count(members, axis=1) >= 2)


def dr_grpo(reward: jax.Array, valid: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): r - group mean. Its paper pairs it with `constant` aggregation.

    Args:
        reward: float32 `[B]`.
        valid: bool `[B]`. The others leave their group's baseline too.
        group: int32 `[B]`, equal for the conversations that start from the same example.

    Returns:
        advantage: float32 `[B]`, 0 where not used.
        used: bool `[B]`, the valid rows of groups with at least two of them. Nothing is learned from the others.
    """
    members = _members(valid, group)
    used = _usable(valid, members)
    rewards = jnp.broadcast_to(reward[None, :], members.shape)
    centred = reward - masked.mean(rewards, members, axis=1)
    # The mean of equal numbers is off by a rounding error, which a division by their spread would blow up.
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

    Groups are not read. The statistics are over rows and not over tokens, so that long conversations do not weigh
    more; the std is unbiased, and fewer than two valid rows, or equal rewards, give 0.

    Returns:
        advantage: float32 `[B]`; used: bool `[B]`; as in `dr_grpo`.
    """
    return grpo(reward, valid, jnp.zeros(reward.shape, jnp.int32))


def _spread(rewards: jax.Array, members: jax.Array) -> jax.Array:
    """Largest less smallest reward of each row's group, `[B]`; exactly 0 for equal rewards; -inf without members."""
    highest = jnp.max(jnp.where(members, rewards, -jnp.inf), axis=1)
    return highest - jnp.min(jnp.where(members, rewards, jnp.inf), axis=1)


def group_counts(reward: jax.Array, valid: jax.Array, present: jax.Array, group: jax.Array) -> dict[str, jax.Array]:
    """How many groups there are, and how many teach nothing, float32 scalars.

    Args:
        present: bool `[B]`, rows that are conversations at all (and not there to fill the batch).

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
