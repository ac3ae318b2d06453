"""The start of a study: what is wrong is said before anybody is let in; what runs is served, stopped and continued."""

import concurrent.futures
import importlib
import os
import pathlib
import re
import signal
import socket
import threading
from collections.abc import Iterator

import httpx2
import pytest

from simrl.remote.settings import EndpointSettings
from simrl.run.config import from_config_dict, to_config_dict
from simrl.study import start
from simrl.study.settings import StudyModel, StudySettings, WebSettings
from simrl.study.store import Store, StoreError
from tests.serving.scripted import ScriptedEngine, served, site
from tests.study.pages import ADMIN, ENTER, settings_of
from tools.study import read_models


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SIMRL_STUDY_ADMIN', ADMIN)


def test_the_config_is_that_of_its_settings() -> None:
    config = importlib.import_module('configs.study').get_config('runs/mine')
    settings = from_config_dict(StudySettings, config, 'config')
    assert settings.models['role_play'] == StudyModel(source='runs/mine/role_play/seed-0')
    assert from_config_dict(StudySettings, to_config_dict(settings), 'config') == settings


def test_models_are_named_on_the_command_line() -> None:
    found = read_models(['a=runs/x/y', 'b=http://127.0.0.1:8000/v1#B', 'c=https://models.example/v1'])
    assert found['a'].source == 'runs/x/y'
    named = [found[name].endpoint for name in 'bc']
    assert [(x.url, x.model) for x in named if x] == [
        ('http://127.0.0.1:8000/v1', 'B'),
        ('https://models.example/v1', 'c'),
    ]
    for bad in (['a'], ['=x'], ['a='], ['a=x', 'a=y']):
        with pytest.raises(ValueError, match='NAME=SOURCE'):
            read_models(bad)


def refused(settings: StudySettings, error: type[Exception], message: str) -> None:
    said: list[str] = []
    with pytest.raises(error, match=message):
        start.serve(settings, said.append)
    assert not any('http' in line for line in said)


def test_what_is_wrong_is_said_before_anybody_is_let_in(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = settings_of(tmp_path, mode='rehearsal', web=WebSettings(port=0))
    file = tmp_path / 'study.sqlite'
    refused(settings_of(tmp_path), ValueError, r'texts: expected fields\.\w+, fields\.\w+.* to be filled in')
    monkeypatch.setenv('SIMRL_STUDY_ADMIN', 'short')
    refused(rehearsal, ValueError, r'SIMRL_STUDY_ADMIN, at least 16 characters, found 5$')
    monkeypatch.setenv('SIMRL_STUDY_ADMIN', ADMIN)
    texts = tmp_path / 'texts.yaml'
    texts.write_text('title: A\nlabel:\n  send: B\n')
    refused(settings_of(tmp_path, mode='rehearsal', texts=texts), ValueError, r'texts\.yaml, line 2: label')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        web = WebSettings(port=port)
        refused(settings_of(tmp_path, mode='rehearsal', web=web), OSError, f'127.0.0.1:{port}: cannot listen there')
    assert not file.exists()
    with Store(rehearsal.store, 'rehearsal'):
        refused(rehearsal, StoreError, 'study.sqlite')
    refused(rehearsal, Exception, 'Connection refused')  # of the models' server


@pytest.fixture(scope='module')
def models() -> Iterator[str]:
    engine = ScriptedEngine()
    with site({'m': served(engine, 'm')}) as found:
        yield found.url


def test_a_study_is_served_stopped_and_continued(tmp_path: pathlib.Path, models: str) -> None:
    """In this process, by its own signals: in the main thread, as handlers of signals want it."""
    assert threading.current_thread() is threading.main_thread()
    endpoint = StudyModel(endpoint=EndpointSettings(models, 'm'))
    settings = settings_of(
        tmp_path, mode='rehearsal', web=WebSettings(port=0), models={'one': endpoint, 'two': endpoint}
    )
    cookies = httpx2.Cookies()

    def visit(address: str, first: bool) -> str:
        with httpx2.Client(base_url=address, follow_redirects=True, cookies=cookies) as browser:
            page = browser.get(ENTER.format('p1') if first else '/')
            if first:
                fields = dict(re.findall('name="(csrf|version)" value="(.*?)"', page.text))
                page = browser.post('/consent', data=fields | {'agreed': 'yes'})
                cookies.update(browser.cookies)
            assert browser.get('/health').json() == {'status': 'ok'}
            return page.text

    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def serve(first: bool) -> str:
            visits: list[concurrent.futures.Future[str]] = []

            def say(line: str) -> None:
                if found := re.match(r'(http://127\.0\.0\.1:\d+)/admin is for administrators\n.*/enter\?PROL', line):
                    visits.append(pool.submit(visit, found[1], first))
                    visits[0].add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))

            start.serve(settings, say)
            return visits[0].result()

        page = serve(True)
        assert 'action="/instructions"' in page
        assert serve(False) == page


def test_likely_mistakes_are_said() -> None:
    one, other = (StudyModel(endpoint=EndpointSettings('http://127.0.0.1:9/v1', name)) for name in 'ab')
    models = {'x': one, 'y': other, 'z': one}
    (twice, codes) = start.doubts(StudySettings(models=models))
    assert 'models x and z' in twice
    assert 'panel.completed' in codes
    assert start.doubts(StudySettings(models={'x': one, 'y': other}, mode='rehearsal')) == []


def test_a_server_ends_once_its_store_is_lost(
    tmp_path: pathlib.Path, models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a supervisor to start it again."""
    endpoint = StudyModel(endpoint=EndpointSettings(models, 'm'))
    web, both = WebSettings(port=0), {'one': endpoint, 'two': endpoint}
    monkeypatch.setattr(Store, 'lost', 'the connection is lost')
    monkeypatch.setattr(start, 'WATCH_SECONDS', 0.1)
    with pytest.raises(StoreError, match=r'^the connection is lost$'):
        start.serve(settings_of(tmp_path, mode='rehearsal', web=web, models=both), [].append)
