"""The administrators' pages: progress, conversations, exports; nothing of them says which model is preferred.

Results by model are behind a look: an act of its own that is stored before anything is shown. A planned look spends its
alpha; any other one departs from the plan, and needs a reason (`looks`).
"""

import asyncio
import collections
import datetime
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from simrl.study import export
from simrl.study.events import Looked, Opened, Paused, PlanFrozen, Stored
from simrl.study.flags import Flag
from simrl.study.judge_screen import Judging
from simrl.study.looks import (
    Look,
    departures,
    events_of,
    looks_of,
    open_look,
    pairs_in_force,
    plan_in_force,
    results_of,
    screens_in_force,
)
from simrl.study.overview import completed, exchanges, needed, progress, standing
from simrl.study.participant import Participant
from simrl.study.plan import look_bounds
from simrl.study.running import Running
from simrl.study.screens import all_flags, names_of
from simrl.study.settings import StudySettings
from simrl.study.web import Form, PageError, Web, redirect

log = logging.getLogger(__name__)
SIGN_IN = '/admin/sign-in'
MINUTE = 60.0
PAGE_ROWS = 100
REASON_CHARS = 2000
CONFIRMATION = 'show the results'
SHOWN = ('all', 'completed', 'under way', 'left', 'flagged', 'excluded', 'preview')  # kinds of participants
Clock = Callable[[], float]
FORMATS = {'jsonl': 'application/jsonl', 'parquet': 'application/vnd.apache.parquet', 'csv': 'text/csv; charset=utf-8'}


