"""The settings of an experiment on a pretrained model and people's conversations."""

import dataclasses
import pathlib
from typing import Literal

from simrl.experiments.fitting import RewardModelSettings, UserSFTSettings
from simrl.experiments.judges import JudgeSettings, RewardSettings
from simrl.experiments.scene import is_own
from simrl.experiments.settings import MAX_SEED, ExperimentSettings
from simrl.experiments.sources import DataSettings, ModelSettings
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.agents import Limits, Opening, Resampling
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import NO_EFFECT
from simrl.simulators.fine_tuned import FineTunedSettings
from simrl.simulators.person import FewShotSettings, Intent
from simrl.simulators.prompts import GUIDELINES, OPENING_INSTRUCTIONS, PERSON_INSTRUCTIONS
from simrl.simulators.remote import PromptAs
from simrl.simulators.role_play import RolePlaySettings, check_fields

MIXTURE = 'mixture'
KINDS = ('role_play', 'fine_tuned', MIXTURE)
Dtype = Literal['float32', 'bfloat16']
Weights = Literal['fine_tune', 'load']
Exchange = Literal['tokens', 'text']
MODELS = ('role_play', 'fine_tuned')
# Fields of an arm that only some kinds of simulators use.
USED_BY = {
    **dict.fromkeys(('instructions', 'opening', 'guidelines', 'personas', 'few_shot'), ('role_play',)),
    **dict.fromkeys(('source_tag', 'weights'), ('fine_tuned',)),
    **dict.fromkeys(('model', 'dtype', 'intent', 'repeats', 'exchange', 'remote'), MODELS),
    'mixture': (MIXTURE,),
}


@dataclasses.dataclass(frozen=True)
class ConversationSettings:
    """Conversations: the same settings for every arm, whichever simulator it trains against."""

    limits: Limits
    # Tokens of limits.prompt_tokens that openings leave free, for arms whose prompts say more than the usual ones.
    reserved_prompt_tokens: int = 0
    without_intent: Literal['keep', 'drop'] = 'keep'  # conversations without an intent; 'drop' counts them
    assistant: Sampling = Sampling()
    role_play: RolePlaySettings = RolePlaySettings()
    fine_tuned: FineTunedSettings = FineTunedSettings()

    def __post_init__(self) -> None:
        if not 0 <= self.reserved_prompt_tokens < self.limits.prompt_tokens:
            raise ValueError(
                f'ConversationSettings.reserved_prompt_tokens: expected 0 to {self.limits.prompt_tokens - 1}, fewer '
                f'than limits.prompt_tokens, found {self.reserved_prompt_tokens}'
            )


@dataclasses.dataclass(frozen=True)
class RemoteSettings:
    """A simulator behind an endpoint."""

    endpoint: EndpointSettings
    # chat and json of role_play: plain messages, or an object {current_answer, thought, response}; raw of fine_tuned:
    # completions of its own view, in the tokens of the arm's `model`.
    form: Literal['chat', 'json', 'raw'] = 'chat'
    max_tokens: int = 1024  # max tokens of an answer to chat or json, of arXiv:2605.09808
    tries: int = 5  # max replies that break the rules of `simulators.replies`, for one message; repeats count apart
    prompt: PromptAs = 'ids'  # of raw: token ids, or text with its special tokens written out

    def __post_init__(self) -> None:
        for field in ('max_tokens', 'tries'):
            if getattr(self, field) < 1:
                raise ValueError(f'RemoteSettings.{field}: expected at least 1, found {getattr(self, field)}')


