"""Pretrained models on people's conversations as a scene.

1. sft/ARM: a user simulator is fine-tuned on people's turns, for each arm that has a fine-tuned one.
2. reward_model/train and reward_model/held_out: two reward models are trained on disjoint choices of people.
3. reward_model/scale: the initial assistant's replies give the reward its zero and unit.
4. All assistants answer the same held-out openings; the held-out reward model compares them with the initial one.

A judge may take the place of either reward model (`config.reward.by`, `config.held_out.by`), which is then not trained.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example, example_of
from simrl.evaluation.win_rate import prefer_higher
from simrl.experiments import checks, fitting, sources, work
from simrl.experiments.fitting import RewardModelSettings
from simrl.experiments.outputs import load_params, save_result
from simrl.experiments.pretrained_agents import assistant_agent, tuned_text
from simrl.experiments.pretrained_data import PretrainedData
from simrl.experiments.pretrained_rewards import HELD_OUT_STAGE, REWARD_STAGE, SCALE_STAGE, PretrainedRewards
from simrl.experiments.pretrained_settings import MODELS, PretrainedSettings
from simrl.experiments.pretrained_simulators import Simulators, fine_tuned_here, sft_stage
from simrl.experiments.replies import REPLY_STEP, outcome_columns, scored_conversations
from simrl.experiments.scene import LikelihoodRows, Measure, People, own_simulator
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model, subsample
from simrl.models.transformer import Params, TransformerConfig
from simrl.remote.usage import Usage
from simrl.rewards.rewards import Score
from simrl.rl.futures import FutureScore, FutureSettings
from simrl.rollouts.agents import Agent, Limits, ModelAgent, opening_only
from simrl.run.config import ConfigError
from simrl.run.stages import Stage


class PretrainedScene:
    """Pretrained models on people's conversations as a `Scene`."""

    assistant_stage: str | None = None
    reward_name = 'reward'
    people_measure: str | None = None
    rates: Mapping[str, tuple[str, str]] = {}

    def __init__(self, settings: PretrainedSettings, workdir: pathlib.Path) -> None:
        self.settings = settings
        self.workdir = workdir

    @property
    def caution(self) -> str:
        return self.rewards.caution()

    @property
    def reward_times(self) -> int:
        """A judge's score is from 0 to 1; a reward model's has no bounds."""
        return 1 if self.settings.reward.by == 'reward_model' else 100

    @functools.cached_property
    def rewards(self) -> PretrainedRewards:
        return PretrainedRewards(self.settings, self.workdir, self.model)

    @property
    def limits(self) -> Limits:
        return self.settings.conversation.limits

    @property
    def compute(self) -> Compute:
        return self.settings.compute

    @functools.cached_property
    def data(self) -> PretrainedData:
        return PretrainedData(self.settings)

    @property
    def model(self) -> Model:
        """The assistant's model, without its weights."""
        return self.data.model

    @property
    def chat(self) -> Chat:
        return self.model.chat

    @functools.cached_property
    def simulators(self) -> Simulators:
        return Simulators(self.data, self.workdir, self.rewards.endpoints)

    # Checks: what shows only once config, tokenizer and data are there.

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def check(self) -> None:
        self._check_without_preferences()
        settings = self.settings
        needed = settings.rl.validation is not None or settings.evaluation.forecast is not None
        validated = self.data.openings('dev') if needed else []
        rewarded = [*self.data.openings('train'), *validated, *self.data.openings('test')]
        self.rewards.check(rewarded, lambda: self.data.preferences)

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def _check_without_preferences(self) -> None:
        """Check of stages that read no preferences: fine-tuning needs no such file."""
        s, compute = self.settings, self.compute
        checks.check_runtime(compute)
        checks.check_mesh(self.model_configs(), compute)
        checks.check_simulator_mesh({arm: self.simulator_model(arm) for arm in s.arms}, compute)
        for arm in s.arms:
            self.simulators.check_people(arm)
        training, held_out = len(self.data.openings('train')), len(self.data.openings('test'))
        checks.check_rl_steps(s.rl, training, compute)
        if s.rl.validation is not None:
            checks.check_validation(s.rl, len(self.data.openings('dev')))
        found = training if s.scale.openings is None else min(training, s.scale.openings)
        if found < 2:
            raise ConfigError(f'config.scale.openings: expected at least 2, found {found} of {training} that fit')
        checks.check_split('config.scale.batch_size', s.scale.batch_size, compute)
        checks.check_conversations('config.evaluation.batch_size', s.evaluation.batch_size, compute)
        if s.evaluation.forecast is not None:
            checks.check_forecast(s.evaluation.forecast, len(self.data.openings('dev')), compute)
        for field, wanted, most in (
            ('people', s.evaluation.people or held_out, held_out),
            ('matrix', s.evaluation.matrix, s.evaluation.people or held_out),
        ):
            checks.check_most(f'config.evaluation.{field}', wanted, most, 'that fit')
        if s.evaluation.replayed:
            found, what = len(self.data.replayable), 'held-out conversations with more than an opening'
            checks.check_most('config.evaluation.replayed', s.evaluation.replayed, found, what)
        for arm in s.arms:
            self.simulators.check(arm)

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        own = self.simulators.own_models()
        simulators = {f'simulator {arm}': model.config for arm, model in own.items()}
        return {'assistant': self.model.config, **simulators, **self.rewards.model_configs()}

    # Stages before the first arm.

    def identity(self) -> Mapping[str, Any]:
        return {'model': sources.model_identity(self.model.settings), 'compute': self.compute}

    def inputs(self) -> Mapping[str, pathlib.Path]:
        """Files that all stages but the reward models read: a hub's model is named in the identity, not hashed."""
        return {'conversations': sources.conversations_file(self.settings.data)} | self._model_file()

    def _model_file(self) -> dict[str, pathlib.Path]:
        return sources.model_files('model', self.settings.model)

    def setup(self) -> list[Stage]:
        s = self.settings
        reward_models = {
            'reward': self._reward_model(REWARD_STAGE, s.reward_model),
            'held_out': self._reward_model(HELD_OUT_STAGE, s.held_out_reward_model),
        }
        return [
            *(self._fine_tune(arm) for arm, own in s.arms.items() if fine_tuned_here(own)),
            *(reward_models[use] for use in self.rewards.uses()),
            *([self._scale()] if s.reward.by == 'reward_model' else []),
        ]

    def _fine_tune(self, arm: str) -> Stage:
        s = self.settings
        own = s.arms[arm]
        system = {'intent': own.intent, 'source_tag': own.source_tag} if tuned_text(own) else {}
        model = self.simulators.model_identity(arm)
        identity = {**self.identity(), **model, 'user_sft': s.user_sft, **system, **self.data.dropped}
        inputs = {**self.inputs(), **self.simulators.model_inputs(arm)}
        run = functools.partial(self.simulators.fine_tune, arm)
        return Stage(sft_stage(arm), identity, inputs, run, self._check_without_preferences)

    def _reward_model(self, name: str, settings: RewardModelSettings) -> Stage:
        def run(folder: pathlib.Path) -> None:
            fitting.fit_reward_model(folder, self.model, self.data.preferences, settings, self.compute)

        inputs = {'preferences': sources.preferences_file(self.settings.data), **self._model_file()}
        return Stage(name, {**self.identity(), 'reward_model': settings}, inputs, run, self.check)

    def _scale(self) -> Stage:
        s = self.settings
        identity = {
            **self.identity(),
            **self.examples_identity('train'),
            'assistant_sampling': s.conversation.assistant,
            'limits': self.limits,
            'scale': s.scale,
        }
        inputs = {**self.inputs(), 'reward_model': self.workdir / REWARD_STAGE}
        return Stage(SCALE_STAGE, identity, inputs, self._measure_scale, self.check)

    def _measure_scale(self, folder: pathlib.Path) -> None:
        """The mean and standard deviation of the reward model's scores of the initial assistant's replies."""
        settings = self.settings.scale
        examples = subsample(self.data.openings('train'), settings.openings, settings.seed)
        score = self.rewards.score_replies(REWARD_STAGE)
        scores = scored_conversations(
            *(opening_only(), self.assistant(None), examples, score),
            chat=self.chat,
            limits=self._reply_limits,
            compute=self.compute,
            batch_size=settings.batch_size,
            seed=settings.seed,
            step=REPLY_STEP,
            name='replies',
        ).scores
        spread = float(np.std(scores, ddof=1))
        if not 0 < spread < np.inf:
            raise ValueError(
                f'{folder}: expected finite scores of the reward model that differ, found a standard deviation of '
                f'{spread} over {len(scores)} replies'
            )
        mean = float(np.mean(scores))
        save_result(folder, {'mean': mean, 'std': spread, 'replies': len(scores)})

    # Agents.

    def assistant(self, stage: pathlib.Path | None) -> ModelAgent:
        return assistant_agent(self.settings, self.model, self._params(stage, self.model))

    def simulator(self, arm: str, seed: int) -> Agent:
        mesh = self.compute.mesh_of_simulators()

        def params(of: str) -> Params:
            return self._params(self.simulators.inputs(of).get('simulator'), self.simulators.model(of), mesh)

        def own(of: str) -> Agent:
            return own_simulator(f'config.arms.{of}.simulator', self.settings.arms[of].simulator, self)

        return self.simulators.agent(arm, params, own, mesh)

    def user_model(self) -> tuple[TransformerConfig, Params]:
        """The pretrained model itself."""
        return self.model.config, self._params(None, self.model)

    def _params(self, stage: pathlib.Path | None, model: Model, mesh: Mesh | None = None) -> Params:
        """Parameters of a stage; None: those of the model, in the shards of training."""
        mesh = self.compute.mesh.make() if mesh is None else mesh
        return model.load_params(mesh) if stage is None else load_params(stage, model.config, mesh)

    def simulator_identity(self, arm: str) -> Mapping[str, Any]:
        return self.simulators.identity(arm)

    def simulator_inputs(self, arm: str, seed: int) -> Mapping[str, pathlib.Path]:
        return self.simulators.inputs(arm)

    def simulator_per_seed(self, arm: str) -> bool:
        return False

    def arm_kind(self, arm: str) -> str:
        return self.settings.arms[arm].simulator

    def simulator_model(self, arm: str) -> TransformerConfig | None:
        own = self.settings.arms[arm]
        here = own.simulator in MODELS and own.remote is None
        return self.simulators.model(arm).config if here else None

    def model_name(self, arm: str) -> str | None:
        own = self.settings.arms[arm]
        if own.remote is not None:
            return f'{own.remote.endpoint.model} behind an endpoint'
        model = own.model or self.settings.model
        return str(model.source) if own.simulator in MODELS else None

    def is_people(self, arm: str) -> bool:
        return False

    # Examples, rewards and measures.

    def examples_identity(self, split: str) -> Mapping[str, Any]:
        return self.data.openings_identity()

    def training_examples(self) -> list[Example]:
        return self.data.openings('train')

    def validation_examples(self, number: int) -> list[Example]:
        return self.data.validated(number)

    def held_out_examples(self, numbers: range | None) -> list[Example]:
        return self.data.held_out(numbers)

    def reward(self, examples: Sequence[Example]) -> Score | FutureScore:
        return self.rewards.reward()

    def futures(self) -> FutureSettings | None:
        return self.settings.reward.futures

    def reward_identity(self) -> Mapping[str, Any]:
        return self.rewards.reward_identity()

    def reward_inputs(self) -> Mapping[str, pathlib.Path]:
        return self.rewards.reward_inputs()

    def score(self, examples: Sequence[Example]) -> Score:
        return self.rewards.score_conversations

    def outcomes(
        self, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], scores: np.ndarray
    ) -> tuple[dict[str, list[Any]], Mapping[str, int]]:
        return outcome_columns(rows, scores), {}

    def shown(self, example: Example, row: Mapping[str, Any]) -> dict[str, Any]:
        messages = [{'role': m['role'], 'content': m['content']} for m in row['messages']]
        return {'example': example.id, 'intent': example.intent, 'traits': {}, 'messages': messages}

    def _measure_replies(self, assistant: ModelAgent, examples: Sequence[Example], shown: int) -> dict[str, Any]:
        """`result.json` of the held-out scores of single replies."""
        return work.conversations_with(
            *(opening_only(), assistant, examples, self, self.rewards.score_held_out()),
            limits=self._reply_limits,
            name='replies',
            step=REPLY_STEP,
            shown=shown,
        )

    @property
    def _reply_limits(self) -> Limits:
        return dataclasses.replace(self.limits, turns=1)

    def likelihood_rows(self, simulator: ModelAgent) -> LikelihoodRows:
        return self.data.likelihood_rows(simulator)

    def people_to_replay(self, number: int) -> list[Conversation]:
        return self.data.people_to_replay(number)

    def example_of(self, conversation: Conversation) -> Example:
        return example_of(conversation)

    def likelihood_identity(self) -> Mapping[str, Any]:
        return self.data.likelihood_identity()

    def likelihood_inputs(self) -> Mapping[str, pathlib.Path]:
        return {}

    def usage(self) -> Mapping[str, Usage]:
        return self.rewards.endpoints.usage()

    def people(self) -> People:
        _, identity, inputs, _ = self.rewards.held_out_measure()
        return People(
            words='People are logged: gradients are of single replies, to what people said to whichever assistant they '
            'had and to what the simulator says to this one; a first reply is worth its held-out score.',
            agent=opening_only(),
            limits=self._reply_limits,
            value=lambda _: self.rewards.score_held_out(),
            logs=self.data.logged,
            identity={
                'limits': self.limits,
                'assistant_sampling': self.settings.conversation.assistant,
                'held_out': identity,
            },
            inputs=inputs,
        )

    def measures(self) -> Mapping[str, Measure]:
        name, identity, inputs, words = self.rewards.held_out_measure()
        sampling = self.settings.conversation.assistant
        return {
            name: Measure(
                run=self._measure_replies,
                identity={'limits': self.limits, 'assistant_sampling': sampling, **identity},
                inputs=inputs,
                prefer=prefer_higher,
                words=words,
            )
        }
