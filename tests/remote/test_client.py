"""Calls of an endpoint against a scripted server: nothing is lost, every cause is counted, no call is without bound."""

import dataclasses
import json
import logging
import pathlib
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.records import Message
from simrl.remote.answers import TRIED_AGAIN, Answer, Failure
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint, SpendCapError, check, complete
from simrl.remote.requests import ChatRequest, CompletionRequest
from simrl.remote.schema import object_of
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.remote.transport import _retry_after
from simrl.rollouts.token_sampling import Sampling
from tests.remote.server import (
    Body,
    Cut,
    Hang,
    Reply,
    ScriptedServer,
    Status,
    chat_reply,
    completion_reply,
    failing,
    wait_until,
)

SCORE = object_of(thought={'type': 'string'}, score={'type': 'integer', 'minimum': 0, 'maximum': 10})


def settings_of(server: ScriptedServer, **changes: Any) -> EndpointSettings:
    quick = EndpointSettings(server.url, 'model', tries=3, backoff=0.01, max_backoff=0.02, deadline=20, try_seconds=10)
    return dataclasses.replace(quick, **changes)


def chat(text: Any, **changes: Any) -> ChatRequest:
    return ChatRequest(messages=(Message('user', str(text)),), **{'max_tokens': 20, **changes})


def echo(body: dict[str, Any], attempt: int) -> Reply:
    """The last message, in capitals; later requests are answered sooner."""
    text = body['messages'][-1]['content']
    return chat_reply(text.upper(), seconds=0.02 / (1 + int(text))) if text.isdigit() else chat_reply(text.upper())


def test_answers_come_in_the_order_of_the_requests() -> None:
    with ScriptedServer(echo) as server, Endpoint(settings_of(server)) as endpoint:
        outcomes = endpoint.call([chat(number) for number in range(20)])
    assert outcomes == [Answer(str(number), input_tokens=10, output_tokens=5) for number in range(20)]
    usage = endpoint.usage()
    assert (usage.calls, usage.tries, usage.cached, usage.failures, usage.failed_tries) == (20, 20, 0, {}, {})
    assert (usage.input_tokens, usage.output_tokens) == (200, 100)


def test_a_chat_is_sent_as_the_api_wants_it() -> None:
    extra = '{"chat_template_kwargs": {"enable_thinking": false}, "top_p": null}'
    request = ChatRequest(
        messages=(Message('system', 'Be brief.'), Message('user', 'Hi')),
        max_tokens=7,
        sampling=Sampling(temperature=0.5, top_k=3),
        stop=('END',),
        seed=4,
        schema=SCORE,
    )
    with ScriptedServer(lambda *_: chat_reply('{"thought": "", "score": 1}', reasoning='hm')) as server:
        settings = settings_of(server, extra=extra, max_tokens_field='max_completion_tokens')
        with Endpoint(settings) as endpoint:
            (answer,) = endpoint.call([request])
    assert server.paths == ['/v1/chat/completions']
    assert server.requests == [
        {
            'model': 'model',
            'max_completion_tokens': 7,
            'temperature': 0.5,
            'top_k': 3,
            'seed': 4,
            'stop': ['END'],
            'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}],
            'response_format': {
                'type': 'json_schema',
                'json_schema': {'name': 'answer', 'strict': True, 'schema': SCORE},
            },
            'chat_template_kwargs': {'enable_thinking': False},
        }
    ]
    assert isinstance(answer, Answer)
    assert (answer.value, answer.reasoning) == ({'thought': '', 'score': 1}, 'hm')


def test_a_raw_completion_keeps_tokens_and_special_text() -> None:
    text = 'Thanks!<|endconversation|>'
    reply = completion_reply(text, tokens=(5, 6, 7), log_probs=(-0.5, -1.0, -2), stop='<|endconversation|>')
    request = CompletionRequest(prompt=(1, 2, 3), max_tokens=9, stop_ids=(7,), log_probs=True)
    with ScriptedServer(lambda *_: reply) as server, Endpoint(settings_of(server)) as endpoint:
        (answer,) = endpoint.call([request])
    assert answer == Answer(
        text,
        stop='<|endconversation|>',
        tokens=(5, 6, 7),
        log_probs=(-0.5, -1.0, -2.0),
        input_tokens=10,
        output_tokens=5,
    )
    (body,) = server.requests
    assert body['prompt'] == [1, 2, 3]
    assert (body['skip_special_tokens'], body['return_token_ids'], body['stop_token_ids']) == (False, True, [7])


