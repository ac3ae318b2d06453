"""The two sides of a conversation, and the call that lets them talk: examples in, trajectories out.

A side on the device is a `ModelAgent`: parameters, how they are sampled, and a function from an example to its prompt.
A user simulator and an assistant are the same thing on opposite sides. For a side that is not on the device see `host`.

1. `prompts_of` renders a batch of examples for both sides into arrays of a fixed width, on the host.
2. `converse` prefills both contexts, rolls whole conversations out and keeps one view of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER, Chat, Header
from simrl.conversations.records import Example
from simrl.conversations.views import Rendered
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts import dialogue as rollout_lib
from simrl.rollouts.compaction import keep_split
from simrl.rollouts.context import Context, prefill
from simrl.rollouts.dialogue import Dialogue, begin, capacity, rollout
from simrl.rollouts.generate import GenerationSpec, Sampling
from simrl.rollouts.trajectories import Trajectories, trajectories


@dataclasses.dataclass(frozen=True, eq=False)
class ModelAgent:
    """One side of a conversation on the device.

    Attributes:
        params: its model's; the trained side's change between calls and are passed beside it.
        spec: what the compiled program fixes about it.
        temperature: of its sampling.
        token_mask: bool `[V]`, the ids it may sample.
        prompt: an example -> what its view holds before the first sampled message.
        signal: the text by which it ends a conversation; empty where it cannot.
    """

    params: Params
    spec: GenerationSpec
    temperature: float
    token_mask: np.ndarray
    prompt: Callable[[Example], Rendered]
    signal: str = ''


def generation_spec(
    chat: Chat,
    config: TransformerConfig,
    execution: Execution,
    *,
    role: int,
    swapped: bool,
    max_new_tokens: int,
    sampling: Sampling,
    stop_sequences: tuple[tuple[int, ...], ...] = (),
) -> GenerationSpec:
    """The spec of `role` under its own header, or in the swapped view under its partner's."""
    own: Header = 'user' if (role == USER) != swapped else 'assistant'
    partner: Header = 'assistant' if own == 'user' else 'user'
    return GenerationSpec(
        config=config,
        execution=execution,
        role=role,
        own_header=chat.header(own),
        partner_header=chat.header(partner),
        # In the swapped view a system message precedes, so that the first header is as any other.
        own_first_header=chat.header(own) if swapped else chat.first_header(own),
        partner_first_header=chat.header(partner) if swapped else chat.first_header(partner),
        end_of_turn=chat.end_of_turn[own],
        partner_end_of_turn=chat.end_of_turn[partner],
        max_new_tokens=max_new_tokens,
        stop_sequences=stop_sequences,
        filters=sampling.filters,
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes that every conversation of a run fits into."""

    turns: int  # user messages with a reply, a given opening included
    prompt_tokens: int  # of the longest prompt in either view
    assistant_tokens: int  # most tokens sampled for an assistant's message, its end-of-turn included
    user_tokens: int  # the same for the simulated user

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'Limits.{field.name}: expected at least 1, found {getattr(self, field.name)}')


@flax.struct.dataclass
class PromptRows:
    """Prompts of one view, left-aligned: tokens, role and message as in `Context`, `[B, P]`; length int32 `[B]`."""

    tokens: np.ndarray | jax.Array
    role: np.ndarray | jax.Array
    message: np.ndarray | jax.Array
    length: np.ndarray | jax.Array


@flax.struct.dataclass
class Prompts:
    """A batch of examples, rendered for both sides. B rows, P prompt tokens.

    Attributes:
        user, assistant: what each side's view holds.
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


def fitting(
    examples: Sequence[Example], sides: Sequence[ModelAgent], chat: Chat, prompt_tokens: int
) -> tuple[list[Example], int]:
    """The examples whose prompts fit into `prompt_tokens` on every side, and how many do not."""

    def fits(example: Example) -> bool:
        opening = 0 if example.opening is None else len(chat.encode(example.opening))
        return max(opening, *(len(side.prompt(example).tokens) for side in sides)) <= prompt_tokens

    kept = [example for example in examples if fits(example)]
    return kept, len(examples) - len(kept)


def prompts_of(
    examples: Sequence[Example],
    user: ModelAgent | None,
    assistant: ModelAgent | None,
    chat: Chat,
    *,
    samples: int,
    prompt_tokens: int,
) -> Prompts:
    """Renders `samples` neighbouring rows of each example.

    Args:
        user, assistant: None where that side is not on the device: its rows are empty and have no width.

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
        example=np.array([rollout_lib.example_hash(example.id) for example in examples], np.uint32),
        sample=np.zeros(len(examples), np.int32),
        group=np.arange(len(examples), dtype=np.int32),
    )
    prompts = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
    return prompts.replace(sample=np.tile(np.arange(samples, dtype=np.int32), len(examples)))


def _prompt_rows(examples: Sequence[Example], side: ModelAgent | None, width: int, what: str) -> PromptRows:
    if side is None:
        nothing, none = np.zeros((len(examples), 0), np.int32), np.zeros(len(examples), np.int32)
        return PromptRows(nothing, nothing.astype(np.int8), nothing.astype(np.int16), none)
    rendered = [side.prompt(example) for example in examples]
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


def capacities(user: GenerationSpec, assistant: GenerationSpec, limits: Limits) -> tuple[int, int]:
    """The sizes of both contexts, checked against the models' positions."""
    return (
        capacity(user, assistant.max_new_tokens, limits.prompt_tokens, limits.turns, 'user'),
        capacity(assistant, user.max_new_tokens, limits.prompt_tokens, limits.turns, 'assistant'),
    )


def converse(
    params_user: Params,
    params_assistant: Params,
    prompts: Prompts,
    seed: int,
    step: int,
    *,
    specs: tuple[GenerationSpec, GenerationSpec],
    limits: Limits,
    role: int,
    temperatures: tuple[jax.Array | float, jax.Array | float],
    token_mask: tuple[jax.Array, jax.Array],
) -> Trajectories:
    """Whole conversations from prompts, in the view of `role` (USER or ASSISTANT).

    Args:
        seed, step: of the training run; with the example and the sample they decide every draw.
        specs, temperatures, token_mask: the user's and the assistant's.
    """
    dialogue, keys = _start(params_user, params_assistant, prompts, seed, step, specs=specs, limits=limits)
    dialogue = rollout(
        params_user,
        params_assistant,
        dialogue,
        keys,
        specs=specs,
        turns=limits.turns,
        temperatures=temperatures,
        token_mask=token_mask,
    )
    return _trajectories(dialogue, role, prompts.example, prompts.group)


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
    return keep_split((dialogue, rollout_lib.row_keys(seed, step, prompts.example, prompts.sample)))  # type: ignore[arg-type]


_trajectories = jax.jit(trajectories, static_argnames='role')


def prefilled(params: Params, spec: GenerationSpec, rows: PromptRows, size: int) -> Context:
    """A view that holds its prompts, with room for `size` tokens; see `prefill`."""
    return prefill(
        params,
        spec.config,
        spec.execution,
        jnp.asarray(rows.tokens),
        jnp.asarray(rows.role),
        jnp.asarray(rows.message),
        jnp.asarray(rows.length),
        capacity=size,
        chunk=spec.feed_chunk,
    )


def assistant(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    prompt: Callable[[Example], Rendered],
) -> ModelAgent:
    """An assistant: it sees the conversation under the template's default system text, and nothing of an intent."""
    spec = generation_spec(
        chat, config, execution, role=ASSISTANT, swapped=False, max_new_tokens=max_new_tokens, sampling=sampling
    )
    token_mask = chat.token_mask(config.padded_vocab_size, terminal=False, header='assistant')
    return ModelAgent(params, spec, sampling.temperature, token_mask, prompt)
