"""Kernels of causal attention for TPUs and NVIDIA GPUs, and how each device computes its own rows and heads.

The kernels are JAX's own. XLA cannot split a kernel, so on a mesh each device runs it on what it has.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from simrl.models.chunked_attention import block_size
from simrl.models.rows import rows_are_sharded

SPLASH_BLOCK = 512  # positions of a block
LANES = 128  # of a TPU: blocks are multiples


def platform() -> str:
    """The platform that is compiled for: of the mesh that is set, perhaps one of absent devices, or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def on_own_heads(
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> jax.Array:
    """Computes attention on each device of the mesh for the rows and query heads that it has.

    Key/value heads are split over `model` with the query heads. Where the axis does not divide them they are whole on
    every device, which takes those that its query heads read.

    Args:
        function: of a device's query `[B, T, N, H]`, key and value `[B, T, K, H]`, N a multiple of K.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(query, key, value)
    num_heads, kv_heads, devices = query.shape[2], key.shape[2], mesh.shape.get('model', 1)
    rows = 'data' if rows_are_sharded(query.shape[0]) else None
    heads = 'model' if devices > 1 and num_heads % devices == 0 else None
    whole = heads is not None and kv_heads % devices != 0

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if whole:
            num_own, group = num_heads // devices, num_heads // kv_heads
            read = (jax.lax.axis_index('model') * num_own + jnp.arange(num_own)) // group
            if group % num_own == 0:  # all read the same
                read = read[:1]
            key, value = jnp.take(key, read, axis=2), jnp.take(value, read, axis=2)
        return function(query, key, value)

    split = PartitionSpec(rows, None, heads)
    kept = PartitionSpec(rows) if whole else split
    # Outputs of kernels do not say over which axes they vary.
    mapped = jax.shard_map(local, in_specs=(split, kept, kept), out_specs=split, check_vma=False)
    return mapped(query, key, value)


def splash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention by JAX's splash attention, a Pallas kernel for TPUs; see `attention.causal_attention`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads, head_dim = query.shape[1:]
    block = block_size(time, SPLASH_BLOCK, LANES)
    padded = time + -time % block
    scaled = (query.astype(jnp.float32) / math.sqrt(head_dim)).astype(query.dtype)
    pad = ((0, 0), (0, padded - time), (0, 0), (0, 0))
    arrays = [jnp.pad(x, pad).swapaxes(1, 2) for x in (scaled, key, value)]
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    return jax.vmap(kernel)(*arrays).swapaxes(1, 2)[:, :time].astype(query.dtype)


def cudnn_takes(query: jax.Array) -> bool:
    """True if cuDNN computes attention in this dtype and head dimension, on every GPU that it supports."""
    return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[3] <= 128 and query.shape[3] % 8 == 0


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention by cuDNN, for NVIDIA GPUs; see `attention.causal_attention`."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