class Attempts:
    """Counts wrong tokens, whoever sent them, so that nobody can try many."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._most, self._clock = most, clock
        self._wrong: collections.deque[float] = collections.deque()

    @property
    def are_too_many(self) -> bool:
        while self._wrong and self._clock() - self._wrong[0] >= MINUTE:
            self._wrong.popleft()
        return len(self._wrong) >= self._most

    def add(self) -> None:
        self._wrong.append(self._clock())


def make_router(running: Running, web: Web, clock: Clock = time.time) -> APIRouter:
    """The routes below /admin; all but the sign-in need a session of an administrator."""

    async def guard(request: Request) -> None:
        if request.url.path != SIGN_IN and web.session(request, 'administrator') is None:
            if request.method == 'GET':
                raise HTTPException(303, headers={'Location': SIGN_IN})
            raise PageError(403, 'Please sign in as an administrator.')

    router = APIRouter(prefix='/admin', dependencies=[Depends(guard)])
    attempts = Attempts(web.settings.admin_tries, clock)
    looking = asyncio.Lock()
    screened, judging = Screened(running), Judging(running)

    def page(request: Request, name: str, status: int = 200, **context: object) -> Response:
        session = web.session(request, 'administrator')
        assert session is not None  # by `guard`
        return web.page(
            name,
            status,
            csrf=web.csrf('administrator', session),
            study=running.settings.name,
            mode=running.settings.mode,
            paused=running.paused,
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
        if attempts.are_too_many:
            refused = sign_in_page(429, 'Too many wrong tokens. Please wait a minute.')
            refused.headers['Retry-After'] = str(int(MINUTE))
            return refused
        if not web.admin_token or not hmac.compare_digest(form.text('token').encode(), web.admin_token.encode()):
            attempts.add()
            log.warning('a wrong token of administrators from %s', request.client.host if request.client else 'nowhere')
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
        plan = plan_in_force(running)
        participants, now = list(running.participants.values()), clock()
        return page(
            request,
            'admin_overview.html',
            progress=progress(participants, running.settings, running.tasks, now),
            needed=needed(participants, running.settings, plan),
            plan=plan,
            settings=running.settings,
            tasks=running.tasks,
            frozen=next((stored for stored in running.history if isinstance(stored.event, PlanFrozen)), None),
            departures=departures(running),
            history=[(stored.at, _said(stored)) for stored in reversed(running.history)],
            is_full=running.is_full,
        )

    @router.post('/pause')
    async def pause(request: Request) -> Response:
        form = await read(request)
        paused = form.choice('paused', ('yes', 'no')) == 'yes'
        if paused != running.paused:  # or another administrator was faster
            await running.pause(paused, _reason(form, least=0))
        return redirect('/admin')

    @router.get('/participants')
    async def participants(request: Request) -> Response:
        """The participants, the latest first."""
        shown, after = request.query_params.get('shown', 'all'), _number(request.query_params.get('after', '0'))
        if shown not in SHOWN:
            raise PageError(404, 'There is no such list of participants.')
        flags, now = await screened.names(), clock()
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
            flags=(await screened.flags()).get(id, ()),
        )

    @router.post('/participants/{id}/exclude')
    async def exclude(request: Request, id: str) -> Response:
        form = await read(request)
        state = _find(running, id)
        excluded = form.choice('excluded', ('yes', 'no')) == 'yes'
        if excluded != state.is_excluded:
            await running.exclude(id, excluded, _reason(form, least=3))
        return redirect(f'/admin/participants/{id}')

    @router.get('/exports')
    async def exports(request: Request) -> Response:
        return page(request, 'admin_exports.html', looks=looks_of(running))

    @router.get('/exports/{name}.{kind}')
    async def exported(request: Request, name: str, kind: str) -> Response:
        """A blind table of the study's mode, or the list of payments."""
        if (name, kind) == ('payments', 'csv'):
            identities = await asyncio.to_thread(running.store.identities)
            table = export.payment_rows(running.participants.values(), identities, running.settings)
            return _download(running, 'payments', kind, export.to_csv(table).encode())
        events = await asyncio.to_thread(running.store.events)
        return await _exported(running, events, await screened.names(), name, kind, blind=True)

    @router.get('/looks')
    async def looks(request: Request) -> Response:
        """The planned looks, and those that were made."""
        return page(request, 'admin_looks.html', **_looks_context(running), error='', given={})

    @router.post('/looks')
    async def look(request: Request) -> Response:
        """Looks at the results: stores that, then leads to them."""
        form = await read(request)
        planned = form.choice('planned', ('yes', 'no')) == 'yes'
        async with looking:  # of two at the same time the second is no planned one any more
            opened = open_look(running)
            error = ''
            if planned and opened is None:
                error = 'No planned look is open any more: another administrator may have made it.'
            elif not planned and len(form.text('reason').strip()) < 3:
                error = 'Please give the reason for a look that is not in the plan.'
            elif form.text('confirmation').strip().lower() != CONFIRMATION:
                error = f'Nothing was shown: please type “{CONFIRMATION}”.'
            if error:
                return page(request, 'admin_looks.html', 422, **_looks_context(running), error=error, given=form.fields)
            done = completed(running.participants.values(), running.settings)
            number_of_votes = sum(len(state.main.judged) for state in done if state.main)
            alpha = opened.alpha if planned and opened else 0.0
            reason = '' if planned else _reason(form, least=3)
            await running.look(Looked(len(done), number_of_votes, planned, alpha, reason))
        return redirect(f'/admin/looks/{len(running.looks)}')

    @router.get('/looks/{number}')
    async def results(request: Request, number: str) -> Response:
        """The results as of a look."""
        made = _look(running, _number(number))
        found = await asyncio.to_thread(results_of, running, made, await screened.names())
        order = {pair: number for number, pair in enumerate(running.settings.compared)}
        pairs = sorted(found.pairs, key=lambda pair: order.get((pair.first, pair.second), len(order)))
        return page(request, 'admin_results.html', look=made, results=found, pairs=pairs)

    @router.get('/looks/{number}/{name}.{kind}')
    async def unblinded(request: Request, number: str, name: str, kind: str) -> Response:
        """A table with the models, as of a look."""
        made = _look(running, _number(number))
        events = await asyncio.to_thread(events_of, running, made)
        return await _exported(running, events, await screened.names(), name, kind, blind=False)

    return router


