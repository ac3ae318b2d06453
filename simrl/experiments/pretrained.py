"""Pretrained models on people's conversations as a scene.

1. sft/ARM: a user simulator is fine-tuned on people's turns, for each arm that has a fine-tuned one.
2. reward_model/train and reward_model/held_out: two reward models are trained on disjoint choices of people.
3. reward_model/scale: the initial assistant's replies give the reward its zero and unit.
4. All assistants answer the same held-out openings; the held-out reward model compares them with the initial one.

A judge may take the place of either reward model (`config.reward.by`, `config.held_out.by`), which is then not trained.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat, EncodingError
from simrl.conversations.records import Conversation, Example, Preference, example_of
from simrl.conversations.views import Rendered, user_rows
from simrl.evaluation.fidelity.likelihood import start_of
from simrl.evaluation.fidelity.turns import turns_of
from simrl.evaluation.win_rate import prefer_higher
from simrl.experiments import checks, fitting, sources, work
from simrl.experiments.fitting import RewardModelSettings
from simrl.experiments.outputs import load_params, save_result
from simrl.experiments.pretrained_agents import assistant_agent, tuned_text, usual_agents
from simrl.experiments.pretrained_rewards import HELD_OUT_STAGE, REWARD_STAGE, SCALE_STAGE, PretrainedRewards
from simrl.experiments.pretrained_settings import MODELS, PretrainedSettings
from simrl.experiments.pretrained_simulators import Simulators, fine_tuned_here, open_model, sft_stage
from simrl.experiments.replies import REPLY_STEP, outcome_columns, scored_conversations
from simrl.experiments.scene import LikelihoodRows, Measure, People, own_simulator
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model, of_split, subsample
from simrl.models.transformer import Params, TransformerConfig
from simrl.remote.usage import Usage
from simrl.rewards.rewards import Score
from simrl.rl.futures import FutureScore, FutureSettings
from simrl.rollouts.agents import Agent, Limits, ModelAgent, opening_only, told
from simrl.rollouts.agents import fitting as fitting_examples
from simrl.rollouts.logs import logged_transcript
from simrl.rollouts.state import Transcript
from simrl.run.config import ConfigError
from simrl.run.stages import Stage

ROW_STEP = 128  # tokens that a length beyond those of training is a multiple of
VALIDATION_SEED = 0  # of the choice of validation openings, the same for every arm and training seed


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

    @property
    def chat(self) -> Chat:
        return self.model.chat

    @functools.cached_property
    def model(self) -> Model:
        """The assistant's model, without its weights."""
        return open_model('config.model', self.settings.model)

    @functools.cached_property
    def conversations(self) -> list[Conversation]:
        try:
            return sources.conversations_of(self.settings.data, self.chat.check)
        except (OSError, ValueError) as error:
            raise ConfigError(f'config.data.conversations: {error}') from error

    @functools.cached_property
    def preferences(self) -> list[Preference]:
        try:
            return sources.preferences_of(self.settings.data, self.chat.check)
        except (OSError, ValueError) as error:
            raise ConfigError(f'config.data.preferences: {error}') from error

    @functools.cached_property
    def simulators(self) -> Simulators:
        return Simulators(self.settings, self.workdir, self, self.rewards.endpoints)

    # Checks: what shows only once config, tokenizer and data are there.

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def check(self) -> None:
        self._check_without_preferences()
        settings = self.settings
        needed = settings.rl.validation is not None or settings.evaluation.forecast is not None
        validated = self.openings('dev') if needed else []
        rewarded = [*self.openings('train'), *validated, *self.openings('test')]
        self.rewards.check(rewarded, lambda: self.preferences)

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def _check_without_preferences(self) -> None:
        """Check of stages that read no preferences: fine-tuning needs no such file."""
        s, compute = self.settings, self.compute
        checks.check_xla_flags(compute)
        checks.check_mesh(self.model_configs(), compute)
        checks.check_simulator_mesh({arm: self.simulator_model(arm) for arm in s.arms}, compute)
        for arm in s.arms:
            self.simulators.check_people(arm)
        training, held_out = len(self.openings('train')), len(self.openings('test'))
        checks.check_rl_steps(s.rl, training, compute)
        if s.rl.validation is not None:
            checks.check_validation(s.rl, len(self.openings('dev')))
        found = training if s.scale.openings is None else min(training, s.scale.openings)
        if found < 2:
            raise ConfigError(f'config.scale.openings: expected at least 2, found {found} of {training} that fit')
        checks.check_split('config.scale.batch_size', s.scale.batch_size, compute)
        checks.check_conversations('config.evaluation.batch_size', s.evaluation.batch_size, compute)
        if s.evaluation.forecast is not None:
            checks.check_forecast(s.evaluation.forecast, len(self.openings('dev')), compute)
        for field, wanted, most in (
            ('people', s.evaluation.people or held_out, held_out),
            ('matrix', s.evaluation.matrix, s.evaluation.people or held_out),
        ):
            checks.check_most(f'config.evaluation.{field}', wanted, most, 'that fit')
        if s.evaluation.replayed:
            found, what = len(self._replayable), 'held-out conversations with more than an opening'
            checks.check_most('config.evaluation.replayed', s.evaluation.replayed, found, what)
        for arm in s.arms:
            self.simulators.check(arm)

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        own = self.simulators.own_models()
        simulators = {f'simulator {arm}': model.config for arm, model in own.items()}
        return {'assistant': self.model.config, **simulators, **self.rewards.model_configs()}

    @functools.cache  # noqa: B019  (a scene lives as long as its process)
    def openings(self, split: str) -> list[Example]:
        """The openings that fit into the prompts of the assistant and of the usual simulators; prints how many do not.

        All arms start from the same people, those that are added later as well. So it is not this run's arms that
        decide, but the simulators of `conversation`; an arm with a longer prompt is refused.
        """
        reserved = self.settings.conversation.reserved_prompt_tokens
        size, usual = self.limits.prompt_tokens - reserved, usual_agents(self.settings, self.model)
        examples = [example_of(conversation) for conversation in self.people_of(split)]
        try:
            kept, dropped = fitting_examples(examples, usual, self.chat, size)
        except EncodingError as error:  # texts of people were checked when they were read
            raise ConfigError(f'config.conversation.role_play: {error}') from error
        if not kept:
            raise ConfigError(
                f'config.conversation.limits.prompt_tokens: expected room for at least one opening of the split '
                f'{split!r}, found that none of {len(examples)} fits into {size} tokens'
            )
        print(f'openings ({split}): {len(kept)}; with a prompt of over {size} tokens: {dropped}', flush=True)
        return kept

    @functools.cache  # noqa: B019  (a scene lives as long as its process)
    def people_of(self, split: str) -> list[Conversation]:
        """The conversations of a split, without those that are dropped for want of an intent; prints how many."""
        found = of_split(self.conversations, split)
        if self.settings.conversation.without_intent == 'keep':
            return found
        kept = [conversation for conversation in found if conversation.intent is not None]
        print(f'conversations ({split}): {len(kept)}; dropped, without an intent: {len(found) - len(kept)}', flush=True)
        return kept

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
        identity = {**self.identity(), **model, 'user_sft': s.user_sft, **system, **self._dropped}
        inputs = {**self.inputs(), **self.simulators.model_inputs(arm)}
        run = functools.partial(self.simulators.fine_tune, arm)
        return Stage(sft_stage(arm), identity, inputs, run, self._check_without_preferences)

    def _reward_model(self, name: str, settings: RewardModelSettings) -> Stage:
        def run(folder: pathlib.Path) -> None:
            fitting.fit_reward_model(folder, self.model, self.preferences, settings, self.compute)

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
        examples = subsample(self.openings('train'), settings.openings, settings.seed)
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
        """Settings that decide which openings fit: see `openings`."""
        conversation = self.settings.conversation
        usual, reserved = conversation.role_play, conversation.reserved_prompt_tokens
        openings = {'limits': self.limits, 'instructions': usual.instructions, 'signal': usual.signal}
        return {'openings': openings | ({'reserved_prompt_tokens': reserved} if reserved else {}) | self._dropped}

    @property
    def _dropped(self) -> dict[str, str]:
        """The rule for conversations without an intent, as a setting of stages; nothing where they are kept."""
        rule = self.settings.conversation.without_intent
        return {} if rule == 'keep' else {'without_intent': rule}

    def training_examples(self) -> list[Example]:
        return self.openings('train')

    def validation_examples(self, number: int) -> list[Example]:
        return subsample(self.openings('dev'), number, VALIDATION_SEED)

    def held_out_examples(self, numbers: range | None) -> list[Example]:
        """By one permutation for each seed, so that more people are the same ones and others."""
        openings, settings = self.openings('test'), self.settings.evaluation
        order = np.random.default_rng(settings.seed).permutation(len(openings))[: settings.people]
        return [openings[i] for i in (order if numbers is None else order[numbers.start : numbers.stop])]

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

    @functools.cached_property
    def people_to_predict(self) -> list[Conversation]:
        """The starts of held-out conversations that hold a message to predict; the same for every simulator."""
        settings, people = self.settings.user_sft, self.people_of('test')
        most = settings.sft.batch.lengths[-1]
        order = np.random.default_rng(settings.held_out_seed).permutation(len(people)).tolist()
        wanted, too_long = settings.held_out or len(people), 0
        found: dict[int, Conversation] = {}
        for i in order:
            if len(found) < wanted:
                start = start_of(people[i], self.chat, most)
                too_long += start is None
                found |= {} if start is None else {i: start}
        reason = f'without a second message of the user within {most} tokens'
        sources.print_counts('conversations to predict', len(found), collections.Counter({reason: too_long}))
        return [found[i] for i in sorted(found)]

    def rows_to_predict(self, simulator: ModelAgent, conversations: Sequence[Conversation]) -> list[Rendered]:
        """People's messages after their openings, in the simulator's view and under its system text; `user_rows`."""
        swapped = simulator.policy.spec.own_header == self.chat.header('assistant')
        rows, _ = user_rows(
            conversations,
            self.chat,
            simulator.policy.spec.config.max_positions,
            system=lambda conversation: told(simulator, example_of(conversation)),
            view='swapped' if swapped else 'natural',
            openings=simulator.opening,
        )
        return rows

    def likelihood_rows(self, simulator: ModelAgent) -> LikelihoodRows:
        """Rows are as long as what a simulator is told makes them, so that the same tokens of people count."""
        people, lengths = self.people_to_predict, self.settings.user_sft.sft.batch.lengths
        rows = self.rows_to_predict(simulator, people)
        if (longest := max(map(len, rows))) > lengths[-1]:
            rounded = -(-longest // ROW_STEP) * ROW_STEP
            lengths = (*lengths, min(rounded, simulator.policy.spec.config.max_positions))
        return LikelihoodRows(rows, [one.source for one in people], lengths)

    def people_to_replay(self, number: int) -> list[Conversation]:
        """Of the splits dev and test: simulators are trained on neither. As many of each data set as there are."""
        return sources.balanced(self._replayable, number, self.settings.evaluation.seed)

    @functools.cached_property
    def _replayable(self) -> list[Conversation]:
        """Held-out conversations with more than an opening."""
        return [one for split in ('dev', 'test') for one in self.people_of(split) if len(turns_of(one)) > 1]

    def example_of(self, conversation: Conversation) -> Example:
        return example_of(conversation)

    def likelihood_identity(self) -> Mapping[str, Any]:
        settings = self.settings.user_sft
        return {
            'tokens': settings.sft.batch.lengths[-1],
            'held_out': settings.held_out,
            'held_out_seed': settings.held_out_seed,
            **self._dropped,
        }

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
            logs=self._logged,
            identity={
                'limits': self.limits,
                'assistant_sampling': self.settings.conversation.assistant,
                'held_out': identity,
            },
            inputs=inputs,
        )

    def _logged(self, examples: Sequence[Example]) -> tuple[Transcript, int]:
        by_id = {conversation.id: conversation for conversation in self.people_of('dev')}
        return logged_transcript([by_id[example.id] for example in examples], self.chat, self.limits)

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
