"""Jobs of an experiment: which stages each has, what submitit is told, and a whole experiment by its local executor."""

import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from simrl.run.config import ConfigError
from simrl.run.stage_files import DONE_FILE, STAGE_FILE
from simrl.run.stages import Stage
from tools import submit
from tools.submit import EVERYTHING, last_words, make_executor, missing, parameter, waves_of

ROOT = pathlib.Path(__file__).parents[2]
READS = {  # two arms, a seed each, one of which has a simulator that is trained first; judges that measures alone need
    'data': (),
    'base': ('data',),
    'sft/b': ('data',),
    'judge': ('data',),
    'forecast/b': ('base', 'sft/b'),
    'rl/a/seed-0': ('base',),
    'rl/a/seed-1': ('base',),
    'rl/b/seed-0': ('base', 'sft/b'),
    'people/initial/block-0': ('base', 'judge'),
    'people/a/seed-0/block-0': ('rl/a/seed-0', 'judge'),
    'people/b/seed-0/block-0': ('rl/b/seed-0', 'judge'),
    'matrix/a/seed-0/b': ('rl/a/seed-0', 'sft/b'),
    'likelihood/b': ('sft/b',),
}


def stages(workdir):
    return [Stage(name, {}, {of: workdir / of for of in reads}, lambda folder: None) for name, reads in READS.items()]


def test_jobs_wait_for_what_they_share(tmp_path):
    waves = waves_of(tmp_path, stages(tmp_path))
    assert waves == [
        {'what trainings share': ('data', 'base')},
        {
            'training a': ('rl/a/seed-0', 'rl/a/seed-1'),
            'training b': ('rl/b/seed-0',),
            'what measures share': ('judge',),
        },
        {'measuring a': ('people/a/seed-0/block-0', 'matrix/a/seed-0/b'), 'measuring b': ('people/b/seed-0/block-0',)},
        {EVERYTHING: ()},
    ]
    assert max(Counter(name for jobs in waves for names in jobs.values() for name in names).values()) == 1


def test_a_job_whose_stages_are_done_is_left_out(tmp_path):
    for name in ('data', 'base', 'rl/a/seed-0', 'rl/b/seed-0', 'sft/b'):
        (tmp_path / name).mkdir(parents=True)
        for file in (STAGE_FILE, DONE_FILE):
            (tmp_path / name / file).write_text('{}')
    waves = [list(missing(tmp_path, stages(tmp_path), jobs)) for jobs in waves_of(tmp_path, stages(tmp_path))]
    assert waves == [[], ['training a', 'what measures share'], ['measuring a', 'measuring b'], [EVERYTHING]]


def test_settings_of_jobs():
    assert parameter('timeout_min=60') == ('timeout_min', 60)
    assert parameter('slurm_partition=gpu') == ('slurm_partition', 'gpu')
    assert parameter("slurm_additional_parameters={'account': 'x=1'}")[1] == {'account': 'x=1'}
    with pytest.raises(Exception, match="expected NAME=VALUE, found 'gpu'"):
        parameter('gpu')


@pytest.mark.parametrize(
    ('parameters', 'message'),
    [
        ({'timeout': 3}, r"--set: Parameter 'timeout' need to be prefixed by an executor name\."),
        ({'slurm_color': 3}, "--set: Unknown argument 'color' for executor 'slurm'"),
        ({'timeout_min': 'long'}, '--set: Parameter "timeout_min" expected type .*int'),
        ({'nodes': 2}, '--set: LocalExecutor can use only one node'),
    ],
)
def test_unknown_settings_of_jobs_are_one_line(parameters, message, tmp_path):
    with pytest.raises(ConfigError, match=f'^{message}') as error:
        make_executor('local', tmp_path, parameters)
    assert '\n' not in str(error.value)


def test_where_there_is_no_slurm_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ConfigError, match=r'^--cluster=slurm: Could not detect "srun"'):
        make_executor('slurm', tmp_path, {})


def test_without_submitit_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[submit\]'"):
        make_executor('local', tmp_path, {})


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ((), 'expected a config, for instance --config='),
        (('--config=configs/quickstart.py', '--only=rl'), 'expected no --plan, --only or --rerun'),
        (('--config=configs/quickstart.py', '--set', 'gpus'), "argument --set: expected NAME=VALUE, found 'gpus'"),
        (('--config=configs/quickstart.py', '--set', 'nodes=2'), '--set nodes=2: expected --processes=auto with it'),
        (('--config=configs/quickstart.py', '--step=3'), "Unknown command line flag 'step'"),
    ],
)
@pytest.mark.long
def test_bad_flags_are_told(flags, message):
    done = run(*flags)
    assert done.returncode
    assert message in done.stderr


