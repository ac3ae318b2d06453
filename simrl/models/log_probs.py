"""Log-probabilities and entropies at the positions that predict a trained token, at a cost linear in their number.

1. The positions are put into a list, in the order of the batch.
2. A loop makes logits for a fixed number of them at a time, as often as the list needs, and keeps two numbers each.
3. The backward pass goes over the same chunks and makes their logits again, so that no `[B, T, V]` array exists.

With p the softmax of the tempered logits z = hidden . weights / temperature over the allowed tokens V, log Z their
log-sum-exp and t the target:

    log p_t = z_t - log Z            d log p_t / dz_v = [v = t] - p_v
    H = -sum_v p_v log p_v           dH / dz_v = -sum_u (dp_u / dz_v) (log p_u + 1) = -p_v (log p_v + H)

(with dp_u / dz_v = p_u ([u = v] - p_v), and the 1 drops out as the p_u sum to one.)

A loop of a number of rounds that only the data tell has no reverse derivative of JAX's own; these are written out here.

Besides the letters of `transformer.py`: P positions in the list (with its padding), C positions of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from simrl.models.layouts import as_it_lies, output_matrix
from simrl.models.rows import rows_are_sharded
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
    """Log-probability of each target, and the entropy, of the tempered distribution over the allowed tokens.

    Gradients flow to `hidden` and to the embedding or head, and none to the temperature. A head that is not
    differentiated by costs no gradient.

    Args:
        hidden: `[B, T, D]`, where `hidden[:, t]` predicts `targets[:, t]`.
        targets: int32 `[B, T]`.
        trained: bool `[B, T]`, the positions whose numbers are wanted.
        token_mask: bool `[V]`, the sampler's mask: tokens outside it have probability 0.
        temperature: a scalar or float32 `[B]`.
        chunk: positions whose logits exist at once, on each device.

    Returns:
        log_prob, entropy: float32 `[B, T]`, in nats, 0 where not trained. A target that is not allowed has
        log-probability -inf.
    """
    weights = as_it_lies(output_matrix(params['decoder']))
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape[:1])
    rows = _Rows(jnp.asarray(targets), jnp.asarray(trained), jax.lax.stop_gradient(temperature))
    return _log_probs(jnp.asarray(weights), jnp.asarray(hidden), rows, jnp.asarray(token_mask), chunk)


class _Rows(NamedTuple):
    """What is known of each row besides its hidden states; see `token_log_probs`."""

    targets: jax.Array  # int32 [B, T]
    trained: jax.Array  # bool [B, T]
    temperature: jax.Array  # float32 [B]


class _Chunk(NamedTuple):
    """Up to C positions of the list; where it is at its end, of hidden states 0 and indices B * T."""

    indices: jax.Array  # int32 [C], of B * T
    hidden: jax.Array  # [C, D]
    target: jax.Array  # int32 [C]
    temperature: jax.Array  # float32 [C, 1]
    place: jax.Array  # int32 scalar, of the chunk's first position in the list


class _Positions(NamedTuple):
    """The list of trained positions."""

    indices: jax.Array  # int32 [P], of B * T; B * T past the list's end
    rounds: jax.Array  # int32 scalar: chunks that hold all of the list
    chunk: int  # C

    @classmethod
    def of(cls, trained: jax.Array, chunk: int, axis: str | None) -> '_Positions':
        size = min(chunk, trained.size)
        indices = jnp.flatnonzero(trained, size=-(-trained.size // size) * size, fill_value=trained.size)
        rounds = (jnp.sum(trained, dtype=jnp.int32) + size - 1) // size
        # Devices go through the loop in step: within it those of the mesh's other axis exchange parts of logits.
        return cls(indices.astype(jnp.int32), rounds if axis is None else jax.lax.pmax(rounds, axis), size)

    def take(self, number: jax.Array, hidden: jax.Array, rows: _Rows) -> _Chunk:
        place = number * self.chunk
        indices = jax.lax.dynamic_slice(self.indices, (place,), (self.chunk,))
        flat = hidden.reshape(-1, hidden.shape[-1])
        return _Chunk(
            indices=indices,
            hidden=flat.at[indices].get(mode='fill', fill_value=0),
            target=rows.targets.reshape(-1).at[indices].get(mode='fill', fill_value=0),
            temperature=rows.temperature.at[indices // hidden.shape[1]].get(mode='fill', fill_value=1.0)[:, None],
            place=place,
        )

    def scatter(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """`[P]` by the list -> `[B, T]`, 0 elsewhere."""
        return jnp.zeros(like.size, x.dtype).at[self.indices].set(x, mode='drop').reshape(like.shape)


def _tempered(weights: jax.Array, part: _Chunk, token_mask: jax.Array) -> jax.Array:
    """Float32 `[C, V]`."""
    logits = jnp.einsum('cd,vd->cv', part.hidden, weights, preferred_element_type=jnp.float32)
    return jnp.where(token_mask, logits / part.temperature, -jnp.inf)


def _forward(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, *, chunk: int, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log_prob, entropy and log Z, float32 `[B, T]`, of the rows of one device where `axis` names the mesh's."""
    positions = _Positions.of(rows.trained, chunk, axis)

    def step(number: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = positions.take(number, hidden, rows)
        logits = _tempered(weights, part, token_mask)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, part.target[:, None], axis=-1)[:, 0]
        log_prob = jnp.where(token_mask, logits - normalizer[:, None], 0.0)
        entropy = -jnp.sum(jnp.where(token_mask, jnp.exp(log_prob) * log_prob, 0.0), axis=-1)
        new = (chosen - normalizer, entropy, normalizer)
        return tuple(jax.lax.dynamic_update_slice(old, x, (part.place,)) for old, x in zip(found, new, strict=True))

    start = _varying((jnp.zeros(positions.indices.shape, jnp.float32),) * 3, axis)
    log_prob, entropy, normalizer = (
        positions.scatter(x, rows.trained) for x in jax.lax.fori_loop(0, positions.rounds, step, start)
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
    of_weights: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of `hidden`, in its dtype, and that of the weights, float32 `[V, D]`, where it is wanted.

    Args:
        weights: in the dtype of `hidden`.
        by_position: float32 `[4, B, T]`: entropy, log Z, and the gradients of log_prob and entropy.
    """
    positions = _Positions.of(rows.trained, chunk, axis)
    flat = by_position.reshape(4, -1)
    vocabulary = jnp.arange(weights.shape[0])

    def step(number: jax.Array, total: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        part = positions.take(number, hidden, rows)
        # Past the list's end the gradients are 0, and so is what they give.
        known = flat.at[:, part.indices].get(mode='fill', fill_value=0)[:, :, None]
        entropy, normalizer, of_log_prob, of_entropy = known
        log_prob = _tempered(weights, part, token_mask) - normalizer
        prob = jnp.exp(log_prob)
        one_hot = part.target[:, None] == vocabulary
        of_tempered = of_log_prob * (one_hot - prob) - of_entropy * prob * (log_prob + entropy)
        in_list = (part.indices < rows.trained.size)[:, None]
        of_logits = jnp.where(in_list & token_mask, of_tempered / part.temperature, 0.0).astype(hidden.dtype)
        of_hidden = jnp.einsum('cv,vd->cd', of_logits, weights)
        so_far, so_far_weights = total
        if so_far_weights is not None:
            so_far_weights += jnp.einsum('cv,cd->vd', of_logits, part.hidden, preferred_element_type=jnp.float32)
        return so_far.at[part.indices].set(of_hidden, mode='drop'), so_far_weights

    start = (
        jnp.zeros((rows.trained.size, hidden.shape[-1]), hidden.dtype),
        jnp.zeros(weights.shape, jnp.float32) if of_weights else None,
    )
    of_hidden, of_weights_sum = jax.lax.fori_loop(0, positions.rounds, step, _varying(start, axis))
    if of_weights_sum is not None and axis is not None:
        of_weights_sum = jax.lax.psum(of_weights_sum, axis)
    return of_hidden.reshape(hidden.shape), of_weights_sum


def _varying(tree: Any, axis: str | None) -> Any:
    """Marks what starts equal on all devices of a mesh axis as what will not stay so."""
    return tree if axis is None else jax.lax.pcast(tree, (axis,), to='varying')


_WHOLE, _SPLIT = PartitionSpec(), PartitionSpec('data')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_probs(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    return _forward_of_all(weights, hidden, rows, token_mask, chunk)[:2]


def _forward_of_all(
    weights: jax.Array, hidden: jax.Array, rows: _Rows, token_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = weights.astype(hidden.dtype)  # before they go to every device
    if not rows_are_sharded(hidden.shape[0]):
        return _forward(weights, hidden, rows, token_mask, chunk=chunk, axis=None)
    # Each device makes a list of its own rows' positions; one list of all would send hidden states around.
    forward = functools.partial(_forward, chunk=chunk, axis='data')
    return jax.shard_map(forward, in_specs=(_WHOLE, _SPLIT, _SPLIT, _WHOLE), out_specs=_SPLIT, axis_names={'data'})(
        weights, hidden, rows, token_mask
    )


def _log_probs_forward(weights: Any, hidden: Any, rows: Any, token_mask: Any, chunk: int) -> tuple[Any, Any]:
    """Arguments come as pairs (value, perturbed): whether the derivative by it is wanted."""
    values = (weights.value, hidden.value, jax.tree.map(lambda x: x.value, rows, is_leaf=_is_pair), token_mask.value)
    log_prob, entropy, normalizer = _forward_of_all(*values, chunk)
    wanted = () if weights.perturbed else None  # a tree's structure is static, and its leaves are not
    return (log_prob, entropy), (*values, entropy, normalizer, wanted)


def _is_pair(x: Any) -> bool:
    return hasattr(x, 'perturbed')


def _log_probs_backward(chunk: int, kept: Any, gradients: tuple[Any, Any]) -> tuple[Any, Any, None, None]:
    weights, hidden, rows, token_mask, entropy, normalizer, wanted = kept
    given = [jnp.zeros(entropy.shape) if isinstance(x, SymbolicZero) else x for x in gradients]
    by_position = jnp.stack([entropy, normalizer, *given])
    backward = functools.partial(_backward, chunk=chunk, of_weights=wanted is not None)
    arguments = (weights.astype(hidden.dtype), hidden, rows, token_mask, by_position)
    if not rows_are_sharded(hidden.shape[0]):
        of_hidden, of_weights = backward(*arguments, axis=None)
    else:
        of_hidden, of_weights = jax.shard_map(
            functools.partial(backward, axis='data'),
            in_specs=(_WHOLE, _SPLIT, _SPLIT, _WHOLE, PartitionSpec(None, 'data')),
            out_specs=(_SPLIT, _WHOLE),
            axis_names={'data'},
        )(*arguments)
    return None if of_weights is None else of_weights.astype(weights.dtype), of_hidden, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)
