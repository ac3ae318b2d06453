"""A study's pages with scripted models, visited without sockets: one event loop, one client for each browser."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import queue
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI

from simrl.conversations.records import Message
from simrl.remote.settings import EndpointSettings
from simrl.serving.listener import Server, bind, make_server, url_of
from simrl.serving.settings import HttpSettings
from simrl.study import panel
from simrl.study.admin import make_router
from simrl.study.app import LATER, make_app
from simrl.study.participant import Participant
from simrl.study.running import Running
from simrl.study.settings import PanelSettings, StudyModel, StudySettings, TaskSettings, WebSettings
from simrl.study.store import Store
from simrl.study.text_files import read_tasks, read_texts
from simrl.study.texts import Tasks
from simrl.study.turns import Answer, ModelError
from simrl.study.web import Web

T = TypeVar('T')
HTTP = HttpSettings(port=0)
TASKS = read_tasks()
NAMES = ('zebra-7b', 'okapi-2')
ADMIN = 'administrators-know-this'
ENTER = '/enter?PROLIFIC_PID={}&STUDY_ID=s1&SESSION_ID=v1'
Reply = Callable[[str, Sequence[Message]], str | Exception | Awaitable[str | Exception]]


def settings_of(folder: pathlib.Path, **changes: object) -> StudySettings:
    """A short study of two models."""
    endpoint = StudyModel(endpoint=EndpointSettings(url='http://127.0.0.1:9/v1', model='unused'))
    settings = {
        'models': dict.fromkeys(NAMES, endpoint),
        'store': f'sqlite:///{folder / "study.sqlite"}',
        'task': TaskSettings(exchanges=2, max_exchanges=3, min_words=5),
        'panel': PanelSettings(return_url='https://panel.example/done?cc={code}'),
        'web': WebSettings(poll_seconds=0.1),
    }
    return StudySettings(**{**settings, **changes})  # type: ignore[arg-type]


def echo(model: str, conversation: Sequence[Message]) -> str:
    """A reply that says nothing of its model."""
    return f'I would begin with **{len(conversation)}** short sentences.'


@contextlib.asynccontextmanager
async def study(
    settings: StudySettings, reply: Reply = echo, tasks: Tasks = TASKS, clock: Callable[[], float] = time.time
) -> AsyncIterator[tuple[Running, FastAPI]]:
    """The application of a study whose models answer by a function."""

    async def ask(model: str, conversation: Sequence[Message]) -> Answer:
        given = reply(model, conversation)
        said = await given if isinstance(given, Awaitable) else given
        if isinstance(said, Exception):
            raise ModelError(str(said)) from said
        return Answer(said, 0.0, False)

    texts = read_texts().filled(settings.task)
    with Store(settings.store, settings.mode) as store:
        running = Running(settings, store, tasks, texts, ask, clock=clock)
        await running.start()
        try:
            web = Web(settings.web, texts, store.secret, ADMIN)
            yield running, make_app(running, web, make_router(running, web), panel.make_router(running, web))
        finally:
            await running.stop()


def visit(
    folder: pathlib.Path, what: Callable[[Running, FastAPI], Awaitable[None]], reply: Reply = echo, **changes: object
) -> None:
    """Does something with the pages of a study; the changes are of `settings_of`."""

    async def go() -> None:
        async with study(settings_of(folder, **changes), reply) as (running, app):
            await what(running, app)

    asyncio.run(go())


@dataclasses.dataclass(frozen=True)
class Site:
    """A study's server in a thread."""

    url: str
    app: FastAPI
    running: Running
    loop: asyncio.AbstractEventLoop

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that is done in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextlib.contextmanager
def site(settings: StudySettings, reply: Reply = echo) -> Iterator[Site]:
    """A study with sockets, for browsers."""
    started: queue.SimpleQueue[tuple[FastAPI, Running, asyncio.AbstractEventLoop, Server]] = queue.SimpleQueue()

    async def serve(listener: socket.socket) -> None:
        async with study(settings, reply) as (running, app):
            server = make_server(app, HTTP)
            started.put((app, running, asyncio.get_running_loop(), server))
            await server.serve([listener])

    with bind(HTTP) as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(lambda: asyncio.run(serve(listener)))
        app, running, loop, server = started.get(timeout=30)
        try:
            yield Site(url_of(listener).removesuffix('/v1'), app, running, loop)
        finally:
            loop.call_soon_threadsafe(server.handle_exit)
            serving.result(30)


class Browser:
    """A participant's browser: it keeps cookies, follows redirects, and sends forms as the pages have them."""

    def __init__(self, app: FastAPI, running: Running) -> None:
        self.running = running
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url='http://study.test', follow_redirects=True)
        self.page: httpx2.Response

    async def get(self, address: str) -> httpx2.Response:
        self.page = await self.client.get(address)
        return self.page

    async def enter(self, panel_id: str = 'person1') -> 'Browser':
        await self.get(ENTER.format(panel_id))
        assert self.page.status_code == 200
        return self

    @property
    def hidden(self) -> dict[str, str]:
        """The hidden fields that every form of the page has."""
        return dict(re.findall(r'<input type="hidden" name="(csrf|version)" value="([^"]*)"', self.page.text))

    async def send(self, path: str, **fields: object) -> httpx2.Response:
        """Sends a form of the page; fields may replace hidden ones."""
        sent = {**self.hidden, **{name: str(value) for name, value in fields.items()}}
        self.page = await self.client.post(path, data=sent)
        return self.page

    @property
    def state(self) -> Participant:
        """The only participant whose cookie it may have: found by the page's token."""
        cookie = self.client.cookies.get('study')
        assert cookie is not None
        return self.running.participants[cookie.partition('.')[0].removesuffix(LATER)]

    async def settle(self) -> None:
        """Waits until the replies are there, or the turn is void."""
        while self.state.turn is not None and self.state.turn.status == 'waiting':
            await asyncio.sleep(0.002)
        await self.get('/')

    async def go_to(self, step: str) -> 'Browser':
        """Does what a participant does until a step."""
        texts, tasks = self.running.texts, self.running.tasks
        rights = {f'answer_{i}': question.right for i, question in enumerate(texts.check)}
        for _ in range(40):
            if self.state.step == step:
                return self
            match self.state.step:
                case 'consent':
                    await self.send('/consent', agreed='yes')
                case 'instructions':
                    await self.send('/instructions')
                case 'check':
                    await self.send('/check', **rights)
                case 'task':
                    kind = tasks.type(self.state.document_type or '')
                    notes = {f'note_{i}': 'Some thoughts.' for i in range(len(kind.questions))}
                    await self.send('/task', task=kind.tasks[0].id, **notes)
                case 'training' | 'conversation':
                    talk = self.state.talk
                    if talk is not None and len(talk.judged) >= self.running.settings.task.exchanges:
                        await self.send('/conclude')
                    else:
                        await self.exchange()
                case 'final':
                    text = 'This is my final text. ' * 2
                    await self.send('/text', text=text, attention=texts.attention.right)
            assert self.page.status_code == 200, self.page.text
        raise AssertionError(f'expected to come to {step}, found {self.state.step}: {self.page.text}')

    async def exchange(self, message: str = 'Help me begin.', choice: str = 'a', reason: str = 'It is clear.') -> None:
        await self.send('/message', message=message)
        await self.settle()
        await self.send('/vote', choice=choice, reason=reason)
