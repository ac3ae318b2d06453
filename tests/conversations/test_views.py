"""Both views of a conversation: what is said is the same, who spoke is known, and only what was meant is trained on."""

import os
import pathlib

import numpy as np
import pytest

from simrl.conversations import records, views
from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.conversations.records import Conversation, Message, Preference
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import natural_prompt, preference_rows, render, swapped_prompt
from tests.tiny import CHATML, CHATML_WITHOUT_SYSTEM, byte_tokenizer

DATA = os.environ.get('SIMRL_DATA')
TALK = (Message('user', 'Hello'), Message('assistant', 'Hi.'), Message('user', 'Bye'), Message('assistant', 'See you!'))
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"


@pytest.fixture(scope='module')
def chat():
    return chat_from_huggingface(byte_tokenizer(template=DEFAULT + CHATML))


def conversation(turns=TALK, end='unknown', **fields):
    return Conversation('c', 's', 'train', tuple(turns), end, **fields)


def spoken(chat, row, mask):
    """The text of the masked tokens, runs apart from each other by '|'."""
    text = ''
    for i in range(len(row)):
        if mask[i]:
            text += chat.decode(row.tokens[i : i + 1])
        elif text and not text.endswith('|'):
            text += '|'
    return text.rstrip('|')


def test_who_spoke_and_which_message_each_token_belongs_to(chat):
    natural = render(chat, TALK, system=None)
    swapped = render(chat, TALK, system='You said: Hello', view='swapped')
    assert spoken(chat, natural, natural.role == USER) == 'Hello<|im_end|>|Bye<|im_end|>'
    assert spoken(chat, natural, natural.role == ASSISTANT) == 'Hi.<|im_end|>|See you!<|im_end|>'
    assert spoken(chat, natural, natural.message == -1) == '<|im_start|>system\nBe kind.<|im_end|>'
    assert spoken(chat, natural, natural.message == 2) == '\n<|im_start|>user\nBye<|im_end|>'
    assert spoken(chat, swapped, swapped.role == USER) == 'Bye<|im_end|>'
    assert spoken(chat, swapped, swapped.role == ASSISTANT) == 'Hi.<|im_end|>|See you!<|im_end|>'
    assert spoken(chat, swapped, swapped.message == -1) == '<|im_start|>system\nYou said: Hello<|im_end|>'
    assert spoken(chat, swapped, swapped.message == 1) == '\n<|im_start|>user\nHi.<|im_end|>'
    assert spoken(chat, swapped, swapped.message == 2) == '\n<|im_start|>assistant\nBye<|im_end|>'
    assert 0 not in swapped.message
    for row in (natural, swapped):
        assert [a.dtype for a in (row.tokens, row.role, row.message, row.trained)] == ['int32', 'int8', 'int16', 'bool']
        assert not row.trained.any()
        assert set(row.role) == {TEMPLATE, USER, ASSISTANT}
    for number, role in ((1, ASSISTANT), (2, USER), (3, ASSISTANT)):
        contents = [row.tokens[(row.message == number) & (row.role == role)].tolist() for row in (natural, swapped)]
        assert contents[0] == contents[1]


def test_what_a_simulator_is_trained_on(chat):
    row = render(chat, TALK, system=None, train='user', end='natural', terminal=True)
    assert spoken(chat, row, row.trained) == 'Bye<|im_end|>|<|endconversation|><|im_end|>'
    assert spoken(chat, row, row.message == 4) == '\n<|im_start|>user\n<|endconversation|><|im_end|>'
    assert row.role[row.tokens == chat.terminal] == [USER]


def test_the_terminal_token_of_a_user_who_spoke_last_is_in_that_message(chat):
    row = render(chat, TALK[:3], system=None, train='user', end='natural', terminal=True)
    assert spoken(chat, row, row.trained) == 'Bye<|endconversation|><|im_end|>'
    assert spoken(chat, row, row.message == 2) == '\n<|im_start|>user\nBye<|endconversation|><|im_end|>'
    assert row.role[row.tokens == chat.terminal] == [USER]
    assert row.message.max() == 2


