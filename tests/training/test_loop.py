"""The loop goes on after kills, signals, faults and full disks; what it writes equals an unbroken run's."""

import gzip
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from simrl.models.checkpoint import CheckpointError, Checkpoints
from simrl.run import processes, program, progress
from simrl.training import loop
from tests import kills
from tests.training import tiny_job

STEPS = 96
pytestmark = pytest.mark.usefixtures('default_signals')


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp('cache')


def command(folder: pathlib.Path, cache: pathlib.Path, *flags: str) -> list[str]:
    job = [sys.executable, '-m', 'tests.training.tiny_job', str(folder)]
    return [*job, f'--cache={cache}', f'--steps={STEPS}', *flags]


def run_job(folder: pathlib.Path, cache: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, cache, *flags), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('unbroken')
    done = run_job(folder, cache)
    assert done.returncode == 0, done.stderr
    return folder


def metrics_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_an_unbroken_run_writes_every_line(unbroken: pathlib.Path) -> None:
    rows = metrics_of(unbroken)
    assert [row['step'] for row in rows] == sorted({0, *range(3, STEPS + 1, 3), 20, 40, 60, 80})
    assert {key for key in rows[0] if not key.startswith('time/')} == {'step', 'evaluation/loss'}
    assert 'evaluation/loss' in rows[-1]
    assert rows[-1]['loss'] < rows[1]['loss'] - 0.1  # it learns
    events = {(step, tag): value for step, tag, value in kills.events(unbroken / 'tensorboard')}
    for row in rows:
        for name in ('loss', 'evaluation/loss'):
            if name in row:
                assert events[row['step'], name] == pytest.approx(row[name], rel=1e-6)  # TensorBoard keeps float32
    conversations = (unbroken / 'conversations' / 'sft.jsonl').read_text().splitlines()
    assert [json.loads(row)['step'] for row in conversations] == [step + 1 for step in range(0, STEPS, 7)]
    assert b'**user**' in events[8, 'sft/conversation_0']
    assert any(tag == '_hparams_/session_end_info' for _, tag in events)


@pytest.mark.parametrize('num_kills', [2, pytest.param(10, marks=pytest.mark.long)])
def test_kill_9_at_random_moments(
    tmp_path: pathlib.Path, unbroken: pathlib.Path, cache: pathlib.Path, num_kills: int
) -> None:
    broken = tmp_path / 'broken'
    broken.mkdir()
    killed = kills.run_with_kills(command(broken, cache), broken, num_kills, seed=0, lines=3, span=0.1)
    if num_kills == 10:
        assert any(kill.phase == 'save' for kill in killed)
        assert any(kill.step > 10 for kill in killed)
    kills.assert_same_run(unbroken, broken)


def test_the_comparison_notices(tmp_path: pathlib.Path, unbroken: pathlib.Path) -> None:
    """The kill test depends on it: a repeated, missing or changed entry is found."""
    lines = (unbroken / 'metrics.jsonl').read_text().splitlines(keepends=True)
    changed = lines[2].replace('"loss": ', '"loss": 1')
    for broken in (lines[:3] + lines[2:], lines[:2] + lines[3:], [*lines[:2], changed, *lines[3:]]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / 'conversations').mkdir(parents=True)
        shutil.copytree(unbroken / 'tensorboard', folder / 'tensorboard')
        for path in unbroken.glob('**/*.jsonl'):
            (folder / path.relative_to(unbroken)).write_bytes(path.read_bytes())
        kills.assert_same_run(unbroken, folder)
        (folder / 'metrics.jsonl').write_text(''.join(broken))
        with pytest.raises(AssertionError):
            kills.assert_same_run(unbroken, folder)


