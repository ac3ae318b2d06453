"""Chat templates whose headers and ends are text: what is rendered by message is what transformers encodes."""

import functools
import pathlib
import tempfile

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import USER
from simrl.conversations.records import Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models.transformer import Execution, TransformerConfig
from simrl.rollouts.agents import model_agent
from simrl.rollouts.token_sampling import Sampling
from tests.tiny import CHATML_TOKENS, TEXT_TEMPLATES, byte_tokenizer, sentencepiece_tokenizer

KINDS = ('first', 'prepend', 'bytes')
SYSTEMS = {'zephyr', 'chatml', 'inst_system', 'llama2', 'tulu'}
# As of Llama 3 and OLMo 2: punctuation takes the line end after it into its token.
SPLIT = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
JOINED = [('.', 'Ċ'), ('?', 'Ċ'), ('>', 'Ċ'), ('|', '>Ċ'), (')', '.Ċ'), ('Ġ', '['), (']', '.'), ('.', '.')]
SPECIAL = ('<s>', '</s>')


@functools.cache
def chat_of(template, kind):
    """The tokenizer and the chat of a template."""
    text = TEXT_TEMPLATES[template]
    special = CHATML_TOKENS[1:] if template == 'chatml' else ()
    if kind == 'bytes':
        tokenizer = byte_tokenizer([*SPECIAL, *special], text, merges=JOINED, bos_token='<s>', eos_token='</s>')
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), 'isolated')
        level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    else:
        folder = pathlib.Path(tempfile.mkdtemp()) / 'model'
        tokenizer = sentencepiece_tokenizer(folder, text, special_tokens=special, prepend=kind == 'prepend')
    return tokenizer, chat_from_huggingface(tokenizer)


def whole(tokenizer, contents, *, told, generation):
    """What transformers encodes the template's own rendering to."""
    roles = (['system'] if told else []) + [('user', 'assistant')[i % 2] for i in range(len(contents) - told)]
    rows = [{'role': role, 'content': text} for role, text in zip(roles, contents, strict=True)]
    return tokenizer.apply_chat_template(rows, add_generation_prompt=generation, return_dict=False)


def check_equal(tokenizer, ours, theirs, contents, exact):
    """Equal tokens, up to space after the last one; only punctuation that template text would join is split in ours."""
    text = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (ours, theirs)]
    assert text[0] == text[1][: len(text[0])]
    assert not text[1][len(text[0]) :].strip()
    if exact or all(part[0].isalnum() and part[-1].isalnum() for part in contents):
        assert ours == theirs[: len(ours)]


def plain(text):
    """Text in which no template sees anything but text."""
    return not any(token in text for token in (*SPECIAL, *CHATML_TOKENS, '<unk>'))


TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=12).map(str.strip).filter(bool).filter(plain)
WORDS = st.sampled_from(['Hello', 'yes, no', 'What is (this)', '7', 'answer\n\nB', 'é'])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', TEXT_TEMPLATES)
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(WORDS | TEXTS, min_size=1, max_size=5), system=st.none() | WORDS | TEXTS)
def test_what_is_rendered_by_message_is_what_transformers_encodes(template, kind, texts, system):
    tokenizer, chat = chat_of(template, kind)
    told = system is not None and template in SYSTEMS
    exact = kind != 'bytes' and template != 'inst'  # pieces join neither line ends nor ' ['
    turns = [Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts)]
    ours = render(chat, turns, system=system if told else None).tokens.tolist()
    contents = [*([system] if told else []), *texts]
    asks = len(texts) % 2 == 1
    if asks:
        ours += chat.header('assistant')
    check_equal(tokenizer, ours, whole(tokenizer, contents, told=told, generation=asks), contents, exact)

    if template in SYSTEMS and len(texts) > 1:  # a simulator that plays the user under the assistant's header
        role_play = f'You said: {texts[0]}'
        ours = render(chat, turns, system=role_play, view='swapped').tokens.tolist()
        if not asks:
            ours += chat.header('assistant')
        contents = [role_play, *texts[1:]]
        check_equal(tokenizer, ours, whole(tokenizer, contents, told=True, generation=not asks), contents, exact)


def test_llama_2_as_written_by_hand():
    tokenizer, chat = chat_of('llama2', 'first')
    turns = [Message('user', 'how'), Message('assistant', 'Fine.'), Message('user', 'no')]
    rows = render(chat, turns, system='say').tokens
    pieces = ''.join(tokenizer.convert_ids_to_tokens(rows.tolist())).replace('<0x0A>', '\n').replace('<0x2F>', '/')
    assert pieces == '<s>[INST]▁<<SYS>>\nsay\n<</SYS>>\n\nhow▁[/INST]▁Fine.▁</s><s>[INST]▁no▁['
    assert chat.decode(chat.encode('Fine.', 'assistant')) == 'Fine.'


def test_no_model_speaks_where_text_ends_the_messages():
    _, chat = chat_of('tulu', 'bytes')
    turns = [Message('user', 'Hi.'), Message('assistant', 'Yes?'), Message('user', 'Bye.')]
    with pytest.raises(ValueError, match=r"under the user's header: .* ends its messages with text \('\\n'\)"):
        render(chat, turns, system=None, train='user')
    with pytest.raises(ValueError, match="no model can speak under the user's header"):
        agent(chat, 'natural')
    swapped = render(chat, turns, system='You said: Hi.', view='swapped', train='user', end='natural')
    assert chat.decode(swapped.tokens[swapped.trained]) == 'Bye.</s>'
    spec = agent(chat, 'swapped').policy.spec
    assert (spec.end_of_turn, spec.partner_end_of_turn) == (chat.end_of_turn['assistant'], chat.end_of_turn['user'])
    prompt = [*chat.system_prefix('You said: Hi.'), *spec.partner_first_header, *chat.encode('Yes?')]
    assert swapped.tokens.tolist()[: len(prompt)] == prompt
    assert render(chat, turns[:2], system=None, train='assistant').trained.sum() == len(chat.encode('Yes?')) + 1
    assert chat.terminal_start == chat.end_of_turn['assistant']


def agent(chat, view):
    """A model without weights that plays the user."""
    sizes = {'model_dim': 8, 'num_layers': 1, 'num_heads': 1, 'num_kv_heads': 1, 'head_dim': 8, 'mlp_dim': 8}
    config = TransformerConfig(vocab_size=chat.size, max_positions=64, **sizes)
    asked = {'max_new_tokens': 8, 'sampling': Sampling(), 'system': lambda example: f'You said: {example.opening}'}
    return model_agent(chat, config, {}, Execution(), role=USER, view=view, **asked)
