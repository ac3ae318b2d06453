"""Run by test_sides.py in a process with eight devices: what an RL stage keeps on them, with one mesh and with two.

FILES OUT DTYPE LAYOUT...: a layout is 'one', 'same' or 'other', the devices of the simulator's own mesh.
"""

import collections
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from simrl.experiments import experiment, memory, work
from simrl.experiments.outputs import save_params, save_result
from simrl.experiments.pretrained_rewards import REWARD_STAGE, SCALE_STAGE
from simrl.models import placement, sharding, transformer
from simrl.models.transformer import Params, TransformerConfig
from simrl.rollouts.collect import for_sampling
from tests.experiments.test_pretrained import config_of

ARM = 'fine_tuned'
MESHES = {'one': {}, 'same': {'model': 4}, 'other': {'data': 1, 'model': 4, 'devices': 'other'}}
Arrays = collections.Counter  # of (shape, dtype, shape of a device's part)


def arrays_of(tree: Any) -> Arrays:
    return collections.Counter(
        (x.shape, str(x.dtype), x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree) if x.size > 1
    )


def bytes_of(arrays: Arrays) -> int:
    """On each device that has a part of them."""
    return sum(number * math.prod(part) * jnp.dtype(dtype).itemsize for (_, dtype, part), number in arrays.items())


def settings_of(files: Path, dtype: str, layout: str) -> Any:
    """A simulator of a larger model than the assistant's, and data x 1 devices for that one."""
    config = config_of(files)
    with config.unlocked(), config.ignore_type():
        config.compute.mesh.data = 4
        config.compute.simulator_mesh.update(MESHES[layout])
        config.compute.batching = 'continuous'
        config.compute.training.dtype = config.compute.sampling.dtype = dtype
        config.compute.loop.saved_conversations = 100
        config.rl.steps, config.rl.prompts_per_step, config.rl.samples_per_prompt = 2, 4, 2
        config.rl.validation.examples = 4
        config.scale.batch_size = config.evaluation.batch_size = config.evaluation.people = 4
        config.arms[ARM].model.source = str(files / 'model')
        size = {'model_dim': 32, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, 'mlp_dim': 64}
        config.arms[ARM].model.random.update({**size, 'max_positions': 512})
    return experiment.settings_of(config)


def params_of(config: TransformerConfig, seed: int) -> Params:
    return jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(seed), config)


def prepare(scene: Any) -> tuple[TransformerConfig, TransformerConfig]:
    """Leaves what the stages before RL leave, untrained; returns the assistant's and the simulator's model."""
    assistant, simulator = scene.model.config, scene.simulator_model(ARM)
    save_params(scene.workdir / 'sft' / ARM, params_of(simulator, 1))
    head = {'kernel': jax.random.normal(jax.random.key(3), (assistant.model_dim,)), 'bias': jnp.zeros(())}
    save_params(scene.workdir / REWARD_STAGE, {**params_of(assistant, 2), 'reward_head': head})
    (scene.workdir / SCALE_STAGE).mkdir(parents=True)
    save_result(scene.workdir / SCALE_STAGE, {'mean': 0.0, 'std': 1.0})
    return assistant, simulator


def kinds_of(scene: Any, assistant: TransformerConfig, simulator: TransformerConfig) -> dict[str, Arrays]:
    """What is needed while RL trains, by kind."""
    compute, mesh = scene.compute, scene.compute.mesh.make()
    rules = (sharding.TRAINING_RULES, sharding.SAMPLING_RULES)
    trained, whole = (placement.shard_params(params_of(assistant, 0), assistant, mesh, of) for of in rules)
    reward = jax.tree.map(lambda x: x.astype(compute.training.dtype), whole) | {'head': jnp.zeros(assistant.model_dim)}
    agents = scene.simulator(ARM, 0), scene.assistant(None)
    users, sampled = (arrays_of(for_sampling(agent, mesh).policy.params) for agent in agents)
    state = arrays_of(trained)
    return {
        'parameters': state,
        'moments': state + state,
        'reference': arrays_of(jax.tree.map(lambda x: x.astype(compute.training.dtype), trained)),
        'reward model': arrays_of(reward),
        'simulator': users,
        'assistant in sampling': sampled,
    }


def main(files: Path, out: Path, dtype: str, layouts: list[str]) -> None:
    found = {}
    for layout in layouts:
        scene = experiment.scene_of(settings_of(files, dtype, layout), out / dtype / layout)
        models = prepare(scene)
        shapes = {x.shape for config in models for x in jax.tree.leaves(params_of(config, 0)) if x.ndim > 1}
        kinds = kinds_of(scene, *models)
        shapes |= {shape for arrays in kinds.values() for shape, *_ in arrays if len(shape) > 1}
        del models
        live: dict[str, Arrays] = {}

        def count(when: str, live: dict[str, Arrays] = live, shapes: Any = shapes) -> None:
            live[when] = arrays_of([x for x in jax.live_arrays() if x.shape in shapes and x.dtype != jnp.int32])

        gc.collect()
        before = arrays_of([x for x in jax.live_arrays() if x.shape in shapes])
        reward, usage = scene.reward, scene.usage

        def counted(examples: Any, reward: Any = reward, count: Any = count) -> Any:
            score = reward(examples)

            def scored(batch: Any) -> Any:
                count('conversations')
                return score(batch)

            return scored

        def used(usage: Any = usage, count: Any = count) -> Any:
            count('update')
            return usage()

        scene.reward, scene.usage = counted, used
        folder = scene.workdir / 'rl' / ARM / 'seed-0'
        work.train_arm(folder, scene=scene, arm=ARM, seed=0)
        big = {kind: collections.Counter({x: n for x, n in a.items() if x[0] in shapes}) for kind, a in kinds.items()}
        expected = {
            'conversations': sum(big.values(), before),
            'update': sum((a for kind, a in big.items() if kind != 'assistant in sampling'), before),
        }
        found[layout] = {
            'bytes': {kind: bytes_of(arrays) for kind, arrays in big.items()},
            'live': {when: bytes_of(arrays - before) for when, arrays in live.items()},
            'more': {when: sorted(map(str, (live[when] - expected[when]).items())) for when in live},
            'less': {when: sorted(map(str, (expected[when] - live[when]).items())) for when in live},
            'estimate': {one.mesh: dict(one.kept) for one in memory.arm_memory(scene, ARM)},
            'lines': [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()],
            'said': (folder / 'conversations' / 'rl.jsonl').read_text().splitlines(),
        }
    (out / f'{dtype}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
