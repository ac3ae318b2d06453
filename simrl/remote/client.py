"""Calls of an endpoint: at most so many in flight, each with bounded tries and a deadline, every outcome counted.

1. `submit` returns at once; a thread of the endpoint asks the cache, then the server.
2. A try that may succeed later (`answers.TRIED_AGAIN`) is repeated after a jittered exponential back-off, or after the
   server's Retry-After, until the call's tries or its deadline are over. A call keeps its place in flight while it
   waits, so an endpoint that limits its rate is asked less often.
3. `Pending.result` returns answers and failures in the order of the requests; the failure of one loses no other.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx2

from simrl.conversations.completion import Complete, Failed, NoText
from simrl.conversations.records import Message
from simrl.remote.answers import ANSWERED, TRIED_AGAIN, Answer, Failure, Outcome, read_stored, stored
from simrl.remote.cache import Cache
from simrl.remote.requests import ChatRequest, Request, body_of, key_of
from simrl.remote.settings import EndpointError, EndpointSettings, read_key
from simrl.remote.transport import hiding, open_clients, post, served_models
from simrl.remote.usage import Usage
from simrl.rollouts.token_sampling import Sampling
from simrl.run.progress import Progress

POLL_SECONDS = 1.0  # between two looks at the progress of calls
LISTED = 20  # models that an error lists


class SpendCapError(EndpointError):
    """The spend cap is reached. `outcomes`: of all calls; those that were not sent have the cause 'spend_cap'."""

    def __init__(self, text: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__(text)
        self.outcomes = outcomes


@dataclasses.dataclass
class Tally:
    """Counts of the finished calls among those of a `submit`; the endpoint's thread writes them."""

    finished: int = 0
    failed: int = 0
    tokens: int = 0  # sampled for them

    def add(self, outcome: Outcome) -> None:
        self.failed += isinstance(outcome, Failure)
        self.tokens += 0 if outcome.cached else outcome.output_tokens
        self.finished += 1


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """Calls that were submitted."""

    size: int
    future: concurrent.futures.Future[list[Outcome]]
    tally: Tally
    settings: EndpointSettings

    def done(self) -> bool:
        return self.future.done()

    def result(self, name: str = '') -> list[Outcome]:
        """The outcomes, in the order of the requests, once all calls are over.

        Args:
            name: of the progress lines. Empty: none.

        Raises:
            SpendCapError: calls were not sent.
            EndpointError: the server counts no tokens, though there is a cap.
            CacheError: the cache cannot be written.
        """
        if name:
            self._show(name)
        outcomes = self.future.result()
        if unsent := sum(isinstance(outcome, Failure) and outcome.cause == 'spend_cap' for outcome in outcomes):
            raise SpendCapError(
                f'{self.settings.url}: spend_cap of {self.settings.spend_cap:g} reached: {unsent} of {self.size} calls '
                'were not sent. Answers in the cache stay: raise spend_cap, and the same command continues',
                outcomes,
            )
        return outcomes

    def _show(self, name: str) -> None:
        """Shows progress until all calls are over; rates are of the calls that end meanwhile."""
        start, before, over = time.monotonic(), dataclasses.replace(self.tally), False
        last = before
        with Progress(name, self.size, done=before.finished) as progress:
            while not over:
                over = bool(concurrent.futures.wait([self.future], timeout=POLL_SECONDS).done)
                tally = dataclasses.replace(self.tally)
                if tally.finished > last.finished:
                    rate = (tally.finished - before.finished) / max(time.monotonic() - start, 1e-9)
                    note = f'{rate:.1f} calls/s' + (f', {tally.failed} failed' if tally.failed else '')
                    progress.update(tally.finished - last.finished, tokens=tally.tokens - last.tokens, note=note)
                    last = tally


