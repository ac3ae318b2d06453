"""A model that answers requests in batches: a queue, the rows of `slots.py`, and one step of both after another.

One thread owns the device and calls `Engine.step` (`run`). A step

1. waits for the block of the step before, and delivers what frees a row or decides what may come next,
2. gives free rows to requests that wait; a prompt's longest common prefix with any row's tokens is not fed again,
3. launches the feeding of prompts, a chunk at a time, and a block of sampled tokens for the rows that are fed,
4. delivers the rest of 1 while this block runs.

A request that comes while a block runs is part of the next one. Where a text ends an answer, the row's next block is
already under way; what it sampled is dropped. A row under a constraint samples one token in a block.
"""

import collections
import dataclasses
import functools
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from simrl.conversations.chat import Chat
from simrl.rollouts.agents import Policy
from simrl.run.compiles import compilations
from simrl.serving.device import DeviceRows
from simrl.serving.generation import (
    MAX_STOP_IDS,
    Cause,
    Event,
    Failure,
    Finish,
    Generation,
    Load,
    Piece,
    QueueFullError,
)
from simrl.serving.rows import FeedCall, Request, Row, place, scores_of
from simrl.serving.shapes import EngineSettings
from simrl.serving.slots import Block, Scores
from simrl.serving.text import AnswerText

FEEDS_AT_ONCE = 4  # calls of `feed` between two blocks, at most: rows that sample wait for them
MOST_FED = 3  # rows that sample for each that waits for its prompt, at which they wait for one call only
RATE_SECONDS = 10.0  # that a rate is of
MOST_FIRST_SECONDS = 2**16  # that are kept for `load`, which nobody may call


