"""The chat in the terminal: what it prints for what a person types, and whom it finds by which name."""

import builtins
import contextlib
import dataclasses
import importlib
import json
import re
import signal
import threading
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, TERMINAL_TEXT, USER
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.rollouts.agents import ModelAgent
from simrl.run import config as config_lib
from simrl.run import directory
from simrl.serving import load
from simrl.serving.load import Loaded, find_model, find_simulator, load_assistant, with_persona
from simrl.serving.remote import Remote, RemoteView, find_remote
from simrl.serving.stream import Sent
from tests.remote.server import ScriptedServer, Status, chat_stream, wait_until
from tests.serving.test_stream import CHAT, EXAMPLES, LIMITS, agent
from tests.tiny import byte_tokenizer, tiny_config
from tools import chat


def loaded(role: int, view: str = 'natural', example=EXAMPLES[1], **settings) -> Loaded:
    return Loaded('tiny', agent(role, view, **settings), CHAT, example)


def talk(
    monkeypatch, capsys, agents: dict[int, Loaded], lines: Sequence[str | type[BaseException]], **settings
) -> list[str]:
    """What is printed while a person types these lines, and then Ctrl-D."""
    typed: Iterable = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            print(f'{prompt}{line}')
            return line
        raise line

    monkeypatch.setattr(builtins, 'input', read)
    chat.Talk(agents, **{'seed': 5, 'turns': 3} | settings).run()
    return capsys.readouterr().out.splitlines()


def test_a_person_talks_with_an_assistant(monkeypatch, capsys):
    lines = talk(
        monkeypatch, capsys, {ASSISTANT: loaded(ASSISTANT)}, ['ab', '', 'ba', '/reset', 'ab', '/quit', 'never']
    )
    starts = [line.split('>')[0] for line in lines]
    you = 'user (you)'
    assert starts == [you, 'assistant', you, you, 'assistant', you, you, 'assistant', you]
    again = talk(monkeypatch, capsys, {ASSISTANT: loaded(ASSISTANT)}, ['ab'])
    assert again[:2] == lines[:2]  # the seed decides
    assert lines[7] != lines[1]  # and a conversation has numbers of its own


def test_commands(monkeypatch, capsys):
    lines = talk(
        monkeypatch,
        capsys,
        {ASSISTANT: loaded(ASSISTANT, temperature=0.0)},
        ['/help', '/system', '/persona', '/nothing', '/system Be a cat.', '/system', 'ab', KeyboardInterrupt],
    )
    text = '\n'.join(lines)
    assert chat.HELP in text
    assert '[<|endoftext|>]' in lines
    assert '[/persona is about a simulator, and you are the user]' in lines
    assert '[/nothing: expected one of /reset, /system, /persona, /help, /quit]' in lines
    assert '[Be a cat.]' in lines
    assert '(Ctrl-D or /quit leaves)' in lines


def test_what_cannot_be_told_changes_nothing(monkeypatch, capsys):
    agents = {ASSISTANT: loaded(ASSISTANT, positions=64)}
    lines = talk(monkeypatch, capsys, agents, ['/system ' + 'a' * 70, '/system', 'a', '/system b', '/system'])
    assert lines[1].startswith("[the conversation is too long: expected at most the model's max_positions=64 tokens")
    assert lines[3] == '[<|endoftext|>]'
    assert lines[5].startswith('assistant> ')
    assert lines[8] == '[b]'


def test_a_person_talks_with_a_simulator(monkeypatch, capsys):
    lines = talk(monkeypatch, capsys, {USER: loaded(USER)}, ['ab'] * 30 + ['/persona Hello!', 'ab', '/persona'])
    assert lines[0].startswith('user> ')
    assert lines[1] == 'assistant (you)> ab'
    assert '[the user has ended the conversation]' in lines
    assert '[the conversation has ended: /reset begins another]' in lines
    assert TERMINAL_TEXT not in '\n'.join(lines)
    began = lines.index('user> Hello!')  # it is told no intent: it opens with this message
    assert lines[began + 1] == 'assistant (you)> ab'
    assert any(line.startswith('[intent: None; opening: Hello!; told: ') for line in lines)


def test_a_prompted_simulator_is_told_its_opening(monkeypatch, capsys):
    lines = talk(
        monkeypatch, capsys, {USER: loaded(USER, 'swapped', EXAMPLES[0])}, ['/persona', '/persona Yo', '/persona']
    )
    assert lines[0] == 'user> Hi!'
    assert '[intent: None; opening: Hi!; told: Play: Hi!]' in lines
    assert '[intent: None; opening: Yo; told: Play: Yo]' in lines


