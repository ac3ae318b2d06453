"""Run by `test_eight_devices.py` for each mesh, in a process of eight fake devices: DATA MODEL FOLDER TRAINING..."""

import dataclasses
import faulthandler
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.experiments import sources
from simrl.experiments.sources import ModelSettings, RandomModel
from simrl.models import placement, sharding, transformer
from simrl.models.files.export import export
from simrl.training import loop
from simrl.training.optimizer import TrainState, make_optimizer, place_state
from tests.rl import scene
from tests.tiny import CHATML_TOKENS, byte_tokenizer

STEPS = 2
FIRST_STEP = 'the first step'  # among the names
MATRIX = 2048  # numbers; arrays of at least so many are to be split
compiles: list[str] = []  # the names of the functions that JAX compiled, in order
SCORED = ('reinforce', 'adapt', 'foresee_ahead', 'ahead', 'ahead_at_own_pace')


def shards(tree: Any) -> dict[str, list[int]]:
    """The shape of one device's part of each array, checked on the arrays themselves, by its last two names."""
    shapes = {}
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = {shard.data.shape for shard in array.addressable_shards}
        assert len(parts) == 1
        shapes['.'.join(entry.key for entry in path[-2:])] = list(parts.pop())
    return shapes


def moments(state: TrainState, name: str) -> dict[str, list[int]]:
    """The shards of Adam's `mu` or `nu`, as those of the params."""
    found = {}
    for path, array in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        names = [getattr(entry, 'name', None) for entry in path]
        if name in names:
            found |= shards(_nested(path[names.index(name) + 1 :], array))
    return found


def _nested(path: Any, leaf: Any) -> Any:
    return {path[0].key: _nested(path[1:], leaf)} if path else leaf


def watched(run: Callable[..., TrainState], counts: list[int]) -> Callable[..., TrainState]:
    """`loop.run`, which then notes how many programs each step compiled."""

    def watched_run(folder: Path, state: TrainState, step_fn: Any, *args: Any, **kwargs: Any) -> TrainState:
        def step(state: TrainState, number: int) -> Any:
            before = len(compiles)
            compiles.extend([FIRST_STEP] if not counts else [])
            result = jax.block_until_ready(step_fn(state, number))
            counts.append(len(compiles) - before - (not counts))
            return result

        return run(folder, state, step, *args, **kwargs)

    return watched_run


def trained(folder: Path, chat: Chat, mesh: Mesh, trainings: list[str]) -> dict[str, Any]:
    """By training: metrics, shards, and compiles by step. The last params and all tokens go to TRAINING.npz."""
    results = {}
    for name in trainings:
        jax.clear_caches()  # what other trainings compiled
        counts: list[int] = []
        begun = len(compiles)
        tokens = []

        def score(batch: Any, tokens: list[np.ndarray] = tokens) -> Any:
            tokens.append(np.asarray(batch.tokens))
            return scene.share_of_low_ids(batch)

        evaluation = {'evaluate_every': STEPS} if name == 'fine_tune' else {}
        own: dict[str, Any] = {'score': score} if name in SCORED else {'compile_threads': 2}
        with mock.patch.object(loop, 'run', watched(loop.run, counts)):
            state = getattr(scene, name)(
                folder / name,
                chat,
                mesh,
                steps=STEPS,
                loop_settings=scene.loop_settings(**evaluation),
                **own,
            )
        lines = [json.loads(line) for line in (folder / name / 'metrics.jsonl').read_text().splitlines()]
        params = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
        np.savez(folder / f'{name}.npz', **jax.device_get(params), **{f'tokens_{i}': x for i, x in enumerate(tokens)})
        results[name] = {
            'lines': [{key: x for key, x in line.items() if not key.startswith('time/')} for line in lines],
            'compiles': counts,
            'names': compiles[begun:],
            'shards': {'params': shards(state.params)} | {key: moments(state, key) for key in ('mu', 'nu')},
        }
    return results


def exported(folder: Path) -> str:
    """A model folder whose embedding has no spare row: the terminal token makes it grow."""
    spare = 384 - 256 - len(CHATML_TOKENS)
    tokenizer = byte_tokenizer((*CHATML_TOKENS, *(f'<|spare_{i}|>' for i in range(spare))))
    config = dataclasses.replace(scene.config_of(scene.chat()), vocab_size=384)
    export(scene.params_of(config), config, tokenizer, folder)
    return str(folder)


def loaded(source: str, mesh: Mesh) -> dict[str, Any]:
    """Shards of a model after loading onto a mesh, and after placement for sampling and for training."""
    settings = ModelSettings(source)
    random = RandomModel(model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_positions=256)
    model = sources.open_model(settings)
    params = model.load_params(mesh)
    made = sources.open_model(ModelSettings(source, random=random)).load_params(mesh)
    sampling = placement.shard_params(params, model.config, mesh, sharding.SAMPLING_RULES)
    optimizer = make_optimizer(scene.ADAMW, STEPS)
    headed = params | {'value_head': transformer.init_head(model.config)}
    state, _ = place_state(headed, model.config, optimizer, mesh)
    leaves = jax.tree.leaves((params, made, sampling, state))
    read_by_host = [list(x.shape) for x in leaves if x.size >= MATRIX and x._npy_value is not None]
    whole = [
        list(x.shape)
        for x in jax.live_arrays()
        if x.size >= MATRIX and any(shard.data.size == x.size for shard in x.addressable_shards)
    ]
    on_host = model.load_params()
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, on_host)), strict=True)]
    assert jax.tree.leaves(params)[0]._npy_value is not None  # what `read_by_host` goes by
    return {
        'shards': {name: shards(tree) for name, tree in (('loaded', params), ('made', made))},
        'sampling_embedding': shards(sampling)['decoder.embedding'],
        'training_embedding': shards(state.params)['decoder.embedding'],
        'read_by_host': read_by_host,
        'whole': whole,
        'same': all(same),
    }


def main(data: int, model: int, out: Path, trainings: list[str]) -> None:
    """On a mesh of `data` x `model` devices; on one device where both are 1."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **names: compiles.append(names.get('fun_name', '')) if 'backend_compile' in event else None
    )
    mesh = sharding.make_mesh(data, model, jax.devices()[: data * model])
    results: dict[str, Any] = {}
    if (data, model) == (4, 2):
        results['loaded'] = loaded(exported(out / 'model'), mesh)
    results |= trained(out, scene.chat(), mesh, trainings)
    (out / 'results.json').write_text(json.dumps(results))


if __name__ == '__main__':
    assert jax.device_count() == 8
    faulthandler.dump_traceback_later(500, exit=True)  # before the test's patience ends: says where it hangs
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
