"""Decoder-only transformer as pure functions: tokens and a KV cache in, hidden states and the cache out.

One decoder covers Llama, Mistral, SmolLM2, Qwen2/2.5, Qwen3 and OLMo 2 by configuration. Rows are left-aligned: the
position of a token is its index in the row, so padding comes after every real token and the causal mask alone hides it.

Dimension letters, used in every einsum and shape comment:
  B batch, T query time, S cache time, L layers, N query heads, K key/value heads, G = N / K query heads per key/value
  head, H head dimension, D model dimension, F MLP dimension, V vocabulary (padded).
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from simrl.models.attention import Implementation, cached_attention, causal_attention, rotate
from simrl.models.cache import (
    Cache,
    CacheLayout,
    empty_cache,
    heads_axis,
    heads_of_cache,
    repeat_heads,
    write_cache,
)
from simrl.models.chunked_attention import RESULT
from simrl.models.layouts import (
    MATRICES,
    PRODUCT,
    Flat,
    OutputMajor,
    Weights,
    dense,
    layers_apart,
    output_matrix,
    stored_array,
)
from simrl.models.rows import shard_columns, shard_rows
from simrl.run.config import NO_EFFECT

# A nested dict of arrays: {'decoder', 'value_head'?, 'reward_head'?}, and with LoRA (`lora.py`) 'adapters' and
# 'adapter_scale'. The decoder's layout is that of training or of decoding (`layouts.py`).
Params = Any

VOCABULARY_MULTIPLE = 128  # the embedding is padded to this many rows, so that it tiles and shards evenly


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of low RoPE frequencies (`rope_type: llama3` in a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a decoder. Models with equal configs have equal parameter trees."""

    vocab_size: int  # rows of the embedding without padding
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int  # positions that the model was made for; see `max_row_tokens`
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a query attends to, its own included; Mistral. None: all
    norm_epsilon: float = 1e-5
    norm_placement: Literal['before', 'after'] = 'before'  # of attention and MLP; after in OLMo 2
    qk_norm: Literal['none', 'head', 'all_heads'] = 'none'  # numbers normed together: Qwen3 a head's, OLMo 2 all heads'
    biases: tuple[str, ...] = ()  # matrices with a bias, in the order of `MATRICES`; query, key and value in Qwen2
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
        if self.biases != tuple(name for name in MATRICES if name in self.biases):
            raise ValueError(
                f'TransformerConfig.biases: expected names of {", ".join(MATRICES)}, in this order, '
                f'found {", ".join(self.biases)}'
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f'TransformerConfig.sliding_window: expected at least 1, or None, found {self.sliding_window}'
            )

    @property
    def max_row_tokens(self) -> int:
        """Most tokens per row. The window holds every token of such a row, so attention is computed without it."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    @property
    def row_limit(self) -> str:
        """`max_row_tokens` in errors, with the name of the field that decides it."""
        if self.max_row_tokens == self.max_positions:
            return f'max_positions={self.max_positions}'
        return f'sliding_window={self.sliding_window} (of max_positions={self.max_positions})'

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execution of the decoder: speed, memory and rounding. It does not change what is computed."""

    # Of activations and matrix products; parameters are float32.
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    # Recomputed in backward passes; dots: all but outputs of `dense` and of chunked attention.
    remat: Literal['none', 'full', 'dots'] = dataclasses.field(default='none', metadata=NO_EFFECT)
    # Implementation (`attention.py`); splash: a TPU; cudnn: a GPU and bfloat16.
    attention: Implementation = dataclasses.field(default='auto', metadata=NO_EFFECT)
    log_prob_chunk: int = dataclasses.field(default=512, metadata=NO_EFFECT)  # trained positions with logits at once

    def __post_init__(self) -> None:
        if self.attention == 'cudnn' and self.dtype != 'bfloat16':
            raise ValueError(f"Execution.attention: 'cudnn' needs dtype 'bfloat16', found dtype {self.dtype!r}")


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=1 / math.sqrt(fan_in))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last axes, those of `scale`, computed in float32."""
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def rope_frequencies(config: TransformerConfig) -> jax.Array:
    """RoPE angle per position of each pair of head dimensions, float32 `[H / 2]`.

    With `rope_scaling`, low frequencies are divided by the factor and middle ones are interpolated, as in Llama 3.1.
    """
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    rotations = scaling.original_max_positions * frequency / (2 * jnp.pi)  # over the original context
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequency * (smooth + (1 - smooth) / scaling.factor)


class Block(nn.Module):
    """One layer. Its parameters have logical axis names, which `sharding.py` maps to the mesh."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        layout: CacheLayout = 'heads_first',
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Maps `[B, T, D]` to `[B, T, D]`; `cache` is the layer's keys and values, returned with the new tokens."""
        c = self.config
        dtype = jnp.dtype(self.execution.dtype)

        def weight(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Any) -> Any:  # Weights
            found: Any = self.get_variable('params', name)
            if not isinstance(found, OutputMajor | Flat):  # `param` checks the shape, which differs in these
                found = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            return found.astype(dtype)

        sizes = {
            'embed': c.model_dim,
            'heads': c.num_heads,
            'kv_heads': c.num_kv_heads,
            'head_dim': c.head_dim,
            'mlp': c.mlp_dim,
        }

        # `axes` are the logical axes of the named weights.
        def linear(name: str, x: jax.Array, *axes: str) -> jax.Array:
            shape, num_inputs = tuple(sizes[axis] for axis in axes), MATRICES[name]
            weights: Weights = weight(name, shape, axes, _normal(math.prod(shape[:num_inputs])))
            adapter = jax.tree.map(lambda part: part.astype(dtype), self.get_variable('adapters', name))
            product = dense(x, weights, adapter).reshape(*x.shape[:2], *shape[num_inputs:])
            if name in c.biases:
                # 'embed' is sharded in training. A vector is small: replicated, as those of norms.
                outputs = tuple('norm' if axis == 'embed' else axis for axis in axes[num_inputs:])
                product += weight(f'{name}_bias', shape[num_inputs:], outputs, nn.initializers.zeros)
            return product

        def norm(name: str, x: jax.Array, *axes: str) -> jax.Array:
            return rms_norm(x, weight(name, x.shape[-len(axes) :], axes, nn.initializers.ones), c.norm_epsilon)

        def placed_norm(placement: str, name: str, x: jax.Array) -> jax.Array:
            return norm(name, x, 'norm') if c.norm_placement == placement else x

        with jax.named_scope('attention'):
            inputs = placed_norm('before', 'attention_norm', x)
            query = linear('query', inputs, 'embed', 'heads', 'head_dim')
            key = linear('key', inputs, 'embed', 'kv_heads', 'head_dim')
            value = linear('value', inputs, 'embed', 'kv_heads', 'head_dim')
            if c.qk_norm == 'head':
                query, key = norm('query_norm', query, 'norm'), norm('key_norm', key, 'norm')
            elif c.qk_norm == 'all_heads':
                query = norm('query_norm', query, 'heads', 'head_dim')
                key = norm('key_norm', key, 'kv_heads', 'head_dim')
            frequency = rope_frequencies(c)
            query, key = rotate(query, positions, frequency), rotate(key, positions, frequency)

            if cache is None:
                mixed = causal_attention(query, key, value, self.execution.attention)
            else:
                heads = cache[1].shape[heads_axis(layout)]
                key, value = (repeat_heads(new, heads) for new in (key, value))
                cache = write_cache(*cache, positions, key, value, layout)
                mixed = cached_attention(query, key, value, *cache, positions, self.execution.attention, layout)
            output = linear('output', mixed, 'heads', 'head_dim', 'embed')
            x = shard_rows(x + placed_norm('after', 'attention_norm', output))

        with jax.named_scope('mlp'):
            inputs = placed_norm('before', 'mlp_norm', x)
            gate, up = linear('gate', inputs, 'embed', 'mlp'), linear('up', inputs, 'embed', 'mlp')
            down = linear('down', nn.silu(gate) * up, 'mlp', 'embed')
            x = shard_rows(x + placed_norm('after', 'mlp_norm', down))
        return x, cache


REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT, RESULT),
}


class Decoder(nn.Module):
    """Embedding, scanned layers and final norm over whole rows. Use it through `init_params` and `apply`."""

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
        x = shard_rows(shard_columns(_embed(embedding, tokens, self.execution)))
        x, _ = layers(c, self.execution, name='layers')(x, positions, None)
        return rms_norm(x, final_norm, c.norm_epsilon)


def _embed(embedding: Weights, tokens: jax.Array, execution: Execution) -> jax.Array:
    return jnp.take(stored_array(embedding), tokens, axis=0).astype(jnp.dtype(execution.dtype))


def _apply_by_layer(
    variables: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """Computes `Decoder` in a loop over layers, for decoding.

    A scan would copy each layer's weights and cache out of stacked arrays at every token; separate arrays are read and
    updated in place. Both passes run the same `Block`.
    """
    decoder = variables['params']
    if not isinstance(decoder['layers'], tuple):
        decoder = layers_apart(decoder)
    adapters = layers_apart(variables['adapters'])['layers'] if 'adapters' in variables else None
    block: Any = Block(config, execution)
    x = shard_rows(_embed(decoder['embedding'], tokens, execution))
    written = []
    for layer, weights in enumerate(decoder['layers']):
        own = {'params': weights} if adapters is None else {'params': weights, 'adapters': adapters[layer]}
        layer_cache = None if cache is None else (cache.key[layer], cache.value[layer])
        layout = () if cache is None else (cache.layout,)
        x, layer_cache = block.apply(own, x, positions, layer_cache, *layout)
        written.append(layer_cache)
    if cache is not None:
        keys, values = zip(*written, strict=True)
        cache = dataclasses.replace(cache, key=keys, value=values)
    return rms_norm(x, decoder['final_norm'], config.norm_epsilon), cache


def init_boxed_params(key: jax.Array, config: TransformerConfig) -> Params:
    """Initialises random float32 decoder parameters, each boxed with its logical axis names (for `sharding.py`)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return {'decoder': Decoder(config, Execution()).init(key, tokens, tokens)['params']}


def init_params(key: jax.Array, config: TransformerConfig) -> Params:
    """Initialises random float32 parameters `{'decoder': ...}`, a nested dict of arrays."""
    return nn.meta.unbox(init_boxed_params(key, config))


def init_cache(config: TransformerConfig, batch_size: int, capacity: int, dtype: str) -> Cache:
    """Makes a cache of zeros for `batch_size` rows of up to `capacity` tokens, on the mesh that is set."""
    devices = jax.sharding.get_abstract_mesh().shape.get('model', 1)
    heads = heads_of_cache(config.num_heads, config.num_kv_heads, devices)
    return empty_cache(config.num_layers, batch_size, capacity, heads, config.head_dim, dtype)


def init_head(config: TransformerConfig) -> Params:
    """Initialises a scalar head (value or reward) with zeros: it predicts 0."""
    return {'kernel': jnp.zeros((config.model_dim,), jnp.float32), 'bias': jnp.zeros((), jnp.float32)}


def apply(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Computes hidden states of `tokens`.

    Args:
        params: as from `init_params`, with stacked layers, or as from `placement.for_sampling` (never rematerialised);
            perhaps with adapters as from `lora.init`. Weights of any float dtype are cast where they are used.
        tokens: int32 `[B, T]`.
        positions: int32 `[B, T]`, index of each token in its row. None means 0..T-1, the only choice without a cache.
            Those of a row's tokens rise by 1. At positions at or past the cache's capacity nothing is written: padding.
        cache: result of earlier calls. A query attends to every cached position up to its own. Time grows with the
            capacity: see `cache_prefix`.

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
        return _apply_by_layer(variables, config, execution, tokens, positions, cache)
    decoder: Any = Decoder(config, execution)  # flax types the result of `apply` too widely
    return decoder.apply(variables, tokens, positions), None


def project(params: Params, hidden: jax.Array) -> jax.Array:
    """Computes logits, float32 `[..., V]`, over the padded vocabulary; the caller masks forbidden tokens."""
    weights = output_matrix(params['decoder']).astype(hidden.dtype)
    if isinstance(weights, OutputMajor):
        logits = weights.product(hidden.reshape(-1, hidden.shape[-1]), jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)
    return jnp.einsum('...d,vd->...v', hidden, weights, preferred_element_type=jnp.float32)


def apply_head(head: Params, hidden: jax.Array) -> jax.Array:
    """Computes a scalar per position, float32 `[...]`, from hidden states `[..., D]`."""
    return hidden.astype(jnp.float32) @ head['kernel'] + head['bias']
