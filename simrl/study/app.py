"""The study's pages: a participant's requests -> `Running`, and the page of where they are.

`GET /` is the page of a participant's step, whatever they did before; each form leads back to it. A form has the
version of the participant that its page was made from: one of an older page changes nothing.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from simrl.serving import answering
from simrl.serving.errors import ApiError
from simrl.study.events import Conduct
from simrl.study.participant import OutOfPlaceError, Participant
from simrl.study.running import Running
from simrl.study.settings import PanelSettings
from simrl.study.steps import BadInputError, OtherStudyError, OutOfDateError
from simrl.study.store import Identity, StoreError
from simrl.study.texts import Texts
from simrl.study.views import View, view
from simrl.study.web import Form, Headers, PageError, Web, redirect

log = logging.getLogger(__name__)
IDS = ('PROLIFIC_PID', 'STUDY_ID', 'SESSION_ID')
PANEL_ID = re.compile(r'[A-Za-z0-9._-]{1,64}')
NOTICES = ('out_of_date', 'welcome_back')  # that an address may ask for
DAY = 86_400
LATER = '-later'  # behind the id in a cookie that was given for another session of the panel than the first
NO_OPTION = -1  # of a question that was not answered
Change = Callable[[str, int, Form], Awaitable[Participant]]
Answer = Callable[[Request], Awaitable[Response]]


def make_app(running: Running, web: Web, *routers: APIRouter) -> FastAPI:
    """The application.

    Args:
        running: the study, started.
        routers: further pages: the administrators'.
    """
    # A redirect to the address with or without a slash would be made from the request's Host.
    app = FastAPI(title='simrl study', openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.running = requests = answering.Running()  # see `make_server`
    changes = _changes(running)

    @app.get('/')
    async def current(request: Request) -> Response:
        """The page of the participant's step."""
        notice = request.query_params.get('notice', '')
        return _page(
            running, web, request, await _visit(running, web, request), notice=notice if notice in NOTICES else ''
        )

    @app.get('/state')
    async def state(request: Request) -> Response:
        """The version of the participant's page, for a page that waits for another one."""
        return JSONResponse({'version': (await _visit(running, web, request)).page})

    @app.get('/leave')
    async def leave(request: Request) -> Response:
        """The page for leaving the study and for having one's data deleted."""
        participant = _find(running, web, request)
        return (
            redirect('/')
            if participant.outcome == 'deleted'
            else _page(running, web, request, participant, 'leave.html')
        )

    @app.get('/enter')
    async def enter(request: Request) -> Response:
        """Signs in the participant of a panel's link, or of nobody knows whom where the study is open."""
        if running.settings.panel.entry == 'open':
            here = running.participants.get(_id(web.session(request, 'participant')))
            if here is not None and here.mode == running.settings.mode:
                await running.come_back(here.id)
                return redirect('/?notice=welcome_back')
            identity = Identity('', '', '')
        else:
            identity = _identity(request, web, running.settings.panel)
        try:
            participant, is_first = await running.enter(identity, running.settings.mode)
        except OtherStudyError:
            raise PageError(403, web.texts.errors.other_study) from None
        response = redirect('/' if is_first else '/?notice=welcome_back')
        if is_first or web.session(request, 'participant') != participant.id:
            web.sign_in(response, 'participant', participant.id + LATER * (not is_first))
        return response

    @app.get('/preview')
    async def preview(request: Request) -> Response:
        """Signs an administrator in as a participant who counts nowhere."""
        if web.session(request, 'administrator') is None:
            raise PageError(403, web.texts.errors.unknown_participant)
        participant, _ = await running.enter(Identity('', '', ''), 'preview')
        response = redirect('/')
        web.sign_in(response, 'participant', participant.id)
        return response

    def act(change: Change, template: str) -> Answer:
        async def answer(request: Request) -> Response:
            if requests.draining:
                raise PageError(503, web.texts.errors.server)
            session, form = await web.read_form(request, 'participant')
            id = _find(running, web, request).id
            if request.url.path == '/delete' and session != id:
                raise PageError(403, web.texts.errors.no_deletion)
            try:
                participant = await change(id, form.whole('version'), form)
            except (OutOfDateError, OutOfPlaceError):
                return redirect('/?notice=out_of_date')
            except BadInputError as error:
                errors = {error.field: str(error)}
                found = running.participants[id]
                return _page(running, web, request, found, template, status=422, errors=errors, given=form.fields)
            return redirect(_address(participant))

        return answer

    for path, change in changes.items():
        template = 'leave.html' if path in ('/withdraw', '/delete') else 'participant.html'
        app.post(path, name=path[1:])(act(change, template))

    @app.get('/health')
    async def health() -> Response:
        """Status 200 while requests are taken, 503 while the server drains and once its store is lost."""
        status = 'store lost' if running.store.lost else 'draining' if requests.draining else 'ok'
        return JSONResponse({'status': status}, 200 if status == 'ok' else 503)

    @app.get('/static/{name}')
    async def static(name: str) -> Response:
        """A file that pages load."""
        if name not in web.static:
            raise HTTPException(404)
        content, kind = web.static[name]
        return Response(content, media_type=kind, headers={'Cache-Control': f'public, max-age={DAY}'})

    for router in routers:
        app.include_router(router)
    _handle_errors(app, web)
    app.add_middleware(Headers, headers=web.headers)
    return app


