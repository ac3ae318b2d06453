"""One arm of a config as what its programs depend on: two agents without parameters, and settings. Loads no weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.experiments.pretrained_agents import assistant_agent, simulator_agent
from simrl.experiments.pretrained_settings import MIXTURE, MODELS, PretrainedSettings
from simrl.experiments.settings import Compute, ExperimentSettings
from simrl.rewards.reward_model import Frame, frame_of
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, ModelAgent
from simrl.rollouts.collect import rows_at_once
from simrl.rollouts.context import capacity_for
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.messages import header_lengths, room_to_receive, room_to_send
from simrl.run.config import ConfigError
from simrl.simulators.person import Spoken
from tools.compile_check.architectures import model_of

SIDES: Mapping[str, int] = {'user': USER, 'assistant': ASSISTANT}
SHOWN = (Spoken('stand-in', 'opening', ('message',)),)  # of few-shot prompts, whose texts change no program


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """The RL of one arm.

    Attributes:
        name: of the arm.
        assistant, user: without parameters; no user: it is off the device, or passes its messages as text.
        text_user: a user on the device that passes its messages as text.
        user_tokens: max tokens of the user's message.
        limits, rl, compute: of the config.
        frame: of the reward model; None: the reward is not one.
        chat: of the assistant's model.
        notes: what is not compiled, as sentences.
    """

    name: str
    assistant: ModelAgent
    user: ModelAgent | None
    text_user: ModelAgent | None
    user_tokens: int
    limits: Limits
    rl: RLSettings
    compute: Compute
    frame: Frame | None
    chat: Chat
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Conversations of a step."""
        return self.rl.prompts_per_step * self.rl.samples_per_prompt

    @property
    def rows_at_once(self) -> int:
        """Conversations in the device's batch."""
        return rows_at_once(self.rows, self.compute.rows_in_flight)

    @property
    def rows_of_microbatch(self) -> int:
        return self.rl.algorithm.rows_per_microbatch(self.rows)

    @property
    def max_new_tokens(self) -> tuple[int, int]:
        """Of the user's and of the assistant's messages."""
        return self.user_tokens, self.assistant.max_new_tokens

    @property
    def written(self) -> bool:
        """True if the user writes one opening for each example, before the conversations start."""
        return self.user is not None and self.user.opening == 'written'

    def side(self, role: int) -> ModelAgent | None:
        return self.user if role == USER else self.assistant

    def models(self) -> dict[str, ModelAgent]:
        """The models on the device, however their messages pass."""
        sides = {'user': self.user or self.text_user, 'assistant': self.assistant}
        return {name: agent for name, agent in sides.items() if agent is not None}

    def layers(self) -> dict[str, int]:
        """Layers of each model on the device."""
        return {name: agent.policy.spec.config.num_layers for name, agent in self.models().items()}

    def with_layers(self, layers: Mapping[str, int]) -> 'Work':
        """The same with fewer layers of each side."""

        def shorter(agent: ModelAgent | None, name: str) -> ModelAgent | None:
            if agent is None:
                return None
            spec = agent.policy.spec
            spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, num_layers=layers[name]))
            return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, spec=spec))

        changed: dict[str, Any] = {
            'user': shorter(self.user, 'user'),
            'text_user': shorter(self.text_user, 'user'),
            'assistant': shorter(self.assistant, 'assistant'),
        }
        return dataclasses.replace(self, **changed)

    def capacity(self, role: int) -> int:
        """Room of a side's context, in tokens.

        Raises:
            ConfigError: the model has too few positions.
        """
        agent = self.side(role)
        assert agent is not None
        partner, (name,) = self.max_new_tokens[role == USER], (name for name, of in SIDES.items() if of == role)
        try:
            return capacity(agent.policy.spec, partner, self.limits.prompt_tokens, self.limits.turns, name)
        except ValueError as error:
            raise ConfigError(f'config.conversation.limits: {error}') from error

    def prompt_width(self, role: int) -> int:
        """Columns of a side's prompts: with the opening in them where the user writes one."""
        agent = self.side(role)
        if agent is None:
            return 0
        opening = max(header_lengths(agent.policy.spec)) + self.user_tokens + 1 if self.written else 0
        return self.limits.prompt_tokens + opening


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of the longest conversation: who sends it, the tokens before it in each view, and the caches' size."""

    role: int
    before: Mapping[int, int]
    cache: int


def walk(work: Work) -> Iterator[Message]:
    """The sampled messages of a conversation from a given opening in which prompts and messages are as long as may be.

    The caches are of the sizes that `dialogue.grow_caches` gives them.
    """
    agents = {role: agent for role in SIDES.values() if (agent := work.side(role)) is not None}
    longest = dict.fromkeys(agents, work.limits.prompt_tokens)
    most = max(work.capacity(role) for role in agents)
    for number in range(1, 2 * work.limits.turns):  # the opening is in the prompts
        role = (USER, ASSISTANT)[number % 2]
        tokens = work.max_new_tokens[role == ASSISTANT]
        room = {
            view: room_to_send(agent.policy.spec) if view == role else room_to_receive(agent.policy.spec, tokens)
            for view, agent in agents.items()
        }
        needed = max(longest[view] + room[view] for view in agents)
        yield Message(role, dict(longest), capacity_for(needed, most))
        longest = {view: longest[view] + room[view] for view in agents}


def works_of(settings: ExperimentSettings) -> Iterator[Work]:
    """The RL of each arm that trains an assistant.

    Raises:
        ConfigError: a scene or a model that cannot be known without its files.
    """
    if not isinstance(settings, PretrainedSettings):
        raise ConfigError(
            f"config.scene: expected 'pretrained', found {settings.scene!r}, whose tokenizer a stage of it trains"
        )
    model = model_of('config.model', settings.model)
    assistant = assistant_agent(settings, model, {})
    by_model = settings.reward.by == 'reward_model'
    judge = () if by_model else (f'The reward is by {settings.reward.by}: no pass of a reward model.',)
    futures = (
        () if settings.reward.futures is None else ('Conversations of futures (reward.futures) are not compiled.',)
    )
    for arm, own in settings.arms.items():
        if arm in settings.held_out_simulators:
            continue
        user = text_user = None
        notes = (*judge, *futures)
        if own.simulator in MODELS and own.remote is None:
            whose = model
            if own.model is not None:
                whose = model_of(f'config.arms.{arm}.model', own.model, fine_tuned=own.weights == 'load')
            agent = simulator_agent(settings, arm, whose, {}, SHOWN)
            user, text_user = (agent, None) if own.exchange == 'tokens' else (None, agent)
        else:
            kind = 'a mixture' if own.simulator == MIXTURE else 'no model here'
            notes = (
                *notes,
                f'The simulator is {kind}: nothing of it is compiled, and a second piece of rows whose '
                'replies are awaited (rows_in_flight) is not counted.',
            )
        yield Work(
            name=arm,
            assistant=assistant,
            user=user,
            text_user=text_user,
            user_tokens=settings.conversation.limits.user_tokens,
            limits=settings.conversation.limits,
            rl=settings.rl,
            compute=settings.compute,
            frame=frame_of(model.chat) if by_model else None,
            chat=model.chat,
            notes=notes,
        )
