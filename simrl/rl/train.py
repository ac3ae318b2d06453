"""RL of one agent in conversations with a frozen other one.

One step:
1. Examples are drawn; each starts `samples_per_prompt` conversations.
2. Both agents converse (`collect`).
3. The conversations are scored by a function or a judge of the caller's; those without a reward that can be used are
   masked. A judge reads one piece of the conversations while the next is sampled (`rows_in_flight`); and an agent off
   the device replies to one while another is sampled. With a `FutureScore` each reply is scored by conversations that
   continue from it (`futures`).
4. Rewards become advantages (`prepare`), then the update (`update`).

Everything random is a function of (seed, step, example, sample), and never of the other agent: arms of one experiment
see the same examples in the same order and draw the same uniform numbers.
"""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement, transformer
from simrl.models.lora import LoRASettings
from simrl.models.rows import bucket_widths, split_by_length
from simrl.models.transformer import Execution, Params
from simrl.rewards.rewards import NOT_FINITE, Score
from simrl.rl import microbatches, programs
from simrl.rl.algorithm import GROUPED, AlgorithmSettings
from simrl.rl.futures import FutureScore, check_replayable, collect_with_futures
from simrl.rl.judged import Judged, causes_of, check_judged, collect_judged, print_causes
from simrl.rl.logs import conversation_rows, message_metrics, reward_metrics
from simrl.rl.prepare import jit_prepare, mask_incomplete, prepare_programs
from simrl.rl.update import jit_update, update_programs
from simrl.rl.validation import Validation, ValidationSettings, validation_rewards
from simrl.rollouts.agents import Agent, Limits, ModelAgent, mesh_of
from simrl.rollouts.collect import for_sampling, rows_at_once
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.schedule import Batching
from simrl.rollouts.trajectories import rollout_metrics
from simrl.run import compiles
from simrl.run.config import NO_EFFECT
from simrl.run.metrics import Metrics
from simrl.training import loop, partition
from simrl.training.loop import LoopSettings, StepResult
from simrl.training.optimizer import OptimizerSettings, TrainState, make_optimizer, place_state

UPDATE_STREAM = 1  # with the seed and the step: the order of rows in an update


@dataclasses.dataclass(frozen=True)
class RLSettings:
    """An RL run. `Limits` has the sizes of conversations, each agent how it is sampled."""

    steps: int
    prompts_per_step: int
    samples_per_prompt: int  # conversations of each prompt: the group of the critic-free estimators
    # Tokens; rows of a microbatch are cut to the shortest that fits them.
    row_buckets: tuple[int, ...] = dataclasses.field(metadata=NO_EFFECT)
    algorithm: AlgorithmSettings
    optimizer: OptimizerSettings
    trained: Literal['assistant', 'user'] = 'assistant'
    lora: LoRASettings | None = None  # None: every weight is trained
    validation: ValidationSettings | None = None  # by which a checkpoint is chosen; None: the last step is the result

    def __post_init__(self) -> None:
        for field in ('steps', 'prompts_per_step', 'samples_per_prompt'):
            if getattr(self, field) < 1:
                raise ValueError(f'RLSettings.{field}: expected at least 1, found {getattr(self, field)}')
        if not self.row_buckets or list(self.row_buckets) != sorted(set(self.row_buckets)):
            raise ValueError(f'RLSettings.row_buckets: expected rising lengths, found {self.row_buckets}')
        rows, algorithm = self.prompts_per_step * self.samples_per_prompt, self.algorithm
        algorithm.rows_per_microbatch(rows)
        if algorithm.advantage in GROUPED and self.samples_per_prompt < 2:
            raise ValueError(
                f'RLSettings.samples_per_prompt: expected at least 2 (advantage {algorithm.advantage!r} compares the '
                f'conversations of a prompt), found {self.samples_per_prompt}'
            )
        if algorithm.advantage == 'reinforce_pp' and rows < 2:
            raise ValueError(
                "RLSettings.prompts_per_step x samples_per_prompt: expected at least 2 (advantage 'reinforce_pp' "
                f'compares the conversations of a step), found {rows}'
            )
        if algorithm.critic_warmup_steps >= (updates := self.steps * algorithm.updates_per_batch):
            raise ValueError(
                f'RLSettings.algorithm.critic_warmup_steps: expected fewer than the {updates} updates of the run, of '
                f'which the first train the critic alone, found {algorithm.critic_warmup_steps}'
            )

    @property
    def role(self) -> int:
        return ASSISTANT if self.trained == 'assistant' else USER


