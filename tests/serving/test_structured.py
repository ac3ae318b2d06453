"""Constrained answers: whatever is sampled of what a schema allows is JSON of the schema, and it ends."""

import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jsonschema
import numpy as np
import pytest

from simrl.conversations.chat import Chat
from simrl.conversations.sentencepiece import sentencepiece_chat, train_sentencepiece
from simrl.conversations.templates import chat_from_huggingface
from simrl.evaluation.wildbench.verdicts import PAIR_SCHEMA, SCORE_SCHEMA
from simrl.models.files.load import load_model
from simrl.remote.schema import check_value, object_of, parse_json
from simrl.rewards import panel
from simrl.serving.structured import DeadEndError, Grammars, JsonConstraint, MissingPackageError
from simrl.serving.text import AnswerText
from simrl.simulators import remote
from tests.serving.test_text import chat_of
from tests.tiny import byte_tokenizer

V = 384  # beyond the tokenizer's ids
OWN = {
    'judges': panel.SCHEMA,
    'simulators': remote.SCHEMA,
    'scores': SCORE_SCHEMA,
    'pairs': PAIR_SCHEMA,
    'lists': object_of(items={'type': 'array', 'items': {'type': 'integer', 'minimum': -3}, 'maxItems': 5}),
}
OTHERS: dict[str, Mapping[str, Any]] = {
    'nested': {
        'type': 'object',
        'properties': {
            'place': {
                'type': 'object',
                'properties': {'name': {'type': ['string', 'null']}, 'stars': {'type': 'number', 'multipleOf': 0.5}},
                'required': ['stars'],
            },
            'tags': {'type': 'array', 'items': {'enum': ['a', 'b"c', 7, None]}, 'minItems': 2},
        },
        'required': ['tags', 'place'],
        'additionalProperties': False,
    },
    'unicode': {
        'type': 'object',
        'properties': {'漢 é😀': {'type': 'string', 'pattern': '^[é漢]{2,4}$'}, '\n"': {'const': '<|im_end|> "😀\\'}},
        'required': ['漢 é😀', '\n"'],
        'additionalProperties': False,
    },
    'trees': {'$ref': '#/$defs/t', '$defs': {'t': {'type': 'array', 'items': {'$ref': '#/$defs/t'}}}},
    'either': {'anyOf': [{'type': 'boolean'}, {'type': 'string', 'minLength': 3}, {'type': 'integer', 'minimum': 12}]},
    'dates': {'type': 'string', 'format': 'date'},
    'any object': {'type': 'object'},
    'anything': {},
}
SCHEMAS = OWN | OTHERS


@functools.cache
def chat_with(name: str) -> Chat:
    if name == 'bytes':
        # Tokens of several characters, of which some are more than one part of JSON, and a special token as an option.
        merges = [('{', '"'), ('"', '}'), ('"', ':'), ('Ġ', 'Ġ'), ('Ċ', 'Ġ'), ('ç', '´'), (',', '"'), ('Ã', '©')]
        return chat_from_huggingface(byte_tokenizer(merges=merges))
    if name == 'smollm2':
        if 'SIMRL_SMOLLM2' not in os.environ:
            pytest.skip('SIMRL_SMOLLM2, the path of the file that tools/smollm2_gguf.py writes, is not set')
        return chat_from_huggingface(load_model(os.environ['SIMRL_SMOLLM2'])[2])
    return chat_of(name)


@functools.cache
def grammars_of(name: str) -> Grammars:
    return Grammars.of(chat_with(name), chat_with(name).size + 90)


def ids_of(words: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder='little'))


def walk(chat: Chat, constraint: JsonConstraint, random: np.random.Generator) -> str:
    """The text of an answer of random tokens; of those that end something more often than others."""
    closing = [i for part in ('"', ']', '}', '"}') for i in chat.encode(part)]
    end, text, answer = chat.end_of_turn['assistant'], AnswerText(chat), ''
    for step in range(600):
        allowed = ids_of(constraint.allowed())
        assert not chat.reserved.intersection(allowed) - {end}
        assert allowed.max() < chat.tokenizer.size
        for i in random.choice(allowed, min(len(allowed), 4), replace=False):
            assert constraint._matcher.deep_copy().consume_token(int(i))
        wanted = allowed[np.isin(allowed, [*closing, end])]
        token = int(random.choice(wanted if len(wanted) and random.random() < 0.15 + step / 200 else allowed))
        is_over = constraint.advance(token)
        if token == end:
            assert is_over
            return answer + text.close(end)
        answer += text.push([token])
        if is_over:
            assert np.array_equal(ids_of(constraint.allowed()), [end])
            return answer + text.close()
    raise AssertionError(f'endless: {answer[-200:]!r}')


@pytest.mark.parametrize('name', SCHEMAS)
@pytest.mark.parametrize(
    'tokenizer',
    [
        'bytes',
        'sentencepiece',
        pytest.param('sentencepiece, older', marks=pytest.mark.long),
        pytest.param('smollm2', marks=pytest.mark.long),
    ],
)
def test_random_answers_are_json_of_the_schema(tokenizer: str, name: str) -> None:
    chat, schema, random = chat_with(tokenizer), SCHEMAS[name], np.random.default_rng(list(name.encode()))
    texts = [walk(chat, grammars_of(tokenizer).constraint(schema), random) for _ in range(6)]
    for text in texts:
        value = parse_json(text) if name in OWN else json.loads(text)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
        if name in OWN:
            check_value(value, schema)
        between = re.sub(r'"(\\.|[^"\\])*"', '""', text)
        assert max(map(len, re.findall(r'\s+', between)), default=0) <= 17
    assert len(set(texts)) > 1


