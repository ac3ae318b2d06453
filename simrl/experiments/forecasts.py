"""Forecasts of simulators' utility, from the initial assistant alone: the work of their stages.

Where people are a program (the concierge world):
1. The initial assistant talks with people, several times with each: their replies to the same messages are the same,
   so that conversations of one person differ by the assistant alone.
2. It talks with the simulator, as in training. The cosine is that of the gradients of the expected reward of these two
   kinds of conversations.
3. The simulator continues people's conversations after the assistant's first reply. By the reward that follows it ranks
   these replies, of which people's own conversations say what each was worth to them: that is best-of-n.

Where people are no program, their logged conversations stand for them. They cannot reply to a new message, so that two
things differ, and such a cosine is not to be compared with one of step 2:
- The gradients are of single replies in given contexts: those of logged conversations, with the messages of whichever
  assistant people had, and those of conversations with the simulator. The reward is that of the conversation up to the
  reply, or of the reply where turns have rewards of their own; what it leads to later is left out of both.
- What a first reply is worth is what the held-out measure says of it.

Everything random depends on the evaluation's seed, the example and the sample, and never on the arm. Examples are of
the split 'dev'.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Example
from simrl.experiments.forecast_results import forecast_of
from simrl.experiments.outputs import read_result, save_result
from simrl.experiments.replies import check_answered
from simrl.experiments.scene import Scene
from simrl.experiments.settings import ForecastSettings
from simrl.experiments.work import fitting_simulator, initial_assistant
from simrl.models import placement
from simrl.rewards.rewards import Score, unscored
from simrl.rl.futures import FutureScore
from simrl.rl.gradients import example_gradients, only_turn
from simrl.rl.judged import Judged, causes_of, check_judged, collect_judged, print_causes
from simrl.rl.validation import mean_of_turns
from simrl.rollouts.agents import Agent, HostAgent, Limits, MixedAgent, OneAgent, opening_only
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.replay import Replay
from simrl.rollouts.state import Transcript
from simrl.rollouts.trajectories import transcript_of
from simrl.run import processes
from simrl.run.stage_files import named_errors
from simrl.training import partition

FORECAST_STEP = 2**31 - 6  # in the keys of conversations, far above those of training: no two uses draw the same
PEOPLE_FILE = 'people.npz'  # gradients and values of people's side, and the conversations that simulators continue
GRADIENTS = 'gradients'  # beside the fields of the conversations


class Forecaster:
    """The initial assistant and the examples of the forecast.

    Attributes:
        examples_at_once: a divisor of their number, and a multiple of the devices that share rows.
    """

    def __init__(self, scene: Scene) -> None:
        settings, self.compute = scene.settings, scene.compute
        assert settings.evaluation.forecast is not None
        self.settings: ForecastSettings = settings.evaluation.forecast
        self.scene, self.seed = scene, settings.evaluation.seed
        self.mesh = self.compute.mesh.make()
        self.examples = scene.validation_examples(self.settings.examples)
        self.assistant = initial_assistant(scene)
        self.sampler = for_sampling(self.assistant, self.mesh)
        reward = scene.reward(self.examples)
        self.reward: Score = reward.score if isinstance(reward, FutureScore) else reward
        policy, execution = self.assistant.policy, self.compute.training
        self.trained, self.frozen = partition.trained_and_frozen(
            *(policy.params, policy.spec.config, settings.rl.lora),
            seed=self.seed,
            dtype=execution.dtype,
            mesh=self.mesh,
        )
        number, devices = len(self.examples), self.mesh.shape['data']
        most = max(devices, settings.evaluation.batch_size // self.settings.samples)
        self.examples_at_once = max(size for size in range(devices, most + 1, devices) if number % size == 0)

    def talks(
        self, name: str, user: Agent, score: Score, limits: Limits, *, samples: int, replay: Replay | None = None
    ) -> Iterator[Judged]:
        """`samples` conversations from each example, `examples_at_once` examples at a time.

        Args:
            name: of the conversations, in errors.
            replay: of a record of all of them; those that it does not continue have no reward. With `heard`, rewards of
                turns are of the one reply: else those of the record would stand in for one that has none.

        Raises:
            ConversationError: too many conversations have no reward; see also `check_answered`.
        """
        check_agents(user, self.assistant, self.scene.chat, limits)
        user = for_sampling(user, self.mesh)
        causes: dict[int, str] = {}
        wanted = np.ones(len(self.examples) * samples, bool) if replay is None else replay.present
        for start in range(0, len(self.examples), self.examples_at_once):
            rows = slice(start * samples, (start + self.examples_at_once) * samples)
            own = None if replay is None else dataclasses.replace(replay, record=_rows(replay.record, rows))
            with jax.set_mesh(self.mesh):
                found = collect_judged(
                    *(user, self.sampler, self.examples[start : start + self.examples_at_once], score),
                    chat=self.scene.chat,
                    limits=limits,
                    seed=self.seed,
                    step=FORECAST_STEP,
                    view=ASSISTANT,
                    mesh=self.mesh,
                    samples=samples,
                    replay=own,
                )
                rewards = placement.to_host(found.rewards)
            if replay is not None and replay.heard and rewards.valid.ndim == 2:
                of_reply = {name: getattr(rewards, name)[:, replay.turns] for name in ('value', 'valid')}
                rewards = dataclasses.replace(rewards, **of_reply)
            there = wanted[rows]
            without = {row: x for row, x in causes_of(rewards, found.reasons).items() if there[row]}
            causes |= {rows.start + row: cause for row, cause in without.items()}
            check_judged(name, causes, int(wanted.sum()), self.compute.loop.max_unjudged)
            check_answered(name, without)
            valid = rewards.valid & there.reshape(-1, *[1] * (rewards.valid.ndim - 1))
            yield dataclasses.replace(found, rewards=dataclasses.replace(rewards, valid=valid))
        print_causes(name, causes.values())

    def gradients(self, found: Judged, samples: int, turn: int | None = None) -> np.ndarray:
        """`example_gradients` of some conversations; of one turn, or of all."""
        policy = self.assistant.policy
        with jax.set_mesh(self.mesh):
            return example_gradients(
                *(self.trained, self.frozen),
                found.batch if turn is None else only_turn(found.batch, turn),
                placement.shard_batch(found.rewards, self.mesh),
                samples=samples,
                row_buckets=self.scene.settings.rl.row_buckets,
                config=policy.spec.config,
                execution=self.compute.training,
                token_mask=jnp.asarray(policy.token_mask),
                temperature=policy.temperature,
            )

    def reply_gradients(self, name: str, user: Agent, record: Transcript) -> np.ndarray:
        """Gradients of the rewards of single replies in the contexts of a record, summed over an example's contexts.

        Args:
            user: whose contexts they are: where openings are its own, they are the record's.
            record: a conversation of each example, on the host.
        """
        limits, samples = self.scene.limits, self.settings.samples
        contexts = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), record)
        total: np.ndarray | None = None
        for turn in range(limits.turns):
            replay = Replay(contexts, turn, 1, samples * (1 + turn), heard=1)
            if not replay.present.any():
                continue
            talks = self.talks(
                f'{name}, turn {turn}', silent(user, limits), self.reward, limits, samples=samples, replay=replay
            )
            found = np.concatenate([self.gradients(part, samples, turn) for part in talks])
            total = found if total is None else total + found
        if total is None:
            raise ValueError(f'{name}: expected a context for the assistant to reply in, found none')
        return total


def _rows(record: Transcript, rows: slice) -> Transcript:
    return jax.tree.map(lambda x: x[rows], record)


def silent(user: Agent, limits: Limits) -> Agent:
    """A user whose messages are all in a record, and whose openings are where those of `user` are."""
    if isinstance(user, MixedAgent):
        return dataclasses.replace(user, members=tuple(silent_one(member, limits) for member in user.members))
    return silent_one(user, limits)


def silent_one(user: OneAgent, limits: Limits) -> HostAgent:
    return dataclasses.replace(opening_only(), max_new_tokens=limits.user_tokens, opening=user.opening)


def forecast_people(folder: pathlib.Path, *, scene: Scene) -> None:
    """People's side of all forecasts: conversations with the initial assistant, their values and gradients."""
    forecaster, people = Forecaster(scene), scene.people()
    examples, samples = forecaster.examples, forecaster.settings.samples
    values, records, gradients, cut = [], [], [], 0
    for found in forecaster.talks('people', people.agent, people.value(examples), people.limits, samples=samples):
        values.append(mean_of_turns(found.rewards))
        records.append(placement.to_host(transcript_of(found.batch)))
        if people.logs is None:
            gradients.append(forecaster.gradients(found, samples))
    if people.logs is not None:
        logs, cut = people.logs(examples)
        print(f'logged conversations: {len(examples)}; messages cut off, after one that is too long: {cut}', flush=True)
        gradients.append(forecaster.reply_gradients('logged conversations', people.agent, logs))
    theirs, record = np.concatenate(gradients), jax.tree.map(lambda *parts: np.concatenate(parts), *records)
    if processes.leads():
        with named_errors(folder / PEOPLE_FILE), (folder / PEOPLE_FILE).open('wb') as file:
            np.savez(file, **{GRADIENTS: theirs, **vars(record)})
    result = {
        'clusters': [example.id if example.opening is None else example.opening for example in examples],
        'values': _groups(values, samples),
        'products': (theirs @ theirs.T).tolist(),
        'messages_cut_off': cut,
    }
    save_result(folder, result)


