"""LoRA (Hu et al. 2021, arXiv:2106.09685): trains a low-rank addition to frozen weights.

In place of a product with W `[in, out]`, a layer computes with A `[in, rank]` and B `[rank, out]` (section 4.1)

    x W + (alpha / rank) (x A) B

1. `init`: A is random and B zero, so training starts from exactly the base model.
2. `transformer.apply` adds the product if params have `adapters`. W is not differentiated: a step computes no gradient
   of its size.
3. `merged` makes one ordinary decoder, once per iteration for sampling and once at the end for files.

A number of W takes the bytes of the compute dtype. A number of A or B takes 16 bytes, like any trained weight: float32
weight, gradient and Adam's two moments.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.layouts import MATRICES
from simrl.models.transformer import Params, TransformerConfig

TARGETS: Mapping[str, int] = MATRICES  # weights that can have adapters, [L, *in, *out] each
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """Adapters, the same in every layer."""

    rank: int  # inner dimension of A B
    alpha: float  # A B is multiplied by alpha / rank
    targets: tuple[str, ...] = tuple(TARGETS)  # names of the weights that have an adapter

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f'LoRASettings.rank: expected at least 1, found {self.rank}')
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f'LoRASettings.alpha: expected a number above 0, found {self.alpha}')
        wrong = [name for name in self.targets if name not in TARGETS or self.targets.count(name) > 1]
        if wrong or not self.targets:
            raise ValueError(
                f'LoRASettings.targets: expected at least one of {", ".join(TARGETS)}, none twice, found '
                f'{(wrong[0] if wrong else self.targets)!r}'
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapter_dims(name: str, dims: tuple[T, ...], rank: T) -> dict[str, tuple[T, ...]]:
    """Derives the dimensions of an adapter, as sizes or axis names.

    Args:
        name: of the weights.
        dims: of the stacked weights: layers, then [*in, *out].
        rank: size or name of the rank's dimension.

    Returns:
        `a`: [layers, *in, rank], `b`: [layers, rank, *out].
    """
    first_out = 1 + TARGETS[name]
    return {'a': (*dims[:first_out], rank), 'b': (dims[0], rank, *dims[first_out:])}


def init(key: jax.Array, config: TransformerConfig, settings: LoRASettings) -> Params:
    """Initialises adapters that add zero, float32 `{target: {'a', 'b'}}`: A is Gaussian and B zero (section 4.1).

    The variance of A is 1 / in, so x A has the variance of x. An adapter's values do not depend on other targets.
    """
    shapes = jax.eval_shape(functools.partial(transformer.init_params, config=config), jax.random.key(0))
    adapters = {}
    for index, name in enumerate(TARGETS):
        if name in settings.targets:
            dims = adapter_dims(name, shapes['decoder']['layers'][name].shape, settings.rank)
            normal = jax.random.normal(jax.random.fold_in(key, index), dims['a'], jnp.float32)
            adapters[name] = {
                'a': normal / math.sqrt(math.prod(dims['a'][1:-1])),
                'b': jnp.zeros(dims['b'], jnp.float32),
            }
    return adapters


def merged(params: Params, dtype: str) -> Params:
    """The params' decoder alone, `{'decoder'}` in `dtype`, its adapters, if any, added to its weights. Pure.

    The sum is taken in float32, at full precision and layer by layer, and rounded once.
    """
    decoder = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params['decoder'])
    if 'adapters' not in params:
        return {'decoder': decoder}
    scale = params['adapter_scale']

    def add(parts: tuple[jax.Array, Params]) -> jax.Array:
        weights, adapter = parts
        rank = adapter['b'].shape[0]
        product = jnp.matmul(adapter['a'].reshape(-1, rank), adapter['b'].reshape(rank, -1), precision='highest')
        return (weights.astype(jnp.float32) + scale * product.reshape(weights.shape)).astype(jnp.dtype(dtype))

    layers = params['decoder']['layers']
    changed = {name: jax.lax.map(add, (layers[name], adapter)) for name, adapter in params['adapters'].items()}
    return {'decoder': {**decoder, 'layers': {**decoder['layers'], **changed}}}
