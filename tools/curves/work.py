"""The work that the curves measure, through the entry points that jobs use: all calls of these are here.

Conversations are of two speakers with the same weights that never end a message of their own accord, so that every
message has the length of its budget. Updates are GRPO's of rows of random tokens.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement, sharding, transformer
from simrl.models.files.load import load_model
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import Rewards
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.microbatches import schedule_microbatches
from simrl.rl.prepare import Batch, jit_prepare
from simrl.rl.update import add_gradients, jit_update
from simrl.rollouts import dialogue
from simrl.rollouts.agents import ModelAgent, Policy, assistant
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.prompts import Prompts, prefill_prompts, prompts_of
from simrl.rollouts.state import Dialogue, init_dialogue, row_keys
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.training.optimizer import OptimizerSettings, TrainState, make_optimizer, place_state
from tools.benchmark import inputs, models
from tools.benchmark.job import Dtype, Remat

GRPO = AlgorithmSettings(advantage='grpo')
OPTIMIZER = OptimizerSettings(learning_rate=1e-6)
STEPS = 10**6  # more than are ever measured


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model, its parameters on one device in float32, and how it is computed."""

    config: TransformerConfig
    chat: Chat
    params: Params
    mesh: Mesh
    execution: Execution


def load(source: str, folder: pathlib.Path, dtype: Dtype, remat: Remat) -> Model:
    """The model that `source` names, as the benchmark's: `random:NAME`, or what `load_model` takes."""
    config, chat = models.prepare(source, folder, 'float32')
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    params = load_model(str(folder), mesh=mesh)[1]
    return Model(config, chat, params, mesh, Execution(dtype, remat))


# Conversations.


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """Two agents, and their prompts: an opening that the assistant is to answer."""

    mesh: Mesh
    user: ModelAgent
    assistant: ModelAgent
    prompts: Prompts
    keys: jax.Array


def scene_of(model: Model, rows: int, opening_words: int, message_tokens: int) -> Scene:
    """As many conversations as `rows`; every sampled message has `message_tokens` tokens."""
    common = model.chat, model.config, model.params, Execution(model.execution.dtype)
    content = inputs.content_ids(model.chat, model.config.padded_vocab_size)
    user, helper = (
        for_sampling(
            dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, token_mask=content)), model.mesh
        )
        for agent in (
            fine_tuned(*common, max_new_tokens=message_tokens, settings=FineTunedSettings(sampling=Sampling())),
            assistant(*common, max_new_tokens=message_tokens, sampling=Sampling()),
        )
    )
    opening = ' '.join(['hello'] * opening_words)
    examples = [Example(f'opening {i}', opening, None, i, 'curves', 'train') for i in range(rows)]
    longest = max(len(agent.prompt(examples[0])) for agent in (user, helper))
    prompts = prompts_of(examples, user, helper, model.chat, samples=1, prompt_tokens=longest)
    with jax.set_mesh(model.mesh):
        prompts = placement.shard_batch(prompts, model.mesh)
        keys = row_keys(0, 0, jnp.asarray(prompts.example), jnp.asarray(prompts.sample))
    return Scene(model.mesh, user, helper, prompts, keys)


def needed_capacity(scene: Scene, turns: int) -> int:
    """The tokens of a context that conversations of so many turns fit into, checked against the model's positions."""
    prompt_tokens = scene.prompts.assistant.tokens.shape[1]
    pairs = ((scene.user, scene.assistant), (scene.assistant, scene.user))
    return max(dialogue.capacity(own.policy.spec, other.max_new_tokens, prompt_tokens, turns) for own, other in pairs)


def opened(scene: Scene, capacity: int, turns: int) -> Dialogue:
    """Conversations before their first sampled message, the assistant's, in contexts of `capacity` tokens."""
    with jax.set_mesh(scene.mesh):
        return _opened(scene.user.policy, scene.assistant.policy, scene.prompts, capacity=capacity, turns=turns)


@functools.partial(jax.jit, static_argnames=('capacity', 'turns'))
def _opened(user: Policy, helper: Policy, prompts: Prompts, *, capacity: int, turns: int) -> Dialogue:
    return init_dialogue(
        prefill_prompts(user, prompts.user, capacity),
        prefill_prompts(helper, prompts.assistant, capacity),
        jnp.asarray(prompts.opening),
        jnp.asarray(prompts.opening_length),
        jnp.asarray(prompts.given),
        turns=turns,
        max_new_tokens=(user.max_new_tokens, helper.max_new_tokens),
    )


