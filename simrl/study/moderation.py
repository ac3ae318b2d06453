"""Moderation of messages by an endpoint with the API of OpenAI's: `POST {url}/moderations`.

It fails closed: where there is no opinion, `ModelError`, and the message reaches no model.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2

from simrl.remote.settings import EndpointError, EndpointSettings, read_key
from simrl.remote.transport import hiding, open_clients
from simrl.study.turns import ModelError, Moderate

PROBE = 'Hello'  # sent once before the study opens
SILENT = 'moderation without an opinion'
SHOWN = 200  # characters of a server's text in an error


@contextlib.asynccontextmanager
async def open_moderation(settings: EndpointSettings) -> AsyncIterator[Moderate]:
    """The function from a message to the reason why it is refused, or None.

    Raises:
        EndpointError: its key is missing, or it has no opinion on a first message.
    """
    key = read_key(settings)
    hide, clients = hiding(key), open_clients(settings, key)
    free: asyncio.LifoQueue[httpx2.AsyncClient] = asyncio.LifoQueue()
    for client in clients:
        free.put_nowait(client)

    async def moderate(message: str) -> str | None:
        body = {'model': settings.model, 'input': message} | settings.extra_fields()
        try:
            async with asyncio.timeout(settings.deadline):
                client = await free.get()
                try:
                    return await _opinion(client, body, settings, hide)
                finally:
                    free.put_nowait(client)
        except TimeoutError:
            raise ModelError(f'moderation: no opinion in {settings.deadline:g} s', SILENT) from None

    try:
        try:
            await moderate(PROBE)
        except ModelError as error:
            raise EndpointError(f'{settings.url}: {error}') from None
        yield moderate
    finally:
        for client in clients:
            await client.aclose()


async def _opinion(
    client: httpx2.AsyncClient, body: dict[str, Any], settings: EndpointSettings, hide: Callable[[str], str]
) -> str | None:
    """The opinion, after as many tries as the endpoint may have."""
    for number in range(settings.tries):
        if number:
            await asyncio.sleep(min(settings.backoff * 2 ** (number - 1), settings.max_backoff))
        try:
            async with asyncio.timeout(settings.try_seconds):
                response = await client.post('moderations', content=json.dumps(body).encode())
        except TimeoutError:
            failure = f'no reply in {settings.try_seconds:g} s'
            continue
        except httpx2.HTTPError as error:
            failure = hide(f'{type(error).__name__} {error}')
            continue
        if response.status_code == 200:
            return _read(response.text, hide)
        failure = f'status {response.status_code}, {_shown(hide(response.text))}'
        if response.status_code != 429 and response.status_code < 500:
            break
    raise ModelError(f'moderation: {failure}', SILENT)


def _read(text: str, hide: Callable[[str], str]) -> str | None:
    try:
        reply = json.loads(text)
    except ValueError:
        reply = None
    match reply:
        case {'results': [{'flagged': False}]}:
            return None
        case {'results': [{'flagged': True, **result}]}:
            match result.get('categories'):
                case dict() as categories:
                    return ', '.join(str(name) for name, found in categories.items() if found is True) or 'flagged'
            return 'flagged'
    raise ModelError(f'moderation: expected one result with flagged, found {_shown(hide(text))}', SILENT)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f'{text[:SHOWN]}...')
