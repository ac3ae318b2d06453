"""Likelihood of people's messages under a simulator: the log-likelihood of the trained tokens of each row."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.batches import Batch, Batches, BatchSettings, stack
from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, End
from simrl.conversations.views import Rendered
from simrl.evaluation.statistics import Estimate, cluster_ratio
from simrl.models import placement
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.run import compiles
from simrl.run.progress import Progress
from simrl.training import scoring


@functools.partial(jax.jit, static_argnames=('config', 'execution'))
def row_sums(
    params: Params, batch: Batch, allowed: jax.Array, *, config: TransformerConfig, execution: Execution
) -> jax.Array:
    trained = jnp.asarray(batch.trained) & (jnp.arange(batch.tokens.shape[1]) > 0)
    scores = scoring.score(params, config, execution, jnp.asarray(batch.tokens), trained, allowed, 1.0)
    return jnp.sum(scores.log_prob, axis=1)


def start_of(conversation: Conversation, chat: Chat, most_tokens: int) -> Conversation | None:
    """The whole messages at the start of a conversation that have at most so many tokens, up to one of the user.

    It has no terminal token, which only fine-tuned simulators say: all predict the same tokens.

    Returns:
        None where they hold no message of the user but the opening.
    """
    spoken = conversation.spoken
    total = np.cumsum([len(chat.encode(message.content)) for message in spoken])
    kept = int(np.searchsorted(total, most_tokens, side='right'))
    kept -= kept % 2 == 0
    if kept < 3:
        return None
    end: End = 'cut' if conversation.end == 'cut' and kept == len(spoken) else 'unknown'
    return dataclasses.replace(conversation, messages=spoken[:kept], end=end)


def row_log_likelihoods(
    params: Params,
    rows: Sequence[Rendered],
    allowed: np.ndarray,
    batch: BatchSettings,
    *,
    config: TransformerConfig,
    execution: Execution,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """The log-likelihood of each row's trained tokens, and their number.

    Args:
        allowed: bool `[V]`, the token mask of the softmax.

    Returns:
        float64 `[N]` in nats, and int64 `[N]`, in the order of `rows`.
    """
    total = np.zeros(len(rows))
    count = np.array([int(np.sum(row.trained[1:])) for row in rows])
    mask = jnp.asarray(allowed)
    batches = Batches(rows, batch, stack)
    print(f'likelihoods: {compiles.stated({"row_sums": len(batches.lengths)})}', flush=True)
    with Progress('likelihoods', len(batches)) as progress, jax.set_mesh(mesh):
        for i in range(len(batches)):
            part = batches.batch(i)
            sums = row_sums(params, placement.shard_batch(part, mesh), mask, config=config, execution=execution)
            real = part.index >= 0
            total[part.index[real]] = placement.to_host(sums)[real]
            progress.update(tokens=int(np.sum(part.length)))
    return total, count


def nats_per_token(found: Sequence[Mapping[str, Any]]) -> tuple[Estimate | None, dict[str, Estimate]]:
    """Nats per token of people's messages, over all and by data set; None and {} where there is no likelihood.

    Args:
        found: results of likelihoods, of each training of one simulator; all have the same rows.
    """
    if not found or found[0]['tokens'] is None:
        return None, {}
    total, tokens = -np.mean([x['log_likelihood'] for x in found], 0), np.array(found[0]['tokens'])
    sources = np.array(found[0].get('source', []))
    by_source = {
        str(source): cluster_ratio(total[sources == source], tokens[sources == source])
        for source in dict.fromkeys(sources.tolist())
    }
    return cluster_ratio(total, tokens), by_source
