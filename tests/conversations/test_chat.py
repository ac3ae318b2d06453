"""Chat templates: constant runs that equal the template's own rendering, and text that stays text."""

import functools
import os
import pathlib
import re

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations import chat as chat_lib
from simrl.conversations.chat import EncodingError
from simrl.conversations.huggingface_tokenizer import HuggingFaceTokenizer
from simrl.conversations.records import Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models.files.load import load_tokenizer
from tests.tiny import CHATML, CHATML_TOKENS, FAMILY_TOKENS, byte_tokenizer, family_tokenizer

DATA = os.environ.get('SIMRL_DATA')
needs_data = pytest.mark.skipif(not DATA, reason='SIMRL_DATA is not set')

FAMILIES = [(family, 'error') for family in FAMILY_TOKENS if family != 'qwen3'] + [('qwen3', 'keep'), ('qwen3', 'omit')]
DATE = '26 Jul 2024'
THINK = '<think>\n\n</think>\n\n'


@functools.cache
def family(name, rewrites='error'):
    """A family's tokenizer and chat."""
    tokenizer = family_tokenizer(name, pathlib.Path(DATA, 'chat_templates', f'{name}.jinja').read_text())
    return tokenizer, chat_from_huggingface(tokenizer, rewrites=rewrites, date=DATE)


def template_text(tokenizer, messages, generation=False):
    """The template's own rendering of (role, text) pairs."""
    rows = [{'role': role, 'content': text} for role, text in messages]
    return tokenizer.apply_chat_template(
        rows, tokenize=False, add_generation_prompt=generation, enable_thinking=False, date_string=DATE
    )


def plain(text):
    """Text in which no template sees anything but text."""
    return not any(token in text for tokens in FAMILY_TOKENS.values() for token in tokens)


TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=20).map(str.strip).filter(bool).filter(plain)


@needs_data
@pytest.mark.parametrize(('name', 'rewrites'), FAMILIES)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), system=st.none() | TEXTS)
def test_turn_by_turn_is_the_whole_in_both_views(name, rewrites, texts, system):
    tokenizer, chat = family(name, rewrites)
    if name == 'gemma':
        system = None
    turns = [Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts)]
    rendered = render(chat, turns, system=system)
    heard = [('system', system)] if system is not None else []
    check_whole(tokenizer, chat, rendered.tokens.tolist(), heard + [(turn.role, turn.content) for turn in turns])

    if name != 'gemma' and len(turns) > 1:
        role_play = f'You said: {texts[0]}'
        rendered = render(chat, turns, system=role_play, view='swapped')
        other = {'user': 'assistant', 'assistant': 'user'}
        swapped = [('system', role_play)] + [(other[turn.role], turn.content) for turn in turns[1:]]
        check_whole(tokenizer, chat, rendered.tokens.tolist(), swapped)


def check_whole(tokenizer, chat, ours, messages):
    """Our tokens are the first of the template's rendering tokenised whole; with a header, all of the prompt's."""
    last = messages[-1][0]
    text = template_text(tokenizer, messages, generation=last == 'user')
    if THINK in text:  # our rule puts the block into every assistant header or into none; the template into the last
        kept = THINK in chat.decode(chat.header('assistant'))
        header = '<|im_start|>assistant\n'
        text = text.replace(THINK, '').replace(header, header + THINK if kept else header)
    whole = tokenizer.encode(text, add_special_tokens=False)
    if last == 'user':
        assert ours + list(chat.header('assistant')) == whole
    else:
        assert ours == whole[: len(ours)]
        assert len(chat.decode(whole[len(ours) :]).replace('<|endoftext|>', '').strip()) == 0