FAULTS: dict[str, tuple[Reply, str]] = {
    'rate limit': (Status(429), 'rate_limit'),
    'rate limit, with a wait': (Status(429, headers={'Retry-After': '0.01'}), 'rate_limit'),
    'rate limit, with a bad wait': (Status(429, headers={'Retry-After': 'soon'}), 'rate_limit'),
    'server': (Status(500), 'server'),
    'overloaded': (Status(503), 'server'),
    'cut': (Cut(b'{"choices": [{"message": ', 10), 'cut'),
    'cut before the body': (Cut(b'{}', 0), 'cut'),
    'hung up': (Hang(0.0), 'connection'),
    'no JSON': (Body(b'<html>'), 'protocol'),
    'half of a JSON': (Body(b'{"choices": [{"mess'), 'protocol'),
    'other JSON': (Body(b'{"choices": []}'), 'protocol'),
    'wrong role': (chat_reply('hello', role='user'), 'protocol'),
    'no end': (chat_reply('hello', finish='abort'), 'protocol'),
    'no UTF-8': (Body(chat_reply('hello').content.replace(b'hello', b'\xff')), 'protocol'),
    'no Unicode': (chat_reply('\ud800'), 'protocol'),
}


@pytest.mark.parametrize(('fault', 'cause'), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_loses_nothing(fault: Reply, cause: str) -> None:
    script = lambda body, attempt: fault if attempt < 2 else echo(body, attempt)  # noqa: E731
    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        outcomes = endpoint.call([chat('a'), chat('b')])
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Answer)] == ['A', 'B']
    usage = endpoint.usage()
    assert usage.failed_tries == {cause: 4}
    assert (usage.failures, usage.calls, usage.tries, len(server.requests)) == ({}, 2, 6, 6)


