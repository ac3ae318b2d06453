"""The administrators' pages: for those with the token alone; progress and conversations without who is preferred."""

import asyncio
import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import re
import time
from collections.abc import AsyncIterator

import httpx2
from fastapi import FastAPI

from simrl.study import admin, screening
from simrl.study.admin_looks import CONFIRMATION
from simrl.study.events import Arrived, Event, Mode, Replied, Stored
from simrl.study.participant import fold_all
from simrl.study.running import Running
from simrl.study.screens import all_flags
from simrl.study.settings import PlanSettings, StudySettings, WebSettings
from simrl.study.store import Entry, Store
from simrl.study.text_files import read_tasks
from tests.study.pages import ADMIN, NAMES, Browser, settings_of, study
from tests.study.planted import Planted, planted_study

TASKS = {kind.id: {task.id: task.title for task in kind.tasks} for kind in read_tasks().types}
# Names that no reply has by chance; those of the settings, in their order.
PLANTED = Planted(people=30, win_rates={NAMES: 0.85}, leaves=0.05, fails=0.05, voids=0.1, named=0.1, tasks=TASKS)
PLAN = PlanSettings(participants=20, looks=(0.5,))


def fill(settings: StudySettings, *studies: list[Stored]) -> None:
    """Stores events as they are."""
    events = [stored for one in studies for stored in one]
    with Store(settings.store, settings.mode) as store:
        store.append([Entry(stored.participant, stored.version, stored.at, (stored.event,)) for stored in events])


def token(page: str) -> str:
    """The token of a page's forms."""
    found = re.search(r'name="csrf" value="([^"]*)"', page)
    assert found, page
    return found[1]


class Administrator:
    """A browser that is signed in."""

    def __init__(self, app: FastAPI) -> None:
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False),
            base_url='http://study.test',
            follow_redirects=True,
        )
        self.page: httpx2.Response

    async def sign_in(self, token: str = ADMIN) -> 'Administrator':
        self.page = await self.client.post('/admin/sign-in', data={'token': token})
        return self

    async def get(self, address: str) -> httpx2.Response:
        self.page = await self.client.get(address)
        return self.page

    async def send(self, path: str, **fields: str) -> httpx2.Response:
        """Sends a form with the token of the page."""
        self.page = await self.client.post(path, data={'csrf': token(self.page.text), **fields})
        return self.page


@contextlib.asynccontextmanager
async def administered(settings: StudySettings) -> AsyncIterator[tuple[Running, Administrator, FastAPI]]:
    async with study(settings) as (running, app):
        yield running, await Administrator(app).sign_in(), app


def planted_settings(folder: pathlib.Path, **changes: object) -> StudySettings:
    return settings_of(folder, **{'plan': PLAN, **changes})


ADDRESSES = ('', '/participants', '/exports', '/looks', '/exports/turns.jsonl', '/exports/payments.csv', '/looks/1')


def test_without_a_session_nothing_is_shown(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, _, app):
            nobody, forged = Administrator(app), Administrator(app)
            forged.client.cookies.set('study_admin', 'administrator.x.y')
            participant = await Browser(app, running).enter()
            participant.client.cookies.set('study_admin', participant.client.cookies['study'])
            [id] = running.participants
            for client in (nobody.client, forged.client, participant.client):
                for path in (*ADDRESSES, '/participants/x', f'/participants/{id}'):
                    answer = await client.get(f'/admin{path}')
                    assert 'name="token"' in answer.text, path
                    assert id not in answer.text
                answer = await client.post(
                    f'/admin/participants/{id}/exclude', data={'excluded': 'yes', 'reason': 'abc'}
                )
                assert answer.status_code == 403
            assert not running.participants[id].is_excluded

    asyncio.run(go())


def test_forms_need_the_token_of_their_own_session(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, admin, app):
            other = await Administrator(app).sign_in()
            theirs = token(other.page.text)
            for path, fields in {
                'pause': {'paused': 'yes', 'reason': ''},
                'looks': {'planned': 'no', 'reason': 'curious', 'confirmation': CONFIRMATION},
                'sign-out': {},
            }.items():
                for csrf in ({}, {'csrf': ''}, {'csrf': 'x' * 32}, {'csrf': theirs}):
                    answer = await admin.client.post(f'/admin/{path}', data={**fields, **csrf})
                    assert answer.status_code in (400, 403, 415), path
                answer = await admin.client.post(
                    f'/admin/{path}', data=fields, headers={'Sec-Fetch-Site': 'cross-site'}
                )
                assert answer.status_code == 403
            assert not running.history.paused
            assert not running.history.looks
            assert (await admin.get('/admin')).status_code == 200
            await admin.send('/admin/sign-out')
            assert 'name="token"' in (await admin.get('/admin/participants')).text

    asyncio.run(go())