QWEN3 = {'start': '', 'user': '<|im_start|>user\n', 'assistant': '<|im_start|>assistant\n', 'end': '<|im_end|>'}
LLAMA3 = {
    'start': '<|begin_of_text|>',
    'user': '<|start_header_id|>user<|end_header_id|>\n\n',
    'assistant': '<|start_header_id|>assistant<|end_header_id|>\n\n',
    'end': '<|eot_id|>',
    'between': '',
}
SMOL_DEFAULT = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
QWEN_DEFAULT = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'
DATED = f'<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n'
WRITTEN = {  # how each family writes a conversation, by hand
    ('gemma', 'error'): {
        'start': '<bos>',
        'user': '<start_of_turn>user\n',
        'assistant': '<start_of_turn>model\n',
        'end': '<end_of_turn>',
    },
    ('llama3', 'error'): LLAMA3 | {'system': '<|start_header_id|>system<|end_header_id|>\n\n'},
    ('llama3_1', 'error'): LLAMA3 | {'default': DATED, 'system': DATED},
    ('llama3_2', 'error'): LLAMA3 | {'default': DATED, 'system': DATED},
    ('phi3', 'error'): {
        'start': '',
        'system': '<|system|>\n',
        'user': '<|user|>\n',
        'assistant': '<|assistant|>\n',
        'end': '<|end|>',
    },
    ('qwen2_5', 'error'): QWEN3 | {'default': f'<|im_start|>system\n{QWEN_DEFAULT}'},
    ('qwen3', 'keep'): QWEN3 | {'assistant': '<|im_start|>assistant\n' + THINK},
    ('qwen3', 'omit'): QWEN3,
    ('qwen3_instruct_2507', 'error'): QWEN3,
    ('smollm2', 'error'): QWEN3 | {'default': f'<|im_start|>system\n{SMOL_DEFAULT}'},
}


@needs_data
@pytest.mark.parametrize(('name', 'rewrites'), FAMILIES)
def test_each_family_as_written_by_hand(name, rewrites):
    _, chat = family(name, rewrites)
    parts = WRITTEN[name, rewrites]
    end, between = parts['end'], parts.get('between', '\n')
    turns = [Message('user', 'Hello'), Message('assistant', 'Hi.'), Message('user', 'Bye')]

    def written(*pieces):
        return parts['start'] + between.join(piece + end for piece in pieces)

    default = [parts['default']] if 'default' in parts else []
    natural = [parts['user'] + 'Hello', parts['assistant'] + 'Hi.', parts['user'] + 'Bye']
    assert chat.decode(render(chat, turns, system=None).tokens) == written(*default, *natural)
    assert chat.default_system == parts['start'] + (default[0] + end if default else '')
    if name == 'gemma':
        for view in ('natural', 'swapped'):
            with pytest.raises(ValueError, match=r'takes no system text .*System role not supported'):
                render(chat, turns, system='You said: Hello', view=view)
        return
    system = parts.get('system', '<|im_start|>system\n')
    assert chat.decode(render(chat, turns, system='Greet.').tokens) == written(system + 'Greet.', *natural)
    swapped = [system + 'You said: Hello', parts['user'] + 'Hi.', parts['assistant'] + 'Bye']
    assert chat.decode(render(chat, turns, system='You said: Hello', view='swapped').tokens) == written(*swapped)


@needs_data
def test_a_template_that_rewrites_history_needs_a_rule():
    tokenizer, _ = family('qwen3', 'keep')
    with pytest.raises(ValueError, match=r'rewrites history: before a reply .*<think>.* Set `rewrites` to') as caught:
        chat_from_huggingface(tokenizer)
    assert "in history '<|im_end|>\\n<|im_start|>assistant\\n'" in str(caught.value)
    with pytest.raises(ValueError, match="expected 'error', 'keep' or 'omit', found 'both'"):
        chat_from_huggingface(tokenizer, rewrites='both')


@needs_data
def test_todays_date_is_pinned():
    tokenizer, chat = family('llama3_2')
    assert f'Today Date: {DATE}' in chat.default_system
    with pytest.raises(ValueError, match="today's date; pin it with `date`"):
        chat_from_huggingface(tokenizer)
    assert '1 Jan 2020' in chat_from_huggingface(tokenizer, date='1 Jan 2020').default_system


