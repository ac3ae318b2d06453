"""Two models and what they start from in, whole conversations out.

1. `begin` puts two prefilled contexts, the views of the user's and the assistant's model, and given openings together.
2. `turn` adds one message by one side: header, sampled content, end-of-turn in its own view; then the same content,
   under the other header, in its partner's view.
3. `rollout` takes turns: the user's message, then the assistant's, until `turns` are over or no row has more to say.

`turn` is a compiled program, and `rollout` a Python loop over it, so that between two messages the shapes may change:
only rows that go on are held (`crowd.py`), and caches have room for little more than what was said (`grow_cache`),
which no single program could do. It costs one wait for the device in each message, for a few numbers of each row:
little beside the many decode steps of a message.

What is sampled is what both models read: content is never decoded and encoded again, so both share a tokenizer. Rows
that have ended write nothing more. A row's conversation depends on its own contexts and its own key, not on the other
rows, their number, the capacity, or the devices.

Letters: B rows, S capacity of a context, M messages of a conversation, L tokens of a message, V padded vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models.transformer import Params
from simrl.rollouts.agents import GenerationSpec, Limits
from simrl.rollouts.compaction import compact, crowd_of, everyone, keep_split
from simrl.rollouts.context import Context, capacity_for, grow_cache, round_up
from simrl.rollouts.messages import can_hear, can_speak, header_room, hear, hearing_room, speak, speaking_room
from simrl.rollouts.state import Dialogue, EndReason, Standing, begin_record, record, waiting_for

_Tree = TypeVar('_Tree')


def begin(
    user: Context,
    assistant: Context,
    opening: jax.Array,
    opening_length: jax.Array,
    given: jax.Array,
    *,
    turns: int,
    max_new_tokens: tuple[int, int],
) -> Dialogue:
    """Conversations before their first sampled message.

    Args:
        user, assistant: contexts of what precedes it in each view. Where an opening is given, the assistant's holds it
            under the user header, with its end-of-turn; the user's does where it speaks in the natural view.
        opening, opening_length, given, turns, max_new_tokens: as in `begin_record`.

    Rows with an empty context end as FAILURE at once.
    """
    empty = (user.length == 0) | (assistant.length == 0)
    said = begin_record(opening, opening_length, given, empty, turns=turns, max_new_tokens=max_new_tokens)
    return Dialogue(user=user, assistant=assistant, **vars(said))


@functools.partial(jax.jit, static_argnames=('role', 'specs'), donate_argnames='dialogue')
def turn(
    params_user: Params,
    params_assistant: Params,
    dialogue: Dialogue,
    row_keys: jax.Array,
    *,
    role: int,
    specs: tuple[GenerationSpec, GenerationSpec],
    temperatures: tuple[jax.Array | float, jax.Array | float],
    token_mask: tuple[jax.Array, jax.Array],
) -> Dialogue:
    """One message by `role` (USER or ASSISTANT) in the rows that wait for it; other rows stay as they are.

    Arguments as in `rollout`; the dialogue is used up.
    """
    side = 0 if role == USER else 1
    params, partner_params = (params_user, params_assistant)[:: 1 - 2 * side]
    spec, partner_spec = specs[:: 1 - 2 * side]
    own, partner = (dialogue.user, dialogue.assistant)[:: 1 - 2 * side]
    number = dialogue.num_messages
    waiting = waiting_for(dialogue, role)
    active = waiting & can_speak(spec, own) & can_hear(partner_spec, partner, spec.max_new_tokens)
    own, message = speak(params, spec, own, row_keys, number, active, token_mask[side], temperatures[side])
    partner = hear(partner_params, partner_spec, partner, message, number, active & ~message.signalled)
    user, assistant = (own, partner)[:: 1 - 2 * side]
    return keep_split(record(dataclasses.replace(dialogue, user=user, assistant=assistant), message, waiting, active))


def rollout(
    params_user: Params,
    params_assistant: Params,
    dialogue: Dialogue,
    row_keys: jax.Array,
    *,
    specs: tuple[GenerationSpec, GenerationSpec],
    turns: int,
    temperatures: tuple[jax.Array | float, jax.Array | float],
    token_mask: tuple[jax.Array, jax.Array],
) -> Dialogue:
    """Whole conversations, or what is left of them: `dialogue` may also stand between the two messages of a turn.

    In each of `turns` turns the rows that wait for the user hear from it, then those that wait for the assistant. So
    given and simulated openings go together, and a message that no row waits for costs nothing. `turn` is compiled once
    for each role, number of rows (`crowd.held_sizes`) and size of the caches (`context.cache_capacities`) that occur;
    rows only get fewer and caches larger, so that one call meets at most the sum of both numbers for each role.

    Args:
        params_user, params_assistant: of the two models, which may differ in everything but the tokenizer.
        dialogue: where to start. It is used up: its arrays are not to be read again.
        row_keys: typed keys `[B]`; token i of message m of a row is drawn with its key, m and i folded in.
        specs: the user's and the assistant's.
        turns: how many turns to run. Conversations end as TURNS when `dialogue.messages` is full; rows that `turns` did
            not suffice for are still RUNNING.
        temperatures: the user's and the assistant's; each a scalar or float32 `[B]`, 0 for greedy.
        token_mask: the tokens that the user and the assistant may sample, bool `[V]` each.

    Returns:
        The dialogue without caches: it is over, and cannot be gone on with.
    """
    num_rows = dialogue.num_messages.shape[0]
    of_rows = tuple(jnp.broadcast_to(jnp.asarray(t, jnp.float32), (num_rows,)) for t in temperatures)
    crowd = crowd_of(dialogue, (row_keys, of_rows), num_rows)
    for number in range(2 * turns):
        role = (USER, ASSISTANT)[number % 2]
        # The one wait for the device in a message: what is decided here decides the shapes of the next program.
        standing, lengths = _facts(crowd.held)
        running = np.asarray(standing.end_reason) == EndReason.RUNNING
        if not running.any():
            break
        if not waiting_for(standing, role).any():
            continue
        crowd = compact(crowd, running)
        keys, of_held = crowd.inputs
        longest = [int(length[running].max()) for length in lengths]
        dialogue = turn(
            params_user,
            params_assistant,
            make_room(crowd.held, longest, role, specs),
            keys,
            role=role,
            specs=specs,
            temperatures=of_held,
            token_mask=token_mask,
        )
        crowd = dataclasses.replace(crowd, held=dialogue)
    return everyone(crowd)


def make_room(
    dialogue: Dialogue, longest: Sequence[int], role: int, specs: tuple[GenerationSpec, GenerationSpec]
) -> Dialogue:
    """The dialogue, its caches large enough for a message by `role` in rows of up to these lengths."""
    user, assistant = specs
    if role == USER:
        rooms = speaking_room(user), hearing_room(assistant, user.max_new_tokens)
    else:
        rooms = hearing_room(user, assistant.max_new_tokens), speaking_room(assistant)
    # Both views hold about the same: with one size for both there are fewer programs.
    needed = max(length + room for length, room in zip(longest, rooms, strict=True))
    size = capacity_for(needed, max(dialogue.user.capacity, dialogue.assistant.capacity))
    return dataclasses.replace(
        dialogue, user=grow_cache(dialogue.user, size), assistant=grow_cache(dialogue.assistant, size)
    )


def _facts(dialogue: Dialogue) -> tuple[Standing, tuple[np.ndarray, np.ndarray]]:
    """On the host: how far the conversations have come, and the lengths of the user's and the assistant's view."""
    standing = Standing(dialogue.num_messages, dialogue.end_reason)
    return jax.device_get(_everywhere((standing, (dialogue.user.length, dialogue.assistant.length))))


@jax.jit
def _everywhere(rows: _Tree) -> _Tree:
    """Arrays whole on every device, and so in every process."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), rows)


