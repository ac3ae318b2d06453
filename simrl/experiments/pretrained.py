"""Pretrained models on people's conversations as a scene.

1. sft/ARM: a user simulator is fine-tuned on people's turns, for each arm that has a fine-tuned one.
2. reward_model/train and reward_model/held_out: two reward models are trained on disjoint choices of people.
3. reward_model/scale: the initial assistant's replies give the reward its zero and unit.
4. All assistants answer the same held-out openings; the held-out reward model compares them with the initial one.

A judge may take the place of either reward model (`config.reward.by`, `config.held_out.by`), which is then not trained.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from simrl.conversations.chat import ROLE_CODES, Chat, EncodingError
from simrl.conversations.records import Conversation, Example, Preference, example_of
from simrl.conversations.views import Rendered, user_rows
from simrl.evaluation.win_rate import prefer_higher
from simrl.experiments import checks, fitting, sources
from simrl.experiments.fitting import RewardModelSettings
from simrl.experiments.outputs import load_params, save_result
from simrl.experiments.pretrained_agents import assistant_agent, simulator_agent, usual_agents
from simrl.experiments.pretrained_rewards import HELD_OUT_STAGE, REWARD_STAGE, SCALE_STAGE, PretrainedRewards
from simrl.experiments.pretrained_settings import PretrainedSettings
from simrl.experiments.replies import ScoreConversations, ScoredReplies, outcome_columns, scored_replies
from simrl.experiments.scene import Measure, fingerprint, is_own, own_identity, own_simulator
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model, ModelSettings, of_split, subsample
from simrl.models import placement
from simrl.models.transformer import Params, TransformerConfig
from simrl.rewards.rewards import Score
from simrl.rl.train import check_trained
from simrl.rollouts.agents import Agent, Limits, ModelAgent, told
from simrl.rollouts.agents import fitting as fitting_examples
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import Trajectories, transcripts
from simrl.run.config import ConfigError
from simrl.run.stages import Stage

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
        return _opened('config.model', self.settings.model)

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

    @functools.cache  # noqa: B019  (a scene lives as long as its process)
    def simulator_model(self, arm: str) -> Model:
        """The model of an arm's simulator, without its weights."""
        own = self.settings.arms[arm].model
        if own is None:
            return self.model
        field = f'config.arms.{arm}.model'
        model = _opened(field, own)
        if model.vocabulary != self.model.vocabulary:
            raise ConfigError(
                f'{field}: expected the vocabulary of config.model, found another: agents on the device read the same '
                f'token ids'
            )
        chats = (model.chat, self.chat)
        if any(
            len({(chat.headers[role], chat.end_of_turn[role], *chat.encode('a', role)) for chat in chats}) > 1
            for role in ROLE_CODES
        ):
            raise ConfigError(f'{field}: expected the headers of config.model in the chat template, found others')
        return model

    # Checks: what shows only once config, tokenizer and data are there.

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def check(self) -> None:
        self._check_without_preferences()
        self.rewards.check([*self._openings('train'), *self._openings('test')], lambda: self.preferences)

    @functools.cache  # noqa: B019  (a scene lives as long as its process; every stage asks)
    def _check_without_preferences(self) -> None:
        """Check of stages that read no preferences: fine-tuning needs no such file."""
        s, model, compute = self.settings, self.model, self.compute
        checks.check_xla_flags(compute)
        checks.check_mesh(self.model_configs(), compute)
        if any(settings.simulator == 'fine_tuned' for settings in s.arms.values()):
            checks.check_user_sft('config.user_sft', s.user_sft, model, self.conversations, compute)
        training, held_out = len(self._openings('train')), len(self._openings('test'))
        checks.check_rl_steps(s.rl, training, compute)
        if s.rl.validation is not None:
            checks.check_validation(s.rl, len(self._openings('dev')))
        found = training if s.scale.openings is None else min(training, s.scale.openings)
        if found < 2:
            raise ConfigError(f'config.scale.openings: expected at least 2, found {found} of {training} that fit')
        checks.check_split('config.scale.batch_size', s.scale.batch_size, compute)
        checks.check_split('config.evaluation.batch_size', s.evaluation.batch_size, compute)
        for field, wanted, most in (
            ('people', s.evaluation.people or held_out, held_out),
            ('matrix', s.evaluation.matrix, s.evaluation.people or held_out),
        ):
            if wanted > most:
                raise ConfigError(f'config.evaluation.{field}: expected at most the {most} that fit, found {wanted}')
        for arm in s.arms:
            self._check_arm(arm)

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        own = {arm: self.simulator_model(arm) for arm, settings in self.settings.arms.items() if settings.model}
        simulators = {f'simulator {arm}': model.config for arm, model in own.items()}
        return {'assistant': self.model.config, **simulators, **self.rewards.model_configs()}

    def _check_arm(self, arm: str) -> None:
        """Refuses a simulator that cannot hold the conversations: too long for its positions, or a prompt too long."""
        self.simulator_identity(arm)
        own = self.settings.arms[arm]
        if is_own(own.simulator):
            return
        field, agent = f'config.arms.{arm}', simulator_agent(self.settings, arm, self.simulator_model(arm), {})
        try:
            check_agents(agent, check_trained(assistant_agent(self.settings, self.model, {})), self.chat, self.limits)
        except ValueError as error:
            raise ConfigError(f'{field}: {error}') from error
        # Every simulator is scored on people's messages in rows of these lengths; see `likelihood_rows`.
        lengths, config = self.settings.user_sft.sft.batch.lengths, self.simulator_model(arm).config
        checks.check_row_lengths(f'config.user_sft.sft.batch.lengths (arm {arm})', lengths, config)
        if (own.model, own.instructions) == (None, None):
            return  # `_openings` are those that fit into its prompts
        for split in ('train', 'test') if self.settings.rl.validation is None else ('train', 'dev', 'test'):
            for example in self._openings(split):
                try:
                    found = len(agent.prompt(example).tokens)
                except EncodingError as error:  # texts of people were checked when they were read
                    raise ConfigError(f'{field}.instructions: {error}') from error
                if found > self.limits.prompt_tokens:
                    raise ConfigError(
                        f'{field}: its prompt for example {example.id} has {found} tokens, expected at most '
                        f'config.conversation.limits.prompt_tokens={self.limits.prompt_tokens}'
                    )

    @functools.cache  # noqa: B019  (a scene lives as long as its process)
    def _openings(self, split: str) -> list[Example]:
        """The openings that fit into the prompts of the assistant and of the usual simulators; prints how many do not.

        All arms start from the same people, those that are added later as well. So it is not this run's arms that
        decide, but the simulators of `conversation`; an arm with a longer prompt is refused.
        """
        size, usual = self.limits.prompt_tokens, usual_agents(self.settings, self.model)
        examples = [example_of(conversation) for conversation in of_split(self.conversations, split)]
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
            *(self._fine_tune(arm) for arm, own in s.arms.items() if own.simulator == 'fine_tuned'),
            *(reward_models[use] for use in self.rewards.uses()),
            *([self._scale()] if s.reward.by == 'reward_model' else []),
        ]

    def _fine_tune(self, arm: str) -> Stage:
        s = self.settings

        def run(folder: pathlib.Path) -> None:
            model = self.simulator_model(arm)
            fitting.fine_tune_user(folder, model, self.conversations, s.user_sft, self.compute)

        identity = {**self.identity(), **self._model_identity(arm), 'user_sft': s.user_sft}
        inputs = {**self.inputs(), **self._model_inputs(arm)}
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
        examples = subsample(self._openings('train'), settings.openings, settings.seed)
        score = self.rewards.score_replies(REWARD_STAGE)
        batches = self._scored_replies(self.assistant(None), examples, score, settings.batch_size, settings.seed)
        scores = np.concatenate([score for _, _, score in batches])
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
        simulator = self.settings.arms[arm].simulator
        if is_own(simulator):
            return own_simulator(f'config.arms.{arm}.simulator', simulator, self)
        stage, model = self.simulator_inputs(arm, seed).get('simulator'), self.simulator_model(arm)
        return simulator_agent(self.settings, arm, model, self._params(stage, model))

    def user_model(self) -> tuple[TransformerConfig, Params]:
        """The pretrained model itself."""
        return self.model.config, self._params(None, self.model)

    def _params(self, stage: pathlib.Path | None, model: Model) -> Params:
        """Parameters of a stage; None: those of the model, in the shards of training."""
        mesh = self.compute.mesh.make()
        return model.load_params(mesh) if stage is None else load_params(stage, model.config, mesh)

    def _model_identity(self, arm: str) -> dict[str, Any]:
        own = self.settings.arms[arm]
        model = (
            {} if own.model is None else {'simulator_model': sources.model_identity(self.simulator_model(arm).settings)}
        )
        return model | ({} if own.dtype is None else {'simulator_dtype': own.dtype})

    def simulator_identity(self, arm: str) -> Mapping[str, Any]:
        own, conversation = self.settings.arms[arm], self.settings.conversation
        common = {'limits': self.limits, 'assistant_sampling': conversation.assistant, **self._model_identity(arm)}
        if is_own(own.simulator):
            return common | own_identity(f'config.arms.{arm}.simulator', own.simulator)
        asked = self.settings.role_play(arm) if own.simulator == 'role_play' else conversation.fine_tuned
        agent = simulator_agent(self.settings, arm, self.simulator_model(arm), {})
        return common | {
            'simulator': own.simulator,
            'asked': asked,
            'told': fingerprint(lambda example: told(agent, example)),
        }

    def simulator_inputs(self, arm: str, seed: int) -> Mapping[str, pathlib.Path]:
        tuned = self.settings.arms[arm].simulator == 'fine_tuned'
        return self._model_inputs(arm) | ({'simulator': self.workdir / sft_stage(arm)} if tuned else {})

    def _model_inputs(self, arm: str) -> dict[str, pathlib.Path]:
        """The files of a simulator's own model."""
        own = self.settings.arms[arm].model
        return {} if own is None else sources.model_files('simulator_model', own)

    def simulator_per_seed(self, arm: str) -> bool:
        return False

    def arm_kind(self, arm: str) -> str:
        return self.settings.arms[arm].simulator

    def is_people(self, arm: str) -> bool:
        return False

    # Examples, rewards and measures.

    def examples_identity(self, split: str) -> Mapping[str, Any]:
        """Settings that decide which openings fit: see `_openings`."""
        usual = self.settings.conversation.role_play
        return {'openings': {'limits': self.limits, 'instructions': usual.instructions, 'signal': usual.signal}}

    def training_examples(self) -> list[Example]:
        return self._openings('train')

    def validation_examples(self, number: int) -> list[Example]:
        return subsample(self._openings('dev'), number, VALIDATION_SEED)

    def held_out_examples(self, numbers: range | None) -> list[Example]:
        """By one permutation for each seed, so that more people are the same ones and others."""
        openings, settings = self._openings('test'), self.settings.evaluation
        order = np.random.default_rng(settings.seed).permutation(len(openings))[: settings.people]
        return [openings[i] for i in (order if numbers is None else order[numbers.start : numbers.stop])]

    def reward(self, examples: Sequence[Example]) -> Score:
        return self.rewards.reward()

    def reward_identity(self) -> Mapping[str, Any]:
        return self.rewards.reward_identity()

    def reward_inputs(self) -> Mapping[str, pathlib.Path]:
        return self.rewards.reward_inputs()

    def outcomes(
        self, examples: Sequence[Example], batch: Trajectories, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, list[Any]], Mapping[str, int]]:
        with jax.set_mesh(self.compute.mesh.make()):
            return outcome_columns(examples, rows, self.rewards.score_conversations(batch, examples)), {}

    def shown(self, example: Example, row: Mapping[str, Any]) -> dict[str, Any]:
        messages = [{'role': m['role'], 'content': m['content']} for m in row['messages']]
        return {'example': example.id, 'intent': example.intent, 'traits': {}, 'messages': messages}

    def _measure_replies(self, assistant: ModelAgent, examples: Sequence[Example], shown: int) -> dict[str, Any]:
        """`result.json` of the held-out scores of single replies."""
        settings = self.settings.evaluation
        columns: dict[str, list[Any]] = {}
        talks = []
        for chosen, batch, scores in self._scored_replies(
            assistant, examples, self.rewards.score_held_out(), settings.batch_size, settings.seed
        ):
            rows = transcripts(placement.to_host(batch), self.chat.decode)[: len(chosen)]
            for name, values in outcome_columns(chosen, rows, scores).items():
                columns.setdefault(name, []).extend(values)
            talks += [self.shown(*pair) for pair in zip(chosen, rows, strict=True)]
        return {'outcomes': columns, 'statistics': {}, 'shown': talks[:shown]}

    def _scored_replies(
        self,
        assistant: ModelAgent,
        examples: Sequence[Example],
        score: ScoreConversations,
        batch_size: int,
        seed: int,
    ) -> Iterator[ScoredReplies]:
        return scored_replies(
            score, assistant, examples, self.model, self.limits, self.compute, batch_size=batch_size, seed=seed
        )

    def likelihood_rows(self, simulator: ModelAgent) -> tuple[list[Rendered], tuple[int, ...]]:
        """Held-out people's messages after their openings, in the simulator's view and under its system text."""
        settings = self.settings.user_sft
        lengths = settings.sft.batch.lengths
        swapped = simulator.policy.spec.own_header == self.chat.header('assistant')
        rows, counts = user_rows(
            of_split(self.conversations, 'test'),
            self.chat,
            lengths[-1],
            on_long='cut',
            system=lambda conversation: told(simulator, example_of(conversation)),
            view='swapped' if swapped else 'natural',
        )
        sources.print_counts('conversations to predict', len(rows), counts)
        return subsample(rows, settings.held_out, settings.held_out_seed), lengths

    def likelihood_identity(self) -> Mapping[str, Any]:
        settings = self.settings.user_sft
        return {
            'lengths': settings.sft.batch.lengths,
            'held_out': settings.held_out,
            'held_out_seed': settings.held_out_seed,
        }

    def likelihood_inputs(self) -> Mapping[str, pathlib.Path]:
        return {}

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


def sft_stage(arm: str) -> str:
    """The stage of an arm's fine-tuned simulator."""
    return f'sft/{arm}'


def _opened(field: str, settings: ModelSettings) -> Model:
    try:
        return sources.open_model(settings)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f'{field}: {error}') from error