@pytest.mark.parametrize(
    ('turns', 'end', 'terminal'),
    [
        *((talk, end, True) for talk in (TALK, TALK[:3]) for end in ('cut', 'unknown')),
        *((talk, 'natural', False) for talk in (TALK, TALK[:3])),
        ((*TALK[:2], Message('user', 'By', truncated=True)), 'natural', True),
    ],
)
def test_only_natural_ends_have_a_terminal_token(chat, turns, end, terminal):
    assert chat.terminal not in render(chat, turns, system=None, train='user', end=end, terminal=terminal).tokens


@pytest.mark.parametrize(
    ('turns', 'end', 'trained'),
    [
        (TALK, 'natural', 'Hello<|im_end|>|Bye<|im_end|>|<|endconversation|><|im_end|>'),
        (TALK[:3], 'natural', 'Hello<|im_end|>|Bye<|endconversation|><|im_end|>'),
        (TALK[:1], 'natural', 'Hello<|endconversation|><|im_end|>'),
        (TALK[:1], 'unknown', 'Hello<|im_end|>'),
        (TALK[:1], 'cut', 'Hello'),
    ],
)
def test_an_opening_that_the_user_writes_is_trained_on(chat, turns, end, trained):
    row = render(chat, turns, system='Greet.', train='user', end=end, terminal=True, openings='trained')
    given = render(chat, turns, system='Greet.', train='user', end=end, terminal=True)
    assert spoken(chat, row, row.trained) == trained
    assert row.tokens.tolist() == given.tokens.tolist()
    assert (row.trained & (row.message > 0)).tolist() == given.trained.tolist()
    of_assistant = render(chat, turns, system='Greet.', train='assistant', end=end, openings='trained')
    assert not of_assistant.trained[of_assistant.message == 0].any()


def test_what_an_assistant_is_trained_on(chat):
    row = render(chat, TALK, system=None, train='assistant', end='natural')
    assert spoken(chat, row, row.trained) == 'Hi.<|im_end|>|See you!<|im_end|>'


@pytest.mark.parametrize(
    ('end', 'trained'), [('cut', 'Bye'), ('unknown', 'Bye<|im_end|>'), ('natural', 'Bye<|im_end|>')]
)
def test_the_end_of_a_cut_conversation_is_nobodys(chat, end, trained):
    row = render(chat, TALK[:3], system=None, train='user', end=end)
    assert spoken(chat, row, row.trained) == trained
    assert row.tokens[-1] == chat.end_of_turn['user']
    assert row.role[-1] == (TEMPLATE if end == 'cut' else USER)


def test_the_end_of_a_truncated_message_is_nobodys(chat):
    turns = [*TALK[:2], Message('user', 'Bye', truncated=True), *TALK[3:], Message('user', 'Bye', truncated=True)]
    row = render(chat, turns, system=None, train='user', end='natural')
    assert spoken(chat, row, row.trained) == 'Bye|Bye'
    assert spoken(chat, row, row.role == ASSISTANT) == 'Hi.<|im_end|>|See you!<|im_end|>'


def test_impossible_views(chat):
    with pytest.raises(ValueError, match='a system text that contains the opening'):
        render(chat, TALK, system=None, view='swapped')
    with pytest.raises(ValueError, match='a system text that contains the opening'):
        render(chat, TALK, system='You are a person.', view='swapped')
    with pytest.raises(ValueError, match='only the natural view has one'):
        render(chat, TALK, system='You said: Hello', view='swapped', terminal=True)
    with pytest.raises(ValueError, match="expected openings='given', found 'trained'"):
        render(chat, TALK, system='You said: Hello', view='swapped', openings='trained')
    with pytest.raises(ValueError, match="message 0: expected role 'user', found 'assistant'"):
        render(chat, TALK[1:], system=None)
    with pytest.raises(ValueError, match="message 1: expected role 'assistant', found 'user'"):
        render(chat, [TALK[0], TALK[2]], system=None)
    with pytest.raises(ValueError, match='at least one message'):
        render(chat, [], system=None)


