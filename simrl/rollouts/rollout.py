"""Two models and what they start from in, whole conversations out, inside one jit.

1. `begin` puts two prefilled contexts, the views of the user's and the assistant's model, and given openings together.
2. `turn` adds one message by one side: header, sampled content, end-of-turn in its own view; then the same content,
   under the other header, in its partner's view.
3. `rollout` scans turns: the user's message, then the assistant's, until `turns` are over or no row has more to say.

What is sampled is what both models read: content is never decoded and encoded again, so both share a tokenizer. Rows
that have ended write nothing more. A row's conversation depends on its own contexts and its own key, not on the other
rows, their number, the capacity, or the devices.

Letters: B rows, S capacity of a context, M messages of a conversation, L tokens of a message, V padded vocabulary.
"""

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models.transformer import Cache, Params
from simrl.rollouts.context import PREFIX, Context, extend, last_token
from simrl.rollouts.sampler import Message, Voice, generate


class EndReason(enum.IntEnum):
    """Why a conversation ended."""

    RUNNING = 0
    SIGNAL = 1  # a model sampled an end signal
    TURNS = 2  # the last message there is room for was said
    BUDGET = 3  # the next message might not fit into a context, which `capacity` rules out beforehand
    FAILURE = 4  # there was nothing to start from, or a partner off the device failed


@flax.struct.dataclass
class Dialogue:
    """B conversations, as both models see them and as what was said. Every array has a row axis: see `take_rows`.

    Attributes:
        user, assistant: the models' views.
        messages: int32 `[B, M, L]`, content without headers and ends of turn, 0 after it. Even messages are the
            user's, odd ones the assistant's; a row whose `num_messages` is odd waits for the assistant.
        message_length: int32 `[B, M]`.
        truncated: bool `[B, M]`, whether the message was cut by its budget.
        num_messages: int32 `[B]`, messages said so far. One that holds an end signal is said, but not heard: it is in
            `messages` and in the speaker's view, and not in the partner's.
        num_given: int32 `[B]`, how many of these nobody sampled.
        end_reason: int8 `[B]`, an `EndReason`.
        decoded_steps, loop_steps: int32 `[B]`, steps of the decode loops that the row took part in, and all of them;
            their sums' ratio is the share of decoding that was useful.
    """

    user: Context
    assistant: Context
    messages: jax.Array
    message_length: jax.Array
    truncated: jax.Array
    num_messages: jax.Array
    num_given: jax.Array
    end_reason: jax.Array
    decoded_steps: jax.Array
    loop_steps: jax.Array


def begin(
    user: Context,
    assistant: Context,
    opening: jax.Array,
    opening_length: jax.Array,
    given: jax.Array,
    *,
    turns: int,
    budgets: tuple[int, int],
) -> Dialogue:
    """Conversations before their first sampled message.

    Args:
        user, assistant: contexts of what precedes it in each view. Where an opening is given, the assistant's holds it
            under the user header, with its end-of-turn; the user's does where it speaks in the natural view.
        opening: int32 `[B, L]`, the content of the given openings.
        opening_length: int32 `[B]`.
        given: bool `[B]`; the user opens the conversation where not.
        turns: most turns, each a user message and an assistant message; M is twice that.
        budgets: of the user's and the assistant's messages, tokens.

    Rows with an empty context end as FAILURE at once.
    """
    batch, width = opening.shape
    longest = max(width, *budgets)
    length = jnp.where(given, opening_length, 0).astype(jnp.int32)
    first = jnp.where(jnp.arange(width) < length[:, None], opening, 0).astype(jnp.int32)
    num_given = given.astype(jnp.int32)
    empty = (user.length == 0) | (assistant.length == 0)
    zeros = jnp.zeros((batch,), jnp.int32)
    return Dialogue(
        user=user,
        assistant=assistant,
        messages=jnp.zeros((batch, 2 * turns, longest), jnp.int32).at[:, 0, :width].set(first),
        message_length=jnp.zeros((batch, 2 * turns), jnp.int32).at[:, 0].set(length),
        truncated=jnp.zeros((batch, 2 * turns), bool),
        num_messages=num_given,
        num_given=num_given,
        end_reason=jnp.where(empty, EndReason.FAILURE, EndReason.RUNNING).astype(jnp.int8),
        decoded_steps=zeros,
        loop_steps=zeros,
    )


def take_rows(dialogue: Dialogue, index: jax.Array) -> Dialogue:
    """The rows at `index` (int `[rows]`), caches included; repeat indices to continue a conversation several times."""

    def taken(x: jax.Array | Cache) -> jax.Array | Cache:
        return Cache(key=x.key[:, index], value=x.value[:, index]) if isinstance(x, Cache) else x[index]

    return jax.tree.map(taken, dialogue, is_leaf=lambda x: isinstance(x, Cache))


