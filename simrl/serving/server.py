"""The OpenAI-compatible server: models and settings -> an application.

A request passes `_admitted` (key, draining), `read_content` (its body, within limits), `jobs` (its generations), and
`answering`.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import simrl
from simrl.serving.answering import GONE, Running, StreamedResponse, answer_whole
from simrl.serving.api import B, ChatBody, CompletionBody, read_body
from simrl.serving.errors import DRAINING, FAULT, ApiError, ErrorBody, of_failure
from simrl.serving.jobs import Job, Served, chat_job, completion_job, find_served
from simrl.serving.metrics import CONTENT_TYPE, Metrics
from simrl.serving.replies import ChatWriter, CompletionWriter, TokenTexts
from simrl.serving.settings import HttpSettings

DRAINING_SECONDS = 5.0  # after which another server may be there
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {'model': ErrorBody} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}


def make_app(models: Mapping[str, Served], settings: HttpSettings) -> FastAPI:
    """The application; `app.state.running` has the requests that are being answered.

    Args:
        models: by the names that requests have, at least one.
        settings: the limits of requests, and where the key is.

    Raises:
        ValueError: there is no model, or no key where there should be one.
    """
    if not models:
        raise ValueError('models: expected at least one, found none')
    running, key = Running(), settings.read_key()
    metrics = Metrics({name: served.serving for name, served in models.items()})
    texts = {name: TokenTexts(served.chat) for name, served in models.items()}

    async def admitted(request: Request) -> None:
        if key is not None:
            scheme, _, sent = request.headers.get('Authorization', '').partition(' ')
            if scheme.lower() != 'bearer' or not hmac.compare_digest(sent.strip().encode(), key.encode()):
                raise ApiError(401, 'expected this server\'s key as "Authorization: Bearer KEY", found another or none')
        if running.draining and request.method == 'POST':
            raise ApiError(503, DRAINING, code='draining', retry_after=DRAINING_SECONDS)

    app = FastAPI(title='simrl', docs_url=None, redoc_url=None)
    app.state.running = running
    guarded: dict[str, Any] = {'dependencies': [Depends(admitted)], 'responses': ERRORS, 'response_class': JSONResponse}

    async def answer(
        request: Request,
        kind: type[B],
        job_of: Callable[[B, Served, float], Job],
        writer_of: Callable[..., ChatWriter | CompletionWriter],
    ) -> Response:
        deadline = time.monotonic() + settings.request_seconds
        content = await read_content(request, settings)

        def read() -> tuple[B, Job]:
            body = read_body(kind, content)
            return body, job_of(body, find_served(models, body.model), deadline)

        body, job = await asyncio.to_thread(read)  # long texts take long to encode
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        with_ids = bool(body.return_token_ids)
        writer = writer_of(job, texts[job.served.name], with_ids=with_ids, with_usage=with_usage)
        if body.stream:
            return StreamedResponse(request, job, writer, running, with_usage=with_usage)
        return await answer_whole(request, job, writer, running)

    @app.post('/v1/chat/completions', openapi_extra=_takes(ChatBody), **guarded)
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message."""
        return await answer(request, ChatBody, chat_job, ChatWriter)

    @app.post('/v1/completions', openapi_extra=_takes(CompletionBody), **guarded)
    async def completions(request: Request) -> Response:
        """The tokens after a prompt."""
        return await answer(request, CompletionBody, completion_job, CompletionWriter)

    @app.get('/v1/models', **guarded)
    async def list_models() -> Response:
        """The models."""
        return JSONResponse({'object': 'list', 'data': [_model(served) for served in models.values()]})

    @app.get('/v1/models/{name:path}', **guarded)
    async def retrieve_model(name: str) -> Response:
        """A model."""
        return JSONResponse(_model(find_served(models, name)))

    @app.get('/health')
    async def health() -> Response:
        """Status 200 while requests are taken, 503 while the server drains."""
        status = 'draining' if running.draining else 'ok'
        return JSONResponse({'status': status}, 503 if running.draining else 200)

    @app.get('/metrics')
    async def prometheus() -> Response:
        """Metrics of the models, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    _handle_errors(app)
    app.openapi = lambda: _openapi(app, list(models))  # type: ignore[method-assign]
    return app


async def read_content(request: Request, settings: HttpSettings, kind: str = 'application/json') -> bytes:
    """A request's body, within the limits of size and time.

    Raises:
        ApiError: it is not of the media type `kind` by its headers, too large, too late or cut.
    """
    found = request.headers.get('Content-Type', '').partition(';')[0].strip().lower()
    if found != kind:  # of JSON: a form or a script of another site may send other types without asking
        raise ApiError(415, f'expected "Content-Type: {kind}", found {found or "none"!r}')
    if (encoding := request.headers.get('Content-Encoding', 'identity')) != 'identity':
        raise ApiError(415, f'expected a body without Content-Encoding, found {encoding!r}')
    content = bytearray()
    length = request.headers.get('Content-Length', '')
    declared = int(length) if length.isascii() and length.isdecimal() else 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            if declared <= settings.body_bytes:
                async for part in request.stream():
                    content += part
                    if len(content) > settings.body_bytes:
                        break
    except TimeoutError:
        raise ApiError(408, f'expected the whole body within {settings.body_seconds:g} s') from None
    except ClientDisconnect:
        raise of_failure(GONE) from None
    if max(len(content), declared) > settings.body_bytes:
        raise ApiError(413, f'expected a body of at most {settings.body_bytes} bytes, found more')
    return bytes(content)


def _model(served: Served) -> dict[str, Any]:
    return {
        'id': served.name,
        'object': 'model',
        'created': served.created,
        'owned_by': 'simrl',
        'max_model_len': served.serving.context,
    }


def _handle_errors(app: FastAPI) -> None:
    """Gives all errors the API's form."""

    def response_of(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return response_of(error)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        texts = {404: 'there is no such path', 405: f'expected another method than {request.method}'}
        made = ApiError(error.status_code, f'{request.url.path}: {texts.get(error.status_code, error.detail)}')
        made.headers |= error.headers or {}
        return response_of(made)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return response_of(ApiError(500, FAULT, code='internal'))


def _takes(kind: type[B]) -> dict[str, Any]:
    """The part of OpenAPI that says what a route takes: bodies are read by `read_body`, not by FastAPI."""
    schema = {'$ref': f'#/components/schemas/{kind.__name__}'}
    return {'requestBody': {'required': True, 'content': {'application/json': {'schema': schema}}}}


def _openapi(app: FastAPI, models: list[str]) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=simrl.__version__, routes=app.routes)
        _, schemas = models_json_schema(
            [(ChatBody, 'validation'), (CompletionBody, 'validation')], ref_template='#/components/schemas/{model}'
        )
        for kind in (ChatBody, CompletionBody):
            schemas['$defs'][kind.__name__]['properties']['model']['enum'] = models
        made['components']['schemas'] |= schemas['$defs']
        app.openapi_schema = made
    return app.openapi_schema
