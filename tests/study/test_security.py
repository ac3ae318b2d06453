"""Attacks on the participants' pages: each is tried, and refused."""

import html.parser
import pathlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx2
import itsdangerous
import pytest
from fastapi import FastAPI

from simrl.conversations.records import Message
from simrl.study.running import Running
from simrl.study.settings import PanelSettings, TaskSettings, WebSettings
from simrl.study.store import StoreError
from simrl.study.web import HEADERS
from tests.study.pages import ADMIN, Browser, visit

EVIL = (
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    '</textarea><script>alert(1)</script>',
    "' onfocus='alert(1)' autofocus='",
    '[press](javascript:alert(1)) [here](data:text/html,<script>alert(1)</script>) ![x](http://evil.example/x.png)',
    '[a](<javascript:alert(1)> "title\\" onclick=alert(1)") <a href="javascript:alert(1)">b</a>',
    '```\n</code></pre><script>alert(1)</script>\n```\n|<svg onload=alert(1)> |\n|---|\n| {{ 7919*7907 }} |',
    '<!-- <style>*{display:none}</style> --> <iframe src="https://evil.example"></iframe> <base href="//evil.example">',
)
ATTRIBUTES = re.compile(
    '(data|aria)-.*|href|rel|target|class|id|tabindex|type|name|value|checked|hidden|lang|charset|content|src|defer|role|'
    'method|action|accept-charset|novalidate|for|rows|http-equiv|dir|autocomplete'
)


