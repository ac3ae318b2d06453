"""Conversations with a model behind an endpoint, message by message; a message's text can be read as it comes.

The model is the assistant, or a prompted simulator: then it reads its part in the system text, and the roles exchanged.
"""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Generator

from simrl.conversations.chat import USER
from simrl.conversations.records import Example, Message
from simrl.remote.answers import Failure, Outcome
from simrl.remote.client import with_model
from simrl.remote.requests import ChatRequest, streamed_body
from simrl.remote.settings import EndpointSettings, read_key
from simrl.remote.transport import hiding, open_clients, post_streamed
from simrl.rollouts.agents import System
from simrl.rollouts.token_sampling import Sampling
from simrl.serving.load import BLANK, MAX_NEW_TOKENS, SAMPLING
from simrl.serving.stream import Sent
from simrl.serving.text import overlap
from simrl.simulators.role_play import RolePlaySettings, role_play_text

BEAT_SECONDS = 0.05  # between two looks at what has come, and at a reader who stops


@dataclasses.dataclass(frozen=True, eq=False)
class Remote:
    """A model behind an endpoint to talk to.

    Attributes:
        settings: the endpoint; one request is in flight.
        role: USER or ASSISTANT.
        example: what its conversations start from.
        system: an example -> the system text. None: none is sent.
        stop_text: the text by which it ends a conversation; empty where it cannot.
        max_tokens: max tokens of a message, as the server counts them.
    """

    settings: EndpointSettings
    role: int
    example: Example
    system: System | None = None
    stop_text: str = ''
    sampling: Sampling = SAMPLING
    max_tokens: int = MAX_NEW_TOKENS


def is_url(name: str) -> bool:
    return name.startswith(('http://', 'https://'))


def find_remote(
    url: str, role: int, *, model: str | None, key_variable: str | None, persona: str | None = None
) -> Remote:
    """Finds the model behind an endpoint.

    Args:
        model: its name there. None: the only one.
        key_variable: as of `EndpointSettings`.
        persona: of a simulator, the message that it opens with.

    Raises:
        EndpointError: no key, no reply, not the model, or several without a name.
        ValueError: a simulator without a persona.
    """
    settings = with_model(EndpointSettings(url, 'any', key_variable=key_variable, in_flight=1, tries=1), model)
    if role != USER:
        return Remote(settings, role, BLANK)
    if persona is None:
        raise ValueError(f'{url}: expected --persona, the message that the simulated user opens with, found none')
    played = RolePlaySettings()
    example = dataclasses.replace(BLANK, opening=persona)
    return Remote(settings, role, example, role_play_text(played), played.signal, played.sampling)


class ContextError(RuntimeError):
    """The model's context has no room for the conversation and a message of `max_tokens`."""


class RemoteView:
    """A conversation as a model behind an endpoint sees it; the methods are those of `stream.ModelView`, in text.

    Attributes:
        sent: the model's last message; None before the first.
        max_tokens: of a message.
    """

    def __init__(self, remote: Remote, *, seed: int, sample: int = 0) -> None:
        self._remote, self._seed, self._sample = remote, seed, sample
        self._messages: list[Message] = []
        if remote.system is not None:
            self._messages.append(Message('system', remote.system(remote.example)))
        if remote.example.opening is not None and remote.role != USER:
            self.receive(remote.example.opening)
        self.sent: Sent | None = None
        self.max_tokens = remote.max_tokens

    def receive(self, text: str) -> None:
        """Appends a message of the partner."""
        self._messages.append(Message('user', text))

    def stream(self) -> Generator[str, None, None]:
        """Asks for the model's next message; what it yields, joined, is the message's text.

        It yields nothing new, '', while it waits. A reader that closes the iterator cancels the request, and ends the
        message where it is.

        Raises:
            RuntimeError: the endpoint failed, or there is no text yet where it was closed. The conversation is as
                before. ContextError: there is no room for it.
        """
        remote, stop = self._remote, self._remote.stop_text
        parts: list[str] = []
        outcome, shown, ends = None, 0, False
        try:
            with asyncio.Runner() as runner:  # its end cancels the request
                task = runner.get_loop().create_task(self._ask(parts))
                while not task.done() and not ends:
                    runner.run(_wait(task, BEAT_SECONDS))
                    text, ends = _until(''.join(parts), stop)
                    final = len(text) if ends else len(text) - overlap(text, stop)
                    yield text[shown:final]
                    shown = final
                outcome = None if ends else task.result()
        except GeneratorExit:
            self._append(''.join(parts), truncated=True)
            raise
        if isinstance(outcome, Failure):
            kind = ContextError if outcome.is_over_context else RuntimeError
            raise kind(f'{remote.settings.url}: {outcome}')
        text, ends = _until(''.join(parts), stop)
        self._append(text, ends=ends, truncated=outcome is not None and outcome.truncated)
        yield text[shown:]

    def _append(self, text: str, *, ends: bool = False, truncated: bool = False) -> None:
        if not text and not ends:
            raise RuntimeError(f'{self._remote.settings.url}: stopped before the first word')
        self._messages.append(Message('assistant', text))
        self.sent = Sent((), text, ends, truncated)

    async def _ask(self, parts: list[str]) -> Outcome:
        remote, key = self._remote, read_key(self._remote.settings)
        request = ChatRequest(
            messages=tuple(self._messages),
            max_tokens=remote.max_tokens,
            sampling=remote.sampling,
            seed=_seed(self._seed, self._sample, len(self._messages)),
        )
        content = json.dumps(streamed_body(request, remote.settings)).encode()
        (client,) = open_clients(remote.settings, key)
        async with client:
            outcome, _ = await post_streamed(
                client, request, content, remote.settings.try_seconds, hiding(key), parts.append
            )
        return outcome


def _until(text: str, stop: str) -> tuple[str, bool]:
    """The text before the stop text, and whether that is in it."""
    before, found, _ = text.partition(stop) if stop else (text, '', '')
    return before, bool(found)


async def _wait(task: 'asyncio.Task[Outcome]', seconds: float) -> None:
    await asyncio.wait([task], timeout=seconds)


def _seed(*numbers: int) -> int:
    """A seed of 31 bits, which servers take."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4]) >> 1
