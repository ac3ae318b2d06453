"""The report of a user study, from its store.

    python -m tools.study_report --config.store=sqlite:///study.sqlite
    python -m tools.study_report --config.store=sqlite:///study.sqlite --config.run=runs/smollm2
    python -m tools.study_report --config.primary=vote --config.excluded_flags="('attention', 'pasted')"

It takes seconds. The analysis is that of the plan which was frozen at the first consent; the third command departs from
it, and the report states it.
"""

from ml_collections import ConfigDict

from simrl.run.config import to_config_dict
from simrl.study.report.settings import StudyReportSettings


def get_config(arg: str = '') -> ConfigDict:
    """The settings; an argument is the URL of a store."""
    return to_config_dict(StudyReportSettings(store=arg) if arg else StudyReportSettings())
