"""A step's conversations with a judge: each piece is submitted as soon as it ends, and waited for after the last."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rewards.rewards import Judging, Rewards
from simrl.rollouts.trajectories import Trajectories


class JudgedPieces:
    """The pieces of one step's batch, in its order.

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
