"""Judges of conversations, by their settings: a language model on the device, or a panel of endpoints."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal

from simrl.conversations.chat import EncodingError
from simrl.conversations.records import Example
from simrl.experiments import sources
from simrl.experiments.checks import check_row_lengths, check_split
from simrl.experiments.endpoints import Endpoints, check_endpoint
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model, ModelSettings
from simrl.models.transformer import Execution
from simrl.remote.settings import EndpointSettings
from simrl.rewards.judging import Judge, Unit
from simrl.rewards.llm_judge import Read, judge_agent, local_judge, prompt_tokens, score_runs
from simrl.rewards.panel import Judgements, panel
from simrl.rewards.rubric import RUBRICS, judge_prompt
from simrl.rewards.shaping import ShapingSettings
from simrl.rl.futures import FutureSettings
from simrl.run.config import NO_EFFECT, ConfigError

By = Literal['reward_model', 'local_judge', 'panel']
JUDGE_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]*')  # a ConfigDict takes no dots
JUDGEMENTS_FOLDER = 'judgements'  # in the run directory: the raw judgements of panels


@dataclasses.dataclass(frozen=True)
class LocalJudgeSettings:
    """A language model on the device as a judge: its distribution over the scores 0 to 10."""

    model: ModelSettings | None = None  # of any tokenizer and template; None: the assistant's, before it is trained
    dtype: Literal['float32', 'bfloat16'] | None = None  # of its weights and activations; None: compute.sampling.dtype
    lengths: tuple[int, ...] = (1024, 2048)  # tokens of a prompt in each compiled program; longer ones are not judged
    batch_size: int = dataclasses.field(default=16, metadata=NO_EFFECT)  # conversations judged at once
    read: Read = 'expected'  # the mean of the distribution, or its most probable score

    def __post_init__(self) -> None:
        if not self.lengths or self.lengths[0] < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f'LocalJudgeSettings.lengths: expected ascending positive lengths, found {self.lengths}')
        if self.batch_size < 1:
            raise ValueError(f'LocalJudgeSettings.batch_size: expected at least 1, found {self.batch_size}')


@dataclasses.dataclass(frozen=True)
class PanelSettings:
    """Judges behind endpoints, by name. A conversation that one of them fails is not judged."""

    judges: dict[str, EndpointSettings]
    max_tokens: int = 1024  # max tokens of an answer, reasoning included

    def __post_init__(self) -> None:
        if wrong := [name for name in self.judges if not JUDGE_NAME.fullmatch(name)]:
            raise ValueError(
                f"PanelSettings.judges: expected names of letters, digits, '_' and '-', found {wrong[0]!r}"
            )
        if self.max_tokens < 1:
            raise ValueError(f'PanelSettings.max_tokens: expected at least 1, found {self.max_tokens}')


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """A judge, by name, and the rubric that it judges by; a reward model has none."""

    by: By = 'reward_model'
    rubric: Literal['helpfulness', 'outside'] = 'helpfulness'
    local_judge: LocalJudgeSettings | None = None  # of `by` local_judge; None: the defaults
    panel: PanelSettings | None = None  # of `by` panel

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ('local_judge', 'panel'):
            if getattr(self, field) is not None and self.by != field:
                raise ValueError(
                    f'{name}.{field}: expected settings only with by={field!r}, found some with by={self.by!r}'
                )
        if self.by == 'panel' and not (self.panel and self.panel.judges):
            raise ValueError(f"{name}.panel.judges: expected at least one with by='panel', found none")

    @property
    def endpoints(self) -> dict[str, EndpointSettings]:
        return {} if self.panel is None else self.panel.judges

    @property
    def local(self) -> LocalJudgeSettings:
        return self.local_judge or LocalJudgeSettings()


@dataclasses.dataclass(frozen=True)
class RewardSettings(JudgeSettings):
    """The reward of every arm."""

    # A reward for each conversation; for each reply, given what was before it ('turn'); or for each reply, the mean of
    # conversations that continue from it ('future'; see `simrl.rl.futures`). Validation rewards whole conversations.
    unit: Literal['conversation', 'turn', 'future'] = 'conversation'
    futures: FutureSettings | None = None  # of unit 'future'
    shaping: ShapingSettings = ShapingSettings()  # futures are shaped as conversations

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.unit == 'future') != (self.futures is not None):
            raise ValueError(
                f"RewardSettings.futures: expected settings if and only if unit is 'future', found "
                f'{"none" if self.futures is None else "some"} with {self.unit!r}'
            )

    @property
    def scored(self) -> Unit:
        """The unit of a single score."""
        return 'turn' if self.unit == 'turn' else 'conversation'


def judge_model(field: str, settings: JudgeSettings, assistant: Model) -> Model:
    """The model of a local judge, without its weights."""
    own = settings.local.model
    return assistant if own is None else sources.open_for(f'{field}.local_judge.model', own)


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """Settings and prompts that a judge's verdicts depend on, beside its model's files; {} for a reward model."""
    rubric = RUBRICS[settings.rubric]
    if settings.by == 'reward_model':
        return {}
    told = {'by': settings.by, 'rubric': [rubric.name, rubric.version], 'told': rubric.fingerprint()}
    if settings.panel is not None:
        return told | {'panel': settings.panel}
    local = settings.local
    own = {} if local.model is None else {'model': sources.model_identity(local.model)}
    return told | {'judge': dataclasses.replace(local, model=None)} | own


def check_judge(
    field: str, settings: JudgeSettings, model: Model, examples: Sequence[Example], compute: Compute
) -> None:
    """Refuses endpoints that do not answer, and a model that cannot judge the shortest conversation it may meet.

    Args:
        model: of a local judge.
    """
    for name, endpoint in settings.endpoints.items():
        check_endpoint(f'{field}.panel.judges.{name}', endpoint)
    if settings.by != 'local_judge':
        return
    local, where = settings.local, f'{field}.local_judge'
    check_split(f'{where}.batch_size', local.batch_size, compute)
    check_row_lengths(f'{where}.lengths', local.lengths, model.config)
    longest = max(examples, key=lambda example: len(example.opening or ''))
    messages = (('user', longest.opening or ''), ('assistant', ''))
    try:
        judge_agent(model.chat, model.config, {}, Execution())
        prompt = judge_prompt(RUBRICS[settings.rubric], longest.intent, messages, answer='number')
        found = len(prompt_tokens(model.chat, prompt)) + max(map(len, score_runs(model.chat)))
    except EncodingError as error:
        raise ConfigError(f'{where}.model: its tokenizer cannot write the prompt: {error}') from error
    except ValueError as error:
        raise ConfigError(f'{where}.model: {error}') from error
    if found > local.lengths[-1]:
        raise ConfigError(
            f'{where}.lengths: expected room for the {found} tokens of the prompt and the opening of example '
            f'{longest.id}, found {local.lengths[-1]}'
        )


def make_judge(
    settings: JudgeSettings, model: Model, compute: Compute, endpoints: Endpoints, workdir: pathlib.Path
) -> Judge:
    """Loads a judge that is no reward model.

    Args:
        model: of a local judge.
        endpoints: of the run.
        workdir: its directory, which gets the raw judgements of a panel.
    """
    rubric = RUBRICS[settings.rubric]
    if settings.panel is not None:
        return panel(
            {name: endpoints.of(endpoint) for name, endpoint in settings.endpoints.items()},
            rubric,
            max_tokens=settings.panel.max_tokens,
            judgements=Judgements(workdir / JUDGEMENTS_FOLDER / f'{rubric.name}.jsonl'),
        )
    local, mesh = settings.local, compute.mesh.make()
    dtype = local.dtype or compute.sampling.dtype
    execution = dataclasses.replace(compute.sampling, dtype=dtype)
    return local_judge(
        judge_agent(model.chat, model.config, model.load_params(mesh), execution),
        model.chat,
        rubric,
        read=local.read,
        lengths=local.lengths,
        batch_size=local.batch_size,
        mesh=mesh,
    )
