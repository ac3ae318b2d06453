"""The decoder-only transformer as pure functions: tokens and a KV cache in, hidden states and the cache out.

One decoder covers Llama 3, Mistral, SmolLM2, Qwen2/2.5 and Qwen3 by configuration. Rows are left-aligned: the position
of a token is its index in the row, so padding lies after every real token and causal masking alone hides it.

Dimension letters, used in every einsum and shape comment:
  B batch, T query time, S cache time, L layers, N query heads, K key/value heads, G = N / K query heads per key/value
  head, H head dimension, D model dimension, F MLP dimension, V vocabulary (padded).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from simrl.models.rows import rows_are_split, split_rows

# A nested dict of arrays: {'decoder', 'value_head'?, 'reward_head'?}, and with LoRA (`lora.py`) 'adapters' and their
# 'adapter_scale' as well.
Params = Any

VOCABULARY_MULTIPLE = 128  # the embedding is padded to this many rows, so that it tiles and shards evenly


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the low RoPE frequencies (`rope_type: llama3` in a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What the weights mean. Two models with equal configs have equal parameter trees."""

    vocab_size: int  # rows in use, that is, without our padding
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int  # tokens
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tied_embedding: bool = False

    def __post_init__(self) -> None:
        for field in ('vocab_size', 'model_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim'):
            if getattr(self, field) < 1:
                raise ValueError(f'TransformerConfig.{field}: expected at least 1, found {getattr(self, field)}')
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'TransformerConfig.num_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, '
                f'found {self.num_heads}'
            )
        if self.head_dim % 2:
            raise ValueError(f'TransformerConfig.head_dim: expected an even number (RoPE), found {self.head_dim}')

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the decoder is computed. It changes speed, memory and rounding, and never what is computed."""

    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matrix products
    remat: Literal['none', 'full', 'dots'] = 'none'  # what the backward pass recomputes, per layer
    attention: Literal['xla', 'cudnn'] = 'xla'  # of passes without a cache; cudnn needs a GPU and bfloat16
    log_prob_chunk: int = 128  # time steps whose [B, chunk, V] logits exist at once

    def __post_init__(self) -> None:
        if self.attention == 'cudnn' and self.dtype != 'bfloat16':
            raise ValueError(f"Execution.attention: 'cudnn' needs dtype 'bfloat16', found dtype {self.dtype!r}")


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens that were fed, `[L, B, K, S, H]` each, in the compute dtype."""

    key: jax.Array
    value: jax.Array

    @property
    def capacity(self) -> int:
        return self.key.shape[3]


def init_cache(config: TransformerConfig, batch_size: int, capacity: int, dtype: str) -> Cache:
    """A cache of zeros for `batch_size` rows of up to `capacity` tokens."""
    shape = (config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim)
    return Cache(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=1 / math.sqrt(fan_in))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def dense(x: jax.Array, weights: jax.Array, adapter: Params | None = None) -> jax.Array:
    """`[B, T, *in]` times `[*in, *out]`: `[B, T, *out]`, as one product of two matrices.

    An adapter `{'a': [*in, rank], 'b': [rank, *out]}` adds x A B, by way of x A.

    The same einsum has the same value, but XLA computes the gradient of its weights, over the two dimensions B and T,
    three times slower on a CPU.
    """
    batch, time, *inner = x.shape
    outer = weights.shape[len(inner) :]
    size = math.prod(inner)
    product = (x.reshape(batch * time, size) @ weights.reshape(size, -1)).reshape(batch, time, *outer)
    return product if adapter is None else product + dense(dense(x, adapter['a']), adapter['b'])


def rope_frequencies(config: TransformerConfig) -> jax.Array:
    """The angle per position of each pair of head dimensions, float32 `[H / 2]` (Su et al. 2021, arXiv:2104.09864).

    With `rope_scaling`, wavelengths longer than the original context are divided by the factor and those in between
    are interpolated, as in Llama 3.1.
    """
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_positions * frequency / (2 * jnp.pi)  # full turns within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequency * (smooth + (1 - smooth) / scaling.factor)