def examples_of_step(num_examples: int, per_step: int, seed: int, step: int) -> list[int]:
    """The examples of a step: epochs of seeded permutations.

    An epoch's last examples that do not fill a step are left to later epochs, so that no step has an example twice:
    its conversations would be the same ones.
    """
    epoch, step_of_epoch = divmod(step, num_examples // per_step)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return [int(i) for i in order[step_of_epoch * per_step : (step_of_epoch + 1) * per_step]]


def train(
    folder: pathlib.Path,
    user: Agent | Callable[[], Agent],
    assistant: Agent | Callable[[], Agent],
    *,
    chat: Chat,
    examples: Sequence[Example],
    score: Score | FutureScore,
    limits: Limits,
    settings: RLSettings,
    execution: Execution,
    loop_settings: LoopSettings,
    seed: int,
    mesh: Mesh,
    rows_in_flight: int | None = None,
    batching: Batching = 'static',
    compile_threads: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
    validation: Validation | None = None,
    further_metrics: Callable[[], Metrics] = dict,
) -> TrainState:
    """Trains one agent from its own parameters, or adapters to them; they are the frozen reference too.

    Once the first step begins, nothing here holds the parameters that the agents came with: the reference has its own
    in the compute dtype, or the same arrays where those are in it already. A caller that keeps an agent keeps its
    parameters: a call does while it lasts, unless it gets a function that makes the agent.

    Args:
        folder: of the run; see `loop.run`.
        user, assistant: the one that `settings.trained` names is on the device, with its initial params; the other one
            is frozen. Or functions that make them.
        examples: what conversations start from; their prompts must fit (`agents.fitting`).
        score: conversations -> rewards, or a judge, also of futures; it sees messages and no prompt of the simulator.
            Conversations that a failure ended are masked after it.
        execution: of the update; rollouts use that of each agent's spec.
        seed: of this run: order of examples, conversations, order of rows, the adapters' start.
        rows_in_flight, batching: conversations of a step in the device's batch at once, and how they share it; see
            `collect`.
        compile_threads: threads that compile the programs before the first step; 0: each is compiled once it is called.
        validation: conversations between steps; None: none.
        further_metrics: called once each step; returns metrics of what happened since the step before.

    Returns:
        The state after the last step; `partition.whole_decoder` makes one model of it.

    Raises:
        ValueError: settings that do not fit each other; besides what `loop.run` raises.
        ConversationError: too many conversations of a step, or of a validation, have no reward.
    """
    user, assistant = (side() if callable(side) else side for side in (user, assistant))
    trained, partner = (user, assistant) if settings.role == USER else (assistant, user)
    trained = check_trained(trained)
    check_agents(user, assistant, chat, limits)
    if (own := mesh_of(trained, mesh)) != mesh:
        raise ValueError(f'the trained agent: expected the mesh of training, found its own, {dict(own.shape)}')
    if isinstance(score, FutureScore):
        check_replayable(user, settings.role)
    collect_scored: Callable[..., Judged] = collect_with_futures if isinstance(score, FutureScore) else collect_judged
    samples = settings.samples_per_prompt
    rows = settings.prompts_per_step * samples
    if len(examples) < settings.prompts_per_step:
        raise ValueError(
            f'RLSettings.prompts_per_step: expected at most the {len(examples)} examples there are, '
            f'found {settings.prompts_per_step}'
        )
    config = trained.policy.spec.config
    own_token_mask, temperature = jnp.asarray(trained.policy.token_mask), trained.policy.temperature
    trained = dataclasses.replace(trained, policy=dataclasses.replace(trained.policy, token_mask=own_token_mask))

    params, frozen = partition.trained_and_frozen(
        trained.policy.params, config, settings.lora, seed=seed, dtype=execution.dtype, mesh=mesh
    )
    reference = None
    if settings.algorithm.kl != 'none':
        # A frozen decoder is the reference itself, and not stored twice.
        reference = frozen or partition.frozen_decoder(params, config, dtype=execution.dtype, mesh=mesh)
    trained, partner = trained.with_params({}), for_sampling(partner, mesh)
    user, assistant = (trained, partner) if settings.role == USER else (partner, trained)
    if settings.algorithm.advantage == 'gae':
        params = params | {'value_head': transformer.init_head(config)}
    optimizer = make_optimizer(settings.optimizer, settings.steps * settings.algorithm.updates_per_batch)
    state, state_sharding = place_state(params, config, optimizer, mesh)
    del params
    update = jit_update(config, execution, settings.algorithm, optimizer, state_sharding=state_sharding)
    preparing: dict[str, Any] = {
        'trained_role': settings.role,
        'config': config,
        'execution': execution,
        'settings': settings.algorithm,
        'episode': 'turn' if isinstance(score, FutureScore) else 'conversation',
    }
    prepare = jit_prepare(**preparing)

    def agents_with(params: Params) -> tuple[Agent, Agent]:
        own = for_sampling(trained.with_params(params), mesh)
        return (own, partner) if settings.role == USER else (partner, own)

    walk = functools.partial(
        programs.training_programs,
        examples=examples,
        score=score,
        chat=chat,
        limits=limits,
        view=settings.role,
        mesh=mesh,
        rows=rows,
        size=rows_at_once(rows, rows_in_flight),
        batching=batching,
        openings=(settings.prompts_per_step, *([] if validation is None else [rows])),
        learning=functools.partial(
            programs.learning_programs,
            state=state,
            frozen=frozen,
            reference=reference,
            prepare=prepare_programs(**preparing),
            update=update_programs(config, execution, settings.algorithm, optimizer, state_sharding=state_sharding),
            settings=settings.algorithm,
            row_buckets=settings.row_buckets,
            token_mask=own_token_mask,
            temperature=temperature,
            mesh=mesh,
        ),
    )
    since = time.monotonic()

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, StepResult]:
        nonlocal since
        order = examples_of_step(len(examples), settings.prompts_per_step, seed, step)
        chosen = [examples[i] for i in order]
        of_row = [example for example in chosen for _ in range(samples)]
        found = collect_scored(
            *agents_with({**frozen, **state.params}),
            chosen,
            score,
            chat=chat,
            limits=limits,
            seed=seed,
            step=step,
            view=settings.role,
            mesh=mesh,
            samples=samples,
            rows_in_flight=rows_in_flight,
            batching=batching,
        )
        batch, reasons = found.batch, found.reasons
        since, before = time.monotonic(), since
        timed: dict[str, tuple[Any, Any]] = {  # shares of the time since the conversations of the last step
            f'time/waiting_for_{name}': (seconds, since - before) for name, seconds in found.waited.items()
        }
        for reason, count in collections.Counter(found.failures.values()).items():
            print(f'step {step}: {count} conversations ended by a failure of the other agent: {reason}', flush=True)
        for reason, count in collections.Counter(found.unjudged.values()).items():
            print(f'step {step}: {count} conversations were not judged: {reason}', flush=True)
        rewards = mask_incomplete(found.rewards, batch, trained_role=settings.role, settings=settings.algorithm)
        length = placement.to_host(batch.length)  # waits for the conversations; the reward may still be computed
        widths = bucket_widths(settings.row_buckets, batch.tokens.shape[1])
        num_microbatches = settings.algorithm.minibatches * settings.algorithm.microbatches
        prepared, prepare_metrics = prepare(
            {**frozen, **state.params},
            reference,
            batch,
            rewards,
            split_by_length(np.arange(len(length)), length, widths, num_microbatches),
            token_mask=own_token_mask,
            temperature=temperature,
        )
        causes = causes_of(placement.to_host(rewards), reasons)
        print_causes(f'step {step}', [cause for cause in causes.values() if cause == NOT_FINITE])
        check_judged(f'step {step}', causes, len(length), loop_settings.max_unjudged)
        random = np.random.default_rng([seed, step, UPDATE_STREAM])
        steps = microbatches.schedule_microbatches(length, widths, settings.algorithm, random)
        state, update_metrics = update(state, prepared, steps, own_token_mask, temperature, frozen)
        host_batch, host_rewards = placement.to_host((batch, rewards))
        rows = conversation_rows(host_batch, host_rewards, user, of_row, samples, chat, seed, reasons)
        metrics = timed | rollout_metrics(batch) | reward_metrics(rewards) | prepare_metrics | update_metrics
        metrics.update(further_metrics())
        metrics.update(message_metrics(rows, user, of_row))
        shown = rows[: loop_settings.saved_conversations]
        return state, StepResult(metrics, shown, tokens=jnp.sum(batch.length))

    def validate(validation: Validation, state: TrainState, step: int) -> Metrics:
        rewards = validation_rewards(
            *agents_with({**frozen, **state.params}),
            validation,
            name=f'validation after step {step}',
            max_unjudged=loop_settings.max_unjudged,
            chat=chat,
            limits=limits,
            seed=seed,
            view=settings.role,
            mesh=mesh,
            batch_size=settings.prompts_per_step * settings.samples_per_prompt,
            rows_in_flight=rows_in_flight,
            batching=batching,
        )
        validation.record(step, rewards, {name: x for name, x in state.params.items() if name != 'value_head'})
        judged = np.isfinite(rewards)
        return {
            'validation/reward': (float(np.sum(rewards[judged])), float(np.sum(judged))),
            'validation/unjudged': (float(np.sum(~judged)), float(len(rewards))),
        }

    with compiles.compilations() as compiled, jax.set_mesh(mesh):
        bound = compiles.counted(walk(user, assistant))
        print(f'rl: {compiles.stated(bound)}', flush=True)
        if compile_threads:
            compiles.compile_ahead('rl', walk(*agents_with({**frozen, **state.params})), compile_threads)
        last = loop.run(
            folder,
            state,
            step_fn,
            dataclasses.replace(loop_settings, evaluate_every=0 if validation is None else validation.settings.every),
            num_steps=settings.steps,
            name='rl',
            evaluate_fn=None if validation is None else functools.partial(validate, validation),
            hyperparameters={**(hyperparameters or {}), 'programs_at_most': sum(bound.values())},
        )
    print(f'rl: {compiles.compared(bound, compiled)}', flush=True)
    return last


def check_trained(agent: Agent) -> ModelAgent:
    """Refuses an agent that cannot be trained: off the device, or not sampled by temperature alone."""
    if not isinstance(agent, ModelAgent):
        raise ValueError(f'RLSettings.trained: expected an agent on the device, found a {type(agent).__name__}')
    spec = agent.policy.spec
    if spec.top_k or spec.top_p < 1 or spec.min_p:
        raise ValueError(
            'the trained agent: expected sampling by temperature alone (top_k=0, top_p=1, min_p=0), found '
            f'top_k={spec.top_k}, top_p={spec.top_p}, min_p={spec.min_p}'
        )
    if not agent.policy.temperature > 0:
        raise ValueError(f'the trained agent: expected a temperature above 0, found {agent.policy.temperature}')
    return agent
