"""Compiles the programs of a config for machines that are not here, and says what they take. Nothing is loaded or run.

    python -m tools.compile_check --config=configs/paper.py:sftuser-14b --topology=v5p:2x2x2 [--mesh=8x1] [--layers=2]
        [--programs=gradients,message/user] [--config.compute.rows_in_flight=64]

For each arm, topology and mesh: bytes a device by kind, floating-point operations, collectives, the least seconds of an
RL step (a roofline), and whether it fits; of several topologies (--topology=v5p:2x2x1,v5p:2x2x2) the smallest that
fits. Topologies are slices of TPUs, such as v5e:4x4, v5p:2x2x2 and v6e:4x4, which need libtpu (pip install '.[tpu]')
and no TPU, or CPUs, cpu:8. Without --mesh it is the config's own.

Programs (`programs.py`) are the functions that training calls, traced with shapes. Models of the hub are known by their
published sizes (`architectures.py`), with a tokenizer that stands in for theirs; others by the files of their folder,
without weights. Compiling a rollout's program of 84 layers takes about 90 s of CPU. With --layers=N they are compiled
with about N layers of each side, and twice as many, and continued to all layers by a line; training's programs scan
over their layers and are compiled with all.

The least to try it with, in a minute or two and without libtpu (the concierge's models have no tokenizer yet, so it
takes pretrained ones alone):

    python -m tools.compile_check --config=configs/paper.py:sftuser-7b,1.5b --topology=cpu:8 --layers=1
        --programs=step,passes

With --chips=8,16,32 the step is estimated on larger slices as well (`scaling.py`, with a table).

The paper's pair, Qwen2.5-3B and 14B, with 64 conversations in flight (2026-12-01, jax 0.10.2, libtpu 0.0.42.1):

    python -m tools.compile_check --config=configs/paper.py:sftuser-14b --topology=v5p:2x2x2 --mesh=8x1
        --config.compute.rows_in_flight=64 --layers=2

GiB of a device for the program that needs the most to talk, and to update, with all that is kept beside it; and the
least seconds of a step with all messages at their budgets, at the peaks of the chips:

| slice | mesh | batching | talk | update | memory | seconds |
|---|---|---|---|---|---|---|
| v5p:2x2x2 | 8x1 | static | 69.1 | 44.6 | 95.7 | 587 |
| v5p:2x2x2 | 8x1 | continuous | 71.0 | 44.6 | 95.7 | 587 |
| v5p:2x2x2 | 4x2 | static | 53.3 | 34.4 | 95.7 | 426 |
| v5p:2x2x4 | 16x1 | static | 50.7 | 39.8 | 95.7 | 454 |
| v5e:8x8 | 8x8 | static | 11.1 | 8.8 | 15.8 | 234 |
| v5e:8x8 | 16x4, simulator 8x8 | continuous | 11.0 | (9.7) | 15.8 | 282 |
| v5e:8x8 | 16x4 | static | 14.0 | 13.1 | 15.8 | 369 |
| v6e:8x8 | 8x8 | static | 11.2 | 9.1 | 31.2 | 108 |
| v6e:8x8 | 16x4 | static | 13.7 | 13.1 | 31.2 | 176 |

In brackets: by arithmetic. 16x4 and 16x1 have --config.rl.algorithm.microbatches=5, as 16 divide no microbatch of 8
rows; a simulator's own mesh is config.compute.simulator_mesh.

Of v5p:2x2x2 as 8x1, a rollout's programs from 3 + 4 and 6 + 8 layers, with the caches of the latest message, and the
seconds of CPU that compiling took, of both of these together, on two busy cores:

| program | calls a step | arguments | temporaries | sent in a call | TFLOP | CPU s |
|---|---|---|---|---|---|---|
| passes (old, reference) | 40 | 2.2 | 2.5 | 13.7 GB | 388 | 20 |
| gradients | 40 | 2.9 | 10.5 | 21.5 GB | 890 | 59 |
| step | 4 | 5.8 | 0.4 | 168 B | | 10 |
| message/user | 20 | 61.8 | 0.3 | 7 B a token | 0.35 a token, 10.7 to hear 128 | 71 |
| message/assistant | 25 | 63.0 | 0.7 | 7 B a token | 0.09 a token, 48.8 to hear 128 | 79 |
| start | 5 | 31.8 | 0.4 | 14 B | 36.0 for 128 tokens of both | 92 |

Kept: parameters 1.4, optimizer 2.9, reference 0.7, simulator 27.5. Caches of 26.3 (14B) and 4.9 (3B) are among
arguments. Compiled with all 36 + 48 layers, message/user takes 0.2 less, and 74 s of CPU. Sampling takes at least 315 +
165 s, prompts and hearing 37 + 4, passes 27, gradients 40; collectives at the peak of the links 2.4. A first step with
all messages at their budgets and rows of all lengths has 8 messages (a side and a size of caches), and passes and
gradients of 5 widths: 20 programs with start and step, of at most 18 minutes of CPU. Over a run conversations of any
lengths have at most 304 programs, and 526 with continuous batching, most of which move caches and no more.

With a reward model its pass takes 1.2 of temporaries, beside 5.8 of parameters. On v5e:4x4 as 4x4 nothing is gathered
for a token or a message: a token of the assistant takes 78 all-reduces of 4.9 MB in all.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from simrl.experiments.experiment import settings_of
from simrl.experiments.settings import SimulatorMeshSettings
from simrl.main import USER_ERRORS, parse_flags
from simrl.run import runtime
from simrl.run.config import ConfigError
from simrl.run.program import run_program
from tools.compile_check.check import SIMULATOR, Checked, check
from tools.compile_check.machines import Topology, mesh_of, mesh_shape, prepare_process, topology_of
from tools.compile_check.programs import NAMES
from tools.compile_check.report import line_of, plain, smallest, text_of
from tools.compile_check.scaling import check_chips
from tools.compile_check.work import works_of


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', None, 'A Python file with get_config(arg).', lock_config=True)
    flags.DEFINE_list('topology', [], 'Machines to compile for, e.g. v5p:2x2x2,v5e:4x4 or cpu:8.')
    flags.DEFINE_string('mesh', None, 'DATAxMODEL devices, e.g. 8x1; default: config.compute.mesh.')
    flags.DEFINE_integer('layers', None, "About how many layers of each side a rollout's programs are compiled with.")
    flags.DEFINE_list('chips', [], 'Numbers of chips on which to estimate the step, e.g. 8,16,32,64,128,256.')
    flags.DEFINE_string('output', None, 'A file for all numbers, as JSON.')
    flags.DEFINE_list('programs', list(NAMES), f'Which ones, of {", ".join(NAMES)}.')


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'expected only flags, found {argv[1:]}')
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    options: Any = flags.FLAGS
    if options.config is None or not options.topology:
        sys.exit('error: expected a config and a topology, e.g. --config=configs/paper.py --topology=v5p:2x2x2')
    try:
        found = compile_all(
            *(options.config, options.topology, options.mesh, options.layers, options.programs), chips=options.chips
        )
        if options.output is not None:
            text = json.dumps([plain(checked) for checked in found], indent=2)
            pathlib.Path(options.output).write_text(text + '\n', encoding='utf-8')
    except USER_ERRORS as error:
        sys.exit(f'error: {error}')


@runtime.numeric_defaults()
def compile_all(
    config: Any,
    names: Sequence[str],
    mesh: str | None,
    layers: int | None,
    programs: Sequence[str],
    *,
    chips: Sequence[str] = (),
) -> list[Checked]:
    """Prints the tables of each arm on each topology, as soon as they are known.

    Raises:
        ConfigError: a flag, or a setting, that is impossible.
    """
    topologies = [topology_of(name) for name in names]
    if layers is not None and layers < 1:
        raise ConfigError(f'--layers: expected at least 1, found {layers}')
    if unknown := [name for name in programs if name not in NAMES]:
        raise ConfigError(f'--programs: expected some of {", ".join(NAMES)}, found {unknown[0]!r}')
    settings = settings_of(config)
    own = settings.compute.mesh
    shape = (own.data, own.model) if mesh is None else mesh_shape(mesh)
    works = list(works_of(settings))
    prepare_process(topologies)
    meshes = [mesh_of(topology, shape) for topology in topologies]
    for topology, devices in zip(topologies, meshes, strict=True):
        check_chips(topology, devices, chips)
    theirs = [simulator_mesh_of(settings.compute.simulator_mesh, topology) for topology in topologies]
    found: list[Checked] = []
    for topology, devices, simulator_mesh in zip(topologies, meshes, theirs, strict=True):
        for work in works:
            found.append(
                check(
                    *(work, topology, devices),
                    names=programs,
                    few=layers,
                    simulator_mesh=None if work.user is None else simulator_mesh,
                    on_measured=lambda program: print(line_of(program), file=sys.stderr, flush=True),
                )
            )
            print(f'{text_of(found[-1], list(map(int, chips)))}\n', flush=True)
    print('\n'.join(smallest(found)))
    return found


def simulator_mesh_of(settings: SimulatorMeshSettings | None, topology: Topology) -> Mesh | None:
    """The simulators' mesh of a topology.

    Raises:
        ConfigError: it is of other devices, or not of all.
    """
    if settings is None:
        return None
    if settings.devices == 'other':
        raise ConfigError(
            f"{SIMULATOR}.devices: expected 'same', found 'other': check each side with a --topology of its own devices"
        )
    return mesh_of(topology, (settings.data, settings.model), SIMULATOR)


if __name__ == '__main__':
    define_flags()
    run_program(lambda: app.run(main, flags_parser=parse_flags))
