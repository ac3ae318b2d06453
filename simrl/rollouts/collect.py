"""Examples and two agents in, trajectories out.

1. `prompts_of` renders examples for both agents, on the host.
2. `collect` lets two agents converse from examples, for a step of training; `collect_batches` from many examples, for
   an evaluation.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.models.rows import shard_rows
from simrl.models.transformer import Params
from simrl.rollouts.agents import Agent, GenerationSpec, HostAgent, Limits, ModelAgent
from simrl.rollouts.compaction import keep_split
from simrl.rollouts.dialogue import begin, capacities, rollout
from simrl.rollouts.host import converse_with
from simrl.rollouts.prompts import Prompts, prefilled, prompts_of
from simrl.rollouts.state import Dialogue, row_keys
from simrl.rollouts.trajectories import Trajectories, trajectories
from simrl.run.progress import Progress

_cast = functools.lru_cache(placement.for_sampling)


def for_sampling(agent: Agent, mesh: Mesh) -> Agent:
    """The agent with its parameters in the sampler's dtype and shards, and its mask on the devices."""
    if isinstance(agent, HostAgent):
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
) -> tuple[Trajectories, Mapping[int, str]]:
    """Conversations from each example.

    Args:
        user, assistant: from `for_sampling`.
        seed, step: with the example and the sample they decide every draw.
        view: USER or ASSISTANT, the agent in whose view they are returned; it is on the device.
        samples: conversations of each example, which are neighbouring rows.
        rows_in_flight: conversations in the device's batch at once; the others wait. It bounds the caches, and changes
            no token. None: all of them.

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
            rows = placement.shard_batch(jax.tree.map(operator.itemgetter(piece), prompts), mesh)
            batch, failed = _converse(
                user, assistant, rows, example_of_row[piece], chat, seed, step, limits=limits, view=view
            )
            failures |= {piece.start + row: reason for row, reason in failed.items()}
            batches.append(batch)
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
        RuntimeError: an agent off the device failed.
    """
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
                raise RuntimeError(f'{name}: {len(failures)} conversations failed, the first: {min(failures.items())}')
            yield chosen, batch
            progress.update(tokens=float(np.sum(placement.to_host(batch.length)[: len(chosen)])))


def rows_at_once(rows: int, rows_in_flight: int | None) -> int:
    """How many of `rows` conversations are in the device's batch at once.

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
    examples: Sequence[Example],
    chat: Chat,
    seed: int,
    step: int,
    *,
    limits: Limits,
    view: int,
) -> tuple[Trajectories, Mapping[int, str]]:
    if isinstance(user, HostAgent) or isinstance(assistant, HostAgent):
        own, partner = (user, assistant) if view == USER else (assistant, user)
        assert isinstance(own, ModelAgent)
        assert isinstance(partner, HostAgent)
        return converse_with(own, partner, prompts, examples, chat, seed, step, limits=limits)
    policies = (user.policy, assistant.policy)
    specs, params = (user.policy.spec, assistant.policy.spec), (user.policy.params, assistant.policy.params)
    dialogue, keys = _start(*params, prompts, seed, step, specs=specs, limits=limits)
    dialogue = rollout(
        *params,
        dialogue,
        keys,
        specs=specs,
        turns=limits.turns,
        temperatures=(user.policy.temperature, assistant.policy.temperature),
        token_mask=tuple(policy.token_mask for policy in policies),  # type: ignore[arg-type]
    )
    return _trajectories(dialogue, view, prompts.example, prompts.group), {}


@functools.partial(jax.jit, static_argnames=('specs', 'limits'))
def _start(
    params_user: Params,
    params_assistant: Params,
    prompts: Prompts,
    seed: int,
    step: int,
    *,
    specs: tuple[GenerationSpec, GenerationSpec],
    limits: Limits,
) -> tuple[Dialogue, jax.Array]:
    """The conversations before their first sampled message, and their keys."""
    sizes = capacities(*specs, limits)
    dialogue = begin(
        prefilled(params_user, specs[0], prompts.user, sizes[0]),
        prefilled(params_assistant, specs[1], prompts.assistant, sizes[1]),
        jnp.asarray(prompts.opening),
        jnp.asarray(prompts.opening_length),
        jnp.asarray(prompts.given),
        turns=limits.turns,
        max_new_tokens=(specs[0].max_new_tokens, specs[1].max_new_tokens),
    )
    return keep_split((dialogue, row_keys(seed, step, prompts.example, prompts.sample)))  # type: ignore[arg-type]


_trajectories = jax.jit(trajectories, static_argnames='role')