def test_wrong_tokens_are_refused_and_keep_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(admin, 'DELAY_SECONDS', 0.001)

    async def go() -> None:
        settings = planted_settings(tmp_path, web=WebSettings(admin_tries=3))
        async with study(settings) as (_, app):
            for wrong in ('', 'x', ADMIN[:-1]):
                assert (await Administrator(app).sign_in(wrong)).page.status_code == 403
            for _ in range(40):  # so many that all are delayed
                late = await Administrator(app).sign_in(ADMIN + 'x')
                assert late.page.status_code == 429
                assert late.page.headers['Retry-After'] == '60'
            right = await Administrator(app).sign_in()
            assert 'planned participants completed' in right.page.text

    asyncio.run(go())


def test_wrong_tokens_are_counted_for_a_minute():
    now = [0.0]
    attempts = admin.Attempts(2, lambda: now[0])
    for _ in range(3):
        attempts.add('one')
    attempts.add('two')
    assert attempts.are_too_many_of('one')
    assert not attempts.are_too_many_of('two')
    assert not attempts.are_too_many
    now[0] = 30.0
    for number in range(20):
        attempts.add(f'{number}')
    assert attempts.are_too_many, 'many addresses, each within its limit'
    now[0] = 60.0
    assert not attempts.are_too_many_of('one')
    assert not attempts.are_too_many


def exchanged(stored: Stored) -> Stored:
    """The event with the models of the two sides exchanged: all votes are for the other one."""
    event: Event = stored.event
    if isinstance(event, Replied):
        event = dataclasses.replace(event, left=event.right, right=event.left)
    return dataclasses.replace(stored, event=event)


def test_no_page_depends_on_which_model_is_preferred(tmp_path):
    """Every page and blind export, byte for byte, of a study and of that with the opposite result."""

    def shown(folder: pathlib.Path, change) -> dict[str, str]:
        folder.mkdir()
        settings = planted_settings(folder)
        events, _ = planted_study(PLANTED, 1)
        fill(settings, [change(stored) for stored in events])
        found = {}

        async def go() -> None:
            async with administered(settings) as (running, admin, _):
                ids = [f'/participants/{id}' for id in running.participants]
                lists = [f'/participants?shown={kind}' for kind in ('completed', 'left', 'flagged')]
                files = [f'/exports/{name}.jsonl' for name in ('turns', 'participants', 'preferences')]
                for path in ('', '/exports', '/looks', '/exports/payments.csv', *files, *lists, *ids):
                    answer = await admin.get(f'/admin{path}')
                    assert answer.status_code == 200, path
                    found[path] = re.sub(r'value="[0-9a-f]{32}"|\d{4}-\d\d-\d\d \d\d:\d\d', '', answer.text)

        asyncio.run(go())
        return found

    own, other = shown(tmp_path / 'own', lambda stored: stored), shown(tmp_path / 'other', exchanged)
    assert own == other
    conversations = {path: text for path, text in own.items() if path.startswith('/participants')}
    assert len(conversations) > 30
    assert not any(name in text for text in conversations.values() for name in NAMES)
    assert sum(text.count('may name its model') for text in conversations.values()) > 5


def test_progress_is_that_of_the_participants(tmp_path):
    settings = planted_settings(tmp_path)
    live, _ = planted_study(PLANTED, 1)
    previews, _ = planted_study(dataclasses.replace(PLANTED, mode='preview', people=3), 2)
    fill(settings, live, previews)

    async def go() -> None:
        async with administered(settings) as (running, admin, _):
            states = [state for state in running.participants.values() if state.mode == 'live']
            done = sum(state.outcome == 'completed' for state in states)
            assert 15 < done < 30
            text = ' '.join(re.sub(r'<[^>]*>', ' ', admin.page.text).split())
            assert f'{done} of 20 planned participants completed' in text
            assert '(3 so far)' in text  # previews
            assert 'all its participants' in text
            assert 'By the votes so far' in text
            await admin.get('/admin/participants?shown=completed')
            assert f'{done} participants' in admin.page.text
            await admin.get('/admin/participants?shown=preview')
            assert '3 participants' in admin.page.text
            assert (await admin.get('/admin/participants?shown=zzz')).status_code == 404
            for number in ('-1', 'x', '9' * 5000):
                assert (await admin.get(f'/admin/participants?after={number}')).status_code in (404, 414)
                assert (await admin.get(f'/admin/looks/{number}')).status_code in (404, 414)
            assert (await admin.get('/admin/participants/..%2f..%2fetc')).status_code == 404

    asyncio.run(go())


