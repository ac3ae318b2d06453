"""`python -m simrl.main --config=configs/NAME.py[:arg] [--workdir=DIR] [--config.field=value]`: flags, config, job."""

import itertools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from simrl.conversations.row_files import RowError
from simrl.experiments import experiment
from simrl.models.checkpoint import CheckpointError
from simrl.remote.cache import CacheError
from simrl.remote.settings import EndpointError
from simrl.rollouts.collect import ConversationError
from simrl.run import processes
from simrl.run.config import ConfigError
from simrl.run.program import run_program
from simrl.run.runtime import use_xla_flags
from simrl.run.settings_help import settings_help
from simrl.run.stages import WorkdirError
from simrl.run.workers import WorkerError
from simrl.training.loop import NonFiniteError

# Errors that the user can fix: one line names the fault, which a traceback would hide.
USER_ERRORS = (
    *(ConfigError, WorkdirError, WorkerError, CheckpointError, NonFiniteError, ConversationError, RowError, OSError),
    *(EndpointError, CacheError),
)


NONE = re.compile(r'--?config\.([\w.]+)=None')
HELP = frozenset({'--help', '--helpshort', '-help', '-h', '-?'})
NO_CONFIG = '\nTogether with --config=FILE, --help lists the settings of that config.'


def define_flags() -> None:
    """Defines the flags of the command line; not when the module is imported, so that a notebook can reload it."""
    config_flags.DEFINE_config_file('config', None, 'A Python file with get_config(arg).', lock_config=True)
    flags.DEFINE_string('workdir', None, 'The run directory; default runs/NAME[-arg].')
    flags.DEFINE_bool('plan', False, 'Print the stages with their state and seconds; run and write nothing.')
    flags.DEFINE_multi_string('only', [], 'Stages, or folders of stages, to run with what they need, e.g. rl/persona.')
    flags.DEFINE_multi_string(
        'rerun', [], 'Stages to do again, with those that depend on them, e.g. rl/oracle,rl/persona.'
    )
    flags.DEFINE_string('processes', None, "Processes that start this command as one run: a number, or 'auto'.")
    flags.DEFINE_integer('process', None, 'With a number of processes: which one this is, from 0.')
    flags.DEFINE_string('coordinator', None, 'With a number of processes: HOST:PORT of process 0, the port a free one.')


def default_workdir(config_file: str) -> pathlib.Path:
    """`runs/NAME` or `runs/NAME-arg` for `path/NAME.py[:arg]`."""
    path, _, arg = config_file.partition(':')
    name = pathlib.Path(path).stem
    return pathlib.Path('runs') / (f'{name}-{arg}' if arg else name)


def _names(values: Sequence[str]) -> tuple[str, ...]:
    """Splits the values of a flag, which may be given several times, at commas."""
    return tuple(name.strip() for value in values for name in value.split(',') if name.strip())


def _set_xla_flags(config: ConfigDict) -> None:
    """Sets `compute.xla_flags`, where there are some, before JAX starts; the job reports other faults of the config."""
    try:
        use_xla_flags(config.get('compute', {}).get('xla_flags', ()))
    except ValueError as error:
        raise ConfigError(f'config.compute.{error}') from error


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'expected only flags, found {argv[1:]}')
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    options: Any = flags.FLAGS
    if options.config is None:
        sys.exit('error: expected a config, for instance --config=configs/quickstart.py')
    workdir = options.workdir or default_workdir(options['config'].config_filename)
    try:
        join_processes(options.processes, options.process, options.coordinator)
    except ConfigError as error:
        sys.exit(f'error: {error}')
    with processes.ending_together():
        try:
            _set_xla_flags(options.config)
            experiment.run(
                options.config, workdir, rerun=_names(options.rerun), only=_names(options.only), show_plan=options.plan
            )
        except USER_ERRORS as error:
            sys.exit(f'error: {error}')


def join_processes(number: str | None, process: int | None, coordinator: str | None) -> None:
    """Joins this process with the others of its run, by its flags.

    Raises:
        ConfigError: impossible flags, or as `processes.join`.
    """
    given = {'--process': process, '--coordinator': coordinator}
    if number is None or number == 'auto':
        if needless := [f'{flag}={value}' for flag, value in given.items() if value is not None]:
            raise ConfigError(f'{needless[0]}: expected --processes=N with it, found --processes={number}')
        if number == 'auto':
            processes.join(None, None, None)
        elif hint := tasks_of_cluster(os.environ):
            print(f'{hint}: this process works alone; --processes=auto joins them in one run', flush=True)
        return
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--processes: expected a number from 1, or 'auto', found {number!r}")
    if missing := [flag for flag, value in given.items() if value is None]:
        raise ConfigError(f'{missing[0]}: expected a value with --processes={number}, found none')
    assert process is not None
    assert coordinator is not None
    if not 0 <= process < int(number):
        raise ConfigError(f'--process: expected a number from 0 to {int(number) - 1}, found {process}')
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f'--coordinator: expected HOST:PORT, found {coordinator!r}')
    processes.join(int(number), process, coordinator)