def capacity(
    spec: GenerationSpec, partner_max_new_tokens: int, prompt_length: int, turns: int, name: str = 'spec'
) -> int:
    """A context's room, in tokens, so that every conversation fits, checked against the model's positions.

    It is what they take, `round_up`, which may be a little more than there are positions and is never written there. A
    turn takes at most both headers, both budgets, and both forced ends of turn, which the budgets do not count.

    Args:
        spec: whose context it is.
        partner_max_new_tokens: the partner's `GenerationSpec.max_new_tokens`.
        prompt_length: tokens of the longest prompt in this view.
        turns: of the conversation.
        name: what an error calls the spec.
    """
    own_header, partner_header = header_room(spec)
    per_turn = own_header + spec.max_new_tokens + 1 + partner_header + partner_max_new_tokens + 1
    needed = prompt_length + turns * per_turn
    if needed > spec.config.max_positions:
        raise ValueError(
            f'{name}: expected conversations of at most max_positions={spec.config.max_positions} tokens, found that '
            f'one may take {needed}: prompt_length={prompt_length} + turns={turns} x {per_turn}, a turn being own '
            f'header {own_header} + own budget {spec.max_new_tokens} + 1 + partner header {partner_header} + its '
            f'budget {partner_max_new_tokens} + 1'
        )
    return round_up(needed)


def check_specs(specs: Sequence[GenerationSpec], token_mask: Sequence[np.ndarray]) -> None:
    """Raises unless the two specs can talk: their roles, masks and signals fit their vocabularies and each other."""
    for spec, mask, role, name in zip(specs, token_mask, (USER, ASSISTANT), ('user', 'assistant'), strict=True):
        if spec.role != role:
            raise ValueError(f'specs: expected the {name} to have role {role}, found {spec.role}')
        if mask.shape != (spec.config.padded_vocab_size,):
            raise ValueError(
                f"allowed: expected an entry for each of the {name}'s {spec.config.padded_vocab_size} embedding rows, "
                f'found shape {mask.shape}'
            )
        if not mask[spec.end_of_turn]:
            raise ValueError(f'allowed: expected the {name} to be allowed its end_of_turn={spec.end_of_turn}')
        forbidden = [run for run in spec.stop_sequences if not all(mask[token] for token in run)]
        if forbidden:
            raise ValueError(f'GenerationSpec.stop_sequences: the {name} is not allowed to sample all of {forbidden}')
    smallest = min(spec.config.vocab_size for spec in specs)
    for mask, name in zip(token_mask, ('user', 'assistant'), strict=True):
        beyond = np.flatnonzero(np.asarray(mask)[smallest:])
        if beyond.size:
            raise ValueError(
                f'allowed: the {name} may sample id {smallest + beyond[0]}, which the smaller vocabulary of '
                f'{smallest} does not have; both models must share a tokenizer'
            )


def capacities(user: GenerationSpec, assistant: GenerationSpec, limits: Limits) -> tuple[int, int]:
    """The sizes of both contexts, checked against the models' positions."""
    return (
        capacity(user, assistant.max_new_tokens, limits.prompt_tokens, limits.turns, 'user'),
        capacity(assistant, user.max_new_tokens, limits.prompt_tokens, limits.turns, 'assistant'),
    )
