"""A server's reply as an `Answer`, or as a `Failure` with its cause.

A reply is never mended: an answer that is no JSON, or does not fit its schema, is a failure that keeps the raw text.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from simrl.remote.requests import ChatRequest, CompletionRequest, Request
from simrl.remote.schema import SchemaError, check_value, parse_json

Cause = Literal[
    'timeout',  # no reply in time
    'rate_limit',  # status 429
    'server',  # status 5xx
    'connection',  # no connection, or closed before a reply
    'cut',  # the reply ended early
    'protocol',  # the reply is not of the API: no JSON, fields missing, another role
    'refused',  # another status
    'filtered',  # the model or its filter declines to answer
    'length',  # a JSON answer was cut by max_tokens, or reasoning left no room for an answer
    'empty',  # an empty chat message
    'invalid_json',  # a JSON answer was asked for, and this is none
    'schema',  # the JSON answer does not fit its schema
    'spend_cap',  # not sent: the endpoint's spend cap is reached
]
TRIED_AGAIN = ('timeout', 'rate_limit', 'server', 'connection', 'cut', 'protocol')
UNREADABLE = ('length', 'empty', 'invalid_json', 'schema')  # another answer of the model may be readable
ANSWERED = ('filtered', *UNREADABLE)  # the model answered: caches keep the failure, and nobody asks for it again
MAY_PASS = 'for now'  # in the reason of a conversation's failure which another day may not have
SHOWN = 200  # characters of a server's text in a detail


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: the content alone.
        value: the JSON of `text`, where the request has a schema.
        reasoning: what the server returns apart from the content.
        truncated: whether max_tokens cut it.
        stop: the stop text or token that ended it, where the server tells.
        tokens, log_probs: of a raw completion, where the server returns them.
        input_tokens, output_tokens: as the server counts them.
        cached: whether it comes from the cache, at no cost.
    """

    text: str
    value: Any = None
    reasoning: str = ''
    truncated: bool = False
    stop: str | int | None = None
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """A call without an answer. `raw`: the text of an answer that was refused here; `cached`: as of `Answer`."""

    cause: Cause
    detail: str
    raw: str = ''
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False

    def __str__(self) -> str:
        return f'{self.cause}: {self.detail}'

    @property
    def is_over_context(self) -> bool:
        """True if the model's context has no room for the messages and max_tokens, by the words that servers use."""
        return self.cause == 'refused' and 'context' in self.detail.lower()


Outcome = Answer | Failure


def reason_of(failure: Failure) -> str:
    """The reason of a conversation's failure: a few words, which many share; the detail has numbers of its own."""
    return f'{failure.cause} {MAY_PASS}' if failure.cause in TRIED_AGAIN else failure.cause


def read_reply(text: str, request: Request) -> Outcome:
    """Reads the body of a reply with status 200."""
    try:
        reply = parse_json(text)
    except ValueError as error:
        return Failure('protocol', f'expected JSON, found {shown(text)} ({error})')
    return read_value(reply, request)


def read_value(reply: Any, request: Request) -> Outcome:
    """Reads the JSON value of a reply with status 200."""
    answer = _read_chat(reply) if isinstance(request, ChatRequest) else _read_completion(reply, request)
    if answer is None:
        answer = Failure(
            'protocol', f'expected a reply of {request.path}, found {shown(json.dumps(reply, ensure_ascii=False))}'
        )
    usage = _usage(reply)
    if isinstance(answer, Answer):
        try:
            f'{answer.text}{answer.reasoning}'.encode()
        except UnicodeEncodeError:
            answer = Failure('protocol', 'expected Unicode, found half of a surrogate pair')
    if isinstance(answer, Answer) and isinstance(request, ChatRequest):
        answer = _judged(answer, request)
    return dataclasses.replace(answer, input_tokens=usage[0], output_tokens=usage[1])