def test_pausing_closes_the_door_and_opens_it_again(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, admin, app):
            await admin.send('/admin/pause', paused='yes', reason='a model <b>fails</b>')
            assert running.history.paused
            assert 'paused' in admin.page.text
            assert 'a model &lt;b&gt;fails&lt;/b&gt;' in admin.page.text
            late = await Browser(app, running).enter()
            assert late.state.outcome == 'closed'
            await admin.send('/admin/pause', paused='no', reason='')
            assert not running.history.paused
            assert (await Browser(app, running).enter('person2')).state.step == 'consent'

    asyncio.run(go())


def test_an_exclusion_needs_a_reason_and_can_be_taken_back(tmp_path):
    settings = planted_settings(tmp_path)
    fill(settings, planted_study(PLANTED, 1)[0])

    async def go() -> None:
        async with administered(settings) as (running, admin, _):
            id = next(state.id for state in running.participants.values() if state.outcome == 'completed')
            await admin.get(f'/admin/participants/{id}')
            page = f'/admin/participants/{id}/exclude'
            assert (await admin.send(page, excluded='yes', reason='  ')).status_code == 422
            assert not running.participants[id].is_excluded
            await admin.get(f'/admin/participants/{id}')
            await admin.send(page, excluded='yes', reason='<script>x</script>')
            assert running.participants[id].is_excluded
            assert '&lt;script&gt;x' in admin.page.text
            assert '<script>x' not in admin.page.text
            version = running.participants[id].version
            await admin.send(page, excluded='yes', reason='a double click')
            assert running.participants[id].version == version
            await admin.send(page, excluded='no', reason='it was a mistake')
            assert not running.participants[id].is_excluded
            assert (await admin.send('/admin/participants/x/exclude', excluded='yes', reason='abc')).status_code == 404

    asyncio.run(go())


def test_a_preview_is_no_part_of_the_study(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, admin, app):
            browser = Browser(app, running)
            assert (await browser.get('/preview')).status_code == 403
            browser.client.cookies = admin.client.cookies
            await browser.get('/preview')
            await browser.go_to('over')
            assert browser.state.outcome == 'completed'
            assert (await admin.get('/admin/exports/turns.jsonl')).text == ''
            assert len((await admin.get('/admin/exports/payments.csv')).text.splitlines()) == 1
            assert running.history.plan is None

    asyncio.run(go())


def test_payments_are_for_the_panel(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, admin, app):
            browser = await Browser(app, running).enter('p1')
            await browser.go_to('over')
            answer = await admin.get('/admin/exports/payments.csv')
            [row] = csv.DictReader(io.StringIO(answer.text))
            assert (row['panel_id'], row['outcome'], row['code']) == ('p1', 'completed', 'COMPLETED')
            assert browser.state.id not in answer.text
            assert answer.headers['content-disposition'] == 'attachment; filename="study-live-payments.csv"'
            for path in ('payments.jsonl', 'turns.csv', 'events.jsonl', 'turns.', '..%2fturns.jsonl'):
                assert (await admin.get(f'/admin/exports/{path}')).status_code == 404

    asyncio.run(go())


def test_a_config_that_departs_from_the_frozen_plan_is_named(tmp_path):
    async def go() -> None:
        async with administered(planted_settings(tmp_path)) as (running, admin, app):
            await (await Browser(app, running).enter()).go_to('instructions')
            assert 'departs from the frozen plan' not in (await admin.get('/admin')).text
        changed = planted_settings(tmp_path, plan=dataclasses.replace(PLAN, participants=12, looks=()))
        async with administered(changed) as (running, admin, app):
            assert 'departs from the frozen plan' in admin.page.text
            assert 'participants: 20 -&gt; 12' in admin.page.text
            assert 'of 20 planned' in admin.page.text  # the plan that was frozen is in force
            assert '10 of 20' in (await admin.get('/admin/looks')).text
        models = {name: settings_of(tmp_path).models[NAMES[0]] for name in ('new', *NAMES[:1], 'newer')}
        async with administered(planted_settings(tmp_path, models=models)) as (running, admin, app):
            assert len(running.settings.compared) == 3
            assert 'over 1 pair and 1 interim look:' in admin.page.text, 'sizes are of the frozen pairs'
            assert admin.page.text.count('of each pair)') == 1

    asyncio.run(go())