@pytest.mark.parametrize(('fault', 'cause'), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_stays_is_one_failure_with_its_cause(fault: Reply, cause: str) -> None:
    def script(body: dict[str, Any], attempt: int) -> Reply:
        return fault if body['messages'][0]['content'] == 'bad' else echo(body, attempt)

    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        first, bad, last = endpoint.call([chat('a'), chat('bad'), chat('b')])
    assert isinstance(bad, Failure)
    assert bad.cause == cause
    assert 'tries: 3' in bad.detail
    assert [outcome.text for outcome in (first, last) if isinstance(outcome, Answer)] == ['A', 'B']
    assert endpoint.usage().failures == {cause: 1}
    assert sum(body['messages'][0]['content'] == 'bad' for body in server.requests) == 3


FINAL: dict[str, tuple[Reply, str, str]] = {
    'bad request': (Status(400, b'too long'), 'refused', 'status 400'),
    'unknown model': (Status(404), 'refused', 'status 404'),
    'elsewhere': (Status(307, headers={'Location': 'http://127.0.0.1:1/v1'}), 'refused', 'status 307'),
    'filter': (chat_reply('', finish='content_filter'), 'filtered', 'filter'),
    'empty': (chat_reply(''), 'empty', 'found none'),
    'nothing': (chat_reply(None), 'empty', 'found none'),
    'only reasoning': (chat_reply(None, reasoning='hm', finish='length'), 'length', '20 tokens'),
    'cut JSON': (chat_reply('{"thought": "a', finish='length'), 'length', '20 tokens'),
    'text': (chat_reply('Score: 7'), 'invalid_json', 'Score: 7'),
    'JSON in a block': (chat_reply('```json\n{"thought": "", "score": 7}\n```'), 'invalid_json', 'json'),
    'two scores': (chat_reply('{"thought": "", "score": 3, "score": 10}'), 'invalid_json', 'twice'),
    'out of range': (chat_reply('{"thought": "", "score": 11}'), 'schema', 'answer.score: expected at most 10'),
    'a float': (chat_reply('{"thought": "", "score": 7.0}'), 'schema', 'answer.score: expected integer'),
    'missing': (chat_reply('{"score": 7}'), 'schema', "expected just ['score', 'thought']"),
}


@pytest.mark.parametrize(('reply', 'cause', 'detail'), FINAL.values(), ids=FINAL)
def test_a_final_failure_is_asked_for_once(reply: Reply, cause: str, detail: str) -> None:
    with ScriptedServer(lambda *_: reply) as server, Endpoint(settings_of(server)) as endpoint:
        (outcome,) = endpoint.call([chat('a', schema=SCORE)])
    assert isinstance(outcome, Failure)
    assert outcome.cause == cause
    assert detail in outcome.detail
    assert len(server.requests) == 1


def test_an_answer_that_is_refused_is_kept_raw_and_paid(tmp_path) -> None:
    raw = 'I give this a 10'
    with Cache(tmp_path / 'cache') as cache, ScriptedServer(lambda *_: chat_reply(raw)) as server:
        with Endpoint(settings_of(server, output_price=1e6), cache=cache) as endpoint:
            (outcome,) = endpoint.call([chat('a', schema=SCORE)])
        ((_, cause, _, found),) = cache.failures()
        assert (cause, found, cache.spent('model')) == ('invalid_json', raw, 5.0)
    assert isinstance(outcome, Failure)
    assert outcome.raw == raw


@pytest.mark.parametrize('name', FINAL)
def test_a_failure_of_the_model_is_found_again_and_one_of_the_server_is_asked_for_anew(tmp_path, name: str) -> None:
    """The server would now answer: what follows is as if the calls had never been interrupted."""
    reply, cause, _ = FINAL[name]
    script = lambda body, attempt: reply if attempt == 0 else chat_reply('{"thought": "", "score": 7}')  # noqa: E731
    with Cache(tmp_path / 'cache') as cache, ScriptedServer(script) as server:
        with Endpoint(settings_of(server, output_price=1e6), cache=cache) as endpoint:
            (first,) = endpoint.call([chat('a', schema=SCORE)])
        with Endpoint(settings_of(server, output_price=1e6), cache=cache) as endpoint:
            (again,) = endpoint.call([chat('a', schema=SCORE)])
            usage = endpoint.usage()
        if cause == 'refused':
            assert isinstance(again, Answer)
            assert len(server.requests) == 2
        else:
            assert again == dataclasses.replace(first, cached=True)
            assert (len(server.requests), usage.tries, usage.cached, usage.failures) == (1, 0, 1, {cause: 1})
            assert cache.spent('model') == 5.0, 'paid once'


@pytest.mark.parametrize(('fault', 'cause'), [FAULTS['server'], FAULTS['cut']])
def test_a_fault_of_the_server_is_in_no_cache(tmp_path, fault: Reply, cause: str) -> None:
    script = lambda body, attempt: fault if attempt == 0 else echo(body, attempt)  # noqa: E731
    with (
        Cache(tmp_path / 'cache') as cache,
        ScriptedServer(script) as server,
        Endpoint(settings_of(server, tries=1), cache=cache) as endpoint,
    ):
        first, again = (endpoint.call([chat('a')])[0] for _ in range(2))
    assert isinstance(first, Failure)
    assert first.cause == cause
    assert isinstance(again, Answer)


def test_a_plain_answer_that_is_cut_is_an_answer() -> None:
    reply = chat_reply('a b', finish='length')
    with ScriptedServer(lambda *_: reply) as server, Endpoint(settings_of(server)) as endpoint:
        (outcome,) = endpoint.call([chat('a')])
    assert isinstance(outcome, Answer)
    assert (outcome.text, outcome.truncated) == ('a b', True)


def test_a_hung_connection_is_given_up_and_tried_again() -> None:
    script = lambda body, attempt: Hang() if attempt == 0 else echo(body, attempt)  # noqa: E731
    with ScriptedServer(script) as server, Endpoint(settings_of(server, try_seconds=0.2)) as endpoint:
        (outcome,) = endpoint.call([chat('a')])
    assert isinstance(outcome, Answer)
    assert endpoint.usage().failed_tries == {'timeout': 1}


@pytest.mark.parametrize(('fault', 'cause'), [(Hang(), 'timeout'), (Status(500), 'server')])
def test_the_deadline_covers_all_tries(fault: Reply, cause: str) -> None:
    with ScriptedServer(lambda *_: fault) as server:
        settings = settings_of(server, deadline=1.0, try_seconds=0.3 if cause == 'timeout' else 10.0, tries=1000)
        start = time.monotonic()
        with Endpoint(settings) as endpoint:
            (outcome,) = endpoint.call([chat('a')])
        seconds = time.monotonic() - start
    assert isinstance(outcome, Failure)
    assert outcome.cause in (cause, 'timeout')  # the deadline may cut the last try
    assert endpoint.usage().failed_tries[cause] >= 1
    assert endpoint.usage().tries >= 2
    assert seconds < 3


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    fault = Status(429, headers={'Retry-After': '3600'})
    start = time.monotonic()
    with ScriptedServer(lambda *_: fault) as server, Endpoint(settings_of(server)) as endpoint:
        (outcome,) = endpoint.call([chat('a')])
    assert isinstance(outcome, Failure)
    assert outcome.cause == 'rate_limit'
    assert 'asked to wait 3600 s' in outcome.detail
    assert time.monotonic() - start < 5
    assert len(server.requests) == 1


def test_retry_after_is_waited_for() -> None:
    times = []

    def script(body: dict[str, Any], attempt: int) -> Reply:
        times.append(time.monotonic())
        return Status(429, headers={'Retry-After': '0.3'}) if attempt == 0 else echo(body, attempt)

    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        endpoint.call([chat('a')])
    assert times[1] - times[0] >= 0.3


def test_no_more_calls_are_in_flight_than_stated() -> None:
    reply = chat_reply('x', seconds=0.02)
    with ScriptedServer(lambda *_: reply) as server, Endpoint(settings_of(server, in_flight=4)) as endpoint:
        first, second = (endpoint.submit([chat(f'{name}{i}') for i in range(20)]) for name in 'ab')
        assert len(first.result()) == len(second.result()) == 20
    assert server.most_in_flight == 4


def test_submit_does_not_wait() -> None:
    release = threading.Event()

    def script(body: dict[str, Any], attempt: int) -> Reply:
        release.wait(10)
        return echo(body, attempt)

    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        pending = endpoint.submit([chat('a')])
        wait_until(lambda: server.most_in_flight == 1)
        assert not pending.done()
        release.set()
        assert [outcome.text for outcome in pending.result() if isinstance(outcome, Answer)] == ['A']
        assert pending.done()


def test_a_server_that_is_killed_and_restarted_loses_nothing() -> None:
    script = lambda body, attempt: chat_reply(body['messages'][0]['content'], seconds=0.03)  # noqa: E731
    with ScriptedServer(script) as server, Endpoint(settings_of(server, tries=50, in_flight=4)) as endpoint:
        pending = endpoint.submit([chat(number) for number in range(40)])
        wait_until(lambda: len(server.requests) >= 10)
        server.stop()
        time.sleep(0.1)
        assert not pending.done()
        server.start()
        outcomes = pending.result()
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Answer)] == list(map(str, range(40)))
    assert endpoint.usage().failed_tries['connection'] >= 1
    assert endpoint.usage().failures == {}