def test_todays_date_is_pinned_where_the_template_only_asks_the_clock():
    tokenizer = byte_tokenizer(template="{{ strftime_now('%A, %Y-%m-%d') }}" + CHATML)
    assert chat_from_huggingface(tokenizer, date=DATE).default_system == 'Friday, 2024-07-26'
    with pytest.raises(ValueError, match="today's date; pin it with `date`"):
        chat_from_huggingface(tokenizer)
    with pytest.raises(ValueError, match="date: expected one such as '26 Jul 2024', found 'today'"):
        chat_from_huggingface(tokenizer, date='today')
    asks_anyway = byte_tokenizer(template="{% set date_string = strftime_now('%d %b %Y') %}{{ date_string }}" + CHATML)
    assert chat_from_huggingface(asks_anyway, date=DATE).default_system == DATE
    unknown = byte_tokenizer(template="{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML)
    with pytest.raises(ValueError, match="today's date in a format that is not written in it"):
        chat_from_huggingface(unknown, date=DATE)


HEADER = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BAD_TEMPLATES = {
    'has no chat template': None,
    'expected a special token at the end of the assistant': (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "found ''": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    'drops, repeats or moves a message': '{% for m in messages[-2:] %}' + HEADER + '{% endfor %}' + GENERATION,
    'repeats or moves': '{% for m in messages %}' + HEADER + HEADER + '{% endfor %}' + GENERATION,
    'drops, repeats or moves': '{% for m in messages | reverse %}' + HEADER + '{% endfor %}' + GENERATION,
    "write the same around every message, found for 'user'": (
        "{% for m in messages %}{{ '#' * loop.index0 }}" + HEADER + '{% endfor %}' + GENERATION
    ),
    "write the same around every message, found for 'opening'": "{{ '#' * messages | length }}" + CHATML,
    'the last message ends with': (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ ('<|im_end|>\n' if m['role'] == 'user' or not loop.last else '<|endoftext|>') }}{% endfor %}" + GENERATION
    ),
    'the message before a reply ends with': (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ ('<|im_end|>\n' if m['role'] == 'assistant' or not loop.last else '<|endoftext|>') }}{% endfor %}"
        + GENERATION
    ),
    "refuses messages by user: TypeError: object of type 'int' has no len": '{{ 3 | length }}' + CHATML,
    'have no common form': (
        "{% for m in messages %}{{ '?' if loop.first else '<|im_start|>!' }}{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}{{ '<|im_start|>!' if add_generation_prompt }}"
    ),
}


@pytest.mark.parametrize('error', BAD_TEMPLATES)
def test_a_template_that_is_not_constant_runs_is_an_error(error):
    with pytest.raises(ValueError, match=error):
        chat_from_huggingface(byte_tokenizer(template=BAD_TEMPLATES[error]), rewrites='keep')


@pytest.mark.parametrize('others', [{}, {'tool_use': '{{ messages[-1] }}'}])
def test_the_default_is_taken_of_several_templates(tmp_path, others):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'default': CHATML, **others}
    tokenizer.save_pretrained(tmp_path / 'files')  # chat_template.jinja and additional_chat_templates/
    tokenizer.save_pretrained(tmp_path / 'list', save_jinja_files=False)
    expected = chat_from_huggingface(byte_tokenizer())
    for found in (tokenizer, load_tokenizer(tmp_path / 'files'), load_tokenizer(tmp_path / 'list')):
        assert chat_from_huggingface(found).headers == expected.headers


def test_several_templates_without_a_default_are_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'rag': CHATML, 'tool_use': CHATML}
    with pytest.raises(ValueError, match=r"expected a chat template named 'default', found \['rag', 'tool_use'\]"):
        chat_from_huggingface(tokenizer)


def test_a_slow_tokenizer_is_an_error():
    class Slow:
        chat_template = CHATML

    with pytest.raises(ValueError, match='expected a fast tokenizer, found Slow'):
        chat_from_huggingface(Slow())


def test_tokens_that_join_header_and_content_are_an_error():
    template = CHATML.replace("['role'] + '\n'", "['role'] + ' P'").replace('assistant\n', 'assistant P')
    chat_from_huggingface(byte_tokenizer(template=template))
    with pytest.raises(ValueError, match='tokens of the whole rendering differ from those of its parts at token'):
        chat_from_huggingface(byte_tokenizer(template=template, merges=[('P', 'P')]))


def test_system_text_inside_the_first_message():
    template = (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (s if loop.first else '') }}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + GENERATION
    )
    chat = chat_from_huggingface(byte_tokenizer(template=template))
    assert chat.system_prefix() == ()
    rendered = render(chat, [Message('user', 'Hi'), Message('assistant', 'Yes?')], system='Greet.')
    expected = '<|im_start|>user\nGreet.\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>'
    assert chat.decode(rendered.tokens) == expected


def test_a_system_text_that_runs_into_the_first_message_is_not_taken():
    template = (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
        "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ (s if loop.first else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}" + GENERATION
    )
    chat = chat_from_huggingface(byte_tokenizer(template=template))
    with pytest.raises(ValueError, match=r"takes no system text .*writes nothing after one.*found 'Greet.'"):
        chat.system_prefix('Greet.')


def test_system_text_before_the_last_message_is_not_a_system_message():
    template = (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ s + '\n' if s and loop.last }}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + GENERATION
    )
    chat = chat_from_huggingface(byte_tokenizer(template=template))
    assert chat.decode(chat.header('user')) == '\n<|im_start|>user\n'
    with pytest.raises(ValueError, match=r'takes no system text .*drops, repeats or moves a message'):
        chat.system_prefix('Greet.')


