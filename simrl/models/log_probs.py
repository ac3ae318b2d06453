"""Log-probabilities and entropies at the positions that predict a trained token, at a cost linear in their number.

1. The positions are listed in the order of the batch.
2. A loop over chunks of the list computes logits and stores two numbers per position.
3. The backward pass loops over the same chunks and recomputes their logits, so no `[B, T, V]` array exists.

With p the softmax of the tempered logits z = hidden . weights / temperature over the allowed tokens V, log Z their
log-sum-exp and t the target:

    log p_t = z_t - log Z            d log p_t / dz_v = [v = t] - p_v
    H = -sum_v p_v log p_v           dH / dz_v = -sum_u (dp_u / dz_v) (log p_u + 1) = -p_v (log p_v + H)

(with dp_u / dz_v = p_u ([u = v] - p_v), and the 1 drops out as the p_u sum to one.)

JAX cannot differentiate a loop in reverse if its number of iterations depends on data. So the VJP is written by hand.

Besides the letters of `transformer.py`: P positions in the list (with its padding), C positions of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from simrl.models.layouts import output_matrix, stored_array
from simrl.models.rows import num_shards
from simrl.models.transformer import Params


@jax.named_scope('log_probs')
def token_log_probs(
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    trained: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Computes each target's log-probability, and the entropy, under the tempered distribution over allowed tokens.

    Gradients flow to `hidden` and to the embedding or head, but not to the temperature. The gradient of the weights is
    computed only if it is asked for.

    Args:
        hidden: `[B, T, D]`, where `hidden[:, t]` predicts `targets[:, t]`.
        targets: int32 `[B, T]`.
        trained: bool `[B, T]`, True at positions to compute.
        token_mask: bool `[V]`, the sampler's mask: tokens outside it have probability 0.
        temperature: a scalar or float32 `[B]`.
        chunk: number of positions per device whose logits exist at once.

    Returns:
        log_prob, entropy: float32 `[B, T]`, in nats, 0 where not trained. A target that is not allowed has
        log-probability -inf.
    """
    weights = stored_array(output_matrix(params['decoder']))
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape[:1])
    rows = _Rows(jnp.asarray(targets), jnp.asarray(trained), jax.lax.stop_gradient(temperature))
    return _log_probs(jnp.asarray(weights), jnp.asarray(hidden), rows, jnp.asarray(token_mask), chunk)


class _Rows(NamedTuple):
    """Inputs for each row besides its hidden states; see `token_log_probs`."""

    targets: jax.Array  # int32 [B, T]
    trained: jax.Array  # bool [B, T]
    temperature: jax.Array  # float32 [B]


class _Chunk(NamedTuple):
    """Up to C positions of the list; past its end hidden states are 0 and indices B * T."""

    indices: jax.Array  # int32 [C], into the flat B * T positions
    hidden: jax.Array  # [C, D]
    target: jax.Array  # int32 [C]
    temperature: jax.Array  # float32 [C, 1]
    start: jax.Array  # int32 scalar, index of the chunk's first position in the list


