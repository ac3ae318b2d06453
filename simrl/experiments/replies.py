"""Single replies of an assistant to openings, with scores of them by a reward model or a judge."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from simrl.conversations.records import Example
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model
from simrl.models import placement
from simrl.models.transformer import Params
from simrl.rewards.reward_model import frame_of, score_conversations
from simrl.rewards.rewards import CAUSES, Judging
from simrl.rollouts.agents import Limits, ModelAgent, opening_only
from simrl.rollouts.collect import ConversationError, collect_batches
from simrl.rollouts.trajectories import Trajectories

REPLY_STEP = 2**31 - 1  # the step of single replies in the keys of conversations: no training run draws these numbers
ScoredReplies = tuple[Sequence[Example], Trajectories, np.ndarray]


# (conversations, their examples) -> float32, a score for each example; rows past the examples fill up a batch
ScoreConversations = Callable[[Trajectories, Sequence[Example]], np.ndarray]


def by_reward_model(params: Params, model: Model, limits: Limits, compute: Compute) -> ScoreConversations:
    """A reward model's scores of each conversation's first reply.

    Args:
        params: `{'decoder', 'reward_head'}`.
    """

    def score(batch: Trajectories, _: Sequence[Example]) -> np.ndarray:
        scores, _valid = score_conversations(
            params,
            batch,
            config=model.config,
            execution=compute.training,
            frame=frame_of(model.chat),
            later_tokens=limits.assistant_tokens,
        )
        found: np.ndarray = placement.to_host(scores)[:, 0]
        return found

    return score


def by_judge(judging: Judging) -> ScoreConversations:
    """A judge's verdicts. A conversation without one is a `ConversationError`."""

    def score(batch: Trajectories, examples: Sequence[Example]) -> np.ndarray:
        rewards, reasons = judging.start(batch, examples)()
        for row, example in enumerate(examples):
            if not rewards.valid[row]:
                reason = reasons.get(row) or CAUSES[int(rewards.cause[row])]
                raise ConversationError(f'example {example.id}: expected a verdict of the judge, found none: {reason}')
        return np.asarray(rewards.value)

    return score


def scored_replies(
    score: ScoreConversations,
    assistant: ModelAgent,
    examples: Sequence[Example],
    model: Model,
    limits: Limits,
    compute: Compute,
    *,
    batch_size: int,
    seed: int,
) -> Iterator[ScoredReplies]:
    """One reply to each opening, in batches: `(examples of the batch, their conversations, scores float32 [B])`.

    Every assistant draws the same numbers for the same opening.
    """
    mesh = compute.mesh.make()
    batches = collect_batches(
        opening_only(),
        assistant,
        examples,
        chat=model.chat,
        limits=dataclasses.replace(limits, turns=1),
        seed=seed,
        step=REPLY_STEP,
        batch_size=batch_size,
        mesh=mesh,
        name='replies',
    )
    for chosen, batch in batches:
        with jax.set_mesh(mesh):
            scores = score(batch, chosen)
        yield chosen, batch, scores[: len(chosen)]


def outcome_columns(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]], score: np.ndarray
) -> dict[str, list[Any]]:
    """Columns of conversations (see `Scene.outcomes`); `score` may have more rows, which fill up a batch."""
    messages = {
        role: [[m for m in row['messages'] if m['role'] == role] for row in rows] for role in ('assistant', 'user')
    }
    truncated = {role: [sum(m['truncated'] for m in row) for row in found] for role, found in messages.items()}
    return {
        'example': [example.id for example in examples],
        'cluster': [example.opening for example in examples],
        'score': [float(value) for value in score[: len(rows)]],
        'end': [row['end_reason'] for row in rows],
        'assistant_turns': [len(row) for row in messages['assistant']],
        'truncated': truncated['assistant'],
        'user_truncated': truncated['user'],
    }