def _chosen_header(first: tuple[int, ...], later: tuple[int, ...], is_first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's header: int32 `[B, longest of the two]` and its length `[B]`."""
    width = max(len(first), len(later))
    runs = np.zeros((2, width), np.int32)
    runs[0, : len(later)] = later
    runs[1, : len(first)] = first
    lengths = np.array([len(later), len(first)], np.int32)
    row = is_first.astype(jnp.int32)
    return jnp.asarray(runs)[row], jnp.asarray(lengths)[row]


def _hear(
    params: Params, voice: Voice, context: Context, message: Message, number: jax.Array, heard: jax.Array
) -> Context:
    """Appends the partner's message to a context: header, content and end-of-turn as `voice` sees its partner's."""
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _chosen_header(voice.partner_first_header, voice.partner_header, is_first)
    index = jnp.arange(header.shape[1] + message.tokens.shape[1])
    at = index - header_length[:, None]  # the index in the message
    content = jnp.take_along_axis(message.tokens, jnp.clip(at, 0, message.tokens.shape[1] - 1), axis=1)
    tokens = jnp.where(at == message.content_length[:, None], voice.partner_end_of_turn, content)
    header = jnp.pad(header, ((0, 0), (0, message.tokens.shape[1])))
    tokens = jnp.where(at < 0, header, tokens)

    speaker = ASSISTANT if voice.role == USER else USER
    forced = message.truncated[:, None] & (at == message.content_length[:, None])
    role = jnp.where((at < 0) | forced, TEMPLATE, speaker)
    count = jnp.where(heard, header_length + message.length, 0)
    return extend(params, voice.config, voice.execution, context, tokens, role, number, count, chunk=voice.feed_chunk)


def _header_room(voice: Voice) -> tuple[int, int]:
    """Most tokens of the headers before its own and before its partner's messages."""
    own = max(len(voice.own_header), len(voice.own_first_header))
    return own, max(len(voice.partner_header), len(voice.partner_first_header))


@functools.partial(jax.jit, static_argnames=('role', 'voices'))
def turn(
    params_user: Params,
    params_assistant: Params,
    dialogue: Dialogue,
    row_keys: jax.Array,
    *,
    role: int,
    voices: tuple[Voice, Voice],
    temperatures: tuple[jax.Array | float, jax.Array | float],
    allowed: tuple[jax.Array, jax.Array],
) -> Dialogue:
    """One message by `role` (USER or ASSISTANT) in the rows that wait for it; other rows stay as they are.

    Arguments as in `rollout`. A Python loop over this, one role after the other, gives the tokens of `rollout`.
    """
    side = 0 if role == USER else 1
    params, partner_params = (params_user, params_assistant)[:: 1 - 2 * side]
    voice, partner_voice = voices[:: 1 - 2 * side]
    own, partner = (dialogue.user, dialogue.assistant)[:: 1 - 2 * side]
    number = dialogue.num_messages
    _, most_messages, longest = dialogue.messages.shape
    if longest < voice.budget:
        raise ValueError(f'Dialogue.messages: expected room for Voice.budget={voice.budget} tokens, found {longest}')

    waiting = (dialogue.end_reason == EndReason.RUNNING) & (number % 2 == side)
    own_room = own.capacity - _header_room(voice)[0] - voice.budget - 1
    partner_room = partner.capacity - _header_room(partner_voice)[1] - voice.budget - 1
    fits = (own.length <= own_room) & (partner.length <= partner_room)
    active = waiting & fits

    is_first = last_token(own.message, own.length) == PREFIX
    header, header_length = _chosen_header(voice.own_first_header, voice.own_header, is_first)
    own = extend(
        params,
        voice.config,
        voice.execution,
        own,
        header,
        jnp.full(header.shape, TEMPLATE, jnp.int8),
        number,
        jnp.where(active, header_length, 0),
        chunk=voice.feed_chunk,
    )
    keys = jax.vmap(jax.random.fold_in)(row_keys, number)
    own, message = generate(params, voice, own, keys, active, number, allowed[side], temperatures[side])
    partner = _hear(partner_params, partner_voice, partner, message, number, active & ~message.signalled)

    row = jnp.arange(number.shape[0])
    slot = jnp.where(active, number, most_messages)  # dropped where not active
    content = message.tokens[:, : voice.budget]
    content = jnp.where(jnp.arange(voice.budget) < message.content_length[:, None], content, 0)
    said = number + active
    end_reason = jnp.select(
        [waiting & ~fits, message.signalled, active & (said == most_messages)],
        [jnp.int8(EndReason.BUDGET), jnp.int8(EndReason.SIGNAL), jnp.int8(EndReason.TURNS)],
        dialogue.end_reason,
    )
    user, assistant = (own, partner)[:: 1 - 2 * side]
    return dataclasses.replace(
        dialogue,
        user=user,
        assistant=assistant,
        messages=dialogue.messages.at[row, slot, : voice.budget].set(content, mode='drop'),
        message_length=dialogue.message_length.at[row, slot].set(message.content_length, mode='drop'),
        truncated=dialogue.truncated.at[row, slot].set(message.truncated, mode='drop'),
        num_messages=said,
        end_reason=end_reason,
        decoded_steps=dialogue.decoded_steps + message.decoded_steps,
        loop_steps=dialogue.loop_steps + message.loop_steps,
    )


@functools.partial(jax.jit, static_argnames=('voices', 'turns'))
def rollout(
    params_user: Params,
    params_assistant: Params,
    dialogue: Dialogue,
    row_keys: jax.Array,
    *,
    voices: tuple[Voice, Voice],
    turns: int,
    temperatures: tuple[jax.Array | float, jax.Array | float],
    allowed: tuple[jax.Array, jax.Array],
) -> Dialogue:
    """Whole conversations, or what is left of them: `dialogue` may also stand between the two messages of a turn.

    In each of `turns` turns the rows that wait for the user hear from it, then those that wait for the assistant. So
    given and simulated openings go together, and rows that have ended cost nothing once all have.

    Call it inside a jit of your own that returns `trajectories` of the result, and the caches are freed on the way.

    Args:
        params_user, params_assistant: of the two models, which may differ in everything but the tokenizer.
        dialogue: where to start.
        row_keys: typed keys `[B]`; token i of message m of a row is drawn with its key, m and i folded in.
        voices: the user's and the assistant's.
        turns: how many turns to run. Conversations end as TURNS when `dialogue.messages` is full; rows that `turns` did
            not suffice for are still RUNNING.
        temperatures: the user's and the assistant's; each a scalar or float32 `[B]`, 0 for greedy.
        allowed: the tokens that the user and the assistant may sample, bool `[V]` each.
    """

    def step(dialogue: Dialogue, _: None) -> tuple[Dialogue, None]:
        for role in (USER, ASSISTANT):
            dialogue = turn(
                params_user,
                params_assistant,
                dialogue,
                row_keys,
                role=role,
                voices=voices,
                temperatures=temperatures,
                allowed=allowed,
            )
        return dialogue, None

    return jax.lax.scan(step, dialogue, length=turns)[0]


def example_hash(example_id: str) -> int:
    """A number of 32 bits for an example's id, the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:4], 'big')


def row_keys(seed: int, step: jax.Array | int, example: jax.Array, sample: jax.Array) -> jax.Array:
    """The keys `[B]` of conversations: equal for equal arguments, whatever the row, the batch or the simulator.

    Args:
        seed: of the training run. Arms of one experiment share it, so that they draw the same numbers.
        step: of the training run.
        example: uint32 `[B]`, `example_hash` of each row's example.
        sample: int `[B]`, which of the example's conversations in this step.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(example, jnp.uint32))
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(sample))


