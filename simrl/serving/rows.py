"""Requests and the rows that they have, on the host: which row a request takes, and the arrays of the next calls."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import numpy as np

from simrl.serving.generation import Event, Generation, Score, Vocabulary
from simrl.serving.programs import blank_asked, blank_given
from simrl.serving.shapes import Shapes
from simrl.serving.slots import Asked, Given, Scores
from simrl.serving.text import AnswerText

LEAST_COPIED = 16  # tokens that another row's cache has more: feeding fewer costs less than copying the row
LEAST_TEMPERATURE = 1e-20  # less is greedy: logits divided by it may have no finite float32
VOCABULARIES: tuple[Vocabulary, ...] = ('chat', 'all')  # rows of the masks


@dataclasses.dataclass(eq=False)
class Request:
    """A request and how far it is.

    Attributes:
        number, generation, deliver: of `Serving.submit`.
        submitted: `time.monotonic()`.
        text: the text of its answer.
        ids: sampled and read.
        prompt_scores: read.
        cached: tokens of its prompt that were in a cache.
        started: whether its first piece was delivered.
        launched: tokens that it samples in the blocks that were launched, if nothing ends it.
        row: the row that it has or had.
        over: whether its last event was delivered.
    """

    number: int
    generation: Generation
    deliver: Callable[[Event], None]
    submitted: float
    text: AnswerText
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt_scores: list[Score] = dataclasses.field(default_factory=list)
    cached: int = 0
    started: bool = False
    launched: int = 0
    row: 'Row | None' = None
    over: bool = False


@dataclasses.dataclass(eq=False)
class Row:
    """A row.

    Attributes:
        index: in the state.
        kept: the tokens that its cache has.
        request: the request that has it.
        begun: whether its prompt is fed, but for the last token.
        used: the number of the request that had it last.
    """

    index: int
    kept: list[int] = dataclasses.field(default_factory=list)
    request: Request | None = None
    begun: bool = False
    used: int = 0

    def leave(self) -> None:
        """Takes the row from its request, which is over; the cache stays."""
        request, self.request = request_of(self), None
        if self.begun:
            self.kept = [*request.generation.prompt, *request.ids][:-1]


def request_of(row: Row) -> Request:
    assert row.request is not None
    return row.request


def place(rows: Sequence[Row], prompt: Sequence[int], anew: bool) -> tuple[Row, Row, int]:
    """The row for a prompt, the row whose cache it starts from, and how many tokens of that it needs not be fed.

    A conversation that goes on takes its own row again. Another takes the row that was used least recently, so that
    others may still go on, and a copy of the cache that has most of its prompt.

    Args:
        rows: all; at least one is free.
        anew: whether all tokens have to be fed.
    """
    free = [row for row in rows if row.request is None]
    if anew:
        row = min(free, key=lambda row: row.used)
        return row, row, 0
    common = {row: common_prefix(row.kept, prompt) for row in rows}
    going_on = [row for row in free if row.kept and common[row] == len(row.kept)]
    row = max(going_on, key=lambda row: common[row]) if going_on else min(free, key=lambda row: row.used)
    best = max(rows, key=lambda row: common[row])
    source = best if common[best] - common[row] >= LEAST_COPIED else row
    return row, source, min(common[source], len(prompt) - 1)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return sum(itertools.takewhile(bool, map(operator.eq, first, second)))


@dataclasses.dataclass(frozen=True)
class FeedCall:
    """A call of `feed`.

    Attributes:
        given: its arrays.
        size: of its program.
        requests: of its rows.
        scored: how many targets' scores are wanted of each.
    """

    given: Given
    size: int
    requests: tuple[Request | None, ...]
    scored: tuple[int, ...]


def feed_call(rows: Sequence[Row], all_rows: Sequence[Row], shapes: Shapes) -> FeedCall:
    """The next chunk of the prompts of some rows, which have it afterwards."""
    number, chunk = next(shape for shape in shapes.feed if shape[0] >= len(rows))
    given = jax.tree.map(np.copy, blank_given(number, chunk))
    given.rows[:] = _filled(rows, all_rows, number)
    requests: list[Request | None] = [None] * number
    scored = [0] * number
    for row in rows:
        at, request = given.rows.tolist().index(row.index), request_of(row)
        prompt, start = request.generation.prompt, len(row.kept)
        count = min(chunk, len(prompt) - 1 - start)
        given.tokens[at, :count] = prompt[start : start + count]
        given.targets[at, :count] = prompt[start + 1 : start + 1 + count]
        given.start[at], given.count[at] = start, count
        given.pending[at], given.length[at] = prompt[-1], len(prompt)
        given.begins[at] = row.begun = start + count == len(prompt) - 1
        row.kept.extend(prompt[start : start + count])
        requests[at], scored[at] = request, count if request.generation.score_prompt else 0
    given = dataclasses.replace(given, scored=np.array(any(request_of(row).generation.score_prompt for row in rows)))
    size = _least(shapes.feed_sizes, max(len(row.kept) for row in rows))
    return FeedCall(given, size, tuple(requests), tuple(scored))


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """A call of `decode`: its arrays, the size of its program, and the requests of its rows."""

    asked: Asked
    size: int
    requests: tuple[Request | None, ...]


def decode_call(
    all_rows: Sequence[Row], shapes: Shapes, vocab_size: int, taken: tuple[tuple[int, ...], int]
) -> DecodeCall | None:
    """The next block of the rows that can sample; None if there is none.

    Args:
        taken: the rows whose caches are taken, and their size; the call has the same where it can.
    """
    chosen: list[tuple[Row, Request, int]] = []
    for row in all_rows:
        if row.request is not None and row.begun and (quota := _quota(row.request, shapes.block)):
            chosen.append((row, row.request, quota))
    if not chosen:
        return None
    number = _least(shapes.decode_rows, len(chosen))
    longest = max(len(of.generation.prompt) + of.launched + quota for _, of, quota in chosen)
    size = _least(shapes.decode_sizes, longest)
    own = [row.index for row, *_ in chosen]
    if len(taken[0]) == number and set(own) <= set(taken[0]):
        rows = list(taken[0])
    else:
        rows = _filled([row for row, *_ in chosen], all_rows, number)
    asked = jax.tree.map(np.copy, blank_asked(number, vocab_size))
    asked.rows[:] = rows
    requests: list[Request | None] = [None] * number
    for row, request, quota in chosen:
        at = rows.index(row.index)
        requests[at] = request
        _write_settings(asked, at, request.generation, quota)
        request.launched += quota
    top = np.array(any(request.generation.top for _, request, _ in chosen))
    return DecodeCall(dataclasses.replace(asked, top=top), size, tuple(requests))


def _quota(request: Request, block: int) -> int:
    """Tokens that a request may sample in the next block."""
    # A constrained one's last token decides what may come next.
    return min(request.generation.max_tokens - request.launched, block if request.generation.constraint is None else 1)


def _write_settings(asked: Asked, at: int, generation: Generation, quota: int) -> None:
    asked.quota[at], asked.max_tokens[at] = quota, generation.max_tokens
    asked.seed[at] = generation.seed & 0xFFFFFFFF, generation.seed >> 32 & 0xFFFFFFFF
    asked.sample[at] = generation.sample
    sampling = generation.sampling
    asked.temperature[at] = sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0
    for name in ('top_k', 'top_p', 'min_p'):
        getattr(asked, name)[at] = getattr(sampling, name)
    asked.vocabulary[at] = VOCABULARIES.index(generation.vocabulary)
    asked.stop_ids[at, : len(generation.stop_ids)] = generation.stop_ids
    if generation.constraint is not None:
        asked.constrained[at], asked.bits[at] = True, generation.constraint.allowed()


def scores_of(scores: Scores, at: int, ids: Sequence[int], top: int) -> list[Score]:
    """The scores of a row's first tokens, `ids`, read from the device, with alternatives that may come at all."""
    parts = scores.log_prob[at].tolist(), scores.top[at, :, :top].tolist(), scores.top_log_prob[at, :, :top].tolist()
    return [
        Score(i, log_prob, tuple((o, x) for o, x in zip(others, theirs, strict=True) if x > -math.inf))
        for i, log_prob, others, theirs in zip(ids, *parts, strict=False)
    ]


def _least(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _filled(rows: Sequence[Row], all_rows: Sequence[Row], number: int) -> list[int]:
    """The rows of a call, and others that fill it: those that the next request is least likely to take.

    A call that has all rows has them in the order of the cache, as `slots.take` reads them.
    """
    if number == len(all_rows):
        return [row.index for row in all_rows]
    own = {row.index for row in rows}
    others = sorted((row for row in all_rows if row.index not in own), key=lambda row: -row.used)
    return [row.index for row in (*rows, *others)][:number]
