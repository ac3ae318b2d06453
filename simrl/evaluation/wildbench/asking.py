"""Requests to a panel of judges: all at once, each answer read strictly, an unreadable one asked for again.

Caches keep unreadable answers, too: the same call asks for none of them anew, and ends as an unbroken one. What a
server failed it does ask for again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simrl.conversations.quoting import as_json
from simrl.conversations.records import Message
from simrl.evaluation.wildbench.tasks import Task
from simrl.remote.answers import TRIED_AGAIN, UNREADABLE, Answer, Failure, Outcome
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest
from simrl.remote.schema import Schema
from simrl.rewards.rubric import FRAME
from simrl.rollouts.token_sampling import Sampling

CUT = '... (truncated)'  # ends a reply that was cut for the judge, as in the benchmark's own files
RETRY_TEMPERATURE = 0.3  # of further answers; the first is at 0. So in arXiv:2605.09808


@dataclasses.dataclass(frozen=True)
class AskSettings:
    """Settings of judges' answers."""

    max_tokens: int = 8192  # of an answer, reasoning included
    tries: int = 3  # max answers until one is readable
    max_words: int | None = None  # words between spaces that judges see of a reply; the leaderboard's 1,000. None: all

    def __post_init__(self) -> None:
        for field in ('max_tokens', 'tries', 'max_words'):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f'AskSettings.{field}: expected at least 1, found {value}')


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A prompt with the schema of its answer.

    Attributes:
        check: why a value that fits the schema is no answer yet; None: it is one.
    """

    text: str
    schema: Schema
    version: str
    check: Callable[[Any], str | None] = lambda value: None


def prompt_of(instruction: str, lines: Sequence[str], end: str) -> str:
    """A judge's prompt. The lines are JSON values, so that nothing in them can pose as a part of the prompt."""
    return '\n\n'.join([instruction, FRAME, '\n'.join(lines), f'End of the material. {end}'])


def task_lines(task: Task) -> list[str]:
    """The conversation that replies answer, a JSON value a message."""
    return [as_json({message.role: message.content}) for message in task.messages]


def shown(reply: str, settings: AskSettings) -> str:
    """The reply as judges see it; one that is cut ends with a mark."""
    words, limit = reply.split(' '), settings.max_words
    return reply if limit is None or len(words) <= limit else ' '.join(words[:limit]) + CUT


def ask(
    endpoints: Mapping[str, Endpoint], prompts: Sequence[JudgePrompt], settings: AskSettings, name: str = ''
) -> dict[str, list[Outcome]]:
    """The outcomes of the prompts by judge, in their order; every judge gets all of them.

    Args:
        endpoints: by the judges' names, each with a cache, so that a call continues where a killed one was.
        name: of the progress lines; empty: none.

    Raises:
        EndpointError: a judge that must be asked does not answer, or has not the model; nobody was asked then.
    """
    for endpoint in endpoints.values():
        endpoint.check_for([_request(prompt, settings, 0) for prompt in prompts])
    found: dict[str, list[Outcome]] = {judge: [] for judge in endpoints}
    waiting = {judge: list(range(len(prompts))) for judge in endpoints}
    for attempt in range(settings.tries):
        pending = {
            judge: endpoints[judge].submit([_request(prompts[i], settings, attempt) for i in numbers])
            for judge, numbers in waiting.items()
            if numbers
        }
        for judge, calls in pending.items():
            outcomes = calls.result(name and f'{name}, {judge}')
            for i, outcome in zip(waiting[judge], outcomes, strict=True):
                outcome = _checked(prompts[i], outcome)
                if attempt:
                    found[judge][i] = outcome
                else:
                    found[judge].append(outcome)
            waiting[judge] = [i for i in waiting[judge] if _is_unreadable(found[judge][i])]
    return found


def _request(prompt: JudgePrompt, settings: AskSettings, attempt: int) -> ChatRequest:
    return ChatRequest(
        messages=(Message('user', prompt.text),),
        max_tokens=settings.max_tokens,
        sampling=Sampling(RETRY_TEMPERATURE if attempt else 0.0),
        schema=prompt.schema,
        sample=attempt,
        version=prompt.version,
    )


def _checked(prompt: JudgePrompt, outcome: Outcome) -> Outcome:
    if isinstance(outcome, Answer) and (fault := prompt.check(outcome.value)) is not None:
        return Failure('schema', fault, outcome.text)
    return outcome


def _is_unreadable(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.cause in UNREADABLE


def kept(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a file keeps it: the raw text, and of a failure its cause.

    The detail of a server's failure has seconds in it, which differ between equal calls: it is left out.
    """
    if isinstance(outcome, Answer):
        return {'raw': outcome.text}
    detail = {} if outcome.cause in TRIED_AGAIN else {'detail': outcome.detail}
    return {'cause': outcome.cause, **detail, 'raw': outcome.raw}