def test_a_system_text_that_changes_later_headers_is_not_taken():
    template = (
        "{% set name = 'bot' if messages[0]['role'] == 'system' else 'assistant' %}{% for m in messages %}"
        "{{ '<|im_start|>' + (name if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' + name + '\n' }}{% endif %}"
    )
    chat = chat_from_huggingface(byte_tokenizer(template=template))
    assert chat.decode(chat.header('assistant')) == '\n<|im_start|>assistant\n'
    with pytest.raises(ValueError, match=r'takes no system text .*other headers'):
        chat.system_prefix('Greet.')


def test_first_headers_follow_what_precedes():
    for template, start in ((CHATML, ''), ('{{ bos_token }}' + CHATML, '<|endoftext|>')):
        chat = chat_from_huggingface(byte_tokenizer(template=template, bos_token='<|endoftext|>'))
        for role in ('user', 'assistant'):
            for system, before in ((None, ''), ('Greet.', '<|im_start|>system\nGreet.<|im_end|>\n')):
                prefix = chat.system_prefix(system) + chat.first_header(role, system)
                assert chat.decode(prefix) == f'{start}{before}<|im_start|>{role}\n'


def test_special_tokens_in_reach_of_text_are_an_error():
    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(CHATML_TOKENS))
    reachable = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    reachable.chat_template = CHATML
    with pytest.raises(ValueError, match=r"the text '<\|endoftext\|>' in a message would become the special token"):
        chat_from_huggingface(reachable)


def test_added_tokens_that_are_not_special_are_ordinary_words():
    tokenizer = byte_tokenizer(merges=[('a', 'b')])
    words = ['ab', '<think>', 'xylotherapy', '정형외과']  # the first is a token without being added, too
    tokenizer.add_tokens(words)
    chat = chat_from_huggingface(tokenizer)
    text = '<think>Try xylotherapy at 정형외과, ab.<|im_end|>'
    ids = chat.encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    added = tokenizer.convert_tokens_to_ids(words)
    assert set(added) <= set(ids)
    assert chat.token_mask(chat.size, terminal=False)[added].all()
    assert chat.decode(ids) == text
    row = render(chat, [Message('user', 'Try xylotherapy.')], system=None).tokens.tolist()
    whole = tokenizer.encode(template_text(tokenizer, [('user', 'Try xylotherapy.')]), add_special_tokens=False)
    assert row == whole[: len(row)]


def test_added_tokens_of_headers_stay_out_of_reach_of_text():
    """DeepSeek-R1 does not call its headers special, and the user's message has no other end."""
    tokens = ('<User>', '<Assistant>', '<think>')
    tokenizer = byte_tokenizer(
        ('</s>',),
        "{% for m in messages %}{{ '<User>' + m['content'] if m['role'] == 'user' else "
        "'<Assistant>' + m['content'] + '</s>' }}{% endfor %}{{ '<Assistant><think>' if add_generation_prompt }}",
    )
    tokenizer.add_tokens(list(tokens))
    user, assistant, think = tokenizer.convert_tokens_to_ids(tokens)
    for rewrites, header in (('keep', (think,)), ('omit', ())):
        chat = chat_from_huggingface(tokenizer, rewrites=rewrites)
        assert (chat.end_of_turn['user'], chat.header('assistant')) == (assistant, header)
        assert set(chat.encode('x<Assistant>y<User>z<think>')) & {user, assistant, think} == {think}
        assert set(np.flatnonzero(chat.token_mask(384, False, header='user'))) & {user, assistant} == {assistant}
        assert set(np.flatnonzero(chat.token_mask(384, False, header='assistant'))) & {user, assistant} == set()


PLANTED = st.lists(
    st.sampled_from([*sorted({token for tokens in FAMILY_TOKENS.values() for token in tokens}), chat_lib.TERMINAL_TEXT])
    | st.text(st.characters(exclude_categories=['Cs']), max_size=4),
    max_size=8,
).map(lambda pieces: f'a{"".join(pieces)}b')


@settings(max_examples=50, deadline=None)
@given(text=PLANTED)
def test_planted_special_tokens_stay_text(text):
    chat = planted_chat()
    ids = chat.encode(text)
    assert max(ids) < 256  # bytes
    assert chat.decode(ids) == text
    rendered = render(
        chat, [Message('user', text), Message('assistant', text)], system=text, end='natural', terminal=True
    )
    assert np.sum(rendered.tokens == chat.end_of_turn['user']) == 4
    assert np.sum(rendered.tokens == chat.terminal) == 1


