"""One arm on one mesh: its programs compiled, with all layers or from few, and whether they fit."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT
from simrl.experiments.memory import kept_kinds, other_kinds
from simrl.models import sharding
from simrl.rollouts.programs import conversation_programs
from simrl.run.compiles import Programs, counted
from simrl.run.config import ConfigError
from tools.compile_check.machines import Topology
from tools.compile_check.measure import Measured, compiled, extrapolated, fewer_layers
from tools.compile_check.programs import UNROLLED, Program, rollout_programs, training_programs
from tools.compile_check.shapes import others_of, passing_kinds
from tools.compile_check.work import Work

SIMULATOR = 'config.compute.simulator_mesh'
OnMeasured = Callable[[Measured], None]


@dataclasses.dataclass(frozen=True)
class Checked:
    """An arm on a mesh.

    Attributes:
        topology, data, model: where.
        simulator: data and model of the simulator's mesh; None: the same.
        programs: what was compiled, by name.
        kept: bytes a device of what a step keeps, by kind.
        passing: bytes a device of what a step has for a while, by kind: among arguments of programs.
        layers: of each side.
        depths: layers that a rollout's programs were compiled with, to be extrapolated; all layers: they were not.
        bound: of the programs of conversations, whatever their lengths; none where the user is not on the device.
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
    simulator: tuple[int, int] | None = None
    bound: Programs = dataclasses.field(default_factory=dict)

    def needs(self, name: str) -> float:
        """Bytes of a device while a program runs: the program's, and those of what is kept beside it."""
        program = self.programs[name]
        return (
            program.peak + program.beside + sum(size for kind, size in self.kept.items() if kind not in program.holds)
        )

    def mesh_of(self, name: str) -> tuple[int, int]:
        """Data and model of the mesh that a program is compiled for."""
        return self.simulator if self.simulator is not None and name.endswith('/user') else (self.data, self.model)

    @property
    def most(self) -> str:
        """The program that needs the most."""
        return max(self.programs, key=self.needs)

    @property
    def fits(self) -> bool | None:
        """None: the machine's memory is not known."""
        chip = self.topology.chip
        return None if chip is None else self.needs(self.most) <= chip.memory


def check_mesh(work: Work, mesh: Mesh, simulator_mesh: Mesh | None = None) -> None:
    """Refuses a mesh that divides neither the models nor the rows of an RL step.

    Raises:
        ConfigError: the field, and what does not divide it.
    """
    for name, agent in work.models().items():
        own, flag = (mesh, '--mesh') if name == 'assistant' or simulator_mesh is None else (simulator_mesh, SIMULATOR)
        try:
            sharding.param_shardings(agent.policy.spec.config, own, sharding.TRAINING_RULES)
        except ValueError as error:
            raise ConfigError(f'{flag}: {error} ({name} of arm {work.name})') from error
    if simulator_mesh is not None and work.rows_at_once % simulator_mesh.shape['data']:
        raise ConfigError(
            f'config.compute.rows_in_flight: expected a multiple of {SIMULATOR}.data={simulator_mesh.shape["data"]}, '
            f'found {work.rows_at_once} rows'
        )
    rows = {
        'config.rl.prompts_per_step x samples_per_prompt': work.rows,
        'config.compute.rows_in_flight': work.rows_at_once,
        'config.rl.prompts_per_step x samples_per_prompt / (minibatches x microbatches)': work.rows_of_microbatch,
    }
    for field, number in rows.items():
        if number % mesh.shape['data']:
            raise ConfigError(f'{field}: expected a multiple of mesh.data={mesh.shape["data"]}, found {number} rows')


def check(
    work: Work,
    topology: Topology,
    mesh: Mesh,
    *,
    names: Sequence[str],
    few: int | None,
    on_measured: OnMeasured,
    simulator_mesh: Mesh | None = None,
) -> Checked:
    """Compiles an arm's programs for a mesh.

    Args:
        simulator_mesh: of the same devices, where the simulator has another; its messages do not pass as text.
        names: of programs; others are left out.
        few: layers to compile unrolled programs with, and twice as many; None: all of them.
        on_measured: called with each program once it is known.
    """
    layers, measured = work.layers(), {}
    depths = [layers] if few is None else fewer_layers(layers, few)
    # Which axes parameters have is found by computing, which a mesh of absent devices, once it is set, does not allow.
    for depth in (layers, dict.fromkeys(layers, 1), *depths):
        check_mesh(work.with_layers(depth), mesh, simulator_mesh)
    with jax.set_mesh(mesh):
        training, scanned = training_programs(work, mesh)
        for program in scanned:
            if program.name in names:
                measured[program.name] = compiled(program, mesh)[0]
                on_measured(measured[program.name])
        if set(UNROLLED).intersection(names):
            points = [
                {x.name: x for x in _rollout(work.with_layers(depth), mesh, simulator_mesh, names)} for depth in depths
            ]
            for name in points[0]:
                own = [point[name] for point in points]
                measured[name] = own[0] if len(own) == 1 else extrapolated(own, depths, layers)
                on_measured(measured[name])
        theirs = mesh if simulator_mesh is None else simulator_mesh
        others, simulators = others_of(work)
        kept = kept_kinds(training, others, mesh) | other_kinds(simulators, theirs)
        passing = passing_kinds(work, training, {'assistant': mesh, 'user': theirs})
    shape = mesh.shape
    apart = None if simulator_mesh is None else (theirs.shape['data'], theirs.shape['model'])
    of = (work, topology, shape['data'], shape['model'])
    return Checked(*of, measured, kept, passing, layers, depths, apart, conversation_bound(work, mesh, simulator_mesh))


def conversation_bound(work: Work, mesh: Mesh, simulator_mesh: Mesh | None = None) -> Programs:
    """The programs that a run's conversations compile at most, by function; none where a user is not on the device."""
    if work.user is None:
        return {}
    programs = conversation_programs(
        *(dataclasses.replace(work.user, mesh=simulator_mesh), work.assistant, ()),
        chat=work.chat,
        limits=work.limits,
        view=ASSISTANT,
        mesh=mesh,
        rows=work.rows,
        size=work.rows_at_once,
        batching=work.compute.batching,
    )
    return counted(programs)


def _rollout(work: Work, mesh: Mesh, simulator_mesh: Mesh | None, names: Sequence[str]) -> Iterator[Measured]:
    """The measured programs of a rollout. `start` is compiled whether asked for or not: others take its results."""
    kept: list[Measured] = []

    def compile_start(program: Program) -> object:
        one, result = compiled(program, mesh)
        kept.append(one)
        return result.output_shardings

    for program in rollout_programs(work, mesh, compile_start, simulator_mesh):
        if program.name in names:
            with jax.set_mesh(simulator_mesh if simulator_mesh and program.name.endswith('/user') else mesh):
                yield compiled(program, mesh)[0]
    if 'start' in names:
        yield from kept
