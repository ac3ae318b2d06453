"""The conversation loop for a partner that is not on the device: a scripted person, or a model behind an interface.

The other side is a `ModelAgent`, and its view is the only one. From the same prompts, limits and keys come the same
`Trajectories` as from `speaker.converse`:

1. `_start` prefills the speaker's view and gives every conversation a seed for its partner.
2. `_speak` adds a message that the speaker samples; `_listen` one that the partner wrote.
3. In between, on the host, `_asked` lets the partner reply in the conversations that wait for it, and encodes its text.

What the speaker sampled is never encoded again and nothing is prefilled twice: the partner's text is all that is fed.
Between messages the conversations that have ended leave the device's batch, as in `rollout`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models.transformer import Params
from simrl.rollouts.agents import GenerationSpec, HostAgent, HostConversation, Limits, ModelAgent, Reply
from simrl.rollouts.compaction import compact, crowd_of, everyone, keep_split
from simrl.rollouts.context import Context, capacity_for, grow_cache
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.generate import Message
from simrl.rollouts.messages import can_hear, can_speak, hear, hearing_room, speak, speaking_room
from simrl.rollouts.prompts import Prompts, prefilled
from simrl.rollouts.state import EndReason, Record, begin_record, record, row_keys, waiting_for
from simrl.rollouts.trajectories import ROLE_NAMES, Trajectories, in_view

PARTNER_STREAM = 2**32 - 1  # folded into a conversation's key for its partner's seed; messages fold in their numbers


@flax.struct.dataclass
class _HostDialogue(Record):
    """Conversations of which one side is on the device: what was said, and that side's view."""

    own: Context


@flax.struct.dataclass
class _Heard:
    """What partners said in B rows.

    Attributes:
        tokens: int32 `[B, max_new_tokens + 1]`, content, 0 after it.
        content_length: int32 `[B]`.
        said: bool `[B]`, whether there is a message.
        ends, truncated, failed: bool `[B]`, False where the row was not asked.
    """

    tokens: np.ndarray | jax.Array
    content_length: np.ndarray | jax.Array
    said: np.ndarray | jax.Array
    ends: np.ndarray | jax.Array
    truncated: np.ndarray | jax.Array
    failed: np.ndarray | jax.Array


