"""simrl's side of every case, through the entry points that its own jobs use.

    python -m tools.benchmark.ours JOB.json

A process of its own, started by the tool: requests come by standard input. See `protocol.py`.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import stack
from simrl.conversations.chat import ASSISTANT, Chat
from simrl.conversations.records import Example
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import Rendered
from simrl.models import placement, sharding
from simrl.models.files.load import load_model
from simrl.models.rows import bucket_widths
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.rewards import Rewards
from simrl.rl import microbatches, train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.prepare import jit_prepare
from simrl.rl.train import RLSettings
from simrl.rl.update import jit_update
from simrl.rollouts.agents import Agent, Limits, ModelAgent, assistant, opening_only
from simrl.rollouts.collect import collect
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.training import sft
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings, jit_step, make_optimizer, place_state
from simrl.training.scoring import score
from simrl.training.supervised import train_step
from tools.benchmark import inputs, rates
from tools.benchmark.job import CLIP_NORM, LEARNING_RATE, Job, pieces_of
from tools.benchmark.protocol import Bench, Message, main

STEPS = 10**6  # more than are ever measured
GRPO = AlgorithmSettings(advantage='grpo')
OPTIMIZER = OptimizerSettings(LEARNING_RATE, clip_norm=CLIP_NORM)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """The model without its parameters, and its execution."""

    config: TransformerConfig
    chat: Chat
    mesh: Mesh
    training: Execution
    sampling: Execution


def load(job: Job, bench: Bench, dtype: str) -> tuple[Model, Params]:
    """The model, and its parameters on the device, in the shards of training."""
    mesh = sharding.make_mesh(job.devices, 1, jax.devices()[: job.devices])
    config, params, tokenizer = load_model(str(job.model), dtype=dtype, mesh=mesh)
    bench.device_peak = rates.device_peak
    model = Model(
        config=config,
        chat=chat_from_huggingface(tokenizer),
        mesh=mesh,
        training=Execution(job.dtype, job.remat, job.attention),
        sampling=Execution(job.dtype),
    )
    return model, params


def load_for_sampling(job: Job, bench: Bench) -> tuple[Model, Params]:
    model, params = load(job, bench, job.dtype)
    with jax.set_mesh(model.mesh):
        params = placement.for_sampling(model.config, job.dtype, model.mesh)(params)
    answer_scores(bench, model, lambda: params)
    return model, params


def answer_scores(bench: Bench, model: Model, params: Callable[[], Params]) -> None:
    """Lets the other side check: log-probabilities of given rows, by the parameters of this moment."""
    score_rows = jax.jit(score, static_argnums=(1, 2))

    def answer(request: Message) -> Message:
        with np.load(request['rows']) as rows:
            tokens = jnp.asarray(rows['tokens'])
        trained = jnp.broadcast_to(jnp.arange(tokens.shape[1]) > 0, tokens.shape)
        scores = score_rows(params(), model.config, model.training, tokens, trained, inputs.all_ids(model.config), 1.0)
        np.save(request['output'], np.asarray(scores.log_prob))
        return {}

    bench.handlers['score'] = answer


def examples_of(job: Job) -> list[Example]:
    openings = json.loads(job.texts.read_text(encoding='utf-8'))['openings']
    return [Example(f'opening {i}', text, None, i, 'benchmark', 'train') for i, text in enumerate(openings)]


def without_ends(job: Job, speaker: ModelAgent) -> ModelAgent:
    """The same speaker, who never ends a message of its own accord: every message has the length of its budget."""
    token_mask = np.zeros(speaker.policy.spec.config.padded_vocab_size, np.bool_)
    with np.load(job.arrays) as arrays:
        content = arrays['token_mask']
    token_mask[: len(content)] = content
    return dataclasses.replace(speaker, policy=dataclasses.replace(speaker.policy, token_mask=token_mask))


def assistant_of(job: Job, model: Model, params: Params, new_tokens: int) -> ModelAgent:
    speaker = assistant(
        model.chat,
        model.config,
        params,
        model.sampling,
        max_new_tokens=new_tokens,
        sampling=Sampling(),
    )
    return without_ends(job, speaker)


def limits_of(job: Job, new_tokens: int, user_tokens: int) -> Limits:
    with np.load(job.arrays) as arrays:
        prompt = arrays['prompts'].shape[1]
    return Limits(turns=job.turns, prompt_tokens=prompt, assistant_tokens=new_tokens, user_tokens=user_tokens)


def sampled_tokens(batch: Trajectories) -> int:
    """Number of tokens of messages that were sampled, without given openings; waits for the device."""
    length, said = jax.device_get((batch.message_length, batch.num_messages))
    index = np.arange(length.shape[1])
    return int(np.sum(length, where=(index > 0) & (index < said[:, None])))


def talk(
    model: Model, user: Agent, helper: ModelAgent, examples: Sequence[Example], limits: Limits, step: int
) -> Trajectories:
    """The conversations of a step, in the assistant's view."""
    return collect(
        user, helper, examples, chat=model.chat, limits=limits, seed=0, step=step, view=ASSISTANT, mesh=model.mesh
    )[0]


