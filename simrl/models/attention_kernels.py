"""Kernels of causal attention for TPUs and NVIDIA GPUs, and how each device computes its own rows and heads.

The kernels are JAX's own. XLA cannot split a kernel, so on a mesh each device runs it on what it has.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from simrl.models.chunked_attention import block_size
from simrl.models.rows import rows_are_sharded

SPLASH_BLOCK = 512  # positions of a block
LANES = 128  # of a TPU: blocks are multiples


def platform() -> str:
    """The kind of device that is compiled for, 'cpu', 'tpu' or 'gpu': of the mesh that is set, or the default.

    The mesh's devices may be absent. Whatever else JAX may run on counts as a GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else str(device.platform)
    return found if found in ('cpu', 'tpu') else 'gpu'


def on_own_heads(
    function: Callable[..., jax.Array], query: jax.Array, *others: jax.Array, kv_heads_at: Sequence[int | None]
) -> jax.Array:
    """Computes attention on each device of the mesh for the rows and query heads that it has.

    Key/value heads are split over `model` with the query heads. Where the axis does not divide them they are whole on
    every device, which takes those that its query heads read.

    Args:
        function: of a device's part of the arrays; the query heads are a multiple of the key/value heads there, too.
        query: `[B, T, N, H]`.
        others: arrays of B rows.
        kv_heads_at: the dimension of key/value heads of each of them; None: it has none.

    Returns:
        An array like the query, from `function`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(query, *others)
    num_heads, devices = query.shape[2], mesh.shape.get('model', 1)
    (kv_heads,) = {x.shape[at] for x, at in zip(others, kv_heads_at, strict=True) if at is not None}
    rows = 'data' if rows_are_sharded(query.shape[0]) else None
    heads = 'model' if devices > 1 and num_heads % devices == 0 else None
    whole = heads is not None and kv_heads % devices != 0

    def local(query: jax.Array, *others: jax.Array) -> jax.Array:
        if whole:
            num_own, group = num_heads // devices, num_heads // kv_heads
            read = (jax.lax.axis_index('model') * num_own + jnp.arange(num_own)) // group
            if group % num_own == 0:  # all read the same
                read = read[:1]
            pairs = zip(others, kv_heads_at, strict=True)
            others = tuple(x if at is None else jnp.take(x, read, axis=at) for x, at in pairs)
        return function(query, *others)

    split = PartitionSpec(rows, None, heads)
    kept = [PartitionSpec(rows, *([] if whole or at is None else [*[None] * (at - 1), heads])) for at in kv_heads_at]
    # Outputs of kernels do not say over which axes they vary.
    mapped = jax.shard_map(local, in_specs=(split, *kept), out_specs=split, check_vma=False)
    return mapped(query, *others)


def splash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention by JAX's splash attention, a Pallas kernel for TPUs; see `attention.causal_attention`."""
    time, head_dim = query.shape[1], query.shape[3]
    padded = _padded(time)
    arrays = [_pad(x, padded, 1).swapaxes(1, 2) for x in (_scaled(query, head_dim), key, value)]
    kernel = _splash_kernel('CausalMask', arrays[0].shape, padded, save_residuals=False)
    return jax.vmap(kernel)(*arrays).swapaxes(1, 2)[:, :time].astype(query.dtype)


def splash_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Attention of given tokens to a cache, `[B, S, K, H]`, by splash attention; see `attention.cached_attention`.

    A kernel's mask is static, and rows have their own lengths. So queries attend to the cache before their row's first
    token, where all of them see all, and to the given tokens, causally. Two results o with log-sum-exps l are joined by
    the weights exp(l) / (exp(l) + exp(l')).
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    batch, time, heads, head_dim = query.shape
    capacity, kv_heads = values.shape[1:3]
    scaled = _scaled(query, head_dim).swapaxes(1, 2)
    rows = scaled.reshape(batch, kv_heads, -1, head_dim)  # [B, K, G T, H]: all heads see the same
    num_rows, size = rows.shape[2], _padded(capacity)
    # Else XLA copies whole caches into the kernel's layout and back, around a loop that feeds tokens.
    keys, values = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (keys, values))
    cached_keys, cached_values = (_pad(x, size, 1).swapaxes(1, 2) for x in (keys, values))
    rows = _pad(rows, _padded(num_rows), 2)
    before = (jnp.arange(size) < positions[:, :1]).astype(jnp.int32)
    seen = kernels.SegmentIds(q=jnp.ones((batch, rows.shape[2]), jnp.int32), kv=before)  # equal ids see each other
    kernel = _splash_kernel('FullMask', rows.shape, size, save_residuals=True)
    old, (old_sum,) = jax.vmap(kernel)(rows, cached_keys, cached_values, seen)
    given = [_pad(x, _padded(time), 2) for x in (scaled, key.swapaxes(1, 2), value.swapaxes(1, 2))]
    kernel = _splash_kernel('CausalMask', given[0].shape, _padded(time), save_residuals=True)
    new, (new_sum,) = jax.vmap(kernel)(*given)
    old, old_sum = (x[:, :, :num_rows].reshape(batch, heads, time, -1) for x in (old, old_sum))
    new, new_sum = new[:, :, :time], new_sum[:, :, :time, None]
    total = jnp.logaddexp(old_sum, new_sum)
    mixed = old.astype(jnp.float32) * jnp.exp(old_sum - total) + new.astype(jnp.float32) * jnp.exp(new_sum - total)
    return mixed.astype(query.dtype).swapaxes(1, 2)


def _splash_kernel(mask: str, rows: tuple[int, ...], num_keys: int, *, save_residuals: bool) -> Callable[..., Any]:
    """Makes the kernel for one row of a batch of queries `rows`, `[B, N, T, H]`.

    Args:
        mask: the name of one of the kernel's masks.
        save_residuals: True returns the log-sum-exp of each query's scores, too, and has no derivative.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, num_queries, _ = rows
    queries, keys = (block_size(size, SPLASH_BLOCK, LANES) for size in (num_queries, num_keys))
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([getattr(masks, mask)((num_queries, num_keys))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        save_residuals=save_residuals,
    )


def _padded(time: int) -> int:
    """Positions of whole blocks that cover `time`."""
    return time + -time % block_size(time, SPLASH_BLOCK, LANES)


def _pad(x: jax.Array, size: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _scaled(query: jax.Array, head_dim: int) -> jax.Array:
    return (query.astype(jnp.float32) / math.sqrt(head_dim)).astype(query.dtype)


def cudnn_takes(query: jax.Array) -> bool:
    """True if cuDNN computes attention in this dtype and head dimension, on GPUs from Ampere on, as those here are."""
    here = jax.local_devices() if jax.default_backend() == 'gpu' else []  # else they are absent
    majors = [str(getattr(device, 'compute_capability', '')).partition('.')[0] for device in here]  # of AMD: gfx90a
    ampere = all(major.isdigit() and int(major) >= 8 for major in majors)
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return ampere and half and query.shape[3] <= 128 and query.shape[3] % 8 == 0


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention by cuDNN, for NVIDIA GPUs; see `attention.causal_attention`."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
