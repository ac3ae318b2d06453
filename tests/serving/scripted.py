"""An engine that answers by a script: pieces and failures from threads, as the server's engines deliver them."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from fastapi import FastAPI

from simrl.conversations.chat import Chat
from simrl.conversations.templates import chat_from_huggingface
from simrl.serving.generation import Cause, Constraint, Event, Failure, Generation, Load, Piece, QueueFullError, Score
from simrl.serving.jobs import Served
from simrl.serving.listener import Server, bind, make_server, url_of
from simrl.serving.server import make_app
from simrl.serving.settings import HttpSettings
from tests.tiny import byte_tokenizer

CHAT = chat_from_huggingface(byte_tokenizer(bos_token='<|endoftext|>', eos_token='<|im_end|>'))
Script = Callable[[Generation], Sequence[Event | float]]  # events, and seconds to wait between them


def words(generation: Generation) -> list[Event | float]:
    """Says in what is asked for: its settings, word by word, within `max_tokens`; then its own end."""
    sampling = generation.sampling
    text = f'sample {generation.sample} of {generation.seed} at {sampling.temperature:g}'
    return pieces(generation, text)


def pieces(generation: Generation, text: str) -> list[Event | float]:
    """A text in pieces of up to three characters, each a token; its end, or its cut at `max_tokens`."""
    found: list[Event | float] = []
    left = generation.max_tokens
    for start in range(0, len(text), 3):
        ids = tuple(CHAT.encode(text[start : start + 3])[:left])
        left -= len(ids)
        found.append(Piece(CHAT.decode(ids), ids, scores_of(ids, generation) if generation.log_probs else ()))
    cut = left == 0
    end = () if cut else (CHAT.end_of_turn['assistant'],)
    scores = scores_of(end, generation) if generation.log_probs else ()
    found.append(Piece('', end, scores, finish='length' if cut else 'stop'))
    first = found[0]
    assert isinstance(first, Piece)
    scored = scores_of(generation.prompt[1:], generation) if generation.score_prompt else ()
    found[0] = dataclasses.replace(first, cached=len(generation.prompt) // 2, prompt_scores=scored)
    return found


def scores_of(ids: Sequence[int], generation: Generation) -> tuple[Score, ...]:
    """The log-probability of id i is -i / 100; the most probable ids of any place are 0, 1 and so on."""
    top = tuple((i, -i / 100) for i in range(generation.top))
    return tuple(Score(i, -i / 100, top) for i in ids)


class ScriptedEngine:
    """An engine with a row for each request, and room for `room` requests.

    Attributes:
        asked: all generations, in order.
        cancelled: numbers of requests that were cancelled before their end.
    """

    context = 200
    queue = 300
    busy = False  # what there is to do is done by threads

    def __init__(self, script: Script = words, *, room: int = 10_000) -> None:
        self.script, self.room = script, room
        self.asked: list[Generation] = []
        self.cancelled: list[int] = []
        self.over: dict[str, int] = {}
        self._running: dict[int, threading.Event] = {}
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, generation: Generation, deliver: Callable[[Event], None]) -> int:
        with self._lock:
            if len(self._running) >= self.room:
                raise QueueFullError(2.5)
            self.asked.append(generation)
            number = len(self.asked)
            self._running[number] = threading.Event()
        threading.Thread(target=self._answer, args=(number, generation, deliver), daemon=True).start()
        return number

    def _answer(self, number: int, generation: Generation, deliver: Callable[[Event], None]) -> None:
        stopped = self._running[number]
        for event in self.script(generation):
            seconds = event if isinstance(event, float) else 0.0
            late = time.monotonic() + seconds >= generation.deadline
            if stopped.wait(min(seconds, max(generation.deadline - time.monotonic(), 0))) or late:
                event = Failure('deadline', 'not done in time') if late else Failure('cancelled')
            if not isinstance(event, float):
                last = isinstance(event, Failure) or event.finish is not None
                if last:
                    with self._lock:
                        del self._running[number]
                        how = event.cause if isinstance(event, Failure) else str(event.finish)
                        self.over[how] = self.over.get(how, 0) + 1
                deliver(event)
                if last:
                    return
        raise AssertionError('expected a script with an end')

    def cancel(self, number: int) -> None:
        with self._lock:
            if number in self._running:
                self.cancelled.append(number)
                self._running[number].set()

    def fail_all(self, cause: Cause, detail: str) -> None:
        assert not self._running, f'{cause}: nothing is left once the server has stopped'

    def load(self) -> Load:
        return Load(3, self.running, 8, 100, 50, 70, dict(self.over), 1, 12.5, (0.03, 0.7), 0)


def no_schema(_: object) -> Constraint:
    raise ValueError('no schema is followed here')


def served(engine: ScriptedEngine, name: str = 'model', chat: Chat = CHAT, **fields) -> Served:
    return Served(name=name, chat=chat, serving=engine, created=1_700_000_000, **{'constrain': no_schema, **fields})


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A server in a thread."""

    url: str
    app: FastAPI
    server: Server
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix('http://').removesuffix('/v1').split(':')
        return host, int(port)


@contextlib.contextmanager
def site(models: Mapping[str, Served] | ScriptedEngine, **settings) -> Iterator[Site]:
    """Serves on a free port of loopback."""
    models = {'model': served(models)} if isinstance(models, ScriptedEngine) else models
    http = HttpSettings(port=0, **{'drain_seconds': 0.0, **settings})
    app, listener = make_app(models, http), bind(http)
    url, server = url_of(listener), make_server(app, http)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.002)
    try:
        yield Site(url, app, server, thread)
    finally:
        server.handle_exit()
        thread.join(10)
        assert not thread.is_alive()
