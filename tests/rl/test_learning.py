"""The core learns: a simple true reward rises from chance to over 90%, by every path that the trained role can take."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Example
from simrl.models import sharding
from simrl.rewards.rewards import Rewards
from simrl.rl import train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.rollouts.trajectories import Trajectories
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from tests.rl import scene


def share_of_letters(role: int):
    """The share of tokens in what `role` said that are among the first quarter of the ids."""
    first = 0 if role != ASSISTANT else 1

    def score(batch: Trajectories) -> Rewards:
        messages, length = batch.messages[:, first::2], batch.message_length[:, first::2]
        content = jnp.arange(messages.shape[2]) < length[:, :, None]
        if first == 0:
            content = content.at[:, 0].set(False)  # the opening is given
        right = jnp.sum(content & (messages < 64), axis=(1, 2), dtype=jnp.float32)
        # A message that is empty, or a conversation ended at once, is worth nothing: silence must not pay.
        value = right / jnp.maximum(jnp.sum(content, axis=(1, 2)), 4)
        return Rewards(
            value=value, valid=jnp.ones(value.shape, bool), parts={}, cause=jnp.zeros(value.shape, jnp.int32)
        )

    return score


def learn(folder, seed: int, trained: str, update: AlgorithmSettings, steps: int) -> list[float]:
    """The mean reward of each step."""
    chat = scene.chat()
    user, helper = scene.sides(chat, seed)
    settings = RLSettings(
        steps=steps,
        prompts_per_step=8,
        samples_per_prompt=4,
        row_buckets=(128,),
        algorithm=update,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        trained=trained,
    )
    examples = [Example(f'example-{i}', f'hello {i}', None, i, 'test', 'train') for i in range(16)]
    train.train(
        folder,
        user,
        helper,
        chat=chat,
        examples=examples,
        score=share_of_letters(settings.role),
        limits=scene.LIMITS,
        settings=settings,
        execution=scene.EXECUTION,
        loop_settings=LoopSettings(log_every=1, checkpoint_every=1000, saved_conversations=0),
        seed=seed,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
    )
    return [json.loads(line)['reward/mean'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


PPO = AlgorithmSettings(advantage='gae', kl='k3', kl_coef=1e-3, minibatches=2)
GRPO = AlgorithmSettings(advantage='grpo', kl='k3', kl_coef=1e-3, minibatches=2)
CASES = {  # whom, how, with which seed
    f'{trained}-{name}-{seed}': (trained, update, seed)
    for trained in ('assistant', 'user')
    for name, update in (('ppo', PPO), ('grpo', GRPO))
    for seed in range(3)
}
QUICK = 'assistant-ppo-0'


@pytest.mark.parametrize(
    ('trained', 'update', 'seed'),
    [pytest.param(*case, id=name, marks=() if name == QUICK else pytest.mark.long) for name, case in CASES.items()],
)
def test_raises_a_true_reward(tmp_path, trained, update, seed):
    """Of either agent, by the same core."""
    rewards = learn(tmp_path, seed, trained, update, steps=20)
    assert rewards[0] < 0.4, 'the reward starts near chance, one quarter'
    assert np.mean(rewards[-5:]) > 0.9
