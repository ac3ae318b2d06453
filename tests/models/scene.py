"""A tiny decoder that has everything a decoder can have, and rows for it."""

import jax
import jax.numpy as jnp
import numpy as np

from simrl.models.transformer import Params, TransformerConfig, init_params

CONFIG = TransformerConfig(
    vocab_size=100,
    model_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
)
ROWS, TIME = 3, 16
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 100, (ROWS, TIME)), jnp.int32)


def random_params(config: TransformerConfig = CONFIG) -> Params:
    """Random params of which none, bias or norm, is at its neutral initial value."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.2, 0.3, leaf.shape), jnp.float32), shapes)
