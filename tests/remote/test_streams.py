"""Streamed chats: the reply of a stream is that of a whole reply, wherever the network cuts it into parts."""

import asyncio
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.records import Message
from simrl.remote.answers import Answer, Failure, Outcome
from simrl.remote.requests import ChatRequest, streamed_body
from simrl.remote.settings import EndpointSettings
from simrl.remote.streams import ServerSentEvents, StreamedReply
from simrl.remote.transport import hiding, open_clients, post_streamed
from tests.remote.server import Body, Events, Reply, ScriptedServer, Status, chat_reply, chat_stream

REQUEST = ChatRequest(messages=(Message('user', 'Hi'),), max_tokens=20)


def read_in(parts: list[bytes]) -> tuple[list[str], Outcome]:
    reply = StreamedReply(REQUEST)
    texts = [text for part in parts for text in reply.read(part)]
    return texts, reply.outcome()


def body_of(stream: Events) -> bytes:
    return b''.join(part for _, part in stream.parts)


@given(
    st.lists(st.text(st.characters(exclude_categories=['Cs']), min_size=1), min_size=1, max_size=4),
    st.lists(st.integers(0, 600), max_size=5),
    st.sampled_from([b'\n', b'\r\n']),
)
def test_parts_of_any_size_have_the_same_texts(texts: list[str], cuts: list[int], line_end: bytes) -> None:
    """Texts with other ends of lines in them stay whole, escaped or not."""
    body = body_of(chat_stream(texts)).replace(b'\n', line_end)
    for text in texts:
        body = body.replace(json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode())
    bounds = sorted({0, len(body), *(cut % len(body) for cut in cuts)})
    parts = [body[start:end] for start, end in itertools.pairwise(bounds)]
    found, outcome = read_in(parts)
    assert found == texts
    assert outcome == Answer(''.join(texts), input_tokens=10, output_tokens=5)


def test_events_have_comments_other_fields_and_several_lines() -> None:
    body = b': ping\n\nevent: x\ndata: a\ndata:b\nid: 3\n\ndata\n\ndata: c\n\ndata: never ended\n'
    assert ServerSentEvents().read(body) == [b'a\nb', b'c']


def event(value: Any) -> bytes:
    return f'data: {json.dumps(value)}\n\n'.encode()


@pytest.mark.parametrize(
    ('body', 'expected'),
    [
        (body_of(chat_stream(['a'], finish='length')), Answer('a', truncated=True, input_tokens=10, output_tokens=5)),
        (body_of(chat_stream(['a'], usage=None)), Answer('a')),
        (body_of(chat_stream(['a'], finish=None)), Failure('cut', 'the stream ended before the answer did')),
        (body_of(chat_stream([])), Failure('empty', 'expected a message, found none', '', 10, 5)),
        (b'data: [DONE]\n\n', Failure('cut', 'the stream ended before the answer did')),
        (chat_reply('whole').content, Failure('protocol', 'expected server-sent events, found a .* without one')),
        (event({'error': {'message': 'no memory'}}), Failure('server', "an error in the stream: .*'no memory'.*")),
        (event([1]), Failure('protocol', r"expected chunks of a chat, found '\[1\]'")),
        (b'data: {]\n\n', Failure('protocol', r"expected events of JSON, found '\{\]' .*")),
        (
            event({'choices': [{'delta': {'reasoning': 'hm', 'content': None}, 'finish_reason': None}]})
            + event({'choices': [{'delta': {'reasoning': '!', 'content': 'so'}, 'finish_reason': 'stop'}]}),
            Answer('so', reasoning='hm!'),
        ),
    ],
)
def test_ends_of_streams(body: bytes, expected: Outcome) -> None:
    _, found = read_in([body])
    if isinstance(expected, Failure):
        assert isinstance(found, Failure)
        assert re.fullmatch(expected.detail, found.detail)
        assert (found.cause, found.output_tokens) == (expected.cause, expected.output_tokens)
    else:
        assert found == expected


def streamed(server: ScriptedServer, seconds: float, key: str) -> tuple[list[str], Outcome]:
    settings = EndpointSettings(server.url, 'model', in_flight=1)
    texts: list[str] = []

    async def ask() -> Outcome:
        (client,) = open_clients(settings, key)
        async with client:
            content = json.dumps(streamed_body(REQUEST, settings)).encode()
            outcome, _ = await post_streamed(client, REQUEST, content, seconds, hiding(key), texts.append)
        return outcome

    return texts, asyncio.run(ask())


@pytest.mark.parametrize(
    ('reply', 'texts', 'expected'),
    [
        (chat_stream(['Hel', 'lo'], first=0.01, gap=0.01), ['Hel', 'lo'], 'Hello'),
        (chat_stream(['Hel'], finish=None), ['Hel'], 'cut'),
        (chat_stream(['', 'Hello'], gap=60.0), [], 'timeout'),
        (Status(429), [], 'rate_limit'),
        (Status(400, b'{"error": "secret-key is wrong"}'), [], 'refused'),
        (Body(b''), [], 'protocol'),
        (chat_stream(['my secret-key']), ['my [key]'], 'my [key]'),
    ],
)
def test_streams_over_http(reply: Reply, texts: list[str], expected: str) -> None:
    with ScriptedServer(lambda *_: reply) as server:
        found, outcome = streamed(server, seconds=0.3 if expected == 'timeout' else 60.0, key='secret-key')
    assert found == texts
    assert (outcome.text if isinstance(outcome, Answer) else outcome.cause) == expected
    if isinstance(outcome, Failure):
        assert 'secret-key' not in outcome.detail
    assert server.requests[0]['stream']
    assert server.requests[0]['stream_options'] == {'include_usage': True}


def test_a_server_without_stream_options() -> None:
    settings = EndpointSettings('http://nowhere', 'model', extra='{"stream_options": null}')
    body = streamed_body(REQUEST, settings)
    assert body['stream']
    assert 'stream_options' not in body
