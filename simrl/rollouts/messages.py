"""One message between two views: `speak` samples it into its own, `hear` writes it into the partner's.

What is common to partners on the device (`rollout.py`) and off it (`host.py`).

Letters: B rows, S capacity of a context.
"""

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models.transformer import Params
from simrl.rollouts.agents import GenerationSpec
from simrl.rollouts.context import PREFIX, Context, extend, last_token
from simrl.rollouts.generate import Message, generate


@jax.named_scope('speak')
def speak(
    params: Params,
    spec: GenerationSpec,
    context: Context,
    row_keys: jax.Array,
    number: jax.Array,
    active: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
) -> tuple[Context, Message]:
    """Appends a header and a sampled message in the active rows; other rows stay as they are.

    Args:
        params, spec: the model that speaks.
        context: its view; active rows need room for the message, in the cache too: see `can_speak`.
        row_keys: typed keys `[B]` of the conversations; token i of message m is drawn with m and i folded in.
        number: int32 `[B]`, of the message.
        active: bool `[B]`.
        token_mask: bool `[V]`, the tokens that may be sampled.
        temperature: a scalar or float32 `[B]`.
    """
    _check_cache(context, speaking_room(spec))
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _chosen_header(spec.own_first_header, spec.own_header, is_first)
    context = extend(
        params,
        spec.config,
        spec.execution,
        context,
        header,
        jnp.full(header.shape, TEMPLATE, jnp.int8),
        number,
        jnp.where(active, header_length, 0),
        chunk=spec.feed_chunk,
    )
    keys = jax.vmap(jax.random.fold_in)(row_keys, number)
    return generate(params, spec, context, keys, active, number, token_mask, temperature)


@jax.named_scope('hear')
def hear(
    params: Params, spec: GenerationSpec, context: Context, message: Message, number: jax.Array, heard: jax.Array
) -> Context:
    """Appends the partner's message to a context: header, content and end-of-turn as `spec` sees its partner's."""
    _check_cache(context, hearing_room(spec, message.tokens.shape[1] - 1))
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _chosen_header(spec.partner_first_header, spec.partner_header, is_first)
    index = jnp.arange(header.shape[1] + message.tokens.shape[1])
    at = index - header_length[:, None]  # the index in the message
    content = jnp.take_along_axis(message.tokens, jnp.clip(at, 0, message.tokens.shape[1] - 1), axis=1)
    tokens = jnp.where(at == message.content_length[:, None], spec.partner_end_of_turn, content)
    header = jnp.pad(header, ((0, 0), (0, message.tokens.shape[1])))
    tokens = jnp.where(at < 0, header, tokens)

    speaker = ASSISTANT if spec.role == USER else USER
    forced = message.truncated[:, None] & (at == message.content_length[:, None])
    role = jnp.where((at < 0) | forced, TEMPLATE, speaker)
    count = jnp.where(heard, header_length + message.length, 0)
    return extend(params, spec.config, spec.execution, context, tokens, role, number, count, chunk=spec.feed_chunk)


def _check_cache(context: Context, room: int) -> None:
    """Refuses a cache that cannot hold a message even of an empty row; `make_room` and `grow_cache` let caches grow."""
    if context.cache.capacity < min(room, context.capacity):
        raise ValueError(f'Context.cache: expected room for a message of {room} tokens, found {context.cache.capacity}')


def can_speak(spec: GenerationSpec, context: Context) -> jax.Array:
    """Whether a row has room for the longest message of `spec`, which sees the context; bool `[B]`."""
    return context.length <= context.capacity - speaking_room(spec)


def can_hear(spec: GenerationSpec, context: Context, partner_max_new_tokens: int) -> jax.Array:
    """Whether a row has room for the longest message that `spec`, which sees the context, may hear; bool `[B]`."""
    return context.length <= context.capacity - hearing_room(spec, partner_max_new_tokens)


def speaking_room(spec: GenerationSpec) -> int:
    """Tokens that the longest message of `spec` adds to its own view: header, budget and a forced end-of-turn."""
    return header_room(spec)[0] + spec.max_new_tokens + 1


def hearing_room(spec: GenerationSpec, partner_max_new_tokens: int) -> int:
    """Tokens that its partner's longest message adds to the view of `spec`."""
    return header_room(spec)[1] + partner_max_new_tokens + 1


def header_room(spec: GenerationSpec) -> tuple[int, int]:
    """Most tokens of the headers before its own and before its partner's messages."""
    own = max(len(spec.own_header), len(spec.own_first_header))
    return own, max(len(spec.partner_header), len(spec.partner_first_header))


def _chosen_header(first: tuple[int, ...], later: tuple[int, ...], is_first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's header: int32 `[B, longest of the two]` and its length `[B]`."""
    width = max(len(first), len(later))
    runs = np.zeros((2, width), np.int32)
    runs[0, : len(later)] = later
    runs[1, : len(first)] = first
    lengths = np.array([len(later), len(first)], np.int32)
    row = is_first.astype(jnp.int32)
    return jnp.asarray(runs)[row], jnp.asarray(lengths)[row]