def test_failures_of_three_in_ten_requests_change_no_answer() -> None:
    requests = [[chat(f'{step} {row}') for row in range(4)] for step in range(100)]
    with ScriptedServer(echo) as server, Endpoint(settings_of(server)) as endpoint:
        unbroken = [endpoint.call(step) for step in requests]
    counted = 0

    def script(body: dict[str, Any], attempt: int) -> Reply:
        nonlocal counted
        reply = failing(0.3, Status(503), echo)(body, attempt)
        counted += isinstance(reply, Status)
        return reply

    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        broken = [endpoint.call(step) for step in requests]
    assert broken == unbroken
    assert endpoint.usage().failed_tries == {'server': counted}
    assert 80 < counted < 160
    assert endpoint.usage().failures == {}


def test_the_cache_answers_equal_requests_alone(tmp_path) -> None:
    request = chat('a', schema=SCORE)
    others = [
        chat('a', schema=SCORE, sample=1),
        chat('a', schema=SCORE, version='2'),
        chat('a', schema=SCORE, seed=1),
        chat('b', schema=SCORE),
    ]
    script = lambda *_: chat_reply('{"thought": "é", "score": 1}', reasoning='r')  # noqa: E731
    with ScriptedServer(script) as server, Cache(tmp_path / 'cache') as cache:
        with Endpoint(settings_of(server), cache=cache) as endpoint:
            fresh = endpoint.call([request, *others])
        assert len(server.requests) == 5
        with Endpoint(settings_of(server), cache=cache) as endpoint:
            again = endpoint.call([request, *others])
        assert len(server.requests) == 5
        assert again == [dataclasses.replace(answer, cached=True) for answer in fresh if isinstance(answer, Answer)]
        assert (endpoint.usage().cached, endpoint.usage().tries, endpoint.usage().output_tokens) == (5, 0, 0)
        with Endpoint(settings_of(server, model='other'), cache=cache) as endpoint:
            endpoint.call([request])
        assert len(server.requests) == 6
        server.stop()
        with ScriptedServer(script) as moved, Endpoint(settings_of(moved), cache=cache) as endpoint:
            assert endpoint.call([request]) == again[:1]
            assert not moved.requests