class Tags(html.parser.HTMLParser):
    """The tags of a page, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, Mapping[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check_harmless(page: str) -> None:
    """Only our own script; no image, frame or handler; links lead to http, mailto and our own pages alone."""
    for tag, attributes in Tags(page).found:
        assert tag not in ('img', 'iframe', 'svg', 'style', 'base', 'object', 'embed', 'math', 'video'), tag
        assert all(map(ATTRIBUTES.fullmatch, attributes)), (tag, attributes)
        if tag == 'script':
            assert str(attributes['src']).startswith('/static/study.js?v=')
        for name in ('href', 'action'):
            if name in attributes:
                assert re.match(r'/|#|https?://|mailto:', str(attributes[name])), attributes
                assert not str(attributes[name]).startswith('//')
    assert '62615533' not in page


def test_what_participants_and_models_write_is_shown_as_text(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('task')
        kind = running.tasks.type(browser.state.document_type or '')
        notes = {f'note_{i}': EVIL[i] for i in range(3)}
        check_harmless((await browser.send('/task', **notes)).text)  # shown again beside the error
        await browser.send('/task', task=kind.tasks[0].id, **notes)
        check_harmless(browser.page.text)
        for text in EVIL:
            await browser.send('/message', message=text)
            await browser.settle()
            check_harmless(browser.page.text)
            assert 'alert' in browser.page.text or 'display' in browser.page.text
            check_harmless((await browser.send('/vote', reason=text)).text)
            await browser.send('/vote', choice='b', reason=text)
            check_harmless(browser.page.text)
        await browser.send('/conclude')
        check_harmless((await browser.send('/text', text=EVIL[2])).text)
        await browser.get('/leave')
        check_harmless((await browser.send('/withdraw', reason=EVIL[0] * 200)).text)
        assert browser.state.main is not None
        assert [turn.message for turn in browser.state.main.turns] == list(EVIL[1:])

    def reply(model: str, conversation: Sequence[Message]) -> str:
        return conversation[-1].content

    visit(tmp_path, go, reply, task=TaskSettings(exchanges=2, max_exchanges=30, min_words=50))


def test_nobody_acts_for_another(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        victim, thief = await Browser(app, running).enter('victim'), await Browser(app, running).enter('thief')
        secret, id = running.store.secret, victim.state.id
        cookie = victim.client.cookies['study']
        forms = victim.hidden
        before = dict(running.participants)

        async def refused(browser: Browser, **fields: object) -> None:
            await browser.send('/consent', agreed='yes', **fields)
            assert browser.page.status_code == 403
            await browser.get('/')

        await refused(thief, csrf=forms['csrf'])  # another's token
        for csrf in ('', 'x', forms['csrf'][:-1], forms['csrf'] + '0', '\u00e9' * 32):
            await refused(victim, csrf=csrf)
        page = await victim.client.post('/consent', data={'agreed': 'yes', 'version': '1'})
        assert page.status_code == 400  # without any token
        for site in ('cross-site', 'same-site'):
            page = await victim.client.post(
                '/consent', data={**forms, 'agreed': 'yes'}, headers={'Sec-Fetch-Site': site}
            )
            assert page.status_code == 403
        await thief.client.post('/admin/sign-in', data={'token': ADMIN})
        admin_cookie = thief.client.cookies['study_admin']
        signer = itsdangerous.TimestampSigner(secret, salt='cookie')
        forged = [id, f'{id}.', f'{id}..', f'{id}.{cookie.partition(".")[2][:-1]}', cookie.replace(id, 'f' * 16)]
        forged += [cookie.replace(id, thief.state.id), admin_cookie, signer.sign(id).decode(), cookie * 40, '\xff']
        for value in forged:
            for headers in ({'Cookie': f'study={value}'.encode('latin-1')},):
                stranger = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url='http://study.test')
                assert (await stranger.get('/', headers=headers)).status_code == 403, value
                page = await stranger.post('/consent', data={**forms, 'agreed': 'yes'}, headers=headers)
                assert page.status_code == 403, value
        for address in ('/admin', '/preview', '/admin/participants'):  # a participant's cookie is no administrator's
            stranger = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url='http://study.test')
            page = await stranger.get(address, headers={'Cookie': f'study_admin={cookie}'})
            assert page.status_code in (303, 403)
            assert page.headers.get('Location', '/admin/sign-in') == '/admin/sign-in'
        assert running.participants == before

    visit(tmp_path, go)


def test_the_panels_link_by_which_a_participant_is_known(tmp_path: pathlib.Path) -> None:
    """Of another study it opens nothing; of another session it goes on or withdraws, and deletes nothing."""
    link = '/enter?PROLIFIC_PID=p1&STUDY_ID={}&SESSION_ID={}'

    async def go(running: Running, app: FastAPI) -> None:
        errors, browser, other = running.texts.errors, Browser(app, running), Browser(app, running)
        await browser.get(link.format('s1', 'v1'))
        await browser.go_to('training')
        await browser.exchange('Of my own')
        assert (await other.get(link.format('s3', 'v1'))).status_code == 403  # not of the settings
        page = await other.get(link.format('s2', 'v1'))
        assert page.status_code == 403
        assert errors.other_study in page.text
        assert (await other.get('/')).status_code == 403
        await other.get(link.format('s1', 'v2'))
        await other.exchange('From my phone')
        assert browser.state is other.state
        page = await other.get('/leave')
        assert errors.no_deletion in page.text
        assert 'action="/delete"' not in page.text
        page = await other.send('/delete')
        assert page.status_code == 403
        assert errors.no_deletion in page.text
        assert browser.state.outcome is None
        await other.get('/leave')
        await other.send('/withdraw', reason='')
        assert browser.state.outcome == 'withdrawn'
        assert browser.state.training is not None
        await browser.get(link.format('s1', 'v2'))  # the browser of the first time stays so
        await browser.get('/leave')
        csrf = browser.hidden['csrf']
        assert (await other.client.post('/delete', data={'version': 1, 'csrf': csrf})).status_code == 403
        await other.get(link.format('s1', 'v1'))  # by the first link any browser is
        await other.get('/leave')
        await other.send('/delete')
        assert browser.state.outcome == 'deleted'
        await Browser(app, running).get(link.format('s2', 'v1'))
        assert len(running.participants) == 1

    visit(tmp_path, go, panel=PanelSettings(study_ids=('s1', 's2')))


def test_no_address_leads_to_another_host(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url='http://study.test') as stranger:
            for path in ('/state/', '/admin/', '/enter/', '/message/', '/admin/participants/', '//evil.example/state/'):
                page = await stranger.get(path, headers={'Host': 'evil.example'})
                assert page.headers.get('Location', '/').startswith('/'), path
                assert 'evil' not in page.text + str(page.headers), path

    visit(tmp_path, go)


def test_a_cookie_does_not_last_for_ever(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        assert (await browser.get('/')).status_code == 200
        now = itsdangerous.TimestampSigner.get_timestamp
        monkeypatch.setattr(itsdangerous.TimestampSigner, 'get_timestamp', lambda self: now(self) + 61 * 86_400)
        assert (await browser.get('/')).status_code == 403
        await browser.enter()  # the link is good for ever
        assert browser.page.status_code == 200
        assert len(running.participants) == 1

    visit(tmp_path, go)


def test_a_replayed_form_changes_nothing(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('training')
        await browser.send('/message', message='Hello')
        await browser.settle()
        vote = {**browser.hidden, 'choice': 'a', 'reason': 'It is clear.'}
        await browser.send('/vote', **vote)
        await browser.exchange()
        before, stored = browser.state, running.store.events()
        for version in (vote['version'], 1, 10**8, before.version + 1):
            await browser.client.post('/vote', data={**vote, 'version': str(version)})
        assert browser.state is before
        assert running.store.events() == stored

    visit(tmp_path, go)


def test_bodies_that_are_no_forms(tmp_path: pathlib.Path) -> None:
    form = 'application/x-www-form-urlencoded'

    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        good = '&'.join(f'{name}={value}' for name, value in browser.hidden.items()) + '&agreed=yes'

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b'x' * 1000

        cases = [
            (good.encode(), 'application/json', 415),
            (good.encode(), 'multipart/form-data; boundary=x', 415),
            (good.encode(), 'text/plain', 415),
            (good.encode(), '', 415),
            (b'x' * 10_001, form, 413),
            (parts(), form, 413),
            (b'\x00\xff\xfe\x80' * 100, form, 400),
            (good.encode() + b'&note=%ff%fe', form, 400),
            (good.encode() + b'&agreed=no', form, 400),
            (good.encode() + b'&a=1' * 100, form, 400),
            (b'&'.join(b'a%d=1' % n for n in range(100)), form, 400),
            (b'', form, 400),
            (good.replace('agreed=yes', 'agreed=maybe').encode(), form, 400),
            (good.replace('agreed=yes', '').encode(), form, 400),
            (re.sub('version=1', 'version=one', good).encode(), form, 400),
            (re.sub('version=1', 'version=-1', good).encode(), form, 400),
            (re.sub('version=1', 'version=%D9%A1', good).encode(), form, 400),  # an Arabic one
        ]
        for content, kind, status in cases:
            headers = {'Content-Type': kind} if kind else {}
            page = await browser.client.post('/consent', content=content, headers=headers)
            assert page.status_code == status, (content, page.text)
            assert page.headers['Content-Type'].startswith('text/html')
        headers = {'Content-Type': form, 'Content-Encoding': 'gzip'}
        assert (await browser.client.post('/consent', content=good, headers=headers)).status_code == 415
        assert browser.state.version == 1

    task = TaskSettings(text_chars=400, message_chars=100)
    visit(tmp_path, go, web=WebSettings(body_bytes=10_000), task=task)


def test_what_is_stored_is_what_was_written(tmp_path: pathlib.Path) -> None:
    texts = (
        "'; DROP TABLE events; --",
        '"\\\x1b[2J%s%n{}',
        'a\x00b\ud7ff\ufeff\u202e',
        '\r\nSet-Cookie: x=y\r\n',
        '你好 🙂' * 50,
    )

    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        await browser.go_to('conversation')
        for text in texts[:3]:
            await browser.exchange(text, reason=text)
        await browser.get('/?notice=%0d%0aSet-Cookie:x=y%0d%0a')
        assert 'set-cookie' not in browser.page.headers
        assert browser.state.main is not None
        found = [turn.message for turn in browser.state.main.turns]
        assert found == [texts[0], texts[1], texts[2].replace('\x00', '\N{REPLACEMENT CHARACTER}')]

    visit(tmp_path, go)


def test_addresses_lead_nowhere_else(tmp_path: pathlib.Path) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = await Browser(app, running).enter()
        for path in (
            *('/static/../web.py', '/static/..%2fweb.py', '/static/%2e%2e/web.py', '/static//etc/passwd', '/static/'),
            *('/static/study.css%00.js', '/../study.sqlite', '/openapi.json', '/docs', '/.env', '/participant.html'),
        ):
            page = await browser.get(path)
            assert page.status_code == 404, path
            assert running.texts.errors.not_found in page.text
        for query in ('notice=<script>alert(1)</script>', 'notice=closings', 'notice=__class__', 'next=//evil.example'):
            check_harmless((await browser.get(f'/?{query}')).text)
            assert 'script>alert' not in browser.page.text
        evil = {'Host': 'evil.example', 'X-Forwarded-Host': 'evil.example', 'Referer': 'https://evil.example/'}
        page = await browser.client.post(
            '/consent', data={**browser.hidden, 'agreed': 'yes'}, headers=evil, follow_redirects=False
        )
        assert page.status_code == 303
        assert page.headers['Location'] == '/'
        assert (await browser.client.request('TRACE', '/')).status_code == 405
        assert (await browser.client.request('PUT', '/vote')).status_code == 405
        pages = [await browser.get('/enter?PROLIFIC_PID=a%0d%0aSet-Cookie:x=y&STUDY_ID=s&SESSION_ID=v')]
        pages += [await browser.get("/enter?PROLIFIC_PID=' OR 1=1 --&STUDY_ID=s&SESSION_ID=v")]
        assert [page.status_code for page in pages] == [400, 400]

    visit(tmp_path, go)


@pytest.mark.parametrize('https', [False, True])
def test_every_answer_has_the_headers(tmp_path: pathlib.Path, https: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(running: Running, app: FastAPI) -> None:
        browser = Browser(app, running)
        browser.client.follow_redirects = False
        page = await browser.get('/enter')
        cookie = page.headers['Set-Cookie']
        assert cookie.startswith('__Host-study=' if https else 'study=')
        assert {'HttpOnly', 'SameSite=lax', 'Path=/'} <= set(cookie.split('; '))
        assert ('Secure' in cookie) == https
        pages = [
            page,
            *[await browser.get(address) for address in ('/', '/state', '/leave', '/no', '/enter?', '/vote')],
        ]
        pages += [await browser.client.post('/consent', content=b'x'), await browser.client.request('PUT', '/')]

        async def broken(*_: object) -> None:
            raise ZeroDivisionError('a secret of ours')

        async def full(*_: object) -> None:
            raise StoreError('study.sqlite: the disk is full')

        for fault, status in ((broken, 500), (full, 503)):
            monkeypatch.setattr(running, 'consent', fault)
            browser.client.cookies.clear()
            browser.client.headers['Cookie'] = cookie.partition(';')[0]
            await browser.get('/')
            pages.append(await browser.send('/consent', agreed='yes'))
            assert browser.page.status_code == status
            assert running.texts.errors.server in browser.page.text
            assert 'secret' not in browser.page.text
            assert 'sqlite' not in browser.page.text
        pages.append(await browser.get('/static/study.css'))
        assert 'no-store' not in pages.pop().headers['Cache-Control']
        for page in pages:
            for name, value in HEADERS.items():
                assert page.headers[name] == value, (page.url, page.status_code, name)
            assert ('Strict-Transport-Security' in page.headers) == https
            assert 'server' not in page.headers
        assert "default-src 'none'" in HEADERS['Content-Security-Policy']
        assert 'unsafe' not in HEADERS['Content-Security-Policy']

    visit(tmp_path, go, web=WebSettings(https=https), panel=PanelSettings(entry='open'))