class _Positions(NamedTuple):
    """The list of trained positions."""

    indices: jax.Array  # int32 [P], into the flat B * T positions; B * T past the list's end
    num_chunks: jax.Array  # int32 scalar, chunks that cover the list
    chunk: int  # positions per chunk, C

    @classmethod
    def of(cls, trained: jax.Array, chunk: int, axis: str | None) -> '_Positions':
        size = min(chunk, trained.size)
        indices = jnp.flatnonzero(trained, size=-(-trained.size // size) * size, fill_value=trained.size)
        num_chunks = (jnp.sum(trained, dtype=jnp.int32) + size - 1) // size
        # All devices loop equally often: in the loop, devices along the mesh's other axis exchange parts of logits.
        return cls(indices.astype(jnp.int32), num_chunks if axis is None else jax.lax.pmax(num_chunks, axis), size)

    def gather(self, number: jax.Array, hidden: jax.Array, rows: _Rows) -> _Chunk:
        start = number * self.chunk
        indices = jax.lax.dynamic_slice(self.indices, (start,), (self.chunk,))
        flat = hidden.reshape(-1, hidden.shape[-1])
        return _Chunk(
            indices=indices,
            hidden=flat.at[indices].get(mode='fill', fill_value=0),
            target=rows.targets.reshape(-1).at[indices].get(mode='fill', fill_value=0),
            temperature=rows.temperature.at[indices // hidden.shape[1]].get(mode='fill', fill_value=1.0)[:, None],
            start=start,
        )

    def scatter(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Moves `[P]`, in list order, to `[B, T]`, 0 elsewhere."""
        return jnp.zeros(like.size, x.dtype).at[self.indices].set(x, mode='drop').reshape(like.shape)


def _tempered(weights: jax.Array, part: _Chunk, token_mask: jax.Array) -> jax.Array:
    """Computes tempered logits with the mask applied, float32 `[C, V]`."""
    logits = jnp.einsum('cd,vd->cv', part.hidden, weights, preferred_element_type=jnp.float32)
    return jnp.where(token_mask, logits / part.temperature, -jnp.inf)


def _forward(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, *, chunk: int, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes log_prob, entropy and log Z, float32 `[B, T]`; with a mesh `axis`, for one device's rows."""
    positions = _Positions.of(rows.trained, chunk, axis)

    def step(number: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = positions.gather(number, hidden, rows)
        logits = _tempered(weights, part, token_mask)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, part.target[:, None], axis=-1)[:, 0]
        log_prob = jnp.where(token_mask, logits - normalizer[:, None], 0.0)
        entropy = -jnp.sum(jnp.where(token_mask, jnp.exp(log_prob) * log_prob, 0.0), axis=-1)
        new = (chosen - normalizer, entropy, normalizer)
        return tuple(jax.lax.dynamic_update_slice(old, x, (part.start,)) for old, x in zip(results, new, strict=True))

    zeros = _varying((jnp.zeros(positions.indices.shape, jnp.float32),) * 3, axis)
    log_prob, entropy, normalizer = (
        positions.scatter(x, rows.trained) for x in jax.lax.fori_loop(0, positions.num_chunks, step, zeros)
    )
    return log_prob, entropy, normalizer


def _backward(
    weights: jax.Array,
    hidden: jax.Array,
    rows: _Rows,
    token_mask: jax.Array,
    by_position: jax.Array,
    *,
    chunk: int,
    axis: str | None,
    weights_wanted: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the gradients of `hidden`, in its dtype, and, if wanted, of the weights, float32 `[V, D]`.

    Args:
        weights: in the dtype of `hidden`.
        by_position: float32 `[2, B, T]`, log Z and the gradient of log_prob; or `[4, B, T]`, with entropy and its
            gradient, which is else 0.
    """
    positions = _Positions.of(rows.trained, chunk, axis)
    flat = by_position.reshape(len(by_position), -1)
    vocabulary = jnp.arange(weights.shape[0])

    def step(number: jax.Array, total: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        part = positions.gather(number, hidden, rows)
        # Past the list's end all gradients are 0.
        known = flat.at[:, part.indices].get(mode='fill', fill_value=0)[:, :, None]
        normalizer, grad_log_prob, *of_entropy = known
        log_prob = _tempered(weights, part, token_mask) - normalizer
        prob = jnp.exp(log_prob)
        one_hot = part.target[:, None] == vocabulary
        grad_tempered = grad_log_prob * (one_hot - prob)
        if of_entropy:
            entropy, grad_entropy = of_entropy
            grad_tempered -= grad_entropy * prob * (log_prob + entropy)
        in_list = (part.indices < rows.trained.size)[:, None]
        grad_logits = jnp.where(in_list & token_mask, grad_tempered / part.temperature, 0.0).astype(hidden.dtype)
        grad_hidden = jnp.einsum('cv,vd->cd', grad_logits, weights)
        sum_hidden, sum_weights = total
        if sum_weights is not None:
            sum_weights += jnp.einsum('cv,cd->vd', grad_logits, part.hidden, preferred_element_type=jnp.float32)
        return sum_hidden.at[part.indices].set(grad_hidden, mode='drop'), sum_weights

    start = (
        jnp.zeros((rows.trained.size, hidden.shape[-1]), hidden.dtype),
        jnp.zeros(weights.shape, jnp.float32) if weights_wanted else None,
    )
    grad_hidden, grad_weights = jax.lax.fori_loop(0, positions.num_chunks, step, _varying(start, axis))
    if grad_weights is not None and axis is not None:
        grad_weights = jax.lax.psum(grad_weights, axis)
    return grad_hidden.reshape(hidden.shape), grad_weights


def _varying(tree: Any, axis: str | None) -> Any:
    """Marks arrays that start equal on all devices of a mesh axis as varying over it."""
    return tree if axis is None else jax.lax.pcast(tree, (axis,), to='varying')


_REPLICATED, _SHARDED = PartitionSpec(), PartitionSpec('data')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_probs(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    return _forward_all(weights, hidden, rows, token_mask, chunk)[:2]


def _forward_all(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = weights.astype(hidden.dtype)  # before they are copied to every device
    # With one shard XLA refuses the sum over an axis of one device inside `shard_map`.
    if num_shards(hidden.shape[0]) == 1:
        return _forward(weights, hidden, rows, token_mask, chunk=chunk, axis=None)
    # Each device lists its own rows' positions; one list of all rows would move hidden states between devices.
    forward = functools.partial(_forward, chunk=chunk, axis='data')
    return jax.shard_map(
        forward, in_specs=(_REPLICATED, _SHARDED, _SHARDED, _REPLICATED), out_specs=_SHARDED, axis_names={'data'}
    )(weights, hidden, rows, token_mask)


def _log_probs_forward(weights: Any, hidden: Any, rows: Any, token_mask: Any, chunk: int) -> tuple[Any, Any]:
    """Arguments are pairs (value, perturbed); perturbed is True if the derivative by the argument is wanted."""
    values = (weights.value, hidden.value, jax.tree.map(lambda x: x.value, rows, is_leaf=_is_pair), token_mask.value)
    log_prob, entropy, normalizer = _forward_all(*values, chunk)
    wanted = () if weights.perturbed else None  # static, as part of the residuals' tree structure
    return (log_prob, entropy), (*values, entropy, normalizer, wanted)


def _is_pair(x: Any) -> bool:
    return hasattr(x, 'perturbed')


def _log_probs_backward(chunk: int, kept: Any, gradients: tuple[Any, Any]) -> tuple[Any, Any, None, None]:
    weights, hidden, rows, token_mask, entropy, normalizer, wanted = kept
    grad_log_prob, grad_entropy = (None if isinstance(x, SymbolicZero) else x for x in gradients)
    known = [normalizer, jnp.zeros_like(entropy) if grad_log_prob is None else grad_log_prob]
    # Where no loss has the entropy, XLA then finds that nothing reads it, and leaves its sum over the vocabulary out.
    by_position = jnp.stack(known if grad_entropy is None else [*known, entropy, grad_entropy])
    backward = functools.partial(_backward, chunk=chunk, weights_wanted=wanted is not None)
    arguments = (weights.astype(hidden.dtype), hidden, rows, token_mask, by_position)
    if num_shards(hidden.shape[0]) == 1:
        grad_hidden, grad_weights = backward(*arguments, axis=None)
    else:
        grad_hidden, grad_weights = jax.shard_map(
            functools.partial(backward, axis='data'),
            in_specs=(_REPLICATED, _SHARDED, _SHARDED, _REPLICATED, PartitionSpec(None, 'data')),
            out_specs=(_SHARDED, _REPLICATED),
            axis_names={'data'},
        )(*arguments)
    return None if grad_weights is None else grad_weights.astype(weights.dtype), grad_hidden, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)
