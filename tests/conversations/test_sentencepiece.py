"""Sentencepiece as a tokenizer: text comes back as it was, headers are out of its reach, and training is repeatable."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import ASSISTANT, TEMPLATE, TERMINAL_TEXT, USER
from simrl.conversations.records import Message
from simrl.conversations.sentencepiece import CONTROLS, SentencePieceTokenizer, sentencepiece_chat, train_sentencepiece
from simrl.conversations.views import natural_prompt, render

TEXTS = ('i want thai food', 'which price ?', 'cheap please', 'try thai cheap north', 'ok thanks', 'forget it\nbye')
ALPHABET = sorted(set(''.join(TEXTS)))
SIZE = 80
MODEL = train_sentencepiece(TEXTS * 20, SIZE)
CHAT = sentencepiece_chat(MODEL)


def names(chat, ids):
    return [chat.tokenizer.pieces[i] for i in ids]


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET, max_size=30))
def test_known_text_comes_back_as_it_was(text):
    ids = CHAT.encode(text)
    assert CHAT.decode(ids) == text
    assert ''.join(names(CHAT, ids)).replace('▁', ' ') == (' ' + text if text else '')
    assert CHAT.reserved.isdisjoint(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([i for i in range(CHAT.size) if i not in CHAT.reserved]), max_size=12))
def test_a_sampled_message_reads_as_its_tokens_one_after_the_other(ids):
    text = ''.join(TERMINAL_TEXT if i == CHAT.terminal else CHAT.tokenizer.pieces[i] for i in ids)
    runs = text.replace('▁', ' ').split(TERMINAL_TEXT)  # every run of text begins with a space or within a word
    assert CHAT.decode(ids) == TERMINAL_TEXT.join(run.removeprefix(' ') for run in runs)


def test_texts_that_training_has_seen_are_few_tokens():
    assert names(CHAT, CHAT.encode('ok thanks')) == ['▁ok', '▁thanks']
    assert CHAT.encode('') == []


def test_training_is_repeatable_and_keeps_long_texts():
    assert train_sentencepiece(iter(TEXTS * 20), SIZE) == MODEL
    long = 'a' * 10_000 + ' z'  # beyond sentencepiece's own limit of 4,192 bytes
    chat = sentencepiece_chat(train_sentencepiece([long, 'b'], 16))
    assert chat.decode(chat.encode(long)) == long


@pytest.mark.parametrize(
    ('vocab_size', 'message'), [(10, 'vocab_size=10 pieces of 6 texts'), (5000, 'set it to a value <= ')]
)
def test_impossible_sizes(vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(TEXTS, vocab_size)


def test_bad_texts_and_models(tmp_path):
    with pytest.raises(ValueError, match='at least one text that is not empty'):
        train_sentencepiece(['', ''], 60)
    for unclear in (lambda: train_sentencepiece(['a▁b'], 60), lambda: CHAT.encode('a▁b')):
        with pytest.raises(ValueError, match=r"'a▁b': the tokenizer has no token for '▁'"):
            unclear()
    with pytest.raises(ValueError, match='not a sentencepiece model'):
        sentencepiece_chat(b'no model at all')
    (tmp_path / 'empty.model').write_bytes(b'')
    with pytest.raises(ValueError, match=r'empty.model: expected a sentencepiece model, found no bytes'):
        sentencepiece_chat(tmp_path / 'empty.model')
    with pytest.raises(ValueError, match=r'without <\|system\|>, <\|user\|>, <\|assistant\|>, <\|end\|>'):
        sentencepiece_chat(foreign_model())
    with pytest.raises(ValueError, match='keeps texts as they are'):
        sentencepiece_chat(foreign_model(normalization_rule_name='nfkc'))
    with pytest.raises(ValueError, match='keeps texts as they are'):
        sentencepiece_chat(foreign_model(remove_extra_whitespaces=True))
    as_text = {'user_defined_symbols': list(CONTROLS[1:])}  # in a message these would become headers
    with pytest.raises(ValueError, match=r'without <\|system\|>'):
        sentencepiece_chat(foreign_model(**as_text))


def foreign_model(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=60,
        minloglevel=2,
        model_type='bpe',
        **{'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False} | settings,
    )
    return model.getvalue()


def test_a_file_is_as_good_as_its_bytes(tmp_path):
    (tmp_path / 'pieces.model').write_bytes(MODEL)
    assert SentencePieceTokenizer(tmp_path / 'pieces.model').pieces == CHAT.tokenizer.pieces


def test_headers_are_single_tokens():
    assert names(CHAT, [*CHAT.header('user'), *CHAT.first_header('user'), CHAT.end_of_turn['user']]) == [
        '<|user|>',
        '<|user|>',
        '<|end|>',
    ]
    assert names(CHAT, [*CHAT.header('assistant'), CHAT.end_of_turn['assistant']]) == ['<|assistant|>', '<|end|>']
    assert names(CHAT, CHAT.system_prefix()) == ['<s>']
    assert CHAT.decode(CHAT.system_prefix('ok thanks')) == '<s><|system|>ok thanks<|end|>'
    assert CHAT.terminal == len(CHAT.tokenizer.pieces) == SIZE


def test_no_text_becomes_a_header():
    letters = ' '.join(sorted({*''.join(CONTROLS), *TERMINAL_TEXT, *'<unk>'}))
    chat = sentencepiece_chat(train_sentencepiece([*TEXTS, *CONTROLS, letters] * 20, SIZE))
    for text in (*CONTROLS, f'ok{CONTROLS[2]}thanks', '<unk>', TERMINAL_TEXT):
        assert chat.reserved.isdisjoint(chat.encode(text))
        assert chat.decode(chat.encode(text)) == text
    with pytest.raises(ValueError, match=r"cannot encode '<\|user\|>': the tokenizer has no token for '<'"):
        CHAT.encode('<|user|>')  # its texts have no '<'


def test_unknown_characters_name_the_text():
    with pytest.raises(ValueError, match="cannot encode 'ok thänks': the tokenizer has no token for 'ä'"):
        CHAT.encode('ok thänks')


def test_what_models_may_sample():
    mask = CHAT.token_mask(128, terminal=False, header='assistant')
    assert set(np.flatnonzero(~mask[: CHAT.size])) == {0, *(CHAT.tokenizer.controls[c] for c in CONTROLS[:4]), SIZE}
    assert not mask[CHAT.size :].any()
    assert CHAT.token_mask(128, terminal=True)[CHAT.terminal]


def test_both_views():
    talk = (Message('user', 'cheap please'), Message('assistant', 'try thai cheap north'), Message('user', 'ok thanks'))
    natural = render(CHAT, talk, system='thai cheap')
    assert CHAT.decode(natural.tokens) == (
        '<s><|system|>thai cheap<|end|><|user|>cheap please<|end|><|assistant|>try thai cheap north<|end|>'
        '<|user|>ok thanks<|end|>'
    )
    swapped = render(CHAT, talk, system='want cheap please', view='swapped')
    assert CHAT.decode(swapped.tokens) == (
        '<s><|system|>want cheap please<|end|><|user|>try thai cheap north<|end|><|assistant|>ok thanks<|end|>'
    )
    for number, role in ((1, ASSISTANT), (2, USER)):
        contents = [row.tokens[(row.message == number) & (row.role == role)].tolist() for row in (natural, swapped)]
        assert contents[0] == contents[1] == [*CHAT.encode(talk[number].content), CHAT.end_of_turn['user']]
    assert (natural.role == TEMPLATE).sum() == len(CHAT.system_prefix('thai cheap')) + 3
    prompt = natural_prompt(CHAT, None, 'thai cheap')
    assert (*prompt.tokens, *CHAT.first_header('user', 'thai cheap')) == tuple(natural.tokens[: len(prompt) + 1])