def sampling(job: Job, bench: Bench) -> None:
    """Replies to openings; of one token too, which tells what prefilling takes."""
    model, params = load_for_sampling(job, bench)
    examples = examples_of(job)
    speakers = {n: assistant_of(job, model, params, n) for n in {1, job.new_tokens}}
    sampled: list[Trajectories] = []
    bench.handlers['save'] = lambda request: save_row(sampled[-1], pathlib.Path(request['output']))
    bench.ready()
    step = 0
    while True:
        new_tokens = bench.wait()['new_tokens']
        batch = talk(model, opening_only(), speakers[new_tokens], examples, limits_of(job, new_tokens, 1), step)
        bench.done(sampled=sampled_tokens(batch))
        step += 1
        sampled[:] = [batch]


def save_row(batch: Trajectories, path: pathlib.Path) -> Message:
    """Writes the first row, `[1, N]` each: tokens, which were sampled, and their log-probabilities."""
    length = int(batch.length[0])
    tokens, log_prob, role = jax.device_get([x[:1, :length] for x in (batch.tokens, batch.log_prob, batch.role)])
    np.savez(path, tokens=tokens, log_prob=log_prob, sampled=role == ASSISTANT)
    return {}


def conversations(job: Job, bench: Bench) -> None:
    """Whole conversations of a fine-tuned user and an assistant, of the same weights, from openings."""
    model, params = load_for_sampling(job, bench)
    examples = examples_of(job)
    user = fine_tuned(
        model.chat,
        model.config,
        params,
        model.sampling,
        max_new_tokens=job.new_tokens,
        settings=FineTunedSettings(sampling=Sampling()),
    )
    user, helper = without_ends(job, user), assistant_of(job, model, params, job.new_tokens)
    bench.ready()
    step = 0
    while True:
        bench.wait()
        batch = talk(model, user, helper, examples, limits_of(job, job.new_tokens, job.new_tokens), step)
        bench.done(sampled=sampled_tokens(batch))
        step += 1


