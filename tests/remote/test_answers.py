"""A reply of any shape is an answer or a failure with a cause, and never an exception."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from simrl.conversations.records import Message
from simrl.remote.answers import Answer, Failure, Outcome, error_message, read_reply
from simrl.remote.requests import ChatRequest, CompletionRequest, Request
from simrl.remote.schema import object_of
from tests.remote.server import chat_reply, completion_reply

CHAT = ChatRequest(messages=(Message('user', 'a'),), max_tokens=5)
SCORED = ChatRequest(messages=CHAT.messages, max_tokens=5, schema=object_of(score={'type': 'integer'}))
RAW = CompletionRequest(prompt=(1,), max_tokens=5, log_probs=True)
REPLIES = {
    CHAT.path: json.loads(chat_reply('{"score": 1}', reasoning='r').content),
    RAW.path: json.loads(completion_reply('a', tokens=(1,), log_probs=(-1.0,)).content),
}
VALUES = (None, True, -1, 0.5, '', 'text', [], {}, [{}], [[]], {'a': 1})


def changed(value: Any) -> Iterator[Any]:
    """All replies of which one part is another value or missing."""
    yield from VALUES
    if isinstance(value, dict):
        for name, part in value.items():
            yield {other: value[other] for other in value if other != name}
            yield from ({**value, name: new} for new in changed(part))
    if isinstance(value, list):
        yield [*value, *value]
        for i, part in enumerate(value):
            yield from ([*value[:i], new, *value[i + 1 :]] for new in changed(part))


@pytest.mark.parametrize('request_', [CHAT, SCORED, RAW], ids=['chat', 'schema', 'raw'])
def test_any_reply_is_an_outcome(request_: Request) -> None:
    outcomes = [read_reply(json.dumps(reply), request_) for reply in changed(REPLIES[request_.path])]
    assert len(outcomes) > 150
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        assert isinstance(outcome.input_tokens + outcome.output_tokens, int)
        if isinstance(outcome, Answer):
            assert isinstance(outcome.text, str)
            assert request_ is not SCORED or outcome.value == {'score': 1}
            assert all(isinstance(token, int) for token in outcome.tokens)
    assert {'protocol'} < {outcome.cause if isinstance(outcome, Failure) else None for outcome in outcomes}


@pytest.mark.parametrize('text', ['', '\ud800', '[' * 100_000, 'data: {"choices": []}', '{"choices": NaN}'])
def test_any_text_is_an_outcome(text: str) -> None:
    outcome = read_reply(text, CHAT)
    assert isinstance(outcome, Failure)
    assert outcome.cause == 'protocol'


@pytest.mark.parametrize('text', ['', '{', 'null', '{"error": "no"}', '{"error": {"message": 1}}', '[' * 10**5])
def test_an_error_is_its_message_or_all_that_was_sent(text: str) -> None:
    assert error_message(text) == text
    assert error_message('{"error": {"message": "no room", "code": "full"}}') == 'no room'


@pytest.mark.parametrize('name', ['reasoning', 'reasoning_content'])
def test_reasoning_is_kept_apart(name: str) -> None:
    reply = json.loads(chat_reply('hello').content)
    reply['choices'][0]['message'][name] = 'hm'
    outcome = read_reply(json.dumps(reply), CHAT)
    assert outcome == Answer('hello', reasoning='hm', input_tokens=10, output_tokens=5)


def test_a_completion_without_its_log_probabilities_is_none() -> None:
    outcome = read_reply(completion_reply('a', tokens=(1,)).content.decode(), RAW)
    assert isinstance(outcome, Failure)
    assert outcome.cause == 'protocol'
    empty = read_reply(completion_reply('', tokens=(), log_probs=()).content.decode(), RAW)
    assert empty == Answer('', input_tokens=10, output_tokens=5)
