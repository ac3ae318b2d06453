"""The decoder-only transformer as pure functions: tokens and a KV cache in, hidden states and the cache out.

One decoder covers Llama 3, Mistral, SmolLM2, Qwen2/2.5 and Qwen3 by configuration. Rows are left-aligned: the position
of a token is its index in the row, so padding lies after every real token and causal masking alone hides it.

Dimension letters, used in every einsum and shape comment:
  B batch, T query time, S cache time, L layers, N query heads, K key/value heads, G = N / K query heads per key/value
  head, H head dimension, D model dimension, F MLP dimension, V vocabulary (padded).
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from simrl.models.layouts import PRODUCT, OutputMajor, Weights, as_it_lies, dense, layers_apart, output_matrix
from simrl.models.rows import shard_rows

# A nested dict of arrays: {'decoder', 'value_head'?, 'reward_head'?}, and with LoRA (`lora.py`) 'adapters' and their
# 'adapter_scale' as well. What decoding reads lies as `weights.py` says.
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
    """Execution of the decoder: speed, memory and rounding. It does not change what is computed."""

    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matrix products; parameters are float32
    remat: Literal['none', 'full', 'dots'] = 'none'  # recomputed in backward passes; dots: all but outputs of `dense`
    attention: Literal['xla', 'cudnn'] = 'xla'  # implementation in passes without a cache; cudnn: a GPU and bfloat16
    log_prob_chunk: int = 512  # trained positions whose [chunk, V] logits exist at once

    def __post_init__(self) -> None:
        if self.attention == 'cudnn' and self.dtype != 'bfloat16':
            raise ValueError(f"Execution.attention: 'cudnn' needs dtype 'bfloat16', found dtype {self.dtype!r}")


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens that were fed, an array per layer, in the compute dtype.

    Layers are apart so that each is written in place, and keys are transposed so that attention's two products read
    what lies in memory as they need it.

    Attributes:
        key: L arrays `[B, K, H, S]`.
        value: L arrays `[B, K, S, H]`.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]

    @property
    def capacity(self) -> int:
        return self.value[0].shape[2]


def init_cache(config: TransformerConfig, batch_size: int, capacity: int, dtype: str) -> Cache:
    """A cache of zeros for `batch_size` rows of up to `capacity` tokens."""
    rows = (batch_size, config.num_kv_heads)
    return Cache(
        key=tuple(jnp.zeros((*rows, config.head_dim, capacity), dtype) for _ in range(config.num_layers)),
        value=tuple(jnp.zeros((*rows, capacity, config.head_dim), dtype) for _ in range(config.num_layers)),
    )


def extended(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens, at least those that it has room for."""
    more = (0, capacity - cache.capacity)
    return Cache(
        key=tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), more)) for x in cache.key),
        value=tuple(jnp.pad(x, ((0, 0), (0, 0), more, (0, 0))) for x in cache.value),
    )


def beginning(cache: Cache, capacity: int) -> Cache:
    """The cache of the first `capacity` positions: attention over it costs as much less."""
    return Cache(
        key=tuple(x[:, :, :, :capacity] for x in cache.key), value=tuple(x[:, :, :capacity] for x in cache.value)
    )


