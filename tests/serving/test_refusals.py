"""Requests that cannot be answered: the API's form of errors, with the field, what is expected and what is found."""

import collections
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from simrl.serving.generation import Failure, Generation, Piece
from simrl.serving.server import make_app
from simrl.serving.settings import HttpSettings
from tests.remote.server import wait_until
from tests.serving.scripted import CHAT, ScriptedEngine, Site, served, site, words

KEY = 'sk-abc'
HI = {'model': 'model', 'messages': [{'role': 'user', 'content': 'hi'}]}
RAW = {'model': 'model', 'prompt': 'hi'}
FAILURES = ('deadline', 'draining', 'constraint', 'internal', 'cancelled')


def script(generation: Generation):
    """Does what the prompt says: a failure at once or after a piece, or a fault of the engine."""
    said = CHAT.decode(generation.prompt)
    for cause in FAILURES:
        if f'{cause} now' in said:
            return [Failure(cause)]
        if f'{cause} later' in said:
            return [Piece('a', (1,)), 0.02, Failure(cause, 'by the script')]
    return [Piece('a', (1,), ('no score',), finish='stop')] if 'fault' in said else words(generation)


ENGINE = ScriptedEngine(script)


@pytest.fixture(scope='module')
def here() -> Iterator[Site]:
    with site(ENGINE, body_bytes=2**16) as found:
        yield found


