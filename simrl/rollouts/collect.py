"""Examples and two agents in, trajectories out.

1. `prompts_of` renders examples for both agents, on the host.
2. `collect` lets two agents converse from examples, for a step of training; `collect_batches` from many examples, for
   an evaluation.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.models.rows import shard_rows
from simrl.rollouts.agents import Agent, HostAgent, HostConversation, Limits, ModelAgent, Policy
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.context import Context
from simrl.rollouts.dialogue import capacity, check_agents, converse
from simrl.rollouts.host import HostReplies
from simrl.rollouts.prompts import PromptRows, Prompts, prefill_prompts, prompts_of
from simrl.rollouts.state import Dialogue, init_dialogue, row_keys
from simrl.rollouts.trajectories import Trajectories, trajectories
from simrl.run.progress import Progress

OnPiece = Callable[[Trajectories, Sequence[Example]], None]
_Agent = TypeVar('_Agent', bound=Agent)
_cast = functools.lru_cache(placement.for_sampling)


class ConversationError(RuntimeError):
    """Conversations failed, or were not scored: too many for a step of training, or one that is to be measured."""


def for_sampling(agent: _Agent, mesh: Mesh) -> _Agent:
    """The agent with its parameters in the sampler's dtype and shards, and its mask on the devices."""
    if not isinstance(agent, ModelAgent):
        return agent
    spec = agent.policy.spec
    params = _cast(spec.config, spec.execution.dtype, mesh)(agent.policy.params)
    token_mask = jnp.asarray(agent.policy.token_mask)
    return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, params=params, token_mask=token_mask))


def collect(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    seed: int,
    step: int,
    view: int,
    mesh: Mesh,
    samples: int = 1,
    rows_in_flight: int | None = None,
    on_piece: OnPiece | None = None,
) -> tuple[Trajectories, Mapping[int, str]]:
    """Conversations from each example.

    Args:
        user, assistant: from `for_sampling`.
        seed, step: with the example and the sample they decide every draw.
        view: USER or ASSISTANT, the agent in whose view they are returned; it is on the device.
        samples: conversations of each example, which are neighbouring rows.
        rows_in_flight: conversations in the device's batch at once; the others wait. It bounds the caches, and changes
            no token. None: all of them.
        on_piece: called with the conversations of each `rows_in_flight` rows, and each row's example, before the next
            ones are sampled.

    Returns:
        The conversations, and by row the reason why an agent off the device failed.

    Raises:
        ValueError: `rows_in_flight` does not divide the conversations, or the agent of `view` is off the device.
    """
    if isinstance(user if view == USER else assistant, HostAgent):
        raise ValueError('view: expected an agent on the device, found a HostAgent')
    example_of_row = [example for example in examples for _ in range(samples)]
    size = rows_at_once(len(example_of_row), rows_in_flight)
    batches: list[Trajectories] = []
    failures: dict[int, str] = {}
    with jax.set_mesh(mesh):
        prompts = prompts_of(examples, user, assistant, chat, samples=samples, prompt_tokens=limits.prompt_tokens)
        for piece in (slice(i, i + size) for i in range(0, len(example_of_row), size)):
            rows = jax.tree.map(operator.itemgetter(piece), prompts)
            starts = [
                HostConversation(*start, ()) for start in zip(example_of_row[piece], rows.sample.tolist(), strict=True)
            ]
            placed = placement.shard_batch(rows, mesh)
            batch, failed = _converse(user, assistant, placed, starts, chat, seed, step, limits=limits, view=view)
            failures |= {piece.start + row: reason for row, reason in failed.items()}
            batches.append(batch)
            if on_piece is not None:
                on_piece(batch, example_of_row[piece])
        return batches[0] if len(batches) == 1 else _joined(batches), failures


