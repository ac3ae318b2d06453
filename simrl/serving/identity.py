"""A name of an assistant -> a hash of what decides its replies, wherever its files are.

Answers that are kept by it are found again after a model was moved, and never those of another model in its place.
"""

import hashlib
import json
import pathlib
from typing import Any

from simrl.experiments.scene import Scene
from simrl.experiments.sources import Model, model_files, model_identity
from simrl.run import config
from simrl.run.stage_files import Hashes
from simrl.serving.load import assistant_stage, find_run, open_model


def identity_of(name: str) -> str:
    """The identity of an assistant, 64 hexadecimal digits; how it is sampled is no part of it. Loads no weights.

    Args:
        name: as of `load_assistant`.

    Raises:
        FileNotFoundError, ValueError, WorkdirError: there is none, or it cannot be read.
    """
    run = find_run(config.local_path(name))
    parts = _of_model(open_model(name)) if run is None else _of_run(name, *run)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_model(model: Model) -> dict[str, Any]:
    """Files, or name and commit on the hub, and the template as it is today: some write the date."""
    settings, chat = model_identity(model.settings), model.chat
    del settings['date']
    template = [chat.default_prefix, dict(chat.headers), dict(chat.first_headers)]
    return {'settings': settings, 'template': template, 'files': _hashes(model_files('model', model.settings))}


def _of_run(name: str, scene: Scene, part: str) -> dict[str, Any]:
    """The stage that left the assistant; or the model that the run starts from."""
    stage = assistant_stage(name, scene, part)
    if stage is not None:
        return {'stage': Hashes().of(stage)}
    files = {key: path for key, path in scene.inputs().items() if key.partition(' ')[0] == 'model'}
    return {'scene': config.identity(scene.identity()), 'files': _hashes(files)}


def _hashes(files: dict[str, pathlib.Path]) -> dict[str, str]:
    hashes = Hashes()
    return {key: hashes.of(path) for key, path in files.items()}
