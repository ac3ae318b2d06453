"""Log-probabilities, entropies and values of the tokens that a role sampled, for every kind of update.

A token's log-probability and value are read one position before it, where it is predicted.
"""

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.log_probs import token_log_probs
from simrl.models.transformer import Execution, Params, TransformerConfig


def trained_tokens(role: jax.Array, length: jax.Array, trained_role: int) -> jax.Array:
    """Mask of the tokens that `trained_role` sampled, bool `[B, T]`, without each row's first: nothing predicts it.

    Args:
        role: int8 `[B, T]`, the speaker of each token, as in `conversations.chat`.
        length: int32 `[B]`.
    """
    index = jnp.arange(role.shape[1])
    return (role == trained_role) & (index < length[:, None]) & (index > 0)


@flax.struct.dataclass
class Scores:
    """Scores of the trained tokens, float32 `[B, T]`, 0 elsewhere; `value` is None without a value head."""

    log_prob: jax.Array
    entropy: jax.Array
    value: jax.Array | None


def score(
    params: Params,
    config: TransformerConfig,
    execution: Execution,
    tokens: jax.Array,
    trained: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
    *,
    detach_value: jax.Array | bool = True,
) -> Scores:
    """Scores the trained tokens in one pass, for old, new and reference parameters alike.

    Args:
        tokens: int32 `[B, T]`.
        trained: bool `[B, T]`, from `trained_tokens`.
        token_mask: bool `[V]` and temperature: the sampler's.
        detach_value: True stops the gradient from the value into the trunk.
    """
    hidden, _ = transformer.apply(params, config, execution, tokens)
    log_prob, entropy = token_log_probs(
        params,
        hidden,
        _predicted(tokens),
        _predicted(trained),
        token_mask,
        temperature,
        chunk=execution.log_prob_chunk,
    )
    value = None
    if 'value_head' in params:
        trunk = jnp.where(detach_value, jax.lax.stop_gradient(hidden), hidden)
        value = jnp.where(trained, _predicting(transformer.apply_head(params['value_head'], trunk)), 0.0)
    return Scores(
        log_prob=_predicting(log_prob),
        entropy=_predicting(entropy),
        value=value,
    )


def _predicted(x: jax.Array) -> jax.Array:
    """Moves `[B, T]` from tokens to the positions that predict them; the last position gets 0 or False."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _predicting(x: jax.Array) -> jax.Array:
    """Moves `[B, T]` from predicting positions to tokens; the first token gets 0."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
