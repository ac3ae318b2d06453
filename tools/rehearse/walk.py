"""One made-up participant, from the link of the panel to the completion code, with all that people do on the way."""

import asyncio
import dataclasses
import random
import ssl
import time
from collections.abc import Mapping
from typing import Literal

import httpx2

from simrl.conversations.records import Message
from simrl.study.texts import Texts
from tools.rehearse.pages import Page, read_page
from tools.rehearse.people import Person

# What the participant saw of an action: that it is stored; that another one was first; that it must be changed; that it
# failed; or nothing, since the server was gone.
Seen = Literal['confirmed', 'out of date', 'refused', 'failed', 'unknown']
GONE_SECONDS = 120.0  # for which a server that is gone is waited for
RETRY_SECONDS = 0.3
MOST_UNANSWERED = 12
READING = 0.25  # seconds per word, and for each action, times `Habits.pace`
ACTING = 4.0


@dataclasses.dataclass(frozen=True)
class Habits:
    """Chances of what people do besides what they are asked for: of each page, or of a participant.

    Attributes:
        leave: of a page, that nothing more is ever done.
        double: of a form, that it is sent twice at once.
        reload: of a page, that it is loaded twice.
        back: of a page, that the last form is sent once more.
        device: of a page, that the participant continues at another device.
        fail: of a participant, that all tries of the comprehension check are wrong.
        pace: times the seconds that people need to read and write; 0: none.
    """

    leave: float = 0.0
    double: float = 0.0
    reload: float = 0.0
    back: float = 0.0
    device: float = 0.0
    fail: float = 0.0
    pace: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value > 1 and field.name != 'pace'):
                raise ValueError(
                    f'--{field.name}: expected {"at least 0" if field.name == "pace" else "a chance"}, found {value:g}'
                )


@dataclasses.dataclass(frozen=True)
class Place:
    """The study that is visited.

    Attributes:
        texts: of its pages, for the right answers.
        least: words of the final text.
        tls: shared by all browsers, since making one takes longer than a page.
    """

    url: str
    texts: Texts
    least: int
    tls: ssl.SSLContext = dataclasses.field(default_factory=ssl.create_default_context)


@dataclasses.dataclass(frozen=True)
class Action:
    """A request of a participant.

    Attributes:
        path: of the form, or of the page.
        fields: of the form, without its token.
        replies: that the page showed when it was sent.
        seconds: until the answer; None where there was none.
        status: of HTTP; 0 where there was none.
    """

    path: str
    fields: Mapping[str, str]
    replies: tuple[str, str] | None
    seen: Seen
    seconds: float | None
    status: int


@dataclasses.dataclass
class Walk:
    """The way of a participant and its end.

    Attributes:
        panel_id: PROLIFIC_PID of their link.
        id: of the study, from their cookie; empty before the first page.
        code: of completion that they were shown.
        left: they left for good by `Habits.leave`.
        actions: in the order in which they were begun.
    """

    panel_id: str
    id: str = ''
    code: str = ''
    left: bool = False
    actions: list[Action] = dataclasses.field(default_factory=list)


class WalkError(RuntimeError):
    """A participant could not go on: a page that nobody should see, or a server that stays away."""


