"""Training states and batches on a mesh: what the stages of every training do before their first step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.models import layouts, lora, sharding
from simrl.models.transformer import Params, TransformerConfig


def shardings_of(params: Params, config: TransformerConfig, mesh: Mesh, rules: sharding.Rules) -> Params:
    """The shardings of those parts that a tree of params has, be they a whole model's or not."""
    heads = tuple(name for name in params if name.endswith('_head'))
    shardings = sharding.param_shardings(config, mesh, rules, heads, tuple(params.get('adapters', ())))
    return {part: shardings[part] for part in params}


def shard_params(params: Params, config: TransformerConfig, mesh: Mesh, rules: sharding.Rules) -> Params:
    """Host or device params as new device arrays in the shards of `rules`; see `sharding.shard`."""
    return sharding.shard(params, shardings_of(params, config, mesh, rules))


def for_sampling(config: TransformerConfig, dtype: str, mesh: Mesh) -> Callable[[Params], Params]:
    """A function from params to their decoder in the sampler's dtype and shards: one cast and reshard an iteration.

    Adapters are added to the weights, so that decoding costs what it does without them, and layers are apart. On a CPU
    outputs come first in all that is multiplied (`layouts.output_major`).
    """
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    shardings = sharding.param_shardings(config, mesh, sharding.SAMPLING_RULES)['decoder']
    shardings = sharding.layers_apart(shardings, config.num_layers)
    if on_cpu:
        shardings = sharding.output_major(shardings)

    def cast(params: Params) -> Params:
        decoder = layouts.layers_apart(lora.merged(params, dtype)['decoder'])
        return {'decoder': layouts.output_major(decoder) if on_cpu else decoder}

    return jax.jit(cast, out_shardings={'decoder': shardings})


def to_host(tree: Any) -> Any:
    """Arrays as numpy, whole in every process, wherever their shards are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch that every process has whole, as global arrays with rows split over `data`."""
    count, index = jax.process_count(), jax.process_index()

    def own(array: np.ndarray) -> np.ndarray:
        rows, rest = divmod(array.shape[0], count)
        if rest:
            raise ValueError(f'batch: expected a multiple of the {count} processes, found {array.shape[0]} rows')
        return array[index * rows : (index + 1) * rows]

    return sharding.shard_local_batch(batch if count == 1 else jax.tree.map(own, batch), mesh)