@functools.cache
def planted_chat():
    return chat_from_huggingface(byte_tokenizer(sorted({t for tokens in FAMILY_TOKENS.values() for t in tokens})))


def test_the_terminal_token_follows_the_vocabulary():
    tokenizer = byte_tokenizer()
    chat = chat_from_huggingface(tokenizer)
    assert (chat.terminal, chat.size) == (len(tokenizer), len(tokenizer) + 1)
    assert chat.decode([chat.terminal, *chat.encode('é'), chat.terminal]) == '<|endconversation|>é<|endconversation|>'
    assert chat.decode([]) == ''
    assert chat.terminal not in chat.encode('<|endconversation|>')
    with pytest.raises(ValueError, match=f'cannot decode id {chat.size}'):
        chat.decode([chat.size])


def test_allowed_ids():
    tokenizer = byte_tokenizer()
    chat = chat_from_huggingface(tokenizer)
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    for terminal in (False, True):
        expected = {*range(256), end} | ({chat.terminal} if terminal else set())
        assert set(np.flatnonzero(chat.token_mask(384, terminal)).tolist()) == expected
        assert chat.token_mask(384, terminal).dtype == np.bool_
    with pytest.raises(ValueError, match=f'num_rows: expected at least the {chat.size} ids in use, found 100'):
        chat.token_mask(100, True)


def test_terminal_runs_find_the_text_however_it_is_joined():
    chat = chat_from_huggingface(byte_tokenizer(merges=[('.', '['), (']', 'Ċ'), ('Ġ', '['), ('E', 'N')]))
    runs = chat.terminal_runs('[END]')

    def found(ids: list[int]) -> bool:
        return any(tuple(ids[max(end - len(run), 0) : end]) == run for end in range(len(ids) + 1) for run in runs)

    for before in ('Bye.', 'Bye. ', 'Bye!', 'Bye\n', 'Bye\n\n', '', '"', '[', '(', 'so, '):
        for after in ('', '\n', '.', '!', '"', ']', ')'):
            assert found(chat.encode(before + '[END]' + after)), (before, after)
    for text in ('Bye. [EN', 'END]', '[end]', '[END', 'Bye.'):
        assert not found(chat.encode(text)), text
    assert len(chat_from_huggingface(byte_tokenizer()).terminal_runs('[END]')) == 1  # no token joins it with anything
    with pytest.raises(ValueError, match='stop sequence: expected text'):
        chat.terminal_runs('')


def sentencepiece_like(**unknown):
    """A tokenizer that writes spaces as ▁ and puts one before text, with Mistral's template and tokens."""
    special = ['<unk>', '<s>', '</s>', '[INST]', '[/INST]']
    letters = sorted({chr(i) for i in range(33, 127)} | {'▁', 'Ü', '漢', '字'})
    pieces = special + [f'<0x{i:02X}>' for i in range(256)] + letters
    vocab = {piece: i for i, piece in enumerate([*pieces, '▁P'])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[('▁', 'P')], unk_token='<unk>', **unknown)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace('▁', ' '),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(' ', 1, 0),
        ]
    )
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>')
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize('generation', ['', ' '])
def test_roles_may_end_with_their_own_tokens(generation):
    tokenizer = sentencepiece_like(byte_fallback=True)
    tokenizer.chat_template += "{{ '" + generation + "' if add_generation_prompt }}"
    chat = chat_from_huggingface(tokenizer)
    begin, end, inst, close = (tokenizer.convert_tokens_to_ids(t) for t in ('<s>', '</s>', '[INST]', '[/INST]'))
    assert chat.end_of_turn == {'user': close, 'assistant': end}
    assert (chat.header('user'), chat.header('assistant')) == ((inst,), ())
    assert (chat.system_prefix(), chat.first_header('user')) == ((begin,), (inst,))
    turns = [Message('user', 'Put [INST] é'), Message('assistant', 'Yes.\nP'), Message('user', 'Bye')]
    rendered = render(chat, turns[:1] + turns[1:], system=None)
    plain_turns = [Message('user', 'Put é'), *turns[1:]]
    text = template_text(tokenizer, [(turn.role, turn.content) for turn in plain_turns], generation=True)
    whole = tokenizer.encode(text.removesuffix(' '), add_special_tokens=False)  # the space is the reply's first token's
    assert render(chat, plain_turns, system=None).tokens.tolist() == whole
    assert np.sum(rendered.tokens == inst) == 2
    assert chat.decode(chat.encode('Put [INST] é')) == 'Put [INST] é'
    assert set(np.flatnonzero(chat.token_mask(512, False, header='user'))) & {end, close} == {close}
    assert set(np.flatnonzero(chat.token_mask(512, False, header='assistant'))) & {end, close} == {end}
    assert set(np.flatnonzero(chat.token_mask(512, False))) & {end, close} == {end, close}
    with pytest.raises(ValueError, match='Only user and assistant roles are supported!'):
        render(chat, turns, system='You said: Put [INST] é', view='swapped')