def grpo_step(job: Job, bench: Bench) -> None:
    """Whole steps of `rl.train`, from one call of the reward to the next: an update, then new conversations."""
    model, params = load(job, bench, 'float32')
    answer_scores(bench, model, lambda: params)
    examples, limits = examples_of(job), limits_of(job, job.new_tokens, 1)
    speaker = assistant_of(job, model, params, job.new_tokens)
    row = limits.prompt_tokens + len(speaker.policy.spec.own_header) + job.new_tokens + 1

    def reward(batch: Trajectories) -> Rewards:
        rewards: Rewards = jax.block_until_ready(share_of_even_ids(batch))
        bench.done(sampled=sampled_tokens(batch))
        bench.wait()
        return rewards

    bench.ready()
    bench.wait()
    folder = job.scratch / 'grpo'
    try:
        train.train(
            folder,
            opening_only(),
            speaker,
            chat=model.chat,
            examples=examples,
            score=reward,
            limits=limits,
            settings=RLSettings(
                steps=STEPS,
                prompts_per_step=len(examples),
                samples_per_prompt=job.samples,
                row_buckets=(row,),
                algorithm=GRPO,
                optimizer=OPTIMIZER,
            ),
            execution=model.training,
            loop_settings=LoopSettings(log_every=STEPS, checkpoint_every=STEPS),
            seed=0,
            mesh=model.mesh,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@jax.jit
def share_of_even_ids(batch: Trajectories) -> Rewards:
    """The share of a reply's tokens that have even ids: a reward that any side can compute."""
    reply, length = batch.messages[:, 1], batch.message_length[:, 1]
    said = jnp.arange(reply.shape[1]) < length[:, None]
    value = jnp.sum(said & (reply % 2 == 0), axis=1, dtype=jnp.float32) / jnp.maximum(length, 1)
    return Rewards(value=value, valid=jnp.ones(value.shape, bool), parts={}, cause=jnp.zeros(value.shape, jnp.int32))


def supervised(job: Job, bench: Bench) -> None:
    """Gradient steps of fine-tuning on one batch."""
    model, params = load(job, bench, 'float32')
    with np.load(job.arrays) as file:
        tokens, role, trained, length = (file[name] for name in ('tokens', 'role', 'trained', 'length'))
    rows = [
        Rendered(tokens[i, :n], role[i, :n], np.zeros(n, np.int16), trained[i, :n])
        for i, n in enumerate(length.tolist())
    ]
    batch = stack(rows, job.context, job.batch)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    state, state_sharding = place_state(params, model.config, optimizer, model.mesh)
    del params
    answer_scores(bench, model, lambda: state.params)
    token_mask = inputs.all_ids(model.config)
    loss_sums = functools.partial(sft.token_losses, config=model.config, execution=model.training)
    update = jit_step(functools.partial(train_step, loss_sums=loss_sums, optimizer=optimizer), state_sharding)
    bench.ready()
    while True:
        bench.wait()
        with jax.set_mesh(model.mesh):
            state, metrics = update(state, {}, placement.shard_batch(batch, model.mesh), token_mask)
        jax.block_until_ready(state)
        bench.done(**loss_and_norm(metrics))


def update_ragged(job: Job, bench: Bench) -> None:
    """GRPO's update of ragged conversations: a gradient step on what the trained role said, rows sorted by length."""
    model, params = load(job, bench, 'float32')
    with np.load(job.arrays) as file:
        rows = {name: jnp.asarray(file[name]) for name in ('tokens', 'role', 'turn', 'length')}
        reward, length = jnp.asarray(file['reward']), file['length']
    nothing = jnp.zeros(reward.shape, jnp.int32)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    state, state_sharding = place_state(params, model.config, optimizer, model.mesh)
    del params
    answer_scores(bench, model, lambda: state.params)
    token_mask = inputs.all_ids(model.config)
    settings = dataclasses.replace(GRPO, microbatches=pieces_of(job.batch))
    update = jit_update(model.config, model.training, settings, optimizer, state_sharding=state_sharding)
    prepare = jit_prepare(trained_role=ASSISTANT, config=model.config, execution=model.training, settings=settings)
    widths = bucket_widths([job.context * eighths // 8 for eighths in range(1, 8)], job.context)
    steps = microbatches.schedule_microbatches(length, widths, settings, np.random.default_rng(0))
    with jax.set_mesh(model.mesh):
        batch, _ = prepare(
            state.params,
            None,
            inputs.trajectories_of(**rows),
            Rewards(value=reward, valid=jnp.ones(reward.shape, bool), parts={}, cause=nothing),
            [],
            token_mask=token_mask,
            temperature=1.0,
        )
    bench.ready()
    while True:
        bench.wait()
        with jax.set_mesh(model.mesh):
            state, metrics = update(state, batch, steps, token_mask, 1.0)
        jax.block_until_ready(state)
        bench.done(**loss_and_norm(metrics))


def loss_and_norm(metrics: dict[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    return {name: float(metrics[name][0] / metrics[name][1]) for name in ('loss', 'grad_norm')}


CASES: dict[str, Callable[[Job, Bench], None]] = {
    'sampling': sampling,
    'update_full': supervised,
    'update_ragged': update_ragged,
    'grpo_step': grpo_step,
    'conversations': conversations,
    'sft': supervised,
    'rates': rates.measure,
}


if __name__ == '__main__':
    main(CASES)
