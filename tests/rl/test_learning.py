"""The core learns: a simple true reward rises from chance to over 90%, by every path that the trained role can take."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, Chat
from simrl.conversations.records import Example
from simrl.conversations.templates import chat_from_huggingface
from simrl.models import sharding, transformer
from simrl.models.transformer import Execution, TransformerConfig
from simrl.rewards.rewards import Rewards
from simrl.rl import train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, ModelAgent, assistant
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from tests.tiny import byte_tokenizer

LIMITS = Limits(turns=2, prompt_tokens=48, assistant_tokens=8, user_tokens=8)
EXECUTION = Execution(log_prob_chunk=64)


@pytest.fixture(scope='module')
def chat() -> Chat:
    return chat_from_huggingface(byte_tokenizer())


def tiny_config(chat: Chat, num_layers: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=chat.size,
        model_dim=32,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_dim=64,
        max_positions=256,
        tied_embedding=True,
    )


def sides(chat: Chat, seed: int) -> tuple[ModelAgent, ModelAgent]:
    """A user and an assistant of random weights and different sizes."""
    user_key, assistant_key = jax.random.split(jax.random.key(seed))
    user_config, assistant_config = tiny_config(chat, 1), tiny_config(chat, 2)
    user = fine_tuned(
        chat,
        user_config,
        transformer.init_params(user_key, user_config),
        EXECUTION,
        max_new_tokens=LIMITS.user_tokens,
        settings=FineTunedSettings(sampling=Sampling()),
    )
    helper = assistant(
        chat,
        assistant_config,
        transformer.init_params(assistant_key, assistant_config),
        EXECUTION,
        max_new_tokens=LIMITS.assistant_tokens,
        sampling=Sampling(),
    )
    return user, helper


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


def learn(folder, chat: Chat, seed: int, trained: str, update: AlgorithmSettings, steps: int) -> list[float]:
    """The mean reward of each step."""
    user, helper = sides(chat, seed)
    settings = RLSettings(
        steps=steps,
        prompts_per_step=8,
        samples_per_prompt=8,
        row_buckets=(128,),
        algorithm=update,
        optimizer=OptimizerSettings(learning_rate=5e-3),
        trained=trained,
    )
    examples = [Example(f'example-{i}', f'opening {i}', None, i, 'test', 'train') for i in range(16)]
    train.train(
        folder,
        user,
        helper,
        chat=chat,
        examples=examples,
        score=share_of_letters(settings.role),
        limits=LIMITS,
        settings=settings,
        execution=EXECUTION,
        loop_settings=LoopSettings(log_every=1, checkpoint_every=1000, saved_conversations=0),
        seed=seed,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
    )
    return [json.loads(line)['reward/mean'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
PPO = AlgorithmSettings(advantage='gae', kl='k3', kl_coef=1e-3, minibatches=2)
GRPO = AlgorithmSettings(advantage='grpo', kl='k3', kl_coef=1e-3, minibatches=2)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('update', [PPO, GRPO], ids=['ppo', 'grpo'])
def test_raises_a_true_reward_of_the_assistant(tmp_path, chat, seed, update):
    rewards = learn(tmp_path, chat, seed, 'assistant', update, steps=40)
    assert rewards[0] < 0.4, 'the reward starts near chance, one quarter'
    assert np.mean(rewards[-5:]) > 0.9


@pytest.mark.parametrize('seed', SEEDS)
def test_the_same_core_trains_the_user_model(tmp_path, chat, seed):
    rewards = learn(tmp_path, chat, seed, 'user', PPO, steps=40)
    assert rewards[0] < 0.4
    assert np.mean(rewards[-5:]) > 0.9
