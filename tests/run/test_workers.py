"""Workers run each stage once, in order, on their own CPUs; they exit with their parent and report errors."""

import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pytest

from simrl.run import directory, stages, workers
from simrl.run.config import ConfigError
from simrl.run.stages import WorkdirError
from simrl.run.workers import WorkerError
from tests.run import worker_job
from tests.run.worker_job import NAMES, PickyError, Settings

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('default_signals')
two_cpus = pytest.mark.skipif(len(workers.cpus()) < 2, reason='two workers need two CPUs')


class Command:
    """A process of `tests.run.worker_job`; all commands of a test share one log."""

    def __init__(self, folder: pathlib.Path, *options: str, num_workers: int = 2, prefix: Sequence[str] = ()) -> None:
        self.folder, self.log = folder, folder / 'log'
        self.process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                '-m',
                'tests.run.worker_job',
                f'{folder}/run',
                self.log,
                str(num_workers),
                *options,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Waits for it; its exit code and output."""
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output

    def works(self) -> list[tuple[str, int, list[str]]]:
        """Stage, process and CPUs (or ['saved']) of every line of the log."""
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [(name, int(pid), rest) for name, pid, *rest in lines]


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != 'Z'  # a zombie is dead


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., Command]]:
    """Starts commands, and kills them after the test."""
    commands: list[Command] = []

    def start(*options: str, num_workers: int = 2, prefix: Sequence[str] = ()) -> Command:
        commands.append(Command(tmp_path, *options, num_workers=num_workers, prefix=prefix))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()
        command.process.wait()


def assert_in_order(names: list[str]) -> None:
    assert names[0] == 'first'
    assert names[-1] == 'last'
    assert sorted(names) == sorted(NAMES)


@two_cpus
def test_two_commands_at_once_run_each_stage_once_and_in_order(start, tmp_path) -> None:
    commands = [start('--seconds=0.2'), start('--seconds=0.2')]
    ends = [command.end() for command in commands]
    assert [code for code, _ in ends] == [0, 0]
    works = commands[0].works()
    assert_in_order([name for name, _, _ in works])
    assert len({pid for _, pid, _ in works}) > 1
    printed = ''.join(output for _, output in ends)
    for name in NAMES:
        line = rf'^== {name}: finished in \d+ s \(worker [01]; \d of 8 stages done\)$'
        assert len(re.findall(line, printed, re.MULTILINE)) == 1
    logs = ''.join(path.read_text() for path in (tmp_path / 'run' / 'workers').iterdir())
    assert all(logs.count(f'== {name}\n') == 1 for name in NAMES)

    # Each worker has its own CPUs; finished stages are skipped without starting workers.
    assert {frozenset(cpus) for _, _, cpus in works} <= {frozenset(map(str, x)) for x in workers.cpu_shares(2)}
    code, output = start().end()
    assert code == 0
    assert output.count(': already done') == len(NAMES)
    assert len(commands[0].works()) == len(NAMES)


@two_cpus
def test_a_killed_command_leaves_its_stages_to_the_other(start) -> None:
    killed, other = start('--seconds=1'), start('--seconds=1')
    until(lambda: len(killed.works()) > 1)  # a stage after the first: both commands run
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    assert other.end()[0] == 0
    assert {name for name, _, _ in other.works()} == set(NAMES)
    assert all(stages.is_done(other.folder / 'run' / name) for name in NAMES)


@two_cpus
def test_a_killed_worker_is_reported_and_the_same_command_resumes(start) -> None:
    command = start('--seconds=1')
    until(lambda: len({pid for _, pid, _ in command.works()[1:][-2:]}) == 2)  # both workers run a stage
    (name, pid, _), (other_name, other_pid, _) = command.works()[-2:]
    os.kill(pid, signal.SIGKILL)
    code, output = command.end()
    assert code == 1
    assert f'was killed by SIGKILL while it ran {name}; see ' in output.splitlines()[-1]
    assert (other_name, other_pid, ['saved']) in command.works()
    assert not is_alive(other_pid)

    assert start('--seconds=0').end()[0] == 0
    begun = collections.Counter(work for work, _, rest in command.works() if rest != ['saved'])
    assert begun[name] == begun[other_name] == 2
    assert set(begun) == set(NAMES)
    assert begun.total() == len(NAMES) + 2


@two_cpus
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_workers_save_and_exit_with_their_parent(start, number) -> None:
    command = start('--seconds=20')
    until(lambda: command.works())  # the first stage; the other worker waits
    if number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends it to the whole process group
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    code, output = command.end()  # until no worker has its output open
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert ('the same command resumes' in output) == (number != signal.SIGKILL)
    (_, pid, _), saved = command.works()
    assert saved == ('first', pid, ['saved'])
    until(lambda: not is_alive(pid))


@pytest.mark.usefixtures('default_signals')
def test_a_second_ctrl_c_kills_the_workers() -> None:
    process = mock.Mock()
    with workers._recorded_signals([mock.Mock(process=process)]) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals == [signal.SIGINT, signal.SIGTERM]
        assert not process.kill.called
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert process.kill.called
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@two_cpus
def test_a_log_that_cannot_be_written_is_named_before_a_worker_starts(tmp_path) -> None:
    (log := tmp_path / 'run' / 'workers' / 'worker-0.log').mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=str(log)):
        workers.run_side_by_side(worker_job.build, Settings(tmp_path / 'log'), tmp_path / 'run', NAMES, 2)


@two_cpus
def test_nohup_keeps_a_run_from_the_end_of_its_terminal(start) -> None:
    command = start('--seconds=0.5', prefix=['nohup'])
    until(lambda: command.works())
    os.killpg(command.process.pid, signal.SIGHUP)
    assert command.end()[0] == 0
    assert_in_order([name for name, _, _ in command.works()])


@two_cpus
def test_an_error_of_a_stage_is_raised_in_the_parent(tmp_path) -> None:
    settings = Settings(tmp_path / 'log', fails='side/2')
    with pytest.raises(PickyError, match=r'^stage side/2: expected to go well$') as error:
        worker_job.run(settings, tmp_path / 'run', 2)
    assert "raise PickyError('expected to go well'" in str(error.value.__cause__)
    assert not stages.is_done(tmp_path / 'run' / 'last')

    with pytest.raises(PickyError, match=r'^stage last: expected to go well$'):  # the other stages are resumed
        worker_job.run(Settings(tmp_path / 'log', fails='last'), tmp_path / 'run', 2)
    ran = [line.split()[0] for line in (tmp_path / 'log').read_text().splitlines() if 'saved' not in line]
    assert set(ran) == set(NAMES)
    assert ran.count('first') == ran.count('last') == 1


@two_cpus
def test_changed_outputs_and_stages_to_select_and_rerun(tmp_path) -> None:
    settings, workdir = Settings(tmp_path / 'log', seconds=0.0), tmp_path / 'run'

    def ran(**options: tuple[str, ...]) -> list[str]:
        before = settings.log.read_text().splitlines() if settings.log.exists() else []
        worker_job.run(settings, workdir, 2, **options)
        return [line.split()[0] for line in settings.log.read_text().splitlines()[len(before) :]]

    assert ran(only=('side/3',)) == ['first', 'side/3']
    assert len(ran()) == 6
    (workdir / 'side/3/result.json').write_text('better')
    for _ in range(2):  # first nothing is to run, then a stage
        with pytest.raises(WorkdirError, match=r'side/3, found that result\.json was changed; --rerun=side/3'):
            worker_job.run(settings, workdir, 2)
        directory.open_workdir(workdir, {}, rerun=['last'])
    assert ran(rerun=('side/3',)) == ['side/3', 'last']


def test_a_script_without_a_main_guard_is_told_so(tmp_path) -> None:
    """Its workers import it as well, and Python lets none of them start workers of its own."""
    worker = workers._Worker(0, mock.Mock(exitcode=1), mock.Mock())
    hint = r"worker 0 exited with code 1 outside of a stage, before its first; a script .* `if __name__ == '__main__':`"
    with pytest.raises(WorkerError, match=hint):
        workers._check_exit(worker, tmp_path)
    worker.began = True
    with pytest.raises(WorkerError, match='worker 0 exited with code 1 outside of a stage; see'):
        workers._check_exit(worker, tmp_path)


@pytest.fixture
def cgroups(tmp_path: pathlib.Path, monkeypatch) -> Callable[..., None]:
    """Gives this process eight CPUs and control groups with these files."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(10, 18)))
    monkeypatch.setattr(workers, 'CGROUPS', tmp_path / 'cgroup')
    monkeypatch.setattr(workers, 'OWN_CGROUPS', tmp_path / 'own')

    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / 'own').write_text(own)
        for name, text in files.items():
            (tmp_path / 'cgroup' / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'cgroup' / name).write_text(f'{text}\n')

    return make


