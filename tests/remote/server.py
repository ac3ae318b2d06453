"""A server that answers by a script, and fails by it: what endpoints do on bad days, on loopback."""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Body:
    """A body as it is, with status 200 after some seconds."""

    content: bytes
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Status:
    """A status with a body."""

    code: int
    content: bytes = b'{"error": {"message": "by the script"}}'
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A reply that ends after its first `keep` bytes."""

    content: bytes
    keep: int


@dataclasses.dataclass(frozen=True)
class Hang:
    """No reply while the client waits, at most `seconds`."""

    seconds: float = 5.0


@dataclasses.dataclass(frozen=True)
class Events:
    """A reply that comes in parts, with seconds before each, and is cut off unless it `ends`."""

    parts: Sequence[tuple[float, bytes]]
    ends: bool = True


Reply = Body | Status | Cut | Hang | Events
Script = Callable[[dict[str, Any], int], Reply]  # body, the number of equal bodies before it -> reply


def chat_reply(
    text: str | None,
    *,
    reasoning: str | None = None,
    role: str = 'assistant',
    finish: str = 'stop',
    usage: tuple[int, int] | None = (10, 5),
    seconds: float = 0.0,
) -> Body:
    """A reply of /chat/completions."""
    message = {'role': role, 'content': text} | ({} if reasoning is None else {'reasoning_content': reasoning})
    return _reply({'index': 0, 'message': message, 'finish_reason': finish}, usage, seconds)


def completion_reply(
    text: str,
    *,
    tokens: Sequence[int] | None = None,
    log_probs: Sequence[float] | None = None,
    finish: str = 'stop',
    stop: str | int | None = None,
    usage: tuple[int, int] | None = (10, 5),
) -> Body:
    """A reply of /completions."""
    choice: dict[str, Any] = {'index': 0, 'text': text, 'finish_reason': finish, 'stop_reason': stop}
    choice |= {} if tokens is None else {'token_ids': list(tokens)}
    choice['logprobs'] = None if log_probs is None else {'token_logprobs': list(log_probs)}
    return _reply(choice, usage, 0.0)


def _reply(choice: dict[str, Any], usage: tuple[int, int] | None, seconds: float) -> Body:
    reply: dict[str, Any] = {'id': 'x', 'object': 'reply', 'choices': [choice]}
    if usage is not None:
        reply['usage'] = {'prompt_tokens': usage[0], 'completion_tokens': usage[1], 'total_tokens': sum(usage)}
    return Body(json.dumps(reply).encode(), seconds)


def chat_stream(
    texts: Sequence[str],
    *,
    first: float = 0.0,
    gap: float = 0.0,
    finish: str | None = 'stop',
    usage: tuple[int, int] | None = (10, 5),
) -> Events:
    """A streamed reply of /chat/completions: each text after `gap` seconds, the first after `first`; then its usage.

    Args:
        finish: None cuts it off after the texts.
    """

    def event(choices: list[dict[str, Any]], **fields: Any) -> bytes:
        return (
            b'data: ' + json.dumps({'object': 'chat.completion.chunk', 'choices': choices} | fields).encode() + b'\n\n'
        )

    def chunk(delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
        return [{'index': 0, 'delta': delta, 'finish_reason': finish}]

    parts = [(0.0, event(chunk({'role': 'assistant', 'content': ''})))]
    parts += [(gap if i else first, event(chunk({'content': text}))) for i, text in enumerate(texts)]
    if finish is None:
        return Events(parts, ends=False)
    parts.append((0.0, event(chunk({}, finish))))
    if usage is not None:
        parts.append((0.0, event([], usage={'prompt_tokens': usage[0], 'completion_tokens': usage[1]})))
    return Events([*parts, (0.0, b'data: [DONE]\n\n')])


def failing(share: float, fault: Reply, script: Script, *, tries: int = 1) -> Script:
    """A script whose first `tries` replies to a share of the requests are a fault; which ones their hash decides."""

    def faulty(body: dict[str, Any], attempt: int) -> Reply:
        number = int.from_bytes(hashlib.sha256(_canonical(body)).digest()[:4])
        return fault if attempt < tries and number < share * 2**32 else script(body, attempt)

    return faulty


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


class ScriptedServer:
    """An OpenAI-compatible server on loopback. `stop` closes all connections, `start` serves again on the same port.

    Attributes:
        requests: the bodies of all posts, in the order of their coming.
        keys: their Authorization headers.
        most_in_flight: max posts that were answered at once.
        left: posts whose client went away before the end of the reply.
    """

    def __init__(self, script: Script, *, models: Sequence[str] = ('model',)) -> None:
        self.script, self.models = script, models
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.left = 0
        self.most_in_flight = self._in_flight = 0
        self._attempts: collections.Counter[bytes] = collections.Counter()
        self._lock = threading.Lock()
        self._port = 0
        self._stopping = threading.Event()
        self.start()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self._port}/v1'

    def __enter__(self) -> 'ScriptedServer':
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._stopping.clear()
        self._server = _Server(('127.0.0.1', self._port), _handler(self))
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.close_connections()
            self._thread.join()

    def next_reply(self, path: str, key: str | None, content: bytes) -> Reply:
        """Records a request, and asks the script."""
        body = json.loads(content)
        with self._lock:
            self.requests.append(body)
            self.paths.append(path)
            self.keys.append(key)
            attempt = self._attempts[_canonical(body)]
            self._attempts[_canonical(body)] += 1
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        reply = self.script(body, attempt)
        seconds = getattr(reply, 'seconds', 0.0)
        if seconds:
            self._stopping.wait(seconds)
        return reply

    def over(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def wait(self, seconds: float) -> None:
        """Waits, unless the server stops meanwhile."""
        self._stopping.wait(seconds)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, *args: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""


def _handler(server: ScriptedServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            models = [{'id': name, 'object': 'model'} for name in server.models]
            self._send(200, json.dumps({'object': 'list', 'data': models}).encode(), {})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers['Content-Length']))
            try:
                match server.next_reply(self.path, self.headers['Authorization'], content):
                    case Body(whole):
                        self._send(200, whole, {})
                    case Status(code, whole, headers):
                        self._send(code, whole, headers)
                    case Cut(whole, keep):
                        self._send(200, whole, {}, keep)
                    case Events(parts, ends):
                        self._send_parts(parts, ends)
                    case Hang():
                        self.close_connection = True
            finally:
                server.over()

        def _send_parts(self, parts: Sequence[tuple[float, bytes]], ends: bool) -> None:
            self.send_response(200)
            for name, value in {'Content-Type': 'text/event-stream', 'Transfer-Encoding': 'chunked'}.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = not ends
            try:
                for seconds, part in parts:
                    if seconds:
                        server.wait(seconds)
                    self.wfile.write(b'%x\r\n%s\r\n' % (len(part), part))
                if ends:
                    self.wfile.write(b'0\r\n\r\n')
            except OSError:
                server.left += 1
                self.close_connection = True

        def _send(self, code: int, whole: bytes, headers: Mapping[str, str], keep: int | None = None) -> None:
            self.send_response(code)
            for name, value in {'Content-Type': 'application/json', **headers}.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:keep])
            if keep is not None:
                self.close_connection = True

    return Handler


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for a condition; an AssertionError if it does not come."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'expected the condition to come true'
        time.sleep(0.005)