def said(scene: Scene, state: Dialogue, role: int) -> Dialogue:
    """The conversations with one message more, of `role`, as a rollout adds it; `state` may be donated."""
    user, helper = scene.user.policy, scene.assistant.policy
    longest = [int(jnp.max(view.length)) for view in (state.user, state.assistant) if view is not None]
    with jax.set_mesh(scene.mesh):
        state = dialogue.grow_caches(user, helper, state, longest, role)
        return dialogue.add_message(user, helper, state, scene.keys, role=role)


def check_said(scene: Scene, state: Dialogue, messages: int) -> None:
    """Refuses conversations that do not have so many sampled messages, each as long as its budget.

    Raises:
        ValueError: they do not: what was measured is not what it is called.
    """
    length = np.asarray(state.message_length)[:, 1:]
    agents = (scene.assistant, scene.user)
    expected = [agents[i % 2].max_new_tokens for i in range(messages)]  # the assistant's first
    if not (length[:, :messages] == expected).all() or length[:, messages:].any():
        raise ValueError(f'expected {messages} messages of {expected} tokens in every conversation, found {length}')


# Updates.


def update_of(model: Model) -> Callable[[Batch], None]:
    """A function that makes one update by a batch, and waits for it."""
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    state, state_sharding = place_state(model.params, model.config, optimizer, model.mesh)
    update = jit_update(model.config, model.execution, GRPO, optimizer, state_sharding=state_sharding)
    held: list[TrainState] = [state]  # an update donates it

    def run(batch: Batch) -> None:
        with jax.set_mesh(model.mesh):
            rows, width = batch.tokens.shape
            steps = schedule_microbatches(np.full(rows, width), (width,), GRPO, np.random.default_rng(0))
            held[0], _ = update(held[0], batch, steps, inputs.all_ids(model.config), 1.0)
        jax.block_until_ready(held)

    return run


def batch_of(model: Model, rows: int, length: int, trained: int) -> Batch:
    """Rows of `length` random tokens, of which the last `trained` of each row are the assistant's.

    Raises:
        ValueError: there are not so many: the first token is predicted by none.
    """
    if not 0 < trained < length:
        raise ValueError(f'expected 1 to {length - 1} trained tokens in a row of {length}, found {trained}')
    prepare = jit_prepare(trained_role=ASSISTANT, config=model.config, execution=model.execution, settings=GRPO)
    with jax.set_mesh(model.mesh):
        tokens, role, reward = placement.shard_batch(_rows(model.config, rows, length, trained), model.mesh)
        nothing = jnp.zeros(reward.shape, jnp.int32)
        batch, _ = prepare(
            model.params,
            None,
            inputs.trajectories_of(tokens, role, jnp.zeros(tokens.shape, jnp.int32), jnp.full(reward.shape, length)),
            Rewards(value=reward, valid=jnp.ones(reward.shape, bool), parts={}, cause=nothing),
            [],  # GRPO's one update has no pass before it
            token_mask=inputs.all_ids(model.config),
            temperature=1.0,
        )
    return batch


def _rows(config: TransformerConfig, rows: int, length: int, trained: int) -> tuple[np.ndarray, ...]:
    """Tokens, roles and rewards."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    role = np.full((rows, length), USER, np.int8)
    role[:, -trained:] = ASSISTANT
    return tokens, role, random.random(rows).astype(np.float32)


def gradient_bytes(model: Model, vocab_size: int, rows: int, length: int) -> int:
    """The temporary memory of the compiled gradients of a minibatch, bytes: without parameters and gradients.

    Nothing is computed: the model may be any size, with a vocabulary of any.

    Raises:
        ValueError: the compiler of this device does not tell.
    """
    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    params = jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0))

    def empty_batch() -> Batch:
        numbers = jnp.zeros((rows, length))
        return Batch(
            tokens=numbers.astype(jnp.int32),
            trained=numbers > 0,
            sampler_log_prob=numbers,
            old_log_prob=numbers,
            ref_log_prob=None,
            old_value=None,
            returns=None,
            advantage=numbers,
        )

    gradients = jax.jit(
        functools.partial(add_gradients, config=config, execution=model.execution, settings=GRPO),
        static_argnames='width',
    )
    with jax.set_mesh(model.mesh):
        lowered = gradients.lower(
            params,
            None,
            jax.eval_shape(empty_batch),
            jax.ShapeDtypeStruct((rows,), bool),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((config.padded_vocab_size,), bool),
            1.0,
            {},
            width=length,
        )
        analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise ValueError(f'expected a compiler that tells its memory, found {jax.default_backend()} that does not')
    return int(analysis.temp_size_in_bytes)
