"""A run's facts before its first stage: devices, processes, parameters by model, tokens a step, estimated memory."""

import functools
import math

import jax

from simrl.experiments.scene import Scene
from simrl.models import transformer
from simrl.models.transformer import TransformerConfig

GIB = 2**30


def banner(scene: Scene) -> str:
    """The lines that a run prints first."""
    settings, compute, limits = scene.settings, scene.compute, scene.limits
    models = scene.model_configs()
    rows = settings.rl.prompts_per_step * settings.rl.samples_per_prompt
    futures = scene.futures()
    drawn = 0 if futures is None else futures.turns_drawn(limits.turns)
    sampled = (limits.turns + drawn) * (limits.assistant_tokens + limits.user_tokens)
    training, decoding = step_memory(scene)
    devices, mesh = jax.devices(), compute.mesh.make()
    count = f'{mesh.size} of {len(devices)}' if mesh.size < len(devices) else f'{len(devices)}'
    lines = [
        f'devices: {count} {devices[0].device_kind} ({jax.default_backend()}), mesh data={mesh.shape["data"]} '
        f'x model={mesh.shape["model"]}; {jax.process_count()} process{"es" if jax.process_count() > 1 else ""}',
        *(f'{name}: {num_parameters(config) / 1e6:,.1f} M parameters' for name, config in models.items()),
        f'an RL step: {rows} conversations of up to {limits.turns} turns{f" and {drawn} of futures" if drawn else ""}, '
        f'{rows * sampled:,} sampled tokens at most',
        f'estimated memory of an RL step, all devices: {training / GIB:.2f} GiB of parameters, optimizer and '
        f'reference; {decoding / GIB:.2f} GiB to sample (weights and caches)',
    ]
    return '\n'.join(lines)


@functools.cache  # it traces the model's initialisation; arms share models
def num_parameters(config: TransformerConfig) -> int:
    shapes = jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def step_memory(scene: Scene) -> tuple[int, int]:
    """Bytes of an RL step on all devices, from shapes: the training state; and the sampler's weights and KV caches.

    The state holds float32 parameters, AdamW's two moments and the gradient; the reference, where there is a KL term,
    another copy of the parameters. Activations are not counted: they depend on rematerialisation. A simulator off the
    device takes no more: it has no caches, and the assistant those of two pieces (`rows_in_flight`).
    """
    settings, compute, limits = scene.settings, scene.compute, scene.limits
    configs = list(scene.model_configs().values())
    assistant = configs[0]
    algorithm = settings.rl.algorithm
    copies = 4 + (algorithm.kl != 'none')
    size = jax.numpy.dtype(compute.sampling.dtype).itemsize
    tokens = limits.prompt_tokens + limits.turns * (limits.assistant_tokens + limits.user_tokens)
    rows = compute.rows_in_flight or settings.rl.prompts_per_step * settings.rl.samples_per_prompt

    def sampler(config: TransformerConfig) -> int:
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens * rows
        return (num_parameters(config) + cache) * size

    return 4 * copies * num_parameters(assistant), sampler(assistant) + max(map(sampler, configs))
