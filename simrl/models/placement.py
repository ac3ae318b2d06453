"""Params and batches on a mesh, as every stage places them before its first step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.models import layouts, lora, sharding
from simrl.models.transformer import Params, TransformerConfig


def shardings_of(params: Params, config: TransformerConfig, mesh: Mesh, rules: sharding.Rules) -> Params:
    """Shardings for a tree of params, whole or partial: one for each part that it has."""
    heads = tuple(name for name in params if name.endswith('_head'))
    shardings = sharding.param_shardings(config, mesh, rules, heads, tuple(params.get('adapters', ())))
    return {part: shardings[part] for part in params}


def shard_params(params: Params, config: TransformerConfig, mesh: Mesh, rules: sharding.Rules) -> Params:
    """Copies host or device params to devices, sharded by `rules`; see `sharding.shard`."""
    return sharding.shard(params, shardings_of(params, config, mesh, rules))


def for_sampling(config: TransformerConfig, dtype: str, mesh: Mesh) -> Callable[[Params], Params]:
    """Compiles a function from params to the sampler's decoder: one cast and reshard per iteration.

    Adapters are merged into the weights, so decoding costs the same with and without them. Layers are separate arrays.
    On a CPU matrices are stored output-major (`layouts.output_major`), elsewhere see `layouts.flat`.
    """
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    shardings = sharding.param_shardings(config, mesh, sharding.SAMPLING_RULES)['decoder']
    shardings = sharding.layers_apart(shardings, config.num_layers)
    shardings = (sharding.output_major if on_cpu else sharding.flat)(shardings)

    def cast(params: Params) -> Params:
        decoder = layouts.layers_apart(lora.merged(params, dtype)['decoder'])
        return {'decoder': (layouts.output_major if on_cpu else layouts.flat)(decoder)}

    return jax.jit(cast, out_shardings={'decoder': shardings})


def for_scoring(params: Params, config: TransformerConfig, dtype: str, mesh: Mesh) -> Params:
    """Params that only score: the decoder in `dtype`, heads in float32, in the shards of sampling.

    No result changes: the decoder's float32 weights are rounded to it where they are used.
    """
    shardings = shardings_of(params, config, mesh, sharding.SAMPLING_RULES)
    return _scorer(dtype, jax.tree.structure(shardings), tuple(jax.tree.leaves(shardings)))(params)


@functools.cache
def _scorer(dtype: str, structure: Any, shardings: tuple[NamedSharding, ...]) -> Callable[[Params], Params]:
    def cast(params: Params) -> Params:
        return params | {'decoder': jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params['decoder'])}

    return jax.jit(cast, out_shardings=jax.tree.unflatten(structure, shardings))


def to_host(tree: Any) -> Any:
    """Fetches arrays as numpy, whole in every process, wherever their shards are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def fetch(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable  # no process has another part of it
        return jax.device_get(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Copies a batch to the mesh, its rows sharded over `data`.

    Args:
        batch: a tree of host arrays `[rows, ...]`, equal in every process.

    Raises:
        ValueError: the mesh axis does not divide the rows, or a leaf is a scalar.
    """
    sharded, size = NamedSharding(mesh, PartitionSpec('data')), mesh.shape['data']

    def put(path: Any, array: Any) -> jax.Array:
        host = np.asarray(array)
        if host.ndim == 0 or host.shape[0] % size:
            raise ValueError(
                f'batch{jax.tree_util.keystr(path)}: expected a number of rows that is a multiple of {size} (the '
                f"mesh's data axis), found shape {list(host.shape)}"
            )
        return jax.make_array_from_callback(host.shape, sharded, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(put, batch)
