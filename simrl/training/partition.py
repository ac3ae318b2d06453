"""The parts of a model that a training changes, and the frozen ones that it only reads.

Without LoRA the decoder is trained and nothing is frozen. With it (`models.lora`) the adapters are trained and the
decoder is frozen. A training's state, and so its checkpoints, hold the trained parts alone; what computes takes
`{**frozen, **trained}`, and differentiates by the trained ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.models import lora, placement, sharding
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Params, TransformerConfig

ADAPTERS_STREAM = 2**31 - 1  # folded into the run's key for their start; others fold in steps, which are fewer


def trained_and_frozen(
    params: Params, config: TransformerConfig, settings: LoRASettings | None, *, seed: int, dtype: str, mesh: Mesh
) -> tuple[Params, Params]:
    """The parts that training changes, float32, and those that it does not, on the mesh.

    Args:
        params: where training starts, float32 `{'decoder'}`. The frozen decoder shares its arrays where they can be.
        settings: None: every weight is trained.
        seed: of the run, which decides the adapters' start.
        dtype: that the passes compute in. A frozen decoder is held in it, which changes no number: what is float32 is
            rounded to it where it is used.

    Returns:
        `{'decoder'}` and `{}`, or `{'adapters'}` and `{'decoder', 'adapter_scale'}`.
    """
    decoder = {'decoder': params['decoder']}
    if settings is None:
        return decoder, {}
    key = jax.random.fold_in(jax.random.key(seed), ADAPTERS_STREAM)
    trained = {'adapters': lora.init(key, config, settings)}
    rounded = jax.tree.map(lambda x: x if x.dtype == jnp.dtype(dtype) else x.astype(jnp.dtype(dtype)), decoder)
    return trained, _on_mesh(rounded, config, mesh) | _scale(settings, mesh)


def whole_decoder(
    start: Params, trained: Params, config: TransformerConfig, settings: LoRASettings | None, mesh: Mesh
) -> Params:
    """What came of training as one ordinary model: float32 `{'decoder'}`, in training shards.

    Args:
        start: the params that training started from. Adapters are added to these weights, not to what they were
            rounded to for training.
        trained: the trained parts, of `trained_and_frozen` and a training's state.
    """
    if settings is None:
        return {'decoder': trained['decoder']}
    base = _on_mesh({'decoder': start['decoder']}, config, mesh)
    shardings = sharding.param_shardings(config, mesh, sharding.TRAINING_RULES)
    merge = jax.jit(functools.partial(lora.merged, dtype='float32'), out_shardings=shardings)
    return merge(base | {'adapters': trained['adapters']} | _scale(settings, mesh))


def _on_mesh(params: Params, config: TransformerConfig, mesh: Mesh) -> Params:
    """Params that nothing will change, in training shards: those that lie so already are not copied."""
    shardings = placement.shardings_of(params, config, mesh, sharding.TRAINING_RULES)

    def is_sharded_as(array: Any, target: NamedSharding) -> bool:
        return isinstance(array, jax.Array) and array.sharding.is_equivalent_to(target, array.ndim)

    if all(map(is_sharded_as, jax.tree.leaves(params), jax.tree.leaves(shardings))):
        return params
    return sharding.shard(params, shardings)


def _scale(settings: LoRASettings, mesh: Mesh) -> Params:
    scale = {'adapter_scale': jnp.float32(settings.scale)}
    return sharding.shard(scale, {'adapter_scale': NamedSharding(mesh, PartitionSpec())})
