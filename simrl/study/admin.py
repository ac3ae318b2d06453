"""The administrators' pages: progress, conversations, exports; nothing of them says which model is preferred.

Results by model are behind looks (`admin_looks`).
"""

import asyncio
import collections
import contextlib
import datetime
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from simrl.run.config import differences
from simrl.study.admin_looks import make_looks_router
from simrl.study.downloads import payments, table_of
from simrl.study.events import Looked, Opened, Paused, PlanFrozen, RecruitmentEnded, Stored
from simrl.study.judge_screen import Judging
from simrl.study.looks import looks_of
from simrl.study.overview import exchanges, needed, progress, standing
from simrl.study.participant import Participant
from simrl.study.running import Running
from simrl.study.screening import Screening, plan_in_force
from simrl.study.settings import StudySettings, plan_of
from simrl.study.steps import OutOfDateError
from simrl.study.texts import number_of
from simrl.study.web import Form, PageError, Web, parse_number, read_reason, redirect

log = logging.getLogger(__name__)
SIGN_IN = '/admin/sign-in'
MINUTE = 60.0
ALL_ADDRESSES = 10  # times as many wrong tokens as of one address delay the answers to all
DELAY_SECONDS = 1.0
DELETION = 'delete the data'  # typed by an administrator
PAGE_ROWS = 100
SHOWN = ('all', 'completed', 'under way', 'left', 'flagged', 'excluded', 'preview')  # kinds of participants
Clock = Callable[[], float]


class Attempts:
    """Wrong tokens of the last minute, by the address that sent them.

    Nobody is kept out by the wrong tokens of others, and the right token is taken from anywhere at any time: behind a
    proxy all have one address. A token of 16 characters or more cannot be guessed at any rate; too many wrong ones
    only delay the answers to all that follow.
    """

    def __init__(self, most: int, clock: Clock) -> None:
        self._most, self._clock = most, clock
        self._wrong: dict[str, collections.deque[float]] = {}

    def add(self, address: str) -> None:
        self._forget()
        self._wrong.setdefault(address, collections.deque(maxlen=ALL_ADDRESSES * self._most)).append(self._clock())

    def are_too_many_of(self, address: str) -> bool:
        self._forget()
        return len(self._wrong.get(address, ())) > self._most

    @property
    def are_too_many(self) -> bool:
        self._forget()
        return sum(map(len, self._wrong.values())) > ALL_ADDRESSES * self._most

    def _forget(self) -> None:
        since = self._clock() - MINUTE
        for times in self._wrong.values():
            while times and times[0] <= since:
                times.popleft()
        self._wrong = {address: times for address, times in self._wrong.items() if times}


