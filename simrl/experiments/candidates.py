"""The validated steps of a training and their parameters, of which one becomes the trained assistant.

`validation/step-N.json` has the reward of every validation conversation after N steps; `candidates/N/` has the
parameters of the steps that may still be chosen (`rl.validation`). Both are functions of the step, so that a resumed
training writes them again as they were.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from simrl.experiments.outputs import PARAMS_FOLDER, save_params
from simrl.models.checkpoint import Checkpoints
from simrl.models.transformer import Params
from simrl.rl.validation import ValidationSettings, plateau_onset, unbeaten
from simrl.run.stage_files import WorkdirError, write_json

VALIDATION_FOLDER, CANDIDATES_FOLDER = 'validation', 'candidates'
_STEP_FILE = re.compile(r'step-(\d+)\.json')


class Candidates:
    """The validated steps of one training, in its stage's folder.

    Args:
        folder: of the stage.
        examples: ids of the validation's examples, in their order.
    """

    def __init__(self, folder: pathlib.Path, settings: ValidationSettings, examples: Sequence[str]) -> None:
        self._folder, self._settings, self._examples = folder, settings, list(examples)
        self._rewards = {
            int(found[1]): self._read(path)
            for path in sorted((folder / VALIDATION_FOLDER).glob('*.json'))
            if (found := _STEP_FILE.fullmatch(path.name))
        }

    def _read(self, path: pathlib.Path) -> np.ndarray:
        try:
            rewards = json.loads(path.read_text(encoding='utf-8'))['rewards']
            if list(rewards) == self._examples:
                return np.array([np.nan if x is None else x for x in rewards.values()], np.float32)
        except (ValueError, KeyError, TypeError, AttributeError):
            rewards = None
        raise WorkdirError(
            f'{path}: expected the rewards of {len(self._examples)} validation examples, found '
            f'{"other examples" if rewards else "no such content"}: the file was changed. Delete '
            f'{self._folder} to start anew'
        )

    def record(self, step: int, rewards: np.ndarray, params: Params) -> None:
        """Keeps a validated step: its rewards, its parameters, and no longer those of steps that it beats."""
        if step == 0:  # the initial assistant, which no training left
            self._write(step, rewards)
            return
        save_params(self._place(step), params)
        self._write(step, rewards)
        kept = unbeaten(self.trained(), self._settings.margin)
        for other in self.trained():
            if other not in kept:
                self._remove(other)

    def trained(self) -> dict[int, np.ndarray]:
        """The rewards of the steps that may be chosen: all but the initial assistant's."""
        return {step: rewards for step, rewards in self._rewards.items() if step > 0}

    def chosen(self) -> int:
        """The step at the onset of the plateau."""
        return plateau_onset(self.trained(), self._settings.margin)

    def summary(self) -> dict[str, Any]:
        """The validation part of a stage's result: by step the mean reward, and the step that was chosen."""
        steps = sorted(self._rewards)
        means = [
            float(np.nanmean(self._rewards[step])) if np.isfinite(self._rewards[step]).any() else None for step in steps
        ]
        return {
            'step': steps,
            'reward': means,
            'judged': [int(np.isfinite(self._rewards[step]).sum()) for step in steps],
            'examples': len(self._examples),
            'chosen': self.chosen(),
            'margin': self._settings.margin,
        }

    def params(self, step: int, like: Params) -> Params:
        """The parameters after a step that no later one beats, in the shards of `like`."""
        with Checkpoints(self._place(step) / PARAMS_FOLDER, keep=1) as checkpoints:
            restored = checkpoints.restore(like)
        if restored is None:
            raise WorkdirError(f'{self._place(step)}: expected the parameters of a validated step, found none')
        return restored[1]

    def _place(self, step: int) -> pathlib.Path:
        return self._folder / CANDIDATES_FOLDER / str(step)

    def _remove(self, step: int) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._place(step), ignore_errors=True)

    def _write(self, step: int, rewards: np.ndarray) -> None:
        self._rewards[step] = rewards
        if jax.process_index() != 0:
            return
        values = [float(x) if np.isfinite(x) else None for x in rewards]
        (self._folder / VALIDATION_FOLDER).mkdir(parents=True, exist_ok=True)
        path = self._folder / VALIDATION_FOLDER / f'step-{step}.json'
        write_json(path, {'step': step, 'rewards': dict(zip(self._examples, values, strict=True))})
