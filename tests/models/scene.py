"""A tiny decoder that has everything a decoder can have, and rows for it."""

import math
from collections.abc import Callable
from typing import Any

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
    biases=('query', 'key', 'value'),
    qk_norm='head',
)
ROWS, TIME = 3, 16
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 100, (ROWS, TIME)), jnp.int32)


def numbers_kept(loss: Callable[[Any], jax.Array], params: Any, leading: tuple[int, int, int]) -> int:
    """Counts the numbers that the forward pass keeps for the backward pass in arrays `[L, B, T, ...]`."""
    backward = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward) if leaf.shape[:3] == leading)


def random_params(config: TransformerConfig = CONFIG) -> Params:
    """Random params of which none, bias or norm, is at its neutral initial value."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.2, 0.3, leaf.shape), jnp.float32), shapes)
