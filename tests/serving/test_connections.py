"""Connections that hang, break or are too many, clients that leave, a server that stops: none of them holds a row."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from simrl.serving import answering, listener
from simrl.serving.generation import Generation, Piece
from simrl.serving.listener import bind
from simrl.serving.settings import HttpSettings
from tests.remote.server import wait_until
from tests.serving.scripted import CHAT, ScriptedEngine, Site, site

SLOW = {'model': 'model', 'prompt': ['a', 'b'], 'n': 2, 'max_tokens': 100}


def slow(generation: Generation):
    """A token, and another after a minute."""
    if CHAT.decode(generation.prompt) == 'quick':
        return [Piece('q', (1,), cached=0, finish='stop')]
    return [Piece('a', (1,), cached=0), 60.0, Piece('b', (2,), finish='stop')]


@contextlib.contextmanager
def connected(here: Site) -> Iterator[socket.socket]:
    with socket.create_connection(here.address, timeout=10) as found:
        yield found


def post(body: object, **headers: str) -> bytes:
    """A request as it is sent."""
    content = json.dumps(body).encode()
    head = {'Host': 'x', 'Content-Type': 'application/json', 'Content-Length': str(len(content)), **headers}
    lines = ['POST /v1/completions HTTP/1.1', *(f'{name}: {value}' for name, value in head.items()), '', '']
    return '\r\n'.join(lines).encode() + content


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b''
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            found += part
    return found


def check_alive(here: Site) -> None:
    with openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client:
        assert client.completions.create(model='model', prompt='quick').choices[0].text == 'q'


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('how', ['close', 'reset', 'half', 'more', 'much more'])
def test_all_answers_of_a_client_that_leaves_are_cancelled(stream: bool, how: str) -> None:
    engine = ScriptedEngine(slow)
    with site(engine) as here:
        with connected(here) as connection:
            connection.sendall(post({**SLOW, 'stream': stream}))
            if stream:
                assert b'text/event-stream' in connection.recv(2**16)
            wait_until(lambda: engine.running == 4)
            if how == 'half':
                connection.shutdown(socket.SHUT_WR)
                wait_until(lambda: len(engine.cancelled) == 4)
            elif how == 'more':
                connection.sendall(b'\r\n' + post(SLOW))
            elif how == 'much more':
                with contextlib.suppress(ConnectionError):
                    connection.sendall(post(SLOW) * 2000)
                wait_until(lambda: len(engine.cancelled) == 4)
            elif how == 'reset':
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        wait_until(lambda: not engine.running)
        assert sorted(engine.cancelled) == [1, 2, 3, 4]
        assert engine.over == {'cancelled': 4}
        wait_until(lambda: not here.app.state.running.inboxes)
        check_alive(here)


def test_clients_that_close_their_stream_cancel_it() -> None:
    engine = ScriptedEngine(slow)

    async def leave(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key='x', max_retries=0) as client:
            async for _ in await client.completions.create(**SLOW, stream=True):
                break
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**SLOW, timeout=0.1)

    with site(engine) as here:
        asyncio.run(leave(here.url))
        wait_until(lambda: len(engine.cancelled) == 8)
        wait_until(lambda: not engine.running)


def test_an_answer_that_is_late_is_ended() -> None:
    engine = ScriptedEngine(slow)
    with (
        site(engine, request_seconds=0.1) as here,
        openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**SLOW)
        assert (caught.value.status_code, caught.value.code) == (504, 'deadline')
        with pytest.raises(openai.APIError, match='not done in time'):
            list(client.completions.create(**SLOW, stream=True))
    assert 'deadline' in engine.over


def test_an_engine_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, 'GRACE_SECONDS', 0.1)

    class Stuck(ScriptedEngine):
        def submit(self, generation, deliver) -> int:
            self.asked.append(generation)
            return len(self.asked)

        def cancel(self, number: int) -> None:
            self.cancelled.append(number)

    engine = Stuck()
    with (
        site(engine, request_seconds=0.05) as here,
        openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(**SLOW)
    assert caught.value.status_code == 504
    assert engine.cancelled == [1, 2, 3, 4]


def test_heads_and_bodies_that_do_not_come_are_not_waited_for() -> None:
    with site(ScriptedEngine(slow), head_seconds=0.1, body_seconds=0.1, idle_seconds=0.2) as here:
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            silent, head, body, chunked, idle = (stack.enter_context(connected(here)) for _ in range(5))
            head.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\n')
            body.sendall(post(SLOW)[:-5])
            request = post({}, **{'Transfer-Encoding': 'chunked', 'X-Was': 'Content-Length'})
            request = b'\r\n'.join(line for line in request.split(b'\r\n') if not line.startswith(b'Content-Length'))
            chunked.sendall(request.removesuffix(b'{}') + b'5\r\n{"mod\r\n')
            idle.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n')
            assert read_all(silent) == b''
            assert read_all(head) == b''
            for late in (body, chunked):
                reply = read_all(late)
                assert reply.startswith(b'HTTP/1.1 408 ')
                assert b'"message":"expected the whole body within 0.1 s"' in reply
            assert read_all(idle).endswith(b'{"status":"ok"}')
        assert time.monotonic() - start < 5
        check_alive(here)


def test_a_head_that_comes_in_drops_is_not_waited_for_either() -> None:
    with site(ScriptedEngine(slow), head_seconds=0.15) as here, connected(here) as connection:
        connection.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n')
        assert b'200 OK' in connection.recv(2**16)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 2:  # the second request on the connection
                connection.sendall(b'G')
                time.sleep(0.01)
        assert time.monotonic() < start + 1


def test_chunks_over_the_limit_are_not_read() -> None:
    engine = ScriptedEngine(slow)
    with site(engine, body_bytes=1000) as here, connected(here) as connection:
        head = post({}).partition(b'\r\n\r\n')[0]
        lines = [line for line in head.split(b'\r\n') if not line.startswith(b'Content-Length')]
        connection.sendall(b'\r\n'.join([*lines, b'Transfer-Encoding: chunked', b'', b'']))
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b'64\r\n' + b'x' * 100 + b'\r\n')
        assert read_all(connection).startswith(b'HTTP/1.1 413 ')
        assert not engine.asked


def test_what_is_not_http_gets_the_api_s_error() -> None:
    with site(ScriptedEngine(slow)) as here:
        for sent in (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n', b'GET /\r\n\r\n', b'\x00' * 100_000):
            with connected(here) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(sent)
                reply = read_all(connection)
                assert reply.startswith(b'HTTP/1.1 400 ')
                assert b'"type":"invalid_request_error"' in reply
        check_alive(here)


def test_connections_over_the_limit_are_refused() -> None:
    with site(ScriptedEngine(slow), connections=3, head_seconds=5.0) as here:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connected(here)) for _ in range(3)]
            wait_until(lambda: len(here.server.server_state.connections) == 3)
            with connected(here) as more:
                reply = read_all(more)
                assert reply.startswith(b'HTTP/1.1 503 ')
                assert b'Retry-After: 1' in reply
            held[0].sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n')
            assert b'200 OK' in held[0].recv(2**16)
        wait_until(lambda: not here.server.server_state.connections)
        check_alive(here)


def test_a_reader_that_stops_reading_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, 'STALL_SECONDS', 0.1)
    text = 'x' * 2**20

    def script(generation: Generation):
        quick = CHAT.decode(generation.prompt) == 'quick'
        return [Piece('q' if quick else text, (1,), cached=0, finish='stop')]

    with site(ScriptedEngine(script)) as here, connected(here) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post({**SLOW, 'n': 8, 'stream': True}))
        wait_until(lambda: not here.server.server_state.connections)
        check_alive(here)


def test_a_stopping_server_finishes_its_answers_and_takes_no_more() -> None:
    go = threading.Event()

    def script(generation: Generation):
        yield Piece('a', (1,), cached=0)
        go.wait(10)
        yield Piece('b', (2,), finish='stop')

    with site(ScriptedEngine(script), drain_seconds=10) as here:
        with openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client:
            stream = client.completions.create(model='model', prompt='a', stream=True)
            assert next(stream).choices[0].text == 'a'
            here.server.handle_exit(signal.SIGTERM)
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model='model', prompt='a')
            assert (caught.value.status_code, caught.value.response.headers['Retry-After']) == (503, '5')
            with connected(here) as connection:
                connection.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
                assert read_all(connection).startswith(b'HTTP/1.1 503 ')
            go.set()
            assert ''.join(chunk.choices[0].text for chunk in stream) == 'b'
        here.thread.join(5)
        assert not here.thread.is_alive()
        with pytest.raises(ConnectionError):
            socket.create_connection(here.address)


def test_answers_that_do_not_end_while_the_server_stops_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(slow)
    with (
        site(engine, drain_seconds=0.1) as here,
        openai.OpenAI(base_url=here.url, api_key='x', max_retries=0) as client,
    ):
        stream = client.completions.create(**SLOW, stream=True)
        next(stream)
        here.server.handle_exit(signal.SIGTERM)
        with pytest.raises(openai.APIError, match='the server stops'):
            list(stream)
    assert sorted(engine.cancelled) == [1, 2, 3, 4]


def test_an_address_that_is_taken_is_one_line() -> None:
    with bind(HttpSettings(port=0)) as taken:  # by a server that loads its models
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf'^127.0.0.1:{port}: cannot listen there: Address already in use$'):
            bind(HttpSettings(port=port))
    with pytest.raises(OSError, match=r'^no\.such\.host\.invalid:1: cannot listen there: '):
        bind(HttpSettings(host='no.such.host.invalid', port=1))


def test_the_address_of_a_server_that_ended_is_free_at_once() -> None:
    with site(ScriptedEngine()) as here, connected(here) as connection:
        connection.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
        assert read_all(connection)  # the server closes first: its side lingers
    port = here.address[1]
    with bind(HttpSettings(port=port)) as listener:
        assert listener.getsockname()[1] == port


PROGRAM = """
from simrl.serving import start
from simrl.serving.settings import ServeSettings
from tests.serving.scripted import *
from tests.serving.test_start import model

start.find_model = lambda name: model
start.Engine = lambda *_, **options: options['on_program']() or ScriptedEngine()
start.serve(ServeSettings(models=('model=somewhere', 'another'), http=HttpSettings(port=0)))
print('over')
"""


def test_a_signal_ends_the_program_in_order() -> None:
    with subprocess.Popen([sys.executable, '-c', PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ['model: loading\n', 'another: loading\n']
        url, served = process.stdout.readline().split(' ', 1)
        assert served == 'serves model, another\n'
        with openai.OpenAI(base_url=url, api_key='x', max_retries=0) as client:
            assert client.completions.create(model='model', prompt='a', seed=7).choices[0].text == 'sample 0 of 7 at'
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == 'over\n'
    assert process.returncode == 0
