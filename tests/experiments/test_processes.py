"""The whole program in several processes: the same run as in one, on any mesh; kills, bad input, flags."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

from simrl import main
from simrl.evaluation.fidelity.turns import read_turns
from simrl.experiments.endpoints import answers_file
from simrl.experiments.replays import TURNS_FILE
from simrl.run.config import ConfigError
from simrl.run.metrics import UNREPEATED
from tests import many_devices
from tests.experiments import with_endpoints
from tests.experiments.test_pretrained import files  # noqa: F401  (a fixture)
from tests.remote.server import ScriptedServer

HEADS = [
    f'--config.{model}.model.num_{kind}=4' for model in ('assistant', 'users.medium') for kind in ('heads', 'kv_heads')
]
COMMAND = (
    *('--config=configs/quickstart.py:smoke', *HEADS, '--config.seeds=(0,)', '--config.rl.steps=5'),
    *('--config.compute.loop.checkpoint_every=1', '--config.compute.loop.saved_conversations=16'),
)
STEPS, ROWS = 5, 16
EXACT = ('loss', 'entropy', 'grad_norm', 'param_norm', 'reward/mean')
ONE_HEAD = (
    *('--config.compute.mesh.data=1', '--config.compute.mesh.model=2'),
    *('--config.assistant.model.num_heads=1', '--config.assistant.model.num_kv_heads=1'),
)
SAME = 1e-5  # relative: the order of sums differs with the devices


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh over all of them."""

    processes: int
    devices: int
    data: int
    model: int

    def start(self, workdir: pathlib.Path, *flags: str) -> list[subprocess.Popen]:
        """Starts the program in all processes."""
        mesh = (f'--config.compute.mesh.data={self.data}', f'--config.compute.mesh.model={self.model}')
        usual = () if any(flag.startswith('--config=') for flag in flags) else COMMAND
        command = ('simrl.main', *usual, *flags, *mesh, f'--workdir={workdir}')
        if self.processes == 1:
            return many_devices.start_processes([command], self.devices)
        joined = (f'--processes={self.processes}', f'--coordinator={many_devices.free_address()}')
        commands = [(*command, *joined, f'--process={number}') for number in range(self.processes)]
        return many_devices.start_processes(commands, self.devices)

    def run(self, workdir: pathlib.Path, *flags: str) -> list[many_devices.Ended]:
        """Runs the program to its end, which is a good one."""
        ended = many_devices.end(self.start(workdir, *flags))
        assert not any(process.code for process in ended), '\n'.join(process.errors[-3000:] for process in ended)
        return ended