def test_a_rehearsal_has_a_store_and_exports_of_its_own(tmp_path):
    mode: Mode = 'rehearsal'
    settings = planted_settings(tmp_path, mode=mode)
    fill(settings, planted_study(dataclasses.replace(PLANTED, people=4, mode=mode), 1)[0])
    fill(settings, planted_study(dataclasses.replace(PLANTED, people=3), 2)[0])  # were there any, they would not count

    async def go() -> None:
        async with administered(settings) as (running, admin, _):
            assert 'This is a rehearsal' in admin.page.text
            lines = (await admin.get('/admin/exports/participants.jsonl')).text.splitlines()
            assert {json.loads(line)['mode'] for line in lines} == {'rehearsal'}
            assert len(lines) == 4
            assert 'study-rehearsal-participants' in admin.page.headers['content-disposition']
            assert len(running.participants) == 7

    asyncio.run(go())


def test_causes_of_void_turns_are_counted_and_name_no_model(tmp_path, caplog):
    def fail(model, conversation):
        return RuntimeError('status 503 of the first') if model == NAMES[0] else ''

    async def go() -> None:
        async with study(planted_settings(tmp_path), fail) as (running, app):
            client = await Administrator(app).sign_in()
            browser = await (await Browser(app, running).enter()).go_to('training')
            await browser.send('/message', message='Hello')
            await browser.settle()
            await browser.send('/retry')
            await browser.settle()
            text = (await client.get('/admin')).text
            assert 'had no replies, practice rounds too: 2 (' in text
            assert not any(name in text.split('<h2>Who did not complete')[1] for name in NAMES)
            assert sum(f'{kind}: {n}' in text for kind in ('no answer', 'empty reply') for n in (1, 2)) >= 1
            assert 'status 503 of the first' not in text

    asyncio.run(go())
    logged = [record.getMessage() for record in caplog.records if 'is void' in record.getMessage()]
    assert len(logged) == 2
    assert all(any(name in line for name in NAMES) for line in logged)


def test_an_administrator_deletes_data_at_a_participants_wish(tmp_path):
    settings = planted_settings(tmp_path)
    fill(settings, planted_study(dataclasses.replace(PLANTED, people=3, leaves=0, fails=0), 1)[0])

    async def go() -> None:
        async with administered(settings) as (running, client, _):
            id = next(iter(running.participants))
            text = running.participants[id].wrote.text
            path = f'/admin/participants/{id}'
            assert text in (await client.get(path)).text
            assert (await client.send(f'{path}/delete', confirmation='yes')).status_code == 422
            assert running.participants[id].outcome == 'completed'
            await client.get(path)
            form = {'csrf': token(client.page.text), 'confirmation': admin.DELETION}
            for _ in range(2):  # a double click
                page = await client.client.post(f'{path}/delete', data=form)
                assert page.status_code == 200
                assert text not in page.text
            assert running.participants[id].outcome == 'deleted'
            assert not any(text in str(stored.event) for stored in running.store.events())
            assert (await client.send('/admin/participants/x/delete', confirmation=admin.DELETION)).status_code == 404

    asyncio.run(go())


def test_flags_are_of_one_mode_and_computed_once(tmp_path, monkeypatch):
    """A preview with the texts of a participant makes nobody a copy; pages at once share their work."""
    settings = planted_settings(tmp_path)
    events, _ = planted_study(dataclasses.replace(PLANTED, people=2, leaves=0, fails=0), 1)
    previews = [
        dataclasses.replace(
            stored,
            participant=stored.participant[::-1],
            event=Arrived('preview') if stored.version == 1 else stored.event,
        )
        for stored in events
    ]
    assert 'like_another' in str(all_flags(fold_all([*events, *previews]).values(), read_tasks()))
    fill(settings, events, previews)
    calls, real = [], screening.all_flags

    def counted(*arguments):
        calls.append(arguments)
        time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(screening, 'all_flags', counted)

    async def go() -> None:
        async with administered(settings) as (running, client, _):
            pages = await asyncio.gather(*(client.client.get('/admin/participants') for _ in range(3)))
            assert len(calls) == 1
            assert not any('like another' in page.text for page in pages)
            await running.flag(next(iter(running.participants)), 'judge_borderline', 'why')
            assert 'judge borderline' in (await client.get('/admin/participants')).text
            assert len(calls) == 2

    asyncio.run(go())
