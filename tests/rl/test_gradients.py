"""Gradients of single examples: those of a slow loop, of one turn alone; sketches keep their inner products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.evaluation.forecast import gradient_cosine
from simrl.rl.gradients import example_gradients, only_turn, sketch
from simrl.rl.judged import collect_judged
from simrl.rollouts.collect import for_sampling
from simrl.training.scoring import trained_tokens
from tests.rl import scene
from tests.rl.test_update import (
    CONFIG,
    EXECUTION,
    ROWS,
    TIME,
    TOKEN_MASK,
    conversations,
    jit_score,
    make_params,
    rewards_of,
    trajectories,
)

SAMPLES, TEMPERATURE = 4, 0.8  # `conversations` has two examples of four rows
INVALID = 6


def gradients_of(batch, rewards, params):
    return example_gradients(
        *(params, {}, batch, rewards),
        samples=SAMPLES,
        row_buckets=(TIME,),
        config=CONFIG,
        execution=EXECUTION,
        token_mask=jnp.asarray(TOKEN_MASK),
        temperature=TEMPERATURE,
    )


@jax.jit
def slow_gradient(params, tokens, trained, coefficients):
    """Of the sum over rows of coefficient times log-probability."""

    def loss(params):
        log_prob = jit_score(params, CONFIG, EXECUTION, tokens, trained, TOKEN_MASK, TEMPERATURE).log_prob
        return -jnp.sum(log_prob.sum(1) * coefficients)

    return jax.grad(loss)(params)


def test_the_gradient_of_an_example_is_that_of_a_slow_loop_over_its_conversations():
    params, rows = make_params(value_head=False), conversations()
    values = np.random.default_rng(1).random(ROWS)
    valid = np.arange(ROWS) != INVALID
    for turn in (None, 1):
        batch = trajectories(rows)
        batch = batch if turn is None else only_turn(batch, turn)
        found = gradients_of(batch, rewards_of(values, valid), params)
        trained = np.array(trained_tokens(rows['role'], rows['length'], ASSISTANT))
        if turn is not None:
            trained &= rows['turn'] == turn
        for example in range(ROWS // SAMPLES):
            own = [i for i in range(example * SAMPLES, (example + 1) * SAMPLES) if valid[i]]
            spoken = [i for i in own if trained[i].any()]  # the mean is over conversations with something to train on
            coefficients = np.zeros(ROWS)
            for i in spoken:
                others = [values[j] for j in own if j != i]
                coefficients[i] = (values[i] - np.mean(others)) / len(spoken)
            expected = slow_gradient(params, rows['tokens'], trained, coefficients)
            flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
            assert np.linalg.norm(flat) > 1e-3
            np.testing.assert_allclose(found[example], flat, atol=1e-5 * np.abs(flat).max())


def test_equal_rewards_give_no_gradient():
    found = gradients_of(trajectories(conversations()), rewards_of(np.full(ROWS, 0.7)), make_params(value_head=False))
    assert not found.any()


def test_sketches_keep_inner_products():
    random = np.random.default_rng(2)
    shared = random.normal(size=5000)
    trees = []
    for _ in range(2):
        flat = (shared + random.normal(size=5000)).astype(np.float32)
        trees.append({'a': flat[:3000].reshape(30, 100), 'b': [flat[3000:3001], flat[3001:].reshape(1, 1999)]})
    first, second = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in trees)
    whole = [np.asarray(sketch(tree, 8192)) for tree in trees]
    np.testing.assert_array_equal(whole, [first, second])
    size = 1024
    small = [np.asarray(sketch(tree, size)) for tree in trees]
    assert small[0].shape == (size,)
    error = np.linalg.norm(first) * np.linalg.norm(second) / np.sqrt(size)
    assert abs(small[0] @ small[1] - first @ second) < 4 * error
    assert abs(small[0] @ small[0] - first @ first) < 4 * np.sqrt(2) * error
    np.testing.assert_allclose(sketch(jax.tree.map(np.add, *trees), size), small[0] + small[1], rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_the_cosine_of_a_simulator_with_itself_is_one(chat, mesh):
    """Two sets of replies to the same openings; and with a reward that pulls the other way, minus one."""
    user, assistant = scene.sides(chat)
    policy = assistant.policy
    one_token = dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, max_new_tokens=1))
    assistant = dataclasses.replace(assistant, policy=one_token)  # which leaves little noise
    limits = dataclasses.replace(scene.LIMITS, turns=1, assistant_tokens=1)
    examples = [dataclasses.replace(scene.EXAMPLES[0], id=f'e-{i}', opening=f'hello {i}') for i in range(96)]
    samplers = [for_sampling(agent, mesh) for agent in (user, assistant)]
    params = {'decoder': assistant.policy.params['decoder']}

    def gradients(step, sign=1.0):
        def score(batch):
            rewards = scene.share_of_low_ids(batch)
            return dataclasses.replace(rewards, value=sign * rewards.value)

        with jax.set_mesh(mesh):
            found = collect_judged(
                *(*samplers, examples, score),
                chat=chat,
                limits=limits,
                seed=scene.SEED,
                step=step,
                view=ASSISTANT,
                mesh=mesh,
                samples=16,
            )
            return example_gradients(
                *(params, {}, found.batch, found.rewards),
                samples=16,
                row_buckets=(64,),
                config=assistant.policy.spec.config,
                execution=scene.EXECUTION,
                token_mask=jnp.asarray(assistant.policy.token_mask),
                temperature=assistant.policy.temperature,
            )

    first, second, opposed = gradients(0), gradients(1), gradients(2, sign=-1.0)
    for other, expected in ((second, 1.0), (opposed, -1.0)):
        estimate, reason = gradient_cosine([first @ first.T], [first @ other.T], other @ other.T, range(len(examples)))
        assert reason is None
        assert estimate.low <= expected <= estimate.high
        assert estimate.high - estimate.low < 0.8
        plain = first.mean(0) @ other.mean(0) / np.linalg.norm(first.mean(0)) / np.linalg.norm(other.mean(0))
        assert abs(plain) < abs(estimate.mean)