def converse_with(
    speaker: ModelAgent,
    partner: HostAgent,
    prompts: Prompts,
    examples: Sequence[Example],
    chat: Chat,
    seed: int,
    step: int,
    *,
    limits: Limits,
) -> tuple[Trajectories, Mapping[int, str]]:
    """Whole conversations from prompts, in the speaker's view.

    A reply's text is encoded as it is. The end of a conversation is the terminal token behind it, which the record
    holds as it does a simulator's; the speaker hears nothing of that message. A partner that fails, or writes what the
    tokenizer cannot encode, ends its conversation as FAILURE.

    Args:
        prompts: of `prompts_of`, with None for the partner's side.
        examples: those of the prompts.
        seed, step: of the training run; with the example and the sample they decide every draw and the partner's seed.

    Returns:
        The conversations, and by row why a partner failed.
    """
    policy = speaker.policy
    spec, params = policy.spec, policy.params
    rows = prompts.given.shape[0]
    if jax.process_count() > 1:
        raise ValueError(f'partners off the device: expected one process, found {jax.process_count()}')
    if not examples or rows % len(examples):
        raise ValueError(f'expected prompts of {len(examples)} examples, found {rows} rows')
    if chat.tokenizer.size > spec.config.vocab_size:
        raise ValueError(
            f'expected a tokenizer of at most the {spec.config.vocab_size} ids of the model, '
            f'found {chat.tokenizer.size}'
        )
    samples, sample = rows // len(examples), np.asarray(prompts.sample).tolist()
    dialogue, keys, seeds = _start(
        params, prompts, seed, step, spec=spec, limits=limits, partner_max_new_tokens=partner.max_new_tokens
    )
    crowd = crowd_of(dialogue, keys, rows)
    # What every row's partner has read, and the number of messages that this is: only new ones are decoded.
    conversations = [HostConversation(examples[row // samples], sample[row], ()) for row in range(rows)]
    partner_seeds = np.asarray(seeds)
    token_mask = jnp.asarray(policy.token_mask)
    failures: dict[int, str] = {}
    for message in range(2 * limits.turns):
        role = (USER, ASSISTANT)[message % 2]
        said, length = _on_host(crowd.held)
        running = np.asarray(said.end_reason) == EndReason.RUNNING
        if not running.any():
            break
        places = np.flatnonzero(waiting_for(said, role))
        if not places.size:
            continue
        waiting = crowd.rows[places]
        crowd = compact(crowd, running)
        speaks = role == spec.role
        room = speaking_room(spec) if speaks else hearing_room(spec, partner.max_new_tokens)
        needed = int(length[running].max()) + room
        own = grow_cache(crowd.held.own, capacity_for(needed, crowd.held.own.capacity))
        crowd = dataclasses.replace(crowd, held=dataclasses.replace(crowd.held, own=own))
        if speaks:
            spoken = _speak(params, crowd.held, crowd.inputs, token_mask, policy.temperature, spec=spec)
            crowd = dataclasses.replace(crowd, held=spoken)
            continue
        for row, place in zip(waiting.tolist(), places.tolist(), strict=True):
            conversations[row] = _updated(conversations[row], said, place, chat)
        replies = partner.reply([conversations[row] for row in waiting], partner_seeds[waiting])
        if len(replies) != len(waiting):
            raise ValueError(f'HostAgent.reply: expected {len(waiting)} replies, found {len(replies)}')
        heard, why = _encoded(
            dict(zip(waiting.tolist(), replies, strict=True)), crowd.rows, partner.max_new_tokens, chat
        )
        failures |= why
        crowd = dataclasses.replace(crowd, held=_listen(params, crowd.held, heard, spec=spec))
    return _in_own_view(everyone(crowd), prompts.example, prompts.group, role=spec.role), failures


@functools.partial(jax.jit, static_argnames=('spec', 'limits', 'partner_max_new_tokens'))
def _start(
    params: Params,
    prompts: Prompts,
    seed: int,
    step: int,
    *,
    spec: GenerationSpec,
    limits: Limits,
    partner_max_new_tokens: int,
) -> tuple[_HostDialogue, jax.Array, jax.Array]:
    """The conversations before their first sampled message, their keys, and their partners' seeds (uint32 `[B]`)."""
    size = capacity(
        spec, partner_max_new_tokens, limits.prompt_tokens, limits.turns, ROLE_NAMES[spec.role == ASSISTANT]
    )
    own = prefilled(params, spec, prompts.user if spec.role == USER else prompts.assistant, size)
    said = begin_record(
        jnp.asarray(prompts.opening),
        jnp.asarray(prompts.opening_length),
        jnp.asarray(prompts.given),
        own.length == 0,
        turns=limits.turns,
        max_new_tokens=(spec.max_new_tokens, partner_max_new_tokens),
    )
    keys = row_keys(seed, step, jnp.asarray(prompts.example), jnp.asarray(prompts.sample))
    streams = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(PARTNER_STREAM))
    return keep_split((_HostDialogue(own=own, **vars(said)), keys, jax.vmap(jax.random.bits)(streams)))


@functools.partial(jax.jit, static_argnames='spec', donate_argnames='dialogue')
def _speak(
    params: Params,
    dialogue: _HostDialogue,
    keys: jax.Array,
    token_mask: jax.Array,
    temperature: jax.Array | float,
    *,
    spec: GenerationSpec,
) -> _HostDialogue:
    """One message by the speaker in the rows that wait for it."""
    waiting = waiting_for(dialogue, spec.role)
    active = waiting & can_speak(spec, dialogue.own)
    own, message = speak(params, spec, dialogue.own, keys, dialogue.num_messages, active, token_mask, temperature)
    return keep_split(record(dataclasses.replace(dialogue, own=own), message, waiting, active))


@functools.partial(jax.jit, static_argnames='spec', donate_argnames='dialogue')
def _listen(params: Params, dialogue: _HostDialogue, heard: _Heard, *, spec: GenerationSpec) -> _HostDialogue:
    """One message by partners, in the rows where they said or failed to say one."""
    said = jnp.asarray(heard.said)
    active = said & can_hear(spec, dialogue.own, heard.tokens.shape[1] - 1)
    ends, content_length = jnp.asarray(heard.ends), jnp.asarray(heard.content_length)
    none = jnp.zeros(said.shape, jnp.int32)
    message = Message(
        tokens=jnp.asarray(heard.tokens),
        length=content_length + ~ends,
        content_length=content_length,
        signalled=ends & active,
        truncated=jnp.asarray(heard.truncated),
        decoded_steps=none,
        loop_steps=none,
    )
    own = hear(params, spec, dialogue.own, message, dialogue.num_messages, active & ~ends)
    dialogue = record(dataclasses.replace(dialogue, own=own), message, said, active)
    reason = jnp.where(heard.failed, jnp.int8(EndReason.FAILURE), dialogue.end_reason)
    return keep_split(dataclasses.replace(dialogue, end_reason=reason))


@functools.partial(jax.jit, static_argnames='role')
def _in_own_view(dialogue: _HostDialogue, example: jax.Array, group: jax.Array, *, role: int) -> Trajectories:
    return in_view(dialogue.own, dialogue, role, example, group)


def _on_host(dialogue: _HostDialogue) -> tuple[Record, np.ndarray]:
    """What was said, and how long the view is, int32 `[H]`; fetched, without the view itself and its cache."""
    fields = [field.name for field in dataclasses.fields(Record)]
    said, length = jax.device_get(({name: getattr(dialogue, name) for name in fields}, dialogue.own.length))
    return Record(**said), length


def _updated(conversation: HostConversation, said: Record, place: int, chat: Chat) -> HostConversation:
    """The conversation at `place` of those held, with what was said since its partner last saw it."""
    messages = list(conversation.messages)
    for number in range(len(messages), int(said.num_messages[place])):
        ids = said.messages[place, number, : said.message_length[place, number]]
        messages.append((ROLE_NAMES[number % 2], chat.decode(ids.tolist())))
    return dataclasses.replace(conversation, messages=tuple(messages))


def _encoded(
    replies: Mapping[int, Reply], rows: np.ndarray, max_new_tokens: int, chat: Chat
) -> tuple[_Heard, dict[int, str]]:
    """Replies by row as arrays in the order of the held `rows`, and by row why there is none."""
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    heard = _Heard(
        tokens=np.zeros((len(rows), max_new_tokens + 1), np.int32),
        content_length=np.zeros(len(rows), np.int32),
        said=np.zeros(len(rows), np.bool_),
        ends=np.zeros(len(rows), np.bool_),
        truncated=np.zeros(len(rows), np.bool_),
        failed=np.zeros(len(rows), np.bool_),
    )
    failures: dict[int, str] = {}
    for row, reply in replies.items():
        place = place_of[row]
        try:
            ids = [] if reply.failure is not None else chat.encode(reply.text)
        except ValueError as error:
            reply = dataclasses.replace(reply, failure=str(error))
        if reply.failure is not None:
            heard.failed[place] = True
            failures[row] = reply.failure
            continue
        # As where it is sampled: a message without an end of its own within the budget is cut.
        truncated = len(ids) >= max_new_tokens
        content = [*ids[: max_new_tokens - 1], chat.terminal] if reply.ends else ids[:max_new_tokens]
        heard.tokens[place, : len(content)] = content
        heard.content_length[place] = len(content)
        heard.said[place] = True
        heard.ends[place] = reply.ends
        heard.truncated[place] = truncated
    return heard, failures
