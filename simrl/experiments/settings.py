"""Settings that every experiment has, whichever its scene."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from simrl.evaluation.fidelity.annotators import Annotators
from simrl.evaluation.results.measures import INITIAL
from simrl.models import sharding
from simrl.models.transformer import Execution
from simrl.rl.train import RLSettings
from simrl.rollouts.schedule import Batching
from simrl.run.config import NO_EFFECT, ConfigError
from simrl.run.runtime import check_xla_flags
from simrl.run.workers import cpus
from simrl.training.loop import LoopSettings

MAX_SEED = 2**31 - 1
MAX_WORKERS = 8  # where the number is not set
ARM_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Layout of the devices. No result depends on it beyond rounding."""

    data: int | None = None  # devices that split rows, and in training parameters; None: all that `model` leaves
    model: int = 1  # devices that heads, MLP and vocabulary are split over

    def __post_init__(self) -> None:
        for field in ('data', 'model'):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f'{type(self).__name__}.{field}: expected at least 1, found {value}')

    def make(self) -> Mesh:
        """Makes a mesh of the first `data` x `model` devices, of as many of each process.

        Raises:
            ConfigError: there are fewer devices, some would be unused with `data` None, or processes would have
                different numbers of them.
        """
        available = jax.device_count()
        data = max(1, available // self.model) if self.data is None else self.data
        used, all_used = data * self.model, self.data is None
        if used > available or (all_used and used < available) or used % jax.process_count():
            raise ConfigError(
                f'config.compute.mesh.data x config.compute.mesh.model: expected {"" if all_used else "at most "}'
                f'{available} device{"s" if available > 1 else ""}{_as_many_of_each()}, found {data} x {self.model}'
            )
        return _make_mesh('config.compute.mesh', data, self.model, _of_each_process(0, used))


def _make_mesh(field: str, data: int, model: int, devices: list[jax.Device]) -> Mesh:
    try:
        return sharding.make_mesh(data, model, devices)
    except ValueError as error:
        raise ConfigError(f'{field}{str(error).removeprefix("mesh")}') from error


def _as_many_of_each() -> str:
    """The condition on a mesh's devices in a run of several processes, which errors add."""
    processes = jax.process_count()
    return f', as many of each of the {processes} processes' if processes > 1 else ''


def _of_each_process(first: int, number: int) -> list[jax.Device]:
    """`number` devices in JAX's order: of each process as many, which follow as many of the `first` ones.

    A mesh thus has devices of every process, each of which calls its programs and reads its results.
    """
    processes, before = jax.process_count(), collections.Counter[int]()
    chosen: list[jax.Device] = []
    for device in jax.devices():
        if first <= before[device.process_index] * processes < first + number:
            chosen.append(device)
        before[device.process_index] += 1
    return chosen


@dataclasses.dataclass(frozen=True)
class SimulatorMeshSettings(MeshSettings):
    """Layout of the devices for the experiment's simulators on the device, in conversations.

    A large simulator may be split over `model` beside a small assistant whose rows are split over `data`. Batching of
    their conversations is continuous.
    """

    # 'same' as those of compute.mesh, all of them; or 'other', those of each process after them, so that both sides
    # decode at once.
    devices: Literal['same', 'other'] = 'same'

    def beside(self, mesh: Mesh, field: str = 'config.compute.simulator_mesh') -> Mesh:
        """Makes the mesh of simulators.

        Args:
            mesh: of the assistant: the first devices of each process.
            field: what errors call these settings.

        Raises:
            ConfigError: there are no such devices, only some of them would be the assistant's, or processes would have
                different numbers of them.
        """
        available = jax.device_count()
        first, number = (0, mesh.size) if self.devices == 'same' else (mesh.size, available - mesh.size)
        data = max(1, number // self.model) if self.data is None else self.data
        used, all_used = data * self.model, self.devices == 'same' or self.data is None
        if used > number or (all_used and used < number) or used % jax.process_count():
            where = 'of' if self.devices == 'same' else f'of {available} that are left by'
            raise ConfigError(
                f'{field}.data x {field}.model: expected {"" if all_used else "at most "}the {number} devices {where} '
                f'config.compute.mesh (data={mesh.shape["data"]} x model={mesh.shape["model"]}){_as_many_of_each()}, '
                f'found {data} x {self.model}'
            )
        return _make_mesh(field, data, self.model, _of_each_process(first, used))


@dataclasses.dataclass(frozen=True)
class Compute:
    """Computation and logging. But for the dtypes, no result depends on it beyond rounding.

    Attributes:
        training: passes that are differentiated, and those compared with them.
        sampling: decoding.
        simulator_mesh: of simulators on the device, in conversations; None: `mesh`. Simulators of your own have `mesh`.
        rows_in_flight: conversations of an RL step sampled at once, which bounds the caches; None: all. With a
            simulator off the device the assistant has caches for twice as many; see `collect`.
        batching: how conversations of an RL step share the decode batch; see `rollouts.continuous`.
        compile_threads: threads that compile the programs of a training or an evaluation before its first step, also
            those of sizes that may not occur; 0: each is compiled once it is called. None: as many as there are CPUs; 0
            on a CPU.
        xla_flags: flags of XLA's compiler, '--xla_name=value', set before JAX starts.
    """

    training: Execution = Execution()
    sampling: Execution = Execution()
    loop: LoopSettings = dataclasses.field(default=LoopSettings(), metadata=NO_EFFECT)
    mesh: MeshSettings = dataclasses.field(default=MeshSettings(), metadata=NO_EFFECT)
    simulator_mesh: SimulatorMeshSettings | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    rows_in_flight: int | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    batching: Batching = dataclasses.field(default='static', metadata=NO_EFFECT)
    compile_threads: int | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    xla_flags: tuple[str, ...] = dataclasses.field(default=(), metadata=NO_EFFECT)

    def threads_to_compile(self) -> int:
        """`compile_threads`, its default resolved on this machine."""
        if self.compile_threads is not None:
            return self.compile_threads
        return 0 if jax.default_backend() == 'cpu' else len(cpus())

    def __post_init__(self) -> None:
        if self.compile_threads is not None and self.compile_threads < 0:
            raise ValueError(f'Compute.compile_threads: expected at least 0, found {self.compile_threads}')
        try:
            check_xla_flags(self.xla_flags)
        except ValueError as error:
            raise ValueError(f'Compute.{error}') from error

    def mesh_of_simulators(self) -> Mesh | None:
        """The mesh of simulators, where it is not `mesh`."""
        return None if self.simulator_mesh is None else self.simulator_mesh.beside(self.mesh.make())


@dataclasses.dataclass(frozen=True)
class ForecastSettings:
    """A forecast of each simulator's utility before anything is trained against it; see `experiments.forecasts`."""

    examples: int = 32  # of the split 'dev', which neither training nor the measures start from
    samples: int = 8  # conversations, or replies, of each example
    # Replies that the best one is chosen from, in best-of-n: of results, no stage depends on it.
    n: int = dataclasses.field(default=4, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        for field, least in (('examples', 3), ('samples', 2), ('n', 2)):
            if getattr(self, field) < least:
                raise ValueError(f'ForecastSettings.{field}: expected at least {least}, found {getattr(self, field)}')
        if self.n > self.samples:
            raise ValueError(f'ForecastSettings.n: expected at most samples={self.samples}, found {self.n}')


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Measurement of assistants, the same for every arm."""

    people: int | None = None  # held-out people, or their openings, that every assistant meets; None: all there are
    block: int | None = None  # people in one stage: with more blocks no stage changes; None: all
    matrix: int = 64  # conversations of each simulator with each assistant
    batch_size: int = dataclasses.field(default=64, metadata=NO_EFFECT)  # conversations sampled at once
    shown: int = 4  # people whose conversations the report shows
    seed: int = 0  # seed of sampling, and of the choice of `people` where there are more
    forecast: ForecastSettings | None = None  # None: no simulator's utility is forecast
    replayed: int = 0  # held-out conversations of people that every simulator replays, turn by turn; 0: none
    replayed_turns: int = 8  # max turns of a person in them, the opening included
    replayed_tokens: int = 1024  # max tokens of the messages before a turn
    # Libraries that describe the turns; what is not installed is not measured.
    annotators: Annotators = dataclasses.field(default=Annotators(), metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        for field in ('people', 'block', 'matrix', 'batch_size', 'replayed_turns', 'replayed_tokens'):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f'EvaluationSettings.{field}: expected at least 1, found {value}')
        if self.block is not None and (self.people is None or self.people % self.block):
            raise ValueError(
                f'EvaluationSettings.people: expected a multiple of block={self.block}, found {self.people}'
            )
        if not 0 <= self.shown <= (self.block or self.people or self.shown):
            raise ValueError(
                f'EvaluationSettings.shown: expected 0 to {self.block or self.people}, the people of one stage, '
                f'found {self.shown}'
            )
        if self.replayed < 0:
            raise ValueError(f'EvaluationSettings.replayed: expected at least 0, found {self.replayed}')
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f'EvaluationSettings.seed: expected a number from 0 to {MAX_SEED}, found {self.seed}')

    def blocks(self) -> list[range | None]:
        """The people of each stage, by number; None stands for all that there are."""
        if self.people is None:
            return [None]
        size = self.block or self.people
        return [range(start, start + size) for start in range(0, self.people, size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """An experiment: arms by training seeds, trained and measured alike."""

    scene: str  # name of the scene, of `experiment.SCENES`
    arms: Mapping[str, Any]  # the simulators to train against, by the arm's name
    # Names of arms that train no assistant; all assistants meet their simulators.
    held_out_simulators: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)  # training seeds, the same for every arm
    rl: RLSettings
    evaluation: EvaluationSettings
    compute: Compute = Compute()
    # Stages side by side; None: one per CPU, at most 8; 1 on an accelerator.
    workers: int | None = dataclasses.field(default=None, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.arms:
            raise ValueError(f'{name}.arms: expected at least one arm, found none')
        for arm in self.arms:
            if not ARM_NAME.fullmatch(arm) or arm.casefold() == INITIAL:
                raise ValueError(
                    f"{name}.arms: expected names of letters, digits, '_', '-' and '.' that are folders' names as well "
                    f'and not {INITIAL!r}, found {arm!r}'
                )
        folded = [arm.casefold() for arm in self.arms]
        if twice := [arm for arm in self.arms if folded.count(arm.casefold()) > 1]:
            raise ValueError(
                f'{name}.arms: expected names that differ in more than case, found {" and ".join(map(repr, twice))}'
            )
        held_out = self.held_out_simulators
        if unknown := [arm for arm in held_out if arm not in self.arms]:
            raise ValueError(f'{name}.held_out_simulators: expected names of arms, found {unknown[0]!r}')
        if len(set(held_out)) != len(held_out) or len(held_out) == len(self.arms):
            raise ValueError(
                f'{name}.held_out_simulators: expected different arms, and at least one that trains assistants, found '
                f'{held_out} of {len(self.arms)}'
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f'{name}.seeds: expected different values, at least one, found {self.seeds}')
        if not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise ValueError(f'{name}.seeds: expected numbers from 0 to {MAX_SEED}, found {self.seeds}')
        if self.rl.trained != 'assistant':
            raise ValueError(f"{name}.rl.trained: expected 'assistant', found {self.rl.trained!r}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f'{name}.workers: expected at least 1, or None, found {self.workers}')
