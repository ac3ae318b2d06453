"""Conversations and what they were worth, whichever kind of score it is.

With a judge off the step's programs each piece is submitted as soon as it ends, and waited for after the last.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rewards.rewards import Judging, Rewards, Score, mask_invalid
from simrl.rollouts.agents import Agent
from simrl.rollouts.collect import collect
from simrl.rollouts.trajectories import Trajectories

# () -> the rewards, `Judged.unjudged` and `Judged.waited`.
Finish = Callable[[], tuple[Rewards, Mapping[int, str], Mapping[str, float]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """Conversations with their rewards.

    Attributes:
        failures: by row, the reason why an agent off the device failed.
        unjudged: by row, the reason why a judge gave no reward.
        waited: seconds that were spent waiting for a 'judge', and for 'replies' of an agent off the device; without one
            it has no entry.
    """

    batch: Trajectories
    rewards: Rewards
    failures: Mapping[int, str]
    unjudged: Mapping[int, str]
    waited: Mapping[str, float]


def collect_judged(
    user: Agent, assistant: Agent, examples: Sequence[Example], score: Score, *, mesh: Mesh, **settings: Any
) -> Judged:
    """Holds conversations and scores them; those that a failure ended, or without a finite reward, are masked.

    Args:
        settings: further arguments of `collect`.
    """
    batch, failures, finish = start_judged(user, assistant, examples, score, mesh=mesh, **settings)
    rewards, unjudged, waited = finish()
    return Judged(batch, rewards, failures, unjudged, waited)


def start_judged(
    user: Agent, assistant: Agent, examples: Sequence[Example], score: Score, *, mesh: Mesh, **settings: Any
) -> tuple[Trajectories, Mapping[int, str], Finish]:
    """Holds conversations and starts to score them; arguments as of `collect_judged`.

    Returns:
        The conversations, `Judged.failures`, and a function that waits for the rewards.
    """
    waits: list[float] = []
    pieces = _Pieces(score) if isinstance(score, Judging) else None
    batch, failures = collect(
        *(user, assistant, examples),
        mesh=mesh,
        on_piece=None if pieces is None else pieces.start,
        on_wait=waits.append,
        **settings,
    )
    end_reason = batch.end_reason
    waited = {'replies': sum(waits)} if waits else {}
    if not isinstance(score, Judging):
        scored = mask_invalid(score(batch), end_reason)
        return batch, failures, lambda: (scored, {}, waited)

    def finish() -> tuple[Rewards, Mapping[int, str], Mapping[str, float]]:
        assert pieces is not None
        rewards, unjudged = pieces.finish(mesh)
        return mask_invalid(rewards, end_reason), unjudged, {'judge': pieces.waited, **waited}

    return batch, failures, finish


class _Pieces:
    """The pieces of one batch, in its order.

    Attributes:
        waited: seconds that `finish` waited for the judge.
    """

    def __init__(self, judging: Judging) -> None:
        self.waited = 0.0
        self._judging = judging
        self._pieces: list[tuple[int, Callable[[], tuple[Rewards, Mapping[int, str]]]]] = []

    def start(self, piece: Trajectories, examples: Sequence[Example]) -> None:
        """Submits conversations; an `OnPiece` of `collect`."""
        self._pieces.append((len(examples), self._judging.start(piece, examples)))

    def finish(self, mesh: Mesh) -> tuple[Rewards, dict[int, str]]:
        """Waits for the rewards of the whole batch, sharded by rows; and the reasons of those without one, by row."""
        started = time.monotonic()
        found, first = [], 0
        reasons: dict[int, str] = {}
        for rows, wait in self._pieces:
            rewards, own = wait()
            found.append(rewards)
            reasons |= {first + row: reason for row, reason in own.items()}
            first += rows
        self.waited = time.monotonic() - started
        return placement.shard_batch(jax.tree.map(lambda *parts: np.concatenate(parts), *found), mesh), reasons