def run(*flags):
    command = [sys.executable, '-m', 'tools.submit', '--cluster=local', *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


CONFIG = """
from configs import quickstart


def get_config(arg=''):
    config = quickstart.get_config('smoke')
    config.arms = {name: config.arms[name] for name in ('role_play', 'oracle')}
    config.seeds, config.workers = (0,), 1
    return config
"""


@pytest.mark.long
def test_an_experiment_as_jobs(tmp_path):
    file, workdir = tmp_path / 'tiny.py', tmp_path / 'run'
    file.write_text(CONFIG)
    flags = (f'--config={file}', f'--workdir={workdir}')
    failed = run(*flags, '--config.compute.mesh.data=3')
    assert failed.returncode == 1
    (line, advice) = failed.stderr.splitlines()[-2:]
    output = next((tmp_path / 'run-jobs').glob('*_0_log.out'))
    said = 'error: config.compute.mesh.data x config.compute.mesh.model: expected at most 1 device, found 3 x 1'
    assert line.startswith('error: what trainings share: job ')
    assert line.endswith(f'failed: {said}; see {output}')
    assert advice == 'the same command resumes'
    assert said in output.read_text()
    assert 'training' not in failed.stdout.replace('what trainings share', '')  # none of the next jobs

    done = run(*flags)
    assert done.returncode == 0, done.stderr
    jobs = [line.partition(': ')[0] for line in done.stdout.splitlines() if line.endswith(': done')]
    assert jobs == [
        'what trainings share',
        *('training oracle', 'training role_play'),
        *('measuring oracle', 'measuring role_play'),
        EVERYTHING,
    ]
    assert f'report: {workdir / "report.html"}' in done.stdout
    assert {path.stem for path in (workdir / 'results').glob('*.json')} >= {'experiment'}
    assert (workdir / 'report.html').exists()
    again = run(*flags)
    assert [line.partition(': ')[0] for line in again.stdout.splitlines() if line.endswith(': done')] == [EVERYTHING]


class FakeJob:
    """A job of two tasks, of which the second failed."""

    num_tasks = 2

    def __init__(self, folder, number=None):
        self.folder, self.number = folder, number
        self.paths = self
        self.stdout = folder / f'{number}.out'

    def task(self, number):
        return FakeJob(self.folder, number)

    def exception(self):
        return ValueError() if self.number == 1 else None


def test_last_words_are_those_of_the_task_that_failed(tmp_path):
    assert last_words(FakeJob(tmp_path)) == f'no output; see {tmp_path / "1.out"}'
    (tmp_path / '0.out').write_text('error: not mine\n')
    (tmp_path / '1.out').write_text('step 1\nerror: this field\nTraceback:\n  more\n\n')
    assert last_words(FakeJob(tmp_path)) == f'error: this field; see {tmp_path / "1.out"}'
    (tmp_path / '1.out').write_text('Killed\n\n')
    assert last_words(FakeJob(tmp_path)) == f'Killed; see {tmp_path / "1.out"}'


def test_a_time_limit_lets_the_program_save(tmp_path, monkeypatch):
    """The warning ends the program by SIGTERM, and the job that stands in the queue again has the same flags."""
    script = tmp_path / 'main.py'
    script.write_text(
        'import pathlib, signal, sys, time\n'
        'def save(number, frame):\n'
        '    pathlib.Path(sys.argv[-1], "saved").touch()\n'
        '    sys.exit(143)\n'
        'signal.signal(signal.SIGTERM, save)\n'
        'assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN\n'
        'pathlib.Path(sys.argv[-1], "ready").touch()\n'
        'time.sleep(60)\n'
    )
    wrapper = tmp_path / 'python'
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(submit.sys, 'executable', str(wrapper))
    command = submit.Command([str(tmp_path)])
    monkeypatch.setattr(submit.time, 'sleep', lambda seconds: warn())
    asked = []

    def warn():
        if (tmp_path / 'ready').exists():
            asked.append(command.checkpoint())

    command()
    (delayed,) = asked
    assert delayed.function.arguments == (str(tmp_path),)
    assert (tmp_path / 'saved').exists()