class Walker:
    """Goes through the study as one participant; `walk` has what happened, however it ends."""

    def __init__(
        self,
        place: 'Place',
        panel_id: str,
        person: Person,
        habits: Habits,
        draw: random.Random,
    ) -> None:
        self.place, self.person, self.habits, self.draw = place, person, habits, draw
        self.walk = Walk(panel_id)
        self.link = f'/enter?PROLIFIC_PID={panel_id}&STUDY_ID=rehearsal&SESSION_ID=s{panel_id}'
        self.said: list[Message] = []
        self.fails = draw.random() < habits.fail
        self.unanswered = 0  # messages in a row
        self.tried = 0  # makes each text another one, so that answers can be told apart
        self.last: tuple[str, dict[str, str], tuple[str, str] | None] | None = None

    async def run(self) -> Walk:
        """Walks to the end.

        Raises:
            WalkError: a page is an error, or the server stays away.
        """
        client = self._browser()
        try:
            page = await self._get(client, self.link)
            while page.forms or page.is_waiting:
                if self._does(self.habits.leave):
                    self.walk.left = True
                    return self.walk
                if self._does(self.habits.device):
                    await client.aclose()
                    client = self._browser()
                    page = await self._get(client, self.link)
                if self._does(self.habits.reload):
                    page = await self._get(client, '/')
                if self.last is not None and self._does(self.habits.back):
                    await self._send(client, *self.last)
                    page = await self._get(client, '/')
                page = await self._wait(client, page) if page.is_waiting else await self._act(client, page)
            if not page.code:
                raise WalkError('expected a completion code on the last page, found none')
            self.walk.code = page.code
            return self.walk
        finally:
            await client.aclose()

    def _browser(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.place.url, timeout=60.0, verify=self.place.tls)

    def _does(self, chance: float) -> bool:
        return self.draw.random() < chance

    async def _get(self, client: httpx2.AsyncClient, path: str) -> Page:
        """A page, after its redirects."""
        until = time.monotonic() + GONE_SECONDS
        while True:
            start = time.monotonic()
            try:
                response = await client.get(path)
                while response.is_redirect:
                    response = await client.get(response.headers['location'])
            except httpx2.HTTPError as error:
                self._note(path, {}, None, 'unknown', None, 0)
                if time.monotonic() > until:
                    raise WalkError(f'GET {path}: no answer for {GONE_SECONDS:g} s: {error!r}') from error
                await asyncio.sleep(RETRY_SECONDS)
                continue
            good = response.status_code == 200
            seconds = time.monotonic() - start
            self._note(path, {}, None, 'confirmed' if good else 'failed', seconds, response.status_code)
            if response.status_code == 503 and time.monotonic() < until:  # it drains, or cannot store just now
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if not good:
                raise WalkError(f'GET {path}: expected status 200, found {response.status_code}')
            self.walk.id = self.walk.id or (client.cookies.get('study') or '').partition('.')[0]
            return read_page(response.text)

    async def _wait(self, client: httpx2.AsyncClient, page: Page) -> Page:
        """The page once its replies are there, which its script asks for."""
        until = time.monotonic() + GONE_SECONDS * 10
        while time.monotonic() < until:
            await asyncio.sleep(self.draw.uniform(0.5, 1.5) * 0.5)
            start = time.monotonic()
            try:
                response = await client.get('/state')
            except httpx2.HTTPError:
                continue  # the page tries again, too
            seconds = time.monotonic() - start
            self._note('/state', {}, None, 'confirmed', seconds, response.status_code)
            if response.status_code == 200 and response.json()['version'] != page.version:
                return await self._get(client, '/')
        raise WalkError('no replies')

    async def _act(self, client: httpx2.AsyncClient, page: Page) -> Page:
        """Does what the page asks for; the page after it."""
        path, fields = await self._answer(page)
        words = sum(len(text.split()) for text in (*(page.replies or ()), *fields.values()))
        seconds = self.habits.pace * (ACTING + READING * words) * self.draw.uniform(0.7, 1.5)
        await asyncio.sleep(seconds)
        written = sum(map(len, fields.values()))
        fields = {**page.forms[path], **fields}
        if 'typed' in fields:
            fields |= {'typed': str(written), 'pasted': '0', 'seconds': f'{seconds:.1f}'}
        self.last = path, fields, page.replies
        sends = [self._send(client, *self.last) for _ in range(2 if self._does(self.habits.double) else 1)]
        seen = await asyncio.gather(*sends)
        self.unanswered = 0 if page.replies else self.unanswered + (path in ('/message', '/retry'))
        if self.unanswered > MOST_UNANSWERED:
            raise WalkError(f'expected replies, found none to {self.unanswered} messages in a row')
        if path == '/vote' and 'confirmed' in seen and page.replies:
            kept = fields['choice'] if fields['choice'] != 'tie' else 'a'
            self.said.append(Message('assistant', page.replies['ab'.index(kept)]))
        return await self._get(client, '/')

    async def _send(
        self, client: httpx2.AsyncClient, path: str, fields: Mapping[str, str], replies: tuple[str, str] | None
    ) -> Seen:
        place = len(self.walk.actions)
        self._note(path, fields, replies, 'unknown', None, 0)  # until there is an answer
        start = time.monotonic()
        try:
            response = await client.post(path, data=dict(fields))
        except httpx2.HTTPError:
            await asyncio.sleep(RETRY_SECONDS)
            return 'unknown'
        seen: Seen = 'failed'
        if response.status_code == 303:
            seen = 'out of date' if 'out_of_date' in response.headers['location'] else 'confirmed'
        elif response.status_code == 422:
            seen = 'refused'
        elif response.status_code == 503:
            seen = 'unknown'  # it drains, or its store has no room
            await asyncio.sleep(RETRY_SECONDS)
        self.walk.actions[place] = dataclasses.replace(
            self.walk.actions[place], seen=seen, seconds=time.monotonic() - start, status=response.status_code
        )
        if seen == 'refused':
            raise WalkError(f'POST {path}: refused: {read_page(response.text).errors}')
        if seen == 'failed':
            raise WalkError(f'POST {path}: expected status 303, found {response.status_code}')
        return seen

    def _note(
        self,
        path: str,
        fields: Mapping[str, str],
        replies: tuple[str, str] | None,
        seen: Seen,
        seconds: float | None,
        status: int,
    ) -> None:
        shown = {name: value for name, value in fields.items() if name not in ('csrf', 'version')}
        self.walk.actions.append(Action(path.partition('?')[0], shown, replies, seen, seconds, status))

    async def _answer(self, page: Page) -> tuple[str, dict[str, str]]:
        """The form of the page that is sent, and what is filled in."""
        forms = page.forms
        self.tried += 1
        if '/consent' in forms:
            return '/consent', {'agreed': 'yes'}
        if '/instructions' in forms:
            return '/instructions', {}
        if '/check' in forms:
            wrong = int(self.fails)
            return '/check', {
                f'answer_{i}': str((question.right + wrong) % len(question.options))
                for i, question in enumerate(self.place.texts.check)
            }
        if '/task' in forms:
            notes = {name: f'A thought ({self.tried}).' for name in forms['/task'] if name.startswith('note_')}
            return '/task', {'task': self.draw.choice(list(page.options['/task']['task'])), **notes}
        if '/vote' in forms:
            assert page.replies is not None
            message = self.said[-1].content if self.said else ''
            choice, reason = await self.person.vote(page.task, message, *page.replies)
            return '/vote', {'choice': choice, 'reason': f'{reason} ({self.tried})'}
        if '/text' in forms:
            text = await self.person.text(page.task, self.said, self.place.least)
            return '/text', {'text': f'{text} ({self.tried})', 'attention': str(self.place.texts.attention.right)}
        if '/retry' in forms:
            return '/retry', {}
        if '/conclude' in forms:
            return '/conclude', {}
        message = await self.person.message(page.task, self.said)
        self.said.append(Message('user', message))
        return '/message', {'message': f'{message} ({self.tried})'}
