"""One message between two views: `speak` samples it into its own, `hear` writes it into the partner's.

What is common to partners on the device (`rollout.py`) and off it (`host.py`).

Letters: B rows, S capacity of a context.
"""

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models.transformer import Params
from simrl.rollouts.context import PREFIX, Context, extend, last_token
from simrl.rollouts.generate import Message, Voice, generate


@jax.named_scope('speak')
def speak(
    params: Params,
    voice: Voice,
    context: Context,
    row_keys: jax.Array,
    number: jax.Array,
    active: jax.Array,
    allowed: jax.Array,
    temperature: jax.Array | float,
) -> tuple[Context, Message]:
    """Appends a header and a sampled message in the active rows; other rows stay as they are.

    Args:
        params, voice: the model that speaks.
        context: its view; active rows need room for the message, in the cache too: see `can_speak`.
        row_keys: typed keys `[B]` of the conversations; token i of message m is drawn with m and i folded in.
        number: int32 `[B]`, of the message.
        active: bool `[B]`.
        allowed: bool `[V]`, the tokens that may be sampled.
        temperature: a scalar or float32 `[B]`.
    """
    _check_cache(context, speaking_room(voice))
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _chosen_header(voice.own_first_header, voice.own_header, is_first)
    context = extend(
        params,
        voice.config,
        voice.execution,
        context,
        header,
        jnp.full(header.shape, TEMPLATE, jnp.int8),
        number,
        jnp.where(active, header_length, 0),
        chunk=voice.feed_chunk,
    )
    keys = jax.vmap(jax.random.fold_in)(row_keys, number)
    return generate(params, voice, context, keys, active, number, allowed, temperature)


@jax.named_scope('hear')
def hear(
    params: Params, voice: Voice, context: Context, message: Message, number: jax.Array, heard: jax.Array
) -> Context:
    """Appends the partner's message to a context: header, content and end-of-turn as `voice` sees its partner's."""
    _check_cache(context, hearing_room(voice, message.tokens.shape[1] - 1))
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


def _check_cache(context: Context, room: int) -> None:
    """Refuses a cache that cannot hold a message even of an empty row; `make_room` and `with_room` let caches grow."""
    if context.cache.capacity < min(room, context.capacity):
        raise ValueError(f'Context.cache: expected room for a message of {room} tokens, found {context.cache.capacity}')


def can_speak(voice: Voice, context: Context) -> jax.Array:
    """Whether a row has room for the longest message of `voice`, which sees the context; bool `[B]`."""
    return context.length <= context.capacity - speaking_room(voice)


def can_hear(voice: Voice, context: Context, partner_budget: int) -> jax.Array:
    """Whether a row has room for the longest message that `voice`, which sees the context, may hear; bool `[B]`."""
    return context.length <= context.capacity - hearing_room(voice, partner_budget)


def speaking_room(voice: Voice) -> int:
    """Tokens that the longest message of `voice` adds to its own view: header, budget and a forced end-of-turn."""
    return header_room(voice)[0] + voice.budget + 1


def hearing_room(voice: Voice, partner_budget: int) -> int:
    """Tokens that its partner's longest message adds to the view of `voice`."""
    return header_room(voice)[1] + partner_budget + 1


def header_room(voice: Voice) -> tuple[int, int]:
    """Most tokens of the headers before its own and before its partner's messages."""
    own = max(len(voice.own_header), len(voice.own_first_header))
    return own, max(len(voice.partner_header), len(voice.partner_first_header))


def _chosen_header(first: tuple[int, ...], later: tuple[int, ...], is_first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's header: int32 `[B, longest of the two]` and its length `[B]`."""
    width = max(len(first), len(later))
    runs = np.zeros((2, width), np.int32)
    runs[0, : len(later)] = later
    runs[1, : len(first)] = first
    lengths = np.array([len(later), len(first)], np.int32)
    row = is_first.astype(jnp.int32)
    return jnp.asarray(runs)[row], jnp.asarray(lengths)[row]
