"""Runs an experiment as jobs of SLURM, an arm a job, all on one run directory.

    python -m tools.submit --config=configs/concierge.py --workdir=/shared/runs/concierge --set gpus_per_node=1
        --set cpus_per_task=8 --set timeout_min=1440 --set slurm_partition=NAME [--config.field=value]
        [--cluster=local] [--logs=FOLDER]

Each job is `python -m simrl.main` with these flags and an --only of its own. Jobs of one number run side by side, those
of the next wait for all of them:

1. what the trainings of several arms read: data, models to start from, reward models;
2. for each arm its trainings, and in a job of its own what several arms are measured by;
3. for each arm what is measured of its assistants;
4. the whole command: what is left, and the results.

A job whose stages are done is left out, so that the same command resumes, after a failure or with arms and seeds added.
A job that fails is named with its last words and the file of its output; the others of its number go on to their end,
and the command exits with 1. SLURM's time limit is no failure: before it the job saves and stands in the queue again.

Settings of jobs (--set, several times) are those of submitit (pip install '.[submit]'): timeout_min, gpus_per_node,
cpus_per_task (of which SLURM gives one if none are asked for, and compiling takes long), mem_gb, and of SLURM alone
slurm_partition, slurm_account, slurm_constraint and others. Jobs of several processes have --set nodes=2 --set
tasks_per_node=8 --set gpus_per_node=8, and --processes=auto. --cluster=local tries the same on this machine, whose
cores all jobs of one number share.
"""

import argparse
import ast
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from absl import flags

from simrl.experiments import experiment
from simrl.main import USER_ERRORS, default_workdir, define_flags, parse_flags
from simrl.run.config import ConfigError, local_path
from simrl.run.program import run_program
from simrl.run.stage_files import is_done
from simrl.run.stages import Stage, select, stages_read

TRAINING = re.compile(r'rl/([^/]+)/')
EVERYTHING = 'the whole command'
WARNING = signal.SIGUSR2  # of a time limit, by submitit
POLL_SECONDS = 0.5
MINUTES = 1440  # of a job, if nothing else is set
Names = tuple[str, ...]  # of stages


class Command:
    """`python -m simrl.main`, as a function that submitit calls in a job."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        # SLURM may send its warning to the whole job: the program would end by it, and not save.
        former = signal.signal(WARNING, signal.SIG_IGN)
        with subprocess.Popen([sys.executable, '-m', 'simrl.main', *self.arguments]) as process:
            self._process = process
            signal.signal(WARNING, former)
            try:
                while process.poll() is None:  # `wait` would have a lock when `checkpoint` comes
                    time.sleep(POLL_SECONDS)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise RuntimeError(f'python -m simrl.main ended with exit code {process.returncode}')

    def checkpoint(self) -> Any:
        """Saves before a time limit. Returns the job that resumes."""
        import submitit

        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._process.pid, 0)
        return submitit.helpers.DelayedSubmission(Command(self.arguments))


def waves_of(workdir: pathlib.Path, stages: Sequence[Stage]) -> list[dict[str, Names]]:
    """The jobs of an experiment by name, with their stages; each dictionary's come after all of those before it.

    Args:
        workdir: the run directory.
        stages: of `experiment.build_stages`.
    """
    arms: dict[str, set[str]] = {}  # of each stage: those whose trainings it is or needs
    for stage in stages:
        own = {found.group(1)} if (found := TRAINING.match(stage.name)) else set[str]()
        arms[stage.name] = own.union(*(arms[name] for name in stages_read(workdir, stage)))
    trainings, measures = dict[str, Names](), dict[str, Names]()
    for name, of in arms.items():
        if len(of) == 1:
            (arm,) = of
            kind = trainings if TRAINING.match(name) else measures
            kind[arm] = (*kind.get(arm, ()), name)
    first = _common(workdir, stages, trainings)
    before = {stage.name for stage in select(workdir, stages, [*first, *(x for of in trainings.values() for x in of)])}
    second = tuple(name for name in _common(workdir, stages, measures) if name not in before)
    return [
        *([{'what trainings share': first}] if first else []),
        {f'training {arm}': names for arm, names in trainings.items()}
        | ({'what measures share': second} if second else {}),
        {f'measuring {arm}': names for arm, names in measures.items()},
        {EVERYTHING: ()},
    ]


def _common(workdir: pathlib.Path, stages: Sequence[Stage], jobs: Mapping[str, Names]) -> Names:
    """The stages that several jobs need, and no job does itself."""
    needed = [{stage.name for stage in select(workdir, stages, names)} for names in jobs.values()]
    done_by = {name for names in jobs.values() for name in names}
    return tuple(
        stage.name for stage in stages if stage.name not in done_by and sum(stage.name in x for x in needed) > 1
    )


def missing(workdir: pathlib.Path, stages: Sequence[Stage], jobs: Mapping[str, Names]) -> Iterator[str]:
    """The names of jobs that have something to do."""
    for name, only in jobs.items():
        if not only or not all(is_done(workdir / stage.name) for stage in select(workdir, stages, only)):
            yield name


def make_executor(cluster: Literal['slurm', 'local'], logs: pathlib.Path, parameters: Mapping[str, Any]) -> Any:
    """Makes what submits jobs.

    Raises:
        ConfigError: submitit is not installed, or knows no such parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("expected submitit, found it is not installed; pip install '.[submit]' does") from error
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster)
        executor.update_parameters(timeout_min=MINUTES, stderr_to_stdout=True)
        executor.update_parameters(**parameters)
    except (NameError, AssertionError, ValueError) as error:
        raise ConfigError(f'--set: {" ".join(str(error).split())}') from error
    except RuntimeError as error:  # there is no sbatch
        raise ConfigError(f'--cluster={cluster}: {error}') from error
    return executor


