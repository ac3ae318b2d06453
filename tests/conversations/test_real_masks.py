"""Rows of real conversations against a slow construction: the template's whole text, and spans of characters in it."""

import copy
import os
import pathlib

import numpy as np
import pytest

from simrl.conversations import records, views
from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.records import Conversation
from simrl.conversations.templates import chat_from_huggingface
from simrl.models.files import gguf

DATA, MODEL = os.environ.get('SIMRL_DATA'), os.environ.get('SIMRL_SMOLLM2')
END = '<|im_end|>'
MARKS = (END, '<|im_start|>', '<|endoftext|>', TERMINAL_TEXT)
NUMBER = 200  # conversations

pytestmark = pytest.mark.skipif(not (DATA and MODEL), reason='SIMRL_DATA or SIMRL_SMOLLM2 is not set')


@pytest.fixture(scope='module')
def tokenizer():
    return gguf.load_config(MODEL)[1]


@pytest.fixture(scope='module')
def conversations() -> list[Conversation]:
    """Of all sources in turn; those that spell out a special token are left to `test_chat`."""
    found: dict[str, list[Conversation]] = {}
    for folder in ('conversations', 'sharegpt'):
        rows, _ = records.read_conversations(pathlib.Path(DATA, folder, 'conversations.jsonl.gz'), on_bad_rows='drop')
        for row in rows:
            if not any(mark in message.content for message in row.messages for mark in MARKS):
                found.setdefault(row.source, []).append(row)
    each = -(-NUMBER // len(found))
    return [row for rows in found.values() for row in rows[:: max(1, len(rows) // each)][:each]]


def with_terminal(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(TERMINAL_TEXT, special_tokens=True)
    return tokenizer


def slow_row(tokenizer, conversation: Conversation, role: str) -> tuple[list[int], list[bool]]:
    """Ids of the whole conversation as the template writes it, and whether each is trained on.

    The text of k messages is a prefix of that of k + 1; so a message is what the template adds for it.

    Args:
        tokenizer: with the terminal token.
    """
    spoken = [[message.role, message.content, not message.truncated] for message in conversation.spoken]
    spoken[-1][2] &= conversation.end != 'cut'
    if role == 'user' and conversation.end == 'natural':
        if spoken[-1][0] == 'assistant':
            spoken.append(['user', TERMINAL_TEXT, True])
        elif spoken[-1][2]:
            spoken[-1][1] += TERMINAL_TEXT
    told = [] if role == 'user' or conversation.system is None else [('system', conversation.system)]
    spans: list[tuple[int, int]] = []
    text = ''
    for k, (speaker, content, ended) in enumerate(spoken):
        messages = [*told, *((said[0], said[1]) for said in spoken[: k + 1])]
        rows = [{'role': who, 'content': what} for who, what in messages]
        longer = tokenizer.apply_chat_template(rows, tokenize=False)
        assert longer.startswith(text)
        start = longer.rindex(content + END)
        assert start >= len(text)
        if speaker == role and (role == 'assistant' or k > 0):
            spans.append((start, start + len(content) + len(END) * ended))
        text = longer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(low <= first and last <= high for low, high in spans) for first, last in encoded['offset_mapping']]
    return encoded['input_ids'], trained


@pytest.mark.parametrize('role', ['user', 'assistant'])
def test_ids_and_masks_are_those_of_the_whole_text(tokenizer, conversations, role):
    chat: Chat = chat_from_huggingface(tokenizer)
    rows_of = {'user': views.user_rows, 'assistant': views.assistant_rows}[role]
    assert len(conversations) >= NUMBER
    whole = with_terminal(tokenizer)
    compared = 0
    for conversation in conversations:
        ids, trained = slow_row(whole, conversation, role)
        rows, counts = rows_of([conversation], chat, 10**9)
        if not any(trained):
            assert not rows
            assert counts[views.NOTHING_TO_TRAIN_ON] == 1
            continue
        length = len(rows[0])  # rows end with their last trained token
        assert rows[0].tokens.tolist() == ids[:length], conversation.id
        np.testing.assert_array_equal(rows[0].trained, trained[:length], err_msg=conversation.id)
        assert not any(trained[length:])
        compared += 1
    assert compared > NUMBER / 2
