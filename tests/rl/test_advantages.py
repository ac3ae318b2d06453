"""Advantages against plain loops and NumPy, with holes in every mask and NaN behind each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simrl.rl import advantages, masked

ROWS, TIME, TURNS = 4, 12, 3

few = settings(max_examples=60, deadline=None)
# XLA flushes subnormal numbers to zero, which numpy does not.
numbers = st.floats(-3, 3, width=32, allow_subnormal=False)
masks = hnp.arrays(bool, (ROWS, TIME))
floats = hnp.arrays(np.float32, (ROWS, TIME), elements=numbers)

jit_gae = jax.jit(advantages.gae)
jit_gae_of_turns = jax.jit(functools.partial(advantages.gae_of_turns, gamma=0.9, lam=0.95, turns=TURNS))
jit_place = jax.jit(advantages.place_rewards)


@few
@given(floats, floats, masks, hnp.arrays(np.int32, (ROWS, TIME), elements=st.integers(0, TURNS - 1)))
def test_turns_that_are_episodes_know_nothing_of_each_other(reward, value, trained, turn):
    turn = np.sort(turn, axis=1)
    found = jit_gae_of_turns(reward, value, trained, turn=turn)
    for number in range(TURNS):
        own = trained & (turn == number)
        alone = jit_gae(reward, value, own, 0.9, 0.95)
        for whole, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose(np.where(own, whole, 0), expected, atol=1e-5)
    assert not np.any(np.where(trained, 0, found[0]))


def test_the_return_of_a_reply_is_its_own_reward_where_it_holds_what_follows():
    """Three replies of futures worth .8 are no better than one worth .9; as rewards of turns they would add up."""
    reward = np.zeros((2, 6), np.float32)
    reward[0, [1, 3, 5]], reward[1, 1] = 0.8, 0.9
    trained = np.array([[True] * 6, [True, True] + [False] * 4])
    turn = np.broadcast_to(np.arange(6) // 2, (2, 6))
    zeros = np.zeros_like(reward)
    _, returns = advantages.gae_of_turns(reward, zeros, trained, 1.0, 1.0, turn=turn, turns=TURNS)
    np.testing.assert_allclose(returns, np.where(trained, [[0.8], [0.9]], 0))
    np.testing.assert_allclose(advantages.gae(reward, zeros, trained, 1.0, 1.0)[1][0, ::2], [2.4, 1.6, 0.8])


def slow_gae(reward, value, gamma, lam):
    """GAE of one row without holes, by its definition: the lambda-weighted sum of all later TD errors."""
    time = len(reward)
    deltas = [reward[t] + (gamma * value[t + 1] if t + 1 < time else 0.0) - value[t] for t in range(time)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, time)) for t in range(time)]


@few
@given(floats, floats, masks, st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([1.0, 0.95, 0.0]))
def test_gae_equals_a_slow_loop_over_compacted_tokens(reward, value, trained, gamma, lam):
    holes = np.where(trained, 0, np.nan).astype(np.float32)  # what stands at other tokens must not matter
    advantage, returns = jax.device_get(jit_gae(reward + holes, value + holes, trained, gamma, lam))
    for i in range(ROWS):
        at = np.flatnonzero(trained[i])
        expected = np.array(slow_gae(reward[i, at].astype(float), value[i, at].astype(float), gamma, lam))
        np.testing.assert_allclose(advantage[i, at], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(returns[i, at], expected + value[i, at], rtol=1e-4, atol=1e-4)
    assert not advantage[~trained].any()
    assert not returns[~trained].any()


def test_a_fractional_reward_survives_untouched():
    trained = np.zeros((2, TIME), bool)
    trained[:, [2, 3, 7]] = True
    turn = np.zeros((2, TIME), np.int16)
    reward = jnp.array([0.7, 1.6], jnp.float32)
    placed, unplaced = jit_place(reward, jnp.ones(2, bool), trained, turn)
    assert unplaced == 0
    assert placed.dtype == jnp.float32
    np.testing.assert_array_equal(placed[:, 7], reward)
    assert np.count_nonzero(placed) == 2
    # With a critic that predicts 0, and gamma = lambda = 1, each trained token's return is the reward itself.
    _, returns = jit_gae(placed, jnp.zeros_like(placed), trained, 1.0, 1.0)
    np.testing.assert_array_equal(returns, np.where(trained, np.float32([[0.7], [1.6]]), 0))


@few
@given(
    hnp.arrays(np.float32, (ROWS, TURNS), elements=numbers),
    hnp.arrays(bool, (ROWS, TURNS)),
    masks,
    hnp.arrays(np.int16, (ROWS, TIME), elements=st.integers(-1, TURNS)),
)
def test_turn_rewards_stand_on_each_turns_last_trained_token(value, valid, trained, turn):
    expected = np.zeros((ROWS, TIME), np.float32)
    unplaced = 0
    for i in range(ROWS):
        for k in range(TURNS):
            at = [t for t in range(TIME) if trained[i, t] and turn[i, t] == k]
            if valid[i, k] and at:
                expected[i, at[-1]] += value[i, k]
            elif valid[i, k]:
                unplaced += 1
    hidden = np.where(valid, value, np.nan)
    placed, missed = jit_place(hidden, valid, trained, turn)
    np.testing.assert_array_equal(placed, expected)
    assert missed == unplaced


def test_whole_number_rewards_are_refused():
    trained = np.ones((2, TIME), bool)
    with pytest.raises(TypeError, match='floating-point dtype, found int32'):
        advantages.place_rewards(jnp.array([0, 1]), jnp.ones(2, bool), trained, trained)
    with pytest.raises(TypeError, match='floating-point dtype, found int32'):
        advantages.conversation_rewards(jnp.array([0, 1]), jnp.ones(2, bool))


def test_rewards_of_the_wrong_shape_are_refused():
    trained = np.ones((2, TIME), bool)
    with pytest.raises(ValueError, match=r'with B=2, found \(3,\)'):
        advantages.place_rewards(jnp.ones(3), jnp.ones(3, bool), trained, trained)


def test_a_row_with_an_unjudged_turn_is_masked_for_gae_but_turns_that_never_happened_are_not_missed():
    turn = np.array([[0, 0, 1, 1]] * 3)
    trained = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], bool)
    valid = jnp.array([[True, True], [False, True], [True, False]])
    np.testing.assert_array_equal(advantages.valid_rows(valid, trained, turn), [True, False, True])
    np.testing.assert_array_equal(advantages.valid_rows(jnp.zeros((3, 2), bool), trained & False, turn), [False] * 3)


def test_conversation_reward_is_the_mean_over_valid_turns():
    value = jnp.array([[0.2, 0.6, jnp.nan], [jnp.nan] * 3, [0.7, 0.7, 0.7]], jnp.float32)
    reward, valid = advantages.conversation_rewards(value, ~jnp.isnan(value))
    np.testing.assert_allclose(reward, [0.4, 0.0, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(valid, [True, False, True])


# Critic-free estimators.

BATCH = 10
rewards = hnp.arrays(np.float32, BATCH, elements=st.sampled_from([0.0, 0.1, 0.35, 0.7, 1.0]))
valids = hnp.arrays(bool, BATCH)
groups = hnp.arrays(np.int32, BATCH, elements=st.sampled_from([-1, 0, 3, 1_000_000]))  # ids need not be dense


def slow_estimate(name, reward, valid, group):
    """Group by group, in float64, by the formulas of the papers."""
    advantage, used = np.zeros(BATCH), np.zeros(BATCH, bool)
    for g in np.unique(group):
        at = np.flatnonzero(valid & (group == g))
        if len(at) < 2:
            continue
        used[at] = True
        r = reward[at].astype(float)
        if name == 'dr_grpo':
            advantage[at] = r - r.mean()
        elif name == 'grpo':
            advantage[at] = (r - r.mean()) / (r.std(ddof=1) + 1e-6) if len(set(r)) > 1 else 0
        else:
            advantage[at] = [r[k] - np.delete(r, k).mean() for k in range(len(r))]
    return advantage, used


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo', 'reinforce_pp'])
def test_estimator_equals_numpy(name):
    estimate = jax.jit(getattr(advantages, name))

    @few
    @given(rewards, valids, groups)
    def check(reward, valid, group):
        hidden = np.where(valid, reward, np.nan)  # what a masked member would have got must not matter
        if name == 'reinforce_pp':
            advantage, used = estimate(hidden, valid)
            expected, expected_used = slow_estimate('grpo', reward, valid, np.zeros(BATCH))
        else:
            advantage, used = estimate(hidden, valid, group)
            expected, expected_used = slow_estimate(name, reward, valid, group)
        np.testing.assert_array_equal(used, expected_used)
        np.testing.assert_allclose(advantage, expected, rtol=2e-4, atol=2e-6)

    check()


def test_a_masked_member_leaves_the_baseline():
    reward, group = jnp.array([1.0, 0.0, 0.25], jnp.float32), jnp.zeros(3, jnp.int32)
    advantage, used = advantages.dr_grpo(reward, jnp.array([True, True, False]), group)
    np.testing.assert_allclose(advantage, [0.5, -0.5, 0.0])  # the mean is 1/2; with the third it would be 5/12
    np.testing.assert_array_equal(used, [True, True, False])
    advantage, _ = advantages.rloo(reward, jnp.array([True, True, False]), group)
    np.testing.assert_allclose(advantage, [1.0, -1.0, 0.0])


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo'])
def test_fewer_than_two_valid_members_teach_nothing(name):
    valid = jnp.array([True, False, False, False])
    advantage, used = getattr(advantages, name)(jnp.array([0.9, 0.1, 0.4, 0.2]), valid, jnp.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(advantage, np.zeros(4))
    assert not used.any()


@pytest.mark.parametrize('number', [2, 3, 5, 7, 11])
def test_equal_rewards_give_exactly_zero(number):
    # The float32 mean of equal numbers may be off by a rounding error, which 1e-6 in the denominator does not hide.
    reward, valid = jnp.full(number, 0.7, jnp.float32), jnp.ones(number, bool)
    for estimate in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        advantage, _ = estimate(reward, valid, jnp.zeros(number, jnp.int32))
        np.testing.assert_array_equal(advantage, np.zeros(number))


def test_groups_are_counted_once_each():
    group = jnp.array([7, 7, 7, 2, 2, 5, 5, 9, 9])
    reward = jnp.array([0.7, 0.7, 0.1, 0.3, 0.3, 0.1, 0.2, 0.0, 0.0])
    valid = jnp.array([True, True, False, True, True, True, False, True, True])
    present = jnp.array([True] * 7 + [False] * 2)  # the last two only fill the batch
    counts = advantages.group_counts(reward, valid, present, group)
    # 7: two valid, equal; 2: equal; 5: one valid.
    assert counts == {'groups': 3, 'groups_too_small': 1, 'groups_zero_variance': 2}


# Whitening and masked reductions.


@few
@given(floats, masks)
def test_whitening_equals_numpy(x, mask):
    result = np.asarray(advantages.whiten(jnp.where(mask, x, jnp.nan), mask))
    assert np.isfinite(result).all()
    assert not result[~mask].any()
    chosen = x[mask].astype(float)
    if len(chosen) and chosen.std() > 1e-2:
        np.testing.assert_allclose(result[mask], (chosen - chosen.mean()) / chosen.std(), rtol=1e-3, atol=1e-3)


def test_whitening_one_token_gives_zero():
    mask = np.zeros((ROWS, TIME), bool)
    mask[1, 3] = True
    np.testing.assert_array_equal(advantages.whiten(jnp.full((ROWS, TIME), 0.7), mask), np.zeros((ROWS, TIME)))


def test_masked_reductions_keep_nan_out_of_values_and_gradients():
    x, mask = jnp.array([1.0, jnp.nan, 4.0, jnp.inf]), jnp.array([True, False, True, False])
    reductions = [
        (masked.total, 5.0),
        (masked.mean, 2.5),
        (masked.variance, 2.25),
        (functools.partial(masked.variance, ddof=1), 4.5),
        (masked.maximum, 4.0),
    ]
    for reduce, expected in reductions:
        assert reduce(x, mask) == expected
        assert reduce(x, mask & False) == 0
        gradient = jax.grad(lambda x, reduce=reduce: reduce(x, mask))(x)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~mask], [0, 0])
