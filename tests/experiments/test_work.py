"""TensorBoard knows a training's arm and seed; a result needs all the lines that it is made of."""

import json
import pathlib
from typing import Any
from unittest import mock

import pytest

from configs import quickstart
from simrl.experiments import experiment, work
from simrl.experiments.outputs import lines_at
from simrl.run.stage_files import WorkdirError


class _Started(Exception):  # noqa: N818  (no error: what the training was given)
    pass


def test_arm_and_seed_are_hyperparameters_of_a_training(tmp_path: pathlib.Path, monkeypatch) -> None:
    def train(folder: pathlib.Path, *, hyperparameters: dict[str, Any], **_: Any) -> None:
        raise _Started(hyperparameters)

    monkeypatch.setattr(work.rl, 'train', train)
    monkeypatch.setattr(work, 'fitting_simulator', mock.Mock())
    settings = experiment.settings_of(quickstart.get_config('smoke'))
    scene = mock.Mock(settings=settings, compute=settings.compute, assistant_stage=None)
    with pytest.raises(_Started) as started:
        work.train_arm(tmp_path, scene=scene, arm='persona', seed=3)
    (found,) = started.value.args
    assert (found['arm'], found['seed']) == ('persona', 3)
    assert found['algorithm']['advantage'] == settings.rl.algorithm.advantage


def test_a_missing_line_is_named(tmp_path: pathlib.Path) -> None:
    lines = [{'step': step, 'held_out/loss': 1.0 / (step + 1)} for step in (0, 5, 10)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    assert lines_at(tmp_path, (0, 10)) == [lines[0], lines[2]]
    with pytest.raises(WorkdirError, match=rf'metrics\.jsonl: expected a line of step 20, .*Delete {tmp_path} to'):
        lines_at(tmp_path, (0, 20))
