"""All trainings on tiny models: what the tests of resuming and of several devices have in common."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import BatchSettings
from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import PreferenceRow, Rendered
from simrl.models import transformer
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import Rewards, Score
from simrl.rl import train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.futures import FutureScore, FutureSettings
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, ModelAgent, assistant
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.training import preference, sft
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings, TrainState
from simrl.training.preference import PreferenceSettings
from simrl.training.sft import SFTSettings
from tests.tiny import byte_tokenizer

LIMITS = Limits(turns=2, prompt_tokens=24, assistant_tokens=5, user_tokens=5)
EXECUTION = Execution(log_prob_chunk=64)
# A large epsilon: Adam's first steps else have the size of the rate however small a gradient is, rounding included.
ADAMW = OptimizerSettings(learning_rate=1e-2, epsilon=1e-3, weight_decay=0.01)
LORA = LoRASettings(rank=2, alpha=4.0, targets=('query', 'key', 'output', 'gate', 'down'))
PPO = AlgorithmSettings(kl='k3', kl_coef=0.01, minibatches=2)
ROWS = 8  # of a batch
SEED = 3
LENGTH = 16  # tokens of a fine-tuning row
EXAMPLES = [Example(f'example-{i}', f'hello {i}', None, i, 'test', 'train') for i in range(ROWS // 2)]


def chat() -> Chat:
    return chat_from_huggingface(byte_tokenizer())


def config_of(chat: Chat, num_layers: int = 2) -> TransformerConfig:
    """Four query heads for two key/value heads."""
    return TransformerConfig(
        vocab_size=chat.size,
        model_dim=32,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=256,
        tied_embedding=True,
    )


def params_of(config: TransformerConfig, seed: int = 0) -> Params:
    return jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(seed), config)


def sides(chat: Chat, seed: int = 0) -> tuple[ModelAgent, ModelAgent]:
    """A user and an assistant of random weights and different sizes."""
    user_config, config = config_of(chat, num_layers=1), config_of(chat)
    user = fine_tuned(
        chat,
        user_config,
        params_of(user_config, 2 * seed + 1),
        EXECUTION,
        max_new_tokens=LIMITS.user_tokens,
        settings=FineTunedSettings(sampling=Sampling()),
    )
    helper = assistant(
        chat,
        config,
        params_of(config, 2 * seed),
        EXECUTION,
        max_new_tokens=LIMITS.assistant_tokens,
        sampling=Sampling(),
    )
    return user, helper


@jax.jit
def share_of_low_ids(batch: Trajectories) -> Rewards:
    """The share of the assistant's tokens that are among the first quarter of the ids."""
    messages, length = batch.messages[:, 1::2], batch.message_length[:, 1::2]
    content = jnp.arange(messages.shape[2]) < length[:, :, None]
    right = jnp.sum(content & (messages < 64), axis=(1, 2), dtype=jnp.float32)
    value = right / jnp.maximum(jnp.sum(content, axis=(1, 2)), 1)
    return Rewards(value=value, valid=jnp.ones(value.shape, bool), parts={}, cause=jnp.zeros(value.shape, jnp.int32))


def loop_settings(**changes: int) -> LoopSettings:
    return LoopSettings(**({'log_every': 1, 'checkpoint_every': 100} | changes))


def reinforce(
    folder: pathlib.Path,
    chat: Chat,
    mesh: Mesh,
    *,
    steps: int,
    loop_settings: LoopSettings,
    score: Score | FutureScore = share_of_low_ids,
    algorithm: AlgorithmSettings = PPO,
    lora: LoRASettings | None = None,
    **settings: Any,
) -> TrainState:
    """RL of the assistant on four openings, all of them in every step, two conversations each."""
    user, helper = sides(chat)
    return train.train(
        folder,
        user,
        helper,
        chat=chat,
        examples=EXAMPLES,
        score=score,
        limits=LIMITS,
        settings=RLSettings(
            steps=steps,
            prompts_per_step=ROWS // 2,
            samples_per_prompt=2,
            row_buckets=(128,),
            algorithm=algorithm,
            optimizer=ADAMW,
            lora=lora,
        ),
        execution=EXECUTION,
        loop_settings=loop_settings,
        seed=SEED,
        mesh=mesh,
        **settings,
    )


def adapt(*args: Any, **kwargs: Any) -> TrainState:
    """`reinforce` by adapters."""
    return reinforce(*args, lora=LORA, **kwargs)


def ahead(*args: Any, **kwargs: Any) -> TrainState:
    """`reinforce`, its programs compiled before the first step."""
    return reinforce(*args, compile_threads=2, **kwargs)


def ahead_at_own_pace(*args: Any, **kwargs: Any) -> TrainState:
    """`ahead`, each conversation at its own pace."""
    return ahead(*args, batching='continuous', **kwargs)


def foresee(*args: Any, score: Callable[[Trajectories], Rewards], **kwargs: Any) -> TrainState:
    """`reinforce` by what follows from each reply."""
    return reinforce(*args, score=FutureScore(score, FutureSettings(samples=2, turns=1)), **kwargs)


def foresee_ahead(*args: Any, **kwargs: Any) -> TrainState:
    """`foresee`, its programs compiled before the first step."""
    return foresee(*args, compile_threads=2, **kwargs)


def rendered(rng: np.random.Generator) -> Rendered:
    """Random tokens, of which the user's are trained."""
    length = int(rng.integers(4, LENGTH + 1))
    return Rendered(
        tokens=rng.integers(0, 200, length).astype(np.int32),
        role=np.full(length, USER, np.int8),
        message=np.zeros(length, np.int16),
        trained=np.append(False, rng.random(length - 1) < 0.7),
    )


def sft_rows(number: int = 5 * ROWS, seed: int = 0) -> list[Rendered]:
    rng = np.random.default_rng(seed)
    return [rendered(rng) for _ in range(number)]


def preference_rows(number: int = 5 * ROWS // 2) -> list[PreferenceRow]:
    rng = np.random.default_rng(2)
    return [PreferenceRow(rendered(rng), rendered(rng)) for _ in range(number)]


def fine_tune(
    folder: pathlib.Path,
    chat: Chat,
    mesh: Mesh,
    *,
    steps: int,
    loop_settings: LoopSettings,
    rows: Sequence[Rendered] | None = None,
    lora: LoRASettings | None = None,
    compile_threads: int = 0,
) -> TrainState:
    config = config_of(chat)
    return sft.fine_tune(
        folder,
        lambda: params_of(config),
        rows or sft_rows(),
        sft_rows(ROWS, seed=1),
        config=config,
        token_mask=chat.token_mask(config.padded_vocab_size, terminal=True, header='user'),
        execution=EXECUTION,
        settings=SFTSettings(steps=steps, batch=BatchSettings(ROWS, (LENGTH,)), optimizer=ADAMW, lora=lora),
        loop_settings=loop_settings,
        mesh=mesh,
        compile_threads=compile_threads,
    )


def fit(
    folder: pathlib.Path,
    chat: Chat,
    mesh: Mesh,
    *,
    steps: int,
    loop_settings: LoopSettings,
    rows: Sequence[PreferenceRow] | None = None,
    compile_threads: int = 0,
) -> TrainState:
    config = config_of(chat)
    return preference.fit(
        folder,
        lambda: params_of(config),
        rows or preference_rows(),
        config=config,
        execution=EXECUTION,
        settings=PreferenceSettings(steps=steps, batch=BatchSettings(ROWS // 2, (LENGTH,)), optimizer=ADAMW),
        loop_settings=loop_settings,
        mesh=mesh,
        compile_threads=compile_threads,
    )