class Engine:
    """A model that answers; see `generation.Serving`. `step` is called by one thread, the other methods by any."""

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        settings: EngineSettings,
        wake: threading.Condition,
        *,
        knows_terminal: bool,
        on_program: Callable[[], None] = lambda: None,
    ) -> None:
        """Compiles the programs.

        Args:
            policy: ready to sample; its mask is that of chats. Its filters and temperature are not used.
            knows_terminal: whether the terminal token is one of the whole vocabulary.
            wake: notified when there is something to do.
            on_program: called after each compiled program.
        """
        self._chat, self._settings, self._wake = chat, settings, wake
        self._shapes = settings.shapes(policy.spec.config)
        self._ends = end_ids(chat)
        vocabulary = np.arange(policy.spec.config.padded_vocab_size) < chat.size - (not knows_terminal)
        self._device = DeviceRows(policy, vocabulary, self._ends, self._shapes, on_program)
        self._rows = [Row(index) for index in range(self._shapes.rows)]
        self._waiting = collections.deque[Request]()
        self._cancelled = set[int]()
        self._numbers = itertools.count(1)
        self._counts: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()
        self._sampled_at = collections.deque[tuple[float, int]]()
        self._first_seconds = collections.deque[float](maxlen=MOST_FIRST_SECONDS)
        self._request_seconds = 1.0  # of the last requests, a moving mean
        self.compilations: Callable[[], int] = lambda: 0

    @property
    def context(self) -> int:
        return self._shapes.context

    @property
    def queue(self) -> int:
        return self._settings.queue

    def submit(self, generation: Generation, deliver: Callable[[Event], None]) -> int:
        self._check(generation)
        text = AnswerText(
            self._chat,
            stop=generation.stop,
            keep_stop=generation.keep_stop,
            keep_special=generation.keep_special,
            after=generation.prompt if generation.vocabulary == 'all' else (),
        )
        with self._wake:
            if len(self._waiting) >= self._settings.queue:
                self._counts['refused'] += 1
                raise QueueFullError(max(1.0, self._request_seconds * len(self._waiting) / self._shapes.rows))
            request = Request(next(self._numbers), generation, deliver, time.monotonic(), text)
            self._waiting.append(request)
            self._wake.notify_all()
            return request.number

    def cancel(self, number: int) -> None:
        with self._wake:
            self._cancelled.add(number)
            self._wake.notify_all()

    def load(self) -> Load:
        now = time.monotonic()
        with self._wake:
            first = tuple(self._first_seconds)
            self._first_seconds.clear()
            recent = sum(count for at, count in self._sampled_at if at > now - RATE_SECONDS)
            return Load(
                waiting=len(self._waiting),
                active=sum(row.request is not None for row in self._rows),
                rows=len(self._rows),
                prompt_tokens_total=self._counts['prompt'],
                cached_tokens_total=self._counts['cached'],
                sampled_tokens_total=self._counts['sampled'],
                finished_total=dict(self._finished),
                refused_total=self._counts['refused'],
                tokens_per_second=recent / RATE_SECONDS,
                first_token_seconds=first,
                compiled=self.compilations(),
            )

    @property
    def busy(self) -> bool:
        """True if `step` has something to do; read with `wake` held."""
        return bool(self._waiting or self._device.busy or any(row.request is not None for row in self._rows))

    def step(self) -> None:
        """One step; see the module. A fault fails all requests and empties the rows."""
        try:
            others = self._read()
            self._end_some()
            self._admit()
            self._feed_rows()
            self._device.decode(self._rows)
            for deliver in others:
                deliver()
        except Exception:
            traceback.print_exc()
            self.fail_all('internal', 'the server had a fault, which is in its log')
            self._device.reset()
            for row in self._rows:
                row.kept = []

    def fail_all(self, cause: Cause, detail: str) -> None:
        """Ends all requests."""
        with self._wake:
            waiting, self._waiting = list(self._waiting), collections.deque()
        for of_queue in waiting:
            self._end(of_queue, Failure(cause, detail))
        for row in self._rows:
            if row.request is not None:
                self._end(row.request, Failure(cause, detail))

    def _check(self, generation: Generation) -> None:
        prompt, wanted = len(generation.prompt), generation.max_tokens
        least = 0 if generation.score_prompt else 1
        if not prompt:
            raise ValueError('prompt: expected at least one token, found none')
        if wanted < least:
            raise ValueError(f'max_tokens: expected at least {least}, found {wanted}')
        if prompt + wanted > self.context:
            raise ValueError(
                f'prompt: expected at most the {self.context} tokens of the context, max_tokens included, found '
                f'{prompt} + {wanted}, {prompt + wanted - self.context} too many'
            )
        if not 0 <= min(generation.prompt) <= max(generation.prompt) < self._chat.size:
            wrong = next(i for i in generation.prompt if not 0 <= i < self._chat.size)
            raise ValueError(f'prompt: expected token ids from 0 to {self._chat.size - 1}, found {wrong}')
        if len(generation.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f'stop_ids: expected at most {MAX_STOP_IDS}, found {len(generation.stop_ids)}')
        if generation.constraint is not None:
            generation.constraint.allowed()

    def _end_some(self) -> None:
        """Ends requests that are cancelled or late."""
        now = time.monotonic()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()

            def failure(request: Request) -> Failure | None:
                if request.number in cancelled:
                    return Failure('cancelled')
                if now >= request.generation.deadline:
                    return Failure('deadline', f'no answer within {now - request.submitted:.0f} s')
                return None

            over = [(request, found) for request in self._waiting if (found := failure(request)) is not None]
            for request, _ in over:
                self._waiting.remove(request)
        for request, found in over:
            self._end(request, found)
        for row in self._rows:
            if row.request is not None and (found := failure(row.request)) is not None:
                self._end(row.request, found)

    def _end(self, request: Request, event: Event) -> None:
        """Delivers a request's last event."""
        request.over = True
        if request.row is not None:
            request.row.leave()
        seconds = time.monotonic() - request.submitted
        with self._wake:
            how = event.cause if isinstance(event, Failure) else event.finish
            self._finished[str(how)] += 1
            if isinstance(event, Piece):
                self._request_seconds += 0.1 * (seconds - self._request_seconds)
        self._hand_over(request, event)

    def _hand_over(self, request: Request, event: Event) -> None:
        """Delivers an event. A fault in that ends the request, and no other."""
        try:
            request.deliver(event)
        except Exception:
            traceback.print_exc()
            self.cancel(request.number)

    def _admit(self) -> None:
        """Gives free rows to requests, first come first served."""
        while any(row.request is None for row in self._rows):
            with self._wake:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
                prompt = request.generation.prompt
                self._counts['prompt'] += len(prompt)
                row, source, reused = place(self._rows, prompt, request.generation.score_prompt)
                self._counts['cached'] += reused
                row.request, row.begun, row.used = request, False, request.number
            request.cached, request.row = reused, row
            if source is not row:
                self._device.copy(source, row)
            row.kept = list(prompt[:reused])

    def _feed_rows(self) -> None:
        """Launches calls of `feed`: a block takes the same time whichever part of its rows samples."""
        for number in range(FEEDS_AT_ONCE):
            rows = [row for row in self._rows if row.request is not None and not row.begun]
            fed = sum(row.request is not None and row.begun for row in self._rows)
            if not rows or (number and fed > MOST_FED * len(rows)):
                break
            self._device.feed(sorted(rows, key=lambda row: row.used)[: self._shapes.feed[-1][0]], self._rows)

    def _read(self) -> list[Callable[[], None]]:
        """Reads the results of what was launched. Returns the deliveries that may wait: no row depends on them."""
        others = list[Callable[[], None]]()
        for call, fetched in self._device.read():
            for at, request in enumerate(call.requests):
                if request is None:
                    continue
                if isinstance(fetched, Scores):
                    assert isinstance(call, FeedCall)
                    self._take_scores(request, fetched, at, call.scored[at])
                elif fetched.done[at] or request.generation.constraint is not None:
                    self._take_block(request, fetched, at)
                else:
                    others.append(functools.partial(self._take_block, request, fetched, at))
        return others

    def _take_scores(self, request: Request, scores: Scores, at: int, count: int) -> None:
        """Takes the scores of a chunk of a request's prompt."""
        if request.over or not request.generation.score_prompt:
            return
        generation, first = request.generation, len(request.prompt_scores) + 1
        ids = generation.prompt[first : first + count]
        request.prompt_scores.extend(scores_of(scores, at, ids, generation.top))
        if len(request.prompt_scores) == len(generation.prompt) - 1 and not generation.max_tokens:
            self._deliver(request, Piece(finish='length'))

    def _take_block(self, request: Request, block: Block, at: int) -> None:
        """Delivers the tokens that a request sampled in a block, up to its end."""
        if request.over:
            return
        generation, text = request.generation, request.text
        ids = block.tokens[at, : block.count[at]].tolist()
        ended = bool(ids) and (ids[-1] in self._ends or ids[-1] in generation.stop_ids)
        new = text.push(ids[:-1] if ended else ids)
        finish: Finish | None = None
        stop: str | int | None = None
        if ended:
            finish, stop = 'stop', ids[-1] if ids[-1] in generation.stop_ids else None
        elif text.stop is None:
            try:
                if _is_complete(generation, ids[-1:], last=bool(block.done[at])):
                    finish = 'stop'
                elif block.done[at]:
                    finish = 'length'
            except ValueError as error:
                self._end(request, Failure('constraint', str(error)))
                return
        if finish is not None:
            new += text.close(ids[-1] if ended else None)
        if text.stop is not None:
            ids, finish, stop = ids[: text.num_ids - len(request.ids)], 'stop', text.stop
        scores = scores_of(block.scores, at, ids, generation.top) if generation.log_probs else ()
        request.ids.extend(ids)
        now = time.monotonic()
        with self._wake:
            if ids and len(request.ids) == len(ids):
                self._first_seconds.append(now - request.submitted)
            self._counts['sampled'] += len(ids)
            self._sampled_at.append((now, len(ids)))
            while self._sampled_at and self._sampled_at[0][0] <= now - RATE_SECONDS:
                self._sampled_at.popleft()
        self._deliver(request, Piece(new, tuple(ids), tuple(scores), finish=finish, stop=stop))

    def _deliver(self, request: Request, piece: Piece) -> None:
        """Delivers a piece, with what belongs to the first one."""
        if not request.started:
            request.started = True
            piece = dataclasses.replace(piece, cached=request.cached, prompt_scores=tuple(request.prompt_scores))
        if piece.finish is None:
            self._hand_over(request, piece)
        else:
            self._end(request, piece)


def run(engines: Sequence[Engine], wake: threading.Condition, stop: threading.Event) -> None:
    """Steps the engines until `stop` is set, and then fails what is left. The thread that calls it owns the device."""
    with compilations() as compiled:
        for engine in engines:
            engine.compilations = functools.partial(len, compiled)
        while not stop.is_set():
            with wake:
                wake.wait_for(lambda: stop.is_set() or any(engine.busy for engine in engines))
            for engine in engines:
                if engine.busy:
                    engine.step()
    for engine in engines:
        engine.fail_all('draining', 'the server stops')


def _is_complete(generation: Generation, token: Sequence[int], *, last: bool) -> bool:
    """Returns True if the token ends the answer by its constraint, which takes it.

    Unless the token is the `last`, what may come next is computed.

    Raises:
        ValueError: nothing may come next, but something has to.
    """
    constraint = generation.constraint
    if constraint is None or constraint.advance(*token):
        return constraint is not None
    if not last:
        constraint.allowed()  # kept for the next block
    return False


def end_ids(chat: Chat) -> frozenset[int]:
    """The ids by which a model ends its answer: ends of turn that are no text, and the terminal token."""
    return frozenset(i for i in chat.end_of_turn.values() if i in chat.reserved) | {chat.terminal}