def read_stored(found: Mapping[str, Any], request: Request, *, cached: bool) -> Outcome:
    """An outcome from its stored fields: JSON has no tuples, and a value is that of its text."""
    if 'cause' in found:
        return Failure(**found, cached=cached)
    tuples = {name: tuple(found[name]) for name in ('tokens', 'log_probs')}
    answer = Answer(**{**found, **tuples}, cached=cached)
    has_value = isinstance(request, ChatRequest) and request.schema is not None
    return dataclasses.replace(answer, value=parse_json(answer.text)) if has_value else answer


def stored(outcome: Outcome) -> dict[str, Any]:
    """The fields that `read_stored` needs."""
    return {name: value for name, value in dataclasses.asdict(outcome).items() if name not in ('value', 'cached')}


def error_message(text: str) -> str:
    """The message in the body of a reply with an error status; the whole body where it is not of the API's form."""
    try:
        message = json.loads(text)['error']['message']
    except (ValueError, TypeError, KeyError, RecursionError):
        return text
    return message if isinstance(message, str) else text


def shown(text: str) -> str:
    """The start of a server's text, in quotes."""
    return repr(text if len(text) <= SHOWN else f'{text[:SHOWN]}...')


def _judged(answer: Answer, request: ChatRequest) -> Outcome:
    """The chat answer, or why it is none."""
    if request.schema is None and answer.text:
        return answer
    if answer.truncated:
        return Failure('length', f'cut at {request.max_tokens} tokens', answer.text)
    if not answer.text:
        return Failure('empty', 'expected a message, found none')
    assert request.schema is not None
    try:
        value = parse_json(answer.text)
    except ValueError as error:
        return Failure('invalid_json', f'{error}, found {shown(answer.text)}', answer.text)
    try:
        check_value(value, request.schema)
    except SchemaError as error:
        return Failure('schema', str(error), answer.text)
    return dataclasses.replace(answer, value=value)


def _read_chat(reply: Any) -> Outcome | None:
    match reply:
        case {'choices': [{'message': {'role': 'assistant'}}]}:
            choice = reply['choices'][0]
            message = choice['message']
        case _:
            return None
    content = message.get('content') or ''
    reasoning = message.get('reasoning_content') or message.get('reasoning') or ''
    if not isinstance(content, str) or not isinstance(reasoning, str):
        return None
    if refusal := message.get('refusal'):
        return Failure('filtered', shown(str(refusal)))
    return _finished(choice, content, reasoning)


def _read_completion(reply: Any, request: CompletionRequest) -> Outcome | None:
    match reply:
        case {'choices': [{'text': str(text)}]}:
            choice = reply['choices'][0]
        case _:
            return None
    answer = _finished(choice, text, '')
    tokens, log_probs = choice.get('token_ids') or [], []
    match choice.get('logprobs'):
        case {'token_logprobs': found} if request.log_probs:
            log_probs = found
    if not _all_of(tokens, int) or not _all_of(log_probs, int, float):
        return None
    if isinstance(answer, Answer):
        if request.log_probs and not log_probs and text:
            return Failure('protocol', 'expected log-probabilities, found none')
        return dataclasses.replace(answer, tokens=tuple(tokens), log_probs=tuple(map(float, log_probs)))
    return answer


def _finished(choice: Mapping[str, Any], text: str, reasoning: str) -> Outcome | None:
    """The answer by the reason why it ended; None if that is no end of an answer."""
    stop, reason = choice.get('stop_reason', choice.get('matched_stop')), choice.get('finish_reason')  # vLLM, SGLang
    if reason == 'content_filter':
        return Failure('filtered', "the server's content filter")
    if reason not in ('stop', 'length'):
        return None
    return Answer(text, None, reasoning, reason == 'length', stop if isinstance(stop, str | int) else None)


def _usage(reply: Any) -> tuple[int, int]:
    """Input and output tokens; 0 for both where the server does not count both."""
    match reply:
        case {'usage': {'prompt_tokens': int(given), 'completion_tokens': int(output)}} if min(given, output) >= 0:
            return given, output
    return 0, 0


def _all_of(values: Any, *kinds: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kinds) for value in values)
