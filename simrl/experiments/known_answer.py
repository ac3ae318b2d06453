"""The experiment with a known answer: one assistant per simulator in a world whose people are a program.

`tasks` reads as the experiment does:
1. The world's text trains a tokenizer, the initial assistant and a user model that knows stereotypes.
2. People talk with the initial assistant; the user model is fine-tuned on what they said, anew for each training seed.
3. For each arm and seed an assistant is RL-trained against that arm's simulator, or against the people (the oracle).
4. All assistants meet the same new people, and every simulator; every simulator is held against held-out people.

`finish` puts together what came out.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from simrl.evaluation.results import INITIAL
from simrl.experiments import checks
from simrl.experiments import known_answer_stages as work
from simrl.experiments.concierge_scene import SIMULATORS, Scene, open_scene
from simrl.experiments.jobs import Compute
from simrl.experiments.known_answer_stages import Assistant, Corpora, Simulated
from simrl.experiments.sources import RandomModel
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits
from simrl.run import config as config_lib
from simrl.run import workers
from simrl.run.stages import Stage
from simrl.training.sft import SFTSettings
from simrl.worlds.concierge.people import World
from simrl.worlds.concierge.replies import TURNS

ORACLE = 'oracle'
USUAL_SIZE = 'medium'  # of an arm that names none
MOST_WORKERS = 8
MOST_SEEDS = 2**31  # of training runs, and of evaluation
WORLD_STAGE, ASSISTANT_STAGE, LOGS_STAGE = 'world', 'sft/assistant', 'logs'


@dataclasses.dataclass(frozen=True)
class Imitation:
    """The initial assistant."""

    model: RandomModel
    sft: SFTSettings


@dataclasses.dataclass(frozen=True)
class UserModel:
    """A user model of one size."""

    model: RandomModel
    base: SFTSettings  # on stereotypes
    fine_tuning: SFTSettings  # on people; the training seed is added to the seed of its batches


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How assistants are measured. None of it depends on the arm."""

    people: int  # new ones that every assistant meets
    block: int  # of these, whom one stage measures
    matrix: int  # conversations of each simulator with each assistant
    batch_size: int  # conversations at once
    shown: int  # people whose conversations the report shows
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ('people', 'block', 'matrix', 'batch_size'):
            if getattr(self, field) < 1:
                raise ValueError(f'Evaluation.{field}: expected at least 1, found {getattr(self, field)}')
        if self.people % self.block:
            raise ValueError(f'Evaluation.people: expected a multiple of block={self.block}, found {self.people}')
        if not 0 <= self.shown <= self.block:
            raise ValueError(f'Evaluation.shown: expected 0 to block={self.block}, found {self.shown}')
        if not 0 <= self.seed < MOST_SEEDS:
            raise ValueError(f'Evaluation.seed: expected a number from 0 to {MOST_SEEDS - 1}, found {self.seed}')


@dataclasses.dataclass(frozen=True)
class KnownAnswer:
    """The whole experiment in the concierge world."""

    world: World
    corpora: Corpora
    assistant: Imitation
    users: dict[str, UserModel]  # by size
    limits: Limits
    arms: tuple[str, ...]  # KIND or KIND-SIZE, or oracle
    seeds: tuple[int, ...]  # training seeds, the same for every arm
    rl: RLSettings
    rl_people: int  # people, or their intents, that RL starts conversations from
    evaluation: Evaluation
    compute: Compute
    workers: int | None = None  # stages side by side; None: one for each CPU, at most MOST_WORKERS; 1 on an accelerator

    def __post_init__(self) -> None:
        for field in ('arms', 'seeds'):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values):
                raise ValueError(f'KnownAnswer.{field}: expected different values, at least one, found {values}')
        if not all(0 <= seed < MOST_SEEDS for seed in self.seeds):
            raise ValueError(f'KnownAnswer.seeds: expected numbers from 0 to {MOST_SEEDS - 1}, found {self.seeds}')
        if self.rl_people < 1:
            raise ValueError(f'KnownAnswer.rl_people: expected at least 1, found {self.rl_people}')
        known = list(_arms(self.users))
        for arm in self.arms:
            if arm not in known:
                raise ValueError(f'KnownAnswer.arms: unknown arm {arm!r}, expected one of {", ".join(known)}')
        if self.rl.trained != 'assistant':
            raise ValueError(f"KnownAnswer.rl.trained: expected 'assistant', found {self.rl.trained!r}")
        if self.limits.turns > TURNS:
            raise ValueError(
                f'KnownAnswer.limits.turns: expected at most {TURNS}, for which the text of the world and the patience '
                f'of its stereotypes are made, found {self.limits.turns}'
            )
        models = {'assistant': self.assistant.model} | {f'users.{size}': u.model for size, u in self.users.items()}
        needed = work.longest_conversation(self.limits)
        for name, model in models.items():
            if needed > model.max_positions:
                raise ValueError(
                    f'KnownAnswer.{name}.model.max_positions: expected at least the {needed} tokens that a '
                    f'conversation of limits may take, found {model.max_positions}'
                )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f'KnownAnswer.workers: expected at least 1, or None, found {self.workers}')