def test_two_agents_talk_with_each_other(monkeypatch, capsys):
    agents = {USER: loaded(USER), ASSISTANT: loaded(ASSISTANT)}
    lines = talk(monkeypatch, capsys, agents, ['ab', '/reset'])
    ends = [
        i for i, line in enumerate(lines) if line in ('[3 turns are over]', '[the user has ended the conversation]')
    ]
    assert len(ends) == 2
    messages = lines[: ends[0]]
    assert [line.split('>')[0] for line in messages] == ['user', 'assistant', 'user', 'assistant', 'user', 'assistant'][
        : len(messages)
    ]
    assert lines[ends[0] + 2] == '[the conversation has ended: /reset begins another]'


def test_ctrl_c_stops_a_message_and_enter_continues(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    with chat.stoppable() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
    assert signal.getsignal(signal.SIGINT) is before
    events: list[threading.Event] = []

    @contextlib.contextmanager
    def stopped_in_the_first_message():
        events.append(threading.Event())
        if len(events) == 1:
            events[0].set()
        yield events[-1]

    monkeypatch.setattr(chat, 'stoppable', stopped_in_the_first_message)
    lines = talk(monkeypatch, capsys, {USER: loaded(USER), ASSISTANT: loaded(ASSISTANT)}, [''])
    assert lines[1] == '> '
    assert lines[2].startswith('assistant> ')
    events.clear()
    lines = talk(monkeypatch, capsys, {ASSISTANT: loaded(ASSISTANT)}, ['ab', 'ab'])
    assert [line.split('>')[0] for line in lines[2:4]] == ['user (you)', 'assistant']  # the person's turn, as ever


def test_what_is_too_long_is_refused_and_the_conversation_continues(monkeypatch, capsys):
    short = {ASSISTANT: loaded(ASSISTANT, positions=64)}
    lines = talk(monkeypatch, capsys, short, ['a' * 70, 'a'])
    assert lines[1].startswith("[the conversation is too long: expected at most the model's max_positions=64 tokens")
    assert lines[3].startswith('assistant> ')


def run_of(folder, config: str, **changes):
    plain = config_lib.to_dict(importlib.import_module(f'configs.{config}').get_config('smoke'))
    content = {'format': directory.FORMAT, 'version': '0', **plain, **changes}
    folder.mkdir(exist_ok=True)
    (folder / directory.CONFIG_FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (
            ['run'],
            r'run: expected an assistant of the run \(initial, .*persona/seed-0.*\), not .* simulators \(.*persona',
        ),
        (['run/rl/nobody/seed-0'], 'run/rl/nobody/seed-0: expected an assistant of the run'),
        (['--simulator=run/initial'], r'run/initial: expected a simulator of the run \(.*persona.*\)'),
        (['run/persona/seed-0'], 'run/persona/seed-0: expected the finished stage rl/persona/seed-0, found none'),
        (['--simulator=run/persona'], 'run/persona: expected the finished stage sft/base_user, found none'),
        (['old'], '.*old: expected a run of format [0-9]+, found 3'),
        (['nothing.gguf'], 'nothing.gguf: expected a GGUF file, found none'),
        (['nothing'], 'nothing: expected a folder, a .gguf file or a hub name OWNER/MODEL, found none'),
        (
            ['--simulator=model'],
            'model: expected --persona, the message that the simulated user opens with, found none',
        ),
    ],
)
def test_errors_are_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / 'run', 'quickstart')
    run_of(tmp_path / 'old', 'quickstart', format=3)
    if 'model' in arguments[0]:
        model_folder(tmp_path / 'model')
    with pytest.raises(SystemExit, match=f'^error: {expected}') as error:
        chat.main(arguments)
    assert '\n' not in str(error.value)
    assert 'loading' not in capsys.readouterr().out


def test_a_served_model_of_a_run_is_an_assistant_or_a_simulator(tmp_path):
    run = run_of(tmp_path / 'run', 'quickstart')
    for name, expected in (
        ('nobody', r'expected an assistant of the run \(initial, .*\) or a simulator \(.*persona.*\)'),
        ('persona/seed-0', 'expected the finished stage rl/persona/seed-0, found none'),
        ('persona', 'expected the finished stage sft/base_user, found none'),
    ):
        with pytest.raises(ValueError, match=f'run/{name}: {expected}$'):
            find_model(f'{run}/{name}')


def model_folder(folder, special_tokens: Sequence[str] = ()):
    """A tiny random model as a Hugging Face folder."""
    tokenizer = byte_tokenizer()
    if special_tokens:
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    config = tiny_config(len(tokenizer), max_positions=128)
    export(transformer.init_params(jax.random.key(0), config), config, tokenizer, folder)
    return folder


