"""Conversations of an evaluation, with their scores or the cause why there is none."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from simrl.conversations.chat import ASSISTANT, Chat
from simrl.conversations.records import Example
from simrl.experiments.settings import Compute
from simrl.models import placement
from simrl.remote.answers import MAY_PASS
from simrl.rewards.rewards import Score
from simrl.rewards.rubric import JUDGE_PART
from simrl.rl.judged import judged_batches, judged_programs, print_causes
from simrl.rollouts.agents import Agent, Limits, ModelAgent
from simrl.rollouts.collect import ConversationError, for_sampling
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import transcripts
from simrl.run import compiles
from simrl.run.progress import Progress

REPLY_STEP = 2**31 - 1  # the step of single replies in the keys of conversations: no training run draws these numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """One conversation from each of N examples.

    Attributes:
        examples: in their order.
        rows: their conversations, of `transcripts`.
        resamples: int `[N]`, messages that the user discarded.
        scores: float32 `[N]`, NaN where there is none.
        judges: the same by the parts of a panel's judges, `judge_NAME`; empty without a panel.
        causes: by number, why a conversation has no score.
    """

    examples: Sequence[Example]
    rows: Sequence[dict[str, Any]]
    resamples: np.ndarray
    scores: np.ndarray
    judges: Mapping[str, np.ndarray]
    causes: Mapping[int, str]

    @property
    def kept(self) -> list[int]:
        """The numbers of those with a score."""
        return [number for number in range(len(self.rows)) if number not in self.causes]


def scored_conversations(
    user: Agent,
    assistant: ModelAgent,
    examples: Sequence[Example],
    score: Score,
    *,
    chat: Chat,
    limits: Limits,
    compute: Compute,
    batch_size: int,
    seed: int,
    step: int,
    name: str,
) -> Scored:
    """Holds and scores one conversation from each example; prints how many have no score, by cause.

    Every assistant draws the same numbers for the same example.

    Args:
        score: of whole conversations, `[B]`.
        name: of the progress bar and in errors.

    Raises:
        ConversationError: too many conversations have no score; see also `check_answered`.
    """
    mesh = compute.mesh.make()
    check_agents(user, assistant, chat, limits)
    with jax.set_mesh(mesh):
        user, assistant = for_sampling(user, mesh), for_sampling(assistant, mesh)
    walk = functools.partial(
        judged_programs,
        *(user, assistant, examples, score),
        chat=chat,
        limits=limits,
        view=ASSISTANT,
        mesh=mesh,
        rows=batch_size,
        size=batch_size,
        batching='static',
        openings=(batch_size,),
    )
    with jax.set_mesh(mesh):
        print(f'{name}: {compiles.stated(compiles.counted(walk()))}', flush=True)
        if threads := compute.threads_to_compile():
            compiles.compile_ahead(name, walk(), threads)
    rows: list[dict[str, Any]] = []
    resamples, scores = [], []
    judges: dict[str, list[np.ndarray]] = {}
    causes: dict[int, str] = {}
    with compiles.compilations() as programs, Progress(name, -(-len(examples) // batch_size)) as progress:
        announcer = compiles.Announcer(name, programs)
        for chosen, found, without in judged_batches(
            *(user, assistant, examples, score),
            chat=chat,
            limits=limits,
            seed=seed,
            step=step,
            view=ASSISTANT,
            mesh=mesh,
            batch_size=batch_size,
            name=name,
            max_unjudged=compute.loop.max_unjudged,
        ):
            number, host = len(chosen), placement.to_host(found.batch)
            check_answered(name, without)
            causes |= {len(rows) + row: cause for row, cause in without.items()}
            rows += transcripts(host, chat.decode)[:number]
            resamples.append(host.resamples[:number])
            scores.append(np.where(found.rewards.valid, found.rewards.value, np.nan)[:number])
            for part, values in found.rewards.parts.items():
                if part.startswith(JUDGE_PART):
                    judges.setdefault(part, []).append(np.where(found.rewards.valid, values, np.nan)[:number])
            announcer.announce(f'{len(rows)} of {len(examples)} conversations')
            progress.update(tokens=float(np.sum(host.length[:number])))
    print_causes(name, causes.values())
    by_judge = {part: np.concatenate(values) for part, values in judges.items()}
    return Scored(examples, rows, np.concatenate(resamples), np.concatenate(scores), by_judge, causes)


def check_answered(name: str, causes: Mapping[int, str]) -> None:
    """Stops an evaluation whose endpoints fail in a way that may pass: its result would be of those that were up.

    Args:
        name: of the conversations.
        causes: of those without a score.

    Raises:
        ConversationError: there are such.
    """
    passing = collections.Counter(cause for cause in causes.values() if MAY_PASS in cause)
    if passing:
        found = ', '.join(f'{cause} ({count})' for cause, count in passing.most_common())
        raise ConversationError(
            f'{name}: {passing.total()} conversations have no score: {found}. Answers in the cache stay, and the same '
            'command asks for the others'
        )


def columns_of(scored: Scored, outcomes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The columns of a stage's result, one entry per example; see `experiments.results`.

    An example's cluster is its opening, where it has one: several people may have asked the same.

    Args:
        outcomes: columns of the conversations with a score.
    """
    place = {number: position for position, number in enumerate(scored.kept)}
    numbers = range(len(scored.rows))
    return {
        'example': [example.id for example in scored.examples],
        'cluster': [example.id if example.opening is None else example.opening for example in scored.examples],
        'cause': [scored.causes.get(number, '') for number in numbers],
        **{
            name: [values[place[number]] if number in place else None for number in numbers]
            for name, values in outcomes.items()
        },
    }


def outcome_columns(rows: Sequence[Mapping[str, Any]], scores: np.ndarray) -> dict[str, list[Any]]:
    """Columns of conversations; see `Scene.outcomes`."""
    messages = {
        role: [[m for m in row['messages'] if m['role'] == role] for row in rows] for role in ('assistant', 'user')
    }
    truncated = {role: [sum(m['truncated'] for m in row) for row in found] for role, found in messages.items()}
    return {
        'score': scores.tolist(),
        'end': [row['end_reason'] for row in rows],
        'assistant_turns': [len(row) for row in messages['assistant']],
        'truncated': truncated['assistant'],
        'user_truncated': truncated['user'],
        'assistant_tokens': [sum(m['tokens'] for m in row) for row in messages['assistant']],
    }