def _arms(sizes: Mapping[str, Any]) -> Iterator[str]:
    """The names of all arms that there could be."""
    for kind in SIMULATORS:
        yield from (_sized(kind, size) for size in sizes)
    yield ORACLE


def _sized(name: str, size: str) -> str:
    return name if size == USUAL_SIZE else f'{name}-{size}'


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm's name taken apart."""

    name: str
    kind: str
    size: str

    @classmethod
    def of(cls, name: str) -> 'Arm':
        kind, _, size = name.partition('-')
        return cls(name, kind, size or USUAL_SIZE)

    def simulator(self, seed: int) -> str:
        """Its simulator's name in this seed's runs: a fine-tuned one is trained anew for each training seed."""
        return f'{self.name}/seed-{seed}' if self.kind == 'fine_tuned' else self.name

    def simulator_stage(self, seed: int) -> str:
        """Where the params of its simulator are."""
        if self.kind == 'fine_tuned':
            return f'sft/{self.simulator(seed)}'
        return f'sft/{_sized("base_user", self.size)}'


def rl_stage(arm: str, seed: int) -> str:
    return f'rl/{arm}/seed-{seed}'


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The stages of one run directory."""

    settings: KnownAnswer
    workdir: pathlib.Path

    @functools.cached_property
    def scene(self) -> Scene:
        """Read when a stage first needs it: the world's stage must be done."""
        s = self.settings
        return open_scene(self.workdir / WORLD_STAGE, s.world, s.limits, s.compute)

    @functools.cached_property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(Arm.of(name) for name in self.settings.arms)

    @functools.cached_property
    def assistants(self) -> dict[str, str]:
        """Every assistant's name and stage, the initial one first."""
        trained = {f'{arm.name}/seed-{seed}': rl_stage(arm.name, seed) for arm, seed in self._runs()}
        return {INITIAL: ASSISTANT_STAGE, **trained}

    @functools.cached_property
    def simulators(self) -> dict[str, Simulated]:
        """All simulators by name."""
        return {arm.simulator(seed): self._simulated(arm, seed) for arm, seed in self._runs() if arm.kind != ORACLE}

    def simulators_met(self, assistant: str) -> list[str]:
        """The simulators that an assistant meets: those of its own seed; the initial assistant meets all."""
        if assistant == INITIAL:
            return list(self.simulators)
        seed = int(assistant.rpartition('-')[2])
        return [arm.simulator(seed) for arm in self.arms if arm.kind != ORACLE]

    def _runs(self) -> Iterator[tuple[Arm, int]]:
        for seed in self.settings.seeds:
            for arm in self.arms:
                yield arm, seed

    def _assistant(self, name: str) -> Assistant:
        return Assistant(self.workdir / self.assistants[name], self.settings.assistant.model)

    def _simulated(self, arm: Arm, seed: int) -> Simulated:
        return Simulated(arm.kind, self.workdir / arm.simulator_stage(seed), self.settings.users[arm.size].model)

    def _task(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], run: Callable[[pathlib.Path], None]
    ) -> Stage:
        """A stage that rests on its slice, on the sizes of conversations, and on other stages, by name."""
        compute = self.settings.compute
        common = {
            'world': self.settings.world,
            'limits': self.settings.limits,
            'dtypes': {'training': compute.training.dtype, 'sampling': compute.sampling.dtype},
        }
        folders = {key: self.workdir / stage for key, stage in {'world': WORLD_STAGE, **inputs}.items()}
        return Stage(name, config_lib.to_dict(common | dict(settings)), folders, run)

    def tasks(self) -> list[Stage]:
        """All stages; each comes after what it rests on."""
        sizes = dict.fromkeys(arm.size for arm in self.arms if arm.kind != ORACLE)
        tuned = dict.fromkeys((arm.size, seed) for arm, seed in self._runs() if arm.kind == 'fine_tuned')
        return [
            self.make_world(),
            self.fit_assistant(),
            *(self.fit_base_user(size) for size in sizes),
            self.collect_logs(),
            *(self.fine_tune(size, seed) for size, seed in tuned),
            *(self.train(arm, seed) for arm, seed in self._runs()),
            *(task for assistant in self.assistants for task in self.evaluate(assistant)),
            *(self.meet(assistant, user) for assistant in self.assistants for user in self.simulators_met(assistant)),
            *(self.measure_likelihood(simulator) for simulator in self.simulators),
        ]

    def make_world(self) -> Stage:
        s = self.settings
        c = s.corpora
        text = {
            'vocabulary': c.vocabulary,
            'assistant': c.assistant,
            'base_user': c.base_user,
            'held_out': c.held_out,
        }
        settings = config_lib.to_dict({'world': s.world, 'corpora': text})
        return Stage(WORLD_STAGE, settings, {}, lambda folder: work.make_world(folder, s.world, **text))

    def fit_assistant(self) -> Stage:
        own, held_out = self.settings.assistant, self.settings.corpora.held_out

        def run(folder: pathlib.Path) -> None:
            work.fit_assistant(folder, self.workdir / WORLD_STAGE, self.scene, own.model, own.sft, held_out)

        return self._task(ASSISTANT_STAGE, {'assistant': own}, {}, run)

    def fit_base_user(self, size: str) -> Stage:
        user, held_out = self.settings.users[size], self.settings.corpora.held_out

        def run(folder: pathlib.Path) -> None:
            work.fit_base_user(folder, self.workdir / WORLD_STAGE, self.scene, user.model, user.base, held_out)

        return self._task(f'sft/{_sized("base_user", size)}', {'model': user.model, 'base': user.base}, {}, run)

    def collect_logs(self) -> Stage:
        s = self.settings

        def run(folder: pathlib.Path) -> None:
            work.collect_logs(folder, self._assistant(INITIAL), self.scene, s.corpora, s.evaluation.batch_size)

        settings = {'logs': s.corpora.logs, 'held_out': s.corpora.held_out}
        return self._task(LOGS_STAGE, settings, {'assistant': ASSISTANT_STAGE}, run)

    def fine_tune(self, size: str, seed: int) -> Stage:
        user, base = self.settings.users[size], f'sft/{_sized("base_user", size)}'

        def run(folder: pathlib.Path) -> None:
            stages = self.workdir / base, self.workdir / LOGS_STAGE
            work.fine_tune_simulator(folder, *stages, self.scene, user.model, user.fine_tuning, seed)

        settings = {'model': user.model, 'fine_tuning': user.fine_tuning, 'seed': seed}
        return self._task(
            f'sft/{_sized("fine_tuned", size)}/seed-{seed}', settings, {'base': base, 'logs': LOGS_STAGE}, run
        )

    def train(self, arm: Arm, seed: int) -> Stage:
        s = self.settings
        simulated = None if arm.kind == ORACLE else self._simulated(arm, seed)

        def run(folder: pathlib.Path) -> None:
            work.train_arm(folder, self._assistant(INITIAL), simulated, self.scene, s.rl_people, s.rl, seed)

        settings = {'kind': arm.kind, 'rl': s.rl, 'rl_people': s.rl_people, 'seed': seed}
        settings['log_every'] = s.compute.loop.log_every  # which steps the result holds
        inputs = {} if simulated is None else {'simulator': arm.simulator_stage(seed)}
        return self._task(rl_stage(arm.name, seed), settings, {'assistant': ASSISTANT_STAGE, **inputs}, run)

    def evaluate(self, assistant: str) -> list[Stage]:
        """People in blocks, so that more people are more stages."""
        e, stage = self.settings.evaluation, self.assistants[assistant]

        def task(block: int) -> Stage:
            numbers = range(block * e.block, (block + 1) * e.block)
            shown = e.shown if block == 0 else 0

            def run(folder: pathlib.Path) -> None:
                work.evaluate_on_people(
                    folder, self._assistant(assistant), self.scene, numbers, e.seed, e.batch_size, shown
                )

            settings = {'people': [numbers.start, numbers.stop], 'seed': e.seed, 'shown': shown}
            return self._task(people_stage(assistant, block), settings, {'assistant': stage}, run)

        return [task(block) for block in range(e.people // e.block)]

    def meet(self, assistant: str, simulator: str) -> Stage:
        e, stage, simulated = self.settings.evaluation, self.assistants[assistant], self.simulators[simulator]

        def run(folder: pathlib.Path) -> None:
            work.evaluate_on_simulator(
                folder, self._assistant(assistant), simulated, self.scene, e.matrix, e.seed, e.batch_size
            )

        inputs = {'assistant': stage, 'simulator': simulated.stage.relative_to(self.workdir).as_posix()}
        settings = {'kind': simulated.kind, 'conversations': e.matrix, 'seed': e.seed}
        return self._task(matrix_stage(assistant, simulator), settings, inputs, run)

    def measure_likelihood(self, simulator: str) -> Stage:
        simulated = self.simulators[simulator]
        e = self.settings.evaluation

        def run(folder: pathlib.Path) -> None:
            work.measure_likelihood(folder, simulated, self.workdir / LOGS_STAGE, self.scene, e.batch_size)

        inputs = {'simulator': simulated.stage.relative_to(self.workdir).as_posix(), 'logs': LOGS_STAGE}
        settings = {'kind': simulated.kind}
        return self._task(likelihood_stage(simulator), settings, inputs, run)


def tasks(settings: KnownAnswer, workdir: pathlib.Path) -> list[Stage]:
    """The stages of the experiment in a run directory, once it is clear that all of them can be done.

    Raises:
        ConfigError: rows do not fit the models' positions or the devices, a warm-up has no end, or flags of XLA are not
            in force.
    """
    s, compute = settings, settings.compute
    own = s.assistant
    checks.check_xla_flags(compute)
    checks.check_fitting('config.assistant.sft', own.sft, own.model.max_positions, compute)
    for size, user in s.users.items():
        for name, fitting in (('base', user.base), ('fine_tuning', user.fine_tuning)):
            checks.check_fitting(f'config.users.{size}.{name}', fitting, user.model.max_positions, compute)
    checks.check_rl_steps(s.rl, s.rl_people, compute)
    checks.check_split('config.evaluation.batch_size', s.evaluation.batch_size, compute)
    return Plan(settings, workdir).tasks()


def num_workers(settings: KnownAnswer) -> int:
    """How many stages run side by side."""
    if settings.workers is not None:
        return settings.workers
    if jax.default_backend() != 'cpu':
        return 1
    return min(MOST_WORKERS, len(workers.cpus()))


def people_stage(assistant: str, block: int) -> str:
    return f'people/{assistant}/block-{block}'


def matrix_stage(assistant: str, simulator: str) -> str:
    return f'matrix/{assistant}/{simulator}'


def likelihood_stage(simulator: str) -> str:
    return f'likelihood/{simulator}'
