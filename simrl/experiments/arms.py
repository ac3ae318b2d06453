"""The stages in which models talk: the reward's scale, one RL run per simulator and seed, and the comparison.

As those of `jobs.py` they write into their own folder and leave a `result.json`; all three start conversations from
people's openings.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example, example_of
from simrl.evaluation.win_rate import win_rate
from simrl.experiments.jobs import (
    RESULT_FILE,
    Compute,
    initial_params,
    load_params,
    metric_lines,
    save_params,
    save_result,
)
from simrl.experiments.sources import Data, Model, subsample
from simrl.models import placement, sharding
from simrl.models.transformer import Params
from simrl.rewards.reward_model import RewardScale, conversation_rewards, frame_of, score_conversations
from simrl.rewards.rewards import Rewards
from simrl.rl import train
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, ModelAgent, assistant, fitting, opening_only
from simrl.rollouts.collect import collect_batches
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories, transcripts
from simrl.run import config as config_lib
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.simulators.role_play import RolePlaySettings, role_play
from simrl.training import partition

SIMULATORS = ('role_play', 'fine_tuned')  # an arm is named after its simulator
REPLY_STEP = 2**31 - 1  # the step of single replies in `row_keys`: no training run draws these numbers


@dataclasses.dataclass(frozen=True)
class Talking:
    """Who talks and how: the same for every arm, whichever of the simulators it trains against."""

    limits: Limits
    assistant: Sampling = dataclasses.field(default_factory=Sampling)
    role_play: RolePlaySettings = dataclasses.field(default_factory=RolePlaySettings)
    fine_tuned: FineTunedSettings = dataclasses.field(default_factory=FineTunedSettings)


def possible_simulators(chat: Chat) -> tuple[str, ...]:
    """The simulators that there can be with a chat template: a prompted one needs a place for its system text."""
    return SIMULATORS if chat.system_header is not None else ('fine_tuned',)


def assistant_of(model: Model, params: Params, talking: Talking, compute: Compute) -> ModelAgent:
    """The model as an assistant: the template's default system text, and the opening."""
    return assistant(
        model.chat,
        model.config,
        params,
        compute.sampling,
        max_new_tokens=talking.limits.assistant_tokens,
        sampling=talking.assistant,
    )


def simulator_of(name: str, model: Model, params: Params, talking: Talking, compute: Compute) -> ModelAgent:
    """The user simulator `name`.

    Raises:
        ValueError: there is no such simulator, or not with this chat template.
    """
    if name in SIMULATORS and name not in possible_simulators(model.chat):
        raise ValueError(
            f'simulator {name!r}: expected a chat template that takes a system text, found one that does not '
            f'({model.chat.no_system_reason})'
        )
    common = (model.chat, model.config, params, compute.sampling)
    if name == 'role_play':
        return role_play(*common, max_new_tokens=talking.limits.user_tokens, settings=talking.role_play)
    if name == 'fine_tuned':
        return fine_tuned(*common, max_new_tokens=talking.limits.user_tokens, settings=talking.fine_tuned)
    raise ValueError(f'unknown simulator {name!r}, expected one of {", ".join(SIMULATORS)}')


def openings_of(
    conversations: Sequence[Conversation], model: Model, talking: Talking, compute: Compute
) -> list[Example]:
    """The openings that fit into the prompts of the assistant and of every simulator; prints how many do not.

    All arms start from the same people, so an opening that one simulator's prompt is too long for is in none. That
    holds for arms that are added later as well: whichever arms a run has now, it is all simulators that there can be
    with this chat template.
    """
    sides = [simulator_of(name, model, model.params, talking, compute) for name in possible_simulators(model.chat)]
    sides.append(assistant_of(model, model.params, talking, compute))
    prompt_tokens = talking.limits.prompt_tokens
    kept, dropped = fitting([example_of(c) for c in conversations], sides, model.chat, prompt_tokens)
    if not kept:
        raise ValueError(f'Limits.prompt_tokens: expected room for at least one opening, found none of {dropped} fits')
    print(f'openings: {len(kept)}; with a prompt of over {prompt_tokens} tokens: {dropped}', flush=True)
    return kept


