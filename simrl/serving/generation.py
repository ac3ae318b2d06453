"""Requests for tokens and what comes of them: the words that the API and the engine share.

The API makes a `Generation` of a request; the engine calls back with `Piece`s, the last of which has a `finish`, or
with one `Failure`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from simrl.rollouts.token_sampling import Sampling

MAX_TOP = 20  # alternatives of a token with log-probabilities, at most: those of the API's chats
MAX_STOP_IDS = 16  # of a request

# The ids that may be sampled. 'chat': text and ends of turn, as in rollouts. 'all': the whole vocabulary, as in raw
# completions of other servers.
Vocabulary = Literal['chat', 'all']
Finish = Literal['stop', 'length']
Cause = Literal[
    'cancelled',  # its client is gone
    'deadline',  # it was not done in time
    'draining',  # the server stops
    'constraint',  # no token continues the answer as its schema asks
    'internal',  # a fault of the server
]


class Constraint(Protocol):
    """The state of an answer of which only some tokens may come next. It is read and advanced on the host."""

    def allowed(self) -> np.ndarray:
        """Bits of the ids that may come next, uint32 `[ceil(V / 32)]`: bit i of word w is id 32 w + i.

        Raises:
            ValueError: none may.
        """

    def advance(self, token: int) -> bool:
        """Takes the token that was sampled; returns True once nothing may follow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A request for the tokens after a prompt.

    Attributes:
        prompt: ids, at least one.
        max_tokens: max tokens sampled, an end included; 0 only with `score_prompt`.
        sampling: temperature and filters.
        seed, sample: token i is drawn with a key of them and i, whatever else is served.
        vocabulary: the ids that may be sampled.
        stop: texts before which the answer ends.
        stop_ids: ids that end the answer beside the model's own ends.
        keep_stop: whether the stop text, or the text of the id that ended the answer, stays in the text.
        keep_special: whether special tokens are written out in the text.
        log_probs: whether each token's log-probability is wanted.
        top: with `log_probs`, how many of the most probable ids are wanted beside it; up to `MAX_TOP`.
        score_prompt: whether the prompt's own log-probabilities are wanted.
        constraint: on what may be sampled.
        deadline: `time.monotonic()` at which it fails.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seed: int
    sample: int = 0
    vocabulary: Vocabulary = 'chat'
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    keep_stop: bool = False
    keep_special: bool = False
    log_probs: bool = False
    top: int = 0
    score_prompt: bool = False
    constraint: Constraint | None = None
    deadline: float = float('inf')


@dataclasses.dataclass(frozen=True)
class Score:
    """A token's log-probability in nats, and the most probable ids in its place with theirs.

    Of a sampled token it is that of the distribution that the token was drawn from: tempered, filtered, over the ids
    that were allowed. Greedy sampling is the limit of small temperatures; there it is that of temperature 1. Of a
    prompt's token it is the model's own: of temperature 1, over the whole vocabulary.
    """

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer, in order; the texts of all pieces, joined, are the answer's.

    Attributes:
        text: never changes later: a character of which bytes are missing, and what may become a stop text, wait.
        tokens: ids sampled since the last piece, an end included. Their text may come with a later piece.
        scores: of `tokens`, with `Generation.log_probs`.
        prompt_scores: of the prompt's tokens from the second on, with the first piece of `Generation.score_prompt`.
        cached: with the first piece, how many of the prompt's tokens were in a row's cache.
        finish: with the last piece: 'stop' (an end, a stop text, or nothing may follow) or 'length'.
        stop: the text or id of the request's that ended it; None for the model's own ends.
    """

    text: str = ''
    tokens: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score, ...] = ()
    cached: int | None = None
    finish: Finish | None = None
    stop: str | int | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """An answer that ends without a finish."""

    cause: Cause
    detail: str = ''


Event = Piece | Failure


class QueueFullError(Exception):
    """As many requests wait as may. `retry_after`: seconds after which one may have room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f'the queue is full: try again in {retry_after:.0f} s')
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Load:
    """The work of an engine, done and in progress. Numbers that end in `_total` only rise.

    Attributes:
        waiting: requests in the queue.
        active: rows that a request has.
        rows: all rows.
        prompt_tokens_total, cached_tokens_total: of requests that were begun, and those of them found in a cache.
        sampled_tokens_total: sampled and delivered.
        finished_total: requests by how they ended: 'stop', 'length' or a `Cause`.
        refused_total: requests for which the queue had no room.
        tokens_per_second: sampled, over the last ten seconds.
        first_token_seconds: seconds from `submit` to the first token, of requests since the last call of `load`; of the
            last 65,536 at most.
        compiled: programs compiled since the start was over; it stays 0.
    """

    waiting: int
    active: int
    rows: int
    prompt_tokens_total: int
    cached_tokens_total: int
    sampled_tokens_total: int
    finished_total: dict[str, int]
    refused_total: int
    tokens_per_second: float
    first_token_seconds: tuple[float, ...]
    compiled: int


class Serving(Protocol):
    """A model that answers, as the API sees it. All methods may be called from any thread."""

    @property
    def context(self) -> int:
        """Max tokens of a prompt and its answer."""

    @property
    def queue(self) -> int:
        """Max requests that wait: an idle engine takes as many at once."""

    def submit(self, generation: Generation, deliver: Callable[[Event], None]) -> int:
        """Queues a request and returns its number.

        `deliver` is called in the engine's thread, and must be quick. If it raises, the request is cancelled.

        Raises:
            ValueError: the request cannot be answered, e.g. the prompt and one token are longer than `context`.
            QueueFullError: too many wait.
        """

    def cancel(self, number: int) -> None:
        """Ends a request, if it is not over: its `Failure` is delivered, and its row is free."""

    def load(self) -> Load: ...