def test_raw_completions_are_cached_too(tmp_path) -> None:
    reply = completion_reply('ab', tokens=(5, 6), log_probs=(-0.5, -1.0))
    request = CompletionRequest(prompt=(1,), max_tokens=2, log_probs=True)
    with ScriptedServer(lambda *_: reply) as server, Cache(tmp_path / 'cache') as cache:
        endpoint = Endpoint(settings_of(server), cache=cache)
        first, second = endpoint.call([request]), endpoint.call([request])
        endpoint.close()
    assert isinstance(first[0], Answer)
    assert second == [dataclasses.replace(first[0], cached=True)]


@pytest.mark.parametrize('cached', [False, True])
def test_the_spend_cap_stops_and_can_be_raised(tmp_path, cached: bool) -> None:
    with ScriptedServer(echo) as server, Cache(tmp_path / 'cache') as cache:
        kept = cache if cached else None
        settings = settings_of(server, in_flight=1, input_price=1e5, output_price=2e5, spend_cap=5.0)  # 2 a call
        with Endpoint(settings, cache=kept) as endpoint, pytest.raises(SpendCapError, match='2 of 5 calls') as error:
            endpoint.call([chat(text) for text in 'abcde'])
        assert [getattr(outcome, 'text', None) for outcome in error.value.outcomes] == ['A', 'B', 'C', None, None]
        assert endpoint.usage().cost == pytest.approx(6)
        assert endpoint.usage().failures == {'spend_cap': 2}
        if cached:
            with Endpoint(settings, cache=kept) as endpoint, pytest.raises(SpendCapError, match='1 of 1'):
                endpoint.call([chat('f')])  # what was spent is in the file
            with Endpoint(dataclasses.replace(settings, spend_cap=100.0), cache=kept) as endpoint:
                outcomes = endpoint.call([chat(text) for text in 'abcde'])
            assert [outcome.text for outcome in outcomes if isinstance(outcome, Answer)] == list('ABCDE')
            assert (endpoint.usage().cached, len(server.requests)) == (3, 5)
            assert cache.spent('model') == pytest.approx(10)