def capacity(voice: Voice, partner_budget: int, prompt_length: int, turns: int, name: str = 'voice') -> int:
    """The tokens that a context needs so that every conversation fits, checked against the model's positions.

    A turn takes at most both headers, both budgets, and both forced ends of turn, which the budgets do not count.

    Args:
        voice: whose context it is.
        partner_budget: the partner's `Voice.budget`.
        prompt_length: tokens of the longest prompt in this view.
        turns: of the conversation.
        name: what an error calls the voice.
    """
    own_header, partner_header = _header_room(voice)
    per_turn = own_header + voice.budget + 1 + partner_header + partner_budget + 1
    needed = prompt_length + turns * per_turn
    if needed > voice.config.max_positions:
        raise ValueError(
            f'{name}: expected conversations of at most max_positions={voice.config.max_positions} tokens, found that '
            f'one may take {needed}: prompt_length={prompt_length} + turns={turns} x {per_turn}, a turn being own '
            f'header {own_header} + own budget {voice.budget} + 1 + partner header {partner_header} + partner budget '
            f'{partner_budget} + 1'
        )
    return needed


def check_voices(voices: Sequence[Voice], allowed: Sequence[np.ndarray]) -> None:
    """Raises unless the two voices can talk: their roles, masks and signals fit their vocabularies and each other."""
    for voice, mask, role, name in zip(voices, allowed, (USER, ASSISTANT), ('user', 'assistant'), strict=True):
        if voice.role != role:
            raise ValueError(f'voices: expected the {name} to have role {role}, found {voice.role}')
        if mask.shape != (voice.config.padded_vocab_size,):
            raise ValueError(
                f"allowed: expected an entry for each of the {name}'s {voice.config.padded_vocab_size} embedding rows, "
                f'found shape {mask.shape}'
            )
        if not mask[voice.end_of_turn]:
            raise ValueError(f'allowed: expected the {name} to be allowed its end_of_turn={voice.end_of_turn}')
        forbidden = [run for run in voice.end_signals if not all(mask[token] for token in run)]
        if forbidden:
            raise ValueError(f'Voice.end_signals: the {name} is not allowed to sample all of {forbidden}')
    smallest = min(voice.config.vocab_size for voice in voices)
    for mask, name in zip(allowed, ('user', 'assistant'), strict=True):
        beyond = np.flatnonzero(np.asarray(mask)[smallest:])
        if beyond.size:
            raise ValueError(
                f'allowed: the {name} may sample id {smallest + beyond[0]}, which the smaller vocabulary of '
                f'{smallest} does not have; both models must share a tokenizer'
            )
