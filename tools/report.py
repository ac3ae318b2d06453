"""Writes the report of a finished run again, or one page for several runs.

    python -m tools.report RUN [--output=FOLDER]
    python -m tools.report RUN RUN ... --output=FOLDER

RUN is a run directory with `results/`. Of one run it writes `report.html`, `conversations.html` and `figures/`, into
the run directory, where TensorBoard shows them, too, or into FOLDER. Of several it writes a `report.html` with
`figures/` into FOLDER: utilities side by side, by size, fidelity and forecast of the simulators, with each run's curves
and matrix. No model is loaded.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax

from simrl.evaluation.report.report import write_report
from simrl.evaluation.report.several import names_of, write_several
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.files import RESULTS_FOLDER, Results
from simrl.experiments.plan import rl_stage
from simrl.experiments.results import kept_conversations, publish
from simrl.run.config import ConfigError, local_path
from simrl.run.program import run_program
from simrl.run.stage_files import WorkdirError, wait_for_lock


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        'python -m tools.report', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', type=local_path, nargs='+', metavar='RUN')
    parser.add_argument('--output', type=local_path, default=None, metavar='FOLDER')
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and options.output is None:
        parser.error('--output: expected a folder for the page of several runs, found none')
    try:
        folders = names_of(options.runs)
        if len(folders) > 1 and options.output.resolve() in folders.values():
            raise ValueError(f'--output: expected a folder apart from the runs, found {options.output}')
        found = {name: (folder, result_files.read(folder)) for name, folder in folders.items()}
        if len(found) > 1:
            report = write_several(found, options.output)
        else:
            ((folder, results),) = found.values()
            report = write_one(results, folder, options.output)
    except (ConfigError, WorkdirError, OSError, ValueError) as error:
        sys.exit(f'error: {error}')
    print(f'report: {report}')


def write_one(results: Results, folder: pathlib.Path, output: pathlib.Path | None) -> pathlib.Path:
    """Writes the report of a run into a folder, or into the run, where TensorBoard gets its figures, too."""
    stages = {name: rl_stage(run.arm, run.seed) for name, run in results.experiment.runs.items()}
    kept = kept_conversations(folder, stages)
    if output is not None:
        return write_report(results, folder, output, kept=kept)[0]
    jax.config.update('jax_platforms', 'cpu')  # this process only writes files; an accelerator is that of others
    with wait_for_lock(folder / RESULTS_FOLDER):  # the run itself may write them
        return publish(results, folder, kept)[0]


if __name__ == '__main__':
    run_program(main)