def rotate(x: jax.Array, positions: jax.Array, frequency: jax.Array) -> jax.Array:
    """Applies half-split RoPE: dimension i is paired with i + H/2, as in Hugging Face checkpoints.

    Args:
        x: `[B, T, heads, H]`.
        positions: int32 `[B, T]`.
        frequency: float32 `[H / 2]`.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, K, S, H]`.
        mask: bool `[B, T, S]` or `[1, T, S]`, True where a query may look.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[1], -1, head_dim)
    scores = jnp.einsum('btkgh,bksh->bkgts', grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum('bkgts,bksh->btkgh', weights, value)
    return mixed.reshape(batch, time, heads, head_dim)


class Block(nn.Module):
    """One layer. Its parameters carry logical axis names, which `sharding.py` maps to the mesh."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, positions: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        c = self.config
        dtype = jnp.dtype(self.execution.dtype)
        x, cache = carry

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any) -> jax.Array:
            parameter: Any = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            return parameter.astype(dtype)

        def head_weights(name: str, heads: int, axis: str) -> jax.Array:
            return weight(name, (c.model_dim, heads, c.head_dim), ('embed', axis, 'head_dim'), _normal(c.model_dim))

        def adapter(name: str) -> Params | None:
            return jax.tree.map(lambda part: part.astype(dtype), self.get_variable('adapters', name))

        # Attention.
        normed = rms_norm(x, weight('attention_norm', (c.model_dim,), ('norm',), nn.initializers.ones), c.norm_epsilon)
        query = dense(normed, head_weights('query', c.num_heads, 'heads'), adapter('query'))
        key = dense(normed, head_weights('key', c.num_kv_heads, 'kv_heads'), adapter('key'))
        value = dense(normed, head_weights('value', c.num_kv_heads, 'kv_heads'), adapter('value'))
        if c.qkv_bias:
            zeros = nn.initializers.zeros
            query += weight('query_bias', (c.num_heads, c.head_dim), ('heads', 'head_dim'), zeros)
            key += weight('key_bias', (c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'), zeros)
            value += weight('value_bias', (c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'), zeros)
        if c.qk_norm:
            ones = nn.initializers.ones
            query = rms_norm(query, weight('query_norm', (c.head_dim,), ('norm',), ones), c.norm_epsilon)
            key = rms_norm(key, weight('key_norm', (c.head_dim,), ('norm',), ones), c.norm_epsilon)
        frequency = rope_frequencies(c)
        query, key = rotate(query, positions, frequency), rotate(key, positions, frequency)

        if cache is None:
            mixed = _causal_attention(query, key, value, self.execution.attention)
        else:
            cache = _write(cache, layer, positions, key, value)
            mixed = _attend_to_cache(query, cache, layer, positions)
        output_axes = ('heads', 'head_dim', 'embed')
        output = weight(
            'output', (c.num_heads, c.head_dim, c.model_dim), output_axes, _normal(c.num_heads * c.head_dim)
        )
        x = split_rows(x + dense(mixed, output, adapter('output')))

        # MLP.
        normed = rms_norm(x, weight('mlp_norm', (c.model_dim,), ('norm',), nn.initializers.ones), c.norm_epsilon)
        gate = weight('gate', (c.model_dim, c.mlp_dim), ('embed', 'mlp'), _normal(c.model_dim))
        up = weight('up', (c.model_dim, c.mlp_dim), ('embed', 'mlp'), _normal(c.model_dim))
        down = weight('down', (c.mlp_dim, c.model_dim), ('mlp', 'embed'), _normal(c.mlp_dim))
        gated = nn.silu(dense(normed, gate, adapter('gate'))) * dense(normed, up, adapter('up'))
        x = x + dense(gated, down, adapter('down'))
        return (split_rows(x), cache), None


def _causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str) -> jax.Array:
    """Attention of whole left-aligned rows, each token to itself and those before it; `[B, T, heads, H]` all."""
    if implementation == 'cudnn':
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
    time = query.shape[1]
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    return attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), causal)


def segments(capacity: int) -> list[int]:
    """Lengths of the beginnings of a cache that attention may be computed over: two per octave, and all of it."""
    lengths = [length for k in range(5, 31) for length in (2**k, 3 * 2 ** (k - 1)) if length < capacity]
    return [*lengths, capacity]


def _attend_to_cache(query: jax.Array, cache: Cache, layer: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of `[B, T]` queries to what is cached up to each one's position.

    It costs what the longest row needs and not what the cache could hold: beyond the shortest segment that reaches the
    last query nothing is read.
    """
    lengths = segments(cache.capacity)
    fed = jnp.where(positions < cache.capacity, positions + 1, 0)
    index = jnp.sum(jnp.max(fed) > jnp.array(lengths[:-1], jnp.int32))

    def over(length: int) -> Callable[..., jax.Array]:
        def attend_to_beginning(query: jax.Array, cache: Cache, layer: jax.Array, positions: jax.Array) -> jax.Array:
            num_rows, num_heads, _, head_dim = cache.key.shape[1:]
            size = (1, num_rows, num_heads, length, head_dim)
            key, value = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0] for x in (cache.key, cache.value))
            return attend(query, key, value, jnp.arange(length) <= positions[:, :, None])

        return attend_to_beginning

    return jax.lax.switch(index, [over(length) for length in lengths], query, cache, layer, positions)


def _write(cache: Cache, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array) -> Cache:
    """Writes `[B, T, K, H]` keys and values at their positions; positions at or past the capacity are dropped."""

    def write(cache: Cache, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array) -> Cache:
        row = jnp.arange(positions.shape[0])[:, None]
        return Cache(
            key=cache.key.at[layer, row, :, positions].set(key, mode='drop'),
            value=cache.value.at[layer, row, :, positions].set(value, mode='drop'),
        )

    if not rows_are_split(positions.shape[0]):
        return write(cache, layer, positions, key, value)
    # XLA does not see that every row is written by itself, and would send each device the keys of all rows.
    rows, cache_rows = PartitionSpec('data'), PartitionSpec(None, 'data')
    write_rows = jax.shard_map(
        write, in_specs=(cache_rows, PartitionSpec(), rows, rows, rows), out_specs=cache_rows, axis_names={'data'}
    )
    return write_rows(cache, layer, positions, key, value)


REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """Embedding, scanned layers and the final norm. Use it through `init_params` and `apply`."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        dtype = jnp.dtype(self.execution.dtype)
        embedding_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        embedding_shape = (c.padded_vocab_size, c.model_dim)
        embedding: Any = self.param('embedding', embedding_init, embedding_shape, jnp.float32)
        if not c.tied_embedding:
            self.param('head', embedding_init, embedding_shape, jnp.float32)  # read by `project`
        norm_init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
        final_norm: Any = self.param('final_norm', norm_init, (c.model_dim,), jnp.float32)

        block: Any = Block
        if self.execution.remat != 'none':
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.execution.remat])
        layers = nn.scan(
            block,
            variable_axes={'params': 0, 'adapters': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        x = split_rows(jnp.take(embedding, tokens, axis=0).astype(dtype))
        # The cache travels in the carry: as a scanned input and output it would be restacked at every token.
        carry, _ = layers(c, self.execution, name='layers')((x, cache), jnp.arange(c.num_layers), positions)
        x, cache = carry
        return rms_norm(x, final_norm, c.norm_epsilon), cache


def init_boxed_params(key: jax.Array, config: TransformerConfig) -> Params:
    """Random float32 decoder parameters, each boxed with its logical axis names (for `sharding.py`)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return {'decoder': Decoder(config, Execution()).init(key, tokens, tokens, None)['params']}


def init_params(key: jax.Array, config: TransformerConfig) -> Params:
    """Random float32 parameters `{'decoder': ...}` as a plain nested dict of arrays."""
    return nn.meta.unbox(init_boxed_params(key, config))


def init_head(config: TransformerConfig) -> Params:
    """A scalar head (value or reward) on the hidden states: zeros, so that it starts by predicting 0."""
    return {'kernel': jnp.zeros((config.model_dim,), jnp.float32), 'bias': jnp.zeros((), jnp.float32)}


def apply(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states of `tokens`.

    Args:
        params: the tree of `init_params`, of which `decoder` is read, and of `lora.init`. Any float dtype; cast where
            used.
        tokens: int32 `[B, T]`.
        positions: int32 `[B, T]`, the index of each token in its row; None means 0..T-1. Without a cache it must be
            that. With one, tokens at positions at or past the capacity are not written.
        cache: what earlier calls wrote. A query sees every cached position up to its own.

    Returns:
        hidden: `[B, T, D]` after the final norm, in the compute dtype; and the new cache (None without one).
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    decoder: Any = Decoder(config, execution)  # flax's own type of `apply` is too wide
    variables = {'params': params['decoder']}
    if 'adapters' in params:
        scale = params['adapter_scale']
        adapters = {name: {'a': part['a'], 'b': scale * part['b']} for name, part in params['adapters'].items()}
        variables['adapters'] = {'layers': adapters}
    return decoder.apply(variables, tokens, positions, cache)


def project(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits, float32 `[..., V]`, over the padded vocabulary; the caller masks what may not be sampled."""
    decoder = params['decoder']
    weights = decoder.get('head', decoder['embedding']).astype(hidden.dtype)
    return jnp.einsum('...d,vd->...v', hidden, weights, preferred_element_type=jnp.float32)


def apply_head(head: Params, hidden: jax.Array) -> jax.Array:
    """A scalar per position, float32 `[...]`, of hidden states `[..., D]`."""
    return hidden.astype(jnp.float32) @ head['kernel'] + head['bias']
