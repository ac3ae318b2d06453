"""A place where an experiment takes place: what all of its arms share.

A scene makes the two agents of a conversation, the examples that conversations start from, the reward of every arm and
the measures of the trained assistants. `plan.py` makes the stages of them, the same for every scene.
"""

import dataclasses
import hashlib
import importlib
import inspect
import pathlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example
from simrl.conversations.views import Rendered
from simrl.evaluation.results.measures import MeasureWords
from simrl.evaluation.win_rate import Prefer
from simrl.experiments.settings import Compute, ExperimentSettings
from simrl.models.transformer import Params, TransformerConfig
from simrl.remote.usage import Usage
from simrl.rewards.rewards import Score
from simrl.rl.futures import FutureScore, FutureSettings
from simrl.rollouts.agents import Agent, HostAgent, Limits, ModelAgent
from simrl.rollouts.state import Transcript
from simrl.run.config import ConfigError
from simrl.run.stages import Stage

Columns = Mapping[str, Sequence[Any]]  # of conversations, by name; see `Scene.outcomes`


@dataclasses.dataclass(frozen=True)
class Measure:
    """One way of measuring an assistant on people, or their openings, that no simulator saw.

    Attributes:
        run: (assistant, examples) -> `result.json` of a stage: `outcomes` in columns (see `Scene.outcomes`),
            `statistics` as counts, and the first `shown` conversations.
        identity: what its results depend on, beside the scene's own identity and the examples.
        inputs: what it reads, beside the scene's own files.
        prefer: scores with two assistants -> the probability that the first is preferred.
        words: the names of its numbers, for the report.
    """

    run: Callable[[ModelAgent, Sequence[Example], int], dict[str, Any]]
    identity: Mapping[str, Any]
    inputs: Mapping[str, pathlib.Path]
    prefer: Prefer
    words: MeasureWords


@dataclasses.dataclass(frozen=True)
class People:
    """People on their side of a forecast; see `experiments.forecasts`.

    Attributes:
        words: what stands for people, as a sentence for the report.
        agent: whom the initial assistant replies to; the conversations of an example have the same opening.
        limits: the sizes of these conversations.
        value: what they are worth to people.
        logs: (examples) -> conversations that people had, on the host, a row for each example; and how many messages
            were cut off. None where `agent` is the people themselves, with whom conversations go on.
        identity: what all this depends on, beside the scene's own identity.
        inputs: what it reads, beside the scene's own files.
    """

    words: str
    agent: Agent
    limits: Limits
    value: Callable[[Sequence[Example]], Score]
    logs: Callable[[Sequence[Example]], tuple[Transcript, int]] | None
    identity: Mapping[str, Any]
    inputs: Mapping[str, pathlib.Path]


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodRows:
    """People's messages as rows of tokens.

    Attributes:
        rows: a conversation each.
        sources: the data set of each.
        lengths: the rows' length buckets.
    """

    rows: Sequence[Rendered]
    sources: Sequence[str]
    lengths: tuple[int, ...]


