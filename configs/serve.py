"""An OpenAI-compatible server of one or more models.

    python -m tools.serve runs/quickstart/persona/seed-0
    python -m tools.serve assistant=runs/quickstart/persona/seed-0 HuggingFaceTB/SmolLM2-135M-Instruct
    python -m tools.serve --config=configs/serve.py --config.models="('SmolLM2-135M-Instruct.gguf',)"

It is ready after half a minute to two minutes on 2 cores. A copy of this file may name its models.
"""

from ml_collections import ConfigDict

from simrl.run.config import to_config_dict
from simrl.serving.settings import ServeSettings


def get_config(arg: str = '') -> ConfigDict:
    """The settings; an argument is a name of a model."""
    return to_config_dict(ServeSettings(models=(arg,) if arg else ()))
