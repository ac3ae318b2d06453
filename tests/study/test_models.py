"""Models behind endpoints and in a child, and moderation, against servers by a script."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import httpx2
import pytest

from simrl.conversations.records import Message
from simrl.conversations.sentencepiece import sentencepiece_chat, train_sentencepiece
from simrl.models.files.export import export
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.serving.prompts import MessagesError, chat_prompt
from simrl.serving.settings import ServeSettings
from simrl.serving.shapes import EngineSettings
from simrl.study import models, probe
from simrl.study.models import ask_endpoints, open_models, running_server
from simrl.study.moderation import open_moderation
from simrl.study.probe import Fault
from simrl.study.settings import StudyModel, StudySettings, TaskSettings
from simrl.study.turns import Answer, ModelError
from tests.remote.server import Body, Hang, Reply, ScriptedServer, Status, chat_reply, wait_until
from tests.serving import scene

HELLO = [Message('user', 'Hello')]
# A server of models without models: it says its settings and its pid, and ends with stdin.
CHILD = """
import http.server, json, os, sys, threading
settings = json.loads(sys.stdin.readline())
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([settings['models'], os.getpid()]).encode())
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(('127.0.0.1', settings['http']['port']), Handler)
print('first: loading', flush=True)
print(f'http://127.0.0.1:{server.server_port}/v1 serves first', flush=True)
server.serve_forever()
"""
SERVE = ServeSettings(models=('first=a', 'second=b'))


def endpoint(url: str, **fields: Any) -> EndpointSettings:
    return EndpointSettings(url, **{'model': 'model', 'backoff': 0.01, 'tries': 2, 'in_flight': 4} | fields)


async def asked(server: ScriptedServer, task: TaskSettings = TaskSettings(), **fields: Any) -> Answer:
    with Endpoint(endpoint(server.url, **fields)) as opened:
        return await ask_endpoints({'name': opened}, task)('name', HELLO)


def test_a_model_is_told_the_conversation_alone() -> None:
    bodies: list[dict[str, Any]] = []

    def script(body: dict[str, Any], _: int) -> Reply:
        bodies.append(body)
        return chat_reply('Hi.', finish='length', seconds=0.05)

    with ScriptedServer(script) as server:
        answer = asyncio.run(asked(server, TaskSettings(temperature=0.7, max_tokens=9)))
    assert (answer.text, answer.cut) == ('Hi.', True)
    assert 0.05 <= answer.seconds < 5
    assert [(body['messages'], body['temperature'], body['max_tokens']) for body in bodies] == [
        ([{'role': 'user', 'content': 'Hello'}], 0.7, 9)
    ]


@pytest.mark.parametrize(
    ('reply', 'cause'),
    [(Status(500), 'server'), (Status(401), 'refused'), (chat_reply(''), 'empty'), (Body(b'no'), 'protocol')],
)
def test_a_model_that_fails_says_why(reply: Reply, cause: str) -> None:
    sent: list[int] = []

    def script(body: dict[str, Any], _: int) -> Reply:
        sent.append(body['max_tokens'])
        return reply

    with ScriptedServer(script) as server, pytest.raises(ModelError, match=f'^{cause}: '):
        asyncio.run(asked(server, TaskSettings(max_tokens=64)))
    assert set(sent) == {64}


def test_a_reply_fits_what_the_context_has_left() -> None:
    sent: list[int] = []

    def script(body: dict[str, Any], _: int) -> Reply:
        sent.append(body['max_tokens'])
        full = b'{"error": {"message": "max_tokens: expected at most 60, which the model\'s context leaves"}}'
        return chat_reply('Hi.') if body['max_tokens'] <= 60 else Status(400, full)

    with ScriptedServer(script) as server:
        assert asyncio.run(asked(server, TaskSettings(max_tokens=200))).text == 'Hi.'
        assert sent == [200, 100, 50]
        with pytest.raises(ModelError, match=r'^refused: status 400.*context'):
            asyncio.run(asked(server, TaskSettings(max_tokens=1000)))
        assert sent[3:] == [1000, 500, 250, 125]


def opinion(**result: Any) -> Reply:
    return Body(json.dumps({'results': [result]}).encode())


def test_moderation_lets_pass_refuses_or_fails() -> None:
    replies: dict[str, Reply] = {
        'Hello': opinion(flagged=False),
        'bad': opinion(flagged=True, categories={'violence': True, 'hate': False, 'threats': True}),
        'worse': opinion(flagged=True),
        'odd': opinion(flagged='perhaps'),
        'none': Body(b'{"results": []}'),
        'no JSON': Body(b'<html>'),
        'denied': Status(403),
        'broken': Status(503),
        'late': Hang(),
    }

    async def opinions() -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        async with open_moderation(endpoint(server.url, try_seconds=0.3)) as moderate:
            for message in replies:
                try:
                    found[message] = await moderate(message)
                except ModelError as error:
                    found[message] = f'! {error}'
        return found

    sent = collections.Counter[str]()

    def script(body: dict[str, Any], _: int) -> Reply:
        sent[body['input']] += 1
        return replies[body['input']]

    with ScriptedServer(script) as server:
        found = asyncio.run(opinions())
    assert {message for message, number in sent.items() if number > 1} == {
        'Hello',
        'broken',
        'late',
    }  # one of them before anybody came
    assert [found['Hello'], found['bad'], found['worse']] == [None, 'violence, threats', 'flagged']
    expected = {
        'odd': 'expected one result with flagged',
        'none': 'expected one result with flagged',
        'no JSON': "found '<html>'",
        'denied': 'status 403',
        'broken': 'status 503',
        'late': 'no reply in 0.3 s',
    }
    for message, part in expected.items():
        assert str(found[message]).startswith('! moderation: ')
        assert part in str(found[message])


def test_a_moderation_that_failed_once_is_asked_again() -> None:
    async def opinion_of(message: str) -> str | None:
        async with open_moderation(endpoint(server.url, tries=3)) as moderate:
            return await moderate(message)

    def script(_: dict[str, Any], before: int) -> Reply:
        return Status(429) if before < 2 else opinion(flagged=True)

    with ScriptedServer(script) as server:
        assert asyncio.run(opinion_of('mine')) == 'flagged'


def test_nobody_is_let_in_without_models_and_moderation() -> None:
    async def opened(first: EndpointSettings, moderation: EndpointSettings | None = None) -> None:
        settings = StudySettings(
            models={'first': StudyModel(endpoint=first), 'second': StudyModel(endpoint=first)}, moderation=moderation
        )
        async with open_models(settings, [].append) as (ask, moderate):
            assert (moderate is None) == (moderation is None)
            assert (await ask('second', HELLO)).text == 'Hi.'

    def script(body: dict[str, Any], _: int) -> Reply:
        return Status(500) if 'input' in body else chat_reply('Hi.')

    with ScriptedServer(script) as server:
        asyncio.run(opened(endpoint(server.url)))
        with pytest.raises(EndpointError, match="expected the model 'other', found model"):
            asyncio.run(opened(endpoint(server.url, model='other')))
        with pytest.raises(EndpointError, match='moderation: status 500'):
            asyncio.run(opened(endpoint(server.url), endpoint(server.url)))
        with pytest.raises(EndpointError, match='environment variable NO_SUCH_KEY'):
            asyncio.run(opened(endpoint(server.url, key_variable='NO_SUCH_KEY')))
    with pytest.raises(EndpointError, match='expected a reply, found none'):
        asyncio.run(opened(endpoint(server.url)))


CONCIERGE = sentencepiece_chat(
    train_sentencepiece(['please help me find thai food in the west', 'ok thanks ?'] * 9, 45)
)


def test_a_model_that_cannot_read_what_people_write_is_named_before_anybody_is_let_in() -> None:
    """One of the concierge world refuses capital letters: a live study does not begin, a rehearsal warns."""

    def script(body: dict[str, Any], _: int) -> Reply:
        if body['model'] != 'concierge':
            return Status(401) if body['model'] == 'closed' else chat_reply('')
        try:
            chat_prompt(CONCIERGE, [Message('user', body['messages'][0]['content'])])
        except MessagesError as error:
            return Status(400, json.dumps({'error': {'message': str(error)}}).encode())
        return chat_reply('ok')

    async def opened(name: str, mode: Literal['live', 'rehearsal']) -> None:
        both = {key: StudyModel(endpoint=endpoint(server.url, model=of)) for key, of in (('a', 'm'), ('b', name))}
        async with open_models(StudySettings(models=both, mode=mode), told.append, 'the west'):
            pass

    told: list[str] = []
    with ScriptedServer(script, models=('m', 'concierge', 'closed')) as server:
        problem = (
            'the model b cannot read capital letters, digits, punctuation: refused: status 400, .*'
            r'the tokenizer has no token for .* \(U\+00..\)'
        )
        with pytest.raises(EndpointError, match=f'^{problem}'):
            asyncio.run(opened('concierge', 'live'))
        asyncio.run(opened('m', 'live'))
        assert not told
        asyncio.run(opened('concierge', 'rehearsal'))
        asyncio.run(opened('closed', 'rehearsal'))
    assert re.match(f'^warning: {problem}', told[0])
    assert re.match('^warning: the model b refuses all messages: refused: status 401', told[1])
    assert len(told) == 2


def test_a_model_that_does_not_answer_yet_is_only_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(model: str, conversation: Sequence[Message]) -> Answer:
        if model == 'slow':
            await asyncio.sleep(60)
        raise ModelError('server: status 503', 'server')

    monkeypatch.setattr(probe, 'PROBE_SECONDS', 0.02)
    found = [asyncio.run(probe.unread(ask, name)) for name in ('slow', 'down')]
    assert found == [
        Fault('the model slow did not answer an ordinary message: no answer in 0.02 s', is_final=False),
        Fault('the model down did not answer an ordinary message: server: status 503', is_final=False),
    ]


def said(url: str) -> list[Any]:
    """Returns the models of a child, and its pid."""
    found: list[Any] = httpx2.get(url, timeout=5).json()
    return found


@contextlib.asynccontextmanager
async def child(script: str = CHILD) -> AsyncIterator[models.Server]:
    async with running_server(SERVE, [sys.executable, '-c', script]) as server:
        yield server


def test_a_child_that_dies_is_started_again_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, 'RESTART_SECONDS', (0.01, 0.01))

    async def pids() -> tuple[int, int]:
        async with child() as server:
            url = server.url
            names, first = said(url)
            assert names == ['first=a', 'second=b']
            os.kill(first, signal.SIGKILL)
            async with asyncio.timeout(30):
                while not server.listening.is_set() or server.process is None or server.process.pid == first:
                    await asyncio.sleep(0.01)
            assert server.url == url
            return first, said(url)[1]

    first, second = asyncio.run(pids())
    assert second != first
    with pytest.raises(ProcessLookupError):  # it ended with the study
        os.kill(second, 0)


def test_a_child_that_cannot_serve_ends_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    async def start() -> None:
        async with child('import sys; sys.exit("error: no such model")'):
            raise AssertionError('it began')

    with pytest.raises(EndpointError, match=r'^the server of first=a, second=b ended with exit code 1 before it'):
        asyncio.run(start())
    assert 'error: no such model' in capfd.readouterr().err


def test_a_child_ends_when_the_study_is_killed(tmp_path: pathlib.Path) -> None:
    script = tmp_path / 'child.py'
    script.write_text(CHILD)
    study = f"""
