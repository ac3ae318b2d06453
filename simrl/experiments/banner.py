"""A run's facts before its first stage: devices, processes, parameters by model, tokens a step, estimated memory."""

import functools
import math
from collections.abc import Sequence

import jax

from simrl.experiments import memory, plan
from simrl.experiments.scene import Scene
from simrl.models import transformer
from simrl.models.transformer import TransformerConfig


def banner(scene: Scene) -> str:
    """The lines that a run prints first."""
    settings, compute, limits = scene.settings, scene.compute, scene.limits
    models = scene.model_configs()
    rows = settings.rl.prompts_per_step * settings.rl.samples_per_prompt
    futures = scene.futures()
    drawn = 0 if futures is None else futures.turns_drawn(limits.turns)
    sampled = (limits.turns + drawn) * (limits.assistant_tokens + limits.user_tokens)
    arms = dict.fromkeys(arm for arm, _ in plan.runs(scene))
    needed = [one for arm in arms for one in memory.arm_memory(scene, arm)]
    devices, mesh, own = jax.devices(), compute.mesh.make(), compute.mesh_of_simulators()
    meshes = f'data={mesh.shape["data"]} x model={mesh.shape["model"]}'
    used = set(mesh.devices.flat)
    if own is not None:
        meshes += f', of simulators data={own.shape["data"]} x model={own.shape["model"]}'
        used |= set(own.devices.flat)
    count = f'{len(used)} of {len(devices)}' if len(used) < len(devices) else f'{len(devices)}'
    lines = [
        f'devices: {count} {devices[0].device_kind} ({jax.default_backend()}), mesh {meshes}; '
        f'{jax.process_count()} process{"es" if jax.process_count() > 1 else ""}',
        *(f'{name}: {num_parameters(config) / 1e6:,.1f} M parameters' for name, config in models.items()),
        f'an RL step: {rows} conversations of up to {limits.turns} turns{f" and {drawn} of futures" if drawn else ""}, '
        f'{rows * sampled:,} sampled tokens at most',
        *(
            _memory_line([one for one in needed if one.mesh == mesh])
            for mesh in dict.fromkeys(one.mesh for one in needed)
        ),
    ]
    return '\n'.join(lines)


def _memory_line(needed: Sequence[memory.StepMemory]) -> str:
    """The estimated memory of the arm that needs the most, of all arms on one mesh."""
    most = max(needed, key=lambda one: sum(one.most.values()))
    passing = {kind: size for kind, size in most.most.items() if kind not in most.kept}
    own = f' of {memory.SIMULATOR_MESH}' if most.mesh == memory.SIMULATOR_MESH else ''
    return (
        f'estimated memory of an RL step, each device{own}: {memory.kinds_text(most.kept)} throughout; at most '
        f'{memory.kinds_text(passing)} beside it'
    )


@functools.cache  # it traces the model's initialisation; arms share models
def num_parameters(config: TransformerConfig) -> int:
    shapes = jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
