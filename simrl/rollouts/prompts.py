"""Examples as prompts of both agents: arrays of a fixed width, on the host."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example
from simrl.rollouts.agents import Agent, HostAgent, Policy
from simrl.rollouts.context import Context, prefill
from simrl.rollouts.state import example_hash


@flax.struct.dataclass
class PromptRows:
    """Prompts of one view, left-aligned: tokens, role and message as in `Context`, `[B, P]`; length int32 `[B]`."""

    tokens: np.ndarray | jax.Array
    role: np.ndarray | jax.Array
    message: np.ndarray | jax.Array
    length: np.ndarray | jax.Array


@flax.struct.dataclass
class Prompts:
    """A batch of examples, rendered for both agents. B rows, P prompt tokens.

    Attributes:
        user, assistant: each agent's prompts.
        opening: int32 `[B, P]`, content ids of given openings.
        opening_length: int32 `[B]`.
        given: bool `[B]`, whether there is one.
        example: uint32 `[B]`, hash of the example's id.
        sample: int32 `[B]`, which of the example's conversations.
        group: int32 `[B]`, equal for conversations of one example.
    """

    user: PromptRows
    assistant: PromptRows
    opening: np.ndarray | jax.Array
    opening_length: np.ndarray | jax.Array
    given: np.ndarray | jax.Array
    example: np.ndarray | jax.Array
    sample: np.ndarray | jax.Array
    group: np.ndarray | jax.Array


def prompts_of(
    examples: Sequence[Example],
    user: Agent,
    assistant: Agent,
    chat: Chat,
    *,
    samples: int,
    prompt_tokens: int,
) -> Prompts:
    """Renders `samples` neighbouring rows of each example.

    Args:
        user, assistant: the rows of one that is not on the device are empty and have no width.

    Raises:
        ValueError: a prompt is longer than `prompt_tokens`; `fitting` finds those that are not.
    """
    openings = [() if example.opening is None else chat.encode(example.opening) for example in examples]
    prompts = Prompts(
        user=_prompt_rows(examples, user, prompt_tokens, 'user prompt'),
        assistant=_prompt_rows(examples, assistant, prompt_tokens, 'assistant prompt'),
        opening=_padded(examples, openings, prompt_tokens, np.int32, 'opening'),
        opening_length=np.array([len(ids) for ids in openings], np.int32),
        given=np.array([example.opening is not None for example in examples]),
        example=np.array([example_hash(example.id) for example in examples], np.uint32),
        sample=np.zeros(len(examples), np.int32),
        group=np.arange(len(examples), dtype=np.int32),
    )
    prompts = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
    return prompts.replace(sample=np.tile(np.arange(samples, dtype=np.int32), len(examples)))


def _prompt_rows(examples: Sequence[Example], agent: Agent, width: int, what: str) -> PromptRows:
    if isinstance(agent, HostAgent):
        nothing, none = np.zeros((len(examples), 0), np.int32), np.zeros(len(examples), np.int32)
        return PromptRows(nothing, nothing.astype(np.int8), nothing.astype(np.int16), none)
    rendered = [agent.prompt(example) for example in examples]
    return PromptRows(
        tokens=_padded(examples, [r.tokens for r in rendered], width, np.int32, what),
        role=_padded(examples, [r.role for r in rendered], width, np.int8, what),
        message=_padded(examples, [r.message for r in rendered], width, np.int16, what),
        length=np.array([len(r.tokens) for r in rendered], np.int32),
    )


def _padded(
    examples: Sequence[Example], rows: Sequence[Sequence[int] | np.ndarray], width: int, dtype: type, what: str
) -> np.ndarray:
    out: np.ndarray = np.zeros((len(rows), width), dtype)
    for i, (example, ids) in enumerate(zip(examples, rows, strict=True)):
        if len(ids) > width:
            raise ValueError(f'example {example.id}: its {what} has {len(ids)} tokens, expected at most {width}')
        out[i, : len(ids)] = ids
    return out


def prefill_prompts(policy: Policy, rows: PromptRows, capacity: int) -> Context:
    """A context of prompts, with room for `capacity` tokens; see `prefill`."""
    arrays = (jnp.asarray(x) for x in (rows.tokens, rows.role, rows.message, rows.length))
    return prefill(policy, *arrays, capacity=capacity)
