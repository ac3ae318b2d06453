"""Memory layouts of a decoder's weights, and products of tokens with them.

Training stacks layers, `[L, *in, *out]`, for a scan over layers. Decoding has separate arrays for each layer
(`layers_apart`), stored output-major on a CPU (`output_major`), and for queries, keys and values as matrices elsewhere
(`flat`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Matrices of a layer, with the number of their leading dimensions that a product sums over (the inputs).
MATRICES: Mapping[str, int] = {'query': 1, 'key': 1, 'value': 1, 'output': 2, 'gate': 1, 'up': 1, 'down': 1}

PRODUCT = 'product'  # checkpoint name of the result of `dense`, for rematerialisation policies
FEW_TOKENS = 128  # most tokens, over all devices, for which a CPU is faster with weights on the left


@flax.struct.dataclass
class OutputMajor:
    """Weights `[*in, *out]` stored as `[*out, *in]`; see `output_major`."""

    array: jax.Array

    def astype(self, dtype: Any) -> 'OutputMajor':
        return OutputMajor(self.array.astype(dtype))

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Multiplies `[tokens, in]` by the weights: `[tokens, out]` in `dtype`, with flat inputs and outputs."""
        matrix = self.array.reshape(-1, x.shape[1])
        if x.shape[0] > FEW_TOKENS:
            return jnp.einsum('ti,oi->to', x, matrix, preferred_element_type=dtype)
        product = jnp.einsum('oi,ti->ot', matrix, x, preferred_element_type=dtype)
        # Without the barrier XLA turns the transposed product into one with swapped operands.
        return jax.lax.optimization_barrier(product).T


@flax.struct.dataclass
class Flat:
    """Weights `[*in, *out]` stored as a matrix `[out, in]`; see `flat`."""

    array: jax.Array

    def astype(self, dtype: Any) -> 'Flat':
        return Flat(self.array.astype(dtype))


Weights = jax.Array | OutputMajor | Flat


def dense(x: jax.Array, weights: Weights, adapter: Any = None) -> jax.Array:
    """Multiplies `[B, T, *in]` by `[*in, *out]`: `[B, T, *out]`, named `PRODUCT` for rematerialisation.

    Outputs of `Flat` weights are flat.

    An adapter `{'a': [*in, rank], 'b': [rank, *out]}` adds (x A) B. The name is on the sum, so the backward pass stores
    the sum and not both of its terms.
    """
    product = _product(x, weights)
    if adapter is not None:
        product += _product(_product(x, adapter['a']), adapter['b'])
    return checkpoint_name(product, PRODUCT)


def _product(x: jax.Array, weights: Weights) -> jax.Array:
    """Multiplies as one product of two matrices.

    An einsum would have the same value, but on a CPU XLA computes its weight gradient, a sum over the two dimensions B
    and T, three times slower.
    """
    batch, time, *inner = x.shape
    size = math.prod(inner)
    tokens = x.reshape(batch * time, size)
    if isinstance(weights, OutputMajor):
        outer, product = weights.array.shape[: -len(inner)], weights.product(tokens, x.dtype)
    elif isinstance(weights, Flat):
        return jnp.einsum('ti,oi->to', tokens, weights.array).reshape(batch, time, -1)
    else:
        outer, product = weights.shape[len(inner) :], tokens @ weights.reshape(size, -1)
    return product.reshape(batch, time, *outer)


def output_matrix(decoder: Any) -> Weights:
    """The matrix that gives logits, `[V, D]`: the head, or the embedding if tied."""
    weights: Weights = decoder.get('head', decoder['embedding'])
    return weights


def stored_array(weights: Weights) -> jax.Array:
    """The array, its dimensions in stored order. The embedding and the head are stored as `[V, D]` in any layout."""
    return weights.array if isinstance(weights, OutputMajor | Flat) else weights


def layers_apart(decoder: Any) -> Any:
    """Splits a decoder's stacked layers into a tuple of layers, for decoding.

    Each layer's weights become separate arrays. Decoding would copy a layer out of stacked weights at every token.
    """
    leaves, structure = jax.tree.flatten(decoder['layers'])
    apart = zip(*(tuple(stacked) for stacked in leaves), strict=True)
    return {**decoder, 'layers': tuple(jax.tree.unflatten(structure, layer) for layer in apart)}


def _inputs_last(weights: jax.Array, num_inputs: int) -> jax.Array:
    return jnp.moveaxis(weights, range(num_inputs), range(-num_inputs, 0))


def output_major(decoder: Any, inputs_last: Callable[[Any, int], Any] = _inputs_last) -> Any:
    """Stores the matrices of a decoder with separate layers as `OutputMajor`, including its embedding or head.

    A CPU's matrix product reads its left operand in place and repacks the right one in every call. With weights on the
    left, a step of 16 tokens takes .7 of the time and one of 64 tokens .9. A step of 256 tokens would take 1.1 times as
    long and one of 1,024 tokens 1.5 times: above `FEW_TOKENS` weights are on the right.

    Args:
        inputs_last: moves a number of leading dimensions of a leaf behind the others.
    """

    def one_layer(layer: Any) -> Any:
        return layer | {name: OutputMajor(inputs_last(layer[name], inputs)) for name, inputs in MATRICES.items()}

    output = 'head' if 'head' in decoder else 'embedding'
    layers = tuple(one_layer(layer) for layer in decoder['layers'])
    return {**decoder, output: OutputMajor(decoder[output]), 'layers': layers}


def _as_matrix(weights: jax.Array, num_inputs: int) -> jax.Array:
    return _inputs_last(weights, num_inputs).reshape(-1, math.prod(weights.shape[:num_inputs]))


def flat(decoder: Any, as_matrix: Callable[[Any, int], Any] = _as_matrix) -> Any:
    """Stores the weights of queries, keys and values of a decoder with separate layers as `Flat`.

    A TPU stores the last two dimensions of an array in tiles, and multiplies fastest if outputs of several heads are
    first. Of weights `[D, N, H]` each program would make such a copy.

    Args:
        as_matrix: makes a matrix of a leaf whose number of input dimensions is given.
    """

    def one_layer(layer: Any) -> Any:
        return layer | {name: Flat(as_matrix(layer[name], MATRICES[name])) for name in ('query', 'key', 'value')}

    return {**decoder, 'layers': tuple(one_layer(layer) for layer in decoder['layers'])}