def with_beginning(cache: Cache, first: Cache) -> Cache:
    """Undoes `beginning`: the cache with its first positions as they are in `first`."""
    origin = (0, 0, 0, 0)
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, origin), cache, first)


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=1 / math.sqrt(fan_in))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


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

    The query heads of a key/value head are rows of one product with it: a batched product of matrices, which any
    backend has a fast form of.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, K, H, S]`.
        value: `[B, K, S, H]`.
        mask: bool `[B, T, S]` or `[1, T, S]`, True where a query may look.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, size = value.shape[1:3]
    grouped = query.reshape(batch, time, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)  # [B, K, G T, H]
    scores = jnp.matmul(rows, key, preferred_element_type=jnp.float32).reshape(batch, kv_heads, -1, time, size)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.matmul(weights.reshape(batch, kv_heads, -1, size), value)
    mixed = mixed.reshape(batch, kv_heads, -1, time, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, time, heads, head_dim)


class Block(nn.Module):
    """One layer. Its parameters carry logical axis names, which `sharding.py` maps to the mesh."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """`[B, T, D]` to `[B, T, D]`; `cache` is what the layer has of a `Cache`, and comes back written."""
        c = self.config
        dtype = jnp.dtype(self.execution.dtype)

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any) -> Any:  # Weights
            held: Any = self.get_variable('params', name)
            if not isinstance(held, OutputMajor):  # whose shape is not the one that `param` checks
                held = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            return held.astype(dtype)

        def head_weights(name: str, heads: int, axis: str) -> Weights:
            return weight(name, (c.model_dim, heads, c.head_dim), ('embed', axis, 'head_dim'), _normal(c.model_dim))

        def adapter(name: str) -> Params | None:
            return jax.tree.map(lambda part: part.astype(dtype), self.get_variable('adapters', name))

        with jax.named_scope('attention'):
            ones, zeros = nn.initializers.ones, nn.initializers.zeros
            normed = rms_norm(x, weight('attention_norm', (c.model_dim,), ('norm',), ones), c.norm_epsilon)
            query = dense(normed, head_weights('query', c.num_heads, 'heads'), adapter('query'))
            key = dense(normed, head_weights('key', c.num_kv_heads, 'kv_heads'), adapter('key'))
            value = dense(normed, head_weights('value', c.num_kv_heads, 'kv_heads'), adapter('value'))
            if c.qkv_bias:
                query += weight('query_bias', (c.num_heads, c.head_dim), ('heads', 'head_dim'), zeros)
                key += weight('key_bias', (c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'), zeros)
                value += weight('value_bias', (c.num_kv_heads, c.head_dim), ('kv_heads', 'head_dim'), zeros)
            if c.qk_norm:
                query = rms_norm(query, weight('query_norm', (c.head_dim,), ('norm',), ones), c.norm_epsilon)
                key = rms_norm(key, weight('key_norm', (c.head_dim,), ('norm',), ones), c.norm_epsilon)
            frequency = rope_frequencies(c)
            query, key = rotate(query, positions, frequency), rotate(key, positions, frequency)

            if cache is None:
                mixed = _causal_attention(query, key, value, self.execution.attention)
            else:
                cache = _write(*cache, positions, key, value)
                fed = jnp.arange(cache[1].shape[2]) <= positions[:, :, None]
                mixed = attend(query, *cache, fed)
            output_axes = ('heads', 'head_dim', 'embed')
            output = weight(
                'output', (c.num_heads, c.head_dim, c.model_dim), output_axes, _normal(c.num_heads * c.head_dim)
            )
            x = shard_rows(x + dense(mixed, output, adapter('output')))

        with jax.named_scope('mlp'):
            normed = rms_norm(x, weight('mlp_norm', (c.model_dim,), ('norm',), ones), c.norm_epsilon)
            gate = weight('gate', (c.model_dim, c.mlp_dim), ('embed', 'mlp'), _normal(c.model_dim))
            up = weight('up', (c.model_dim, c.mlp_dim), ('embed', 'mlp'), _normal(c.model_dim))
            down = weight('down', (c.mlp_dim, c.model_dim), ('mlp', 'embed'), _normal(c.mlp_dim))
            gated = nn.silu(dense(normed, gate, adapter('gate'))) * dense(normed, up, adapter('up'))
            x = shard_rows(x + dense(gated, down, adapter('down')))
        return x, cache


def _causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, implementation: str) -> jax.Array:
    """Attention of whole left-aligned rows, each token to itself and those before it; `[B, T, heads, H]` all."""
    if implementation == 'cudnn':
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='cudnn')
    time = query.shape[1]
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    return attend(query, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), causal)


def _write(
    keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's cache with `[B, T, K, H]` keys and values at their positions; from the capacity on they are dropped."""

    def write(
        keys: jax.Array, values: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return (
            keys.at[:, :, positions].set(key.transpose(1, 2, 0), mode='drop'),
            values.at[:, positions].set(value.swapaxes(0, 1), mode='drop'),
        )

    # Mapped over rows, the writes say that rows are apart. Of an index of rows XLA cannot tell, and would send each
    # device the keys of all.
    return jax.vmap(write)(keys, values, positions, key, value)


REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class Decoder(nn.Module):
    """Embedding, scanned layers and the final norm, of whole rows. Use it through `init_params` and `apply`."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
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
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        x, _ = layers(c, self.execution, name='layers')(_embed(embedding, tokens, self.execution), positions, None)
        return rms_norm(x, final_norm, c.norm_epsilon)


def _embed(embedding: Weights, tokens: jax.Array, execution: Execution) -> jax.Array:
    return shard_rows(jnp.take(as_it_lies(embedding), tokens, axis=0).astype(jnp.dtype(execution.dtype)))


def _apply_one_by_one(
    variables: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """What `Decoder` computes, layer by layer: each has its own weights and its own cache, and nothing is scanned."""
    decoder = variables['params']
    if not isinstance(decoder['layers'], tuple):
        decoder = layers_apart(decoder)
    adapters = layers_apart(variables['adapters'])['layers'] if 'adapters' in variables else None
    block: Any = Block(config, execution)
    x = _embed(decoder['embedding'], tokens, execution)
    written = []
    for layer, weights in enumerate(decoder['layers']):
        own = {'params': weights} if adapters is None else {'params': weights, 'adapters': adapters[layer]}
        layer_cache = None if cache is None else (cache.key[layer], cache.value[layer])
        x, layer_cache = block.apply(own, x, positions, layer_cache)
        written.append(layer_cache)
    if cache is not None:
        keys, values = zip(*written, strict=True)
        cache = Cache(key=keys, value=values)
    return rms_norm(x, decoder['final_norm'], config.norm_epsilon), cache


def init_boxed_params(key: jax.Array, config: TransformerConfig) -> Params:
    """Random float32 decoder parameters, each boxed with its logical axis names (for `sharding.py`)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return {'decoder': Decoder(config, Execution()).init(key, tokens, tokens)['params']}


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
        params: the tree of `init_params`, of which `decoder` is read, its layers stacked, or as
            `placement.for_sampling` gives them (never rematerialised), and of `lora.init`. Any float dtype; cast where
            used.
        tokens: int32 `[B, T]`.
        positions: int32 `[B, T]`, the index of each token in its row; None means 0..T-1. Without a cache it must be
            that. With one, tokens at positions at or past the capacity are not written.
        cache: what earlier calls wrote. A query sees every cached position up to its own; the time it takes grows with
            the capacity: see `beginning`.

    Returns:
        hidden: `[B, T, D]` after the final norm, in the compute dtype; and the new cache (None without one).
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    variables = {'params': params['decoder']}
    if 'adapters' in params:
        scale = params['adapter_scale']
        adapters = {name: {'a': part['a'], 'b': scale * part['b']} for name, part in params['adapters'].items()}
        variables['adapters'] = {'layers': adapters}
    if cache is not None or isinstance(params['decoder']['layers'], tuple):
        return _apply_one_by_one(variables, config, execution, tokens, positions, cache)
    decoder: Any = Decoder(config, execution)  # flax's own type of `apply` is too wide
    return decoder.apply(variables, tokens, positions), None


def project(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits, float32 `[..., V]`, over the padded vocabulary; the caller masks what may not be sampled."""
    weights = output_matrix(params['decoder']).astype(hidden.dtype)
    if isinstance(weights, OutputMajor):
        logits = weights.product(hidden.reshape(-1, hidden.shape[-1]), jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)
    return jnp.einsum('...d,vd->...v', hidden, weights, preferred_element_type=jnp.float32)


def apply_head(head: Params, hidden: jax.Array) -> jax.Array:
    """A scalar per position, float32 `[...]`, of hidden states `[..., D]`."""
    return hidden.astype(jnp.float32) @ head['kernel'] + head['bias']