@dataclasses.dataclass(frozen=True)
class PretrainedSimulator:
    """The simulator of an arm. What it is told is drawn by example: all conversations of a group meet one person."""

    simulator: str  # role_play, fine_tuned, mixture, or your own as 'module:function'
    model: ModelSettings | None = None  # with the assistant's tokenizer and template; None: the assistant's model
    dtype: Dtype | None = None  # dtype of its weights and its sampling; None: compute.sampling.dtype
    # Prompt for role_play; None: conversation.role_play.instructions, or a text of `simulators.prompts` for a simulator
    # that is told of a person or writes openings.
    instructions: str | None = None
    # The example's intent, told where it is known or of every example ('required'). For fine_tuned it is the system
    # text, in training too.
    intent: Intent = 'none'
    source_tag: bool = False  # the data set's name in the system text of fine_tuned, in training too
    repeats: Resampling | None = None  # how verbatim repeats are sampled again; None: they stay
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)  # weights of other arms, drawn by example
    # 'text': its messages pass as text, so that its model may have another tokenizer than the assistant's.
    exchange: Exchange = 'tokens'
    remote: RemoteSettings | None = None  # an endpoint that serves it; None: it is on the device
    weights: Weights = 'fine_tune'  # of fine_tuned: trained here from `model`, or `model` is such a simulator already
    opening: Opening = 'given'  # 'written': role_play opens each example's conversations with a message of its own
    guidelines: tuple[str, ...] = ()  # names of `prompts.GUIDELINES`, one of which is drawn for each example
    personas: pathlib.Path | None = (
        None  # a .txt or .jsonl file of descriptions, one of which is drawn for each example
    )
    few_shot: FewShotSettings | None = None  # messages of other people, of the training split

    def __post_init__(self) -> None:
        if unknown := [name for name in self.guidelines if name not in GUIDELINES]:
            raise ValueError(f'PretrainedSimulator.guidelines: expected {", ".join(GUIDELINES)}, found {unknown[0]!r}')
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), USED_BY.get(field.name)
            unset = field.default if field.default is not dataclasses.MISSING else {}
            if kinds is not None and self.simulator not in kinds and value != unset:
                raise ValueError(
                    f'PretrainedSimulator.{field.name}: expected {unset!r} for {self.simulator}, found {value!r}'
                )
        self._check_remote()
        if bool(self.mixture) != (self.simulator == MIXTURE):
            raise ValueError(f'PretrainedSimulator.mixture: expected weights of other arms, found {self.mixture}')
        if any(weight <= 0 for weight in self.mixture.values()):
            raise ValueError(f'PretrainedSimulator.mixture: expected weights above 0, found {self.mixture}')
        if self.simulator == 'fine_tuned' and self.intent == 'where_known':
            raise ValueError(
                "PretrainedSimulator.intent: expected 'none' or 'required' for fine_tuned, whose rows all have a "
                "system text or all have none, found 'where_known'"
            )
        if self.weights == 'load' and self.model is None:
            raise ValueError("PretrainedSimulator.model: expected a model for weights='load', found None")

    def _check_remote(self) -> None:
        if self.remote is None:
            return
        forms = {'role_play': ('chat', 'json'), 'fine_tuned': ('raw',)}[self.simulator]
        if self.remote.form not in forms:
            raise ValueError(
                f'PretrainedSimulator.remote.form: expected {" or ".join(forms)} for {self.simulator}, '
                f'found {self.remote.form}'
            )
        for field, wanted in (('dtype', None), ('exchange', 'tokens')):
            if getattr(self, field) != wanted:
                raise ValueError(
                    f'PretrainedSimulator.{field}: expected {wanted!r} for a remote simulator, found another'
                )
        if self.remote.form == 'raw' and self.weights != 'load':
            raise ValueError("PretrainedSimulator.weights: expected 'load' for a remote simulator, found 'fine_tune'")
        if self.remote.form != 'raw' and self.model is not None:
            raise ValueError('PretrainedSimulator.model: expected None: the endpoint names the model, found one')
        if self.remote.form == 'json' and self.instructions is not None:
            raise ValueError('PretrainedSimulator.instructions: expected None for JSON role-play, found some')

    @property
    def tells_person(self) -> bool:
        """True if a role-playing simulator is told more of a person than the opening."""
        parts = (self.guidelines, self.personas is not None, self.few_shot is not None)
        return self.intent != 'none' or self.opening == 'written' or any(parts)


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
            for member in settings.mixture:
                found = self.arms.get(member)
                if found is None or found.simulator == MIXTURE:
                    raise ValueError(
                        f'{where}.mixture: expected names of other arms that are no mixtures, found {member!r}'
                    )
                if member in self.held_out_simulators and arm not in self.held_out_simulators:
                    raise ValueError(
                        'PretrainedSettings.held_out_simulators: expected simulators that no assistant trains against, '
                        f'found {member!r}, which the mixture {arm!r} has'
                    )
            if settings.simulator == 'role_play':
                try:
                    check_fields(self.role_play(arm).instructions, settings.opening, settings.tells_person)
                except ValueError as error:
                    raise ValueError(f'{where}.{str(error).removeprefix("RolePlaySettings.")}') from error
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
        usual, own = self.conversation.role_play, self.arms[arm]
        instructions = own.instructions
        if instructions is None and own.tells_person:
            instructions = PERSON_INSTRUCTIONS if own.opening == 'given' else OPENING_INSTRUCTIONS
        return usual if instructions is None else dataclasses.replace(usual, instructions=instructions)
