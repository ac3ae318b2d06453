"""Parts of all pages: signed cookies, forged requests refused, limits of a body, headers, templates.

Participants and administrators have a cookie each, signed with a secret of the store. A form is taken only with the
token of its own cookie, and from a page of this site. Errors are pages, too.
"""

import dataclasses
import functools
import hashlib
import hmac
import math
import os
import pathlib
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import itsdangerous
import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from simrl.serving.server import read_content
from simrl.serving.settings import HttpSettings
from simrl.study.render import page_html
from simrl.study.settings import WebSettings
from simrl.study.texts import Texts, fill, number_of

PAGES = pathlib.Path(__file__).parent / 'pages'
Kind = Literal['participant', 'administrator']
COOKIES: Mapping[Kind, str] = {'participant': 'study', 'administrator': 'study_admin'}
COOKIE_SECONDS: Mapping[Kind, int] = {'participant': 60 * 86_400, 'administrator': 12 * 3600}
REASON_CHARS = 2000  # of an administrator's reason
MOST_FIELDS = 64  # of a form
CONNECTIONS = 4096  # a browser opens up to six
FORM = 'application/x-www-form-urlencoded'
TYPES = {'.css': 'text/css', '.js': 'text/javascript', '.svg': 'image/svg+xml'}
HEADERS = {
    'Content-Security-Policy': "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    'Cache-Control': 'no-store',
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Permissions-Policy': 'camera=(), geolocation=(), microphone=()',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'X-Robots-Tag': 'noindex',
}


class PageError(Exception):
    """An answer with an error status, as a page.

    Args:
        status: of HTTP.
        message: for the person before the page.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Form:
    """The fields of a form that was sent, each once, with line ends as `\\n`."""

    fields: Mapping[str, str]

    def text(self, name: str) -> str:
        """A field; PageError: there is none."""
        if name not in self.fields:
            raise PageError(400, f'{name}: expected a value, found none')
        return self.fields[name]

    def choice(self, name: str, options: Sequence[str]) -> str:
        """A field that is one of a few; PageError: it is another."""
        value = self.text(name)
        if value not in options:
            raise PageError(400, f'{name}: expected one of {list(options)}, found {value[:20]!r}')
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A field as a whole number from 0; of an empty or missing one `default`, where one is given."""
        value = self.fields.get(name, '')
        if not value and default is not None:
            return default
        if not re.fullmatch(r'[0-9]{1,9}', value):
            raise PageError(400, f'{name}: expected a whole number, found {value[:20]!r}')
        return int(value)

    def seconds(self, name: str) -> float | None:
        """A field as a time from 0; None of an empty or missing one."""
        value = self.fields.get(name, '')
        if not value:
            return None
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not 0 <= found < 1e9:
            raise PageError(400, f'{name}: expected a number of seconds, found {value[:20]!r}')
        return found


def parse_number(text: str) -> int:
    """A whole number of an address; PageError: it is none."""
    if not re.fullmatch(r'[0-9]{1,9}', text):
        raise PageError(404, 'There is no such page.')
    return int(text)


def read_reason(form: Form, least: int) -> str:
    """An administrator's reason; PageError: it is too short or too long."""
    reason = form.text('reason').strip()
    if not least <= len(reason) <= REASON_CHARS:
        raise PageError(422, f'Please give a reason of {least} to {REASON_CHARS} characters.')
    return reason


def http_limits(settings: WebSettings) -> HttpSettings:
    """The address of the pages, and the limits of connections and bodies."""
    return HttpSettings(
        host=settings.host,
        port=settings.port,
        connections=CONNECTIONS,
        body_bytes=settings.body_bytes,
        drain_seconds=settings.drain_seconds,
    )


