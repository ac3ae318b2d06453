"""A name of an assistant -> a hash of what decides its replies, wherever its files are.

Answers that are kept by it are found again after a model was moved, and never those of another model in its place.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
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
    return identity_of_model(open_model(name)) if run is None else _of_run(name, *run)


def identity_of_model(model: Model) -> str:
    """The identity of a model: its files, or name and commit on the hub, and its template, with the date if in it."""
    settings, chat = model_identity(model.settings), model.chat
    del settings['date']
    template = [chat.default_prefix, dict(chat.headers), dict(chat.first_headers)]
    return _hash({'settings': settings, 'template': template}, model_files('model', model.settings))


def identity_of_simulator(scene: Scene, arm: str, seed: int) -> str:
    """The identity of an arm's simulator, and of all that decides its conversations beside the assistant."""
    parts = (scene.identity(), scene.simulator_identity(arm), scene.limits, scene.settings.evaluation.seed)
    return _hash([config.identity(part) for part in parts], scene.simulator_inputs(arm, seed))


def _of_run(name: str, scene: Scene, part: str) -> str:
    """The identity of the stage that left the assistant; or of the model that the run starts from."""
    stage = assistant_stage(name, scene, part)
    if stage is not None:
        return _hash({}, {'stage': stage})
    files = {key: path for key, path in scene.inputs().items() if key.partition(' ')[0] == 'model'}
    return _hash(config.identity(scene.identity()), files)


def _hash(settings: Any, files: Mapping[str, pathlib.Path]) -> str:
    hashes = Hashes()
    whole = [settings, {key: hashes.of(path) for key, path in files.items()}]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