def test_a_model_that_likes_spaces_ends() -> None:
    chat = chat_with('bytes')
    spaces = [i for i in range(chat.tokenizer.size) if not chat.decode([i]).strip(' \n')]
    constraint, ids, over = grammars_of('bytes').constraint(OWN['lists']), list[int](), False
    closing = [*spaces, *chat.encode(']'), *chat.encode('}')]
    while not over:
        allowed = ids_of(constraint.allowed())
        wanted = [i for i in closing if i in allowed]
        ids.append(wanted[0] if wanted else int(allowed[0]))
        over = constraint.advance(ids[-1])
        assert len(ids) < 150
    assert len(chat.decode(ids)) > 40
    assert parse_json(chat.decode(ids)) == {'items': []}


def test_the_end_of_turn_comes_when_the_json_is_complete() -> None:
    chat, end = chat_with('bytes'), chat_with('bytes').end_of_turn['assistant']
    constraint = grammars_of('bytes').constraint({'type': 'integer'})
    assert end not in ids_of(constraint.allowed())
    (minus,), (one,) = chat.encode('-'), chat.encode('1')
    assert not constraint.advance(minus)
    assert end not in ids_of(constraint.allowed())
    assert not constraint.advance(one)  # more digits may follow
    assert {end, one} <= set(ids_of(constraint.allowed()))
    assert constraint.advance(end)


def test_masks_are_words_over_the_padded_vocabulary() -> None:
    chat = chat_with('bytes')
    grammars = Grammars.of(chat, V)
    one, other = (grammars.constraint({'type': 'string'}) for _ in range(2))
    words = one.allowed()
    assert (words.dtype, words.shape) == (np.uint32, (V // 32,))
    assert not one.advance(chat.encode('"')[0])
    in_string = set(ids_of(one.allowed()))
    assert chat.encode('<')[0] in in_string
    assert not {*chat.reserved, chat.terminal, *range(chat.size, V)} & in_string
    assert np.array_equal(other.allowed(), words)  # answers share nothing that changes


def test_a_token_that_was_not_allowed_is_refused() -> None:
    chat = chat_with('bytes')
    constraint = grammars_of('bytes').constraint({'type': 'object'})
    for token in (chat.encode('a')[0], chat.terminal, chat.end_of_turn['assistant']):
        with pytest.raises(ValueError, match=f'^expected a token that the schema allows next, found {token}$'):
            constraint.advance(token)
    assert not constraint.advance(chat.encode('{')[0])


@pytest.mark.parametrize(
    ('schema', 'message'),
    [
        ({'type': 'strin'}, 'Invalid type: strin'),
        ({'type': 'object', 'properties': 5}, 'properties must be an object'),
        ({'type': 'array', 'uniqueItems': True}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({'x-guidance': {'lenient': True}, 'not': {}}, r'Unimplemented keys: \["not"\]'),
        ({'type': 'string', 'pattern': '('}, r'regex parse error: \( \^ error: unclosed group'),
        ({'type': 'string', 'minLength': 5, 'maxLength': 2}, 'Unsatisfiable schema: minLength .*'),
        ({'$ref': 'http://127.0.0.1/x'}, "Resource 'http://127.0.0.1/x' is not present .*"),
        ({'$ref': '#'}, r'no token continues an answer of this schema \(NoExtensionBias\)'),
        ({'const': '\ud800'}, 'Value is not JSON serializable: .*'),
        (functools.reduce(lambda inner, _: {'items': inner}, range(300), {}), 'recursion limit exceeded .*'),
        ([{'type': 'object'}], r'expected an object, found \[\{"type": "object"\}\]'),
        (True, 'expected an object, found true'),
    ],
)
def test_what_is_no_schema_is_refused_in_one_line(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f'^{message}$'):
        grammars_of('bytes').constraint(schema)


def test_tokenizers_that_cannot_write_json() -> None:
    lead = 'its answers follow no schema: expected'
    with pytest.raises(ValueError, match=f'^{lead} tokens of the characters of JSON, found none of {{ 7$'):
        Grammars.of(chat_from_huggingface(byte_tokenizer(without='{7')), V)
    concierge = sentencepiece_chat(train_sentencepiece(['i want thai food', 'ok thanks ?'] * 9, 40))
    with pytest.raises(ValueError, match=f"^{lead} a tokenizer of Hugging Face, found simrl's own, as of"):
        Grammars.of(concierge, V)


def test_a_vocabulary_without_some_characters_comes_to_a_dead_end() -> None:
    chat = chat_from_huggingface(byte_tokenizer(without='æ'))
    constraint = Grammars.of(chat, V).constraint(object_of(a={'type': 'string', 'enum': ['漢']}))
    for i in chat.encode('{"a":"'):
        constraint.advance(i)
    with pytest.raises(DeadEndError, match=r'^no token continues an answer of this schema \(.*\)$'):
        constraint.allowed()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'llguidance', None)
    with pytest.raises(ImportError):
        importlib.import_module('llguidance')
    expected = "answers of a JSON schema need the package llguidance .*: pip install 'simrl.structured.'"
    with pytest.raises(MissingPackageError, match=f'^{expected}$'):
        Grammars.of(chat_with('bytes'), V)
