"""A name -> the agent to talk to.

    RUN/initial, RUN/ARM/seed-K     an assistant of a run directory
    RUN/ARM, RUN/ARM/seed-K         a user simulator of a run directory
    RUN/STAGE                       the assistant or the simulator that a stage left
    FOLDER, OWNER/MODEL, FILE.gguf  a model outside a run: as an assistant, or prompted to play the user

A folder whose tokenizer has the terminal token, as `tools.export` writes a fine-tuned simulator, is that simulator.
"""

import dataclasses
import datetime
import pathlib
from collections.abc import Callable

import jax

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.experiments import experiment, plan, sources
from simrl.experiments.scene import Scene
from simrl.experiments.settings import MeshSettings
from simrl.experiments.sources import Model, ModelSettings
from simrl.models.transformer import Execution
from simrl.rollouts.agents import Agent, ModelAgent, OneAgent, Policy, agent_for, assistant, model_agent
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.token_sampling import Sampling
from simrl.run import directory, stage_files, stages
from simrl.run.config import local_path
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned
from simrl.simulators.role_play import RolePlaySettings, role_play

RUN_FIELDS = {'format', 'version'}  # of a run's config.json, beside the config's own
MAX_NEW_TOKENS = 512  # per message of a model outside a run
SAMPLING = Sampling(temperature=0.7, top_p=0.9)  # of a model outside a run
BLANK = Example('chat', None, None, persona_seed=0, source='chat', split='test')


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """An agent to talk to.

    Attributes:
        name: what it was asked for by.
        agent: ready to sample.
        chat: its tokenizer and template.
        example: what its conversations start from.
    """

    name: str
    agent: OneAgent
    chat: Chat
    example: Example


def load_assistant(name: str) -> Loaded:
    """Loads the assistant of that name. Raises as `find_assistant`."""
    return find_assistant(name)()


def find_assistant(name: str) -> Callable[[], Loaded]:
    """Finds the assistant of that name; the function that is returned loads its weights.

    Raises:
        FileNotFoundError, ValueError, WorkdirError: there is none, or it cannot be read.
    """
    if (run := find_run(local_path(name))) is None:
        model = open_model(name)
        return lambda: Loaded(name, _assistant(model), model.chat, BLANK)
    scene, part = run
    folder = assistant_stage(name, scene, part)
    return lambda: Loaded(name, _ready(scene.assistant(folder), scene.compute.mesh), scene.chat, BLANK)


def assistant_stage(name: str, scene: Scene, part: str) -> pathlib.Path | None:
    """The finished stage that left an assistant of a run; None: it is the pretrained model itself.

    Args:
        name: what the assistant was asked for by.
        part: the path within the run.

    Raises:
        ValueError, WorkdirError: there is no such assistant, it is not finished, or it was made with another model.
    """
    stages_by_name = {found: of.stage for found, of in plan.assistants(scene).items()}
    by_stage = {stage: found for found, stage in stages_by_name.items() if stage is not None}
    found = by_stage.get(part, part)
    if found not in stages_by_name:
        names = (', '.join(x) for x in (stages_by_name, simulators(scene)))
        raise ValueError(
            '{}: expected an assistant of the run ({}), not one of its simulators ({})'.format(name, *names)
        )
    stage = stages_by_name[found]
    if stage is None:
        return None
    folder = scene.workdir / stage
    _check_done(name, scene, folder)
    check_model(scene, folder)
    return folder


def find_simulator(name: str, *, persona: str | None = None, number: int = 0) -> Callable[[], Loaded]:
    """Finds the user simulator of that name; the function that is returned loads its weights.

    Args:
        persona: see `with_persona`. None: that of a held-out person of the run.
        number: of that person.

    Raises:
        FileNotFoundError, ValueError, WorkdirError: there is none, or it cannot be read.
    """
    blank = dataclasses.replace(BLANK, persona_seed=number)
    if (run := find_run(local_path(name))) is None:
        model = open_model(name)
        if persona is None and not model.knows_terminal:  # it is prompted
            raise ValueError(f'{name}: expected --persona, the message that the simulated user opens with, found none')

        def load_model() -> Loaded:
            agent = _simulator(model)
            example = blank if persona is None else with_persona(agent, blank, persona)
            return Loaded(name, _ready(agent, MeshSettings(data=1)), model.chat, example)

        return load_model
    scene, part = run
    of = _simulator_of_run(name, scene, part)

    def load() -> Loaded:
        agent = scene.simulator(*of)
        if persona is None:
            people = scene.settings.evaluation.people
            examples = scene.held_out_examples(None if people is None else range(people))
            example = examples[number % len(examples)]
        else:
            example = with_persona(agent_for(agent, blank), blank, persona)
        one = agent_for(agent, example)
        if one.opening == 'written':
            example = dataclasses.replace(example, opening=None)
        return Loaded(name, _ready(one, scene.compute.mesh), scene.chat, example)

    return load


