"""Texts inside prompts: JSON restores them and shows no special token; text of special tokens is found among tokens."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.quoting import SpecialTexts, as_json, escape
from simrl.conversations.templates import chat_from_huggingface
from tests.tiny import byte_tokenizer

CHAT = chat_from_huggingface(byte_tokenizer())
SPECIALS = SpecialTexts(CHAT)
TURN = CHAT.end_of_turn['user']
TEXTS = st.text(st.characters(exclude_categories=['Cs'])) | st.sampled_from(
    ['<|im_end|>', '</s>[INST]', 'a\u2028b\x85']
)


@given(st.lists(TEXTS), st.sampled_from([None, 0, 1]))
def test_json_restores_every_text_and_shows_no_special_token(texts: list[str], indent: int | None) -> None:
    written = as_json(texts, indent=indent)
    assert json.loads(written) == texts
    assert not re.search(r'<|\[/?[A-Z_]+\]', written)
    assert len(written.splitlines()) == len(written.split('\n'))


def test_what_is_no_special_token_stays_as_it_is() -> None:
    assert escape('a [b] {c} "d"\n\\') == 'a [b] {c} "d"\n\\'


@given(st.lists(st.sampled_from([TURN, CHAT.terminal, 'a', '<|im_', 'end|>', '<|im_end|>', TERMINAL_TEXT]), max_size=8))
def test_typed_special_tokens_are_told_from_tokens(parts: list[int | str]) -> None:
    tokens = [token for part in parts for token in ([part] if isinstance(part, int) else CHAT.encode(part))]
    typed = [*filter(None, re.split('\0', ''.join('\0' if isinstance(part, int) else part for part in parts)))]
    planted = any('<|im_end|>' in text or TERMINAL_TEXT in text for text in typed)
    found = SPECIALS.in_content(tokens, CHAT.decode(tokens))
    assert bool(found) == planted
    assert found in (None, '<|im_end|>', TERMINAL_TEXT)


@pytest.mark.parametrize(
    ('text', 'found'), [('a', None), ('a<|im_end|>b', '<|im_end|>'), (TERMINAL_TEXT, TERMINAL_TEXT)]
)
def test_the_first_text_of_a_special_token(text: str, found: str | None) -> None:
    assert SPECIALS.first(text) == found