V1 = '9:name=systemd:/\n2:cpuset:/\n1:{}:/docker/abc\n'
QUOTAS = {
    'none': ('0::/\n', {}, 8),
    'unlimited': ('0::/\n', {'cpu.max': 'max 100000'}, 8),
    'as a container sees it': ('0::/\n', {'cpu.max': '250000 100000'}, 2),
    'less than one': ('0::/\n', {'cpu.max': '50000 100000'}, 1),
    'more than there are': ('0::/\n', {'cpu.max': '1600000 100000'}, 8),
    'without a period': ('0::/\n', {'cpu.max': '200000'}, 2),
    'unlimited, without a period': ('0::/\n', {'cpu.max': 'max'}, 8),
    'empty': ('0::/\n', {'cpu.max': ''}, 8),
    'with a burst': ('0::/\n', {'cpu.max': '300000 100000 0'}, 3),
    'of a slice': ('0::/a/b\n', {'a/cpu.max': '300000 100000', 'a/b/cpu.max': 'max 100000'}, 3),
    'version 1': (V1.format('cpu,cpuacct'), {'cpu/cpu.cfs_quota_us': '400000', 'cpu/cpu.cfs_period_us': '100000'}, 4),
    'version 1, seen from the host': (
        V1.format('cpu'),
        {'cpu/docker/abc/cpu.cfs_quota_us': '100000', 'cpu/docker/abc/cpu.cfs_period_us': '50000'},
        2,
    ),
    'version 1, without a period': (V1.format('cpu'), {'cpu/cpu.cfs_quota_us': '500000'}, 5),
    'version 1, unlimited': (V1.format('cpu'), {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, 8),
}


@pytest.mark.parametrize('case', QUOTAS)
def test_no_more_cpus_than_the_quota_is_worth(cgroups, case) -> None:
    own, files, expected = QUOTAS[case]
    cgroups(own, files)
    found = workers.cpus()
    assert len(set(found)) == expected
    assert set(found) <= set(range(10, 18))
    assert found == workers.cpus() == sorted(found)
    with pytest.raises(ConfigError, match=rf'expected at most {expected}, the number of CPUs'):
        workers.cpu_shares(expected + 1)


@pytest.mark.usefixtures('cgroups')
@pytest.mark.parametrize(('cpus', 'number', 'sizes'), [(8, 2, 4), (7, 2, 3), (3, 3, 1), (5, 1, 5)])
def test_shares_are_even_and_apart(monkeypatch, cpus, number, sizes) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {10 + i for i in range(cpus)})
    shares = workers.cpu_shares(number)
    assert [len(share) for share in shares] == [sizes] * number
    assert len(frozenset().union(*shares)) == sizes * number
    assert frozenset().union(*shares) <= {10 + i for i in range(cpus)}


@pytest.mark.usefixtures('cgroups')
def test_more_workers_than_cpus(monkeypatch) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2})
    with pytest.raises(ConfigError, match=r'config\.workers: expected at most 3, the number of CPUs, found 4'):
        workers.cpu_shares(4)