@dataclasses.dataclass(frozen=True)
class ReplySettings:
    """How single replies to openings are sampled, for the reward's scale and for the comparison."""

    openings: int | None  # how many, chosen by seed; None: all that fit
    batch_size: int  # replies sampled at once
    seed: int = 0

    def __post_init__(self) -> None:
        if self.openings is not None and self.openings < 1:
            raise ValueError(f'ReplySettings.openings: expected at least 1, or None, found {self.openings}')
        if self.batch_size < 1:
            raise ValueError(f'ReplySettings.batch_size: expected at least 1, found {self.batch_size}')


def judged_replies(
    examples: Sequence[Example],
    params: Params,
    judge: Params,
    model: Model,
    talking: Talking,
    settings: ReplySettings,
    compute: Compute,
    mesh: Mesh,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One reply of an assistant to each opening, and a reward model's score of it.

    Every assistant draws the same numbers for the same opening.

    Returns:
        float32 `[len(examples)]`, and the conversations.
    """
    speaker = assistant_of(model, params, talking, compute)
    frame, scores, said = frame_of(model.chat), [], []
    for chosen, batch in collect_batches(
        opening_only(),
        speaker,
        examples,
        chat=model.chat,
        limits=dataclasses.replace(talking.limits, turns=1),
        seed=settings.seed,
        step=REPLY_STEP,
        batch_size=settings.batch_size,
        mesh=mesh,
        name='replies',
    ):
        with jax.set_mesh(mesh):
            score, _ = score_conversations(
                judge,
                batch,
                config=model.config,
                execution=compute.training,
                frame=frame,
                later_tokens=talking.limits.assistant_tokens,
            )
        batch, score = placement.to_host((batch, score))
        scores.append(score[: len(chosen), 0])
        rows = transcripts(batch, model.chat.decode)[: len(chosen)]
        said += [{'example': example.id, **row} for example, row in zip(chosen, rows, strict=True)]
    return np.concatenate(scores), said


def measure_scale(
    folder: pathlib.Path,
    model: Model,
    data: Data,
    reward_stage: pathlib.Path,
    talking: Talking,
    settings: ReplySettings,
    compute: Compute,
) -> None:
    """The mean and standard deviation of the reward model's scores of the initial assistant's replies."""
    mesh = compute.mesh.make()
    examples = openings_of(data.conversations_of('train'), model, talking, compute)
    chosen = subsample(examples, settings.openings, settings.seed)
    reward_params = load_params(reward_stage, model.config, ('reward_head',), mesh, sharding.SAMPLING_RULES)
    initial = initial_params(model, mesh)
    scores, said = judged_replies(chosen, initial, reward_params, model, talking, settings, compute, mesh)
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    if not spread > 0:
        raise ValueError(f'{folder}: the reward model gives all {len(scores)} replies the same score: no scale')
    save_result(folder, {'mean': float(np.mean(scores)), 'std': spread, 'replies': len(scores), 'shown': said[:3]})


@dataclasses.dataclass(frozen=True)
class ArmStages:
    """The stage folders that an arm reads."""

    reward_model: pathlib.Path
    scale: pathlib.Path
    simulator: pathlib.Path | None  # of a fine-tuned simulator; None: the simulator is the initial model


def train_arm(
    folder: pathlib.Path,
    model: Model,
    data: Data,
    simulator: str,
    seed: int,
    read: ArmStages,
    talking: Talking,
    settings: RLSettings,
    compute: Compute,
) -> None:
    """Trains one side against the other from people's openings."""
    mesh = compute.mesh.make()
    simulator_params = model.params
    if read.simulator is not None:
        simulator_params = load_params(read.simulator, model.config, (), mesh, sharding.SAMPLING_RULES)
    user = simulator_of(simulator, model, simulator_params, talking, compute)
    helper = assistant_of(model, model.params, talking, compute)
    examples = openings_of(data.conversations_of('train'), model, talking, compute)
    reward_params = load_params(read.reward_model, model.config, ('reward_head',), mesh, sharding.SAMPLING_RULES)
    measured = json.loads((read.scale / RESULT_FILE).read_text())
    scale = RewardScale(mean=jnp.float32(measured['mean']), std=jnp.float32(measured['std']))
    frame = frame_of(model.chat)

    def score(batch: Trajectories) -> Rewards:
        scores = score_conversations(
            reward_params,
            batch,
            config=model.config,
            execution=compute.training,
            frame=frame,
            later_tokens=max(talking.limits.assistant_tokens, talking.limits.user_tokens),
            num_microbatches=settings.algorithm.minibatches * settings.algorithm.microbatches,
        )
        return conversation_rewards(*scores, batch.end_reason, scale)

    trained = helper if settings.trained == 'assistant' else user
    state = train.train(
        folder,
        user,
        helper,
        chat=model.chat,
        examples=examples,
        score=score,
        limits=talking.limits,
        settings=settings,
        execution=compute.training,
        loop_settings=dataclasses.replace(compute.loop, evaluate_every=0),
        seed=seed,
        mesh=mesh,
        rows_in_flight=compute.rows_in_flight,
        hyperparameters=config_lib.to_dict(settings),
    )
    decoder = partition.whole_decoder(
        trained.policy.params, state.params, trained.policy.spec.config, settings.lora, mesh
    )
    save_params(folder, decoder)
    lines = metric_lines(folder)
    save_result(
        folder,
        {
            'openings': len(examples),
            'reward_first': lines[0]['reward/mean'],
            'reward_last': lines[-1]['reward/mean'],
            'ended_by_signal': mean_over_steps(lines, 'rollout/end_signal'),
            'useful_steps': mean_over_steps(lines, 'rollout/useful_steps'),
        },
    )


def mean_over_steps(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a metric over all steps: a line stands for the steps since the one before."""
    return float(np.average([line[name] for line in lines], weights=np.diff([0, *(line['step'] for line in lines)])))


def evaluate(
    folder: pathlib.Path,
    model: Model,
    data: Data,
    judge_stage: pathlib.Path,
    assistant_stage: pathlib.Path | None,
    talking: Talking,
    settings: ReplySettings,
    compute: Compute,
) -> None:
    """An assistant answers held-out openings, the same for all of them, and the judge scores each reply.

    Args:
        assistant_stage: the stage folder of a trained assistant; None: the initial one.
    """
    mesh = compute.mesh.make()
    judge = load_params(judge_stage, model.config, ('reward_head',), mesh, sharding.SAMPLING_RULES)
    fits = openings_of(data.conversations_of('test'), model, talking, compute)
    examples = subsample(fits, settings.openings, settings.seed)
    if assistant_stage is None:
        params = initial_params(model, mesh)
    else:
        params = load_params(assistant_stage, model.config, (), mesh, sharding.SAMPLING_RULES)
    scores, said = judged_replies(examples, params, judge, model, talking, settings, compute, mesh)
    replies = [row | {'score': score} for row, score in zip(said, scores.tolist(), strict=True)]
    save_result(folder, {'mean_score': float(np.mean(scores)), 'replies': replies})


def compare(workdir: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Win rates of assistants against the initial one, from what `evaluate` left in evaluate/NAME.

    An observation is an opening that both answered; intervals are over openings.
    """
    results = {
        name: json.loads((workdir / 'evaluate' / name / RESULT_FILE).read_text()) for name in ('initial', *names)
    }
    scores = {name: [reply['score'] for reply in result['replies']] for name, result in results.items()}
    people = [reply['messages'][0]['content'] for reply in results['initial']['replies']]
    return {
        'openings': len(people),
        'assistants': {
            name: {
                'mean_score': result['mean_score'],
                'win_rate': None if name == 'initial' else win_rate(scores[name], scores['initial'], people),
            }
            for name, result in results.items()
        },
    }