def ask(
    here: Site,
    body: Any,
    path: str = '/v1/chat/completions',
    *,
    method: str = 'POST',
    **headers: str,
) -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers of a reply."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = here.url.removesuffix('/v1') + path
    headers = {'Content-Type': 'application/json', **{name.replace('_', '-'): x for name, x in headers.items()}}
    request = urllib.request.Request(url, content if method == 'POST' else None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def refused(here: Site, body: Any, path: str = '/v1/chat/completions') -> dict[str, Any]:
    """The error of status 400."""
    asked = len(ENGINE.asked)
    status, reply, _ = ask(here, body, path)
    assert (status, len(ENGINE.asked)) == (400, asked), reply
    assert reply['error'].keys() == {'message', 'type', 'param', 'code'}
    assert reply['error']['type'] == 'invalid_request_error'
    assert '\n' not in reply['error']['message']
    return reply['error']


def long(tokens: int) -> list[dict[str, str]]:
    """A chat with a prompt of that many tokens."""
    return [{'role': 'user', 'content': 'x' * (tokens - 23 + 4)}]


@pytest.mark.parametrize(
    ('body', 'param', 'message'),
    [
        ({'n': 0}, 'n', 'expected greater than or equal to 1, found 0'),
        ({'n': 1.5}, 'n', 'expected a valid integer, found 1.5'),
        ({'n': 129}, 'n', 'found 129'),
        ({'n': True}, 'n', 'expected a valid integer, found True'),
        ({'temperature': '0'}, 'temperature', "expected a valid number, found '0'"),
        ({'temperature': -1}, 'temperature', 'found -1'),
        ({'temperature': 10**400}, 'temperature', 'found 1000'),
        ({'top_p': 0}, 'top_p', 'expected greater than 0, found 0'),
        ({'top_k': -2}, 'top_k', 'found -2'),
        ({'min_p': 2}, 'min_p', 'found 2'),
        ({'max_tokens': 0}, 'max_tokens', 'expected at least 1, found 0'),
        ({'max_tokens': 2**40}, 'max_tokens', 'found 1099511627776'),
        ({'max_tokens': 1, 'max_completion_tokens': 2}, 'max_tokens', 'found 1'),
        ({'max_tokens': 180}, 'max_tokens', '180, 1 too many'),
        ({'seed': 2**63}, 'seed', 'found 9223372036854775808'),
        ({'stop': ['a'] * 17}, 'stop', 'found'),
        ({'stop': ['']}, 'stop.0', "found ''"),
        ({'stop': 5}, 'stop', 'expected a valid string, found 5'),
        ({'stop_token_ids': [1, 10**6]}, 'stop_token_ids', 'found 1000000'),
        ({'stop_token_ids': list(range(17))}, 'stop_token_ids', '16 items'),
        ({'logprobs': 1}, 'logprobs', 'expected a valid boolean, found 1'),
        ({'top_logprobs': 2}, 'top_logprobs', 'beside it'),
        ({'logprobs': True, 'top_logprobs': 21}, 'top_logprobs', 'found 21'),
        ({'stream_options': {'include_usage': True}}, 'stream_options', 'beside it'),
        ({'frequency_penalty': 0.5}, 'frequency_penalty', 'expected null or 0'),
        ({'ignore_eos': True}, 'ignore_eos', 'expected null or false'),
        ({'tools': [{'type': 'function'}]}, 'tools', 'expected null or []'),
        ({'logit_bias': {'5': 1}}, 'logit_bias', 'expected null or {}'),
        ({'guided_json': {}}, 'guided_json', 'unknown'),
        ({'response_format': {'type': 'grammar'}}, 'response_format', "'grammar'"),
        ({'response_format': {'type': 'json_object'}}, 'response_format', 'no schema is followed here'),
        ({'messages': []}, 'messages', 'found []'),
        ({'messages': None}, 'messages', 'found None'),
        ({'messages': [{'role': 'tool', 'content': ''}]}, 'messages.0.role', "found 'tool'"),
        ({'messages': [{'role': 'user'}]}, 'messages.0.content', 'found none'),
        ({'messages': [{'role': 'user', 'content': None}]}, 'messages.0.content', 'found None'),
        (
            {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': ''}]}]},
            'messages.0.content.0.type',
            "'text'",
        ),
        ({'messages': [{'role': 'user', 'content': 'a', 'name': 'b'}]}, 'messages.0.name', 'expected null'),
        (
            {'messages': [{'role': 'assistant', 'content': 'a'}]},
            'messages.0.role',
            "expected 'user' for the last message, found 'assistant'",
        ),
        ({'messages': long(200)}, 'messages', 'expected at most 199 tokens'),
        ({'messages': long(230)}, 'messages', 'found 230, 31 too many'),
        ({'stream': True, 'stream_options': 5}, 'stream_options', 'expected an object, found 5'),
        ({'model': 5}, 'model', 'found 5'),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_fields_of_chats(here: Site, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(here, HI | body)
    assert error['param'] == param
    assert message in error['message']
    assert error['message'].startswith(f'{param}: ')
    assert (error['code'] == 'context_length_exceeded') == ('too many' in message or 'at most 199' in message)


@pytest.mark.parametrize(
    ('body', 'param', 'message'),
    [
        ({'prompt': []}, 'prompt', 'found []'),
        ({'prompt': [[]]}, 'prompt.0', 'found []'),
        ({'prompt': ''}, 'prompt', 'at least one token'),
        ({'prompt': {}}, 'prompt', 'found {}'),
        ({'prompt': [1, 'a']}, 'prompt.1', "found 'a'"),
        ({'prompt': ['a', 1]}, 'prompt.1', 'found 1'),
        ({'prompt': [[1], 2]}, 'prompt.1', 'found 2'),
        ({'prompt': [True]}, 'prompt.0', 'found True'),
        ({'prompt': [-1]}, 'prompt.0', 'found -1'),
        ({'prompt': [5, CHAT.size]}, 'prompt', f'expected token ids from 0 to {CHAT.size - 1}, found {CHAT.size}'),
        ({'prompt': [1] * 200}, 'prompt', 'found 200, 1 too many'),
        ({'prompt': [[1], [1] * 201], 'echo': True, 'max_tokens': 0}, 'prompt', 'at most 200 tokens'),
        ({'prompt': ['a'] * 2049}, 'prompt', '2048'),
        ({'max_tokens': 0}, 'max_tokens', 'without echo'),
        ({'logprobs': True}, 'logprobs', 'found True'),
        ({'logprobs': 21}, 'logprobs', 'found 21'),
        ({'best_of': 2}, 'best_of', 'expected n (1)'),
        (
            {'prompt': ['a'] * 151, 'n': 2},
            'n',
            'at most 300 answers to a request, as many as may wait, found 302',
        ),
        ({'suffix': 'b'}, 'suffix', 'expected null or ""'),
        ({'messages': []}, 'messages', 'unknown'),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_fields_of_raw_completions(here: Site, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(here, RAW | body, '/v1/completions')
    assert error['param'] == param
    assert message in error['message']


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\x00\xff\xfe',
        b'{"model": "\xff"}',
        b'{"model": "model", "messages": [',
        b'[]',
        b'5',
        b'null',
        b'{"model": "model", "metadata": {"a": NaN}, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "model", "temperature": Infinity, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "model", "temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "model", "model": "model", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "model", "seed": 1' + b'0' * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "model", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "model", "metadata": ' + b'{"a":' * 5_000,
        b'{"model": "model", "messages": ' + b'[' * 5_000 + b']' * 5_000 + b'}',
    ],
    ids=lambda content: repr(content[:60]),
)
def test_bodies_that_are_no_request(here: Site, content: bytes) -> None:
    assert 'expected' in refused(here, content)['message']


def test_paths_methods_and_models(here: Site) -> None:
    for path, method, status, code in (
        ('/v1/embeddings', 'POST', 404, None),
        ('/', 'GET', 404, None),
        ('/v1/chat/completions', 'GET', 405, None),
        ('/v1/models', 'POST', 405, None),
        ('/v1/models/none', 'GET', 404, 'model_not_found'),
    ):
        found, reply, headers = ask(here, HI, path, method=method)
        assert (found, reply['error']['code']) == (status, code)
        assert headers['Content-Type'] == 'application/json'
        assert (headers['Allow'] is not None) == (status == 405)
    status, reply, _ = ask(here, HI | {'model': 'gpt'})
    assert (status, reply['error']['param'], reply['error']['code']) == (404, 'model', 'model_not_found')
    assert reply['error']['message'] == "model: expected one of model, found 'gpt'"
    assert len(ask(here, HI | {'model': 'x' * 1000})[1]['error']['message']) < 100


def test_types_of_bodies(here: Site) -> None:
    assert ask(here, HI, Content_Type='text/plain')[0] == 415
    assert ask(here, HI, Content_Encoding='gzip')[0] == 415
    assert ask(here, HI, Content_Type='application/json; charset=utf-8')[0] == 200


def test_a_body_over_the_limit_is_refused_unread(here: Site) -> None:
    status, reply, headers = ask(here, HI | {'user': 'x' * 2**16})
    assert (status, headers['Connection']) == (413, 'close')
    assert '65536' in reply['error']['message']


@pytest.mark.parametrize(
    ('cause', 'status', 'kind'),
    [
        ('deadline', 504, 'timeout_error'),
        ('draining', 503, 'server_error'),
        ('constraint', 400, 'invalid_request_error'),
        ('internal', 500, 'server_error'),
    ],
)
@pytest.mark.parametrize('stream', [False, True])
def test_failures_before_an_answer_have_a_status(here: Site, cause: str, status: int, kind: str, stream: bool) -> None:
    body = {'model': 'model', 'prompt': f'{cause} now', 'stream': stream}
    found, reply, headers = ask(here, body, '/v1/completions')
    assert (found, reply['error']['type'], reply['error']['code']) == (status, kind, cause)
    assert (headers['Retry-After'] is not None) == (status == 503)
    assert ask(here, body | {'prompt': f'{cause} later', 'stream': False}, '/v1/completions')[0] == status


def test_a_failure_amid_a_stream_is_its_last_event(here: Site) -> None:
    with openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client:
        stream = client.completions.create(model='model', prompt=['internal later', 'a'], stream=True, max_tokens=9)
        parts = (choice for chunk in stream for choice in chunk.choices)
        assert next(choice.text for choice in parts if choice.index == 0) == 'a'
        with pytest.raises(openai.APIError, match='by the script') as caught:
            collections.deque(parts)
    assert caught.value.body['code'] == 'internal'
    assert ENGINE.running == 0


def test_a_fault_shows_no_code(here: Site, caplog: pytest.LogCaptureFixture) -> None:
    shown = {'message': 'the server had a fault, which is in its log', 'type': 'server_error', 'code': 'internal'}
    body = HI | {'messages': [{'role': 'user', 'content': 'fault'}], 'logprobs': True}
    status, reply, _ = ask(here, body)
    assert (status, reply['error']) == (500, shown | {'param': None})
    with openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client:
        stream = client.chat.completions.create(**body, stream=True)
        next(stream)
        with pytest.raises(openai.APIError) as caught:
            next(stream)
    assert caught.value.body == shown | {'param': None}
    wait_until(lambda: caplog.text.count('AttributeError') == 2)


def test_a_full_queue_frees_what_it_took_and_says_when_to_come_again() -> None:
    engine = ScriptedEngine(lambda _: [5.0, Piece('', (), finish='stop')], room=3)
    with site(engine) as found:
        for body in ({'n': 4}, {'n': 4, 'stream': True}):
            status, reply, headers = ask(found, RAW | body, '/v1/completions')
            assert (status, reply['error']['type'], reply['error']['code']) == (429, 'rate_limit_error', 'queue_full')
            assert headers['Retry-After'] == '3'
            wait_until(lambda: not engine.running)  # the cancelled ones end in threads of their own
        assert sorted(engine.cancelled) == [1, 2, 3, 4, 5, 6]


def test_a_key_is_asked_for_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv('SERVER_KEY', KEY)
    with caplog.at_level(logging.DEBUG), site(ScriptedEngine(), key_variable='SERVER_KEY') as found:
        for sent in ({}, {'Authorization': 'Bearer sk-abd'}, {'Authorization': KEY}, {'Authorization': 'Bearer é'}):
            status, reply, headers = ask(found, b'not read', **sent)
            assert (status, headers['WWW-Authenticate']) == (401, 'Bearer')
            assert KEY not in json.dumps(reply)
        assert ask(found, HI, Authorization=f'Bearer {KEY}')[0] == 200
        assert ask(found, None, '/v1/models', method='GET')[0] == 401
        assert ask(found, None, '/health', method='GET')[1] == {'status': 'ok'}
        with urllib.request.urlopen(found.url.removesuffix('/v1') + '/metrics') as reply:
            assert reply.status == 200
    assert KEY not in caplog.text


@pytest.mark.parametrize('value', ['', 'a b', None])
def test_a_key_that_is_none_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv('SERVER_KEY', raising=False)
    if value is not None:
        monkeypatch.setenv('SERVER_KEY', value)
    with pytest.raises(ValueError, match='SERVER_KEY, printable ASCII'):
        make_app({'model': served(ScriptedEngine())}, HttpSettings(key_variable='SERVER_KEY'))


def test_a_server_without_models_is_an_error() -> None:
    with pytest.raises(ValueError, match='at least one'):
        make_app({}, HttpSettings())


@pytest.mark.parametrize(
    'changes', [{'port': -1}, {'port': 65536}, {'host': ''}, {'connections': 0}, {'body_seconds': 0}]
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(ValueError, match=rf'HttpSettings\.{field}: expected .*, found'):
        HttpSettings(**changes)