def test_a_model_folder_is_an_assistant_and_plays_the_user_if_it_is_prompted(tmp_path, monkeypatch, capsys):
    folder = str(model_folder(tmp_path / 'model'))
    of = load_assistant(folder)
    lines = talk(
        monkeypatch,
        capsys,
        {ASSISTANT: dataclasses.replace(of, agent=load.resampled(of.agent, max_new_tokens=5))},
        ['x'],
    )
    assert lines[1].startswith('assistant> ')
    user = find_simulator(folder, persona='What is love?')()
    assert user.example.opening == 'What is love?'
    assert isinstance(user.agent, ModelAgent)
    assert 'What is love?' in user.agent.system(user.example)


def test_a_chat_needs_one_of_a_machines_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 2)
    found = load_assistant(str(model_folder(tmp_path / 'model'))).agent.policy.params
    assert {device for x in jax.tree.leaves(found) for device in x.devices()} == {jax.devices()[0]}


def test_an_exported_simulator_ends_by_its_own_terminal_token(tmp_path):
    user = find_simulator(str(model_folder(tmp_path / 'model', [TERMINAL_TEXT])))()
    spec = user.agent.policy.spec
    (run,) = spec.stop_sequences
    assert user.chat.decode(run) == TERMINAL_TEXT
    assert np.asarray(user.agent.policy.token_mask)[run[0]]
    assert spec.own_header == user.chat.header('user')


def test_sampling_of_the_command_line(tmp_path):
    policy = load.resampled(agent(USER), temperature=0.0, top_p=0.5, max_new_tokens=3).policy
    assert (policy.temperature, policy.spec.top_p, policy.max_new_tokens) == (0.0, 0.5, 3)
    same = load.resampled(agent(USER)).policy
    assert (same.temperature, same.spec) == (1.0, agent(USER).policy.spec)
    assert same.spec.max_new_tokens == LIMITS.user_tokens
    with pytest.raises(ValueError, match='temperature: expected 0'):
        load.resampled(agent(USER), temperature=-1.0)


def test_a_persona_is_the_intent_of_a_simulator_that_is_told_one():
    told = dataclasses.replace(agent(USER), system=lambda example: f'You want {example.intent}')
    example = with_persona(told, EXAMPLES[0], 'tea')
    assert (example.opening, example.intent) == (None, 'tea')


def remote(server: ScriptedServer, role: int = ASSISTANT, **settings) -> Remote:
    return find_remote(server.url, role, **{'model': None, 'key_variable': None} | settings)


def test_a_person_talks_with_a_model_behind_a_server(monkeypatch, capsys):
    """The server reads the whole conversation each time; a fault of it ends nothing."""

    def script(body, attempt):
        said = [message['content'] for message in body['messages']]
        if said[-1] == 'fail' and not attempt:
            return Status(503, b'{"error": {"message": "busy\\nnow"}}')
        return chat_stream([f'{len(said)} ', said[0]])

    lines = ['ab', 'fail', '', '/system', '/system Be brief.', '/system', 'cd', '/reset', 'ab']
    with ScriptedServer(script) as server:
        found = talk(monkeypatch, capsys, {ASSISTANT: remote(server)}, lines)
    assert found[:4] == ['user (you)> ab', 'assistant> 1 ab', 'user (you)> fail', 'assistant> ']
    assert re.fullmatch(r'\[http://.*/v1: server: status 503, .*busy.*\]', found[4])
    assert found[5:8] == ['[Enter asks again]', '> ', 'assistant> 3 ab']
    assert [line for line in found if line.startswith('[')][2:] == ['[none is sent]', '[Be brief.]']
    assert found[-4:] == ['user (you)> /reset', 'user (you)> ab', 'assistant> 2 Be brief.', '']
    first, *others = server.requests
    assert first['messages'] == [{'role': 'user', 'content': 'ab'}]
    assert [first[name] for name in ('model', 'stream', 'temperature', 'top_p', 'max_tokens')] == [
        'model',
        True,
        0.7,
        0.9,
        512,
    ]
    assert [m['role'] for m in others[0]['messages']] == ['user', 'assistant', 'user']
    assert [m['content'] for m in others[-1]['messages']] == ['Be brief.', 'ab']
    assert len({body['seed'] for body in server.requests}) == len(server.requests) - 1  # the same for another try


def test_a_server_whose_context_is_short_is_asked_for_fewer_tokens(monkeypatch, capsys):
    full = b'{"error": {"message": "max_tokens: expected at most 60, which the model\'s context leaves"}}'
    with ScriptedServer(lambda *_: Status(400, full)) as server:
        lines = talk(monkeypatch, capsys, {ASSISTANT: remote(server)}, ['ab', '/reset'])
    assert 'expected at most 60' in lines[2]
    assert lines[3] == '[--max-new-tokens below 512 leaves a conversation more room; /reset begins another]'


