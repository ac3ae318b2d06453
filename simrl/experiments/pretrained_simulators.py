"""The simulators of a pretrained experiment's arms: their models and agents, what their stages depend on, their checks.

Of one arm: `model` is opened without weights; `agent` makes a `ModelAgent`, a `HostAgent` for a model that is met
through its texts or behind an endpoint, or a `MixedAgent` of other arms' simulators.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from simrl.conversations.chat import ROLE_CODES, TERMINAL_TEXT, EncodingError
from simrl.conversations.records import Conversation, Example
from simrl.experiments import checks, sources
from simrl.experiments.endpoints import Endpoints, check_endpoint
from simrl.experiments.fitting import fine_tune_user
from simrl.experiments.pretrained_agents import assistant_agent, mixture_of, remote_agent, simulator_agent, tuned_text
from simrl.experiments.pretrained_data import PretrainedData
from simrl.experiments.pretrained_settings import MIXTURE, PretrainedSimulator
from simrl.experiments.scene import PROBES, fingerprint, is_own, own_identity
from simrl.experiments.sources import Model
from simrl.models.transformer import Params
from simrl.rl.train import check_trained
from simrl.rollouts.agents import Agent, MixedAgent, ModelAgent, OneAgent, Opening, mesh_of, opening_only, told
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.dialogue import check_agents
from simrl.run.config import ConfigError
from simrl.simulators.person import Spoken, spoken_of
from simrl.simulators.remote import request_keys
from simrl.simulators.text_view import check_positions, text_agent

# An arm's fields that its stages name only where they differ from these, so that older runs can be resumed.
USUAL = PretrainedSimulator('role_play')
NEWER = ('intent', 'opening', 'guidelines', 'few_shot', 'source_tag', 'weights', 'repeats', 'exchange', 'remote')
PROBE_PEOPLE = tuple(Spoken(f'probe {i}', f'opening {i} of another', (f'message {i}',)) for i in range(2 * PROBES))


class Simulators:
    """The simulators of all arms."""

    def __init__(self, data: PretrainedData, workdir: pathlib.Path, endpoints: Endpoints) -> None:
        self.settings, self.workdir, self.data, self.endpoints = data.settings, workdir, data, endpoints

    @functools.cache  # noqa: B019  (lives as long as its process)
    def model(self, arm: str) -> Model:
        """The model of an arm's simulator, without its weights."""
        own, field = self.settings.arms[arm], f'config.arms.{arm}.model'
        if own.model is None:
            return self.data.model
        model = sources.open_for(field, own.model)
        if own.weights == 'load' and not model.knows_terminal:
            raise ConfigError(
                f"{field}: expected a fine-tuned simulator (weights='load'), whose tokenizer has {TERMINAL_TEXT}, "
                f'found {own.model.source} without it'
            )
        if own.exchange == 'text' or own.remote is not None:
            return model
        if model.vocabulary != self.data.model.vocabulary:
            raise ConfigError(
                f'{field}: expected the vocabulary of config.model, found another: agents on the device read the same '
                f"token ids; config.arms.{arm}.exchange='text' lets its messages pass as text"
            )
        chats = (model.chat, self.data.model.chat)
        if any(
            len({(chat.headers[role], chat.end_of_turn[role], *chat.encode('a', role)) for chat in chats}) > 1
            for role in ROLE_CODES
        ):
            raise ConfigError(f'{field}: expected the headers of config.model in the chat template, found others')
        return model

    def own_models(self) -> dict[str, Model]:
        """The models on the device that are not the assistant's, by arm."""
        arms = self.settings.arms
        return {arm: self.model(arm) for arm, own in arms.items() if own.model is not None and own.remote is None}

    def agent(
        self, arm: str, params: Callable[[str], Params], own: Callable[[str], Agent], mesh: Mesh | None = None
    ) -> Agent:
        """The user of an arm.

        Args:
            params: an arm -> the parameters of its model.
            own: an arm -> its simulator, one of the user's own.
            mesh: of the parameters; None: that of the assistant.
        """
        settings = self.settings.arms[arm]
        if settings.simulator == MIXTURE:
            members = (self._one(member, params, own, mesh) for member in settings.mixture)
            return MixedAgent(tuple(members), mixture_of(settings.mixture))
        return self._one(arm, params, own, mesh)

    def _one(
        self, arm: str, params: Callable[[str], Params], own: Callable[[str], Agent], mesh: Mesh | None
    ) -> OneAgent:
        settings = self.settings.arms[arm]
        if is_own(settings.simulator):
            agent = own(arm)
            if isinstance(agent, MixedAgent):
                raise ConfigError(f'config.arms.{arm}: expected one simulator in a mixture, found a MixedAgent')
            return agent
        if settings.remote is not None:
            people = self._shown(arm)
            call = self.endpoints.of(settings.remote.endpoint).call
            return remote_agent(self.settings, arm, self.model(arm), people, call)
        agent = dataclasses.replace(self.on_device(arm, params(arm)), mesh=mesh)
        if settings.exchange == 'tokens':
            return agent
        mesh = mesh_of(agent, self.settings.compute.mesh.make())
        return text_agent(for_sampling(agent, mesh), self.model(arm).chat, mesh)

    def on_device(self, arm: str, params: Params, people: Sequence[Spoken] | None = None) -> ModelAgent:
        """The model of an arm as an agent, whichever way its messages pass; `{}`: it has prompts alone.

        Args:
            people: of few-shot prompts; None: those of the training split.
        """
        people = self._shown(arm) if people is None else people
        return simulator_agent(self.settings, arm, self.model(arm), params, people)

    def _shown(self, arm: str) -> Sequence[Spoken]:
        own = self.settings.arms[arm]
        return () if own.few_shot is None else self._spoken(own.opening)

    @functools.cache  # noqa: B019  (lives as long as its process)
    def _spoken(self, opening: Opening) -> list[Spoken]:
        """Messages of the training split; where simulators write openings, openings too."""
        return spoken_of(self.data.people_of('train'), openings=opening == 'written')

    def identity(self, arm: str) -> dict[str, Any]:
        """Settings and prompts that an arm's messages depend on, beside its inputs."""
        own, conversation = self.settings.arms[arm], self.settings.conversation
        common = {'limits': conversation.limits, 'assistant_sampling': conversation.assistant}
        if own.simulator == MIXTURE:
            members = {member: self.identity(member) for member in own.mixture}
            return common | {'simulator': MIXTURE, 'mixture': own.mixture, 'members': members}
        common |= self.model_identity(arm)
        if is_own(own.simulator):
            return common | own_identity(f'config.arms.{arm}.simulator', own.simulator)
        newer = {name: getattr(own, name) for name in NEWER if getattr(own, name) != getattr(USUAL, name)}
        role_plays, told_of = own.simulator == 'role_play', self._told(arm)
        try:
            told_of_probes = fingerprint(told_of)
        except ValueError as error:  # no message of few-shot is short enough
            raise ConfigError(f'config.arms.{arm}: {error}') from error
        return {
            **common,
            **newer,
            'simulator': own.simulator,
            'asked': self.settings.role_play(arm) if role_plays else conversation.fine_tuned,
            'told': told_of_probes,
        }

    def _told(self, arm: str) -> Callable[[Example], object]:
        """An example -> an arm's system text; behind an endpoint, the keys of all that is sent."""
        if self.settings.arms[arm].remote is None:
            agent = self.on_device(arm, {}, PROBE_PEOPLE)
            return lambda example: told(agent, example)
        make = functools.partial(remote_agent, self.settings, arm, self.model(arm), PROBE_PEOPLE)
        return functools.partial(request_keys, make)

    def model_identity(self, arm: str) -> dict[str, Any]:
        own = self.settings.arms[arm]
        model = {} if own.model is None else {'simulator_model': sources.model_identity(self.model(arm).settings)}
        return model | ({} if own.dtype is None else {'simulator_dtype': own.dtype})

    def inputs(self, arm: str) -> dict[str, pathlib.Path]:
        """Files and stages that an arm's simulator is made of."""
        own = self.settings.arms[arm]
        if own.simulator == MIXTURE:
            return {f'{name} of {member}': x for member in own.mixture for name, x in self.inputs(member).items()}
        stage = {'simulator': self.workdir / sft_stage(arm)} if fine_tuned_here(own) else {}
        personas = {} if own.personas is None else {'personas': own.personas}
        return self.model_inputs(arm) | personas | stage

    def model_inputs(self, arm: str) -> dict[str, pathlib.Path]:
        """The files of a simulator's own model."""
        own = self.settings.arms[arm].model
        return {} if own is None else sources.model_files('simulator_model', own)

    def fine_tune(self, arm: str, folder: pathlib.Path) -> None:
        """Fine-tunes the simulator of an arm, as the work of a stage."""
        people = [*self.data.people_of('train'), *self.data.people_of('test')]
        s, system = self.settings, tuned_text(self.settings.arms[arm])
        fine_tune_user(folder, self.model(arm), people, s.user_sft, s.compute, system)

    # Checks.

    def _splits(self) -> tuple[str, ...]:
        return ('train', 'test') if self.settings.rl.validation is None else ('train', 'dev', 'test')

    def check_people(self, arm: str) -> None:
        """Refuses data that an arm's simulator cannot be told or trained on."""
        own, s = self.settings.arms[arm], self.settings
        if own.intent == 'required':
            for split in self._splits():
                missing = [person.id for person in self.data.people_of(split) if person.intent is None]
                if missing:
                    raise ConfigError(
                        f'config.arms.{arm}.intent: {sources.conversations_file(s.data)}: conversation {missing[0]}: '
                        f'expected an intent, found none, as in {len(missing)} of the split {split!r}; '
                        "config.conversation.without_intent='drop' drops and counts them, for every arm"
                    )
        if fine_tuned_here(own):
            people, model = [*self.data.people_of('train'), *self.data.people_of('test')], self.model(arm)
            if model is not self.data.model:  # whose tokenizer was asked when they were read
                self._check_texts(arm, people)
            checks.check_user_sft('config.user_sft', s.user_sft, model, people, s.compute, tuned_text(own))

    def _check_texts(self, arm: str, people: Sequence[Conversation]) -> None:
        """Refuses messages that the tokenizer of an arm's own model has no tokens for."""
        for person in people:
            try:
                for message in person.spoken:
                    self.model(arm).chat.check(message.content)
            except EncodingError as error:
                file = sources.conversations_file(self.settings.data)
                raise ConfigError(f'config.arms.{arm}.model: {file}: conversation {person.id}: {error}') from error

    def check(self, arm: str) -> None:
        """Refuses two agents that cannot hold the conversations: too few positions, or a prompt that is too long."""
        self.identity(arm)
        own, s = self.settings.arms[arm], self.settings
        if own.simulator == MIXTURE:
            return  # its members are arms, too
        field, limits = f'config.arms.{arm}', s.conversation.limits
        agent = None if is_own(own.simulator) else self.on_device(arm, {})
        by_tokens = own.exchange == 'tokens' and own.remote is None
        # The assistant alone, where no more is known of its partner than how long messages may be.
        alone = dataclasses.replace(opening_only(), max_new_tokens=limits.user_tokens)
        try:
            user = agent if agent is not None and by_tokens else alone
            check_agents(user, check_trained(assistant_agent(s, self.data.model, {})), self.data.model.chat, limits)
            if agent is not None and own.exchange == 'text':
                check_positions(agent, limits.prompt_tokens)
        except ValueError as error:
            raise ConfigError(f'{field}: {error}') from error
        if agent is None:
            return
        if (own.model, own.instructions) != (None, None) or own.tells_person:  # else its openings are those that fit
            self._check_prompts(arm, agent)
        if by_tokens:
            self._check_predicts(arm, agent)
        if own.remote is not None:
            check_endpoint(f'{field}.remote.endpoint', own.remote.endpoint)

    def _check_prompts(self, arm: str, agent: ModelAgent) -> None:
        field, most = f'config.arms.{arm}', self.settings.conversation.limits.prompt_tokens
        for example in (example for split in self._splits() for example in self.data.openings(split)):
            try:
                found = len(agent.prompt(example).tokens)
            except EncodingError as error:  # of its own tokenizer: of people's texts the assistant's was asked
                raise ConfigError(f'{field}: its prompt for example {example.id}: {error}') from error
            except ValueError as error:  # no message of few-shot is short enough
                raise ConfigError(f'{field}: {error}') from error
            if found > most:
                raise ConfigError(
                    f'{field}: its prompt for example {example.id} has {found} tokens, expected at most '
                    f'config.conversation.limits.prompt_tokens={most}; '
                    f'config.conversation.reserved_prompt_tokens would need {found - most} more'
                )

    def _check_predicts(self, arm: str, agent: ModelAgent) -> None:
        """Refuses data and row lengths in which its likelihood cannot be measured."""
        field, lengths = 'config.user_sft.sft.batch.lengths', self.settings.user_sft.sft.batch.lengths
        checks.check_row_lengths(f'{field} (arm {arm})', lengths, self.model(arm).config)
        people = self.data.people_to_predict
        if not people:
            raise ConfigError(
                f"{field}: expected a length that holds a held-out person's opening, its reply and the next message, "
                f'found at most {lengths[-1]}'
            )
        longest = max(people, key=lambda one: sum(len(message.content) for message in one.spoken))
        try:
            self.data.rows_to_predict(agent, [longest])
        except ValueError as error:
            raise ConfigError(f'{field} (arm {arm}): in the positions of its model, {error}') from error


def fine_tuned_here(own: PretrainedSimulator) -> bool:
    """True if the arm's simulator is fine-tuned by a stage of this run."""
    return own.simulator == 'fine_tuned' and own.weights == 'fine_tune'


def sft_stage(arm: str) -> str:
    """The stage of an arm's fine-tuned simulator."""
    return f'sft/{arm}'
