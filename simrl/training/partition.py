"""Trained and frozen parameters of a model.

Without LoRA the decoder is trained and nothing is frozen. With LoRA (`models.lora`) the adapters are trained and the
decoder is frozen. Training states and checkpoints contain the trained parameters only. A loss reads
`{**frozen, **trained}` and is differentiated by the trained ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.models import lora, placement, sharding
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Params, TransformerConfig

ADAPTERS_STREAM = 2**31 - 1  # folded into the run's key to initialise adapters; steps, folded in elsewhere, are fewer


def trained_and_frozen(
    params: Params, config: TransformerConfig, settings: LoRASettings | None, *, seed: int, dtype: str, mesh: Mesh
) -> tuple[Params, Params]:
    """Splits a model into trained parameters, float32, and frozen ones, in training shards.

    Args:
        params: float32 `{'decoder'}` before training.
        settings: None trains every weight.
        seed: of the run; initialises the adapters.
        dtype: compute dtype. A frozen decoder is stored in it; see `frozen_decoder`.

    Returns:
        `{'decoder'}` and `{}`, or `{'adapters'}` and `{'decoder', 'adapter_scale'}`.
    """
    decoder = {'decoder': params['decoder']}
    if settings is None:
        return decoder, {}
    key = jax.random.fold_in(jax.random.key(seed), ADAPTERS_STREAM)
    trained = {'adapters': lora.init(key, config, settings)}
    return trained, frozen_decoder(decoder, config, dtype=dtype, mesh=mesh) | _scale(settings, mesh)


def frozen_decoder(params: Params, config: TransformerConfig, *, dtype: str, mesh: Mesh) -> Params:
    """The decoder alone, `{'decoder'}`, in the compute dtype and in training shards.

    It has the arrays of `params` where dtype and shards agree. No result changes: float32 weights are rounded to the
    compute dtype where they are used.
    """
    wanted = jnp.dtype(dtype)
    rounded = jax.tree.map(lambda x: x if x.dtype == wanted else x.astype(wanted), {'decoder': params['decoder']})
    return _on_mesh(rounded, config, mesh)


def whole_decoder(
    load: Callable[[], Params], trained: Params, config: TransformerConfig, settings: LoRASettings | None, mesh: Mesh
) -> Params:
    """Merges the result of training into one ordinary model: float32 `{'decoder'}`, in training shards.

    Args:
        load: makes the params before training; called where there are adapters. They are added to these weights, not to
            rounded ones.
        trained: the trained parameters in a training's state.
    """
    if settings is None:
        return {'decoder': trained['decoder']}
    base = _on_mesh({'decoder': load()['decoder']}, config, mesh)
    shardings = sharding.param_shardings(config, mesh, sharding.TRAINING_RULES)
    merge = jax.jit(functools.partial(lora.merged, dtype='float32'), out_shardings=shardings)
    return merge(base | {'adapters': trained['adapters']} | _scale(settings, mesh))


def _on_mesh(params: Params, config: TransformerConfig, mesh: Mesh) -> Params:
    """Moves params to their training shards, without a copy where they are there already."""
    shardings = placement.shardings_of(params, config, mesh, sharding.TRAINING_RULES)

    def is_sharded_as(array: Any, target: NamedSharding) -> bool:
        return isinstance(array, jax.Array) and array.sharding.is_equivalent_to(target, array.ndim)

    if all(map(is_sharded_as, jax.tree.leaves(params), jax.tree.leaves(shardings))):
        return params
    return sharding.shard(params, shardings)


def _scale(settings: LoRASettings, mesh: Mesh) -> Params:
    scale = {'adapter_scale': jnp.float32(settings.scale)}
    return sharding.shard(scale, {'adapter_scale': NamedSharding(mesh, PartitionSpec())})
