"""Do the work of the stages in which agents talk: train an assistant, measure it, let it meet simulators.

Each function gets its stage's folder first and leaves `result.json` there; training leaves `params/` as well.
"""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simrl.conversations.batches import BatchSettings
from simrl.conversations.records import Example
from simrl.evaluation.fidelity.likelihood import row_log_likelihoods
from simrl.experiments.candidates import Candidates
from simrl.experiments.endpoints import usage_metrics
from simrl.experiments.outputs import metric_lines, save_params, save_result
from simrl.experiments.replies import columns_of, scored_conversations
from simrl.experiments.scene import Measure, Scene
from simrl.rewards.rewards import Score
from simrl.rl import train as rl
from simrl.rl.futures import FutureScore
from simrl.rl.validation import Validation
from simrl.rollouts.agents import Agent, Limits, ModelAgent, agent_for, fitting, mesh_of
from simrl.rollouts.collect import ConversationError, for_sampling
from simrl.rollouts.trajectories import missed_signals, repeated_messages
from simrl.run import config as config_lib
from simrl.run.config import ConfigError
from simrl.training import partition

MATRIX_STEP = 2**31 - 4  # in the keys of conversations, far above the steps of training: no two uses draw the same
CURVES = (
    *('step', 'reward/mean', 'reward/unjudged', 'rollout/end_signal', 'rollout/useful_steps', 'rollout/truncated_user'),
    *('rollout/message_tokens_assistant', 'rollout/truncated_assistant'),
    *('kl_k3', 'entropy', 'groups', 'groups_zero_variance'),
)


def train_arm(folder: pathlib.Path, *, scene: Scene, arm: str, seed: int) -> None:
    """RL-trains the initial assistant against an arm's simulator."""
    settings, compute = scene.settings.rl, scene.compute
    mesh = compute.mesh.make()
    examples = scene.training_examples()
    validated = [] if settings.validation is None else scene.validation_examples(settings.validation.examples)
    candidates, validation = None, None
    if settings.validation is not None:
        candidates = Candidates(folder, settings.validation, [example.id for example in validated])
        reward = scene.reward(validated)
        whole = reward.score if isinstance(reward, FutureScore) else reward  # what means of futures estimate
        validation = Validation(settings.validation, validated, whole, candidates.record)
    user = for_sampling(fitting_simulator(scene, arm, seed, [*examples, *validated]), mesh)
    state = rl.train(
        folder,
        user=user,
        assistant=functools.partial(initial_assistant, scene),  # so that nothing keeps it beside the reference
        chat=scene.chat,
        examples=examples,
        score=scene.reward(examples),
        limits=scene.limits,
        settings=settings,
        execution=compute.training,
        loop_settings=compute.loop,
        seed=seed,
        rows_in_flight=compute.rows_in_flight,
        batching=compute.batching,
        compile_threads=compute.threads_to_compile(),
        mesh=mesh,
        hyperparameters={'arm': arm, 'seed': seed, **config_lib.to_dict(settings)},
        validation=validation,
        further_metrics=usage_metrics(scene.usage),
    )
    lines = [line for line in metric_lines(folder) if 'grad_norm' in line]  # others are of validations alone
    check_learned(f'config.arms.{arm}', lines)
    trained, chosen = state.params, {}
    if candidates is not None:
        chosen = {'validation': candidates.summary()}
        trained = candidates.params(
            candidates.chosen(), {name: x for name, x in trained.items() if name != 'value_head'}
        )
    if settings.lora is None:
        save_params(folder, {'decoder': trained['decoder']})
    else:
        policy = initial_assistant(scene).policy
        whole = partition.whole_decoder(lambda: policy.params, trained, policy.spec.config, settings.lora, mesh)
        save_params(folder, whole)
    parts = ('reward/', 'rollout/end_')  # of the reward, and reasons for ending
    names = [*CURVES, *sorted(name for name in lines[0] if name.startswith(parts) and name not in CURVES)]
    save_result(folder, {name: [line[name] for line in lines] for name in names if name in lines[0]} | chosen)


