"""The models of a study: behind endpoints that run already, or served by a child of this program.

1. All sources are served by one child, `simrl.study.model_server`, on this machine alone. One that dies is started
   again at the same port: calls under way are tried again meanwhile. It ends with this program, be that killed.
2. Endpoints are asked for their models, and the moderation for its opinion, before anybody is let in.
3. Each model is sent an ordinary message: one that cannot read it would leave every message of people unanswered.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from absl import logging

import simrl
from simrl.conversations.records import Message
from simrl.remote.answers import Failure
from simrl.remote.client import Endpoint, check
from simrl.remote.requests import ChatRequest
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import to_dict
from simrl.serving.settings import HttpSettings, ServeSettings
from simrl.study.moderation import open_moderation
from simrl.study.probe import PROBE_TOKENS, unread
from simrl.study.settings import StudySettings, TaskSettings
from simrl.study.turns import Answer, Ask, ModelError, Moderate

SERVER = (sys.executable, '-m', 'simrl.study.model_server')
LISTENS = re.compile(r'(http://\S+:(\d+)/v1) serves ')  # of the line that the child prints
RESTART_SECONDS = (1.0, 60.0)  # before the child is started again: the first time, and at most
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL
IN_FLIGHT = 64  # calls of a served model at once; its server queues what its rows cannot take
SMALLEST_PART = 8  # of max_tokens, for a reply to a conversation that nearly fills the model's context


@contextlib.asynccontextmanager
async def open_models(
    settings: StudySettings, say: Callable[[str], None], title: str = ''
) -> AsyncIterator[tuple[Ask, Moderate | None]]:
    """Starts what must be started, and checks what runs; the functions that ask the models, and the moderation.

    Args:
        say: takes warnings; of a rehearsal also those that a live study is refused for.
        title: of a task, in the language of the study.

    Raises:
        EndpointError: an endpoint does not answer, has not the model, or its key is missing; the child ended before it
            listened, whose own error is on stderr; or a model of a live study refuses an ordinary message.
    """
    async with contextlib.AsyncExitStack() as stack:
        remote = {name: model.endpoint for name, model in settings.models.items() if model.endpoint is not None}
        for endpoint in remote.values():
            await asyncio.to_thread(check, endpoint)
        moderate = None
        if settings.moderation is not None:
            moderate = await stack.enter_async_context(open_moderation(settings.moderation))
        sources = [f'{name}={model.source}' for name, model in settings.models.items() if model.source]
        if sources:
            serve = ServeSettings(models=tuple(sources), http=HttpSettings(port=0), engine=settings.engine)
            server = await stack.enter_async_context(running_server(serve))
            remote |= {name: served(server.url, name) for name, model in settings.models.items() if model.source}
        endpoints = {name: stack.enter_context(Endpoint(remote[name])) for name in settings.models}
        briefly = ask_endpoints(endpoints, dataclasses.replace(settings.task, max_tokens=PROBE_TOKENS))
        for fault in filter(None, await asyncio.gather(*(unread(briefly, name, title) for name in endpoints))):
            if fault.is_final and settings.mode == 'live':
                raise EndpointError(fault.problem)
            say(f'warning: {fault.problem}')
        yield ask_endpoints(endpoints, settings.task), moderate


def served(url: str, name: str) -> EndpointSettings:
    """The endpoint of a model that the child serves."""
    seconds = HttpSettings().request_seconds
    return EndpointSettings(url, name, in_flight=IN_FLIGHT, deadline=seconds, try_seconds=seconds)


def ask_endpoints(endpoints: Mapping[str, Endpoint], task: TaskSettings) -> Ask:
    """The function from a model's name and a conversation to its answer: no system prompt, the study's temperature.

    Where the model's context has no room for `max_tokens`, a reply may have half of them, and so on to an eighth.
    """

    async def ask(model: str, conversation: Sequence[Message]) -> Answer:
        start, most = time.monotonic(), task.max_tokens
        while True:
            request = ChatRequest(
                messages=tuple(conversation), max_tokens=most, sampling=Sampling(temperature=task.temperature)
            )
            try:
                [outcome] = await asyncio.wrap_future(endpoints[model].submit([request]).future)
            except EndpointError as error:
                raise ModelError(str(error), 'endpoint unusable') from None
            if not isinstance(outcome, Failure):
                return Answer(outcome.text, time.monotonic() - start, outcome.truncated)
            if not outcome.is_over_context or most // 2 < max(task.max_tokens // SMALLEST_PART, 1):
                raise ModelError(str(outcome), outcome.cause.replace('_', ' '))
            most //= 2

    return ask


@dataclasses.dataclass
class Server:
    """A child that serves models. `url`: of its API, from its first start on the same."""

    settings: ServeSettings
    command: Sequence[str] = SERVER
    url: str = ''
    process: asyncio.subprocess.Process | None = None
    listening: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Starts it and waits until it listens.

        Raises:
            EndpointError: it ended before.
        """
        path = [str(pathlib.Path(simrl.__file__).parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])]
        # A session of its own: Ctrl-C is for this program, which lets replies end first. It reads from a pipe that
        # this process alone can write to, and ends once that is closed.
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {'PYTHONPATH': os.pathsep.join(path)},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it ended: which is said below
            self.process.stdin.write(json.dumps(to_dict(self.settings)).encode() + b'\n')
            await self.process.stdin.drain()
        while line := await self.process.stdout.readline():
            text = line.decode(errors='replace').rstrip()
            if found := LISTENS.match(text):
                self.url = found[1]
                http = dataclasses.replace(self.settings.http, port=int(found[2]))
                self.settings = dataclasses.replace(self.settings, http=http)
                self.listening.set()
                return
            print(text, flush=True)
        code = await self.process.wait()
        names = ', '.join(self.settings.models)
        raise EndpointError(f'the server of {names} ended with exit code {code} before it listened: its error is above')

    async def keep(self) -> None:
        """Starts it again whenever it ends."""
        wait, longest = RESTART_SECONDS
        while True:
            assert self.process is not None
            assert self.process.stdout is not None
            while line := await self.process.stdout.readline():
                print(line.decode(errors='replace').rstrip(), flush=True)
            code = await self.process.wait()
            self.listening.clear()
            logging.error('the server of the models ended with exit code %s; it is started again in %g s', code, wait)
            await asyncio.sleep(wait)
            try:
                await self.start()
            except EndpointError as error:
                logging.error('%s', error)
                wait = min(2 * wait, longest)
            else:
                wait, longest = RESTART_SECONDS

    async def stop(self) -> None:
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@contextlib.asynccontextmanager
async def running_server(settings: ServeSettings, command: Sequence[str] = SERVER) -> AsyncIterator[Server]:
    """A child that listens, and is started again if it ends.

    Raises:
        EndpointError: as of `Server.start`.
    """
    server = Server(settings, command)
    try:
        await server.start()
        keeper = asyncio.create_task(server.keep())
        try:
            yield server
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
    finally:
        await server.stop()
