"""A job's generations, submitted together: their pieces as they come, and all of them freed however it ends."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from simrl.serving.errors import ApiError, of_failure, of_full_queue
from simrl.serving.generation import Event, Failure, Piece, QueueFullError
from simrl.serving.jobs import Job
from simrl.serving.replies import Answer, Writer

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # after a deadline: the engine's own word comes first, unless it is stuck
GONE = Failure('cancelled', 'the client closed the connection')
Inbox = asyncio.Queue[tuple[int, Event]]  # index of an answer, and what comes of it


@dataclasses.dataclass(eq=False)
class Running:
    """The requests of a server that are being answered, and whether it takes more."""

    draining: bool = False
    inboxes: set[Inbox] = dataclasses.field(default_factory=set)

    def end_all(self) -> None:
        """Ends what is still running; called in the server's event loop."""
        for inbox in self.inboxes:
            inbox.put_nowait((0, Failure('draining')))


async def answer_whole(request: Request, job: Job, writer: Writer, running: Running) -> Response:
    """The response with all answers.

    Raises:
        ApiError: an answer failed, or cannot be had.
    """
    answers = [Answer() for _ in job.generations]
    async with _submitted(request, job, running) as inbox:
        while not all(answer.last for answer in answers):
            for index, event in await _events(inbox):
                answers[index].add(_piece(event))
    return Response(to_json(writer.whole(answers)), media_type='application/json')


class StreamedResponse(Response):
    """The answers as server-sent events. An error before the first of them has a status of its own."""

    def __init__(self, request: Request, job: Job, writer: Writer, running: Running, *, with_usage: bool) -> None:
        super().__init__(media_type='text/event-stream', headers={'Cache-Control': 'no-store'})
        del self.headers['Content-Length']
        self._request, self._job, self._writer, self._running = request, job, writer, running
        self._with_usage, self._started = with_usage, False

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            if not self._started:
                self._started = True
                await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
            await send({'type': 'http.response.body', 'body': data, 'more_body': more})

        try:
            await self._stream(write)
            await write(b'data: [DONE]\n\n', more=False)
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, ApiError):
                log.exception('a fault while an answer was streamed')
                error = of_failure(Failure('internal'))
            await write(_event_of(error.body), more=False)

    async def _stream(self, write: Callable[[bytes], Any]) -> None:
        answers = [Answer() for _ in self._job.generations]
        async with _submitted(self._request, self._job, self._running) as inbox:
            while not all(answer.last for answer in answers):
                chunks = list[bytes]()
                try:
                    for index, event in await _events(inbox):
                        piece, answer = _piece(event), answers[index]
                        answer.add(piece)
                        chunks += map(_event_of, self._writer.chunks(index, answer, piece))
                        answer.begun = True
                finally:
                    if chunks:
                        await write(b''.join(chunks))
        if self._with_usage:
            await write(_event_of(self._writer.usage_chunk(answers)))


def to_json(value: Any) -> bytes:
    """A value as JSON in ASCII: some clients take characters of Unicode for line ends."""
    return json.dumps(value, allow_nan=False, separators=(',', ':')).encode()


def _event_of(value: Any) -> bytes:
    return b'data: ' + to_json(value) + b'\n\n'


def _piece(event: Event) -> Piece:
    if isinstance(event, Failure):
        raise of_failure(event)
    return event


async def _events(inbox: Inbox) -> list[tuple[int, Event]]:
    """The events that have come, at least one: what comes together is written together."""
    events = [await inbox.get()]
    while not inbox.empty():
        events.append(inbox.get_nowait())
    return events


@contextlib.asynccontextmanager
async def _submitted(request: Request, job: Job, running: Running) -> AsyncIterator[Inbox]:
    """Submits a job's generations; what is not over at the end is cancelled.

    The inbox also has failures for an answer that is late, a client that is gone, and a server that stops.

    Raises:
        ApiError: the model cannot answer one of them, or its queue is full.
    """
    loop, serving = asyncio.get_running_loop(), job.served.serving
    inbox, over, numbers = Inbox(), set[int](), dict[int, int]()

    def deliver_to(index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:  # in the engine's thread
            if isinstance(event, Failure) or event.finish is not None:
                over.add(index)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a cancelled answer
                loop.call_soon_threadsafe(inbox.put_nowait, (index, event))

        return deliver

    async def watch() -> None:
        while (await request.receive())['type'] != 'http.disconnect':
            pass
        inbox.put_nowait((0, GONE))

    watching = asyncio.create_task(watch())
    left = job.generations[0].deadline - time.monotonic()
    late = loop.call_later(max(left, 0) + GRACE_SECONDS, inbox.put_nowait, (0, Failure('deadline')))
    running.inboxes.add(inbox)
    try:
        for index, generation in enumerate(job.generations):
            try:
                numbers[index] = serving.submit(generation, deliver_to(index))
            except QueueFullError as error:
                raise of_full_queue(error) from None
            except ValueError as error:
                raise ApiError(400, str(error)) from None
        yield inbox
    finally:
        running.inboxes.discard(inbox)
        late.cancel()
        watching.cancel()
        for index, number in numbers.items():
            if index not in over:
                serving.cancel(number)
