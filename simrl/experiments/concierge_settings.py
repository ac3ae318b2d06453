"""The settings of an experiment in the concierge world."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal

from simrl.conversations.records import Example
from simrl.experiments import concierge_setup
from simrl.experiments.scene import is_own
from simrl.experiments.settings import ExperimentSettings
from simrl.experiments.sources import RandomModel
from simrl.models.transformer import TransformerConfig
from simrl.rollouts.agents import Limits
from simrl.simulators.fine_tuned import told_intent
from simrl.simulators.personas import drawn_name, one_name
from simrl.training.sft import SFTSettings
from simrl.worlds.concierge.people import STEREOTYPES, World, persona_name
from simrl.worlds.concierge.replies import TURNS

PEOPLE = 'people'  # the simulator of the oracle's arm
RESERVED = re.compile(r'assistant|people|base_user(-.*)?')  # names of stages and of the matrix's last row
TOLD: Mapping[str, Callable[[Example], str]] = {  # kinds of simulators, and what each one is told
    'role_play': one_name('default'),
    'persona': drawn_name(persona_name),
    'fine_tuned': told_intent,
    **{name: one_name(name) for name in STEREOTYPES if name != 'default'},  # role-play of another stereotype
}
AROUND_MESSAGE = 2  # tokens: a header and an end-of-turn


@dataclasses.dataclass(frozen=True)
class AssistantSettings:
    """The initial assistant."""

    model: RandomModel
    sft: SFTSettings  # imitation of a scripted assistant of mixed quality


@dataclasses.dataclass(frozen=True)
class UserModelSettings:
    """A user model of one size."""

    model: RandomModel
    base: SFTSettings  # imitation of stereotypes
    fine_tuning: SFTSettings  # imitation of people; the training seed is added to batch.seed


@dataclasses.dataclass(frozen=True)
class ConciergeSimulator:
    """The simulator of an arm in the concierge world."""

    simulator: str  # role_play, persona, fine_tuned, a stereotype's name, people (the oracle), or 'module:function'
    size: str = 'medium'  # key of `users`: the size of its user model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConciergeSettings(ExperimentSettings):
    """The whole experiment in the concierge world."""

    scene: Literal['concierge'] = 'concierge'
    world: World = World()
    corpora: concierge_setup.Corpora
    assistant: AssistantSettings
    users: dict[str, UserModelSettings]  # user models by size
    limits: Limits
    arms: dict[str, ConciergeSimulator]
    rl_people: int  # people, or their intents, that RL starts conversations from

    def config_of(self, model: RandomModel) -> TransformerConfig:
        """The decoder of a model, whose vocabulary has the terminal token, too."""
        return model.transformer_config(self.corpora.vocabulary + 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm, settings in self.arms.items():
            where, simulator = f'ConciergeSettings.arms.{arm}', settings.simulator
            if RESERVED.fullmatch(arm):
                raise ValueError(f'ConciergeSettings.arms: {arm!r} is the name of something else in this world')
            if simulator not in (*TOLD, PEOPLE) and not is_own(simulator):
                raise ValueError(
                    f"{where}.simulator: expected one of {', '.join((*TOLD, PEOPLE))} or 'module:function', "
                    f'found {simulator!r}'
                )
            if simulator != PEOPLE and settings.size not in self.users:
                raise ValueError(
                    f'{where}.size: expected one of {", ".join(self.users)}, the sizes of users, '
                    f'found {settings.size!r}'
                )
            if is_own(simulator) and settings.size != concierge_setup.USUAL_SIZE:
                raise ValueError(
                    f'{where}.size: expected {concierge_setup.USUAL_SIZE!r} for a simulator of your own, the size of '
                    f'`user_model`, found {settings.size!r}'
                )
        if len(oracles := [arm for arm, settings in self.arms.items() if settings.simulator == PEOPLE]) > 1:
            raise ValueError(f'ConciergeSettings.arms: expected at most one arm of people, found {", ".join(oracles)}')
        if people := [arm for arm in self.held_out_simulators if self.arms[arm].simulator == PEOPLE]:
            raise ValueError(
                f'ConciergeSettings.held_out_simulators: expected simulators, found {people[0]!r}: every assistant is '
                'measured on people'
            )
        if self.rl_people < 1:
            raise ValueError(f'ConciergeSettings.rl_people: expected at least 1, found {self.rl_people}')
        if self.evaluation.people is None:
            raise ValueError('ConciergeSettings.evaluation.people: expected a number of people, found None')
        if self.limits.turns > TURNS:
            raise ValueError(
                f'ConciergeSettings.limits.turns: expected at most {TURNS}, for which the text of the world and the '
                f'patience of its stereotypes are made, found {self.limits.turns}'
            )
        models = {'assistant': self.assistant.model} | {f'users.{size}': u.model for size, u in self.users.items()}
        needed = longest_conversation(self.limits)
        for name, model in models.items():
            if needed > model.max_positions:
                raise ValueError(
                    f'ConciergeSettings.{name}.model.max_positions: expected at least the {needed} tokens that a '
                    f'conversation of limits may take, found {model.max_positions}'
                )


def longest_conversation(limits: Limits) -> int:
    """Tokens of a conversation in any view, at most."""
    return limits.prompt_tokens + limits.turns * (limits.assistant_tokens + limits.user_tokens + 2 * AROUND_MESSAGE)