ONE = Layout(1, 1, 1, 1)
ROLE_PLAY = ('--only=rl/role_play',)
# At first no group's rewards differ here. Then a KL term's gradient is rounding, of which Adam makes a whole update.
ORACLE = ('--only=rl/oracle', '--config.rl.algorithm.kl=none', '--config.rl.algorithm.kl_coef=0.0')
MEASURES_OFF = (  # by default
    *('--config.evaluation.replayed=4', '--config.evaluation.forecast.examples=8'),
    *('--config.evaluation.forecast.samples=2', '--config.evaluation.forecast.n=2'),
)


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two arms trained by one process with one device."""
    workdir = tmp_path_factory.mktemp('one') / 'run'
    for arm in (ROLE_PLAY, ORACLE):
        ONE.run(workdir, *arm)
    return workdir


def prepared(alone: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """A run directory in which all is done that training needs."""
    return shutil.copytree(alone, workdir, ignore=shutil.ignore_patterns('rl', 'workers'))


def lines_of(workdir: pathlib.Path, arm: str) -> list[dict[str, float]]:
    """The metrics of a training that depend neither on the clock nor on how many rows the devices share."""
    lines = (workdir / 'rl' / arm / 'seed-0' / 'metrics.jsonl').read_text().splitlines()
    others = (*UNREPEATED, 'rollout/useful_steps')
    return [{k: x for k, x in json.loads(line).items() if not k.startswith(others)} for line in lines]


def conversations_of(workdir: pathlib.Path, arm: str) -> list[dict[str, Any]]:
    """What was said in a training: conversations without rewards."""
    path = workdir / 'rl' / arm / 'seed-0' / 'conversations' / 'rl.jsonl'
    return [
        {k: x for k, x in json.loads(line).items() if k not in ('reward', 'parts')}
        for line in path.read_text().splitlines()
    ]


def assert_equal_training(workdir: pathlib.Path, alone: pathlib.Path, arm: str) -> None:
    """The same conversations, each row once, and equal metrics."""
    said = conversations_of(workdir, arm)
    assert said == conversations_of(alone, arm)
    rows = [(row['step'], row['example'], row['sample']) for row in said]
    assert len(set(rows)) == len(rows) == STEPS * ROWS
    found, expected = lines_of(workdir, arm), lines_of(alone, arm)
    assert [line['step'] for line in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            # Of differences of log-probs near 0 little is left but rounding.
            same = {'rtol': SAME} if name in EXACT else {'rtol': 10 * SAME, 'atol': 1e-6}
            np.testing.assert_allclose(one[name], value, **same, err_msg=f'{name}, step {one["step"]}')


LAYOUTS = [
    *(Layout(1, data * model, data, model) for data, model in ((2, 1), (4, 1), (2, 2), (1, 4), (4, 2))),
    *(Layout(2, 2, data, model) for data, model in ((4, 1), (2, 2), (1, 4))),
    *(Layout(4, 1, data, model) for data, model in ((4, 1), (2, 2), (1, 4))),
]


@pytest.mark.long
@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda x: f'{x.processes}x{x.devices}-{x.data}x{x.model}')
def test_training_is_the_same_on_any_layout(alone: pathlib.Path, tmp_path: pathlib.Path, layout: Layout) -> None:
    """With a simulator on the devices; and with people, of whom each process has a share."""
    workdir = prepared(alone, tmp_path / 'run')
    for name, arm in (('role_play', ROLE_PLAY), ('oracle', ORACLE)):
        ended = layout.run(workdir, *arm)
        assert_equal_training(workdir, alone, name)
        # Each process compiles no more than it stated before; followers and workers have logs of their own.
        logs = [path.read_text() for path in sorted((workdir / 'workers').glob('*.log'))]
        assert len(logs) >= layout.processes - 1
        for said in [ended[0].output, *logs] if layout.processes > 1 else ['\n'.join(logs)]:
            assert re.search(r'^rl: at most \d+ programs that differ', said, re.MULTILINE)
            ends = re.findall(r'^rl: (\d+) of at most (\d+) programs that differ in their sizes$', said, re.MULTILINE)
            assert all(0 < int(number) <= int(most) for number, most in ends)
            assert ends
            for step, names in re.findall(r'^rl: step (\d+): \d+ programs .*disk in [\d.]+ s(.*)$', said, re.MULTILINE):
                assert (step == '1') == (names == ''), 'each program after the first step is named'


SPLIT, APART = ('--config.compute.simulator_mesh.model=4',), ('--config.compute.simulator_mesh.devices=other',)


@pytest.mark.long
@pytest.mark.parametrize(
    ('layout', 'flags', 'simulators'),
    [
        (Layout(1, 4, 4, 1), SPLIT, (1, 4)),
        (Layout(2, 2, 4, 1), SPLIT, (1, 4)),
        (Layout(1, 4, 2, 1), APART, (2, 1)),
        (Layout(2, 4, 4, 1), APART, (4, 1)),
        (Layout(2, 4, 4, 1), (*APART, '--config.compute.simulator_mesh.model=2'), (2, 2)),
        (Layout(2, 4, 2, 2), (*APART, '--config.compute.simulator_mesh.model=4'), (1, 4)),  # over both processes
    ],
)
def test_training_is_the_same_with_a_mesh_for_each_side(
    alone: pathlib.Path, tmp_path: pathlib.Path, layout: Layout, flags: tuple[str, ...], simulators: tuple[int, int]
) -> None:
    """A simulator of which each of four devices has a part; or one on other devices than the assistant's."""
    workdir = prepared(alone, tmp_path / 'run')
    first, *_ = layout.run(workdir, *ROLE_PLAY, *flags)
    shape = 'data={} x model={}'
    meshes = f'mesh {shape.format(layout.data, layout.model)}, of simulators {shape.format(*simulators)}'
    assert meshes in first.output
    assert ('each device of config.compute.simulator_mesh: simulator' in first.output) == (flags[0] in APART)
    assert_equal_training(workdir, alone, 'role_play')


