"""Chats held with a server, so many at once, and when each piece of each answer came."""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence

import httpx2

from simrl.conversations.records import Message
from simrl.remote.answers import Answer, Failure, Outcome
from simrl.remote.requests import ChatRequest, streamed_body
from simrl.remote.settings import EndpointSettings, read_key
from simrl.remote.transport import hiding, open_clients, post_streamed
from simrl.rollouts.token_sampling import Sampling
from tools.benchmark.protocol import resident_bytes

NO_USAGE, NOT_ASKED = 'no usage', 'not asked'  # causes of failure beside those of `remote.answers`
WATCH_SECONDS = 0.5  # between two looks at a process's memory


@dataclasses.dataclass(frozen=True)
class Chat:
    """A client's side of a chat.

    Attributes:
        texts: the user's messages; each is sent with the whole history.
        systems: the system text that is sent with each of them; None: none.
        seed: of the server's sampling.
    """

    texts: tuple[str, ...]
    systems: tuple[str | None, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that is over. Times are seconds of one clock.

    Attributes:
        turn: its place in its chat, from 0.
        pieces: when the pieces of text came.
    """

    turn: int
    began: float
    pieces: tuple[float, ...]
    outcome: Outcome


@dataclasses.dataclass(frozen=True)
class Load:
    """Counts and times of some chats.

    Attributes:
        seconds: of all of them.
        client_seconds: that this process computed meanwhile.
        requests: that were to be sent.
        tokens: of the answers, as the server counts them.
        failures: requests without an answer, by cause.
        first: seconds from a request to its first piece of text, by turn.
        gaps: seconds between two pieces of an answer.
        details: of the first failure of each cause.
    """

    seconds: float
    client_seconds: float
    requests: int
    tokens: int
    failures: dict[str, int]
    first: tuple[tuple[float, ...], ...] = ()
    gaps: tuple[float, ...] = ()
    details: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run(
    settings: EndpointSettings, chats: Sequence[Chat], *, max_tokens: int, sampling: Sampling, pid: int | None = None
) -> tuple[Load, list[int]]:
    """Holds the chats, `settings.in_flight` at once. Nothing is tried again.

    Args:
        pid: of the server's process.

    Returns:
        Their counts and times; and the resident bytes of the process meanwhile, none without a process.
    """
    return asyncio.run(_run(settings, chats, max_tokens, sampling, pid))


async def _run(
    settings: EndpointSettings, chats: Sequence[Chat], max_tokens: int, sampling: Sampling, pid: int | None
) -> tuple[Load, list[int]]:
    clients, waiting = open_clients(settings, read_key(settings)), iter(chats)
    done: list[Asked] = []
    sizes: list[int] = []

    async def stream(client: httpx2.AsyncClient) -> None:
        for chat in waiting:  # all streams take from the same
            done.extend(await _hold(client, settings, chat, max_tokens, sampling))

    watch = asyncio.ensure_future(_watch(pid, sizes))
    computed, start = time.process_time(), time.perf_counter()
    try:
        await asyncio.gather(*map(stream, clients))
        seconds, computed = time.perf_counter() - start, time.process_time() - computed
    finally:
        watch.cancel()
        for client in clients:
            await client.aclose()
    return load_of(done, requests=sum(len(chat.texts) for chat in chats), seconds=seconds, computed=computed), sizes


async def _hold(
    client: httpx2.AsyncClient, settings: EndpointSettings, chat: Chat, max_tokens: int, sampling: Sampling
) -> list[Asked]:
    """A chat, up to the first request without an answer."""
    history: list[Message] = []
    done: list[Asked] = []
    for turn, (text, system) in enumerate(zip(chat.texts, chat.systems, strict=True)):
        history.append(Message('user', text))
        told = [] if system is None else [Message('system', system)]
        request = ChatRequest(
            messages=(*told, *history), max_tokens=max_tokens, sampling=sampling, seed=chat.seed + turn
        )
        asked = await _ask(client, settings, request, turn)
        done.append(asked)
        if isinstance(asked.outcome, Failure):
            break
        history.append(Message('assistant', asked.outcome.text))
    return done


async def _ask(client: httpx2.AsyncClient, settings: EndpointSettings, request: ChatRequest, turn: int) -> Asked:
    content, hide, pieces = (
        json.dumps(streamed_body(request, settings)).encode(),
        hiding(read_key(settings)),
        list[float](),
    )

    def came(text: str) -> None:
        pieces.append(time.perf_counter())

    began = time.perf_counter()
    outcome, _ = await post_streamed(client, request, content, settings.try_seconds, hide, came)
    return Asked(turn, began, tuple(pieces), outcome)


def load_of(done: Sequence[Asked], *, requests: int, seconds: float, computed: float) -> Load:
    """Counts and times of requests. Times are of those with an answer; their tokens must be counted by the server."""
    answers = [(asked, asked.outcome) for asked in done if isinstance(asked.outcome, Answer)]
    failed = [asked.outcome for asked in done if isinstance(asked.outcome, Failure)]
    failures = collections.Counter[str](failure.cause for failure in failed)
    failures[NO_USAGE] = sum(not answer.output_tokens for _, answer in answers)
    failures[NOT_ASKED] = requests - len(done)
    turns = 1 + max((asked.turn for asked, _ in answers), default=0)
    return Load(
        seconds=seconds,
        client_seconds=computed,
        requests=requests,
        tokens=sum(answer.output_tokens for _, answer in answers),
        failures=dict(+failures),
        first=tuple(
            tuple(asked.pieces[0] - asked.began for asked, _ in answers if asked.turn == turn) for turn in range(turns)
        ),
        gaps=tuple(later - piece for asked, _ in answers for piece, later in itertools.pairwise(asked.pieces)),
        details={failure.cause: failure.detail for failure in reversed(failed)},
    )


async def _watch(pid: int | None, sizes: list[int]) -> None:
    with contextlib.suppress(OSError, KeyError):  # a process that has ended: its requests fail
        while pid is not None:
            sizes.append(resident_bytes(process=pid))
            await asyncio.sleep(WATCH_SECONDS)