def test_a_character_without_a_token_is_an_error():
    chat = chat_from_huggingface(sentencepiece_like())
    assert chat.decode(chat.encode('Put Ü')) == 'Put Ü'
    with pytest.raises(EncodingError, match=r"cannot encode 'café': the tokenizer has no token for 'é' \(U\+00E9\)"):
        chat.encode('café')
    with pytest.raises(EncodingError, match=r"no token for '▁'"):  # it would be read as a space
        chat.encode('▁▂▃')


BYTE_LEVEL = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level(text):
    """The byte-level characters of a text's bytes."""
    return BYTE_LEVEL.pre_tokenize_str(text)[0][0]


@pytest.mark.parametrize('normalizer', [None, tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()])
def test_a_byte_that_the_vocabulary_lacks_is_an_error(normalizer):
    missing = byte_level('\x14') + byte_level('\U00046131')[0]
    tokenizer = byte_tokenizer(without=missing, merges=[('e', byte_level('é')[0])])
    tokenizer.backend_tokenizer.normalizer = normalizer
    chat = chat_from_huggingface(tokenizer)
    for text, found in (('\x14', "'\\x14' (U+0014)"), ('a\x14b', "'\\x14' (U+0014)"), ('\U00046131', '(U+46131)')):
        for judge in (chat.encode, chat.check):
            with pytest.raises(EncodingError, match=re.escape(found)):
                judge(text)
    for text in ('Äé e\u0301 \u212b', ' \n\t\r\x13', '\ufffd', '漢字 \U0001f600', ''):  # \u212b: NFC turns it into Å
        chat.check(text)
        assert chat.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(EncodingError, match=r"cannot encode 'ok\\ud800'.* for '\\ud800' \(U\+D800\)"):
        chat.encode('ok\ud800')


def test_an_unknown_token_is_no_character_though_its_text_has_it():
    pieces = ['<unk>', *CHATML_TOKENS, *(c for c in map(chr, range(32, 127)) if c != '<')]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token='<unk>'))
    backend.decoder = tokenizers.decoders.Fuse()
    content = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>'))
    assert content.decode(content.encode('un>k 0')) == 'un>k 0'
    with pytest.raises(EncodingError, match="no token for '<'"):
        content.encode('a<b')
    assert not content.covers('<')


def test_what_a_normalizer_deletes_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace('x', '')
    with pytest.raises(EncodingError, match="no token for 'x'"):
        chat_from_huggingface(tokenizer).encode('axa')


def test_words_without_tokens_for_their_letters_are_judged_as_words():
    words = {'<unk>': 0, '<|im_start|>': 1, '<|im_end|>': 2, 'ab': 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    content = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>'))
    assert not content.covers('ab')
    assert content.encode('ab') == [3]
    assert not content.covers('ba')


def test_stop_sequences_need_no_character_that_the_vocabulary_lacks():
    chat = chat_from_huggingface(byte_tokenizer(without='*"'))
    assert len(chat.terminal_runs('[END]')) == 1
    with pytest.raises(EncodingError, match=r"no token for '\*'"):
        chat.terminal_runs('*END*')


def test_a_vocabulary_may_have_holes():
    """The terminal token is an id that no token has, and ids of no token are not sampled."""
    byte = byte_level('\x14')
    tokenizer = byte_tokenizer(without=byte)
    (hole,) = set(range(len(tokenizer))) - set(tokenizer.get_vocab().values())
    chat = chat_from_huggingface(tokenizer)
    assert chat.terminal == len(tokenizer) + 1 == max(tokenizer.get_vocab().values()) + 1
    assert not chat.token_mask(384, terminal=True)[hole]
    assert chat.token_mask(384, terminal=True)[chat.terminal]