def _find(running: Running, web: Web, request: Request) -> Participant:
    """The participant of a request.

    Raises:
        PageError: there is none of its cookie, or no cookie.
    """
    id = _id(web.session(request, 'participant'))
    if id not in running.participants:
        raise PageError(403, web.texts.errors.unknown_participant)
    return running.participants[id]


def _id(session: str | None) -> str:
    """The participant's id in a session."""
    return (session or '').removesuffix(LATER)


async def _visit(running: Running, web: Web, request: Request) -> Participant:
    """The participant of a request for where they are; see `_find`."""
    return await running.visit(_find(running, web, request).id)


def _page(
    running: Running,
    web: Web,
    request: Request,
    participant: Participant,
    template: str = 'participant.html',
    *,
    status: int = 200,
    notice: str = '',
    errors: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> Response:
    """A participant's page.

    Args:
        errors: what is wrong with a form that was sent, by field.
        given: the fields of that form.
    """
    seen = view(participant, running.settings, running.tasks)
    texts, session = web.texts, web.session(request, 'participant') or ''
    if participant.document_type:  # a type that the tasks' file no longer has is known by its id
        texts = texts.of_type(seen.document_type.name if seen.document_type else participant.document_type)
    return web.page(
        template,
        status,
        view=seen,
        texts=texts,
        names=_field_names(texts, seen),
        clean=template == 'participant.html',
        poll_seconds=web.settings.poll_seconds,
        may_delete=session == participant.id,
        csrf=web.csrf('participant', session),
        notice=notice,
        errors=errors or {},
        given=given or {},
    )


def _field_names(texts: Texts, seen: View) -> dict[str, str]:
    """The labels of fields, by their names, for a list of what is wrong with them."""
    labels, questions = texts.labels, seen.document_type.questions if seen.document_type else ()
    names = {'task': labels.your_task, 'message': labels.message, 'choice': labels.choice, 'text': labels.final_text}
    names |= {f'answer_{i}': question.text for i, question in enumerate(texts.check)}
    return names | {f'note_{i}': question for i, question in enumerate(questions)} | {'reason': labels.reason}


def _address(participant: Participant) -> str:
    """The current page; of a conversation the place where something is to be done."""
    return '/#now' if participant.talk and participant.talk.turns else '/'


def _identity(request: Request, web: Web, panel: PanelSettings) -> Identity:
    """The panel's ids in an address.

    Raises:
        PageError: one is missing, twice there, or none (a panel that does not fill them in sends their names), or the
            study is none of the settings'.
    """
    found = {name: request.query_params.getlist(name) for name in IDS}
    if not all(len(values) == 1 and PANEL_ID.fullmatch(values[0]) for values in found.values()):
        raise PageError(400, web.texts.errors.no_identity)
    if panel.study_ids and found['STUDY_ID'][0] not in panel.study_ids:
        raise PageError(403, web.texts.errors.no_identity)
    return Identity(*(values[0] for values in found.values()))


def _changes(running: Running) -> dict[str, Change]:
    """The actions of forms, by the path that they are sent to."""

    async def consent(id: str, version: int, form: Form) -> Participant:
        return await running.consent(id, version, form.choice('agreed', ('yes', 'no')) == 'yes')

    async def instructions(id: str, version: int, _: Form) -> Participant:
        return await running.instruct(id, version)

    async def check(id: str, version: int, form: Form) -> Participant:
        answers = [form.whole(f'answer_{i}', NO_OPTION) for i in range(len(running.texts.check))]
        return await running.check(id, version, answers)

    async def task(id: str, version: int, form: Form) -> Participant:
        count = max(len(kind.questions) for kind in running.tasks.types)
        notes = [form.fields.get(f'note_{i}', '') for i in range(count)]
        return await running.prepare(id, version, form.fields.get('task', ''), notes, _conduct(form))

    async def message(id: str, version: int, form: Form) -> Participant:
        return await running.send(id, version, form.text('message'), _conduct(form))

    async def retry(id: str, version: int, _: Form) -> Participant:
        return await running.retry(id, version)

    async def vote(id: str, version: int, form: Form) -> Participant:
        return await running.vote(id, version, form.fields.get('choice', ''), form.text('reason'), _conduct(form))

    async def conclude(id: str, version: int, _: Form) -> Participant:
        return await running.conclude(id, version)

    async def text(id: str, version: int, form: Form) -> Participant:
        attention = form.whole('attention', NO_OPTION)
        return await running.write(id, version, form.text('text'), attention, _conduct(form))

    async def withdraw(id: str, version: int, form: Form) -> Participant:
        return await running.withdraw(id, version, form.text('reason'))

    async def delete(id: str, version: int, _: Form) -> Participant:
        return await running.delete(id, version)

    made = (consent, instructions, check, task, message, retry, vote, conclude, text, withdraw, delete)
    return {f'/{change.__name__}': change for change in made}


def _conduct(form: Form) -> Conduct:
    """The way in which a form's texts were written, as its page's script saw it."""
    return Conduct(form.whole('pasted', 0), form.whole('typed', 0), form.seconds('seconds'))


def _handle_errors(app: FastAPI, web: Web) -> None:
    """Makes pages of all errors."""
    errors = web.texts.errors

    def back(request: Request) -> str:
        return '/admin' if request.url.path.startswith('/admin') else '/'

    @app.exception_handler(PageError)
    async def refused(request: Request, error: PageError) -> Response:
        return web.error_page(error.status, error.message, back=back(request))

    @app.exception_handler(ApiError)
    async def unread(request: Request, error: ApiError) -> Response:
        message = errors.too_large if error.status == 413 else errors.server
        response = web.error_page(error.status, message, back=back(request))
        response.headers.update(error.headers)
        return response

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405 and request.method == 'GET':  # the address of a form, reloaded
            return redirect('/')
        response = web.error_page(error.status_code, errors.not_found, back=back(request))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(StoreError)
    async def not_stored(request: Request, error: StoreError) -> Response:
        log.error('%s %s: %s', request.method, request.url.path, error)
        return web.error_page(503, errors.server, back=back(request))

    @app.exception_handler(Exception)
    async def fault(request: Request, _: Exception) -> Response:
        response = web.error_page(500, errors.server, back=back(request))
        response.headers.update(web.headers)  # this answer passes no middleware
        return response
