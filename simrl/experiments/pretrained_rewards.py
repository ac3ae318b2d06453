"""The reward of a pretrained experiment, and the held-out score of its assistants: a reward model or a judge each."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from simrl.conversations.records import Example, Preference
from simrl.evaluation.results.measures import MeasureWords
from simrl.experiments import checks, sources
from simrl.experiments.endpoints import Endpoints
from simrl.experiments.judges import JudgeSettings, check_judge, judge_identity, judge_model, make_judge
from simrl.experiments.outputs import load_params, read_result
from simrl.experiments.pretrained_settings import PretrainedSettings
from simrl.experiments.sources import Model
from simrl.models import placement
from simrl.models.transformer import Params, TransformerConfig
from simrl.rewards.judging import Judge, Unit, judging
from simrl.rewards.reward_model import (
    RewardScale,
    Scoring,
    conversation_rewards,
    frame_of,
    score_conversations,
    score_programs,
    turn_rewards,
)
from simrl.rewards.rewards import Judging, ModelScore, Rewards, Score
from simrl.rewards.shaping import ShapingSettings, shaped
from simrl.rl.futures import FutureScore
from simrl.rollouts.state import Transcript
from simrl.rollouts.trajectories import Trajectories

REWARD_STAGE, HELD_OUT_STAGE, SCALE_STAGE = 'reward_model/train', 'reward_model/held_out', 'reward_model/scale'
HELD_OUT_REWARD_MODEL, HELD_OUT_JUDGE = 'held_out_reward_model', 'held_out_judge'
Use = Literal['reward', 'held_out']  # fields of the settings
REWARD_MODELS: Mapping[Use, str] = {'reward': 'reward_model', 'held_out': 'held_out_reward_model'}  # theirs


class PretrainedRewards:
    """The two ways of scoring of an experiment. Weights are loaded where something is scored."""

    def __init__(self, settings: PretrainedSettings, workdir: pathlib.Path, model: Model) -> None:
        self.settings, self.workdir, self.model = settings, workdir, model
        self.endpoints = Endpoints(workdir)
        self.limits, self.compute = settings.conversation.limits, settings.compute

    def uses(self) -> Iterator[Use]:
        """The uses that have a reward model."""
        for use in REWARD_MODELS:
            if self.of(use).by == 'reward_model':
                yield use

    def of(self, use: Use) -> JudgeSettings:
        return self.settings.reward if use == 'reward' else self.settings.held_out

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        """The decoder of a judge on the device, in an RL step."""
        local = self.settings.reward.by == 'local_judge'
        return {'judge': self._judge_model('reward').config} if local else {}

    def check(self, examples: Sequence[Example], preferences: Callable[[], Sequence[Preference]]) -> None:
        """Raises ConfigError where a reward model or a judge fits neither data nor devices. Loads no weights.

        Args:
            examples: whose openings conversations start from.
            preferences: reads people's choices; called where there is a reward model.
        """
        for use, field in REWARD_MODELS.items():
            if self.of(use).by == 'reward_model':
                settings = getattr(self.settings, field)
                checks.check_reward_model(f'config.{field}', settings, self.model, preferences(), self.compute)
            else:
                check_judge(f'config.{use}', self.of(use), self._judge_model(use), examples, self.compute)

    def caution(self) -> str:
        """Says what the scores are not."""
        kinds = {self.of(use).by == 'reward_model' for use in REWARD_MODELS}
        who = {True: 'A reward model stands', False: 'A language model stands'}
        standing = who[kinds.pop()] if len(kinds) == 1 else 'A reward model and a language model stand'
        return (
            f'{standing} for people here: what it prefers is not what people prefer. A small one that compares '
            'few replies of a small model checks the pipeline and is no evidence about simulators.'
        )

    # The reward of every arm.

    def reward(self) -> Score | FutureScore:
        """The reward model's standardised scores of a conversation's replies, or a judge's verdict, then shaped."""
        futures = self.settings.reward.futures
        return self._score() if futures is None else FutureScore(self._score(), futures)

    def _score(self) -> Score:
        reward, algorithm = self.settings.reward, self.settings.rl.algorithm
        if reward.by != 'reward_model':
            return judging(self._judge('reward'), self.model.chat.decode, reward.scored, self._shaped)
        score = self._standardised(algorithm.minibatches * algorithm.microbatches, reward.scored)
        return dataclasses.replace(score, score=lambda batch: self._shaped(score(batch), batch))

    def _shaped(self, rewards: Rewards, transcript: Transcript) -> Rewards:
        return shaped(rewards, transcript, self.settings.reward.shaping)

    def _standardised(self, num_microbatches: int, unit: Unit) -> ModelScore:
        measured, limits = read_result(self.workdir / SCALE_STAGE), self.limits
        scale = RewardScale(mean=jnp.float32(measured['mean']), std=jnp.float32(measured['std']))
        later_tokens = max(limits.assistant_tokens, limits.user_tokens)
        return self._scored(REWARD_STAGE, scale, unit, later_tokens=later_tokens, num_microbatches=num_microbatches)

    def _scored(
        self, stage: str, scale: RewardScale, unit: Unit, *, later_tokens: int, num_microbatches: int = 1
    ) -> ModelScore:
        params = self._reward_params(stage)
        rewards_of = conversation_rewards if unit == 'conversation' else turn_rewards
        scoring = Scoring(
            config=self.model.config,
            execution=self.compute.training,
            frame=frame_of(self.model.chat),
            later_tokens=later_tokens,
            row_buckets=self.settings.rl.row_buckets,
            num_microbatches=num_microbatches,
        )

        def score(batch: Trajectories) -> Rewards:
            rewards: Rewards = rewards_of(*score_conversations(params, batch, scoring), scale)
            return rewards

        return ModelScore(score, functools.partial(score_programs, params, scoring))

    def reward_identity(self) -> dict[str, Any]:
        """Settings and prompts that the reward depends on, beside its inputs."""
        reward = self.settings.reward
        identity = judge_identity(reward)
        if (reward.unit, reward.shaping) != ('conversation', ShapingSettings()):
            identity |= {'unit': reward.unit, 'shaping': reward.shaping}
        if reward.futures is not None:
            identity |= {'futures': reward.futures}
        return {'reward': identity} if identity else {}

    def reward_inputs(self) -> dict[str, pathlib.Path]:
        if self.settings.reward.by != 'reward_model':
            return self._judge_files('reward')
        return {'reward_model': self.workdir / REWARD_STAGE, 'scale': self.workdir / SCALE_STAGE}

    @functools.cached_property
    def score_conversations(self) -> Score:
        """Scores conversations of an evaluation as the reward does: whole ones, and not shaped."""
        if self.settings.reward.by != 'reward_model':
            return self._judging('reward')
        return self._standardised(1, 'conversation')

    # The held-out score.

    def score_held_out(self) -> Score:
        """Scores single replies by what gave no reward."""
        if self.settings.held_out.by != 'reward_model':
            return self._judging('held_out')
        return self.score_replies(HELD_OUT_STAGE)

    def score_replies(self, stage: str) -> Score:
        """Scores single replies by the reward model of a stage, not standardised."""
        scale = RewardScale(mean=jnp.float32(0), std=jnp.float32(1))
        return self._scored(stage, scale, 'conversation', later_tokens=self.limits.assistant_tokens)

    def held_out_measure(self) -> tuple[str, dict[str, Any], dict[str, pathlib.Path], MeasureWords]:
        """Name, identity, inputs and words of the measure that compares the assistants."""
        held_out = self.settings.held_out
        what = 'The score is that of a reward model of other choices of people than those that gave the reward.'
        if held_out.by != 'reward_model':
            what = (
                'The score, from 0 to 1, is that of a language model that judges by a rubric which gave no reward: '
                f'‘{held_out.rubric}’.'
            )
        words = MeasureWords(
            title=f'Held-out {"reward model" if held_out.by == "reward_model" else "judge"} on replies to held-out '
            'openings',
            score='score',
            unit='openings',
            about=f'{what} Win rate: the share of openings where it scores the reply higher than the initial '
            'assistant’s, ties count ½. A small model that scores checks the pipeline and is no evidence about '
            'simulators.',
        )
        if held_out.by != 'reward_model':
            return HELD_OUT_JUDGE, {'judge': judge_identity(held_out)}, self._judge_files('held_out'), words
        return HELD_OUT_REWARD_MODEL, {}, {'held_out_reward_model': self.workdir / HELD_OUT_STAGE}, words

    # Models.

    @functools.lru_cache(maxsize=1)  # noqa: B019  (a training and its validation have one copy)
    def _reward_params(self, stage: str) -> Params:
        config, mesh = self.model.config, self.compute.mesh.make()
        params = load_params(self.workdir / stage, config, mesh, heads=('reward_head',))
        return placement.for_scoring(params, config, self.compute.training.dtype, mesh)

    @functools.cache  # noqa: B019  (lives as long as its process)
    def _judge_model(self, use: Use) -> Model:
        return judge_model(f'config.{use}', self.of(use), self.model)

    def _judging(self, use: Use) -> Judging:
        """A judge of whole conversations."""
        return judging(self._judge(use), self.model.chat.decode, 'conversation')

    @functools.cache  # noqa: B019  (lives as long as its process)
    def _judge(self, use: Use) -> Judge:
        return make_judge(self.of(use), self._judge_model(use), self.compute, self.endpoints, self.workdir)

    def _judge_files(self, use: Use) -> dict[str, pathlib.Path]:
        own = self.of(use).local.model
        return {} if own is None else sources.model_files('judge', own)
