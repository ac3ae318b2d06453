"""Rules for replies off the device: what is a message, what is asked for again, and how often."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from simrl.conversations.records import Example, Message
from simrl.remote.answers import Answer, Failure, Outcome
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest, Request
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.agents import HostConversation, Reply, Resampling
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators.replies import Draw, Fault, Read, ask, read_message, read_role_play, repeats
from tests.remote.server import ScriptedServer, chat_reply

EXAMPLE = Example('e', 'hello', None, 7, 'test', 'train')
TALK = HostConversation(
    EXAMPLE, 0, (('user', 'hello'), ('assistant', 'Hi.'), ('user', 'a hat'), ('assistant', 'Which?'))
)
RULE = Resampling(tries=2, temperature_step=0.2, max_temperature=1.0)
FAULT, DOWN = '<think>hm', Failure('server', 'status 500')


# Messages.


@pytest.mark.parametrize(
    ('text', 'reply'),
    [
        (' a red hat \n', Reply('a red hat')),
        ('[END]', Reply('', ends=True)),
        ('thanks [END]', Reply('thanks', ends=True)),
        ('thanks[END] and bye', Reply('thanks', ends=True)),
        ('[end]', Reply('[end]')),
        ('I had a thought: the red one', Reply('I had a thought: the red one')),
        ('what is an ai?', Reply('what is an ai?')),
    ],
)
def test_a_message_ends_the_conversation_wherever_the_signal_stands(text: str, reply: Reply) -> None:
    """The text before it is kept, the text after it is not; what is no signal to the letter is text."""
    assert read_message(text, '[END]') == read_role_play(text, '[END]') == reply


@pytest.mark.parametrize(
    ('text', 'fault'),
    [
        ('<think>The user wants</think> a hat', 'leaks reasoning'),
        ('a hat</think>', 'leaks reasoning'),
        ('Assistant: How can I help?', 'speaks as the assistant'),
        ('**AI Assistant**: Sure', 'speaks as the assistant'),
        ('  \n', 'is empty'),
    ],
)
def test_a_message_that_breaks_the_rules_is_not_mended(text: str, fault: str) -> None:
    assert read_message(text, '[END]') == read_role_play(text, '[END]') == Fault(fault)


@pytest.mark.parametrize(
    'text',
    [
        '{"current_answer": "x", "response": "a hat"',
        ' {"thought": "x", "response": "a hat"}\n',
        '```json\n{"response": "a hat"}\n```',
        '{"thought": "x" "response": "a hat"}',
    ],
)
def test_an_object_of_json_role_play_is_no_message_of_role_play(text: str) -> None:
    assert read_role_play(text, '[END]') == Fault('leaks reasoning')
    assert read_message(text, '[END]') == Reply(text.strip()), 'a person may write it'


@pytest.mark.parametrize(
    'text',
    [
        '{"response": 200}',
        'the server says {"response": "ok"}',
        '{"response": "ok"} is all that I get. Why?',
        'why is "thought": "x" no JSON?',
    ],
)
def test_json_that_a_person_pastes_is_a_message(text: str) -> None:
    assert read_role_play(text, '[END]') == Reply(text)


def test_a_repeat_is_the_last_message_word_for_word() -> None:
    assert repeats(Reply(' a hat\n'), TALK)
    assert not repeats(Reply('a hat', ends=True), TALK)
    assert not repeats(Reply('hello'), TALK), 'only the last one counts'
    assert not repeats(Reply('Which?'), TALK), 'of the other'
    assert not repeats(Reply('a hat'), dataclasses.replace(TALK, messages=()))


# What is asked for again.


def asked(*answers: str | Failure, tries: int = 3, rule: Resampling | None = RULE) -> tuple[Reply, list[Draw]]:
    """The reply to one conversation after answers that come one by one, and the draws of what was asked."""
    rest, draws = iter(answers), list[Draw]()

    def call(requests: Sequence[Request]) -> list[Outcome]:
        return [Answer(found) if isinstance(found, str) else found for found in (next(rest) for _ in requests)]

    def request_of(conversation: HostConversation, draw: Draw) -> Request:
        draws.append(draw)
        return ChatRequest(messages=(Message('user', 'x'),), max_tokens=5, **vars(draw))

    def read(answer: Answer) -> Read:
        return read_message(answer.text, '[END]')

    reply = ask(call, request_of, read, sampling=Sampling(0.7), tries=tries, resampling=rule)
    (found,) = reply([TALK], np.array([5], np.uint32))
    assert next(rest, None) is None, 'all were asked for'
    return found, draws


def test_a_repeat_stays_after_the_last_try_with_rising_temperatures() -> None:
    found, draws = asked('a hat', 'a hat', 'a hat')
    assert found == Reply('a hat', resamples=2)
    assert [draw.sampling.temperature for draw in draws] == pytest.approx([0.7, 0.9, 1.0])


def test_without_a_rule_a_repeat_is_a_message() -> None:
    assert asked('a hat', rule=None)[0] == Reply('a hat')


@pytest.mark.parametrize('last', [DOWN, FAULT])
def test_a_repeat_stays_where_what_is_asked_for_in_its_place_fails(last: str | Failure) -> None:
    found, _ = asked('a hat', FAULT, last, tries=2 if last == FAULT else 3)
    assert found == Reply('a hat', resamples=2)


def test_repeats_and_faults_have_limits_of_their_own() -> None:
    assert asked('a hat', FAULT, 'a hat', FAULT, 'red')[0] == Reply('red', resamples=4)
    assert asked('a hat', FAULT, 'a hat', FAULT, 'a hat')[0] == Reply('a hat', resamples=4)
    assert asked('a hat', 'a hat', 'red', tries=1)[0] == Reply('red', resamples=2), 'one fault, and two repeats'
    found, _ = asked(FAULT, FAULT, FAULT)
    assert found.failure == 'no usable reply in 3 tries, the last: leaks reasoning'


def test_a_fault_does_not_warm_the_sampling() -> None:
    _, draws = asked(FAULT, 'a hat', FAULT, 'red')
    assert [draw.sampling.temperature for draw in draws] == pytest.approx([0.7, 0.7, 0.9, 0.9])
    assert len({draw.seed for draw in draws}) == len({draw.sample for draw in draws}) == 4


def test_a_failed_call_is_a_failed_conversation() -> None:
    assert asked(DOWN)[0] == Reply('', failure='server for now')


def test_what_was_discarded_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    asked(FAULT, 'a hat', Failure('schema', 'x'), 'red')
    expected = 'replies asked for again: leaks reasoning: 1, repeats its last message: 1, schema: 1\n'
    assert capsys.readouterr().out.endswith(expected)


def test_a_conversation_that_cannot_be_sent_fails_alone() -> None:
    def call(requests: Sequence[Request]) -> list[Outcome]:
        return [Answer('red')] * len(requests)

    def request_of(conversation: HostConversation, draw: Draw) -> Any:
        if not conversation.messages:
            return Reply('', failure='unsendable')
        return ChatRequest(messages=(Message('user', 'x'),), max_tokens=5)

    reply = ask(call, request_of, lambda answer: Reply(answer.text), sampling=Sampling(), tries=1, resampling=None)
    talks = [dataclasses.replace(TALK, messages=()), TALK]
    for order in (talks, talks[::-1], talks[:1]):
        found = reply(order, np.zeros(len(order), np.uint32))
        assert [one.failure for one in found] == [None if talk.messages else 'unsendable' for talk in order]


def test_a_fault_that_is_in_the_cache_is_not_asked_for_again_from_there(tmp_path: Any) -> None:
    """An answer with a fault is an answer of the endpoint: another try is another sample of it."""
    said = [FAULT, FAULT, 'red']

    def request_of(conversation: HostConversation, draw: Draw) -> Request:
        return ChatRequest(messages=(Message('user', 'x'),), max_tokens=5, **vars(draw))

    with ScriptedServer(lambda body, attempt: chat_reply(said[len(server.requests) - 1])) as server:
        settings = EndpointSettings(server.url, 'model')
        for _ in range(2):
            with Cache(tmp_path / 'answers.sqlite') as cache, Endpoint(settings, cache=cache) as endpoint:
                reply = ask(
                    endpoint.call,
                    request_of,
                    lambda answer: read_message(answer.text, '[END]'),
                    sampling=Sampling(),
                    tries=3,
                    resampling=None,
                )
                assert reply([TALK], np.zeros(1, np.uint32)) == [Reply('red', resamples=2)]
        assert len(server.requests) == 3, 'the same again, all from the cache'
