"""Analyses a user study: win rates of its models, with intervals over participants, by the plan that was frozen.

    python -m tools.study_report --config.store=sqlite:///study.sqlite [--config.output=FOLDER]
    python -m tools.study_report --config.store=sqlite:///study.sqlite --config.run=runs/smollm2

FOLDER (runs/study_report) gets report.html, reasons.html with every vote, figures/, and results.json. With a run, whose
assistants were the models, the run's report.html is written again, with the study's win rates beside its judges'.

Results by model are seen once the planned participants have completed, or at an interim look of the plan. The store
keeps each look, for which no server may have it open; an earlier look departs from the plan and needs a reason
(--config.reason=...). A rehearsal has no looks: its results are seen at any time, and need no reason. Settings are
fields of --config, by default configs/study_report.py, which --help lists.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

import tools.report
from simrl.evaluation.results import files as result_files
from simrl.main import USER_ERRORS, parse_flags
from simrl.run.config import from_config_dict
from simrl.run.program import run_program
from simrl.study.report.settings import StudyReportSettings

CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'study_report.py'


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', str(CONFIG), 'A Python file with get_config(arg).', lock_config=True)


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f'error: expected flags only, found {argv[1]!r}')
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    options: Any = flags.FLAGS
    try:
        from simrl.study.report.write import console_lines, read_study, study_result, write_study
        from simrl.study.store import StoreError
        from simrl.study.text_files import TextError, read_tasks
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is not installed: pip install -e '.[study]'")
    try:
        settings = from_config_dict(StudyReportSettings, options.config, 'config')
        tasks = read_tasks(settings.tasks)
        run = None if settings.run is None else result_files.read(settings.run).experiment
        study = read_study(settings, tasks)
        report, analysis = write_study(study, settings, tasks)
        for line in console_lines(analysis, study):
            print(line)
        print(f'report: {report}')
        if run is not None and settings.run is not None:
            result_files.add_study(study_result(study, analysis, report, run, settings.assistants), settings.run)
            tools.report.main([str(settings.run)])
    except (*USER_ERRORS, StoreError, TextError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    define_flags()
    parser = functools.partial(parse_flags, settings=lambda _: StudyReportSettings)
    run_program(lambda: app.run(main, flags_parser=parser))
