"""The settings of an experiment on a pretrained model and people's conversations."""

import dataclasses
from typing import Literal

from simrl.experiments.fitting import RewardModelSettings, UserSFTSettings
from simrl.experiments.judges import JudgeSettings, RewardSettings
from simrl.experiments.scene import is_own
from simrl.experiments.settings import MAX_SEED, ExperimentSettings
from simrl.experiments.sources import DataSettings, ModelSettings
from simrl.rollouts.agents import Limits
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import NO_EFFECT
from simrl.simulators.fine_tuned import FineTunedSettings
from simrl.simulators.role_play import RolePlaySettings

KINDS = ('role_play', 'fine_tuned')
Dtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True)
class ConversationSettings:
    """Conversations: the same settings for every arm, whichever simulator it trains against."""

    limits: Limits
    assistant: Sampling = Sampling()
    role_play: RolePlaySettings = RolePlaySettings()
    fine_tuned: FineTunedSettings = FineTunedSettings()


@dataclasses.dataclass(frozen=True)
class PretrainedSimulator:
    """The simulator of an arm."""

    simulator: str  # role_play, fine_tuned, or your own as 'module:function'
    model: ModelSettings | None = None  # with the assistant's tokenizer and template; None: the assistant's model
    dtype: Dtype | None = None  # dtype of its weights and its sampling; None: compute.sampling.dtype
    instructions: str | None = None  # prompt for role_play; None: conversation.role_play.instructions


@dataclasses.dataclass(frozen=True)
class ReplySettings:
    """Single replies of the initial assistant to training openings."""

    openings: int | None = None  # number of openings; None: all that fit
    batch_size: int = dataclasses.field(default=64, metadata=NO_EFFECT)  # replies sampled at once
    seed: int = 0  # seed of the choice of openings, and of sampling

    def __post_init__(self) -> None:
        if self.openings is not None and self.openings < 2:
            raise ValueError(f'ReplySettings.openings: expected at least 2, or None, found {self.openings}')
        if self.batch_size < 1:
            raise ValueError(f'ReplySettings.batch_size: expected at least 1, found {self.batch_size}')
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f'ReplySettings.seed: expected a number from 0 to {MAX_SEED}, found {self.seed}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedSettings(ExperimentSettings):
    """The whole experiment on a pretrained model and people's conversations."""

    scene: Literal['pretrained'] = 'pretrained'
    model: ModelSettings
    data: DataSettings
    user_sft: UserSFTSettings
    reward: RewardSettings = RewardSettings()  # the same for every arm
    held_out: JudgeSettings = JudgeSettings(rubric='outside')  # compares the assistants
    reward_model: RewardModelSettings  # gives the reward, with reward.by reward_model
    # Compares the assistants, with held_out.by reward_model; it reads the other half of people's choices.
    held_out_reward_model: RewardModelSettings
    conversation: ConversationSettings
    arms: dict[str, PretrainedSimulator]
    scale: ReplySettings  # replies that give the reward of a reward model its zero and unit

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm, settings in self.arms.items():
            where = f'PretrainedSettings.arms.{arm}'
            if settings.simulator not in KINDS and not is_own(settings.simulator):
                raise ValueError(
                    f"{where}.simulator: expected one of {', '.join(KINDS)} or 'module:function', "
                    f'found {settings.simulator!r}'
                )
            if is_own(settings.simulator) and (settings.model is not None or settings.dtype is not None):
                raise ValueError(f'{where}: expected no model and no dtype for a simulator of your own, found some')
            if settings.instructions is not None:
                if settings.simulator != 'role_play':
                    raise ValueError(f'{where}.instructions: expected None for {settings.simulator}, found some')
                try:
                    self.role_play(arm)
                except ValueError as error:
                    raise ValueError(f'{where}.instructions: {error}') from error
        judges = (self.reward, self.held_out)
        if all(judge.by != 'reward_model' for judge in judges) and self.reward.rubric == self.held_out.rubric:
            raise ValueError(
                'PretrainedSettings.held_out.rubric: expected another rubric than that of the reward, '
                f'found {self.held_out.rubric!r} for both'
            )
        halves = self.reward_model.half, self.held_out_reward_model.half
        if 'both' in halves or halves[0] == halves[1]:
            raise ValueError(
                f'PretrainedSettings.held_out_reward_model.half: expected the half that reward_model.half={halves[0]} '
                f'is not, found {halves[1]}'
            )

    def role_play(self, arm: str) -> RolePlaySettings:
        """Settings of an arm's role-playing simulator."""
        usual, instructions = self.conversation.role_play, self.arms[arm].instructions
        return usual if instructions is None else dataclasses.replace(usual, instructions=instructions)
