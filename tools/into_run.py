"""Results that a tool of judges leaves in a finished run, whose report then shows them (--run)."""

import argparse
import pathlib
from collections.abc import Callable, Sequence

import tools.report
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.files import RESULTS_FOLDER
from simrl.evaluation.results.measures import INITIAL, ExperimentResult
from simrl.run.config import local_path
from simrl.run.stage_files import wait_for_lock

FLAG = '--assistants'


def add_run_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--run',
        dest='into',
        type=local_path,
        metavar='RUN',
        help='of these assistants, finished: its report shows the result',
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--run, and which of its assistants models are."""
    add_run_flag(parser)
    told = 'of models that are not found in the run by name; beside --run'
    parser.add_argument(FLAG, nargs='+', default=[], metavar='MODEL=ASSISTANT', help=told)


def experiment_of(run: pathlib.Path | None) -> ExperimentResult | None:
    """The experiment of --run; None without it. Read before anything is asked.

    Raises:
        ConfigError: there are no results in the run, or a file of them is broken.
    """
    if run is None:
        return None
    result_files.read_added(run)
    return result_files.read(run).experiment


def assistant_of(model: str, run: pathlib.Path, experiment: ExperimentResult, given: Sequence[str]) -> str:
    """The run's assistant that a model is: its path within the run, one of its names, or as it is `given`.

    Raises:
        ValueError: it is none, or what is given is not MODEL=ASSISTANT.
    """
    name = _named(model, run, experiment, given)
    if name not in (INITIAL, *experiment.runs):
        names = ', '.join([INITIAL, *experiment.runs])
        raise ValueError(f'{FLAG}: expected {model}=ASSISTANT, one of {names}, found {name or "none of that name"}')
    return name


def reference_of(model: str, options: argparse.Namespace) -> str:
    """The same of a model that need not be one of --run's, and keeps its own name then."""
    run = experiment_of(options.into)
    return model if run is None else _named(model, options.into, run, options.assistants) or model


def _named(model: str, run: pathlib.Path, experiment: ExperimentResult, given: Sequence[str]) -> str | None:
    told: dict[str, str] = {}
    for text in given:
        key, separator, assistant = text.rpartition('=')
        if not separator:
            raise ValueError(f'{FLAG}: expected MODEL=ASSISTANT, found {text!r}')
        told[key] = assistant
    path, folder = pathlib.Path(model).absolute(), run.absolute()
    inside = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else model
    return told.get(model) or experiment.by_name().get(inside)


def leave_in(run: pathlib.Path, add: Callable[[pathlib.Path], None]) -> None:
    """Adds a result to a run, and writes its report again.

    Args:
        add: takes the run directory; one of `results.files`.
    """
    with wait_for_lock(run / RESULTS_FOLDER):  # another tool may add one at the same time
        add(run)
    tools.report.main([str(run)])
