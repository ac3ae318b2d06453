"""The server's socket and connections: limits of their number and time, and an end that lets answers finish."""

import asyncio
import functools
import resource
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from simrl.serving.answering import Running, to_json
from simrl.serving.errors import ApiError
from simrl.serving.settings import HttpSettings

STALL_SECONDS = 30.0  # a client that reads nothing of its answer for this long is gone
MOST_WAITING = 2**16  # bytes after a request that is being answered; a client that sends more is left
OTHER_FILES = 256  # that the process has open beside its connections
CANCEL_SECONDS = 2.0  # that connections have to close once their answers are over


def bind(settings: HttpSettings) -> socket.socket:
    """Takes the server's address; connections are refused until the server runs.

    Raises:
        OSError: it is taken, or is none of this machine's. The error is one line.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            try:
                listener.bind(address)  # to share it would let in another server that starts now
            except OSError:
                _share(listener)
                listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f'{settings.host}:{settings.port}: cannot listen there: {error.strerror or error}') from error
    return listener


def _share(listener: socket.socket) -> None:
    """Lets the address be taken while connections of a server before linger there, which shared it too."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def url_of(listener: socket.socket) -> str:
    """The base of the API at a socket."""
    host, port = listener.getsockname()[:2]
    return f'http://[{host}]:{port}/v1' if ':' in host else f'http://{host}:{port}/v1'


def make_server(app: FastAPI, settings: HttpSettings, *, on_listening: Callable[[], None] = lambda: None) -> 'Server':
    """The server of an application of `make_app`; `run([listener])` listens.

    At SIGTERM or SIGINT it takes no new requests, lets running ones finish, and returns. A second signal ends them.
    """
    config = uvicorn.Config(
        app,
        loop='asyncio',
        http=functools.partial(_Connection, settings=settings),  # type: ignore[arg-type]
        ws='none',
        lifespan='off',
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # seconds of a timer
        timeout_graceful_shutdown=CANCEL_SECONDS,  # type: ignore[arg-type]
        backlog=socket.SOMAXCONN,
    )
    return Server(config, app.state.running, settings.drain_seconds, on_listening)


def raise_file_limit(settings: HttpSettings) -> None:
    """Lets the process have as many open files as it may have connections, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = settings.connections + OTHER_FILES  # a connection is an open file
    if soft != resource.RLIM_INFINITY and soft < files:
        files = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


class Server(uvicorn.Server):
    """A server that still answers, with status 503, while its last answers finish; see `make_server`."""

    def __init__(
        self, config: uvicorn.Config, running: Running, drain_seconds: float, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._running, self._drain_seconds = running, drain_seconds
        self._ends_at = float('inf')

    def handle_exit(self, sig: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Begins to drain; a second call ends what runs."""
        self._ends_at = time.monotonic() + (0.0 if self._running.draining else self._drain_seconds)
        self._running.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            _share(listener)
        await super().startup(sockets)
        self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        if self._running.draining and not self.should_exit:
            late = time.monotonic() >= self._ends_at
            if late:
                self._running.end_all()
            self.should_exit = late or not self.server_state.tasks
        return await super().on_tick(counter)


class _Connection(H11Protocol):
    """A connection that is closed when a request's head is late, or its client reads nothing.

    While a request is answered, reading goes on: the end of a client that sent more is seen, too.
    """

    def __init__(self, *args: Any, settings: HttpSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(0)  # any byte that waits starts the timer of a stall
        if len(self.connections) > self._settings.connections:
            self._refuse(ApiError(503, 'the server has too many connections', retry_after=1.0))
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()
        if self.conn.their_state is h11.DONE:  # what follows waits, but an end that nobody reads is not seen
            waiting, _ = self.conn.trailing_data
            if len(waiting) > MOST_WAITING:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f'expected HTTP/1.1, found something else: {msg}'))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(2**62)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch_reader(self, before: int) -> None:
        """Looks at what waits to be read every `STALL_SECONDS`; if it is no less than before, nobody reads."""
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self.transport.abort()
        else:
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self._watch_reader, waiting)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.head_seconds, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Writes an error and closes the connection, whatever state it is in."""
        content = to_json(error.body)
        head = [f'HTTP/1.1 {error.status} Error', 'Content-Type: application/json', f'Content-Length: {len(content)}']
        head += [f'{name}: {value}' for name, value in error.headers.items()]
        self.transport.write('\r\n'.join([*head, '', '']).encode() + content)
        self.transport.close()