def wait_for_step(workdir: pathlib.Path, arm: str, step: int, started: Sequence[subprocess.Popen]) -> None:
    """Waits until a training has logged a step."""
    file = workdir / 'rl' / arm / 'seed-0' / 'metrics.jsonl'
    while not file.exists() or file.read_bytes().count(b'\n') < step:
        assert all(process.poll() is None for process in started), 'ended before that step'
        time.sleep(0.005)


@pytest.mark.long
def test_a_training_goes_on_on_fewer_devices_and_on_more_processes(alone: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stopped = prepared(alone, tmp_path / 'run')
    started = Layout(1, 4, 4, 1).start(stopped, *ROLE_PLAY)
    wait_for_step(stopped, 'role_play', 2, started)
    started[0].send_signal(signal.SIGTERM)
    (ended,) = many_devices.end(started)
    assert ended.code == 128 + signal.SIGTERM
    assert len(lines_of(stopped, 'role_play')) < STEPS
    for name, layout in (('devices', Layout(1, 2, 2, 1)), ('processes', Layout(2, 1, 2, 1))):
        workdir = shutil.copytree(stopped, tmp_path / name)
        layout.run(workdir, *ROLE_PLAY)
        assert_equal_training(workdir, alone, 'role_play')


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_after_one_step(alone: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """And what several processes saved one of them can go on with."""
    workdir = prepared(alone, tmp_path / 'run')
    started = Layout(2, 2, 2, 2).start(workdir, *ROLE_PLAY)
    wait_for_step(workdir, 'role_play', 2, started)
    started[1].send_signal(signal.SIGTERM)
    ended = many_devices.end(started)
    assert [process.code for process in ended] == [128 + signal.SIGTERM] * 2
    assert 'rl: stopped by SIGTERM after step ' in ended[0].output
    assert len(lines_of(workdir, 'role_play')) < STEPS
    ONE.run(workdir, *ROLE_PLAY)
    assert_equal_training(workdir, alone, 'role_play')


@pytest.mark.long
def test_a_signal_between_trainings_ends_all_at_once(tmp_path: pathlib.Path) -> None:
    started = Layout(2, 1, 2, 1).start(tmp_path / 'run')
    while not (tmp_path / 'run' / 'world' / 'stage.json').exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.005)
    started[1].send_signal(signal.SIGTERM)
    first, second = many_devices.end(started)
    assert (first.code, second.code) == (128 + signal.SIGTERM,) * 2
    assert 'stopped by SIGTERM; the same command resumes' in second.errors
    assert re.search('process 0: stopped, because of process 1 on .*: stopped by SIGTERM', first.errors)
    assert first.at - second.at < 10


@pytest.mark.long
@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_the_other_one_and_the_same_command_goes_on(
    alone: pathlib.Path, tmp_path: pathlib.Path, killed: int
) -> None:
    layout, workdir = Layout(2, 1, 2, 1), prepared(alone, tmp_path / 'run')
    started = layout.start(workdir, *ROLE_PLAY)
    wait_for_step(workdir, 'role_play', 2, started)
    started[killed].kill()
    at = time.monotonic()
    other = many_devices.end(started)[1 - killed]
    print(f'ended {other.at - at:.1f} s after the kill of process {killed} with {other.code}:\n{other.errors[-3000:]}')
    assert other.code != 0
    assert other.at - at < 60
    assert re.match(
        rf'error: process {killed} on [^,]*: lost.*\. The same command resumes$', other.errors.splitlines()[-1]
    )
    assert f'process {1 - killed} of 2: 0 on ' in other.output  # where the leader was
    assert len(lines_of(workdir, 'role_play')) < STEPS
    layout.run(workdir, *ROLE_PLAY)
    assert_equal_training(workdir, alone, 'role_play')


@pytest.mark.long
def test_the_whole_experiment_in_two_processes(alone: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole, workdir = prepared(alone, tmp_path / 'one'), tmp_path / 'two'
    ONE.run(whole, *MEASURES_OFF)
    _, second = Layout(2, 1, 2, 1).run(workdir, *MEASURES_OFF)
    for arm in ('role_play', 'oracle'):
        assert_equal_training(workdir, whole, arm)
    assert names_in(workdir) - names_in(whole) == {'workers/process-1.log'}
    assert '== rl/oracle/seed-0' in (workdir / 'workers' / 'process-1.log').read_text()
    assert 'finished' not in second.output
    for folder in ('people/oracle/seed-0/block-0', 'matrix/oracle/seed-0/persona', 'people/initial/block-0'):
        one, two = (json.loads((run / folder / 'result.json').read_text()) for run in (whole, workdir))
        assert one['shown'] == two['shown']
        assert one['outcomes'] == two['outcomes']
    for folder in ('forecast/fine_tuned/seed-0', 'people_forecast'):
        one, two = (json.loads((run / folder / 'result.json').read_text()) for run in (whole, workdir))
        assert one.get('rewards', one.get('values')) == two.get('rewards', two.get('values'))
        np.testing.assert_allclose(one['products'], two['products'], rtol=1e-4, atol=1e-6)
    turns = [read_turns(run / 'replay' / 'persona' / TURNS_FILE) for run in (whole, workdir)]
    assert turns[0] == turns[1]


@pytest.mark.long
def test_processes_ask_endpoints_for_their_shares(files, tmp_path: pathlib.Path) -> None:  # noqa: F811
    """Of a simulator and a judge: in conversations of training, in a replay of people's; nothing is asked twice."""
    arm, asked = with_endpoints.ARM, []
    flags = (
        *('--config.evaluation.replayed=4', '--config.conversation.limits.prompt_tokens=96'),
        *(
            f'--only=rl/{arm},replay/{arm}',
            f'--config.model.source={files}/model',
            f'--config.data.folder={files}',
            '--config.rl.row_buckets=(256,)',
        ),
        '--config.conversation.role_play.instructions=Play. End with {signal}. {opening}',
        *('--config.evaluation.people=6', '--config.evaluation.matrix=4', '--config.evaluation.batch_size=6'),
    )
    for name, layout in (('one', ONE), ('two', Layout(2, 1, 2, 1))):
        with ScriptedServer(with_endpoints.answers) as server:
            config = f'--config=tests/experiments/with_endpoints.py:{server.url}'
            layout.run(tmp_path / name, config, *flags)
            asked.append(sorted(json.dumps(body, sort_keys=True) for body in server.requests))
    assert asked[0] == asked[1]
    assert conversations_of(tmp_path / 'one', arm) == conversations_of(tmp_path / 'two', arm)
    turns = [read_turns(tmp_path / name / 'replay' / arm / TURNS_FILE) for name in ('one', 'two')]
    assert turns[0] == turns[1]
    sizes = [(tmp_path / 'two' / answers_file(process)).stat().st_size for process in (0, 1)]
    assert min(sizes) > max(sizes) / 3


def names_in(workdir: pathlib.Path) -> set[str]:
    """The files of a run by name; those of checkpoints, whose names are hashes, and logs of workers left out."""
    paths = (path.relative_to(workdir) for path in workdir.rglob('*') if path.is_file())
    return {path.as_posix() for path in paths if 'params' not in path.parts and 'worker-' not in path.name}


@pytest.mark.long
@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (
            ((), ('--config.rl.steps=6',)),
            r'the command: expected the same in all 2 processes, .* process 1 on .*: config.rl.steps: 5 -> 6',
        ),
        (((), ('--only=rl/oracle',)), r"the command: .* only: \[\] -> \['rl/oracle'\]"),
        (
            (('--config.compute.mesh.data=3',),) * 2,
            'at most 2 devices, as many of each of the 2 processes, found 3 x 1',
        ),
        (
            (('--config.compute.mesh.data=1',),) * 2,
            'at most 2 devices, as many of each of the 2 processes, found 1 x 1',
        ),
        ((('--config.evaluation.batch_size=15',),) * 2, 'config.evaluation.batch_size: expected a multiple of the 2'),
        ((ONE_HEAD,) * 2, 'config.compute.mesh.model: expected a divisor of num_heads=1'),
        ((APART,) * 2, 'the 0 devices of 2 that are left by .*, as many of each of the 2 processes, found 1 x 1'),
        ((('--config.workers=2',),) * 2, 'config.workers: expected 1 in a run of 2 processes'),
    ],
)
def test_faults_are_told_by_every_process(tmp_path: pathlib.Path, changed, message: str) -> None:
    usual = (*COMMAND, '--config.compute.mesh.data=2', f'--workdir={tmp_path}')
    joined = ('--processes=2', f'--coordinator={many_devices.free_address()}')
    commands = [('simrl.main', *usual, *joined, f'--process={number}', *flags) for number, flags in enumerate(changed)]
    for ended in many_devices.end(many_devices.start_processes(commands)):
        assert ended.code == 1
        assert 'error: ' in ended.errors
        assert re.search(message, ended.errors), ended.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_processes_of_different_versions(tmp_path: pathlib.Path) -> None:
    usual = (*COMMAND, '--processes=2', f'--coordinator={many_devices.free_address()}', f'--workdir={tmp_path}')
    modules = ('simrl.main', 'tests.experiments.other_jax')
    commands = [(module, *usual, f'--process={number}') for number, module in enumerate(modules)]
    for ended in many_devices.end(many_devices.start_processes(commands)):
        assert ended.code == 1
        assert re.search(r"process 1 on .*: version of jax: '.*' -> '0\.9\.99'", ended.errors), ended.errors


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('2', None, None), r'--process: expected a value with --processes=2, found none'),
        (('2', 0, None), r'--coordinator: expected a value with --processes=2, found none'),
        (('2', 2, 'a:1'), r'--process: expected a number from 0 to 1, found 2'),
        (('2', 0, 'a'), r"--coordinator: expected HOST:PORT, found 'a'"),
        (('2', 0, 'a:0'), r"--coordinator: expected HOST:PORT, found 'a:0'"),
        (('two', 0, 'a:1'), r"--processes: expected a number from 1, or 'auto', found 'two'"),
        ((None, 1, None), r'--process=1: expected --processes=N with it, found --processes=None'),
        (('auto', None, 'a:1'), r'--coordinator=a:1: expected --processes=N with it, found --processes=auto'),
        (('auto', None, None), r'--processes=auto: expected a cluster that JAX knows .* found none'),
    ],
)
def test_impossible_flags(flags, message: str) -> None:
    with (
        mock.patch('jax.distributed.initialize', side_effect=ValueError('coordinator_address should be defined.')),
        pytest.raises(ConfigError, match=message),
    ):
        main.join_processes(*flags)


def test_a_task_among_several_is_told_that_it_works_alone(monkeypatch, capsys) -> None:
    slurm = {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3'}
    assert main.tasks_of_cluster(slurm | {'SLURM_NTASKS': '1'}) == ''
    assert (
        main.tasks_of_cluster({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}) == 'worker 1 of 2 of a TPU slice'
    )
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    main.join_processes(None, None, None)
    assert capsys.readouterr().out == (
        'task 3 of 4 of SLURM: this process works alone; --processes=auto joins them in one run\n'
    )
