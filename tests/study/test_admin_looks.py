"""Results by model are behind looks: at their level, as of their events, and at an end that administrators declare."""

import asyncio
import dataclasses
import json
import re

import pytest

from simrl.study.admin_looks import CONFIRMATION, END_CONFIRMATION
from simrl.study.events import Looked
from simrl.study.plan import look_bounds
from simrl.study.settings import PlanSettings
from tests.study.pages import NAMES, Browser, settings_of
from tests.study.planted import planted_study
from tests.study.test_admin import PLAN, PLANTED, Administrator, administered, fill, planted_settings, token


def level_of(page: str) -> str:
    """The level of the intervals of a look, in percent."""
    found = re.search(r'Intervals at (?:over )?([0-9.]+)%', page)
    assert found, page
    return found[1]


def level(shares: tuple[float, ...], plan: PlanSettings = PLAN) -> str:
    return f'{100 * look_bounds(shares, plan, 1)[-1].level:.2f}'


async def look(admin: Administrator, reason: str = '') -> str:
    """Makes a look; the page that it leads to."""
    await admin.get('/admin/looks')
    fields = {'planned': 'no' if reason else 'yes', 'reason': reason, 'confirmation': CONFIRMATION}
    answer = await admin.send('/admin/looks', **fields)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_results_are_behind_looks(tmp_path):
    """Planned ones at their share and once, with their alpha; others with a reason; each stored before it shows."""
    settings = planted_settings(tmp_path)
    events, _ = planted_study(dataclasses.replace(PLANTED, people=8, leaves=0, fails=0), 1)
    fill(settings, events)

    async def go(least: int) -> None:
        async with administered(settings) as (running, admin, _):
            page = (await admin.get('/admin/looks')).text
            if least == 8:  # too early
                assert 'No planned look is open' in page
                refused = await admin.send('/admin/looks', planned='yes', confirmation=CONFIRMATION)
                assert refused.status_code == 422
                for fields in ({'reason': '', 'confirmation': CONFIRMATION}, {'reason': 'abc', 'confirmation': 'yes'}):
                    assert (await admin.send('/admin/looks', planned='no', **fields)).status_code == 422
                assert (await admin.get('/admin/looks/1')).status_code == 404
                assert (await admin.get('/admin/looks/1/turns.jsonl')).status_code == 404
                assert not running.history.looks
                await admin.get('/admin/looks')
                shown = await admin.send(
                    '/admin/looks', planned='no', reason='the funder asks', confirmation=CONFIRMATION
                )
                assert shown.status_code == 200
                assert 'not in the plan' in shown.text
                assert level_of(shown.text) == '95.00'
                assert running.history.looks == (
                    Looked(8, running.history.looks[0].votes, False, 0.0, 'the funder asks'),
                )
                assert all(name in shown.text for name in NAMES)
            if least == 12:
                assert 'A planned look is open' in page
                # Two windows at once: one look is stored, and the other is told so.
                fields = {'csrf': token(admin.page.text), 'planned': 'yes', 'confirmation': CONFIRMATION.upper()}
                both = await asyncio.gather(*(admin.client.post('/admin/looks', data=fields) for _ in range(2)))
                assert sorted(answer.status_code for answer in both) == [200, 422]
                assert len(running.history.looks) == 2
                look = running.history.looks[-1]
                assert (look.participants, look.planned) == (12, True)
                assert {level_of(answer.text) for answer in both if answer.status_code == 200} == {level((0.6,))}
                assert 0.005 < look.alpha < 0.01  # of O'Brien and Fleming at 60%
                await admin.get('/admin/looks')
                again = await admin.send('/admin/looks', planned='yes', confirmation=CONFIRMATION)
                assert again.status_code == 422
                lines = (await admin.get('/admin/looks/2/turns.jsonl')).text.splitlines()
                assert {json.loads(line)['left'] for line in lines} == set(NAMES)
                assert 'filename="study-live-turns-unblinded.jsonl"' in admin.page.headers['content-disposition']
            if least == 20:
                before = (await admin.get('/admin/looks/2/turns.jsonl')).text
                assert len({json.loads(line)['participant'] for line in before.splitlines()}) == 12
                await admin.get('/admin/looks')
                await admin.send('/admin/looks', planned='yes', confirmation=CONFIRMATION)
                assert sum(look.alpha for look in running.history.looks) == pytest.approx(0.05)
                assert level_of(admin.page.text) == level((0.6, 1.0))
                assert 'of the whole study' in (await admin.get('/admin/exports')).text

    asyncio.run(go(8))
    for more in (4, 8):
        fill(settings, planted_study(dataclasses.replace(PLANTED, people=more, leaves=0, fails=0), more)[0])
        asyncio.run(go(12 if more == 4 else 20))


