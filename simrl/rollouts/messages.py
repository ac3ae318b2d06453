"""One message in two views: `send` samples it into the sender's context, `receive` appends it to the receiver's.

`resend` appends a message that is known already to the sender's.

Letters: B rows, S capacity of a context.
"""

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.rollouts.agents import GenerationSpec, Policy
from simrl.rollouts.context import PREFIX, Context, extend, last_token
from simrl.rollouts.generate import SampledMessage, generate


@jax.named_scope('send')
def send(
    policy: Policy, context: Context, row_keys: jax.Array, number: jax.Array, active: jax.Array
) -> tuple[Context, SampledMessage]:
    """Appends a header and a sampled message in the active rows; other rows stay as they are.

    Args:
        policy: the sender's.
        context: its view. Active rows need room for the message, in the cache too: see `can_send`.
        row_keys: typed keys `[B]` of the conversations; token i of message m is drawn with m and i folded in.
        number: int32 `[B]`, of the message.
        active: bool `[B]`.
    """
    spec = policy.spec
    _check_cache(context, room_to_send(spec))
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _header_of_rows(spec.own_first_header, spec.own_header, is_first)
    role = jnp.full(header.shape, TEMPLATE, jnp.int8)
    context = extend(policy, context, header, role, number, jnp.where(active, header_length, 0))
    keys = jax.vmap(jax.random.fold_in)(row_keys, number)
    return generate(policy, context, keys, active, number)


@jax.named_scope('receive')
def receive(policy: Policy, context: Context, message: SampledMessage, number: jax.Array, active: jax.Array) -> Context:
    """Appends the sender's message in the active rows: header, content and end-of-turn in the receiver's view.

    Args:
        policy: the receiver's.
        context: its view.
    """
    spec = policy.spec
    _check_cache(context, room_to_receive(spec, message.tokens.shape[1] - 1))
    headers = (spec.partner_first_header, spec.partner_header)
    sender = ASSISTANT if spec.role == USER else USER
    return _append_known(policy, context, message, number, active, headers, spec.partner_end_of_turn, sender)


@jax.named_scope('resend')
def resend(policy: Policy, context: Context, message: SampledMessage, number: jax.Array, active: jax.Array) -> Context:
    """Appends an own message that was sampled before: the context that `send` left, but for log-probabilities, here 0.

    Args:
        policy: the sender's.
        context: its view.
    """
    spec = policy.spec
    _check_cache(context, room_to_send(spec))
    headers = (spec.own_first_header, spec.own_header)
    return _append_known(policy, context, message, number, active, headers, spec.end_of_turn, spec.role)


def _append_known(
    policy: Policy,
    context: Context,
    message: SampledMessage,
    number: jax.Array,
    active: jax.Array,
    headers: tuple[tuple[int, ...], tuple[int, ...]],
    end_of_turn: int,
    sender: int,
) -> Context:
    """Appends a message in the active rows, under the first of the headers in a context without messages."""
    width = message.tokens.shape[1]
    is_first = last_token(context.message, context.length) == PREFIX
    header, header_length = _header_of_rows(*headers, is_first)
    index = jnp.arange(header.shape[1] + width)
    at = index - header_length[:, None]  # the index in the message
    content = jnp.take_along_axis(message.tokens, jnp.clip(at, 0, width - 1), axis=1)
    tokens = jnp.where(at == message.content_length[:, None], end_of_turn, content)
    header = jnp.pad(header, ((0, 0), (0, width)))
    tokens = jnp.where(at < 0, header, tokens)

    forced = message.truncated[:, None] & (at == message.content_length[:, None])
    role = jnp.where((at < 0) | forced, TEMPLATE, sender)
    count = jnp.where(active, header_length + message.length, 0)
    return extend(policy, context, tokens, role, number, count)


def _check_cache(context: Context, room: int) -> None:
    """Refuses a cache that has no room for a message even in an empty row; `grow_cache` lets caches grow."""
    if context.cache.capacity < min(room, context.capacity):
        raise ValueError(f'Context.cache: expected room for a message of {room} tokens, found {context.cache.capacity}')


def can_send(spec: GenerationSpec, context: Context) -> jax.Array:
    """True where a row has room for the longest message that `spec` sends, bool `[B]`."""
    return context.length <= context.capacity - room_to_send(spec)


def can_receive(spec: GenerationSpec, context: Context, max_new_tokens: int) -> jax.Array:
    """True where a row has room for the longest message that `spec` receives, bool `[B]`."""
    return context.length <= context.capacity - room_to_receive(spec, max_new_tokens)


def room_to_send(spec: GenerationSpec) -> int:
    """Max tokens that a message adds to the sender's context: header, content and a forced end-of-turn."""
    return header_lengths(spec)[0] + spec.max_new_tokens + 1


def room_to_receive(spec: GenerationSpec, max_new_tokens: int) -> int:
    """Max tokens that a message adds to the receiver's context; `max_new_tokens` is the sender's."""
    return header_lengths(spec)[1] + max_new_tokens + 1


def header_lengths(spec: GenerationSpec) -> tuple[int, int]:
    """Max tokens of the headers before own and before the partner's messages."""
    own = max(len(spec.own_header), len(spec.own_first_header))
    return own, max(len(spec.partner_header), len(spec.partner_first_header))


def _header_of_rows(first: tuple[int, ...], later: tuple[int, ...], is_first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's header: int32 `[B, longest of the two]` and its length `[B]`."""
    width = max(len(first), len(later))
    runs = np.zeros((2, width), np.int32)
    runs[0, : len(later)] = later
    runs[1, : len(first)] = first
    lengths = np.array([len(later), len(first)], np.int32)
    row = is_first.astype(jnp.int32)
    return jnp.asarray(runs)[row], jnp.asarray(lengths)[row]
