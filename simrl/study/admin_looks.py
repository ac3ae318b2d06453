"""The administrators' pages of results by model, each behind a look that is stored before anything is shown (`looks`).

A planned look spends its alpha; any other one departs from the plan, and needs a reason. Whoever ends recruitment makes
the next planned look the last one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from simrl.study import export
from simrl.study.analysis import Analysis, analyse
from simrl.study.downloads import table_of
from simrl.study.looks import Look, counted, looks_of, open_look, recruitment_end, to_event, unplanned_look
from simrl.study.participant import completed
from simrl.study.plan import look_bounds
from simrl.study.running import Running
from simrl.study.screening import Screening, plan_in_force
from simrl.study.web import Form, PageError, parse_number, read_reason, redirect

CONFIRMATION = 'show the results'
END_CONFIRMATION = 'end recruitment'
RESAMPLES = 2000
Page = Callable[..., Response]
ReadForm = Callable[[Request], Awaitable[Form]]


def make_looks_router(running: Running, screening: Screening, page: Page, read: ReadForm) -> APIRouter:
    """The routes of looks.

    Args:
        page: makes a page from a request, a template's name, a status, and the template's context.
        read: reads a form of an administrator's session.
    """
    router = APIRouter()
    looking = asyncio.Lock()

    @router.get('/looks')
    async def looks(request: Request) -> Response:
        """The planned looks, and those that were made."""
        return page(request, 'admin_looks.html', **_context(running), error='', given={})

    @router.post('/looks')
    async def look(request: Request) -> Response:
        """Looks at the results: stores that, then leads to them."""
        form = await read(request)
        planned = form.choice('planned', ('yes', 'no')) == 'yes'
        async with looking:  # of two at the same time the second is no planned one any more
            plan, number = plan_in_force(running), _number_completed(running)
            opened = open_look(running.history.events, plan, number)
            error = ''
            if planned and opened is None:
                error = 'No planned look is open any more: another administrator may have made it.'
            elif not planned and len(form.text('reason').strip()) < 3:
                error = 'Please give the reason for a look that is not in the plan.'
            elif form.text('confirmation').strip().lower() != CONFIRMATION:
                error = f'Nothing was shown: please type “{CONFIRMATION}”.'
            if error:
                return page(request, 'admin_looks.html', 422, **_context(running), error=error, given=form.fields)
            chosen = (
                opened if planned else unplanned_look(running.history.events, plan, number, read_reason(form, least=3))
            )
            assert chosen is not None
            await running.look(to_event(chosen, running.participants.values(), running.settings.mode))
        return redirect(f'/admin/looks/{len(running.history.looks)}')

    @router.post('/recruitment')
    async def end_recruitment(request: Request) -> Response:
        """Ends recruitment for ever."""
        form = await read(request)
        async with looking:
            if running.history.is_over:  # another administrator was faster
                return redirect('/admin/looks')
            error = ''
            if len(form.text('reason').strip()) < 3:
                error = 'Please give the reason why recruitment ends.'
            elif form.text('confirmation').strip().lower() != END_CONFIRMATION:
                error = f'Recruitment goes on: please type “{END_CONFIRMATION}” to end it.'
            if error:
                return page(request, 'admin_looks.html', 422, **_context(running), error=error, given=form.fields)
            await running.end_recruitment(read_reason(form, least=3))
        return redirect('/admin/looks')

    @router.get('/looks/{number}')
    async def results(request: Request, number: str) -> Response:
        """The results as of a look."""
        made = _find(running, number)
        found = await asyncio.to_thread(results_of, running, made, await screening.names(made))
        return page(request, 'admin_results.html', look=made, results=found)

    @router.get('/looks/{number}/{name}.{kind}')
    async def unblinded(request: Request, number: str, name: str, kind: str) -> Response:
        """A table with the models, as of a look."""
        made = _find(running, number)
        events = counted(await asyncio.to_thread(running.store.events), made.until)
        return await table_of(running, events, await screening.names(made), name, kind, blind=False)

    return router


def results_of(running: Running, look: Look, flags: dict[str, tuple[str, ...]]) -> Analysis:
    """The analysis of the events up to a look, at its level. `flags`: names by participant, as of the look."""
    plan = plan_in_force(running)
    taken = export.snapshot(counted(running.store.events(), look.until), running.settings.mode, flags)
    return analyse(
        taken.participants,
        taken.votes,
        plan.settings,
        mode=taken.mode,
        pairs=plan.pairs,
        shares=look.shares,
        resamples=RESAMPLES,
    )


def _number_completed(running: Running) -> int:
    return len(completed(running.participants.values(), running.settings.mode))


def _context(running: Running) -> dict[str, Any]:
    plan, number = plan_in_force(running), _number_completed(running)
    return {
        'plan': plan.settings,
        'pairs': len(plan.pairs),
        'completed': number,
        'schedule': look_bounds((*plan.settings.looks, 1.0), plan.settings, len(plan.pairs)),
        'opened': open_look(running.history.events, plan, number),
        'looks': looks_of(running.history.events, plan.settings),
        'ended': recruitment_end(running.history.events),
        'under_way': sum(
            one.mode == running.settings.mode and one.outcome is None for one in running.participants.values()
        ),
        'confirmation': CONFIRMATION,
        'end_confirmation': END_CONFIRMATION,
    }


def _find(running: Running, number: str) -> Look:
    looks = looks_of(running.history.events, plan_in_force(running).settings)
    if not 1 <= parse_number(number) <= len(looks):
        raise PageError(404, 'There was no such look.')
    return looks[parse_number(number) - 1]
