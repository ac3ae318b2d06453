"""Examples as prompts of both agents, arrays of a fixed width, and conversations before their first sampled message.

1. `prompts_of` renders examples, on the host. Openings that the user has written for the examples (`openings.py`) are
   added as the tokens that were sampled.
2. `start_dialogue` prefills both contexts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import TEMPLATE, USER, Chat
from simrl.conversations.records import Example
from simrl.conversations.views import Rendered
from simrl.rollouts.agents import GenerationSpec, Limits, ModelAgent, OneAgent, Policy
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.context import Context, prefill
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.messages import header_lengths
from simrl.rollouts.state import Dialogue, EndReason, example_hash, init_dialogue, row_keys


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
        truncated: bool `[B]`, whether its budget cut it.
        end_reason: int8 `[B]`, an `EndReason` other than RUNNING where the conversation is over before it starts.
        example: uint32 `[B]`, hash of the example's id.
        sample: int32 `[B]`, which of the example's conversations.
        group: int32 `[B]`, equal for conversations of one example.
        resamples: int32 `[B]`, openings that the user discarded, in the first conversation of each example.
    """

    user: PromptRows
    assistant: PromptRows
    opening: np.ndarray | jax.Array
    opening_length: np.ndarray | jax.Array
    given: np.ndarray | jax.Array
    truncated: np.ndarray | jax.Array
    end_reason: np.ndarray | jax.Array
    example: np.ndarray | jax.Array
    sample: np.ndarray | jax.Array
    group: np.ndarray | jax.Array
    resamples: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class WrittenOpening:
    """The opening that the user wrote for an example.

    Attributes:
        ids: its content, a stop sequence included.
        truncated: whether its budget cut it.
        end_reason: RUNNING; SIGNAL where it ends the conversation, or FAILURE where there is none.
        resamples: how many the user discarded before.
    """

    ids: tuple[int, ...]
    truncated: bool = False
    end_reason: EndReason = EndReason.RUNNING
    resamples: int = 0


def prompts_of(
    examples: Sequence[Example],
    user: OneAgent,
    assistant: OneAgent | None,
    chat: Chat,
    *,
    samples: int,
    prompt_tokens: int,
    written: Sequence[WrittenOpening] | None = None,
) -> Prompts:
    """Renders `samples` neighbouring rows of each example.

    Args:
        user, assistant: the rows of one that is not on the device, or None, are empty and have no width.
        written: the openings of a user that writes one for each example.

    Raises:
        ValueError: a prompt is longer than `prompt_tokens`; `fitting` finds those that are not.
    """
    width = prompt_tokens
    if written is None:
        opened = examples
        openings = [None if x.opening is None else WrittenOpening(tuple(chat.encode(x.opening))) for x in examples]
    else:
        opened = [dataclasses.replace(example, opening=None) for example in examples]
        openings = [None if x.end_reason == EndReason.FAILURE else x for x in written]
        width = max(width, user.max_new_tokens)
    reasons = [EndReason.RUNNING] * len(examples) if written is None else [x.end_reason for x in written]
    prompts = Prompts(
        user=_prompt_rows(examples, user, prompt_tokens, 'user prompt', written, user.max_new_tokens),
        assistant=_prompt_rows(opened, assistant, prompt_tokens, 'assistant prompt', written, user.max_new_tokens),
        opening=_padded(examples, [x.ids if x else () for x in openings], width, np.int32, 'opening'),
        opening_length=np.array([len(x.ids) if x else 0 for x in openings], np.int32),
        given=np.array([x is not None for x in openings]),
        truncated=np.array([x is not None and x.truncated for x in openings]),
        end_reason=np.array(reasons, np.int8),
        example=np.array([example_hash(example.id) for example in examples], np.uint32),
        sample=np.zeros(len(examples), np.int32),
        group=np.arange(len(examples), dtype=np.int32),
        resamples=np.array([0] * len(examples) if written is None else [x.resamples for x in written], np.int32),
    )
    prompts = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
    sample = np.tile(np.arange(samples, dtype=np.int32), len(examples))
    return prompts.replace(sample=sample, resamples=np.where(sample == 0, prompts.resamples, np.int32(0)))


def _prompt_rows(
    examples: Sequence[Example],
    agent: OneAgent | None,
    width: int,
    what: str,
    written: Sequence[WrittenOpening] | None,
    opening_tokens: int,
) -> PromptRows:
    if not isinstance(agent, ModelAgent):
        nothing, none = np.zeros((len(examples), 0), np.int32), np.zeros(len(examples), np.int32)
        return PromptRows(nothing, nothing.astype(np.int8), nothing.astype(np.int16), none)
    rendered = [agent.prompt(example) for example in examples]
    for example, prompt in zip(examples, rendered, strict=True):
        if len(prompt) > width:
            raise ValueError(f'example {example.id}: its {what} has {len(prompt)} tokens, expected at most {width}')
    if written is not None:
        spec = agent.policy.spec
        rendered = [_with_opening(*pair, spec) for pair in zip(rendered, written, strict=True)]
        width += max(header_lengths(spec)) + opening_tokens + 1
    return PromptRows(
        tokens=_padded(examples, [r.tokens for r in rendered], width, np.int32, what),
        role=_padded(examples, [r.role for r in rendered], width, np.int8, what),
        message=_padded(examples, [r.message for r in rendered], width, np.int16, what),
        length=np.array([len(r.tokens) for r in rendered], np.int32),
    )


def _with_opening(prompt: Rendered, opening: WrittenOpening, spec: GenerationSpec) -> Rendered:
    """The prompt and the user's opening after it, as a rollout would have left them in this view."""
    own, ends = spec.role == USER, opening.end_reason == EndReason.SIGNAL
    if opening.end_reason == EndReason.FAILURE or (ends and not own):
        return prompt
    header = spec.own_first_header if own else spec.partner_first_header
    end = () if ends else (spec.end_of_turn if own else spec.partner_end_of_turn,)
    role = [TEMPLATE] * len(header) + [USER] * len(opening.ids) + [TEMPLATE if opening.truncated else USER] * len(end)
    tokens = (*header, *opening.ids, *end)
    return Rendered(
        tokens=np.concatenate([prompt.tokens, np.array(tokens, np.int32)]),
        role=np.concatenate([prompt.role, np.array(role, np.int8)]),
        message=np.concatenate([prompt.message, np.zeros(len(tokens), np.int16)]),
        trained=np.concatenate([prompt.trained, np.zeros(len(tokens), np.bool_)]),
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


@functools.partial(jax.jit, static_argnames=('limits', 'max_new_tokens'))
def start_dialogue(
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
        truncated=jnp.asarray(prompts.truncated),
        end_reason=jnp.asarray(prompts.end_reason),
    )
    dialogue = dataclasses.replace(dialogue, resamples=jnp.asarray(prompts.resamples))
    keys = row_keys(seed, step, jnp.asarray(prompts.example), jnp.asarray(prompts.sample))
    return shard_tree((dialogue, keys))
