"""The messages of people that all simulators predict."""

import pytest

from simrl.conversations.records import Conversation, Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.evaluation.fidelity.likelihood import start_of
from tests.tiny import byte_tokenizer

CHAT = chat_from_huggingface(byte_tokenizer())


def conversation(lengths: list[int], end: str = 'unknown') -> Conversation:
    messages = [Message(('user', 'assistant')[i % 2], 'x' * length) for i, length in enumerate(lengths)]
    return Conversation('c', 'made up', 'test', (Message('system', 's' * 50), *messages), end)


@pytest.mark.parametrize(('most', 'kept'), [(5, None), (6, 3), (7, 3), (14, 3), (15, 5), (16, 5), (99, 5)])
def test_whole_messages_that_fit_up_to_one_of_the_user(most, kept):
    """Of 1, 2, 3, 4, 5 and 6 tokens; a system text counts for nothing."""
    whole = conversation([1, 2, 3, 4, 5, 6])
    found = start_of(whole, CHAT, most)
    assert (found and found.spoken) == (kept and whole.spoken[:kept])


def test_an_end_is_that_of_the_data_set_alone():
    """A message that was cut off has no end of turn; none has a terminal token."""
    assert [start_of(conversation([1, 1, 1], end), CHAT, 9).end for end in ('natural', 'cut', 'unknown')] == [
        'unknown',
        'cut',
        'unknown',
    ]
    assert start_of(conversation([1, 1, 1, 1], 'cut'), CHAT, 9).end == 'unknown'
    assert start_of(conversation([1, 1], 'natural'), CHAT, 9) is None