def test_rollout_prompts_are_what_the_views_start_with(chat):
    for system in (None, 'Greet.'):
        prompt = natural_prompt(chat, 'Hello', system)
        whole = render(chat, TALK, system=system)
        assert prompt.tokens.tolist() == whole.tokens[: len(prompt)].tolist()
        assert prompt.role.tolist() == whole.role[: len(prompt)].tolist()
        following = tuple(whole.tokens[len(prompt) :].tolist())
        assert following[: len(chat.header('assistant'))] == chat.header('assistant')
        unopened = natural_prompt(chat, None, system)
        assert (*unopened.tokens.tolist(), *chat.first_header('user', system)) == tuple(
            whole.tokens[: len(unopened) + len(chat.first_header('user', system))].tolist()
        )
    prompt = swapped_prompt(chat, 'You said: Hello')
    whole = render(chat, TALK, system='You said: Hello', view='swapped')
    assert prompt.tokens.tolist() == whole.tokens[: len(prompt)].tolist()
    assert set(prompt.role.tolist()) == {TEMPLATE}
    assert set(prompt.message.tolist()) == {-1}
    following = tuple(whole.tokens[len(prompt) :].tolist())
    assert following[: len(chat.header('user'))] == chat.header('user')


def test_rows_end_with_what_is_trained_on_and_empty_ones_are_counted(chat):
    everything = [conversation(), conversation(end='natural'), conversation(TALK[:2]), conversation(TALK[:1])]
    rows, counts = views.user_rows(everything, chat, 1000)
    assert [spoken(chat, row, row.trained) for row in rows] == [
        'Bye<|im_end|>',
        'Bye<|im_end|>|<|endconversation|><|im_end|>',
    ]
    assert all(row.trained[-1] for row in rows)
    assert counts == {views.NOTHING_TO_TRAIN_ON: 2}
    rows, counts = views.assistant_rows(everything, chat, 1000)
    assert [spoken(chat, row, row.trained) for row in rows] == ['Hi.<|im_end|>|See you!<|im_end|>'] * 2 + [
        'Hi.<|im_end|>'
    ]
    assert counts == {views.NOTHING_TO_TRAIN_ON: 1}


def test_an_opening_before_a_natural_end_leaves_the_terminal_turn_to_train_on(chat):
    (row,), _ = views.user_rows([conversation(TALK[:2], end='natural')], chat, 1000)
    assert spoken(chat, row, row.trained) == '<|endconversation|><|im_end|>'


def test_rows_of_simulators_that_open_conversations(chat):
    talks = [conversation(TALK[:n], end='natural', intent='Greet.') for n in (1, 3)]
    rows, counts = views.user_rows(talks, chat, 1000, system=views.told_intent, openings='trained')
    assert [spoken(chat, row, row.trained) for row in rows] == [
        'Hello<|endconversation|><|im_end|>',
        'Hello<|im_end|>|Bye<|endconversation|><|im_end|>',
    ]
    assert not counts
    rows, counts = views.user_rows(talks, chat, 1000, system=views.told_intent)
    assert [spoken(chat, row, row.trained) for row in rows] == ['Bye<|endconversation|><|im_end|>']
    assert counts == {views.NOTHING_TO_TRAIN_ON: 1}


def test_rows_that_are_too_long(chat):
    talk = conversation(end='natural')
    whole = render(chat, TALK, system=None, train='user', end='natural', terminal=True)
    without_end = int(np.argmax(whole.message == 3))  # the tokens up to the end of 'Bye'
    assert len(views.user_rows([talk], chat, len(whole))[0][0]) == len(whole)
    for max_length in (len(whole) - 1, without_end):
        with pytest.raises(ValueError, match=f'conversation c: expected at most max_length={max_length} tokens, found'):
            views.user_rows([talk], chat, max_length)
        assert views.user_rows([talk], chat, max_length, on_long='drop') == ([], {views.TOO_LONG: 1})
        rows, counts = views.user_rows([talk], chat, max_length, on_long='cut')
        assert [len(row) for row in rows] == [without_end]
        assert spoken(chat, rows[0], rows[0].trained) == 'Bye<|im_end|>'
        assert counts == {views.CUT: 1}
    for max_length in (without_end - 1, 5):
        rows, counts = views.user_rows([talk], chat, max_length, on_long='cut')
        assert (rows, counts) == ([], {views.NOTHING_TO_TRAIN_ON: 1})


