"""Simulators behind an endpoint, a server of the tests: what is sent, what is read, and what is asked for again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Example, Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import render
from simrl.models.transformer import Execution
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.agents import HostAgent, HostConversation, Reply, Resampling
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators import prompts
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned, told_intent
from simrl.simulators.person import about, intent_part
from simrl.simulators.remote import chat_simulator, json_simulator, raw_simulator
from simrl.simulators.replies import read_message
from simrl.simulators.role_play import RolePlaySettings, role_play
from tests.remote.server import Body, Hang, ScriptedServer, Status, chat_reply, completion_reply
from tests.tiny import byte_tokenizer, tiny_config

CHAT = chat_from_huggingface(byte_tokenizer())
SETTINGS = RolePlaySettings(signal='[END]', instructions=prompts.PERSON_INSTRUCTIONS)
PERSON = about([intent_part('where_known')])
EXAMPLE = Example('e', 'hello {signal}', 'to buy a hat', 7, 'test', 'train')
BEGUN = HostConversation(EXAMPLE, 0, (('user', 'hello {signal}'), ('assistant', 'Hi. "quote"')))
LATER = dataclasses.replace(BEGUN, messages=(*BEGUN.messages, ('user', 'a hat'), ('assistant', 'Which?')))
Script = Callable[[dict[str, Any], int], Any]


def replies(
    make: Callable[[Any], HostAgent], script: Script, conversations: Sequence[HostConversation], **endpoint: Any
) -> tuple[list[Reply], list[dict[str, Any]]]:
    """What an agent replies to conversations through a server, and what the server was sent."""
    with ScriptedServer(script) as server:
        settings = EndpointSettings(server.url, 'model', **{'tries': 2, 'backoff': 0.01, **endpoint})
        with Endpoint(settings) as client:
            seeds = np.arange(len(conversations), dtype=np.uint32)
            found = list(make(client.call).reply(conversations, seeds))
        return found, server.requests


def chat_agent(call: Any, **changes: Any) -> HostAgent:
    usual = {'person': PERSON, 'opening': 'given', 'max_tokens': 50, 'max_new_tokens': 20, 'tries': 3}
    return chat_simulator(call, SETTINGS, **{**usual, 'resampling': None, **changes})


def json_agent(call: Any, **changes: Any) -> HostAgent:
    usual = {'person': PERSON, 'opening': 'given', 'max_tokens': 50, 'max_new_tokens': 20, 'tries': 3}
    return json_simulator(call, SETTINGS, **{**usual, 'resampling': None, **changes})


def answer(response: str) -> str:
    return json.dumps({'current_answer': 'x', 'thought': 'y', 'response': response})


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
    found = read_message(text, '[END]', BEGUN, repeats=True)
    assert (found.reply, found.fault) == (reply, '')


@pytest.mark.parametrize(
    ('text', 'fault'),
    [
        ('<think>The user wants</think> a hat', 'leaks reasoning'),
        ('a hat</think>', 'leaks reasoning'),
        ('{"current_answer": "x", "response": "a hat"', 'leaks reasoning'),
        ('Assistant: How can I help?', 'speaks as the assistant'),
        ('**AI Assistant**: Sure', 'speaks as the assistant'),
        ('  \n', 'is empty'),
    ],
)
def test_a_message_that_breaks_the_rules_is_not_mended(text: str, fault: str) -> None:
    found = read_message(text, '[END]', BEGUN, repeats=True)
    assert (found.reply, found.fault) == (None, fault)


def test_a_repeat_is_asked_for_again_only_where_there_is_a_rule_for_it() -> None:
    assert read_message(' a hat\n', '[END]', LATER, repeats=True).fault == 'repeats its last message'
    assert read_message(' a hat\n', '[END]', LATER, repeats=False).fault == ''
    assert read_message('a hat [END]', '[END]', LATER, repeats=True).fault == ''
    assert read_message('hello {signal}', '[END]', LATER, repeats=True).fault == '', 'only the last one counts'


# What is sent.


def test_a_chat_has_the_roles_exchanged_and_the_opening_in_its_instructions() -> None:
    found, sent = replies(chat_agent, lambda body, attempt: chat_reply('a red one'), [BEGUN, LATER])
    assert found == [Reply('a red one')] * 2
    system = sent[0]['messages'][0]
    assert system['role'] == 'system'
    assert 'hello {signal}' in system['content']
    assert 'to buy a hat' in system['content']
    by_length = sorted((body['messages'][1:] for body in sent), key=len)
    assert by_length == [
        [{'role': 'user', 'content': 'Hi. "quote"'}],
        [
            {'role': 'user', 'content': 'Hi. "quote"'},
            {'role': 'assistant', 'content': 'a hat'},
            {'role': 'user', 'content': 'Which?'},
        ],
    ]


def test_a_chat_that_opens_is_asked_to() -> None:
    settings = dataclasses.replace(SETTINGS, instructions=prompts.OPENING_INSTRUCTIONS)

    def make(call: Any) -> HostAgent:
        common = {'max_tokens': 50, 'max_new_tokens': 20, 'tries': 3, 'resampling': None}
        return chat_simulator(call, settings, person=PERSON, opening='written', **common)

    found, sent = replies(
        make, lambda body, attempt: chat_reply('hi'), [dataclasses.replace(BEGUN, messages=()), BEGUN]
    )
    assert found == [Reply('hi')] * 2
    bodies = sorted((body['messages'] for body in sent), key=len)
    assert bodies[0][1:] == [{'role': 'user', 'content': prompts.OPENING_REQUEST}]
    assert [message['role'] for message in bodies[1][1:]] == ['assistant', 'user']
    assert 'hello' not in bodies[0][0]['content']


def test_a_conversation_is_json_in_json_role_play() -> None:
    found, sent = replies(json_agent, lambda body, attempt: chat_reply(answer('a red one')), [BEGUN])
    assert found == [Reply('a red one')]
    (message,) = sent[0]['messages']
    instructions, _, history = message['content'].partition('The conversation:\n')
    assert json.loads(history) == [
        {'from': 'person', 'text': 'hello {signal}'},
        {'from': 'assistant', 'text': 'Hi. "quote"'},
    ]
    assert 'the response is [END]' in instructions
    schema = sent[0]['response_format']['json_schema']['schema']
    assert list(schema['properties']) == ['current_answer', 'thought', 'response']


def tuned(system: Any = told_intent, **changes: Any) -> Any:
    config = tiny_config(CHAT.size, max_positions=512)
    return fine_tuned(
        CHAT, config, {}, Execution(), max_new_tokens=20, settings=FineTunedSettings(), system=system, **changes
    )


@pytest.mark.parametrize('system', [told_intent, None], ids=['intent', 'none'])
@pytest.mark.parametrize('prompt', ['ids', 'text'])
def test_a_raw_completion_has_the_view_of_the_training_rows(system: Any, prompt: Any) -> None:
    def make(call: Any) -> HostAgent:
        return raw_simulator(call, tuned(system), CHAT, Sampling(0.7, top_p=0.9), prompt=prompt, tries=2)

    found, sent = replies(make, lambda body, attempt: completion_reply('red<|im_end|>', tokens=(1,)), [LATER])
    assert found == [Reply('red')]
    messages = [Message('user' if role == 'user' else 'assistant', text) for role, text in LATER.messages]
    row = render(CHAT, messages, system=None if system is None else 'to buy a hat')
    expected = [*row.tokens.tolist(), *CHAT.header('user')]
    assert sent[0]['prompt'] == (expected if prompt == 'ids' else CHAT.decode(expected))
    assert sent[0]['skip_special_tokens'] is False
    assert set(sent[0]['stop_token_ids']) == {CHAT.end_of_turn['user'], CHAT.terminal}


@pytest.mark.parametrize(
    ('text', 'reply'),
    [
        (f'bye{TERMINAL_TEXT}', Reply('bye', ends=True)),
        (f'{TERMINAL_TEXT}', Reply('', ends=True)),
        (f'bye{TERMINAL_TEXT}<|im_end|>', Reply('bye', ends=True)),
        ('bye', Reply('bye')),
    ],
)
def test_a_raw_completion_ends_by_the_terminal_token(text: str, reply: Reply) -> None:
    def make(call: Any) -> HostAgent:
        return raw_simulator(call, tuned(), CHAT, Sampling(), prompt='ids', tries=1)

    assert replies(make, lambda body, attempt: completion_reply(text), [LATER])[0] == [reply]


def test_a_role_play_reads_its_view_through_raw_completions_too() -> None:
    config = tiny_config(CHAT.size, max_positions=2048)
    agent = role_play(CHAT, config, {}, Execution(), max_new_tokens=20, settings=SETTINGS, person=PERSON)

    def make(call: Any) -> HostAgent:
        return raw_simulator(call, agent, CHAT, Sampling(), prompt='ids', tries=1)

    _, sent = replies(make, lambda body, attempt: completion_reply('red<|im_end|>'), [LATER])
    messages = [Message('user' if role == 'user' else 'assistant', text) for role, text in LATER.messages]
    assert agent.system is not None
    row = render(CHAT, messages, system=agent.system(EXAMPLE), view='swapped')
    assert sent[0]['prompt'] == [*row.tokens.tolist(), *CHAT.header('assistant')]


# What is asked for again.


def test_a_bad_reply_is_asked_for_again_a_few_times_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    bad = iter(['{"thought": 1', answer('Assistant: hi')])
    found, sent = replies(json_agent, lambda body, attempt: chat_reply(next(bad, answer('a hat'))), [BEGUN])
    assert found == [Reply('a hat', resamples=2)]
    assert len({body['seed'] for body in sent}) == 3, 'another number for each try'
    assert 'invalid_json: 1, speaks as the assistant: 1' in capsys.readouterr().out


def test_a_simulator_that_never_keeps_the_rules_fails_its_conversation() -> None:
    found, sent = replies(chat_agent, lambda body, attempt: chat_reply('<think>hm'), [BEGUN, LATER])
    assert [reply.failure for reply in found] == ['no usable reply in 3 tries, the last: leaks reasoning'] * 2
    assert len(sent) == 6


def test_a_repeat_stays_after_the_last_try_with_rising_temperatures() -> None:
    rule = Resampling(tries=2, temperature_step=0.2, max_temperature=1.0)
    found, sent = replies(
        lambda call: chat_agent(call, resampling=rule), lambda body, attempt: chat_reply('a hat'), [LATER]
    )
    assert found == [Reply('a hat', resamples=2)]
    assert [body['temperature'] for body in sent] == pytest.approx([0.7, 0.9, 1.0])


@pytest.mark.parametrize('fault', [Status(500), Hang(0.3), Body(b'not JSON')], ids=['status', 'hang', 'body'])
def test_an_opening_that_fails_is_a_failed_conversation(fault: Any) -> None:
    """Never an end signal that the assistant would be handed, nor an empty message."""
    opening = dataclasses.replace(BEGUN, messages=())
    found, _ = replies(chat_agent, lambda body, attempt: fault, [opening], try_seconds=0.1)
    assert found[0].failure
    assert not found[0].ends
    assert found[0].text == ''


def test_equal_conversations_of_a_group_have_answers_of_their_own_and_the_cache_keeps_them(tmp_path: Any) -> None:
    number = iter(range(100))
    with ScriptedServer(lambda body, attempt: chat_reply(f'hat {next(number)}')) as server:
        found = []
        for _ in range(2):
            settings = EndpointSettings(server.url, 'model')
            with Cache(tmp_path / 'answers.sqlite') as cache, Endpoint(settings, cache=cache) as client:
                found.append(chat_agent(client.call).reply([BEGUN, BEGUN], np.array([3, 4], np.uint32)))
        assert found[0] == found[1]
        assert found[0][0] != found[0][1]
        assert len(server.requests) == 2