def people(number: int, seed: int):
    return planted_study(dataclasses.replace(PLANTED, people=number, leaves=0, fails=0), seed)[0]


def test_an_end_of_recruitment_makes_the_last_look_planned(tmp_path):
    """Of 19 where 20 were planned, after an interim look: at the level that is left, as at a look not planned."""
    plan = dataclasses.replace(PLAN, spending='pocock')
    settings = planted_settings(tmp_path, plan=plan)
    fill(settings, people(10, 1))

    async def go(is_end: bool) -> None:
        async with administered(settings) as (running, admin, app):
            if not is_end:
                assert level_of(await look(admin)) == level((0.5,), plan)
                return
            assert level_of(await look(admin, 'a referee asks')) == level((0.5, 1.0), plan) == '97.23'
            page = await admin.get('/admin/looks')
            assert 'No planned look is open' in page.text
            under_way = await Browser(app, running).enter('early')
            for reason, confirmation in (('', END_CONFIRMATION), ('nobody is left', 'yes')):
                assert (
                    await admin.send('/admin/recruitment', reason=reason, confirmation=confirmation)
                ).status_code == 422
                assert not running.history.is_over
                await admin.get('/admin/looks')
            reason = '<b>nobody</b> is left'
            page = await admin.send('/admin/recruitment', reason=reason, confirmation=END_CONFIRMATION)
            assert '&lt;b&gt;nobody&lt;/b&gt; is left' in page.text
            assert '1 who is under way' in page.text
            again = await admin.client.post(
                '/admin/recruitment',
                data={'csrf': token(page.text), 'reason': 'a double click', 'confirmation': END_CONFIRMATION},
            )
            assert again.status_code == 200
            assert sum(type(stored.event).__name__ == 'RecruitmentEnded' for stored in running.history.events) == 1
            assert (await Browser(app, running).enter('late')).state.outcome == 'closed'
            assert under_way.state.outcome is None
            text = await look(admin)
            assert level_of(text) == level((0.5, 1.0), plan)
            assert 'with what was changed since' in text
            assert [made.participants for made in running.history.looks] == [10, 19, 19]
            assert sum(made.alpha for made in running.history.looks) == pytest.approx(0.05)
            assert 'Recruitment has <strong>ended' in (await admin.get('/admin')).text

    asyncio.run(go(False))
    fill(settings, people(9, 2))
    asyncio.run(go(True))

    async def restarted() -> None:
        async with administered(settings) as (running, admin, app):
            assert (await Browser(app, running).enter('later')).state.outcome == 'closed'
            assert level_of((await admin.get('/admin/looks/3')).text) == level((0.5, 1.0), plan)

    asyncio.run(restarted())


def test_an_interim_look_shows_no_flag_of_later(tmp_path):
    plan = PlanSettings(participants=10, looks=(0.2,), excluded_flags=('judge_low_quality',))
    settings = settings_of(tmp_path, plan=plan)
    fill(settings, people(2, 1))

    async def go() -> None:
        async with administered(settings) as (running, admin, _):
            assert ': 2 participants. Intervals' in await look(admin)
            id = next(iter(running.participants))
            await running.flag(id, 'judge_low_quality', 'later')
            assert 'judge low quality' in (await admin.get(f'/admin/participants/{id}')).text
            assert ': 2 participants. Intervals' in (await admin.get('/admin/looks/1')).text
            files = (await admin.get('/admin/looks/1/participants.jsonl')).text.splitlines()
            assert not any('judge_low_quality' in json.loads(line)['flags'] for line in files)

    asyncio.run(go())


def test_a_pair_that_is_turned_round_keeps_its_results_together(tmp_path):
    """Two servers with the two orders: votes count for the same model in the order of the frozen plan."""
    settings = planted_settings(tmp_path, pairs=(':'.join(NAMES),))
    turned = planted_settings(tmp_path, pairs=(':'.join(NAMES[::-1]),))

    async def go(settings, names: tuple[str, ...]) -> None:
        async with administered(settings) as (running, admin, app):
            for name in names:
                await (await Browser(app, running).enter(name)).go_to('over')
            if settings is turned:
                text = await look(admin, 'to see both')
                assert re.findall(r'<th scope="row">([^<]*)</th>', text) == list(NAMES)
                lines = [json.loads(line) for line in (await admin.get('/admin/looks/1/turns.jsonl')).text.splitlines()]
                assert {line['pair'] for line in lines} == {':'.join(NAMES)}
                assert all(line['preference'] == (line['left'] == NAMES[0]) for line in lines), 'all prefer the left'
                assert {line['first_was_left'] for line in lines} == {True, False}
                overview = (await admin.get('/admin')).text
                assert '<strong>3</strong>' in overview

    asyncio.run(go(settings, ('one', 'two')))
    asyncio.run(go(turned, ('three',)))
