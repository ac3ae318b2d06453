"""Run a blind study with people on a web server.

    export SIMRL_STUDY_ADMIN=...                                         the administrators' token, 16 characters
    python -m tools.study --config.mode=rehearsal                        two assistants of runs/smollm2, nothing live
    python -m tools.study a=runs/NAME/ARM/seed-0 b=OWNER/MODEL           others, by names that nobody but you sees
    python -m tools.study a=http://127.0.0.1:8000/v1#MODEL b=...         behind a server that runs already
    python -m tools.study --config=my_study.py                           a copy of configs/study.py

It prints the addresses of the administrators' pages and of the link for the panel (Prolific's form) once it listens.
Settings are fields of --config, which --help lists; `texts` and `tasks` are YAML files that replace simrl's. Stopped
and started again, it goes on where it was, and so does everybody in it. For people elsewhere put a proxy with a
certificate before it, with --config.web.https; models are asked from this machine alone. Needs `pip install
'.[study]'`; with a PostgreSQL store also `.[postgres]`. `tools.study_store` makes backups, `tools.study_report` the
report, `tools.rehearse` visits it.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from simrl.main import USER_ERRORS, parse_flags
from simrl.remote.settings import EndpointSettings
from simrl.run.config import from_config_dict, to_config_dict
from simrl.run.program import run_program
from simrl.study.settings import StudyModel, StudySettings

CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'study.py'


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', str(CONFIG), 'A Python file with get_config(arg).', lock_config=True)
    flags.DEFINE_integer('port', None, 'The same as --config.web.port.')


def read_models(arguments: Sequence[str]) -> dict[str, StudyModel]:
    """The models of NAME=SOURCE or NAME=URL#MODEL; without #MODEL the endpoint has the model by that name.

    Raises:
        ValueError: another form, or a name twice.
    """
    found: dict[str, StudyModel] = {}
    for argument in arguments:
        name, _, source = argument.partition('=')
        if not name or not source or name in found:
            raise ValueError(f'models: expected NAME=SOURCE or NAME=URL#MODEL, each name once, found {argument!r}')
        url, _, model = source.partition('#')
        if re.match('https?://', url):
            found[name] = StudyModel(endpoint=EndpointSettings(url=url, model=model or name))
        else:
            found[name] = StudyModel(source=source)
    return found


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    options: Any = flags.FLAGS
    config = options.config
    try:
        from simrl.study.start import serve
        from simrl.study.store import StoreError
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is not installed: pip install -e '.[study]'")
    try:
        if argv[1:]:
            with config.unlocked():
                config.models = {name: to_config_dict(model) for name, model in read_models(argv[1:]).items()}
        if options.port is not None:
            config.web.port = options.port
        serve(from_config_dict(StudySettings, config, 'config'), functools.partial(print, flush=True))
    except (*USER_ERRORS, StoreError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    define_flags()
    parser = functools.partial(parse_flags, settings=lambda _: StudySettings)
    run_program(lambda: app.run(main, flags_parser=parser))
