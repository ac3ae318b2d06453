"""Made-up participants: what they write and prefer, by a script or by a model behind an endpoint."""

import asyncio
import collections
import random
from collections.abc import Sequence
from typing import Protocol

from simrl.conversations.quoting import as_json
from simrl.conversations.records import Message
from simrl.remote.answers import UNREADABLE, Answer
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest
from simrl.remote.schema import object_of
from simrl.rollouts.token_sampling import Sampling

CHOICES = ('a', 'tie', 'b')
TIES = 0.2  # share of a scripted participant's votes
LONGER = 0.6  # share of their other votes for the longer reply
OPENINGS = (
    'Can you help me to begin with this: {task}',
    'I would like to write about the following. {task} Where should I start?',
    'My idea is this: {task} Please give me three ways to open it.',
)
FOLLOW_UPS = (
    'I like that. Could the beginning be shorter and a little warmer?',
    'Please add something about the people who were there.',
    'What would a reader miss so far?',
    'The middle part drags. Can you say it in fewer words?',
    'Now the ending, please: it should come back to the first line.',
    'That is not quite my voice. Plainer words, please.',
    'Give me a title, and tell me why it fits.',
)
REASONS = (
    'it is closer to what I asked for',
    'it is shorter and I see at once what to do',
    'the other one was vague',
    'I liked the concrete example',
    'both say nearly the same',
    'it sounded more like me',
)
MAX_TASK, MAX_HISTORY = 200, 6  # characters of a task in a message; messages that a model sees
INSTRUCTIONS = (
    'You play a person who writes a short text with the help of an AI assistant. Your task: {task}\n'
    'Write the next message that this person types to the assistant: one to three sentences, in plain words, with one '
    'wish. Never answer as the assistant would.'
)
VOTE = (
    'Two assistants answered the message of a person who writes: {task}\nMessage: {message}\nReply A: {a}\n'
    'Reply B: {b}\nWhich reply helps the person more? Answer in JSON: first a short reason, then the choice.'
)
FINAL = 'Write this text, in at least {least} words, as the person would: {task}'
TRIES = 5  # of a model's answer, each with another seed
VOTE_TOKENS = 200  # of a vote, at least: a character of the reason takes up to one
VOTE_SCHEMA = object_of(
    reason={'type': 'string', 'minLength': 3, 'maxLength': 120}, choice={'type': 'string', 'enum': list(CHOICES)}
)


class Person(Protocol):
    """The thoughts of a participant. `said` is the conversation so far, of the replies the preferred one."""

    async def message(self, task: str, said: Sequence[Message]) -> str: ...

    async def vote(self, task: str, message: str, a: str, b: str) -> tuple[str, str]:
        """The choice, of `CHOICES`, and the reason."""
        ...

    async def text(self, task: str, said: Sequence[Message], least: int) -> str:
        """The final text, of at least so many words."""
        ...


class Scripted:
    """A participant who prefers longer replies a little, and ties now and then."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    async def message(self, task: str, said: Sequence[Message]) -> str:
        return self.draw.choice(FOLLOW_UPS if said else OPENINGS).format(task=task[:MAX_TASK])

    async def vote(self, task: str, message: str, a: str, b: str) -> tuple[str, str]:
        if self.draw.random() < TIES:
            return 'tie', self.draw.choice(REASONS)
        longer = self.draw.random() < LONGER
        return 'a' if (len(a) >= len(b)) == longer else 'b', self.draw.choice(REASONS)

    async def text(self, task: str, said: Sequence[Message], least: int) -> str:
        return lengthened(' '.join(message.content for message in said), least, self.draw)


class Modelled:
    """A participant whose words and votes are those of a model. `failed` counts its failures by cause.

    Raises:
        RuntimeError: of all methods, the model does not answer in `TRIES`.
    """

    def __init__(
        self, endpoint: Endpoint, draw: random.Random, max_tokens: int, failed: collections.Counter[str]
    ) -> None:
        self.endpoint, self.draw, self.max_tokens, self.failed = endpoint, draw, max_tokens, failed

    async def message(self, task: str, said: Sequence[Message]) -> str:
        turned = [Message('user' if m.role == 'assistant' else 'assistant', m.content) for m in said[-MAX_HISTORY:]]
        first = [Message('user', 'Hello! What would you like help with?')] if not said else []
        system = Message('system', INSTRUCTIONS.format(task=task))
        answer = await self._ask([system, *(turned or first)], None)
        return answer.text

    async def vote(self, task: str, message: str, a: str, b: str) -> tuple[str, str]:
        prompt = VOTE.format(task=task, message=as_json(message), a=as_json(a), b=as_json(b))
        answer = await self._ask([Message('user', prompt)], VOTE_SCHEMA)
        return answer.value['choice'], answer.value['reason']

    async def text(self, task: str, said: Sequence[Message], least: int) -> str:
        answer = await self._ask([Message('user', FINAL.format(least=least, task=task))], None)
        return lengthened(answer.text, least, self.draw)

    async def _ask(self, messages: Sequence[Message], schema: dict[str, object] | None) -> Answer:
        problem = ''
        for _ in range(TRIES):
            request = ChatRequest(
                messages=tuple(messages),
                max_tokens=self.max_tokens if schema is None else max(VOTE_TOKENS, self.max_tokens),
                sampling=Sampling(1.0),
                seed=self.draw.randrange(2**31),
                schema=schema,
            )
            (outcome,) = await asyncio.wrap_future(self.endpoint.submit([request]).future)
            if isinstance(outcome, Answer):
                return outcome
            self.failed[outcome.cause] += 1
            problem = f'{outcome.cause}: {outcome.detail}'
            if outcome.cause not in UNREADABLE:
                break
        raise RuntimeError(f'{self.endpoint.settings.url}: {problem}')


def lengthened(text: str, least: int, draw: random.Random) -> str:
    """A text with further words at its end, until it has the least number of them."""
    found = text.split()
    return text + ''.join(f' {draw.choice(REASONS)},' for _ in range(max(0, least - len(found)))) + '.'