def test_sigterm_saves_and_the_same_command_goes_on(
    tmp_path: pathlib.Path, unbroken: pathlib.Path, cache: pathlib.Path
) -> None:
    process = subprocess.Popen(command(tmp_path, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'checkpoints' / '5').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        saved = checkpoints.steps[-1]
    assert 5 <= saved < STEPS
    assert f'sft: stopped by SIGTERM after step {saved} of {STEPS}' in output
    assert run_job(tmp_path, cache).returncode == 0
    kills.assert_same_run(unbroken, tmp_path)


def test_a_full_disk_while_saving(tmp_path: pathlib.Path, unbroken: pathlib.Path, cache: pathlib.Path) -> None:
    failed = run_job(tmp_path, cache, '--fault=disk')
    assert failed.returncode == 1
    assert f'could not save step 15 in {tmp_path / "checkpoints"} (is the disk full?)' in failed.stderr
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['10', '5']  # nothing half-written
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        step, state, _ = checkpoints.restore(tiny_job.init_state()) or (None, None, None)
    assert step == 10
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))
    assert run_job(tmp_path, cache).returncode == 0  # with space again, the same command goes on
    kills.assert_same_run(unbroken, tmp_path)


def test_nan_losses_stop_the_run(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    for _ in range(2):  # the same command fails at the same step
        failed = run_job(tmp_path, cache, '--fault=nan')
        assert failed.returncode == 1
        last = failed.stderr.splitlines()[-1]
        assert f'sft: stopped at step 15 of {STEPS}: the last 3 updates in a row had a non-finite loss' in last
        assert 'loss nan' in last
        assert metrics_of(tmp_path)[-1]['loss'] is None
        assert metrics_of(tmp_path)[-1]['step'] == 15
        assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['10', '5']


def settings(**changes: int) -> loop.LoopSettings:
    return loop.LoopSettings(**({'log_every': 2, 'checkpoint_every': 4} | changes))


def counting(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
    return state, loop.StepResult({'x': (jnp.float32(step), jnp.float32(step % 2 + 1))})


def test_weights_decide_the_average_of_a_line(tmp_path: pathlib.Path) -> None:
    loop.run(tmp_path, tiny_job.init_state(), counting, settings(log_every=3), num_steps=5, name='count')
    assert [(row['step'], row['x']) for row in metrics_of(tmp_path)] == [(3, 3 / 4), (5, 7 / 3)]


def test_a_finished_run_is_left_alone(tmp_path: pathlib.Path, capsys) -> None:
    loop.run(tmp_path, tiny_job.init_state(), counting, settings(), num_steps=4, name='count')
    assert capsys.readouterr().err.splitlines().count('count: compiling the first step') == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}

    def never(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
        raise AssertionError('a step was taken')

    begun = tiny_job.init_state()
    loop.run(tmp_path, begun, never, settings(), num_steps=4, name='count')
    # What was restored has taken the place of the state that the caller holds.
    assert all(array.is_deleted() for array in jax.tree.leaves(begun) if isinstance(array, jax.Array))
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
    assert 'compiling' not in capsys.readouterr().err
    with pytest.raises(ValueError, match='expected a run of at most 3 steps, found a checkpoint of step 4'):
        loop.run(tmp_path, tiny_job.init_state(), never, settings(), num_steps=3, name='count')


def test_numbers_are_read_after_the_next_step_was_dispatched(tmp_path: pathlib.Path) -> None:
    read: list[tuple[int, int]] = []

    class Tokens(int):
        """Tells when it is read: by `int(...)`."""

        def __int__(self) -> int:
            read.append((super().__int__(), dispatched[-1]))
            return super().__int__()

    dispatched: list[int] = []

    def step_fn(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
        dispatched.append(step)
        return state, loop.StepResult({}, tokens=Tokens(step))

    loop.run(tmp_path, tiny_job.init_state(), step_fn, settings(checkpoint_every=100), num_steps=3, name='x')
    assert read[0] == (0, 1)
    assert read[-1] == (2, 2)


def test_impossible_settings() -> None:
    for field in ('log_every', 'checkpoint_every', 'keep_checkpoints', 'max_nonfinite'):
        with pytest.raises(ValueError, match=rf'LoopSettings\.{field}: expected at least 1, found 0'):
            settings(**{field: 0})
    with pytest.raises(ValueError, match=r'LoopSettings\.evaluate_every: expected at least 0, found -1'):
        settings(evaluate_every=-1)


def test_evaluations_must_be_possible(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r'LoopSettings\.evaluate_every: expected 0 if and only if'):
        loop.run(tmp_path, tiny_job.init_state(), counting, settings(evaluate_every=2), num_steps=4, name='count')


def signalled(*numbers: int) -> Callable[[tiny_job.TrainState, int], tuple[tiny_job.TrainState, loop.StepResult]]:
    """A step function; signals arrive in the third step."""

    def step_fn(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
        for number in numbers if step == 2 else ():
            signal.raise_signal(number)
        return counting(state, step)

    return step_fn


class Gone(io.StringIO):
    """The output of a process whose terminal or pipe has ended."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_even_where_nobody_reads_the_output(tmp_path: pathlib.Path, monkeypatch, number: int) -> None:
    handlers = [signal.signal(number, signal.default_int_handler)]  # not ignored, whatever started the tests
    monkeypatch.setattr(progress, 'LINE_SECONDS', 0.0)
    monkeypatch.setattr(sys, 'stdout', Gone())
    step_fn = signalled(number)

    def and_nobody_reads(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
        if step == 2:
            monkeypatch.setattr(sys.stderr, 'write', Gone().write)
        return step_fn(state, step)

    try:
        with pytest.raises(loop.Stopped) as stopped:
            loop.run(tmp_path, tiny_job.init_state(), and_nobody_reads, settings(), num_steps=9, name='count')
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, handlers[0])
    with Checkpoints(tmp_path / 'checkpoints', keep=1) as checkpoints:
        assert checkpoints.steps == [3]


def test_a_print_that_nobody_reads_saves(tmp_path: pathlib.Path, monkeypatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, 'stdout', os.fdopen(writer, 'w'))
    monkeypatch.setattr(sys, 'stderr', sys.stderr)

    def step_fn(state: tiny_job.TrainState, step: int) -> tuple[tiny_job.TrainState, loop.StepResult]:
        if step == 2:
            os.close(reader)
        print('steps', step, flush=True)
        return counting(state, step)

    def train() -> None:
        loop.run(tmp_path, tiny_job.init_state(), step_fn, settings(), num_steps=9, name='count')

    with pytest.raises(loop.Stopped) as stopped:
        program.run_program(train)
    assert stopped.value.code == 128 + signal.SIGHUP
    with Checkpoints(tmp_path / 'checkpoints', keep=1) as checkpoints:
        assert checkpoints.steps == [3]


def test_ignored_signals_stay_ignored(tmp_path: pathlib.Path) -> None:
    """As `nohup` and the background jobs of a shell have them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        loop.run(tmp_path, tiny_job.init_state(), signalled(*before), settings(), num_steps=4, name='count')
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert metrics_of(tmp_path)[-1]['step'] == 4


def test_a_process_stops_with_another_one_that_received_a_signal(tmp_path: pathlib.Path, monkeypatch) -> None:
    answers = iter([None, None, signal.SIGTERM])
    monkeypatch.setattr(processes, 'agree_on_signal', lambda received: next(answers) if received is None else None)
    with pytest.raises(loop.Stopped) as stopped:
        loop.run(tmp_path, tiny_job.init_state(), counting, settings(), num_steps=9, name='count')
    assert stopped.value.code == 128 + signal.SIGTERM
    with Checkpoints(tmp_path / 'checkpoints', keep=1) as checkpoints:
        assert checkpoints.steps == [3]


def test_a_second_ctrl_c_ends_one_of_several_processes_whatever_it_waits_for(monkeypatch) -> None:
    monkeypatch.setattr(processes, 'count', lambda: 2)
    with loop._Signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        stop.received = None  # else it is raised again at the end
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(tmp_path: pathlib.Path, capfd) -> None:
    step_fn = signalled(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.run(tmp_path, tiny_job.init_state(), step_fn, settings(), num_steps=9, name='count')
    assert 'stops after this step; Ctrl-C again: at once' in capfd.readouterr().err
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_ctrl_c_saves_though_the_reader_of_a_pipe_has_ended(tmp_path: pathlib.Path, monkeypatch) -> None:
    def gone(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(loop.os, 'write', gone)
    with pytest.raises(loop.Stopped):
        loop.run(tmp_path, tiny_job.init_state(), signalled(signal.SIGINT), settings(), num_steps=9, name='count')
    monkeypatch.undo()
    with Checkpoints(tmp_path / 'checkpoints', keep=1) as checkpoints:
        assert checkpoints.steps == [3]


def test_another_models_checkpoint(tmp_path: pathlib.Path) -> None:
    loop.run(tmp_path, tiny_job.init_state(), counting, settings(), num_steps=4, name='count')
    other = tiny_job.init_state().replace(params={'embedding': jnp.zeros((3, 3))})
    with pytest.raises(CheckpointError, match='the checkpoint has another structure'):
        loop.run(tmp_path, other, counting, settings(), num_steps=8, name='count')


def profile_of(folder: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Events of a run's one profile: as XLA wrote them, and as Perfetto reads them."""
    assert not (folder / 'profile.unfinished').exists()
    (planes,) = folder.glob('profile/plugins/profile/*/*.xplane.pb')
    (events,) = folder.glob('profile/plugins/profile/*/*.trace.json.gz')
    lines = [line for plane in ProfileData.from_file(str(planes)).planes for line in plane.lines]
    with gzip.open(events) as file:
        return [dict(event.stats) for line in lines for event in line.events], json.load(file)['traceEvents']


def run_profiled(folder: pathlib.Path, cache: pathlib.Path, steps: int, *flags: str) -> int:
    """A process of its own, for the profiler's sake: which plugins of JAX it asks is settled as a process starts."""
    return run_job(folder, cache, f'--steps={steps}', '--profile-step=3', *flags).returncode


def test_a_profile_holds_one_whole_step_and_changes_nothing_else(
    tmp_path: pathlib.Path, unbroken: pathlib.Path, cache: pathlib.Path
) -> None:
    assert run_profiled(tmp_path, cache, STEPS) == 0
    kills.assert_same_run(unbroken, tmp_path)
    notes, events = profile_of(tmp_path)
    assert [stats['step_num'] for stats in notes if 'step_num' in stats] == [2]
    runs = {(stats['hlo_module'], stats['run_id']) for stats in notes if 'hlo_op' in stats}
    assert sorted(module for module, _ in runs if module in ('jit_batch', 'jit_update')) == ['jit_batch', 'jit_update']
    assert [event['args']['step_num'] for event in events if event.get('name') == 'sft'] == ['2']
    modules = {event.get('args', {}).get('hlo_module') for event in events}
    assert modules - {None} == {module for module, _ in runs}


@pytest.mark.long
def test_a_run_has_one_profile_however_often_it_goes_on(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    """Of the first process that gets as far as `profile_step` steps of its own."""
    (tmp_path / 'profile.unfinished').mkdir()  # left by a kill amidst it
    assert run_profiled(tmp_path, cache, 2) == 0
    assert not (tmp_path / 'profile').exists()
    assert run_profiled(tmp_path, cache, 6) == 0
    assert [stats['step_num'] for stats in profile_of(tmp_path)[0] if 'step_num' in stats] == [4]
    files = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob('profile/**/*'))
    assert run_profiled(tmp_path, cache, 12) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob('profile/**/*')) == files


@pytest.mark.long
def test_a_step_that_fails_leaves_no_profile(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    failed = run_job(tmp_path, cache, '--fault=raise', '--profile-step=13')
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == 'ArithmeticError: the step failed'
    assert not (tmp_path / 'profile').exists()
    assert run_profiled(tmp_path, cache, 20) == 0
    assert [stats['step_num'] for stats in profile_of(tmp_path)[0] if 'step_num' in stats] == [12]
