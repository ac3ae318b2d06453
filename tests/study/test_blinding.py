"""Nothing that reaches a browser depends on the models but their replies' own words: names, order, speed, failures."""

import asyncio
import dataclasses
import itertools
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import itsdangerous
import pytest

from simrl.conversations.records import Message
from simrl.study.settings import StudySettings
from simrl.study.store import Store
from simrl.study.turns import Answer, Ask, ModelError
from tests.study.pages import NAMES, Browser, settings_of, study
from tests.study.studies import TASKS

SECONDS = 123.456


@dataclasses.dataclass
class Sent:
    """All that the application sends: an application around it."""

    app: Any
    messages: list[str] = dataclasses.field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def recorded(message: Any) -> None:
            kept = {name: value for name, value in message.items() if name != 'type'}
            self.messages.append(f'{scope["method"]} {scope["path"]} {kept}')
            await send(message)

        await self.app(scope, receive, recorded)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[..., StudySettings]:
    """Settings of studies with the same secret, ids of participants and times of cookies."""
    monkeypatch.setattr(secrets, 'token_bytes', lambda size: bytes(range(size)))  # the same draws in each run
    Store(settings_of(tmp_path).store, 'live').close()
    numbers = itertools.count()
    monkeypatch.setattr(itsdangerous.TimestampSigner, 'get_timestamp', lambda _: 1_800_000_000)

    def settings(**changes: object) -> StudySettings:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        shutil.copy(tmp_path / 'study.sqlite', folder)
        ids = (f'{number:016x}' for number in itertools.count(0xA0))
        monkeypatch.setattr(secrets, 'token_hex', lambda _: next(ids))
        return settings_of(folder, **changes)

    return settings


def sent_by(settings: StudySettings, ask: Ask) -> list[str]:
    """All that reaches the browser of somebody who takes part to the end."""

    async def go() -> list[str]:
        async with study(settings, tasks=TASKS) as (running, app):  # whose own words are none of those below
            running._ask = ask
            recorded = Sent(app)
            browser = await Browser(recorded, running).enter()  # type: ignore[arg-type]
            await browser.go_to('conversation')
            for choice in ('tie', 'b'):
                await browser.send('/message', message='Go on.')
                await browser.settle()
                await browser.get('/state')
                await browser.send('/vote', choice=choice, reason='It is clear.')
            await browser.get('/leave')
            await browser.get('/')
            await browser.go_to('over')
            return recorded.messages

    return asyncio.run(go())


def answers(first: str, second: str) -> Ask:
    """Models that answer with these texts, in the order of `NAMES`."""

    async def ask(model: str, _: Sequence[Message]) -> Answer:
        return Answer((first, second)[NAMES.index(model)], SECONDS, model == NAMES[1])

    return ask


def test_swapping_the_models_changes_the_words_of_replies_alone(fixed: Callable[..., StudySettings]) -> None:
    one = sent_by(fixed(), answers('Alpha', 'Bravo'))
    assert sum('Alpha' in message for message in one) > 2
    assert sum('Bravo' in message for message in one) > 2
    other = sent_by(fixed(), answers('Bravo', 'Alpha'))
    assert other != one
    assert [text.replace('Alpha', '\0').replace('Bravo', 'Alpha').replace('\0', 'Bravo') for text in other] == one
    models = fixed().models
    turned = sent_by(fixed(models=dict(reversed(models.items()))), answers('Bravo', 'Alpha'))
    assert turned == one
    for secret in (*NAMES, 'zebra', 'okapi', '123.456', 'pair', 'model', 'truncated'):
        # But for what tasks say.
        without = [re.sub('repair|programme pairs', '', message.lower()) for message in one]
        assert not [message for message in without if secret in message], secret


def test_the_model_that_fails_is_not_seen(fixed: Callable[..., StudySettings]) -> None:
    def fails(which: str) -> Ask:
        tries = itertools.count()

        async def ask(model: str, _: Sequence[Message]) -> Answer:
            if next(tries) < 6 and model == which:
                raise ModelError(f'{model} has no answer today')
            return Answer('The same', 0.0, False)

        return ask

    async def sent(settings: StudySettings, ask: Ask) -> str:
        async with study(settings, tasks=TASKS) as (running, app):
            running._ask = ask
            recorded = Sent(app)
            browser = await Browser(recorded, running).enter()  # type: ignore[arg-type]
            await browser.go_to('training')
            await browser.send('/message', message='Hello')
            for _ in range(2):
                await browser.settle()
                await browser.get('/state')
                await browser.send('/retry')
            await browser.settle()
            return '\n'.join(recorded.messages)

    found = [asyncio.run(sent(fixed(), fails(name))) for name in NAMES]
    assert found[0] == found[1]
    assert 'no answer today' not in found[0]


def test_a_reply_that_is_there_first_is_not_seen(fixed: Callable[..., StudySettings]) -> None:
    """Neither by the page nor by what a page asks for while it waits."""

    async def go() -> None:
        done, asked = {name: asyncio.Event() for name in NAMES}, list[str]()

        async def ask(model: str, _: Sequence[Message]) -> Answer:
            asked.append(model)
            await done[model].wait()
            return Answer(f'By {NAMES.index(model)}', 0.0, False)

        async with study(fixed()) as (running, app):
            running._ask = ask
            browser = await Browser(app, running).enter()
            await browser.go_to('training')
            await browser.send('/message', message='Hello')
            seen = []
            for name in (None, NAMES[1]):
                if name is not None:
                    done[name].set()
                for _ in range(20):
                    await asyncio.sleep(0)
                pages = [await browser.get(address) for address in ('/', '/state')]
                seen.append([(page.headers, page.text) for page in pages])
            assert sorted(asked) == sorted(NAMES)
            assert seen[0] == seen[1]
            done[NAMES[0]].set()
            await browser.settle()
            assert 'By 0' in browser.page.text
            assert 'By 1' in browser.page.text

    asyncio.run(go())
