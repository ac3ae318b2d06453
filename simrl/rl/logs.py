"""Logs of an RL step: its conversations as rows, and metrics of what they were worth and of what was said."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example
from simrl.rewards.rewards import Rewards
from simrl.rollouts.agents import Agent, agent_for, told
from simrl.rollouts.trajectories import Trajectories, missed_signals, repeated_messages, transcripts
from simrl.training.optimizer import Metrics


def reward_metrics(rewards: Rewards) -> Metrics:
    """The mean reward and its parts over what has one, and the share of conversations without any."""

    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        present = rewards.valid & jnp.isfinite(x)
        return jnp.sum(x, where=present, dtype=jnp.float32), jnp.sum(present, dtype=jnp.float32)

    metrics = {f'reward/{name}': total(part) for name, part in rewards.parts.items()}
    metrics['reward/mean'] = total(rewards.value)
    judged = jnp.any(rewards.valid.reshape(len(rewards.valid), -1), axis=1)
    metrics['reward/unjudged'] = (jnp.sum(~judged, dtype=jnp.float32), jnp.float32(len(judged)))
    return metrics


def message_metrics(rows: Sequence[dict[str, Any]], user: Agent, examples: Sequence[Example]) -> Metrics:
    """The share of conversations with an end signal that was not matched, and of the user's messages that repeat one.

    Args:
        rows: of `conversation_rows`.
        examples: of each row.
    """
    metrics = {}
    stop_texts = [agent_for(user, example).stop_text for example in examples]
    if any(stop_texts):
        missed = sum(missed_signals([row], text) for row, text in zip(rows, stop_texts, strict=True) if text)
        metrics['rollout/missed_signals'] = (jnp.float32(missed), jnp.float32(len(rows)))
    repeated, later = repeated_messages(rows)
    metrics['rollout/repeated_user'] = (jnp.float32(repeated), jnp.float32(later))
    return metrics


def conversation_rows(
    batch: Trajectories,
    rewards: Rewards,
    user: Agent,
    examples: Sequence[Example],
    samples: int,
    chat: Chat,
    seed: int,
    failures: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Conversations on the host as JSON rows: messages, end reason, and the reward with its parts.

    A `reward` is a number, or with `[B, turns]` rewards a list of them; None where there is none. `told` is the user
    simulator's system text.

    Args:
        examples: of each row; `samples` neighbouring ones have the same.
    """
    rows = []
    for i, row in enumerate(transcripts(batch, chat.decode)):
        worth = {
            'reward': np.where(rewards.valid[i], rewards.value[i].astype(object), np.array(None)).tolist(),
            'parts': {name: np.asarray(part[i]).tolist() for name, part in rewards.parts.items()},
            'cause': int(rewards.cause[i]),
        }
        example = examples[i]
        start = {'example': example.id, 'source': example.source, 'sample': i % samples, 'seed': seed}
        start['told'] = told(user, example)
        failure = {'failure': failures[i]} if i in failures else {}
        rows.append(start | row | worth | failure)
    return rows