def _simulator_of_run(name: str, scene: Scene, part: str) -> tuple[str, int]:
    """Arm and training seed of a simulator that can be loaded; arguments and errors as of `assistant_stage`."""
    arms = simulators(scene)
    found = _simulators_by_stage(scene).get(part, part)
    if found not in arms:
        raise ValueError(f'{name}: expected a simulator of the run ({", ".join(arms)})')
    for folder in scene.simulator_inputs(*arms[found]).values():
        if folder.is_relative_to(scene.workdir):
            _check_done(name, scene, folder)
            check_model(scene, folder, arms[found])
    return arms[found]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model to serve.

    Attributes:
        policy: ready to sample; it may sample what an assistant may.
        chat: its tokenizer and template.
        knows_terminal: whether it was trained with the terminal token.
    """

    policy: Policy
    chat: Chat
    knows_terminal: bool


def find_model(name: str) -> Callable[[], LoadedModel]:
    """Finds the model of that name, whichever role it was trained for; the function that is returned loads its weights.

    In a run that is an assistant, or else the model of a simulator.

    Raises:
        FileNotFoundError, ValueError, WorkdirError: there is none, or it cannot be read.
    """
    run = find_run(local_path(name))
    if run is None:
        model = open_model(name)
        return lambda: LoadedModel(_assistant(model).policy, model.chat, model.knows_terminal)
    scene, part = run
    names = {found: of.stage for found, of in plan.assistants(scene).items()}
    if part in names or part in names.values():
        folder = assistant_stage(name, scene, part)
        return lambda: _served(name, _ready(scene.assistant(folder), scene.compute.mesh), scene.chat)
    arms = simulators(scene)
    if part not in arms and part not in _simulators_by_stage(scene):
        raise ValueError(
            f'{name}: expected an assistant of the run ({", ".join(names)}) or a simulator ({", ".join(arms)})'
        )
    of = _simulator_of_run(name, scene, part)
    return lambda: _served(name, _ready(agent_for(scene.simulator(*of), BLANK), scene.compute.mesh), scene.chat)


def _served(name: str, agent: OneAgent, chat: Chat) -> LoadedModel:
    if not isinstance(agent, ModelAgent):
        raise ValueError(f'{name}: expected a model on the device, found a simulator that is none')
    knows_terminal = bool(agent.policy.token_mask[chat.terminal])
    mask = chat.token_mask(agent.policy.spec.config.padded_vocab_size, terminal=False, header='assistant')
    return LoadedModel(dataclasses.replace(agent.policy, token_mask=mask), chat, knows_terminal)


def find_run(path: pathlib.Path) -> tuple[Scene, str] | None:
    """The run that a path is in, and the path within it; None: it is in no run.

    Raises:
        WorkdirError, ConfigError: the run is of another version.
    """
    path = path.absolute()
    for workdir in (path, *path.parents):
        if not (workdir / directory.CONFIG_FILE).is_file():
            continue
        config = stage_files.read_json(workdir / directory.CONFIG_FILE)
        if config is None or not config.keys() >= RUN_FIELDS:
            continue  # a Hugging Face folder has a file of that name, too
        config = directory.stored_config(workdir)
        assert config is not None
        settings = experiment.settings_of({key: x for key, x in config.items() if key not in RUN_FIELDS})
        # One conversation is no batch to split over devices, and one model is served at a time.
        mesh = dataclasses.replace(settings.compute.mesh, data=1)
        compute = dataclasses.replace(settings.compute, mesh=mesh, simulator_mesh=None)
        settings = dataclasses.replace(settings, compute=compute)
        return experiment.scene_of(settings, workdir), path.relative_to(workdir).as_posix()
    return None


def _check_done(name: str, scene: Scene, folder: pathlib.Path) -> None:
    if not stages.is_done(folder):
        stage = folder.relative_to(scene.workdir).as_posix()
        raise ValueError(f'{name}: expected the finished stage {stage}, found none')


def check_model(scene: Scene, folder: pathlib.Path, simulator: tuple[str, int] | None = None) -> None:
    """Refuses a finished stage that was made with another model or tokenizer than the run's config names now.

    A later command may change the config of a run for some of its stages, and other files may replace a local model.

    Args:
        simulator: arm and training seed, for a stage that left a simulator.

    Raises:
        WorkdirError: the model is another one.
    """
    settings, inputs, names = dict(scene.identity()), dict(scene.inputs()), ['model', 'world']
    if simulator is not None:
        settings |= scene.simulator_identity(simulator[0])
        inputs |= scene.simulator_inputs(*simulator)
        names.append('simulator_model')
    stages.check_same(folder, settings, inputs, names)


def simulators(scene: Scene) -> dict[str, tuple[str, int]]:
    """The simulators of a run by name, people included: an arm and a training seed."""
    people = {arm: (arm, scene.settings.seeds[0]) for arm in scene.settings.arms if scene.is_people(arm)}
    return plan.simulators(scene) | people


def _simulators_by_stage(scene: Scene) -> dict[str, str]:
    """Stages that stand for a simulator: those of assistants trained against it, and the one that left it."""
    names: dict[str, str] = {}
    for arm, seed in plan.runs(scene):
        names[plan.rl_stage(arm, seed)] = arm if scene.is_people(arm) else plan.simulator_name(scene, arm, seed)
    for name, of in simulators(scene).items():
        for folder in scene.simulator_inputs(*of).values():
            if folder.is_relative_to(scene.workdir):
                names.setdefault(folder.relative_to(scene.workdir).as_posix(), name)
    return names


def open_model(name: str) -> Model:
    """A model outside a run, as `sources.open_model`."""
    # A person reads the chat as it goes: what a template hides of history later, or today's date, may be in it.
    today = datetime.date.today().strftime('%d %b %Y')
    return sources.open_model(ModelSettings(name, rewrites='keep', date=today))


def _execution() -> Execution:
    return Execution(dtype='float32' if jax.default_backend() == 'cpu' else 'bfloat16')


def _assistant(model: Model) -> ModelAgent:
    """A model outside a run as the assistant, ready to sample."""
    parts = (model.chat, model.config, model.load_params(), _execution())
    agent = assistant(*parts, max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
    return for_sampling(agent, MeshSettings(data=1).make())


def _simulator(model: Model) -> ModelAgent:
    """A model outside a run as the user: fine-tuned where it has a terminal token of its own, else prompted."""
    parts = (model.chat, model.config, model.load_params(), _execution())
    if model.knows_terminal:
        return fine_tuned(*parts, max_new_tokens=MAX_NEW_TOKENS, settings=FineTunedSettings())
    return role_play(*parts, max_new_tokens=MAX_NEW_TOKENS, settings=RolePlaySettings())


def _ready(agent: OneAgent, mesh: MeshSettings) -> OneAgent:
    """The agent on the devices that its params are on."""
    return for_sampling(agent, mesh.make())


def with_persona(agent: Agent, example: Example, text: str) -> Example:
    """The example of a simulator with this persona: its intent, or the message it opens with if it is told no intent.

    Raises:
        ValueError: the agent is off the device, and only knows the people of its own world.
    """
    if not isinstance(agent, ModelAgent):
        raise ValueError('persona: expected a model as the simulator, found one that is told nothing')
    if agent.system is not None:
        examples = [dataclasses.replace(example, opening='.', intent=intent) for intent in ('a', 'b')]
        if agent.system(examples[0]) != agent.system(examples[1]):
            example = dataclasses.replace(example, intent=text)
            try:
                agent.system(dataclasses.replace(example, opening=None))
            except ValueError:  # it is told the opening, too
                return dataclasses.replace(example, opening=text)
            return dataclasses.replace(example, opening=None)
    return dataclasses.replace(example, opening=text)


def with_system(agent: Agent, chat: Chat, text: str) -> ModelAgent:
    """The agent with another system text.

    Raises:
        ValueError: the agent is off the device, or its template has no place for a system text.
    """
    if not isinstance(agent, ModelAgent):
        raise ValueError('system: expected a model, found an agent off the device')
    chat.system_prefix(text)
    policy = agent.policy
    with_text = model_agent(
        chat,
        policy.spec.config,
        policy.params,
        policy.spec.execution,
        role=agent.role,
        max_new_tokens=agent.max_new_tokens,
        sampling=Sampling(),
        view='swapped' if agent.role == USER and policy.spec.own_header == chat.header('assistant') else 'natural',
        system=lambda example: text,
        stop_text=agent.stop_text,
    )
    headers = {name: getattr(with_text.policy.spec, name) for name in ('own_first_header', 'partner_first_header')}
    return dataclasses.replace(
        with_text, policy=dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, **headers))
    )


def resampled(
    agent: OneAgent, *, temperature: float | None = None, top_p: float | None = None, max_new_tokens: int | None = None
) -> OneAgent:
    """The agent, sampled in another way where one is given."""
    if not isinstance(agent, ModelAgent):
        return agent
    policy, spec = agent.policy, agent.policy.spec
    if top_p is not None:
        spec = dataclasses.replace(spec, top_p=top_p)
    if max_new_tokens is not None:
        runs = tuple(run for run in spec.stop_sequences if len(run) <= max_new_tokens)
        if spec.stop_sequences and not runs:
            shortest = min(map(len, spec.stop_sequences))
            raise ValueError(f'max_new_tokens: expected at least the {shortest} of a stop text, found {max_new_tokens}')
        spec = dataclasses.replace(spec, max_new_tokens=max_new_tokens, stop_sequences=runs)
    policy = dataclasses.replace(policy, spec=spec)
    if temperature is not None:
        policy = dataclasses.replace(policy, temperature=temperature)
    Sampling(float(policy.temperature), top_p=spec.top_p)  # refuses what is out of range
    return dataclasses.replace(agent, policy=policy)
