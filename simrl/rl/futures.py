"""Multi-turn-aware rewards: a reply is worth what the conversations are worth that continue from it.

After CollabLLM (Wu et al. 2025, arXiv:2502.00640):

1. Conversations are held and recorded.
2. `samples` futures of each reply are drawn: the conversation is replayed up to and including it, then continued.
3. The reward of the reply is the mean score of its futures.

Such a reward holds what follows already: with a critic each reply is an episode of its own. The critic-free estimators
give all replies of a conversation the mean of their rewards.

A batch of futures has one of every conversation, so that it runs the programs of the conversations themselves. A judge
scores one batch of futures while the next is sampled; an agent off the device replies meanwhile where batches are cut
into pieces (`rows_in_flight`).
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rewards.rewards import CAUSES, NO_REPLY, Rewards, Score, mask_invalid
from simrl.rl.judged import Judged, start_judged
from simrl.rollouts.agents import Agent, HostAgent, Limits, MixedAgent
from simrl.rollouts.collect import collect
from simrl.rollouts.replay import Replay
from simrl.rollouts.trajectories import transcript_of


@dataclasses.dataclass(frozen=True)
class FutureSettings:
    """Futures of each reply. With its future a conversation never has more than `limits.turns` turns.

    A future without a reward is left out of the mean. That may be for its length, with `shaping.truncated='mask'`: then
    the mean is of those that were not cut.
    """

    samples: int  # futures of each reply; 1 where the conversation is over with it, which leaves nothing to draw
    # Max turns after the reply, each a user message and an assistant message. A future that has not ended then is
    # scored as one whose turns are over (TURNS). 0 scores the conversation up to the reply.
    turns: int

    def turns_drawn(self, turns: int) -> int:
        """Max turns that are drawn beside a conversation of up to `turns`."""
        return self.samples * sum(min(self.turns, turns - turn - 1) for turn in range(turns))

    def __post_init__(self) -> None:
        for field, least in (('samples', 1), ('turns', 0)):
            if getattr(self, field) < least:
                raise ValueError(f'FutureSettings.{field}: expected at least {least}, found {getattr(self, field)}')
        if self.samples > 1 and self.turns == 0:
            raise ValueError(
                f'FutureSettings.samples: expected 1 with turns=0, which leaves nothing to draw, found {self.samples}'
            )


@dataclasses.dataclass(frozen=True)
class FutureScore:
    """Rewards of the assistant's replies by their futures.

    Attributes:
        score: of a whole conversation, `[B]`.
        settings: of the futures.
    """

    score: Score
    settings: FutureSettings


def check_replayable(user: Agent, role: int) -> None:
    """Raises ValueError unless futures of the assistant's replies can be drawn."""
    if role != ASSISTANT:
        raise ValueError("RLSettings.trained: expected 'assistant' for rewards by futures of its replies, found 'user'")
    members = user.members if isinstance(user, MixedAgent) else (user,)
    if any(isinstance(member, HostAgent) and not member.replayable for member in members):
        raise ValueError(
            'HostAgent.replayable: expected True for rewards by futures, whose conversations go on with another seed '
            'than they began with, found False'
        )


def collect_with_futures(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    score: FutureScore,
    *,
    limits: Limits,
    mesh: Mesh,
    samples: int = 1,
    **settings: Any,
) -> Judged:
    """Holds conversations, and gives each of the assistant's replies the mean score of its futures.

    Futures draw with the keys of samples that no conversation has. A future without a reward is left out of the mean; a
    reply without any other has none. Conversations that a failure ended have no futures.

    Args:
        settings: further arguments of `collect`; its `view` is ASSISTANT.
    """
    settings |= {'limits': limits, 'mesh': mesh, 'samples': samples}
    waits: list[float] = []
    batch, failures = collect(user, assistant, examples, on_wait=waits.append, **settings)
    record = placement.to_host(transcript_of(batch))
    started = []
    for turn in range(limits.turns):
        more = min(score.settings.turns, limits.turns - turn - 1)
        for number in range(score.settings.samples if more else 1):
            replay = Replay(record, turn + 1, more, samples * (1 + number * limits.turns + turn))
            if not replay.present.any():
                continue
            _, failed, finish = start_judged(user, assistant, examples, score.score, replay=replay, **settings)
            started.append((turn, replay.present, failed, finish))
    found = [(turn, present, failed, finish()) for turn, present, failed, finish in started]
    futures = [(turn, present, placement.to_host(scored)) for turn, present, _, (scored, _, _) in found]
    rewards = mean_of_futures(futures, len(record.num_messages), limits.turns)
    lost: dict[int, str] = {}
    for turn, _, failed, (_, unjudged, _) in found:
        for row, reason in {**unjudged, **failed}.items():
            if not rewards.valid[row, turn]:
                lost.setdefault(row, reason)
    waited = collections.Counter[str]({'replies': sum(waits)} if waits else {})
    for *_, (_, _, seconds) in found:
        waited.update(seconds)
    rewards = mask_invalid(placement.shard_batch(rewards, mesh), batch.end_reason)
    return Judged(batch, rewards, failures, lost, waited)


def mean_of_futures(futures: Sequence[tuple[int, np.ndarray, Rewards]], rows: int, turns: int) -> Rewards:
    """Rewards `[B, turns]` on the host, the mean of each reply's futures.

    Their parts are means as well; one more, `futures_left_out`, is the share of a reply's futures without a reward. A
    row's cause is that of the first future of its first reply without any.

    Args:
        futures: (turn, bool `[B]`, whether there is such a reply, its future's rewards `[B]`).
    """
    means: dict[str, np.ndarray] = {}
    drawn, count = np.zeros((rows, turns), np.int32), np.zeros((rows, turns), np.int32)
    causes = np.zeros((rows, turns), np.int32)
    for turn, present, rewards in futures:
        if rewards.value.ndim != 1:
            raise ValueError(f'FutureScore.score: expected rewards [B] of conversations, found {rewards.value.shape}')
        valid = np.asarray(rewards.valid) & present
        for name, part in {**rewards.parts, 'value': rewards.value}.items():
            total = means.setdefault(name, np.zeros((rows, turns)))
            total[:, turn] += np.where(valid, part, 0.0)
        causes[:, turn] = np.where(drawn[:, turn] == 0, np.where(present, rewards.cause, 0), causes[:, turn])
        drawn[:, turn] += present
        count[:, turn] += valid
    lost = (drawn > 0) & (count == 0)
    cause = np.where(lost.any(axis=1), causes[np.arange(rows), np.argmax(lost, axis=1)], 0)
    parts = {name: (total / np.maximum(count, 1)).astype(np.float32) for name, total in means.items()}
    value = parts.pop('value', np.zeros((rows, turns), np.float32))
    parts['futures_left_out'] = (1 - count / np.maximum(drawn, 1)).astype(np.float32) * (drawn > 0)
    fields: Mapping[str, Any] = {
        'value': value,
        'valid': count > 0,
        'parts': parts,
        'cause': np.where(drawn.any(axis=1), cause, CAUSES.index(NO_REPLY)).astype(np.int32),
    }
    return Rewards(**fields)
