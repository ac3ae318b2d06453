"""One arm on one mesh: its programs compiled, with all layers or from few, and whether they fit."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from simrl.experiments.memory import kept_kinds
from simrl.models import sharding
from simrl.run.config import ConfigError
from tools.compile_check.machines import Topology
from tools.compile_check.measure import Measured, compiled, extrapolated, fewer_layers
from tools.compile_check.programs import UNROLLED, Program, rollout_programs, training_programs
from tools.compile_check.shapes import others_of, passing_kinds
from tools.compile_check.work import Work

OnMeasured = Callable[[Measured], None]


@dataclasses.dataclass(frozen=True)
class Checked:
    """An arm on a mesh.

    Attributes:
        topology, data, model: where.
        programs: what was compiled, by name.
        kept: bytes a device of what a step keeps, by kind.
        passing: bytes a device of what a step has for a while, by kind: among arguments of programs.
        layers: of each side.
        depths: layers that a rollout's programs were compiled with, to be extrapolated; all layers: they were not.
    """

    work: Work
    topology: Topology
    data: int
    model: int
    programs: Mapping[str, Measured]
    kept: Mapping[str, int]
    passing: Mapping[str, float]
    layers: Mapping[str, int]
    depths: Sequence[Mapping[str, int]]

    def needs(self, name: str) -> float:
        """Bytes of a device while a program runs: the program's, and those of what is kept beside it."""
        program = self.programs[name]
        return (
            program.peak + program.beside + sum(size for kind, size in self.kept.items() if kind not in program.holds)
        )

    @property
    def most(self) -> str:
        """The program that needs the most."""
        return max(self.programs, key=self.needs)

    @property
    def fits(self) -> bool | None:
        """None: the machine's memory is not known."""
        chip = self.topology.chip
        return None if chip is None else self.needs(self.most) <= chip.memory


def check_mesh(work: Work, mesh: Mesh) -> None:
    """Refuses a mesh that divides neither the models nor the rows of an RL step.

    Raises:
        ConfigError: the field, and what does not divide it.
    """
    for name, agent in work.models().items():
        try:
            sharding.param_shardings(agent.policy.spec.config, mesh, sharding.TRAINING_RULES)
        except ValueError as error:
            raise ConfigError(f'--mesh: {error} ({name} of arm {work.name})') from error
    rows = {
        'config.rl.prompts_per_step x samples_per_prompt': work.rows,
        'config.compute.rows_in_flight': work.rows_at_once,
        'config.rl.prompts_per_step x samples_per_prompt / (minibatches x microbatches)': work.rows_of_microbatch,
    }
    for field, number in rows.items():
        if number % mesh.shape['data']:
            raise ConfigError(f'{field}: expected a multiple of mesh.data={mesh.shape["data"]}, found {number} rows')


def check(
    work: Work, topology: Topology, mesh: Mesh, *, names: Sequence[str], few: int | None, on_measured: OnMeasured
) -> Checked:
    """Compiles an arm's programs for a mesh.

    Args:
        names: of programs; others are left out.
        few: layers to compile unrolled programs with, and twice as many; None: all of them.
        on_measured: called with each program once it is known.
    """
    layers, measured = work.layers(), {}
    depths = [layers] if few is None else fewer_layers(layers, few)
    # Which axes parameters have is found by computing, which a mesh of absent devices, once it is set, does not allow.
    for depth in (layers, dict.fromkeys(layers, 1), *depths):
        check_mesh(work.with_layers(depth), mesh)
    with jax.set_mesh(mesh):
        training, scanned = training_programs(work, mesh)
        for program in scanned:
            if program.name in names:
                measured[program.name] = compiled(program, mesh)[0]
                on_measured(measured[program.name])
        if set(UNROLLED).intersection(names):
            points = [{x.name: x for x in _rollout(work.with_layers(depth), mesh, names)} for depth in depths]
            for name in points[0]:
                own = [point[name] for point in points]
                measured[name] = own[0] if len(own) == 1 else extrapolated(own, depths, layers)
                on_measured(measured[name])
        kept, passing = kept_kinds(training, others_of(work), mesh), passing_kinds(work, training, mesh)
    shape = mesh.shape
    return Checked(work, topology, shape['data'], shape['model'], measured, kept, passing, layers, depths)


def _rollout(work: Work, mesh: Mesh, names: Sequence[str]) -> Iterator[Measured]:
    """The measured programs of a rollout. `start` is compiled whether asked for or not: others take its results."""
    kept: list[Measured] = []

    def compile_start(program: Program) -> object:
        one, result = compiled(program, mesh)
        kept.append(one)
        return result.output_shardings

    for program in rollout_programs(work, mesh, compile_start):
        if program.name in names:
            yield compiled(program, mesh)[0]
    if 'start' in names:
        yield from kept