@pytest.mark.parametrize('left_out', ['usage', 'prompt_tokens', 'completion_tokens'])
@pytest.mark.parametrize('schema', [None, object_of(score={'type': 'integer'})], ids=['answer', 'refused'])
def test_a_spend_cap_needs_the_usage_of_each_reply(left_out: str, schema: Any) -> None:
    """Of one that is an answer, and of one whose text is refused here: both are billed."""
    whole = json.loads(chat_reply('a').content)
    del (whole if left_out == 'usage' else whole['usage'])[left_out]
    with ScriptedServer(lambda *_: Body(json.dumps(whole).encode())) as server:
        settings = settings_of(server, output_price=1.0, spend_cap=1.0)
        with Endpoint(settings) as endpoint, pytest.raises(EndpointError, match='expected the usage'):
            endpoint.call([chat('a', schema=schema)])


def test_a_try_that_is_billed_counts_whatever_is_wrong_with_it(tmp_path: pathlib.Path) -> None:
    """Here the role. It is tried again, and each try costs."""
    reply = chat_reply('a', role='user', usage=(1_000_000, 2_000_000))
    with ScriptedServer(lambda *_: reply) as server, Cache(tmp_path / 'answers.sqlite') as cache:
        settings = settings_of(server, tries=3, input_price=1.0, output_price=2.0)
        with Endpoint(settings, cache=cache) as endpoint:
            (outcome,) = endpoint.call([chat('a')])
            used = endpoint.usage()
        assert isinstance(outcome, Failure)
        assert (outcome.cause, used.tries) == ('protocol', 3)
        assert (used.input_tokens, used.output_tokens) == (3_000_000, 6_000_000)
        assert used.cost == cache.spent('model') == pytest.approx(15)


@pytest.mark.parametrize('year', ['9999', '99999', '9' * 30, '0', '-1'])
def test_a_wait_until_a_year_that_is_none_is_no_wait(year: str) -> None:
    date = f'Fri, 31 Dec {year} 23:59:59 GMT'
    fault = Status(429, headers={'Retry-After': date})
    with ScriptedServer(lambda *_: fault) as server, Endpoint(settings_of(server, tries=2)) as endpoint:
        (outcome,) = endpoint.call([chat('a')])
    assert isinstance(outcome, Failure)
    assert outcome.cause == 'rate_limit'


DATE = r'(Mon, )?[0-9]{1,30} (Jan|Dec) [0-9]{1,30} [0-9]+:[0-9]+( [-+]?[0-9]{1,9}| GMT)?'


@given(st.text(max_size=30) | st.from_regex(DATE, fullmatch=True))
def test_any_wait_is_a_number_of_seconds_or_none(value: str) -> None:
    found = _retry_after({'retry-after': value})
    assert found is None or found >= 0


KEY = 'sk-planted-7f3a'


def test_the_key_is_sent_and_appears_nowhere(tmp_path, monkeypatch, caplog, capsys) -> None:
    monkeypatch.setenv('SIMRL_TEST_KEY', f' {KEY}\n')

    def script(body: dict[str, Any], attempt: int) -> Reply:
        told = f'your key is {KEY}'
        return {
            'refused': Status(401, told.encode()),
            'protocol': Body(told.encode()),
            'schema': chat_reply(told),
            'answer': chat_reply(json.dumps({'thought': told, 'score': 1})),
        }[body['messages'][0]['content']]

    with caplog.at_level(logging.DEBUG), ScriptedServer(script, models=()) as server:
        settings = settings_of(server, key_variable='SIMRL_TEST_KEY')
        with Cache(tmp_path / 'cache') as cache, Endpoint(settings, cache=cache) as endpoint:
            outcomes = endpoint.call(
                [chat(text, schema=SCORE) for text in ('refused', 'protocol', 'schema', 'answer')], 'calls'
            )
            files = b''.join(path.read_bytes() for path in tmp_path.iterdir())
            with pytest.raises(EndpointError) as error:
                check(settings)
    assert set(server.keys) == {f'Bearer {KEY}'}
    assert b'your key is [key]' in files
    shown = [repr(outcomes), repr(endpoint), repr(endpoint.usage()), repr(settings), repr(error.value), caplog.text]
    shown += [repr(vars(endpoint)), *capsys.readouterr()]
    assert not [text for text in shown if KEY in text]
    assert KEY.encode() not in files


