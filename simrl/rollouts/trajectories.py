"""Finished dialogues in; what training reads, what is logged, and what people read.

1. `trajectories` keeps the transcript and the trained role's view.
2. `rollout_metrics` counts ends, cuts and how much of the decoding was useful.
3. `transcripts` writes conversations as plain dicts; `missed_signals` searches them for signals that were not matched.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import TEMPLATE
from simrl.rollouts.host import ROLE_NAMES
from simrl.rollouts.state import Dialogue, EndReason, Transcript


@flax.struct.dataclass
class Trajectories(Transcript):
    """B conversations in the view of the role that is trained; all that training and rewards see of a rollout.

    Attributes beside those of `Transcript`:
        tokens: int32 `[B, S]`.
        role: int8 `[B, S]`: 0 from `length` on, then TEMPLATE, USER or ASSISTANT: the author, whatever the header.
            Tokens of the trained role that it did not sample, a given opening, are TEMPLATE here, so that
            `role == trained role` is exactly what was sampled and is trained on.
        turn: int32 `[B, S]`: for tokens of the trained role, the number of the message among its own, 0 the first
            (given ones count); -1 for all other tokens.
        log_prob: float32 `[B, S]`, the sampler's, of the tempered and unfiltered distribution; 0 where not sampled.
        length: int32 `[B]`.
        example_id: `[B]`, as given by the caller.
        group: int32 `[B]`, equal for conversations that are compared with each other; as given by the caller.
    """

    tokens: jax.Array
    role: jax.Array
    turn: jax.Array
    log_prob: jax.Array
    length: jax.Array
    example_id: jax.Array
    group: jax.Array


def trajectories(dialogue: Dialogue, view: int, example_id: jax.Array, group: jax.Array) -> Trajectories:
    """Dialogues in the view of a role (USER or ASSISTANT), whose agent is on the device."""
    context = dialogue.view(view)
    assert context is not None
    spoken = context.role == view
    given = spoken & (context.message < dialogue.num_given[:, None])
    return Trajectories(
        **vars(transcript_of(dialogue)),
        tokens=context.tokens,
        role=jnp.where(given, TEMPLATE, context.role).astype(jnp.int8),
        turn=jnp.where(spoken & ~given, context.message // 2, -1).astype(jnp.int32),
        log_prob=context.log_prob,
        length=context.length,
        example_id=example_id,
        group=group,
    )


jit_trajectories = jax.jit(trajectories, static_argnames='view')


def transcript_of(batch: Transcript) -> Transcript:
    """The transcript alone, of conversations in any view."""
    return Transcript(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Transcript)})


def rollout_metrics(batch: Transcript) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Shares and means as (sum, weight), float32 scalars: divide after adding up.

    `useful_steps`: share of decode row-steps in which the row sampled a token; rows outside the batch take none.
    `end_*`: share of conversations with that reason. `truncated_user`, `truncated_assistant`: share of that agent's
    messages that their budget cut. `resampled_user`: messages that the user discarded, for each that it sent.
    """
    rows = jnp.float32(batch.end_reason.shape[0])
    said = jnp.arange(batch.messages.shape[1]) < batch.num_messages[:, None]
    metrics = {
        'rollout/useful_steps': (batch.decoded_steps, batch.loop_steps),
        'rollout/messages': (batch.num_messages, rows),
        **{f'rollout/end_{reason.name.lower()}': (batch.end_reason == reason, rows) for reason in EndReason},
    }
    metrics['rollout/resampled_user'] = (batch.resamples, said[:, ::2])
    for side, name in enumerate(ROLE_NAMES):
        own = said[:, side::2]
        metrics[f'rollout/truncated_{name}'] = (batch.truncated[:, side::2], own)
        metrics[f'rollout/message_tokens_{name}'] = (jnp.where(own, batch.message_length[:, side::2], 0), own)
    return {name: tuple(jnp.sum(x, dtype=jnp.float32) for x in pair) for name, pair in metrics.items()}  # type: ignore[misc]


def transcripts(batch: Transcript, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """Conversations as dicts ready for JSON, one per row.

    Args:
        batch: on the device or the host.
        decode: ids to text, such as `Chat.decode`.

    Returns:
        `{'messages': [{'role', 'content', 'tokens', 'truncated'}], 'end_reason'}`: role 'user' or 'assistant',
        `tokens` the content's number of tokens, `end_reason` in lower case.
    """
    names = ('messages', 'message_length', 'truncated', 'num_messages', 'end_reason')
    host = {name: np.asarray(jax.device_get(getattr(batch, name))) for name in names}
    rows = []
    for row, num_messages in enumerate(host['num_messages']):
        messages = []
        for i in range(num_messages):
            length = int(host['message_length'][row, i])
            content = decode(host['messages'][row, i, :length].tolist())
            truncated = bool(host['truncated'][row, i])
            messages.append({'role': ROLE_NAMES[i % 2], 'content': content, 'tokens': length, 'truncated': truncated})
        rows.append({'messages': messages, 'end_reason': EndReason(host['end_reason'][row]).name.lower()})
    return rows


def repeated_messages(conversations: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """The number of user messages of `transcripts` that repeat the user's message before, and of all that could."""
    repeated = later = 0
    for conversation in conversations:
        texts = [message['content'].strip() for message in conversation['messages'] if message['role'] == 'user']
        repeated += sum(text == before for before, text in itertools.pairwise(texts))
        later += max(0, len(texts) - 1)
    return repeated, later


def missed_signals(conversations: Iterable[dict[str, Any]], stop_text: str) -> int:
    """The number of user messages of `transcripts` with the stop text that did not end their conversation.

    It was then written in tokens that are none of `GenerationSpec.stop_sequences`.
    """
    missed = 0
    for conversation in conversations:
        messages = conversation['messages']
        unmatched = messages[:-1] if conversation['end_reason'] == 'signal' else messages
        missed += sum(message['role'] == 'user' and stop_text in message['content'] for message in unmatched)
    return missed