import asyncio, sys
from simrl.serving.prompts import MessagesError, chat_prompt
from simrl.serving.settings import ServeSettings
from simrl.study.models import running_server
async def main():
    async with running_server(ServeSettings(models=('a=b',)), [sys.executable, {str(script)!r}]) as server:
        print(server.url, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, '-c', study], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        while not (line := killed.stdout.readline()).startswith('http'):
            assert line
        url = line.strip()
        assert said(url)[0] == ['a=b']
        killed.kill()

    def is_over() -> bool:
        try:
            said(url)
        except httpx2.HTTPError:
            return True
        return False

    wait_until(is_over, 30)


@pytest.mark.long
def test_models_are_served_by_default(tmp_path: pathlib.Path) -> None:
    """Half a minute: a model is loaded twice, and its programs are compiled."""
    tokenizer, folder = scene.TOKENIZER, tmp_path / 'model'
    tokenizer.eos_token = '<|im_end|>'
    export(scene.params(), dataclasses.replace(scene.CONFIG, vocab_size=len(tokenizer)), tokenizer, folder)
    settings = StudySettings(
        models={'first': StudyModel(source=str(folder)), 'second': StudyModel(source=str(folder))},
        engine=EngineSettings(rows=2, context=128, chunk=16, block=4),
        task=TaskSettings(max_tokens=8, temperature=0.0),
    )

    said: list[str] = []

    async def answers() -> list[Answer]:
        async with open_models(settings, said.append) as (ask, moderate):
            assert moderate is None
            return await asyncio.gather(ask('first', HELLO), ask('second', HELLO))

    first, second = asyncio.run(answers())
    assert (first.text, first.cut) == (second.text, second.cut)
    assert first.text
    assert not said
