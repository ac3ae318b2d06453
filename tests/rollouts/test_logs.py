"""Logged conversations as a record: their own ids, cut before what does not fit."""

import numpy as np

from simrl.conversations.records import Conversation, Message
from simrl.rollouts.logs import logged_transcript
from simrl.rollouts.state import EndReason
from tests.rollouts.test_host import CHAT, LIMITS


def logged(*texts: str, system: bool = False) -> Conversation:
    messages = tuple(Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts))
    return Conversation('c', 'log', 'dev', ((Message('system', '9'),) if system else ()) + messages)


def test_messages_are_those_of_the_log_until_one_does_not_fit() -> None:
    """An assistant's message may have 3 tokens and its end-of-turn, a user's 4, an opening any; at most 3 turns."""
    conversations = [
        logged('10 11 12 13 14 15 16', '10 11 12', '10 11 12 13', '11'),  # all of them, with a long opening
        logged('10', '10 11 12 13', '12'),  # a reply of 4
        logged('10', '11', '10 11 12 13 14', '12'),  # a user's message of 5
        logged('10', '11', '12', '13', '14', '15', '16', '17', system=True),  # four turns
    ]
    record, cut = logged_transcript(conversations, CHAT, LIMITS)
    np.testing.assert_array_equal(record.num_messages, [4, 1, 2, 6])
    assert cut == 0 + 2 + 2 + 2
    assert record.messages.shape == (4, 2 * LIMITS.turns, 7)
    for row, conversation in enumerate(conversations):
        for i in range(record.num_messages[row]):
            ids = record.messages[row, i, : record.message_length[row, i]].tolist()
            assert ids == CHAT.encode(conversation.spoken[i].content)
    assert set(record.end_reason.tolist()) == {EndReason.TURNS}