def make_router(running: Running, web: Web, clock: Clock = time.time) -> APIRouter:
    """The routes below /admin; all but the sign-in need a session of an administrator."""

    async def guard(request: Request) -> None:
        if request.url.path != SIGN_IN and web.session(request, 'administrator') is None:
            if request.method == 'GET':
                raise HTTPException(303, headers={'Location': SIGN_IN})
            raise PageError(403, 'Please sign in as an administrator.')

    router = APIRouter(prefix='/admin', dependencies=[Depends(guard)])
    attempts = Attempts(web.settings.admin_tries, clock)
    screening, judging = Screening(running), Judging(running)

    def page(request: Request, name: str, status: int = 200, **context: object) -> Response:
        session = web.session(request, 'administrator')
        assert session is not None  # by `guard`
        return web.page(
            name,
            status,
            csrf=web.csrf('administrator', session),
            study=running.settings.name,
            mode=running.settings.mode,
            paused=running.history.paused,
            when=when,
            **context,
        )

    def sign_in_page(status: int = 200, error: str = '') -> HTMLResponse:
        return web.page('admin_sign_in.html', status, error=error, variable=web.settings.admin_variable)

    async def read(request: Request) -> Form:
        _, form = await web.read_form(request, 'administrator')
        return form

    @router.get('/sign-in')
    async def sign_in(request: Request) -> Response:
        return sign_in_page()

    @router.post('/sign-in')
    async def signed_in(request: Request) -> Response:
        """Trades the token for a session."""
        form = await web.read_fields(request)
        address = request.client.host if request.client else 'nowhere'
        if attempts.are_too_many:
            await asyncio.sleep(DELAY_SECONDS)
        # Digests are of one length, so that the time of comparing them tells nothing of the token's.
        given, own = (hashlib.sha256(text.encode()).digest() for text in (form.text('token'), web.admin_token))
        if not hmac.compare_digest(given, own) or not web.admin_token:
            attempts.add(address)
            if attempts.are_too_many_of(address):
                refused = sign_in_page(429, 'Too many wrong tokens. Please wait a minute.')
                refused.headers['Retry-After'] = str(int(MINUTE))
                return refused
            log.warning('a wrong token of administrators from %s', address)
            return sign_in_page(403, 'This is not the token.')
        response = redirect('/admin')
        web.sign_in(response, 'administrator')
        return response

    @router.post('/sign-out')
    async def sign_out(request: Request) -> Response:
        await read(request)
        response = redirect(SIGN_IN)
        web.sign_out(response, 'administrator')
        return response

    @router.get('')
    async def overview(request: Request) -> Response:
        """Progress against the plan."""
        plan, frozen = plan_in_force(running), running.history.plan
        participants, now = list(running.participants.values()), clock()
        return page(
            request,
            'admin_overview.html',
            progress=progress(participants, running.settings, running.tasks, now),
            needed=needed(participants, running.settings.mode, plan),
            plan=plan.settings,
            pairs=plan.pairs,
            exchanges=plan.exchanges,
            settings=running.settings,
            tasks=running.tasks,
            frozen=next((stored for stored in running.history.events if isinstance(stored.event, PlanFrozen)), None),
            departures=differences(frozen.plan, plan_of(running.settings)) if frozen else [],
            history=[(stored.at, _said(stored)) for stored in reversed(running.history.events)],
            is_full=running.is_full,
            is_over=running.history.is_over,
        )

    @router.post('/pause')
    async def pause(request: Request) -> Response:
        form = await read(request)
        paused = form.choice('paused', ('yes', 'no')) == 'yes'
        if paused != running.history.paused:  # or another administrator was faster
            await running.pause(paused, read_reason(form, least=0))
        return redirect('/admin')

    @router.get('/participants')
    async def participants(request: Request) -> Response:
        """The participants, the latest first."""
        shown, after = request.query_params.get('shown', 'all'), parse_number(request.query_params.get('after', '0'))
        if shown not in SHOWN:
            raise PageError(404, 'There is no such list of participants.')
        flags, now = await screening.names(), clock()
        found = [s for s in running.participants.values() if _is_shown(s, shown, running.settings, flags, now)][::-1]
        return page(
            request,
            'admin_participants.html',
            participants=found[after : after + PAGE_ROWS],
            shown=shown,
            kinds=SHOWN,
            flags=flags,
            tasks={task.id: task for kind in running.tasks.types for task in kind.tasks},
            total=len(found),
            after=after,
            rows=PAGE_ROWS,
            gone=lambda state: state.outcome is None and now - state.seen_at > running.settings.gone_seconds,
            judging=judging if running.settings.screen else None,
        )

    @router.post('/judge')
    async def judge(request: Request) -> Response:
        """Begins the judge's screen of those who completed the study."""
        await read(request)
        if running.settings.screen is None:
            raise PageError(404, "There is no judge in the study's settings.")
        judging.begin()
        return redirect('/admin/participants')

    @router.get('/participants/{id}')
    async def participant(request: Request, id: str) -> Response:
        """A participant's conversation: replies as A and B, as they were shown."""
        state = _find(running, id)
        kinds = {kind.id: kind for kind in running.tasks.types}
        kind = kinds.get(state.document_type or '')
        return page(
            request,
            'admin_participant.html',
            participant=state,
            kind=kind,
            task=next((t for t in kind.tasks if state.prepared and t.id == state.prepared.task), None)
            if kind
            else None,
            practice=exchanges(state.training),
            conversation=exchanges(state.main),
            flags=(await screening.flags()).get(id, ()),
            deletion=DELETION,
        )

    @router.post('/participants/{id}/exclude')
    async def exclude(request: Request, id: str) -> Response:
        form = await read(request)
        state = _find(running, id)
        excluded = form.choice('excluded', ('yes', 'no')) == 'yes'
        if excluded != state.is_excluded:
            await running.exclude(id, excluded, read_reason(form, least=3))
        return redirect(f'/admin/participants/{id}')

    @router.post('/participants/{id}/delete')
    async def delete(request: Request, id: str) -> Response:
        """Deletes the data of a participant who asked for it by mail, say."""
        form = await read(request)
        state = _find(running, id)
        if form.text('confirmation').strip().lower() != DELETION:
            raise PageError(422, f'Nothing was deleted: please type “{DELETION}”.')
        if state.outcome != 'deleted':  # or another administrator was faster, or the participant
            with contextlib.suppress(OutOfDateError):
                await running.delete(id, state.version)
        return redirect(f'/admin/participants/{id}')

    @router.get('/exports')
    async def exports(request: Request) -> Response:
        return page(
            request, 'admin_exports.html', looks=looks_of(running.history.events, plan_in_force(running).settings)
        )

    @router.get('/exports/{name}.{kind}')
    async def exported(request: Request, name: str, kind: str) -> Response:
        """A blind table of the study's mode, or the list of payments."""
        if (name, kind) == ('payments', 'csv'):
            return await payments(running)
        events = await asyncio.to_thread(running.store.events)
        return await table_of(running, events, await screening.names(), name, kind, blind=True)

    router.include_router(make_looks_router(running, screening, page, read))
    return router


def _find(running: Running, id: str) -> Participant:
    if id not in running.participants:
        raise PageError(404, 'There is no such participant.')
    return running.participants[id]


def _is_shown(
    state: Participant, shown: str, settings: StudySettings, flags: Mapping[str, Sequence[str]], now: float
) -> bool:
    if state.mode == 'preview' or shown == 'preview':
        return state.mode == shown == 'preview'
    if shown == 'flagged':
        return state.id in flags
    return shown == 'all' or standing(state, now, settings.gone_seconds) == shown.replace('under way', 'live')


def when(at: float) -> str:
    """A time as administrators read it, in UTC."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime('%Y-%m-%d %H:%M')


def _said(stored: Stored) -> str:
    """An event of the study in words."""
    match stored.event:
        case Opened(version, config_hash):
            return f'The server was started (simrl {version}, config {config_hash[:12]}).'
        case Paused(True, reason):
            return 'Paused' + (f': {reason}' if reason else '.')
        case Paused(False, reason):
            return 'Opened again' + (f': {reason}' if reason else '.')
        case RecruitmentEnded(reason):
            return f'Recruitment was ended: {reason}.'
        case PlanFrozen(plan_hash=plan_hash):
            return f'The first participant consented; the analysis plan was frozen ({plan_hash[:12]}).'
        case Looked(participants=number, planned=planned, reason=reason):
            kind = 'A planned look' if planned else 'A look that was not planned'
            after = number_of(number, 'participant')
            return f'{kind} at the results, after {after}' + (f': {reason}' if reason else '.')
    return type(stored.event).__name__
