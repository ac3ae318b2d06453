"""The text of sampled ids, piece by piece: of any ids and cuts the pieces are what decoding all ids gives."""

import dataclasses
import functools
import os
import pathlib
import tempfile
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.huggingface_tokenizer import HuggingFaceTokenizer
from simrl.conversations.sentencepiece import sentencepiece_chat, train_sentencepiece
from simrl.conversations.templates import chat_from_huggingface
from simrl.models.files.load import load_model, load_tokenizer
from simrl.serving.text import CONTEXT, AnswerText, IncrementalDecoder
from tests.tiny import CHATML, CHATML_TOKENS, TEXT_TEMPLATES, byte_tokenizer, sentencepiece_tokenizer


def bare_chat(tokenizer: transformers.PreTrainedTokenizerBase) -> Chat:
    """A chat without a template, of which only the decoding works."""
    content = HuggingFaceTokenizer(tokenizer)
    return Chat(content, {}, {}, {}, (), None, 0, '', content.special)


def mistral(name: str) -> Chat:
    data = pathlib.Path(pytest.importorskip('mistral_common').__file__).parent / 'data'
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / 'tokenizer.model').write_bytes((data / name).read_bytes())
        (path / 'config.json').write_text('{"model_type": "llama"}')
        (path / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
        return bare_chat(load_tokenizer(path))


def smollm2() -> Chat:
    if 'SIMRL_SMOLLM2' not in os.environ:
        pytest.skip('SIMRL_SMOLLM2, the path of the file that tools/smollm2_gguf.py writes, is not set')
    return chat_from_huggingface(load_model(os.environ['SIMRL_SMOLLM2'])[2])


def sentencepieces(template: str, prepend: bool = False) -> Chat:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = sentencepiece_tokenizer(
            pathlib.Path(folder) / 'tokenizer', TEXT_TEMPLATES[template], special_tokens=['<|sep|>'], prepend=prepend
        )
        return chat_from_huggingface(tokenizer)


def word_pieces() -> Chat:
    """A decoder that puts spaces between words."""
    vocab = {piece: i for i, piece in enumerate(['[UNK]', 'good', 'day', '.', '##s', "##n't", '漢'])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    backend.decoder = tokenizers.decoders.WordPiece(cleanup=True)
    return bare_chat(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='[UNK]'))


def ends_of_words() -> Chat:
    """A decoder for which the last piece of a text has no space behind it."""
    vocab = {piece: i for i, piece in enumerate(['a', 'b</w>', 'c</w>', '.</w>', '[E]'])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.decoder = tokenizers.decoders.BPEDecoder(suffix='</w>')
    return bare_chat(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='[E]'))


MERGES = [
    ('Ġ', 'a'),
    ('æ', '¼'),
    ('Ł', 'ĺ'),
    ('¢', 'ð'),
    ('Ċ', 'Ċ'),
    ('[', '['),
    (']', '['),
]  # also parts of characters
SMALL = {
    'bytes': lambda: chat_from_huggingface(byte_tokenizer(merges=MERGES)),
    'bytes, space after': lambda: chat_from_huggingface(
        byte_tokenizer(template=CHATML.replace("'<|im_end|>\n'", "' \n\n<|im_end|>\n'"))
    ),
    'sentencepiece': lambda: sentencepieces('inst'),
    'sentencepiece, llama2': lambda: sentencepieces('llama2'),
    'sentencepiece, older': lambda: sentencepieces('zephyr', prepend=True),
    'concierge': lambda: sentencepiece_chat(train_sentencepiece(['i want thai food', 'ok thanks ?', 'a  b'] * 9, 45)),
    'word pieces': word_pieces,
    'ends of words': ends_of_words,
}
REAL = {
    'smollm2': smollm2,
    'mistral 1': lambda: mistral('tokenizer.model.v1'),
    'mistral 3': lambda: mistral('mistral_instruct_tokenizer_240323.model.v3'),
}
SEVERAL = ['héllo 漢字 😀! ', ' a  b\n\n\n \n\n', '[[[a]', 'x\N{REPLACEMENT CHARACTER}y', '1 2', '- `c`\t(d) ']


@functools.cache
def chat_of(name: str) -> Chat:
    return (SMALL | REAL)[name]()


@functools.cache
def parts_of(name: str) -> list[list[int]]:
    """Ids of texts, and ids that a random text would hardly have: bytes of every kind, spaces, special tokens."""
    chat = chat_of(name)
    tokenizer = chat.tokenizer
    texts = [tokenizer.encode(text) for text in SEVERAL] if tokenizer.size > 60 else []
    unusual = [*sorted(tokenizer.byte_ids)[::17], *sorted(chat.reserved)[:6], chat.terminal, chat.size, chat.size + 9]
    spread = range(0, tokenizer.size, max(1, tokenizer.size // 300))
    broken = [i for i in range(min(tokenizer.size, 3000)) if '\N{REPLACEMENT CHARACTER}' in chat.decode([i])][::9]
    blank = [i for i in range(min(tokenizer.size, 3000)) if not chat.decode([i]).strip()]
    return [*texts, *([i] for i in (*unusual, *spread, *broken, *broken, *blank[:20]))]


def ids_and_cuts(name: str) -> st.SearchStrategy[tuple[list[int], list[list[int]]]]:
    several = st.lists(st.sampled_from(parts_of(name)), max_size=40).map(joined)
    return st.tuples(several, st.lists(st.integers(1, 9), min_size=1, max_size=5)).map(lambda x: (x[0], cut(*x)))


def joined(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


def copy_without_spaces(tokenizer: Any) -> Any:
    return tokenizer.stripping('', '') if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Parts of the ids, of these sizes in turn."""
    parts, start = [], 0
    while start < len(ids):
        parts.append(ids[start : start + sizes[len(parts) % len(sizes)]])
        start += len(parts[-1])
    return parts


def kept(chat: Chat, ids: list[int], special: bool) -> list[int]:
    return [i for i in ids if i < chat.size and (special or (i < chat.terminal and i not in chat.reserved))]


@pytest.mark.parametrize('name', [*SMALL, *(pytest.param(name, marks=pytest.mark.long) for name in REAL)])
def test_pieces_are_the_text_of_all_ids(name: str) -> None:
    chat = chat_of(name)

    @settings(max_examples=60, deadline=None)
    @given(ids_and_cuts(name), st.booleans(), st.lists(st.sampled_from(parts_of(name)), max_size=12))
    def check(ids_and_parts: tuple[list[int], list[list[int]]], special: bool, before: list[list[int]]) -> None:
        ids, parts = ids_and_parts
        text = AnswerText(chat, keep_special=special)
        assert ''.join([*(text.push(part) for part in parts), text.close()]) == chat.decode(kept(chat, ids, special))
        assert text.num_ids == len(ids)
        # A text that continues another.
        after = kept(chat, joined(before), special)
        if after and not chat.tokenizer.byte_ids.issuperset([after[-1], *kept(chat, ids, special)[:1]]):
            text = AnswerText(chat, keep_special=special, after=after)
            new = ''.join([*(text.push(part) for part in parts), text.close()])
            plain = dataclasses.replace(chat, tokenizer=copy_without_spaces(chat.tokenizer))
            given = plain.decode(after)
            if given.endswith('\N{REPLACEMENT CHARACTER}'):
                given = IncrementalDecoder(plain).push(after)
            assert given + new == plain.decode([*after, *kept(chat, ids, special)])
        assert len(text._decoder._ids) <= 3 * CONTEXT + 9 + len(ids) * bool(chat.tokenizer.byte_ids)

    check()


@pytest.mark.parametrize('name', SMALL)
def test_the_first_stop_text_that_is_complete_ends_the_answer(name: str) -> None:
    chat = chat_of(name)

    @settings(max_examples=60, deadline=None)
    @given(ids_and_cuts(name), st.data(), st.booleans())
    def check(ids_and_parts: tuple[list[int], list[list[int]]], data: st.DataObject, keep: bool) -> None:
        ids, parts = ids_and_parts
        whole = chat.decode(kept(chat, ids, False))
        random = st.text('a[] \n', min_size=1, max_size=4)
        spans = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 5))
        of_text = spans.map(lambda span: whole[span[0] : sum(span)] or 'a')
        stop = data.draw(st.lists(random | of_text, max_size=4))
        ends = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(x) for x in stop)]
        found = max((x for x in stop if whole[: ends[0]].endswith(x)), key=len) if ends else None
        expected = whole if found is None else whole[: ends[0] if keep else ends[0] - len(found)]
        text = AnswerText(chat, stop=stop, keep_stop=keep)
        assert ''.join([*(text.push(part) for part in parts), text.close()]) == expected
        assert text.stop == found
        # The last id was needed, and later ids do not matter.
        one_by_one = AnswerText(chat, stop=stop[::-1], keep_stop=keep)
        known = ''.join(one_by_one.push([i]) for i in ids[: text.num_ids - 1])
        assert one_by_one.stop is None
        assert known + one_by_one.push(ids[max(text.num_ids - 1, 0) :]) + one_by_one.close() == expected
        assert one_by_one.num_ids == text.num_ids

    check()


CHAT = chat_of('bytes')
END = CHAT.end_of_turn['assistant']


def test_what_may_become_a_stop_text_waits() -> None:
    text = AnswerText(CHAT, stop=['xyz', '[[E]]', '[E'])
    pieces = [text.push(CHAT.encode(part)) for part in ('so ', 'x', 'y [', '[', 'F x', 'y')]
    assert pieces == ['so ', '', 'xy ', '', '[[F ', '']
    assert text.push(CHAT.encode('zab')) == ''
    assert (text.stop, text.num_ids) == ('xyz', 13)
    assert text.push(CHAT.encode('more')) == text.close(END) == ''
    text = AnswerText(CHAT, stop=['xyz'])
    assert [text.push(CHAT.encode('axy')), text.close()] == ['a', 'xy']
    assert text.stop is None


def test_the_order_of_stop_texts_does_not_matter() -> None:
    for stop in (['b', 'abc', 'ab'], ['ab', 'abc', 'b']):
        text = AnswerText(CHAT, stop=stop, keep_stop=True)
        assert text.push(CHAT.encode('xabcb')) == 'xab'
        assert text.stop == 'ab'
    with pytest.raises(ValueError, match=r'^stop: expected texts, found an empty one$'):
        AnswerText(CHAT, stop=['a', ''])


@pytest.mark.parametrize('text', ['héllo 漢字 😀!', '😀', 'x\N{REPLACEMENT CHARACTER}y'])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    ids = CHAT.encode(text)
    shown = AnswerText(CHAT)
    pieces = [shown.push([i]) for i in ids]
    assert set(''.join(pieces)) <= set(text)
    assert ''.join(pieces) + shown.close() == text
    assert '' in pieces


def test_bytes_that_are_no_character_are_shown_at_the_end() -> None:
    shown = AnswerText(CHAT)
    assert [shown.push(CHAT.encode('a字')[:-1]), shown.close()] == ['a', '\N{REPLACEMENT CHARACTER}']
    # Some tokenizers read a run of bytes as no characters at all if one of them is wrong.
    chat = chat_of('sentencepiece')
    run = chat.encode('漢')[-3:]
    assert chat.tokenizer.byte_ids.issuperset(run)
    shown = AnswerText(chat, stop=['漢'])
    assert [shown.push([i]) for i in (*chat.encode('a'), *run)] == ['a', '', '', '']
    assert shown.stop is None
    assert shown.close() == ''
    assert shown.stop == '漢'


@pytest.mark.parametrize(('special', 'stop'), [(False, False), (False, True), (True, False), (True, True)])
def test_ends_and_special_tokens_are_text_where_asked_for(special: bool, stop: bool) -> None:
    start = CHAT.tokenizer._whole.convert_tokens_to_ids(CHATML_TOKENS[1])
    ids, b = [*CHAT.encode('a'), start, CHAT.terminal, CHAT.size + 5], CHAT.encode('b')[0]
    expected = f'a{CHATML_TOKENS[1]}{TERMINAL_TEXT}' if special else 'a'
    for end, its_text in ((None, ''), (END, '<|im_end|>' * (special or stop)), (b, 'b' * stop), (CHAT.size + 9, '')):
        text = AnswerText(CHAT, keep_stop=stop, keep_special=special)
        assert text.push(ids) + text.close(end) == expected + its_text


def test_a_completion_continues_its_prompt() -> None:
    chat = chat_of('sentencepiece')
    word = chat.tokenizer._whole.encode('yes', add_special_tokens=False)
    for after, expected in (((), 'yes'), (chat.encode('I say'), ' yes')):
        text = AnswerText(chat, after=after)
        assert text.push(word) + text.close() == expected