def tasks_of_cluster(variables: Mapping[str, str]) -> str:
    """Says that a scheduler started this process as one of several; '' if it did not, or that is not known."""
    if variables.get('SLURM_STEP_NODELIST') and (tasks := variables.get('SLURM_NTASKS', '1')) != '1':
        return f'task {variables.get("SLURM_PROCID", "?")} of {tasks} of SLURM'
    if ',' in (hosts := variables.get('TPU_WORKER_HOSTNAMES', '')):
        return f'worker {variables.get("TPU_WORKER_ID", "?")} of {hosts.count(",") + 1} of a TPU slice'
    return ''


def find_neighbours(arguments: Sequence[str]) -> None:
    """Lets a config file import those beside it by the name of their folder, wherever the program is started."""
    for argument, following in itertools.pairwise([*arguments, '']):
        name, is_whole, value = argument.partition('=')
        if name in ('--config', '-config'):
            file = pathlib.Path((value if is_whole else following).partition(':')[0])
            sys.path.append(str(file.absolute().parent.parent))


def settings_type(config: ConfigDict) -> type:
    """The dataclass of an experiment's config."""
    return experiment.SCENES[config.scene][0]


def parse_flags(arguments: list[str], settings: Callable[[ConfigDict], type] = settings_type) -> list[str]:
    """Reads the flags. An error in them, or in the config file's own code, is one line.

    With --help, prints what the program is, its flags and the settings of its config, and ends the process.

    Args:
        arguments: of the command line, the program first.
        settings: the function from the config to its dataclass.
    """
    find_neighbours(arguments)
    nones = [found[1] for argument in arguments if (found := NONE.fullmatch(argument))]
    try:
        rest = flags.FLAGS([x for x in arguments if x not in HELP and not NONE.fullmatch(x)])
        config = flags.FLAGS.config
        getattr(config, 'keys', None)  # raises the error of a file that cannot be read
        for path in nones:
            set_none(config, path)
        if HELP.intersection(arguments):
            print(sys.modules['__main__'].__doc__, 'Flags:', flags.FLAGS.main_module_help(), sep='\n')
            print('\nSettings, as flags:\n' + settings_help(settings(config), config) if config else NO_CONFIG)
            sys.exit()
        return rest
    except Exception as error:
        sys.exit(f'error: {flag_error(error)}')


def set_none(config: ConfigDict, path: str) -> None:
    """Sets a field to None, which a flag of a number or a truth value cannot say."""
    *parents, name = path.split('.')
    for parent in parents:
        config = config[parent]
    config[name]  # raises the error of a field that is not there
    with config.ignore_type():
        config[name] = None


def flag_error(error: BaseException) -> str:
    """The reason why flags were refused, in one line; for an error in the code of a config file, with its line."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    cause, frame = chain[-1], traceback.extract_tb(chain[-1].__traceback__)[-1]
    in_file = not {'absl', 'ml_collections'}.intersection(pathlib.Path(frame.filename).parts)
    if in_file or 'parsing config file' in str(error):
        line = f' ({frame.filename}:{frame.lineno})' if in_file and not isinstance(cause, SyntaxError) else ''
        return f'--config: {type(cause).__name__}: {" ".join(str(cause).split())}{line}'
    if unknown := [str(x.args[0]) for x in chain if isinstance(x, KeyError)]:
        name, _, hint = unknown[0].partition('\n')
        return f'--config: no field {name} to set; {hint or "names such as arms are added in a config file"}'
    if isinstance(cause, OSError):
        return f'--config: {str(cause).splitlines()[-1].strip()}'
    if isinstance(cause, IndexError):
        return f'--config: {cause}; set a tuple as a whole, for instance --config.seeds=(0,1)'
    return ' '.join(str(error).split())


if __name__ == '__main__':
    define_flags()
    run_program(lambda: app.run(main, flags_parser=parse_flags), advice='; the same command resumes')
