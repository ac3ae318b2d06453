"""Conversations and what they were worth, whichever kind of score it is: in training, validation and evaluation.

A conversation without a reward is masked and its cause kept; too large a share of them is an error. With a judge off
the step's programs each piece is submitted as soon as it ends, and waited for after the last.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rewards.rewards import CAUSES, Judging, ModelScore, Rewards, Score, mask_invalid
from simrl.rollouts.agents import Agent, Limits, MixedAgent
from simrl.rollouts.collect import ConversationError, collect
from simrl.rollouts.programs import Conversations, conversation_programs
from simrl.rollouts.trajectories import Trajectories
from simrl.run.compiles import Program

NO_VALUE = 'the reward gave none a value'

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

    @property
    def reasons(self) -> dict[int, str]:
        """By row, why an agent or a judge failed, in its own words."""
        return {**self.unjudged, **self.failures}


def causes_of(rewards: Rewards, reasons: Mapping[int, str]) -> dict[int, str]:
    """By row, why a conversation has no reward.

    Args:
        rewards: on the host.
        reasons: `Judged.reasons`.
    """
    without = np.flatnonzero(~np.asarray(rewards.valid).reshape(len(rewards.valid), -1).any(axis=1)).tolist()
    return {row: reasons.get(row) or CAUSES[int(rewards.cause[row])] or NO_VALUE for row in without}


def check_judged(name: str, causes: Mapping[int, str], number: int, max_unjudged: float) -> None:
    """Stops a run in which too many of `number` conversations have no reward.

    Args:
        name: of the conversations, in errors.
        causes: of those without one.
        max_unjudged: of `LoopSettings`.

    Raises:
        ConversationError: their share is `max_unjudged` or more.
    """
    if len(causes) >= max_unjudged * number:
        raise ConversationError(
            f'{name}: {len(causes)} of {number} conversations have no reward '
            f'(config.compute.loop.max_unjudged={max_unjudged:g}): {", ".join(sorted(set(causes.values())))}'
        )


def print_causes(name: str, causes: Iterable[str]) -> None:
    """Prints how many conversations have no reward, a line for each cause."""
    for cause, count in collections.Counter(causes).items():
        print(f'{name}: {count} conversations have no reward: {cause}', flush=True)


def judged_batches(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    score: Score,
    *,
    batch_size: int,
    mesh: Mesh,
    name: str,
    max_unjudged: float,
    **settings: Any,
) -> Iterator[tuple[Sequence[Example], Judged, dict[int, str]]]:
    """One conversation from each example, `batch_size` at a time.

    A conversation depends on its example and both agents only, not on the batch. Agents that are compared meet the same
    random numbers.

    Args:
        user, assistant: from `for_sampling`.
        name: of the conversations, in errors.
        max_unjudged: of `LoopSettings`; the share is of all examples.
        settings: further arguments of `collect`.

    Yields:
        Examples; their conversations, always `batch_size` rows, of which those past the examples are padding; and by
        row why an example's conversation has no reward.

    Raises:
        ConversationError: too many conversations have no reward.
    """
    causes: dict[int, str] = {}
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        with jax.set_mesh(mesh):
            found = collect_judged(
                user, assistant, chosen, score, padding=batch_size - len(chosen), mesh=mesh, **settings
            )
            found = dataclasses.replace(found, rewards=placement.to_host(found.rewards))
        own = {row: cause for row, cause in causes_of(found.rewards, found.reasons).items() if row < len(chosen)}
        causes |= {start + row: cause for row, cause in own.items()}
        check_judged(name, causes, len(examples), max_unjudged)
        yield chosen, found, own


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


def judged_programs(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    score: Score,
    *,
    limits: Limits,
    rows: int,
    **settings: Any,
) -> Generator[Program, None, Conversations]:
    """The programs of conversations and, where a model scores them, of their score.

    Args:
        settings: further arguments of `conversation_programs`.
    """
    assert not isinstance(assistant, MixedAgent)
    conversations = yield from conversation_programs(user, assistant, examples, limits=limits, rows=rows, **settings)
    if isinstance(score, ModelScore):
        longest = max(limits.prompt_tokens, user.max_new_tokens, assistant.max_new_tokens)
        yield from score.programs(conversations, (rows, 2 * limits.turns, longest))
    return conversations


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
