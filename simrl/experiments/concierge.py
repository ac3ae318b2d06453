"""The concierge world as a scene: people are a program, so that the truth about them is known.

1. The world's text trains a tokenizer, the initial assistant and a user model that knows stereotypes of users.
2. People talk with the initial assistant; the user model is fine-tuned on what they said, anew for each training seed.
3. An arm trains against a user model that is told whom to play, one that was fine-tuned, or people themselves (the
   oracle). Its reward is satisfaction, a function of intent and transcript alone.
4. All assistants meet the same new people.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example
from simrl.conversations.views import user_rows
from simrl.evaluation.results.measures import MeasureWords
from simrl.experiments import concierge_setup, work
from simrl.experiments.checks import (
    check_conversations,
    check_fitting,
    check_forecast,
    check_mesh,
    check_most,
    check_rl_steps,
    check_runtime,
    check_simulator_mesh,
    check_validation,
)
from simrl.experiments.concierge_people import (
    alike,
    log_example,
    outcomes,
    people_agent,
    people_examples,
    satisfaction,
    spoken,
)
from simrl.experiments.concierge_settings import PEOPLE, TOLD, ConciergeSettings, longest_conversation
from simrl.experiments.concierge_stages import ConciergeStages
from simrl.experiments.scene import LikelihoodRows, Measure, People, fingerprint, is_own, own_identity, own_simulator
from simrl.experiments.settings import Compute
from simrl.experiments.sources import subsample
from simrl.models.transformer import Params, TransformerConfig
from simrl.remote.usage import Usage
from simrl.rewards.rewards import Rewards, Score
from simrl.rollouts.agents import Agent, Limits, ModelAgent, told
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories
from simrl.run.stages import Stage
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.worlds.concierge.outcomes import vote
from simrl.worlds.concierge.people import person_of
from simrl.worlds.concierge.scripted import SOURCE

SATISFACTION = (
    'Satisfaction is the share of the intent met, 0 where the person left, less the effort it took. Win rate: how '
    'often people would prefer this assistant to the initial one, by expected votes; strict: higher satisfaction '
    'wins, ties count ½. Of two assistants that fail the one that fails sooner wins, for it costs less effort.'
)
EVALUATION_STEP = 2**31 - 3  # in the keys of conversations, far above those of training: no two uses draw the same
FIRST_IN_RL = 2 * 10**6  # of the people of the train split, above those of scripted conversations and logs


class ConciergeScene:
    """The concierge world as a `Scene`."""

    assistant_stage: str | None = concierge_setup.ASSISTANT_STAGE
    reward_name = 'satisfaction'
    reward_times = 100
    people_measure: str | None = PEOPLE
    rates: Mapping[str, tuple[str, str]] = {
        'words a message': ('words', 'messages'),
        'opening attributes': ('opening_attributes', 'conversations'),
        'typos': ('mistyped', 'values'),
        'against the intent': ('against_intent', 'statements'),
        'left': ('left', 'conversations'),
        'accepted': ('accepted', 'conversations'),
        'messages': ('messages', 'conversations'),
    }
    caution = (
        'The world is a program with a known answer: it checks the instrument and is no evidence about real people, '
        'and the gap between simulators partly restates how its stereotypes were written.'
    )

    def __init__(self, settings: ConciergeSettings, workdir: pathlib.Path) -> None:
        self.settings = settings
        self.workdir = workdir

    @property
    def limits(self) -> Limits:
        return self.settings.limits

    @property
    def compute(self) -> Compute:
        return self.settings.compute

    @functools.cached_property
    def stages(self) -> ConciergeStages:
        return ConciergeStages(self.settings, self.workdir, self.check)

    @property
    def chat(self) -> Chat:
        return self.stages.chat

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        sizes = {settings.size for arm, settings in self.settings.arms.items() if not self.is_people(arm)}
        users = {f'user model {name}': user.model for name, user in self.settings.users.items() if name in sizes}
        models = {'assistant': self.settings.assistant.model, **users}
        return {name: self.settings.config_of(model) for name, model in models.items()}

    def check(self) -> None:
        s, compute = self.settings, self.compute
        check_runtime(compute)
        check_mesh(self.model_configs(), compute)
        check_simulator_mesh({arm: self.simulator_model(arm) for arm in s.arms}, compute)
        config = s.config_of(s.assistant.model)
        check_fitting('config.assistant.sft', s.assistant.sft, config, compute)
        for size, user in s.users.items():
            config = s.config_of(user.model)
            for name, fitting in (('base', user.base), ('fine_tuning', user.fine_tuning)):
                check_fitting(f'config.users.{size}.{name}', fitting, config, compute)
        check_rl_steps(s.rl, s.rl_people, compute)
        if s.rl.validation is not None:
            check_validation(s.rl, s.rl.validation.examples)  # there is no end of people
        check_most('config.evaluation.replayed', s.evaluation.replayed, s.corpora.held_out, 'held-out conversations')
        check_conversations('config.evaluation.batch_size', s.evaluation.batch_size, compute)
        check_forecast(s.evaluation.forecast, sys.maxsize, compute)  # there is no end of people
        for arm in s.arms:
            self.simulator_identity(arm)

    def identity(self) -> Mapping[str, Any]:
        return self.stages.identity()

    def inputs(self) -> Mapping[str, pathlib.Path]:
        return self.stages.inputs()

    def setup(self) -> list[Stage]:
        return self.stages.setup()

    def assistant(self, stage: pathlib.Path | None) -> ModelAgent:
        assert stage is not None  # every assistant of this world is trained
        return self.stages.assistant(stage)

    def simulator(self, arm: str, seed: int) -> Agent:
        """People themselves; or a user model. All are told the intent; what else they are told is the arm."""
        settings = self.settings.arms[arm]
        if settings.simulator == PEOPLE:
            return people_agent(self.settings.world, self.limits)
        if is_own(settings.simulator):
            return own_simulator(f'config.arms.{arm}.simulator', settings.simulator, self)
        stage, mesh = self.simulator_inputs(arm, seed)['simulator'], self.compute.mesh_of_simulators()
        agent = fine_tuned(
            self.chat,
            *self.stages.load(stage, self.settings.users[settings.size].model, mesh),
            self.compute.sampling,
            max_new_tokens=self.limits.user_tokens,
            settings=FineTunedSettings(Sampling()),
            system=TOLD[settings.simulator],
        )
        return dataclasses.replace(agent, mesh=mesh)

    def simulator_identity(self, arm: str) -> Mapping[str, Any]:
        simulator = self.settings.arms[arm].simulator
        if is_own(simulator):
            return own_identity(f'config.arms.{arm}.simulator', simulator)
        if simulator == PEOPLE:
            return {'simulator': simulator}
        return {'simulator': simulator, 'told': fingerprint(TOLD[simulator])}

    def simulator_inputs(self, arm: str, seed: int) -> Mapping[str, pathlib.Path]:
        settings = self.settings.arms[arm]
        if settings.simulator == PEOPLE:
            return {}
        stage = concierge_setup.base_user_stage(settings.size)
        if settings.simulator == 'fine_tuned':
            stage = concierge_setup.fine_tuned_stage(arm, seed)
        return {'simulator': self.workdir / stage}

    def simulator_per_seed(self, arm: str) -> bool:
        return self.settings.arms[arm].simulator == 'fine_tuned'

    def arm_kind(self, arm: str) -> str:
        return self.settings.arms[arm].simulator

    def simulator_model(self, arm: str) -> TransformerConfig | None:
        settings = self.settings.arms[arm]
        if settings.simulator not in TOLD:
            return None
        return self.settings.config_of(self.settings.users[settings.size].model)

    def model_name(self, arm: str) -> str | None:
        settings = self.settings.arms[arm]
        return f'the user model of the size {settings.size}' if settings.simulator in TOLD else None

    def is_people(self, arm: str) -> bool:
        return self.settings.arms[arm].simulator == PEOPLE

    def user_model(self) -> tuple[TransformerConfig, Params]:
        """The user model of the usual size that knows stereotypes; its system text is 'NAME: INTENT'."""
        usual = concierge_setup.USUAL_SIZE
        return self.stages.load(self.workdir / concierge_setup.base_user_stage(usual), self.settings.users[usual].model)

    def examples_identity(self, split: str) -> Mapping[str, Any]:
        return {'rl_people': self.settings.rl_people} if split == 'train' else {}

    def training_examples(self) -> list[Example]:
        return people_examples(self.settings.world, 'train', range(FIRST_IN_RL, FIRST_IN_RL + self.settings.rl_people))

    def validation_examples(self, number: int) -> list[Example]:
        return people_examples(self.settings.world, 'dev', range(number))

    def held_out_examples(self, numbers: range | None) -> list[Example]:
        assert numbers is not None  # there is no end of people
        return people_examples(self.settings.world, 'test', numbers)

    def reward(self, examples: Sequence[Example]) -> Callable[[Trajectories], Rewards]:
        return satisfaction(self.chat, examples)

    def futures(self) -> None:
        return None

    def reward_identity(self) -> Mapping[str, Any]:
        return {}

    def reward_inputs(self) -> Mapping[str, pathlib.Path]:
        return {}

    def score(self, examples: Sequence[Example]) -> Score:
        return self.reward(examples)

    def outcomes(
        self, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], scores: np.ndarray
    ) -> tuple[dict[str, list[Any]], Mapping[str, int]]:
        return outcomes(examples, rows)

    def shown(self, example: Example, row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            'example': example.id,
            'intent': example.intent,
            'traits': dataclasses.asdict(person_of(self.settings.world, example.id).traits),
            'messages': [{'role': role, 'content': text} for role, text in spoken(row)],
        }

    def usage(self) -> Mapping[str, Usage]:
        return {}

    def people(self) -> People:
        return People(
            words='People are a program: the gradient is that of conversations with them, and a reply is worth what '
            'their conversation with the initial assistant came to.',
            agent=alike(people_agent(self.settings.world, self.limits)),
            limits=self.limits,
            value=self.score,
            logs=None,
            identity={},
            inputs={},
        )

    def measures(self) -> Mapping[str, Measure]:
        def meet(assistant: ModelAgent, examples: Sequence[Example], shown: int) -> dict[str, Any]:
            user = people_agent(self.settings.world, self.limits)
            score = self.score(examples)
            return work.conversations_with(
                user, assistant, examples, self, score, name=PEOPLE, step=EVALUATION_STEP, shown=shown
            )

        return {
            PEOPLE: Measure(
                run=meet,
                identity={},
                inputs={},
                prefer=vote,
                words=MeasureWords(
                    title='Satisfaction of new people', score='satisfaction', unit='people', about=SATISFACTION
                ),
            )
        }

    def likelihood_rows(self, simulator: ModelAgent) -> LikelihoodRows:
        """Held-out people's messages to the initial assistant, under the simulator's own system text.

        Rows are as long as conversations may be, so that the same tokens count whatever a simulator is told.
        """
        logs = self.stages.held_out_logs()
        length = longest_conversation(self.limits)
        rows, _ = user_rows(
            logs, self.chat, length, system=lambda log: told(simulator, log_example(log)), openings='trained'
        )
        return LikelihoodRows(rows, [SOURCE] * len(rows), (length,))

    def people_to_replay(self, number: int) -> list[Conversation]:
        return subsample(self.stages.held_out_logs(), number, self.settings.evaluation.seed)

    def example_of(self, conversation: Conversation) -> Example:
        return log_example(conversation)

    def likelihood_identity(self) -> Mapping[str, Any]:
        return {}

    def likelihood_inputs(self) -> Mapping[str, pathlib.Path]:
        return {'logs': self.workdir / concierge_setup.LOGS_STAGE}