@pytest.mark.parametrize('value', [None, '', ' ', 'two words', 'schlüssel'])
def test_a_missing_key_names_its_variable(monkeypatch, value: str | None) -> None:
    monkeypatch.delenv('SIMRL_TEST_KEY', raising=False)
    if value is not None:
        monkeypatch.setenv('SIMRL_TEST_KEY', value)
    settings = EndpointSettings('http://127.0.0.1:1/v1', 'model', key_variable='SIMRL_TEST_KEY')
    for use in (Endpoint, check):
        with pytest.raises(EndpointError, match='environment variable SIMRL_TEST_KEY') as error:
            use(settings)
        assert not value or not value.strip() or value not in str(error.value)


def test_check_lists_the_models_that_are_served() -> None:
    with ScriptedServer(echo, models=('qwen', 'llama')) as server:
        check(settings_of(server, model='llama'))
        with pytest.raises(EndpointError, match="expected the model 'model', found qwen, llama"):
            check(settings_of(server))
        server.stop()
        with pytest.raises(EndpointError, match='expected a reply, found none'):
            check(settings_of(server))


def test_closing_ends_the_calls_in_flight() -> None:
    with ScriptedServer(lambda *_: Hang()) as server:
        endpoint = Endpoint(settings_of(server))
        pending = endpoint.submit([chat('a')])
        wait_until(lambda: server.most_in_flight == 1)
        endpoint.close()
        endpoint.close()
        assert pending.future.cancelled()


def test_progress_has_a_rate_and_the_time_left(capsys) -> None:
    with ScriptedServer(echo) as server, Endpoint(settings_of(server)) as endpoint:
        endpoint.call([chat('a')] * 3, 'intents')
    line = capsys.readouterr().err
    assert line.startswith('intents: step 3/3')
    assert 'calls/s' in line
    assert 'left' in line


def test_chats_are_completed_for_rooms_without_a_client() -> None:
    def script(body: dict[str, Any], attempt: int) -> Reply:
        return Status(400) if body['messages'][0]['content'] == 'bad' else echo(body, attempt)

    with ScriptedServer(script) as server, Endpoint(settings_of(server)) as endpoint:
        function = complete(endpoint, max_tokens=9, sampling=Sampling(), version='1')
        good, bad = function([[Message('user', 'a')], [Message('user', 'bad')]], 0)
    assert good == 'A'
    assert isinstance(bad, Failure)
    assert bad.cause == 'refused'


def test_the_causes_that_are_tried_again_are_those_of_the_faults() -> None:
    assert {cause for _, cause in FAULTS.values()} | {'timeout'} == set(TRIED_AGAIN)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('url', 'localhost:8000'),
        ('url', 'http://user:secret@host/v1'),
        ('url', 'http://host/v1?key=secret'),
        ('model', ''),
        ('key_variable', ''),
        ('in_flight', 0),
        ('tries', 0),
        ('deadline', 0.0),
        ('try_seconds', 0.0),
        ('backoff', -1.0),
        ('spend_cap', 1.0),  # without a price
        ('extra', '[1]'),
        ('extra', '{'),
        ('extra', '{"messages": []}'),
    ],
)
def test_bad_settings_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf'^EndpointSettings\.{field}: expected') as error:
        EndpointSettings(**{'url': 'http://host/v1', 'model': 'm', field: value})
    assert 'secret' not in str(error.value)


@pytest.mark.parametrize(
    'make',
    [
        lambda: chat('a', max_tokens=0),
        lambda: ChatRequest(messages=(), max_tokens=1),
        lambda: chat('a', schema={'type': 'integer', 'multipleOf': 2}),
        lambda: CompletionRequest(prompt=(), max_tokens=1),
    ],
)
def test_impossible_requests_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match='expected'):
        make()
