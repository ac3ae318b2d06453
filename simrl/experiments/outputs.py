"""The files that a stage leaves in its folder, for later stages and for the report.

`params/` holds a whole model, with adapters merged: who reads a stage need not know how it was trained. `result.json`
holds what is reported; `metrics.jsonl` is what its training logged (see `training.loop`).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from simrl.models import sharding, transformer
from simrl.models.checkpoint import Checkpoints
from simrl.models.transformer import Params, TransformerConfig
from simrl.run import config as config_lib
from simrl.run import processes
from simrl.run.metrics import METRICS_FILE
from simrl.run.stage_files import WorkdirError, named_errors

PARAMS_FOLDER, RESULT_FILE = 'params', 'result.json'


def save_result(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a stage's `result.json`, in the process that leads."""
    if not processes.leads():
        return
    with named_errors(folder / RESULT_FILE):
        (folder / RESULT_FILE).write_text(json.dumps(config_lib.to_dict(result), indent=2) + '\n', encoding='utf-8')


def read_result(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a stage's `result.json`."""
    content: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding='utf-8'))
    return content


def save_params(folder: pathlib.Path, params: Params) -> None:
    """Writes a stage's final parameters, unless a killed process already did."""
    with Checkpoints(folder / PARAMS_FOLDER, keep=1) as checkpoints:
        if not checkpoints.steps:
            checkpoints.save(0, params, {})


def load_params(
    folder: pathlib.Path,
    config: TransformerConfig,
    mesh: Mesh,
    *,
    heads: Sequence[str] = (),
) -> Params:
    """Reads a stage's parameters, float32, straight into the shards of training.

    Raises:
        FileNotFoundError: the stage is not finished.
    """
    shapes = jax.eval_shape(
        lambda key: transformer.init_params(key, config) | {head: transformer.init_head(config) for head in heads},
        jax.random.key(0),
    )
    shardings = sharding.param_shardings(config, mesh, sharding.TRAINING_RULES, heads)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    with Checkpoints(folder / PARAMS_FOLDER, keep=1) as checkpoints:
        restored = checkpoints.restore(like)
    if restored is None:
        raise FileNotFoundError(f'{folder}: expected a finished stage with {PARAMS_FOLDER}/, found none')
    return restored[1]


def metric_lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads what a stage's training logged, in the order of its steps."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding='utf-8').splitlines()]


def lines_at(folder: pathlib.Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Reads what a stage's training logged at these steps.

    Raises:
        WorkdirError: a line is missing.
    """
    lines = {line['step']: line for line in metric_lines(folder)}
    if missing := [step for step in steps if step not in lines]:
        raise WorkdirError(
            f'{folder / METRICS_FILE}: expected a line of step {missing[0]}, found none: the file was changed. '
            f'Delete {folder} to start anew'
        )
    return [lines[step] for step in steps]
