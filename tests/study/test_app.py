"""A participant's way through the pages: whatever they do, they are where they were, and nothing counts twice."""

import asyncio
import dataclasses
import pathlib
import re
import time
from collections.abc import Sequence

import httpx2
import pytest
from fastapi import FastAPI

from simrl.conversations.records import Message
from simrl.study.running import Running
from simrl.study.settings import PanelSettings, TaskSettings, WebSettings
from simrl.study.texts import Task, Tasks
from tests.study.pages import ADMIN, ENTER, NAMES, TASKS, Browser, settings_of, study, visit


def is_stale(page: httpx2.Response, running: Running) -> bool:
    """True if a form was not taken, as it was of an older page."""
    return f'role="status">{running.texts.notices.out_of_date}' in page.text


def test_the_whole_way(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        for step in ('instructions', 'check', 'task', 'training', 'conversation', 'final'):
            await browser.go_to(step)
            assert re.findall('<h1>', browser.page.text) == ['<h1>'], step
            assert 'COMPLETED' not in browser.page.text  # the code is shown once all is stored, and not before
        await browser.go_to('over')
        assert 'href="https://panel.example/done?cc=COMPLETED"' in browser.page.text
        state = browser.state
        assert state.outcome == 'completed'
        assert state.main is not None
        assert len(state.main.judged) == 2
        stored = running.store.events()
        assert {event.version for event in stored if event.participant == state.id} == {*range(1, state.version + 1)}
        await browser.get('/enter?PROLIFIC_PID=person1&STUDY_ID=s1&SESSION_ID=v2')  # the link once more
        assert 'COMPLETED' in browser.page.text
        assert browser.state.other_sessions == 1
        assert len(running.participants) == 1

    visit(tmp_path, go)


def test_each_step_is_where_it_was_after_a_reload_and_on_another_device(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        for step in ('consent', 'instructions', 'check', 'task', 'training', 'conversation', 'final', 'over'):
            await browser.go_to(step)
            other = await Browser(app, running).enter()
            assert other.state is browser.state
            again = await browser.get('/')
            assert other.page.text.replace(notice_of(other), '') == again.text
        assert len(running.participants) == 1

    def notice_of(browser: Browser) -> str:
        notice = browser.running.texts.notices.welcome_back
        return f'<p class="notice" role="status">{notice}</p>'

    visit(tmp_path, go)


def test_a_second_click_and_a_second_tab_change_nothing(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        old = browser.hidden
        sent = [browser.client.post('/message', data={**old, 'message': f'Number {n}'}) for n in range(5)]
        answers = await asyncio.gather(*sent)
        assert [answer.status_code for answer in answers] == [200] * 5
        await browser.settle()
        talk = browser.state.talk
        assert talk is not None
        assert [turn.message for turn in talk.turns] == ['Number 0']
        vote = {**browser.hidden, 'choice': 'a', 'reason': 'It is clear.'}
        answers = await asyncio.gather(*(browser.client.post('/vote', data=vote) for _ in range(5)))
        assert sum(is_stale(answer, running) for answer in answers) == 4
        assert browser.state.step == 'conversation'
        before = browser.state
        for path, fields in (('/message', {'message': 'Again'}), ('/vote', {'choice': 'b', 'reason': 'No, the other'})):
            answer = await browser.client.post(path, data={**old, **fields})  # Back, and sent once more
            assert is_stale(answer, running)
        assert browser.state is before

    visit(tmp_path, go)


def test_an_old_form_is_no_error_and_the_address_of_a_form_leads_back(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('check')
        before = browser.state
        for path in ('/consent', '/instructions', '/task', '/message', '/retry', '/vote', '/conclude', '/text'):
            fields = {'agreed': 'yes', 'message': 'x', 'choice': 'a', 'reason': 'because', 'text': 'x', 'task': 'x'}
            await browser.send(path, **fields)  # of the right version, at the wrong step
            assert browser.page.status_code == 200, path
            assert is_stale(browser.page, running), path
            assert (await browser.get(path)).url.path == '/'
        assert browser.state is before

    visit(tmp_path, go)


def test_what_is_wrong_is_named_beside_its_field_and_what_was_typed_stays(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        errors = running.texts.errors
        browser = await Browser(app, running).enter()

        async def wrong(path: str, field: str, problem: str, kept: str = '', **fields: object) -> None:
            before = browser.state
            page = await browser.send(path, **fields)
            assert page.status_code == 422
            assert browser.state is before
            assert re.search(rf'<a href="#{field}">.*{re.escape(problem)}', page.text), (path, page.text)
            assert f'id="{field}-error">{problem}' in page.text
            assert f'id="{field}"' in page.text
            assert kept in page.text

        await browser.go_to('check')
        await wrong('/check', 'answer_1', errors.unanswered, 'name="answer_0" value="0" checked', answer_0=0)
        await browser.go_to('task')
        await wrong('/task', 'task', errors.no_task, 'For my sister</textarea>', note_0='For my sister')
        kind = running.tasks.type(browser.state.document_type or '')
        await wrong('/task', 'note_1', errors.unanswered, note_0='For her', task=kind.tasks[3].id)
        await browser.go_to('training')
        await wrong('/message', 'message', errors.empty, message=' \n ')
        await browser.send('/message', message='Help me')
        await browser.settle()
        await wrong('/vote', 'choice', errors.no_choice, 'B is kinder', reason='B is kinder')
        await wrong('/vote', 'choice', errors.no_choice, choice='left', reason='B is kinder')
        too_short = errors.reason_too_short.replace('{limit}', '3').replace('{found}', '0')
        await wrong('/vote', 'reason', too_short, 'value="tie" checked', choice='tie', reason=' ')
        await browser.go_to('final')
        too_few = errors.too_few_words.replace('{limit}', '5').replace('{found}', '2')
        await wrong('/text', 'text', too_few, 'Two words', text='Two words', attention=2)
        await wrong('/text', 'attention', errors.unanswered, text='These are more than five words')

    visit(tmp_path, go)


@pytest.mark.parametrize('path', ['/withdraw', '/delete'])
def test_leaving_at_any_step(tmp_path: pathlib.Path, path: str) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        for step in ('consent', 'training', 'final'):
            browser = await Browser(app, running).enter(step)
            await browser.go_to(step)
            assert 'href="/leave"' in browser.page.text
            await browser.get('/leave')
            await browser.send(path, **({'reason': 'I have to go'} if path == '/withdraw' else {}))
            assert browser.state.outcome == ('withdrawn' if path == '/withdraw' else 'deleted'), step
            assert ('WITHDRAWN' in browser.page.text) == (path == '/withdraw')
            again = await browser.enter(step)
            assert again.state.step == 'over'

    visit(tmp_path, go)


def test_deleted_data_is_gone_and_nobody_enters_twice(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        await browser.exchange('A message about Ludmila')
        await browser.get('/leave')
        await browser.send('/delete')
        assert running.texts.closings.deleted.split('\n')[0].strip('# ') in browser.page.text
        assert 'Ludmila' not in repr(running.store.events()) + repr(running.participants)
        assert 'person1' not in repr(running.store.identities())
        other = await Browser(app, running).enter()
        assert other.state.outcome == 'deleted'

    visit(tmp_path, go)


def test_each_outcome_has_its_own_code(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        wrongs = {f'answer_{i}': (question.right + 1) % 3 for i, question in enumerate(running.texts.check)}
        declined = await Browser(app, running).enter('a')
        await declined.send('/consent', agreed='no')
        failed = await Browser(app, running).enter('b')
        await failed.go_to('check')
        for left in (1, 0):
            await failed.send('/check', **wrongs)
            notice = running.texts.notices.wrong_check.replace('{tries_left}', str(left))
            assert (notice in failed.page.text) == (left > 0)
        await running.pause(True, 'a test')
        closed = await Browser(app, running).enter('c')
        pages = [declined.page.text, failed.page.text, closed.page.text]
        for code in ('DECLINED', 'CHECKED', 'CLOSED'):
            assert [code in page for page in pages].count(True) == 1

    visit(tmp_path, go)


def test_a_model_that_fails_costs_nobody_their_message(tmp_path: pathlib.Path) -> None:
    fails = [True, True, False]

    def reply(model: str, _: object) -> str | Exception:
        return RuntimeError('gone') if model == 'okapi-2' and fails[0] else 'A reply'

    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        await browser.send('/message', message='Is there anybody?')
        while fails[0]:
            await browser.settle()
            assert running.texts.notices.void in browser.page.text
            assert 'Is there anybody?' in browser.page.text
            assert 'A reply' not in browser.page.text
            assert 'gone' not in browser.page.text
            await browser.send('/vote', choice='a', reason='There is none')
            assert is_stale(browser.page, running)
            fails.pop(0)
            await browser.send('/retry')
        await browser.settle()
        assert browser.page.text.count('A reply') == 2

    visit(tmp_path, go, reply)


def test_a_message_that_cannot_be_answered_can_be_put_otherwise(tmp_path: pathlib.Path) -> None:
    def reply(_: str, conversation: Sequence[Message]) -> str | Exception:
        return RuntimeError('gone') if conversation[-1].content == 'Hello' else 'A reply'

    async def go(running: Running, app: FastAPI) -> None:
        notices, browser = running.texts.notices, await Browser(app, running).enter()
        await browser.go_to('training')
        await browser.send('/message', message='Hello')
        await browser.settle()
        assert 'action="/retry"' in browser.page.text
        await browser.send('/retry')
        await browser.settle()
        assert notices.no_more_tries in browser.page.text
        assert 'action="/retry"' not in browser.page.text
        await browser.send('/message', message='Good morning')
        await browser.settle()
        assert 'action="/vote"' in browser.page.text

    visit(tmp_path, go, reply, task=TaskSettings(exchanges=1, min_words=1, tries=2))


def test_a_page_that_waits_asks_for_itself_where_there_is_no_script(tmp_path: pathlib.Path) -> None:
    refresh = '<noscript><meta http-equiv="refresh" content="5"></noscript>'  # with script axe would be right to object

    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        assert refresh not in browser.page.text
        await browser.send('/message', message='Hello')
        assert browser.page.text.count(refresh) == 1
        assert f'<noscript><p>{running.texts.notices.no_script}' in browser.page.text
        answered.set()
        await browser.settle()
        assert refresh not in browser.page.text

    async def reply(*_: object) -> str:
        await answered.wait()
        return 'A reply'

    answered = asyncio.Event()
    visit(tmp_path, go, reply)


def test_the_panels_link_must_be_whole(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = Browser(app, running)
        for query in (
            '',
            '?PROLIFIC_PID=a&STUDY_ID=b',
            '?PROLIFIC_PID=&STUDY_ID=b&SESSION_ID=c',
            '?PROLIFIC_PID={{%25PROLIFIC_PID%25}}&STUDY_ID=b&SESSION_ID=c',
            '?PROLIFIC_PID=a&PROLIFIC_PID=z&STUDY_ID=b&SESSION_ID=c',
            f'?PROLIFIC_PID={"a" * 65}&STUDY_ID=b&SESSION_ID=c',
        ):
            await browser.get(f'/enter{query}')
            assert browser.page.status_code == 400
            assert running.texts.errors.no_identity in browser.page.text
            assert (await browser.get('/')).status_code == 403
        assert not running.participants

    visit(tmp_path, go)


def test_an_open_study_lets_a_browser_in_once(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser, other = Browser(app, running), Browser(app, running)
        for _ in range(2):
            await browser.get('/enter')
        await other.get('/enter')
        assert len(running.participants) == 2
        await running.pause(True, 'a minute')
        await browser.send('/consent', agreed='yes')
        await browser.get('/enter')
        assert 'CLOSED' in browser.page.text
        await running.pause(False, '')
        await browser.get('/enter')
        assert 'action="/consent"' in browser.page.text
        assert len(running.participants) == 2
        await browser.client.post('/admin/sign-in', data={'token': ADMIN})
        await browser.get('/preview')
        assert browser.state.mode == 'preview'
        await browser.get('/enter')  # what was seen in a preview makes nobody's data one
        assert browser.state.mode == 'live'

    visit(tmp_path, go, panel=PanelSettings(entry='open'))


def test_a_conversation_ends_by_itself(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('conversation')
        assert '/conclude' not in browser.page.text
        assert 'Message 1 of at least 1' in browser.page.text
        await browser.exchange()
        assert '/conclude' in browser.page.text
        await browser.exchange()
        assert browser.state.step == 'final'
        assert running.texts.notices.last_exchange in browser.page.text

    visit(tmp_path, go, task=TaskSettings(exchanges=1, max_exchanges=2, min_words=1))


def test_a_study_that_was_stopped_goes_on(tmp_path: pathlib.Path) -> None:
    async def before(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('conversation')
        seen.append((browser.client.cookies, await browser.get('/')))

    async def after(running: Running, app: FastAPI) -> None:
        browser = Browser(app, running)
        (browser.client.cookies, page) = seen[0]
        assert (await browser.get('/')).text == page.text
        await browser.go_to('over')
        assert browser.state.outcome == 'completed'

    seen: list = []
    visit(tmp_path, before)
    visit(tmp_path, after)


@pytest.mark.parametrize('change', ['other tasks', 'a question fewer', 'another model'])
def test_whoever_returns_to_another_config_has_a_page(tmp_path: pathlib.Path, change: str) -> None:
    """The code, the way out, and deletion under any settings; a next step where there is one."""
    steps = ('task', 'training', 'conversation', 'final', 'over')

    async def go() -> None:
        settings, tasks, cookies = settings_of(tmp_path), TASKS, {}
        async with study(settings, tasks=tasks) as (running, app):
            for step in steps:
                browser = await Browser(app, running).enter(step)
                await browser.go_to(step)
                cookies[step] = browser.client.cookies
        if change == 'other tasks':
            others = [
                dataclasses.replace(kind, id=f'{kind.id}_2', tasks=(Task(f'{kind.id}-new', 'A text', 'Write.'),))
                for kind in tasks.types
            ]
            tasks = Tasks(tuple(others))
        elif change == 'a question fewer':
            tasks = Tasks(tuple(dataclasses.replace(kind, questions=kind.questions[:2]) for kind in tasks.types))
        else:
            settings = dataclasses.replace(
                settings, models={'new': settings.models[NAMES[0]], NAMES[1]: settings.models[NAMES[1]]}
            )
        later = 0.0 if change == 'a question fewer' else 7200.0
        async with study(settings, tasks=tasks, clock=lambda: time.time() + later) as (running, app):
            for step in steps:
                browser = Browser(app, running)
                browser.client.cookies = cookies[step]
                for address in ('/leave', '/state', '/', ENTER.format(step), '/leave'):
                    assert (await browser.get(address)).status_code == 200, (step, address)
                await browser.get('/')
                ended = {'other tasks': ('task',), 'another model': ('training', 'conversation')}.get(change, ())
                if step in ended:
                    assert browser.state.outcome == 'closed'
                    assert 'CLOSED' in browser.page.text
                else:
                    await browser.go_to('over')
                    assert 'COMPLETED' in browser.page.text
                await browser.get('/leave')
                await browser.send('/delete')
                assert browser.state.outcome == 'deleted'

    asyncio.run(go())


def test_conduct_is_stored_as_the_script_counted_it(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        for bad in ({'pasted': 'many'}, {'typed': '-1'}, {'seconds': 'nan'}, {'seconds': '-0.5'}, {'seconds': '1e99'}):
            assert (await browser.send('/message', message='Hello', **bad)).status_code == 400
            await browser.get('/')
        await browser.send('/message', message='Hello', pasted=5, typed=12, seconds='7.5')
        turn = browser.state.turn
        assert turn is not None
        assert (turn.conduct.pasted, turn.conduct.typed, turn.conduct.seconds) == (5, 12, 7.5)

    visit(tmp_path, go)


def test_a_server_without_its_store_says_so(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = Browser(app, running)
        assert (await browser.get('/health')).status_code == 200
        running.store.close()
        page = await browser.get('/health')
        assert (page.status_code, page.json()) == (503, {'status': 'store lost'})
        assert (await browser.get(ENTER.format('p1'))).status_code == 503

    visit(tmp_path, go)


def test_previews_are_for_administrators(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        assert (await browser.get('/preview')).status_code == 403
        assert {state.mode for state in running.participants.values()} == {'live'}
        admin = Browser(app, running)
        await admin.client.post('/admin/sign-in', data={'token': ADMIN})
        await admin.get('/preview')
        assert running.texts.notices.preview in admin.page.text
        assert admin.state.mode == 'preview'
        await admin.go_to('over')

    visit(tmp_path, go)


def test_the_longest_text_of_any_script_fits(tmp_path: pathlib.Path) -> None:
    text = '\N{GRINNING FACE} ' * 20_000

    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('final')
        await browser.send('/text', text='\N{GRINNING FACE}' * 40_001, attention=2)
        assert browser.page.status_code == 422
        await browser.send('/text', text=text, attention=2)
        assert browser.state.wrote is not None
        assert browser.state.wrote.text == text.strip()

    visit(tmp_path, go, task=TaskSettings(exchanges=1))
    with pytest.raises(ValueError, match=r'body_bytes: expected at least 4[0-9]{5}, .* found 262144'):
        settings_of(tmp_path, web=WebSettings(body_bytes=2**18))
    for field, value in {'port': -1, 'poll_seconds': 0.0, 'admin_tries': 0, 'drain_seconds': -1.0, 'host': ''}.items():
        with pytest.raises(ValueError, match=f'^WebSettings.{field}: expected '):
            WebSettings(**{field: value})  # type: ignore[arg-type]