class Scene(Protocol):
    """The interface between the experiment and the data, models and people that it runs on. Only stages load weights.

    Attributes:
        chat: the tokenizer and template that all agents on the device share.
        limits: the sizes of every conversation.
        assistant_stage: the stage that leaves the initial assistant; None where it is the pretrained model itself.
        reward_name: what the report calls the reward.
        reward_times: the reward of whole conversations is shown multiplied by it: 100 where it is at most 1.
        people_measure: the measure whose score is the reward, with people in the simulators' place; None: there
            is none.
        rates: statistics of users' messages by name, each the ratio of two counts of `outcomes`.
        caution: what the numbers do not show, as sentences for the top of the report.
    """

    workdir: pathlib.Path
    assistant_stage: str | None
    reward_name: str
    people_measure: str | None
    rates: Mapping[str, tuple[str, str]]

    @property
    def caution(self) -> str: ...

    @property
    def reward_times(self) -> int: ...

    @property
    def settings(self) -> ExperimentSettings: ...

    @property
    def chat(self) -> Chat: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def compute(self) -> Compute: ...

    def model_configs(self) -> Mapping[str, TransformerConfig]:
        """The decoders of an RL step by name, the assistant's first."""

    def check(self) -> None:
        """Raises ConfigError where a setting fits neither model nor data nor devices. Loads no weights."""

    def identity(self) -> Mapping[str, Any]:
        """Settings that the results of all stages depend on; fields with `config.NO_EFFECT` do not count."""

    def inputs(self) -> Mapping[str, pathlib.Path]:
        """Inputs of all stages in which agents talk."""

    def setup(self) -> list[Stage]:
        """The stages before the first arm: data, fine-tuning, reward models."""

    def assistant(self, stage: pathlib.Path | None) -> ModelAgent:
        """The assistant that a stage left; None: the pretrained model."""

    def simulator(self, arm: str, seed: int) -> Agent:
        """The user simulator of an arm in the runs of a training seed."""

    def simulator_identity(self, arm: str) -> Mapping[str, Any]:
        """Settings and prompts that a simulator's messages depend on, beside its inputs."""

    def simulator_inputs(self, arm: str, seed: int) -> Mapping[str, pathlib.Path]:
        """Inputs of `simulator`."""

    def simulator_per_seed(self, arm: str) -> bool:
        """True if each training seed has a simulator of its own."""

    def arm_kind(self, arm: str) -> str:
        """The kind of an arm's simulator; arms of one kind differ in size or settings."""

    def simulator_model(self, arm: str) -> TransformerConfig | None:
        """The model of an arm's simulator; None: people, a mixture, one behind an endpoint, or your own."""

    def model_name(self, arm: str) -> str | None:
        """The name of an arm's model, also of one behind an endpoint; None: there is none, or it is your own."""

    def is_people(self, arm: str) -> bool:
        """True if the arm trains against the people themselves (the oracle)."""

    def user_model(self) -> tuple[TransformerConfig, Params]:
        """A model that a simulator of the user's own may play the user with; see `own_simulator`."""

    def examples_identity(self, split: str) -> Mapping[str, Any]:
        """Settings that decide the examples of a split ('train', 'dev' or 'test'), beside the inputs."""

    def training_examples(self) -> Sequence[Example]:
        """Examples that conversations of RL start from."""

    def validation_examples(self, number: int) -> Sequence[Example]:
        """`number` examples of the split between training and test, for choosing a checkpoint and for forecasts."""

    def held_out_examples(self, numbers: range | None) -> Sequence[Example]:
        """Held-out examples, which no simulator was trained on; None: all of them."""

    def likelihood_rows(self, simulator: ModelAgent) -> LikelihoodRows:
        """People's messages that no simulator was trained on, in the simulator's view."""

    def likelihood_identity(self) -> Mapping[str, Any]:
        """Settings that decide `likelihood_rows`, beside the inputs."""

    def likelihood_inputs(self) -> Mapping[str, pathlib.Path]:
        """Inputs of `likelihood_rows` and `people_to_replay`."""

    def people_to_replay(self, number: int) -> Sequence[Conversation]:
        """`number` conversations of people that no simulator was trained on, chosen by `evaluation.seed`."""

    def example_of(self, conversation: Conversation) -> Example:
        """The example that a conversation of people started from."""

    def reward(self, examples: Sequence[Example]) -> Score | FutureScore:
        """The reward of every arm; it sees messages and no prompt of the simulator."""

    def futures(self) -> FutureSettings | None:
        """Of the reward's futures; None: it has none."""

    def reward_identity(self) -> Mapping[str, Any]:
        """Settings and prompts that `reward` and `score` depend on, beside their inputs."""

    def reward_inputs(self) -> Mapping[str, pathlib.Path]:
        """Inputs of `reward` and `score`."""

    def score(self, examples: Sequence[Example]) -> Score:
        """The reward of whole conversations from these examples, as an evaluation has it: not shaped."""

    def outcomes(
        self, examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], scores: np.ndarray
    ) -> tuple[Columns, Mapping[str, int]]:
        """Describes conversations: columns with one entry each, and counts that are summed over conversations.

        Args:
            rows: `transcripts` of the examples' conversations.
            scores: theirs, float32 `[N]`.

        The columns are `score`, `end`, `assistant_turns`, `truncated`, `user_truncated`, `assistant_tokens`, and the
        scene's own numbers and labels.
        """

    def shown(self, example: Example, row: Mapping[str, Any]) -> dict[str, Any]:
        """A conversation of `transcripts` for the report: example, intent, traits and messages."""

    def usage(self) -> Mapping[str, Usage]:
        """Usage of the scene's endpoints since the process began, by model; empty without endpoints."""

    def people(self) -> People:
        """People, as a forecast compares simulators with them."""

    def measures(self) -> Mapping[str, Measure]:
        """The measures of the trained assistants, by name; the first is the primary one."""


LOADED = '__simrl_source__'  # an attribute of a user's module: its text when it was loaded
PROBES = 16  # examples whose system texts stand for what a simulator is told


def fingerprint(told: Callable[[Example], object]) -> str:
    """A hash of what a simulator is told, so that an edited one is run again.

    Args:
        told: an example -> the system text, with persona, or what stands for it. It is called with made-up examples.
    """
    probes = (
        Example(f'probe-{i}', f'opening {i}', f'intent {i}', persona_seed=i, source='probe', split='train')
        for i in range(PROBES)
    )
    return _digest(repr(told(example)) for example in probes)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def is_own(simulator: str) -> bool:
    """True if a simulator's name is `module:function`, one of the user's own."""
    return ':' in simulator


def own_identity(field: str, simulator: str) -> dict[str, str]:
    """The name of a simulator of the user's own, and a hash of the module that it is in."""
    module, function = _own_function(field, simulator)
    return {'simulator': simulator, 'told': _digest(sorted({_source(module), _source(function)}))}


def own_simulator(field: str, simulator: str, scene: Scene) -> Agent:
    """Calls `module:function` with the scene; it returns an agent.

    Args:
        field: what errors call the setting, for instance 'config.arms.mine.simulator'.

    Raises:
        ConfigError: there is no such module or function, it raised, or it returned no agent.
    """
    _, function = _own_function(field, simulator)
    try:
        agent = function(scene)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f'{field}: {simulator} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})'
        ) from error
    if not isinstance(agent, ModelAgent | HostAgent):
        raise ConfigError(
            f'{field}: expected {simulator} to return a ModelAgent or a HostAgent, found {type(agent).__name__}'
        )
    return agent


def _own_function(field: str, simulator: str) -> tuple[ModuleType, Callable[[Scene], Any]]:
    name, _, attribute = simulator.partition(':')
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ConfigError(
            f'{field}: expected a module {name!r} that can be imported, found {type(error).__name__}: {error}'
        ) from error
    loaded = vars(module).setdefault(LOADED, _source(module))
    if loaded != _source(module):  # edited since, in a notebook for instance
        module = importlib.reload(module)
        vars(module)[LOADED] = _source(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f'{field}: expected a function {attribute!r} in module {name!r}, found {function!r}')
    return module, function


def _source(thing: Any) -> str:
    """The text of the file that a module or function is in; empty where there is none."""
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:  # of a callable object
        file = None
    return '' if file is None else pathlib.Path(file).read_text(encoding='utf-8')