def check_learned(field: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuses to call an assistant trained that had nothing to learn from.

    Args:
        field: what errors call the arm.
        lines: of metrics.jsonl; a number is null where a line has nothing to measure.

    Raises:
        ConversationError: no update had a gradient.
    """
    if not any(line['grad_norm'] for line in lines):
        if any(line['skipped'] for line in lines):
            found = 'updates were skipped, whose loss or gradients were not finite'
        elif any(line['trained_tokens'] for line in lines):
            found = 'rewards never differ'
        else:
            found = 'no conversation with a reward has a message of the assistant'
        raise ConversationError(f'{field}: expected something to learn from, found no gradient in any step: {found}')


def measure_assistant(
    folder: pathlib.Path, *, scene: Scene, measure: Measure, stage: str | None, numbers: range | None, shown: int
) -> None:
    """Measures an assistant on people that no simulator saw, the same for every assistant."""
    examples = scene.held_out_examples(numbers)
    _save_outcomes(folder, measure.run(scene.assistant(_folder(scene, stage)), examples, shown))


def meet_simulator(folder: pathlib.Path, *, scene: Scene, stage: str | None, arm: str, seed: int) -> None:
    """Lets a simulator play the first held-out people for an assistant: a cell of the matrix."""
    settings = scene.settings.evaluation
    examples = scene.held_out_examples(range(settings.matrix))
    assistant = scene.assistant(_folder(scene, stage))
    user = fitting_simulator(scene, arm, seed, examples)
    score = scene.score(examples)
    _save_outcomes(
        folder, conversations_with(user, assistant, examples, scene, score, name='simulator', step=MATRIX_STEP)
    )


def _save_outcomes(folder: pathlib.Path, result: dict[str, Any]) -> None:
    """Saves a measure's result.

    Raises:
        ConversationError: a score is not finite.
    """
    outcomes = result['outcomes']
    for example, score in zip(outcomes['example'], outcomes['score'], strict=True):
        if score is not None and not math.isfinite(score):
            raise ConversationError(f'example {example}: expected a finite score, found {score}')
    save_result(folder, result)


def fitting_simulator(scene: Scene, arm: str, seed: int, examples: Sequence[Example]) -> Agent:
    """The simulator of an arm.

    Raises:
        ConfigError: its prompt for an example is too long.
    """
    user = scene.simulator(arm, seed)
    _, too_long = fitting(examples, [user], scene.chat, scene.limits.prompt_tokens)
    if too_long:
        raise ConfigError(
            f'config.arms.{arm}: its prompts for {too_long} of {len(examples)} examples have more than the '
            f'limits.prompt_tokens={scene.limits.prompt_tokens}'
        )
    return user


def conversations_with(
    user: Agent,
    assistant: ModelAgent,
    examples: Sequence[Example],
    scene: Scene,
    score: Score,
    *,
    name: str,
    step: int,
    limits: Limits | None = None,
    shown: int = 0,
) -> dict[str, Any]:
    """Holds one conversation per example and says what it was worth: `outcomes`, `statistics` and those `shown`.

    Of every user the statistics have: messages that it discarded (`resampled`), and of its messages after the first
    (`later_messages`) those that repeat the one before (`repeated`); of one with a stop text, messages with it that
    ended nothing (`missed_signals`). A conversation without a score is in none of them,
    and of the outcomes it has the cause alone.

    Args:
        score: of whole conversations.
        limits: None: those of the scene.
        shown: how many of the examples are shown.

    Raises:
        ConversationError: too many conversations have no score.
    """
    settings = scene.settings.evaluation
    scored = scored_conversations(
        *(user, assistant, examples, score),
        chat=scene.chat,
        limits=limits or scene.limits,
        compute=scene.compute,
        batch_size=settings.batch_size,
        seed=settings.seed,
        step=step,
        name=name,
    )
    kept = scored.kept
    rows = [scored.rows[number] for number in kept]
    columns, counts = scene.outcomes([examples[number] for number in kept], rows, scored.scores[kept])
    columns = {**columns, **{part: values[kept].tolist() for part, values in scored.judges.items()}}
    repeated, later = repeated_messages(rows)
    of_users = {'resampled': int(scored.resamples[kept].sum()), 'repeated': repeated, 'later_messages': later}
    stop_texts = [agent_for(user, examples[number]).stop_text for number in kept]
    if any(stop_texts):
        signalled = zip(rows, stop_texts, strict=True)
        of_users['missed_signals'] = sum(missed_signals([row], text) for row, text in signalled if text)
    return {
        'outcomes': columns_of(scored, columns),
        'statistics': dict(counts) | of_users,
        'shown': [scene.shown(examples[number], scored.rows[number]) for number in kept if number < shown],
    }


def measure_likelihood(folder: pathlib.Path, *, scene: Scene, arm: str, seed: int) -> None:
    """Measures how well a simulator predicts what people said; one off the device has no likelihood: null."""
    simulator = scene.simulator(arm, seed)
    if not isinstance(simulator, ModelAgent):
        save_result(folder, {'log_likelihood': None, 'tokens': None})
        return
    policy, batch_size = simulator.policy, scene.settings.evaluation.batch_size
    people = scene.likelihood_rows(simulator)
    log_likelihood, tokens = row_log_likelihoods(
        policy.params,
        people.rows,
        np.asarray(policy.token_mask),
        BatchSettings(batch_size, people.lengths),
        config=policy.spec.config,
        execution=scene.compute.training,
        mesh=mesh_of(simulator, scene.compute.mesh.make()),
    )
    found = {'log_likelihood': log_likelihood.tolist(), 'tokens': tokens.tolist()}
    save_result(folder, found | {'source': list(people.sources)})


def initial_assistant(scene: Scene) -> ModelAgent:
    return scene.assistant(_folder(scene, scene.assistant_stage))


def _folder(scene: Scene, stage: str | None) -> pathlib.Path | None:
    return None if stage is None else scene.workdir / stage
