"""Serve models to other programs, by the API of OpenAI.

    python -m tools.serve runs/quickstart/persona/seed-0       an assistant of a run, or a simulator, or a stage
    python -m tools.serve SmolLM2-135M-Instruct.gguf           a GGUF file, a Hugging Face folder or a name of the hub
    python -m tools.serve tiny=FOLDER judge=OWNER/MODEL        several, by other names
    python -m tools.serve FOLDER --port=8001 --config.engine.rows=64 --config.http.key_variable=SERVER_KEY

It prints the URL once it listens, for instance http://127.0.0.1:8000/v1: the base URL of the `openai` package and of
`tools.chat`. Settings are fields of --config, by default configs/serve.py, which --help lists. Needs
`pip install '.[serve]'`.
"""

import functools
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from simrl.main import USER_ERRORS, parse_flags
from simrl.run.config import from_config_dict
from simrl.run.program import run_program
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.serving.settings import ServeSettings

CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'serve.py'


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', str(CONFIG), 'A Python file with get_config(arg).', lock_config=True)
    flags.DEFINE_integer('port', None, 'The same as --config.http.port.')


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # messages of libraries are not this program's output
    options: Any = flags.FLAGS
    config = options.config
    try:
        from simrl.serving.start import serve
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is not installed: pip install -e '.[serve]'")
    try:
        if argv[1:]:
            config.models = tuple(argv[1:])
        if options.port is not None:
            config.http.port = options.port
        settings = from_config_dict(ServeSettings, config, 'config')
        start_backend()
        enable_compilation_cache()
        with numeric_defaults():
            serve(settings)
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    define_flags()
    parser = functools.partial(parse_flags, settings=lambda _: ServeSettings)
    run_program(lambda: app.run(main, flags_parser=parser))