def test_a_message_that_is_stopped_cancels_its_request(monkeypatch, capsys):
    """Before the first word there is no message; after it the message ends there."""
    waiting = [''] * 5000  # for longer than the test takes

    def script(body, attempt):
        return chat_stream(waiting if len(body['messages']) == 1 else ['so', *waiting], gap=0.01)

    @contextlib.contextmanager
    def stopped():
        event = threading.Event()
        event.set()
        yield event

    with ScriptedServer(script) as server:
        monkeypatch.setattr(chat, 'stoppable', stopped)
        lines = talk(monkeypatch, capsys, {ASSISTANT: remote(server)}, ['b'])
        assert re.fullmatch(r'\[.*: stopped before the first word\]', lines[2])
        assert lines[3] == '[Enter asks again]'
        view = RemoteView(remote(server), seed=0)
        for text in ('b', 'c'):
            view.receive(text)
        pieces = view.stream()
        assert next(piece for piece in pieces if piece) == 'so'
        pieces.close()
        assert view.sent == Sent((), 'so', truncated=True)
        wait_until(lambda: server.left == len(server.requests), seconds=60.0)  # the first may not have been sent


def test_a_simulator_behind_a_server_talks_with_an_assistant_here(monkeypatch, capsys):
    """It plays in the swapped view; what follows its signal is neither read nor shown."""

    def script(body, attempt):
        return (
            chat_stream(['Th', 'anks![', 'END', '] and', ' more'])
            if len(body['messages']) > 3
            else chat_stream(['a[b'])
        )

    with ScriptedServer(script) as server:
        agents = {USER: remote(server, USER, persona='Hi!'), ASSISTANT: loaded(ASSISTANT)}
        lines = talk(monkeypatch, capsys, agents, ['/persona', '/persona Yo'])
    assert [line.split('>')[0] for line in lines[:4]] == ['user', 'assistant', 'user', 'assistant']
    assert lines[0] == 'user> Hi!'
    assert lines[2] == 'user> a[b'
    assert lines[4:6] == ['user> Thanks!', '[the user has ended the conversation]']
    assert any(line.startswith('[intent: None; opening: Hi!; told: You play a person') for line in lines)
    assert 'user> Yo' in lines
    system, *others = server.requests[1]['messages']
    assert system['content'].endswith('Hi!')
    assert others == [
        {'role': 'user', 'content': lines[1].removeprefix('assistant> ')},
        {'role': 'assistant', 'content': 'a[b'},
        {'role': 'user', 'content': lines[3].removeprefix('assistant> ')},
    ]


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['--model=other'], "expected the model 'other', found a, b$"),
        ([], r'expected the name of one of its models \(a, b\), found none$'),
        (['--model=a', '--key-variable=NO_SUCH_KEY'], 'expected its key in the environment variable NO_SUCH_KEY'),
        (['--model=a', '--temperature=-1'], 'Sampling.temperature: expected 0'),
    ],
)
def test_errors_of_a_server_are_one_line(monkeypatch, options, expected):
    monkeypatch.setattr(chat, 'start_backend', lambda: pytest.fail('a server may need the devices'))
    with ScriptedServer(lambda *_: chat_stream(['a']), models=('a', 'b')) as server:
        with pytest.raises(SystemExit, match=f'^error: .*{expected}') as error:
            chat.main([server.url, *options])
        assert '\n' not in str(error.value)
    assert not server.requests


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['http://127.0.0.1:9/v1'], 'http://127.0.0.1:9/v1: expected a reply, found none: ConnectError'),
        (['http://me:secret@nowhere/v1'], 'EndpointSettings.url: expected http://HOST'),
        (['--simulator=http://127.0.0.1:9/v1'], 'http://127.0.0.1:9/v1: expected .*found none'),
    ],
)
def test_urls_that_nothing_answers(options, expected):
    with pytest.raises(SystemExit, match=f'^error: {expected}'):
        chat.main(options)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['run/initial', '--model=a'], '--model: expected the URL of a server beside it, found run/initial'),
        (
            ['http://a/v1', '--simulator-model=a'],
            '--simulator-model: expected the URL of a server beside it, found none',
        ),
        (
            ['http://a/v1', '--simulator=http://b/v1', '--key-variable=KEY'],
            '--key-variable: expected one URL that its key is sent to, found 2',
        ),
    ],
)
def test_options_of_servers_belong_to_a_url(capsys, options, expected):
    with pytest.raises(SystemExit):
        chat.main(options)
    assert expected in capsys.readouterr().err
