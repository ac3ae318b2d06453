"""How a decoder's weights lie, and the product of tokens with them.

Training has them stacked, `[L, *in, *out]`, for a scan over layers. For decoding, layers are apart (`layers_apart`) and
on a CPU outputs come first (`output_major`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The matrices of a layer: over how many of their dimensions, the first, a product sums. The others are the output's.
MATRICES: Mapping[str, int] = {'query': 1, 'key': 1, 'value': 1, 'output': 2, 'gate': 1, 'up': 1, 'down': 1}

PRODUCT = 'product'  # what `dense` gives is called this, for policies of rematerialisation
FEW_TOKENS = 256  # up to which a CPU is faster with weights on the left; of all devices


@flax.struct.dataclass
class OutputMajor:
    """Weights `[*in, *out]` that lie as `[*out, *in]`; see `output_major`."""

    array: jax.Array

    def astype(self, dtype: Any) -> 'OutputMajor':
        return OutputMajor(self.array.astype(dtype))

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """`[tokens, in]` times the weights: `[tokens, out]` in `dtype`, in and out as one dimension each."""
        matrix = self.array.reshape(-1, x.shape[1])
        if x.shape[0] > FEW_TOKENS:
            return jnp.einsum('ti,oi->to', x, matrix, preferred_element_type=dtype)
        product = jnp.einsum('oi,ti->ot', matrix, x, preferred_element_type=dtype)
        # Without a barrier XLA makes the transposed product one of swapped operands.
        return jax.lax.optimization_barrier(product).T


Weights = jax.Array | OutputMajor


def dense(x: jax.Array, weights: Weights, adapter: Any = None) -> jax.Array:
    """`[B, T, *in]` times `[*in, *out]`: `[B, T, *out]`, a `PRODUCT`.

    An adapter `{'a': [*in, rank], 'b': [rank, *out]}` adds x A B, by way of x A. The sum is called `PRODUCT`, so that
    it is kept for the backward pass and not both of its parts.
    """
    product = _product(x, weights)
    if adapter is not None:
        product += _product(_product(x, adapter['a']), adapter['b'])
    return checkpoint_name(product, PRODUCT)


def _product(x: jax.Array, weights: Weights) -> jax.Array:
    """One product of two matrices.

    The same einsum has the same value, but XLA computes the gradient of its weights, over the two dimensions B and T,
    three times slower on a CPU.
    """
    batch, time, *inner = x.shape
    size = math.prod(inner)
    tokens = x.reshape(batch * time, size)
    if isinstance(weights, OutputMajor):
        outer, product = weights.array.shape[: -len(inner)], weights.product(tokens, x.dtype)
    else:
        outer, product = weights.shape[len(inner) :], tokens @ weights.reshape(size, -1)
    return product.reshape(batch, time, *outer)


def output_matrix(decoder: Any) -> Weights:
    """What logits are made with, `[V, D]`: a head, or the embedding."""
    weights: Weights = decoder.get('head', decoder['embedding'])
    return weights


def as_it_lies(weights: Weights) -> jax.Array:
    """The array, its dimensions in the order that they have in memory; that of the embedding is `[V, D]` always."""
    return weights.array if isinstance(weights, OutputMajor) else weights


def layers_apart(decoder: Any) -> Any:
    """A decoder's tree with a tuple of layers in place of their stacked weights: what decoding reads.

    One layer's weights are then arrays of their own. Of stacked ones every use at one token would be a copy.
    """
    leaves, structure = jax.tree.flatten(decoder['layers'])
    apart = zip(*(tuple(stacked) for stacked in leaves), strict=True)
    return {**decoder, 'layers': tuple(jax.tree.unflatten(structure, layer) for layer in apart)}


def _inputs_last(weights: jax.Array, num_inputs: int) -> jax.Array:
    return jnp.moveaxis(weights, range(num_inputs), range(-num_inputs, 0))


def output_major(decoder: Any, inputs_last: Callable[[Any, int], Any] = _inputs_last) -> Any:
    """A decoder's tree with layers apart, whose matrices are `OutputMajor`, the embedding or head among them.

    A CPU's product takes its left operand as it lies and packs the right one anew in every call. With weights on the
    left the products of a step of 16 tokens take .55 of the time, those of 64 tokens .8. Those of 1,024 would take 1.4
    times as long: above `FEW_TOKENS` weights are on the right again.

    Args:
        inputs_last: puts so many of a leaf's dimensions, the first, behind the others.
    """

    def of_layer(layer: Any) -> Any:
        return layer | {name: OutputMajor(inputs_last(layer[name], inputs)) for name, inputs in MATRICES.items()}

    output = 'head' if 'head' in decoder else 'embedding'
    layers = tuple(of_layer(layer) for layer in decoder['layers'])
    return {**decoder, output: OutputMajor(decoder[output]), 'layers': layers}
