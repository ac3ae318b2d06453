"""Statuses of the panel's export give places back, and are refused in a line where they are none."""

import pathlib

import pytest
from fastapi import FastAPI

from simrl.study.panel import read_statuses
from simrl.study.running import Running
from simrl.study.settings import PlanSettings
from tests.study.pages import ADMIN, Browser, visit

EXPORT = """Submission id,Participant id,Status,Started at
1,here,ACTIVE,x
2,left,RETURNED,"a, b"
3,nobody,AWAITING REVIEW,
"""


def test_an_export_is_read_or_refused_in_a_line() -> None:
    found = {'here': 'ACTIVE', 'left': 'RETURNED', 'nobody': 'AWAITING REVIEW'}
    assert read_statuses(EXPORT) == read_statuses('\ufeff' + EXPORT.replace('\n', '\r\n')) == found
    again = 'Status,Participant id\nRETURNED,a\nactive,a\nTIMED-OUT,a\n'  # one submission was returned, another began
    assert read_statuses(again) == {'a': 'ACTIVE'}
    for text, message in {
        '': 'line 1: expected the columns Participant id and Status, found no Participant id',
        'Participant id,State\na,b': 'line 1: .* found no Status',
        'Participant id,Status\na,ACTIVE\nb\n': "line 3: expected an id and a status, found 'b' and ''",
        'Participant id,Status\n"a,ACTIVE\n': 'line 1: unexpected end of data',
    }.items():
        with pytest.raises(ValueError, match=f'^{message}$'):
            read_statuses(text)


def test_whoever_left_on_the_panel_gives_a_place_back_at_once(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        left, admin = await Browser(app, running).enter('left'), Browser(app, running)
        await left.go_to('training')
        assert (await Browser(app, running).enter('here')).state.outcome == 'closed'  # of one place, taken
        assert 'action="/admin/sign-in"' in (await admin.get('/admin/statuses')).text
        assert (await left.send('/admin/statuses', export=EXPORT)).status_code == 403
        await admin.client.post('/admin/sign-in', data={'token': ADMIN})
        await admin.get('/admin/statuses')
        page = await admin.send('/admin/statuses', export='Name,Status\n')
        assert page.status_code == 422
        assert 'found no Participant id' in page.text
        page = await admin.send('/admin/statuses', export=EXPORT)
        assert (
            'Statuses read: 3. New: 2; of participants who left on the panel: 1. Of nobody who came here: 1.'
            in page.text
        )
        page = await admin.send('/admin/statuses', export=EXPORT)
        assert 'Statuses read: 3. New: 0; ' in page.text
        assert left.state.panel_status == 'RETURNED'
        assert not running.is_full
        here = await Browser(app, running).enter('here')
        assert here.state.step == 'consent'
        await here.go_to('over')
        await left.get('/')
        await left.go_to('over')  # nobody is thrown out
        assert [state.outcome for state in running.participants.values()] == ['completed', 'completed']

    visit(tmp_path, go, plan=PlanSettings(participants=1))
