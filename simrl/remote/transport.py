"""One request over HTTP: a status, a broken connection or a body becomes an outcome.

Built on httpx2 alone, which huggingface_hub installs. The openai package rests on it too; its own tries would be turned
off (they know no deadline of a call), and its types leave out what servers add: reasoning, token ids.
"""

import asyncio
import dataclasses
import email.utils
import json
import time
from collections.abc import Awaitable, Callable, Mapping

import httpx2

from simrl.remote.answers import Cause, Failure, Outcome, error_message, read_reply, shown
from simrl.remote.requests import ChatRequest, Request
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.remote.streams import StreamedReply

CONNECT_SECONDS = 10.0


def open_clients(settings: EndpointSettings, key: str | None) -> list[httpx2.AsyncClient]:
    """A client of one connection for each call in flight: the work of a pool grows with its connections."""
    verify = httpx2.create_ssl_context() if settings.url.startswith('https:') else False  # no TLS, no certificates
    return [
        httpx2.AsyncClient(
            base_url=settings.url,
            headers=_headers(key),
            verify=verify,
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # `post` has a time limit as a whole
            limits=httpx2.Limits(max_connections=1),
        )
        for _ in range(settings.in_flight)
    ]


async def post(
    client: httpx2.AsyncClient, request: Request, content: bytes, seconds: float, hide: Callable[[str], str]
) -> tuple[Outcome, float | None]:
    """One request to the server; also the seconds after which it asks for the next.

    Args:
        content: the body of the request.
        seconds: max, from the connection to the end of the reply.
        hide: takes secrets out of the reply.
    """

    async def read(response: httpx2.Response) -> Outcome:
        return read_reply(hide(_text(await response.aread())), request)

    return await _exchange(client, request, content, seconds, hide, read)


async def post_streamed(
    client: httpx2.AsyncClient,
    request: ChatRequest,
    content: bytes,
    seconds: float,
    hide: Callable[[str], str],
    on_text: Callable[[str], None],
) -> tuple[Outcome, float | None]:
    """`post` of a request for a stream, see `streamed_body`; gives `on_text` each piece of text as it comes."""

    async def read(response: httpx2.Response) -> Outcome:
        reply = StreamedReply(request)
        async for part in response.aiter_bytes():
            for text in reply.read(part):
                on_text(hide(text))
        match reply.outcome():
            case Failure() as failure:
                return dataclasses.replace(failure, detail=hide(failure.detail))
            case answer:
                return dataclasses.replace(answer, text=hide(answer.text), reasoning=hide(answer.reasoning))

    return await _exchange(client, request, content, seconds, hide, read)


async def _exchange(
    client: httpx2.AsyncClient,
    request: Request,
    content: bytes,
    seconds: float,
    hide: Callable[[str], str],
    read: Callable[[httpx2.Response], Awaitable[Outcome]],
) -> tuple[Outcome, float | None]:
    """`post`, with `read` for the body of a reply with status 200."""
    began = False
    cause: Cause
    try:
        async with asyncio.timeout(seconds):
            async with client.stream('POST', request.path.lstrip('/'), content=content) as response:
                began = True
                if response.status_code == 200:
                    return await read(response), None
                text = hide(_text(await response.aread()))
    except TimeoutError:
        return Failure('timeout', f'no reply in {seconds:.1f} s'), None
    except httpx2.HTTPError as error:  # connections, and what is no HTTP
        cause, what = ('cut', 'the reply ended early') if began else ('connection', 'no reply')
        return Failure(cause, f'{what}: {type(error).__name__} {shown(str(error))}'), None
    cause = _cause(response.status_code)
    return Failure(cause, f'status {response.status_code}, {shown(error_message(text))}'), _retry_after(
        response.headers
    )


def served_models(settings: EndpointSettings, key: str | None) -> list[str]:
    """The names of an endpoint's models.

    Raises:
        EndpointError: no reply, or another one.
    """
    try:
        response = httpx2.get(f'{settings.url.rstrip("/")}/models', headers=_headers(key), timeout=CONNECT_SECONDS)
    except httpx2.HTTPError as error:
        raise EndpointError(f'{settings.url}: expected a reply, found none: {type(error).__name__} {error}') from None
    text = hiding(key)(_text(response.content))
    if response.status_code != 200:
        found = f'status {response.status_code}, {shown(error_message(text))}'
        raise EndpointError(f'{settings.url}: expected its models, found {found}')
    try:
        return [str(model['id']) for model in json.loads(text)['data']]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise EndpointError(f'{settings.url}: expected its models, found {shown(text)}') from None


def hiding(key: str | None) -> Callable[[str], str]:
    """Takes the key out of a text: a server may repeat it, and its replies are stored and shown."""
    return lambda text: text if key is None else text.replace(key, '[key]')


def _headers(key: str | None) -> dict[str, str]:
    return {'Content-Type': 'application/json'} | ({} if key is None else {'Authorization': f'Bearer {key}'})


def _text(content: bytes) -> str:
    """The text of a reply; bytes that are not UTF-8 become surrogates, which no answer may hold."""
    return content.decode(errors='surrogateescape')


def _cause(status: int) -> Cause:
    if status == 429:
        return 'rate_limit'
    if status == 408:
        return 'timeout'
    return 'server' if status >= 500 else 'refused'


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None without one that can be read."""
    value = headers.get('retry-after', '')
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):  # no date, or beyond those of the platform
        return None