class Screened:
    """The flags of all participants, computed again once something happened."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._of: tuple[int, ...] = ()
        self._found: dict[str, tuple[Flag, ...]] = {}

    async def flags(self) -> dict[str, tuple[Flag, ...]]:
        """The flags by participant, of those who have some and whose task the study still has."""
        known = {task.id for kind in self._running.tasks.types for task in kind.tasks}
        states = [s for s in self._running.participants.values() if s.prepared is None or s.prepared.task in known]
        of = tuple(state.version for state in states)
        if of != self._of:
            thresholds = screens_in_force(self._running)
            self._found = await asyncio.to_thread(all_flags, states, self._running.tasks, thresholds)
            self._of = of
        return self._found

    async def names(self) -> dict[str, tuple[str, ...]]:
        """Names of flags by participant."""
        return names_of(await self.flags())


def _looks_context(running: Running) -> dict[str, Any]:
    plan, pairs = plan_in_force(running), pairs_in_force(running)
    done = len(completed(running.participants.values(), running.settings))
    return {
        'plan': plan,
        'pairs': pairs,
        'completed': done,
        'schedule': look_bounds((*plan.looks, 1.0), plan, pairs),
        'opened': open_look(running),
        'looks': looks_of(running),
        'confirmation': CONFIRMATION,
    }


async def _exported(
    running: Running,
    events: Sequence[Stored],
    flags: Mapping[str, Sequence[str]],
    name: str,
    kind: str,
    *,
    blind: bool,
) -> Response:
    if name not in ('turns', 'participants', 'preferences') or kind not in ('jsonl', 'parquet'):
        raise PageError(404, 'There is no such table.')

    def make() -> bytes:
        taken = export.snapshot(events, running.settings.mode, flags)
        if name == 'preferences':
            found, _ = export.preferences(taken, running.settings.name, blind=blind)
            table = export.preference_rows(found)
        else:
            table = export.turn_rows(taken, blind=blind) if name == 'turns' else export.participant_rows(taken)
        return b''.join(export.to_jsonl(table.rows)) if kind == 'jsonl' else export.to_parquet(table)

    return _download(running, name if blind else f'{name}-unblinded', kind, await asyncio.to_thread(make))


def _download(running: Running, name: str, kind: str, content: bytes) -> Response:
    study = re.sub(r'[^A-Za-z0-9_.-]+', '-', running.settings.name)
    file = f'{study}-{running.settings.mode}-{name}.{kind}'
    headers = {'Content-Disposition': f'attachment; filename="{file}"'}
    return Response(content, media_type=FORMATS[kind], headers=headers)


def _find(running: Running, id: str) -> Participant:
    if id not in running.participants:
        raise PageError(404, 'There is no such participant.')
    return running.participants[id]


def _number(text: str) -> int:
    """A whole number of an address."""
    if not re.fullmatch(r'[0-9]{1,9}', text):
        raise PageError(404, 'There is no such page.')
    return int(text)


def _look(running: Running, number: int) -> Look:
    looks = looks_of(running)
    if not 1 <= number <= len(looks):
        raise PageError(404, 'There was no such look.')
    return looks[number - 1]


def _reason(form: Form, least: int) -> str:
    reason = form.text('reason').strip()
    if not least <= len(reason) <= REASON_CHARS:
        raise PageError(422, f'Please give a reason of {least} to {REASON_CHARS} characters.')
    return reason


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
        case PlanFrozen(plan_hash=plan_hash):
            return f'The first participant consented; the analysis plan was frozen ({plan_hash[:12]}).'
        case Looked(participants=number, planned=planned, reason=reason):
            kind = 'A planned look' if planned else 'A look that was not planned'
            return f'{kind} at the results, after {number} participants' + (f': {reason}' if reason else '.')
    return type(stored.event).__name__