class Endpoint:
    """A client of one model, with a thread of its own, for use in a `with` statement.

    Args:
        cache: where answers are kept; the caller closes it. None: nowhere.

    Raises:
        EndpointError: its key is not in the environment.
    """

    def __init__(self, settings: EndpointSettings, *, cache: Cache | None = None) -> None:
        self.settings = settings
        self._cache = cache
        key = read_key(settings)
        self._hide = hiding(key)
        self._clients = open_clients(settings, key)
        self._free: asyncio.LifoQueue[httpx2.AsyncClient] = asyncio.LifoQueue()
        for client in self._clients:
            self._free.put_nowait(client)
        self._jitter = random.Random()  # no part of any result
        self._counts: collections.Counter[str] = collections.Counter()
        self._failures: collections.Counter[str] = collections.Counter()
        self._first_details: dict[str, str] = {}
        self._failed_tries: collections.Counter[str] = collections.Counter()
        self._cost = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f'endpoint {settings.model}', daemon=True)
        self._thread.start()

    def __enter__(self) -> 'Endpoint':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls in flight, and the thread."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def check_for(self, requests: Sequence[Request]) -> None:
        """As `check`, unless the cache has an outcome of each request: then no server is needed.

        Raises:
            EndpointError: no reply, or the model is not served.
        """
        keys = (key_of(request, body_of(request, self.settings)) for request in requests)
        if any(self._cache is None or self._cache.get(key) is None for key in keys):
            check(self.settings)

    def submit(self, requests: Sequence[Request]) -> Pending:
        """Begins calls and returns at once."""
        calls, tally = [(request, body_of(request, self.settings)) for request in requests], Tally()
        future = asyncio.run_coroutine_threadsafe(self._all(calls, tally), self._loop)
        return Pending(len(calls), future, tally, self.settings)

    def call(self, requests: Sequence[Request], name: str = '') -> list[Outcome]:
        """`submit`, then `Pending.result`."""
        return self.submit(requests).result(name)

    def usage(self) -> Usage:
        """Sums since it was opened."""
        return Usage(
            **{name: self._counts[name] for name in ('calls', 'cached', 'tries', 'input_tokens', 'output_tokens')},
            failures=dict(self._failures),
            failed_tries=dict(self._failed_tries),
            cost=self._cost,
        )

    def first_details(self) -> dict[str, str]:
        """The detail of the first call that failed, by cause."""
        return dict(self._first_details)

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients:
            await client.aclose()

    async def _all(self, calls: Sequence[tuple[Request, dict[str, Any]]], tally: Tally) -> list[Outcome]:
        async def one(request: Request, body: dict[str, Any]) -> Outcome:
            outcome = await self._answer(request, body)
            self._counts['calls'] += 1
            if isinstance(outcome, Failure):
                self._failures[outcome.cause] += 1
                self._first_details.setdefault(outcome.cause, outcome.detail)
            tally.add(outcome)
            return outcome

        tasks = [asyncio.ensure_future(one(*call)) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:  # no failure of a call: the others would be lost
            for task in tasks:
                task.cancel()
            raise

    async def _answer(self, request: Request, body: dict[str, Any]) -> Outcome:
        """The outcome of one call: of the cache, or of the server."""
        key, content = key_of(request, body), json.dumps(body).encode()
        if (cached := self._cached(key, request)) is not None:
            return cached
        client = await self._free.get()
        try:
            if self._over_cap():
                return Failure('spend_cap', f'expected to spend at most {self.settings.spend_cap:g}')
            return await self._call(client, request, key, content)
        finally:
            self._free.put_nowait(client)

    def _cached(self, key: str, request: Request) -> Outcome | None:
        found = None if self._cache is None else self._cache.get(key)
        if found is None:
            return None
        self._counts['cached'] += 1
        return read_stored(found, request, cached=True)

    def _over_cap(self) -> bool:
        cap, cache = self.settings.spend_cap, self._cache
        return cap is not None and (self._cost if cache is None else cache.spent(self.settings.model)) >= cap

    async def _call(self, client: httpx2.AsyncClient, request: Request, key: str, content: bytes) -> Outcome:
        """Tries until there is an outcome that stays, the tries are over, or the deadline is."""
        settings, clock = self.settings, self._loop.time
        start, number = clock(), 0
        while True:
            left = start + settings.deadline - clock()
            outcome, retry_after = await post(client, request, content, min(left, settings.try_seconds), self._hide)
            outcome = self._paid(outcome, request, key)
            if isinstance(outcome, Answer) or outcome.cause not in TRIED_AGAIN:
                return outcome
            self._failed_tries[outcome.cause] += 1
            wait, number = self._pause(number, retry_after), number + 1
            if number == settings.tries or clock() - start + wait >= settings.deadline:
                asked = '' if retry_after is None else f', asked to wait {retry_after:.0f} s'
                detail = f'{outcome.detail}; tries: {number}, {clock() - start:.1f} s{asked}'
                return dataclasses.replace(outcome, detail=detail)
            await asyncio.sleep(wait)

    def _paid(self, outcome: Outcome, request: Request, key: str) -> Outcome:
        """Counts what a try cost, and keeps its outcome if the model answered."""
        settings = self.settings
        cost = settings.cost(outcome.input_tokens, outcome.output_tokens)
        self._counts['tries'] += 1
        self._counts['input_tokens'] += outcome.input_tokens
        self._counts['output_tokens'] += outcome.output_tokens
        self._cost += cost
        is_answered = isinstance(outcome, Answer) or bool(outcome.raw)
        if isinstance(outcome, Failure) and self._cache is not None and (outcome.raw or cost):
            self._cache.put_failure(key, outcome.cause, outcome.detail, outcome.raw, model=settings.model, cost=cost)
        if settings.spend_cap is not None and is_answered and not outcome.input_tokens:
            raise EndpointError(
                f'{settings.url}: expected the usage (prompt_tokens and completion_tokens) in each reply, by which '
                'spend_cap is kept, found none: set spend_cap to None'
            )
        if self._cache is None or (isinstance(outcome, Failure) and outcome.cause not in ANSWERED):
            return outcome
        unpaid = cost if isinstance(outcome, Answer) else 0.0
        kept = self._cache.put(key, stored(outcome), model=settings.model, cost=unpaid)
        return read_stored(kept, request, cached=False)

    def _pause(self, number: int, retry_after: float | None) -> float:
        """Seconds before the next try: at least those that the server asks for; jitter spreads the calls."""
        settings = self.settings
        backoff = min(settings.backoff * 2**number, settings.max_backoff)
        if retry_after is not None:
            return retry_after + self._jitter.uniform(0, settings.backoff)
        return backoff * self._jitter.uniform(0.5, 1)


def check(settings: EndpointSettings) -> None:
    """Asks an endpoint for its models.

    Raises:
        EndpointError: no key, no reply, or the model is not among them.
    """
    _check_model(settings, served_models(settings, read_key(settings)))


def with_model(settings: EndpointSettings, model: str | None) -> EndpointSettings:
    """The settings with the model of that name; None: the only one that the endpoint has.

    Raises:
        EndpointError: as of `check`; or there are several models and no name.
    """
    models = served_models(settings, read_key(settings))
    if model is None and len(models) != 1:
        raise EndpointError(f'{settings.url}: expected the name of one of its models ({_listed(models)}), found none')
    found = dataclasses.replace(settings, model=models[0] if model is None else model)
    _check_model(found, models)
    return found


def _check_model(settings: EndpointSettings, models: Sequence[str]) -> None:
    if settings.model not in models:
        found = _listed(models)
        raise EndpointError(f'{settings.url}: expected the model {settings.model!r}, found {found}')


def _listed(models: Sequence[str]) -> str:
    more = f' and {len(models) - LISTED} more' if len(models) > LISTED else ''
    return ', '.join(models[:LISTED]) + more or 'none'


def complete(endpoint: Endpoint, *, max_tokens: int, sampling: Sampling, version: str, name: str = '') -> Complete:
    """The function from chats to their next messages; a message that max_tokens cut is a failure.

    Args:
        version: of the prompts.
        name: of the progress lines; empty: none.

    The function raises EndpointError where the endpoint must be asked, and does not answer or has not the model.
    """

    def text(outcome: Outcome) -> str | Failed:
        if isinstance(outcome, Failure):
            return outcome
        return NoText('length') if outcome.truncated else outcome.text

    def complete_all(chats: Sequence[Sequence[Message]], attempt: int) -> list[str | Failed]:
        requests = [
            ChatRequest(messages=tuple(chat), max_tokens=max_tokens, sampling=sampling, sample=attempt, version=version)
            for chat in chats
        ]
        endpoint.check_for(requests)
        return list(map(text, endpoint.call(requests, name)))

    return complete_all
