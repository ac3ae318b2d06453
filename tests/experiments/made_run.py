"""A run directory that no run left: its stages are done, and their results are made up."""

import json
import pathlib

import numpy as np

from simrl.experiments import plan
from simrl.experiments.experiment import scene_of
from simrl.experiments.outputs import RESULT_FILE
from simrl.experiments.scene import Scene
from simrl.run import config, directory
from simrl.run.metrics import METRICS_FILE
from simrl.run.stage_files import DONE_FILE, STAGE_FILE
from tests.evaluation.made_up import columns

SECONDS = 2.0
OF_MESSAGES = {'later_messages': 20, 'repeated': 3, 'resampled': 2}


def made_run(workdir: pathlib.Path, settings, people: int = 6) -> Scene:
    """The scene of a run whose stages are all done.

    Scores are in tenths and random, those of assistants that were trained against people higher. `lose` and `undo`
    change what is there.
    """
    scene = scene_of(settings, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    content = {'format': directory.FORMAT, 'version': '0.1', **config.to_dict(settings)}
    (workdir / directory.CONFIG_FILE).write_text(json.dumps(content))
    random = np.random.default_rng(0)
    for stage in plan.plan(scene):
        folder = workdir / stage.name
        folder.mkdir(parents=True)
        inputs = {name: f'hash of {path.name}' for name, path in stage.inputs.items()}
        started = {'settings': config.identity(stage.settings), 'inputs': inputs}
        (folder / STAGE_FILE).write_text(json.dumps(started))
        (folder / DONE_FILE).write_text(json.dumps({'name': stage.name, **started, 'outputs': {}, 'seconds': SECONDS}))
        counts = OF_MESSAGES | {name: 10 for counts in scene.rates.values() for name in counts}
        scores = random.integers(0, 6, people) / 10 + 0.5 * ('/oracle/' in stage.name)
        kind = stage.name.split('/')[0]
        result = _result('measure' if kind in scene.measures() else kind, scores.tolist(), counts)
        if result is not None:
            (folder / RESULT_FILE).write_text(json.dumps(result))
        if stage.name.startswith('rl/'):
            (folder / METRICS_FILE).write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    return scene


LINES = [  # of a training: the second has the mean over two steps, the third is of a validation alone
    {'step': 1, 'grad_norm': 1.0, 'reward/unjudged': 0.0, 'rollout/missed_signals': 0.1, 'endpoint/a/b/tries': 10.0},
    {'step': 3, 'grad_norm': 1.0, 'reward/unjudged': 0.5, 'rollout/missed_signals': None, 'endpoint/a/b/tries': 4.0},
    {'step': 3, 'validation/reward': 0.5},
]


def _result(kind: str, scores: list[float], counts: dict[str, int]):
    if kind in ('measure', 'matrix'):
        missed = {'missed_signals': 1} if kind == 'matrix' else {}
        return {'outcomes': columns(scores), 'statistics': counts | missed, 'shown': []}
    if kind in ('forecast', 'people_forecast'):  # of three examples, with two replies each
        numbers = {'products': [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]], 'clusters': ['a', 'b', 'c']}
        if kind == 'people_forecast':
            return numbers | {'values': [[0.0, 1.0]] * 3}
        return numbers | {'cross': [[0.25] * 3] * 3, 'rewards': [[0.1, 0.2]] * 3, 'reason': None}
    if kind == 'rl':
        return {'step': [1, 3], 'reward/mean': [0.1, 0.2], 'rollout/end_signal': [0.5, 0.5]}
    if kind == 'likelihood':
        return {'log_likelihood': [-2.0, -4.0], 'tokens': [2, 4]}
    return None


def undo(scene: Scene, *names: str) -> None:
    """Makes stages, by the beginning of their names, as if they were not finished."""
    for stage in plan.plan(scene):
        if f'{stage.name}/'.startswith(tuple(f'{name}/' for name in names)):
            (scene.workdir / stage.name / DONE_FILE).unlink()


def lose(scene: Scene, stage: str, cause: str) -> None:
    """Takes the score of a stage's first conversation away."""
    path = scene.workdir / stage / RESULT_FILE
    result = json.loads(path.read_text())
    for name, values in result['outcomes'].items():
        if name not in ('example', 'cluster'):
            values[0] = cause if name == 'cause' else None
    path.write_text(json.dumps(result))
