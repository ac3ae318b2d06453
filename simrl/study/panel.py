"""Statuses of submissions on the panel: whoever returned theirs, or let it time out, gives their place back at once.

The study does not hear of them: an administrator pastes the panel's export (Prolific's form) into a page.
"""

import asyncio
import csv
import io

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from simrl.study.events import PanelStatus
from simrl.study.running import Running
from simrl.study.steps import OutOfDateError
from simrl.study.web import PageError, Web

ID, STATUS = 'Participant id', 'Status'  # columns of the export


def read_statuses(text: str) -> dict[str, str]:
    """The statuses of an export, by the panel's ids, as they are written there, in capitals.

    Of several submissions of one id, one that has not left comes first (`PanelStatus.has_left`).

    Args:
        text: CSV with the columns `Participant id` and `Status`, and any others.

    Raises:
        ValueError: a column is missing, or a line has no id or status.
    """
    rows = csv.DictReader(io.StringIO(text.lstrip('\N{ZERO WIDTH NO-BREAK SPACE} \n'), newline=''), strict=True)
    try:
        if missing := [name for name in (ID, STATUS) if name not in (rows.fieldnames or ())]:
            raise ValueError(f'line 1: expected the columns {ID} and {STATUS}, found no {missing[0]}')
        found: dict[str, str] = {}
        for row in rows:
            id, status = (str(row[name] or '').strip() for name in (ID, STATUS))
            if not id or not status:
                raise ValueError(f'line {rows.line_num}: expected an id and a status, found {id!r} and {status!r}')
            if id not in found or PanelStatus(found[id]).has_left:
                found[id] = status.upper()
    except csv.Error as error:
        raise ValueError(f'line {rows.line_num}: {error}') from None
    return found


async def store_statuses(running: Running, statuses: dict[str, str]) -> str:
    """Stores what is new in statuses by the panel's ids; a sentence that counts them."""
    identities = await asyncio.to_thread(running.store.identities)
    known = {
        identity.panel_id: running.participants[id]
        for id, identity in identities.items()
        if id in running.participants and running.participants[id].mode == running.settings.mode
    }
    new = {known[id].id: status for id, status in statuses.items() if id in known and known[id].panel_status != status}
    stored = await asyncio.gather(
        *[running.note_status(id, status) for id, status in new.items()], return_exceptions=True
    )
    for one in stored:
        if isinstance(one, BaseException) and not isinstance(one, OutOfDateError):  # of one deleted meanwhile
            raise one
    left = sum(PanelStatus(status).has_left for status in new.values())
    return (
        f'Statuses read: {len(statuses)}. New: {len(new)}; of participants who left on the panel: {left}. '
        f'Of nobody who came here: {len(set(statuses) - set(known))}.'
    )


def make_router(running: Running, web: Web) -> APIRouter:
    """The administrators' page for statuses."""
    router = APIRouter(prefix='/admin/statuses')

    def page(session: str, status: int = 200, **context: str) -> Response:
        return web.page(
            'admin_statuses.html',
            status,
            csrf=web.csrf('administrator', session),
            study=running.settings.name,
            mode=running.settings.mode,
            paused=running.history.paused,
            **{'said': '', 'error': '', 'given': '', **context},
        )

    @router.get('')
    async def statuses(request: Request) -> Response:
        session = web.session(request, 'administrator')
        if session is None:
            raise HTTPException(303, headers={'Location': '/admin/sign-in'})
        return page(session)

    @router.post('')
    async def take(request: Request) -> Response:
        """Stores the statuses of an export."""
        if web.session(request, 'administrator') is None:
            raise PageError(403, 'Please sign in as an administrator.')
        session, form = await web.read_form(request, 'administrator')
        given = form.text('export')
        try:
            statuses = read_statuses(given)
        except ValueError as error:
            return page(session, 422, error=str(error), given=given)
        return page(session, said=await store_statuses(running, statuses))

    return router