@dataclasses.dataclass(frozen=True)
class Web:
    """The keys, limits and templates of a study's pages.

    Attributes:
        texts: with the study's numbers and fields in their places.
        secret: of the store; cookies are signed with it.
        admin_token: with the secret it signs cookies of administrators, so that another token ends their sessions.
    """

    settings: WebSettings
    texts: Texts
    secret: bytes
    admin_token: str

    @functools.cached_property
    def http(self) -> HttpSettings:
        return http_limits(self.settings)

    @functools.cached_property
    def headers(self) -> Mapping[str, str]:
        """Headers of every answer."""
        return HEADERS | ({'Strict-Transport-Security': 'max-age=31536000'} if self.settings.https else {})

    @functools.cached_property
    def static(self) -> Mapping[str, tuple[bytes, str]]:
        """Content and media type of the files that pages load, by name."""
        return {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in sorted((PAGES / 'static').iterdir())}

    def asset(self, name: str) -> str:
        """The address of a file that pages load: another one where its content is another."""
        return f'/static/{name}?v={hashlib.sha256(self.static[name][0]).hexdigest()[:12]}'

    def page(self, name: str, status: int = 200, **context: object) -> HTMLResponse:
        """The response with a template's page."""
        context = {'texts': self.texts, 'asset': self.asset, **context}
        return HTMLResponse(_environment().get_template(name).render(context), status)

    def error_page(self, status: int, message: str, *, back: str = '/') -> HTMLResponse:
        """The page of an error; its link leads to `back`."""
        return self.page('error.html', status, message=message, back=back)

    def key(self, kind: Kind) -> bytes:
        own = self.admin_token if kind == 'administrator' else ''
        return hmac.digest(self.secret, f'{kind} {own}'.encode(), 'sha256')

    def cookie_name(self, kind: Kind) -> str:
        return f'__Host-{COOKIES[kind]}' if self.settings.https else COOKIES[kind]

    def sign_in(self, response: Response, kind: Kind, session: str | None = None) -> None:
        """Sets a cookie: of a participant with their id, of an administrator with one at random."""
        session = session or os.urandom(16).hex()
        response.set_cookie(
            self.cookie_name(kind),
            self._signer(kind).sign(session).decode(),
            max_age=COOKIE_SECONDS[kind],
            httponly=True,
            samesite='lax',
            secure=self.settings.https,
        )

    def sign_out(self, response: Response, kind: Kind) -> None:
        response.delete_cookie(self.cookie_name(kind), httponly=True, samesite='lax', secure=self.settings.https)

    def session(self, request: Request, kind: Kind) -> str | None:
        """The value that the cookie was signed with; None without one, and for a forged or old one."""
        cookie = request.cookies.get(self.cookie_name(kind))
        if cookie is None:
            return None
        try:
            return self._signer(kind).unsign(cookie, max_age=COOKIE_SECONDS[kind]).decode()
        except (itsdangerous.BadData, UnicodeError):
            return None

    def _signer(self, kind: Kind) -> itsdangerous.TimestampSigner:
        return itsdangerous.TimestampSigner(self.key(kind), salt='cookie', digest_method=hashlib.sha256)

    def csrf(self, kind: Kind, session: str) -> str:
        """The token that a session's forms send along."""
        return hmac.new(self.key(kind), f'form {session}'.encode(), 'sha256').hexdigest()[:32]

    async def read_form(self, request: Request, kind: Kind) -> tuple[str, Form]:
        """The session and the fields of a form that was sent from one of its own pages.

        Raises:
            PageError: there is no session; the form is of another session or site, or is no form.
            ApiError: the body is too large, too late or of another type.
        """
        # Referrer-Policy empties Origin; this header cannot be set by a page. Old browsers do not send it.
        if request.headers.get('Sec-Fetch-Site', 'same-origin') not in ('same-origin', 'none'):
            raise PageError(403, self.texts.errors.no_token)
        session = self.session(request, kind)
        if session is None:
            raise PageError(403, self.texts.errors.unknown_participant)
        form = await self.read_fields(request)
        if not hmac.compare_digest(form.text('csrf').encode(), self.csrf(kind, session).encode()):
            raise PageError(403, self.texts.errors.no_token)
        return session, form

    async def read_fields(self, request: Request) -> Form:
        """The fields of a form, whoever sent it.

        Raises:
            PageError: it is no form.
            ApiError: the body is too large, too late or of another type.
        """
        content = await read_content(request, self.http, FORM)
        try:
            pairs = urllib.parse.parse_qsl(
                content.decode(), keep_blank_values=True, errors='strict', max_num_fields=MOST_FIELDS
            )
        except ValueError as error:
            raise PageError(400, f'expected a form in UTF-8 of at most {MOST_FIELDS} fields: {error}') from None
        fields = {name: value.replace('\r\n', '\n').replace('\r', '\n') for name, value in pairs}
        if len(fields) < len(pairs):
            raise PageError(400, 'expected each field once')
        return Form(fields)


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters['enumerated'] = lambda values: list(enumerate(values))
    made.globals |= {'markdown': page_html, 'fill': fill, 'number_of': number_of}
    return made


def redirect(address: str) -> Response:
    """Leads a browser to a page by GET."""
    return RedirectResponse(address, 303)


class Headers:
    """The application with a study's headers on every answer that does not say otherwise."""

    def __init__(self, app: Any, headers: Mapping[str, str]) -> None:
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message['type'] == 'http.response.start':
                given = list(message.get('headers', ()))
                names = {name.lower() for name, _ in given}
                message['headers'] = given + [pair for pair in self.headers if pair[0] not in names]
            await send(message)

        await self.app(scope, receive, send_with_headers)