def forecast_simulator(folder: pathlib.Path, *, scene: Scene, arm: str, seed: int, people: pathlib.Path) -> None:
    """A simulator's side: gradients of conversations with it, and its rewards of people's that it continues.

    Args:
        people: the folder of `forecast_people`.
    """
    forecaster, logged = Forecaster(scene), scene.people().logs is not None
    limits, samples = scene.limits, forecaster.settings.samples
    user = fitting_simulator(scene, arm, seed, forecaster.examples)
    with np.load(people / PEOPLE_FILE) as stored:
        theirs = stored[GRADIENTS]
        record = Transcript(**{field.name: stored[field.name] for field in dataclasses.fields(Transcript)})
    if logged:
        talks = forecaster.talks(arm, user, unscored, limits, samples=1)  # they are contexts
        parts = [placement.to_host(transcript_of(found.batch)) for found in talks]
        own = forecaster.reply_gradients(arm, user, jax.tree.map(lambda *x: np.concatenate(x), *parts))
    else:
        talks = forecaster.talks(arm, user, forecaster.reward, limits, samples=samples)
        own = np.concatenate([forecaster.gradients(found, samples) for found in talks])
    rewards, reason = None, cannot_continue(user, forecaster.examples, record)
    if reason is None:
        replay = Replay(record, 1, limits.turns - 1, samples)
        name = f'people continued by {arm}'
        talks = forecaster.talks(name, user, forecaster.reward, limits, samples=samples, replay=replay)
        rewards = _groups([mean_of_turns(found.rewards) for found in talks], samples)
    result = {
        'products': (own @ own.T).tolist(),
        'cross': (own @ theirs.T).tolist(),
        'rewards': rewards,
        'reason': reason,
    }
    save_result(folder, result)
    known = forecast_of(read_result(people), [result], forecaster.settings.n, ())
    said = f'{arm}: cosine {known.cosine or "none"}, best of {forecaster.settings.n} {known.best_of_n or "none"}'
    print(said + (f' ({known.reason})' if known.reason else ''), flush=True)


def cannot_continue(user: Agent, examples: Sequence[Example], record: Transcript) -> str | None:
    """The reason why a simulator cannot continue conversations that people began; None: it can."""
    longest = int(record.message_length[:, 0].max())
    for member in user.members if isinstance(user, MixedAgent) else (user,):
        if isinstance(member, HostAgent) and not member.replayable:
            return 'it continues no conversation of others (HostAgent.replayable)'
        opens = member.opening == 'written' or any(example.opening is None for example in examples)
        if opens and longest > member.max_new_tokens:
            return f'an opening of people has {longest} tokens, its messages at most {member.max_new_tokens}'
    return None


def _groups(values: Sequence[np.ndarray], samples: int) -> list[list[float | None]]:
    """[B] of each batch -> [examples][samples], None where there is none."""
    rows = np.concatenate(values).reshape(-1, samples)
    return [[float(x) if np.isfinite(x) else None for x in row] for row in rows]