def run_wave(executor: Any, jobs: Mapping[str, Names], arguments: Sequence[str]) -> list[str]:
    """Submits jobs and waits for all of them. Returns what failed, in words."""
    submitted = {}
    try:
        for name, only in jobs.items():
            executor.update_parameters(name=re.sub(r'[^\w.-]+', '_', name))
            selected = (f'--only={",".join(only)}',) if only else ()
            submitted[name] = job = executor.submit(Command([*arguments, *selected]))
            print(f'{name}: job {job.job_id}, output {job.paths.stdout}', flush=True)
        faults = []
        for name, job in submitted.items():
            if job.exception() is None:
                print(f'{name}: done', flush=True)
            else:
                faults.append(f'{name}: job {job.job_id} failed: {last_words(job)}')
        return faults
    except KeyboardInterrupt:
        for job in submitted.values():
            job.cancel(check=False)
        raise


def last_words(job: Any) -> str:
    """The line in which a failed job says why, and the file where it stands."""
    tasks = [job.task(number) for number in range(job.num_tasks)]
    path = next((task.paths.stdout for task in tasks if task.exception() is not None), job.paths.stdout)
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []
    said = [line for line in lines if line.startswith('error: ')]
    words = said[-1] if said else next((line.strip() for line in reversed(lines) if line.strip()), 'no output')
    return f'{words}; see {path}'


def submit(
    settings: Any,
    workdir: pathlib.Path,
    arguments: Sequence[str],
    *,
    cluster: Literal['slurm', 'local'],
    logs: pathlib.Path,
    parameters: Mapping[str, Any],
) -> list[str]:
    """Runs an experiment as jobs, wave after wave, until one fails.

    Args:
        settings: of the experiment.
        arguments: flags of `simrl.main`, which say the same.
        logs: a folder for what submitit keeps of each job, that all machines see.
        parameters: of submitit.

    Returns:
        What failed, in words: nothing, if the results are written.
    """
    stages = experiment.build_stages(settings, workdir)
    executor = make_executor(cluster, logs, parameters)
    for jobs in waves_of(workdir, stages):
        chosen = {name: jobs[name] for name in missing(workdir, stages, jobs)}
        if faults := run_wave(executor, chosen, arguments):
            return faults
    return []


def parameter(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE: a number, or whatever else Python writes so; any other value is a text."""
    name, is_whole, value = text.partition('=')
    if not is_whole or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'expected NAME=VALUE, found {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        'python -m tools.submit',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--cluster', choices=('slurm', 'local'), default='slurm')
    parser.add_argument('--logs', type=local_path, default=None, metavar='FOLDER', help='default: WORKDIR-jobs')
    parser.add_argument('--set', type=parameter, action='append', default=[], metavar='NAME=VALUE')
    options, rest = parser.parse_known_args(arguments)
    define_flags()
    parse_flags(['simrl.main', *rest])
    given: Any = flags.FLAGS
    if given.config is None:
        parser.error('expected a config, for instance --config=configs/concierge.py')
    if given.plan or given.only or given.rerun:
        parser.error('expected no --plan, --only or --rerun: which stages a job runs follows from the experiment')
    parameters = dict(options.set)
    for name in ('nodes', 'tasks_per_node'):
        if parameters.get(name, 1) != 1 and given.processes is None:
            parser.error(f'--set {name}={parameters[name]}: expected --processes=auto with it, found no --processes')
    try:
        workdir = local_path(given.workdir or default_workdir(given['config'].config_filename))
        logs = options.logs or workdir.with_name(f'{workdir.name}-jobs')
        settings = experiment.settings_of(given.config)
        faults = submit(settings, workdir, rest, cluster=options.cluster, logs=logs, parameters=parameters)
    except USER_ERRORS as error:
        sys.exit(f'error: {error}')
    if faults:
        sys.exit('\n'.join([*(f'error: {fault}' for fault in faults), 'the same command resumes']))
    print(f'report: {workdir / "report.html"}')


if __name__ == '__main__':
    run_program(main, advice='; its jobs are cancelled, and the same command resumes')