def test_system_texts_of_rows(chat):
    turns = (Message('system', 'Be brief.'), *TALK)
    talk = conversation(turns, intent='Greet.')
    for (rows, _), system in (
        (views.assistant_rows([talk], chat, 1000), 'Be brief.'),
        (views.user_rows([talk], chat, 1000), 'Be kind.'),
        (views.user_rows([talk], chat, 1000, system=views.told_intent), 'Greet.'),
    ):
        assert spoken(chat, rows[0], rows[0].message == -1) == f'<|im_start|>system\n{system}<|im_end|>'
    with pytest.raises(ValueError, match='conversation c: expected an intent, found none'):
        views.user_rows([conversation()], chat, 1000, system=views.told_intent)


def test_preference_rows(chat):
    prompt = (Message('system', 'Be brief.'), *TALK[:3])
    pair = Preference('p', 's', 'train', prompt, 'See you!', 'No')
    (row,), counts = preference_rows([pair], chat, 1000)
    assert not counts
    for reply, rendered in (('See you!', row.chosen), ('No', row.rejected)):
        expected = render(chat, [*TALK[:3], Message('assistant', reply)], system='Be brief.')
        assert rendered.tokens.tolist() == expected.tokens.tolist()
        assert rendered.tokens[-1] == chat.end_of_turn['assistant']
    longest = len(row.chosen)
    assert len(row) == longest > len(row.rejected)
    assert preference_rows([pair], chat, longest - 1, on_long='drop') == ([], {views.TOO_LONG: 1})
    with pytest.raises(ValueError, match=f'preference p: expected at most max_length={longest - 1} tokens'):
        preference_rows([pair], chat, longest - 1)


def test_a_character_without_a_token_names_its_row():
    chat = chat_from_huggingface(byte_tokenizer(without='Ĕ'))  # U+0014
    hello, reply = Message('user', 'Hi'), Message('assistant', 'x\x14y')
    with pytest.raises(ValueError, match=r"^conversation c: cannot encode .* '\\x14' \(U\+0014\)"):
        views.user_rows([Conversation('c', 'made up', 'train', (hello, reply))], chat, 99)
    with pytest.raises(ValueError, match=r"^preference p: cannot encode .* '\\x14' \(U\+0014\)"):
        preference_rows([Preference('p', 'made up', 'train', (hello,), 'yes', reply.content)], chat, 99)


def test_rows_with_a_system_text_that_the_template_has_no_place_for_are_counted():
    plain = chat_from_huggingface(byte_tokenizer(template=CHATML_WITHOUT_SYSTEM))
    told = Message('system', 'Be brief.')
    pairs = [Preference(f'p{i}', 's', 'train', (*lead, *TALK[:3]), 'See', 'No') for i, lead in enumerate([(), (told,)])]
    rows, counts = preference_rows(pairs, plain, 1000)
    assert (len(rows), counts) == (1, {views.NO_SYSTEM: 1})
    talks = [conversation(), conversation((told, *TALK))]
    rows, counts = views.assistant_rows(talks, plain, 1000)
    assert (len(rows), counts) == (1, {views.NO_SYSTEM: 1})
    rows, counts = views.user_rows(talks, plain, 1000)  # the assistant's system text is not shown to a simulator
    assert (len(rows), counts) == (2, {})


@pytest.mark.skipif(not DATA, reason='SIMRL_DATA is not set')
def test_real_conversations(chat):
    path = pathlib.Path(DATA, 'conversations', 'conversations.jsonl.gz')
    found, _ = records.read_conversations(path, on_bad_rows='drop')
    rows, counts = views.user_rows(found, chat, 2048, on_long='cut')
    assert len(rows) + counts[views.NOTHING_TO_TRAIN_ON] == len(found)
    single = sum(len([t for t in c.spoken if t.role == 'user']) == 1 and c.end != 'natural' for c in found)
    assert counts[views.NOTHING_TO_TRAIN_ON] >= single > 0
    ended = sum(chat.terminal in row.tokens for row in rows)
    assert 0 < ended <= sum(c.end == 'natural' for c in found)
    assert all(len(row) <= 2048 and row.trained[-1] and not row.trained[row.message <= 0].any() for row in rows)