def collect_batches(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    *,
    chat: Chat,
    limits: Limits,
    seed: int,
    step: int,
    batch_size: int,
    mesh: Mesh,
    name: str,
    view: int = ASSISTANT,
) -> Iterator[tuple[Sequence[Example], Trajectories]]:
    """One conversation from each example, `batch_size` at a time; arguments as of `collect`.

    A conversation depends on its example and both agents only, not on the batch. Agents that are compared meet the same
    random numbers.

    Args:
        user, assistant: as they are; `for_sampling` is called here.
        name: of the progress bar and in errors.

    Yields:
        Examples, and their conversations on the device: always `batch_size` rows, of which those past the examples are
        to be left out.

    Raises:
        ConversationError: an agent off the device failed.
    """
    check_agents(user, assistant, chat, limits)
    with jax.set_mesh(mesh):
        user, assistant = for_sampling(user, mesh), for_sampling(assistant, mesh)
    with Progress(name, -(-len(examples) // batch_size)) as progress:
        for start in range(0, len(examples), batch_size):
            chosen = list(examples[start : start + batch_size])
            padded = chosen + chosen[-1:] * (batch_size - len(chosen))
            batch, failures = collect(
                user, assistant, padded, chat=chat, limits=limits, seed=seed, step=step, view=view, mesh=mesh
            )
            if failures:
                row, reason = min(failures.items())
                raise ConversationError(
                    f'{name}: {len(failures)} of {len(chosen)} conversations failed, the first, with example '
                    f'{padded[row].id}: {reason}'
                )
            yield chosen, batch
            progress.update(tokens=float(np.sum(placement.to_host(batch.length)[: len(chosen)])))


def rows_at_once(rows: int, rows_in_flight: int | None) -> int:
    """The number of conversations in the device's batch at once, of `rows` in all.

    Raises:
        ValueError: `rows_in_flight` does not divide them.
    """
    if rows_in_flight is not None and (rows_in_flight < 1 or rows % rows_in_flight):
        raise ValueError(
            f'rows_in_flight: expected None or a divisor of the {rows} rows of a step, found {rows_in_flight}'
        )
    return rows if rows_in_flight is None else rows_in_flight


@jax.jit
def _joined(batches: Sequence[Trajectories]) -> Trajectories:
    """One batch of the rows of all of them, in their order."""
    return jax.tree.map(lambda *pieces: shard_rows(jnp.concatenate(pieces)), *batches)


def _converse(
    user: Agent,
    assistant: Agent,
    prompts: Prompts,
    starts: Sequence[HostConversation],
    chat: Chat,
    seed: int,
    step: int,
    *,
    limits: Limits,
    view: int,
) -> tuple[Trajectories, Mapping[int, str]]:
    """The conversations of the prompts' rows, and failures by row; `starts` has each row as a host agent reads it."""
    policies = tuple(agent.policy if isinstance(agent, ModelAgent) else None for agent in (user, assistant))
    max_new_tokens = (user.max_new_tokens, assistant.max_new_tokens)
    dialogue, keys = _start(*policies, prompts, seed, step, limits=limits, max_new_tokens=max_new_tokens)
    failures: dict[int, str] = {}

    def side(agent: Agent) -> Policy | HostReplies:
        if isinstance(agent, ModelAgent):
            return agent.policy
        return HostReplies(agent, list(starts), keys, chat, failures)

    dialogue = converse(side(user), side(assistant), dialogue, keys, turns=limits.turns)
    return _trajectories(dialogue, view, prompts.example, prompts.group), failures


@functools.partial(jax.jit, static_argnames=('limits', 'max_new_tokens'))
def _start(
    user: Policy | None,
    assistant: Policy | None,
    prompts: Prompts,
    seed: int,
    step: int,
    *,
    limits: Limits,
    max_new_tokens: tuple[int, int],
) -> tuple[Dialogue, jax.Array]:
    """The conversations before their first sampled message, and their keys."""

    def context(policy: Policy | None, rows: PromptRows, partner: int, name: str) -> Context | None:
        if policy is None:
            return None
        size = capacity(policy.spec, partner, limits.prompt_tokens, limits.turns, name)
        return prefill_prompts(policy, rows, size)

    dialogue = init_dialogue(
        context(user, prompts.user, max_new_tokens[1], 'user'),
        context(assistant, prompts.assistant, max_new_tokens[0], 'assistant'),
        jnp.asarray(prompts.opening),
        jnp.asarray(prompts.opening_length),
        jnp.asarray(prompts.given),
        turns=limits.turns,
        max_new_tokens=max_new_tokens,
    )
    keys = row_keys(seed, step, jnp.asarray(prompts.example), jnp.asarray(prompts.sample))
    return shard_tree((dialogue, keys))


_trajectories = jax.jit(trajectories, static_argnames='view')
