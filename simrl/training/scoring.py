"""Log-probabilities, entropies and values of the tokens that a role sampled: the one pass of every kind of update.

A token's log-probability and value are read where it is predicted, one position before it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from simrl.models import transformer
from simrl.models.log_probs import token_log_probs
from simrl.models.transformer import Execution, Params, TransformerConfig


def trained_tokens(role: jax.Array, length: jax.Array, trained_role: int) -> jax.Array:
    """The tokens that `trained_role` sampled, bool `[B, T]`.

    Args:
        role: int8 `[B, T]`, as in `conversations.chat`: who spoke each token.
        length: int32 `[B]`.

    The first token of a row is never among them: nothing predicts it.
    """
    index = jnp.arange(role.shape[1])
    return (role == trained_role) & (index < length[:, None]) & (index > 0)


@flax.struct.dataclass
class Scores:
    """Of each trained token, float32 `[B, T]`, 0 elsewhere; `value` is None where the parameters have no value head."""

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
    """Log-probability, entropy and value of the trained tokens: one pass, for old, new and reference parameters alike.

    Args:
        tokens: int32 `[B, T]`.
        trained: bool `[B, T]`, from `trained_tokens`.
        token_mask: bool `[V]` and temperature: the sampler's.
        detach_value: where True, no gradient flows from the value into the trunk.
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
    """`[B, T]` by token -> by the position that predicts it; 0 or False at the last, which predicts nothing."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _predicting(x: jax.Array) -> jax.Array:
    """`[B, T]` by predicting position -> by token; the first token, which nothing predicts, gets 0."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
