"""Conversations that people had, as a record that rollouts replay (`replay.Replay`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation
from simrl.rollouts.agents import Limits
from simrl.rollouts.state import EndReason, Transcript


def logged_transcript(conversations: Sequence[Conversation], chat: Chat, limits: Limits) -> tuple[Transcript, int]:
    """A row for each conversation, on the host; and how many messages were cut off.

    A conversation is cut after `limits.turns` turns, and before the first message that is longer than its role's may
    be, except an opening: that is part of the prompt.
    """
    rows, cut = [], 0
    for conversation in conversations:
        ids: list[list[int]] = []
        for number, message in enumerate(conversation.spoken[: 2 * limits.turns]):
            content = chat.encode(message.content, 'user' if number % 2 == 0 else 'assistant')
            most = limits.assistant_tokens if number % 2 else limits.user_tokens
            if number > 0 and len(content) >= most:  # its end-of-turn counts
                break
            ids.append(content)
        cut += len(conversation.spoken) - len(ids)
        rows.append(ids)
    number, longest = len(rows), max(len(content) for ids in rows for content in ids)
    messages = np.zeros((number, 2 * limits.turns, longest), np.int32)
    length = np.zeros(messages.shape[:2], np.int32)
    for row, ids in enumerate(rows):
        for i, content in enumerate(ids):
            messages[row, i, : len(content)] = content
            length[row, i] = len(content)
    fields: dict[str, Any] = {
        'messages': messages,
        'message_length': length,
        'truncated': np.zeros(length.shape, np.bool_),
        'num_messages': np.array([len(ids) for ids in rows], np.int32),
        'num_given': np.ones(number, np.int32),
        'end_reason': np.full(number, EndReason.TURNS, np.int8),
        **{name: np.zeros(number, np.int32) for name in ('decoded_steps', 'loop_steps', 'resamples')},
    }
    return Transcript(**fields), cut
