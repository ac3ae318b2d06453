"""The command that writes intents, with an endpoint."""

import json

import pytest

from simrl.conversations.records import Conversation, Message, read_conversations, write_conversations
from tests.remote.server import ScriptedServer, Status, chat_reply
from tools import intents


def people(tmp_path) -> str:
    path = tmp_path / 'people.jsonl'
    openings = ['a cake', 'a poem', 'bad']
    write_conversations(path, [Conversation(text, 'test', 'train', (Message('user', text),)) for text in openings])
    return str(path)


def answer(body, attempt):
    text = body['messages'][0]['content']
    return Status(400) if 'bad' in text else chat_reply('You want a cake.' if 'a cake' in text else 'You want\na poem.')


def test_an_endpoint_writes_intents_and_failures_are_counted(tmp_path, capsys) -> None:
    output = tmp_path / 'out.jsonl'
    with ScriptedServer(answer, models=['m']) as server:
        flags = [
            f'--data={people(tmp_path)}',
            f'--output={output}',
            f'--endpoint.url={server.url}',
            '--endpoint.model=m',
            '--sampling.temperature=0',
            '--intents.sees=opening',
        ]
        intents.main(flags)
        assert {body['temperature'] for body in server.requests} == {0.0}
        first = capsys.readouterr().out
        intents.main(flags)
        assert len(server.requests) == 4  # the sentence is in the journal, the bad answer in the cache
    assert [(found.id, found.intent) for found in read_conversations(output)[0]] == [('a cake', 'You want a cake.')]
    assert first.splitlines() == [
        f'{output}: written, 1 of 3 conversations',
        'left out: 1 (more than a line)',
        'left out: 1 (refused)',
    ]
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ('flags', 'found'),
    [
        (['--endpoint.url=http://127.0.0.1:1/v1', '--endpoint.model=m'], 'expected a reply, found none'),
        (['--endpoint.url=http://127.0.0.1:1/v1'], r'--endpoint.model: missing'),
        (['--endpoint.model=m', '--endpoint.url=host'], r'--endpoint.url: expected http'),
        (['--model=m', '--sampling.top_k=3'], 'found top_k or min_p'),
        (['--model=m', '--intents.sees=all'], r"--intents.sees: expected one of 'conversation', 'opening'"),
        (['--model=m', '--data=missing.jsonl'], 'missing.jsonl'),
    ],
)
def test_bad_input_is_one_error(tmp_path, flags: list[str], found: str) -> None:
    with pytest.raises(SystemExit, match=f'^error: .*{found}'):
        intents.main([f'--data={people(tmp_path)}', f'--output={tmp_path / "out.jsonl"}', *flags])


def test_one_model_is_needed(tmp_path, capsys) -> None:
    both = ['--model=m', '--endpoint.url=http://h', '--endpoint.model=m']
    for flags in ([], both):
        with pytest.raises(SystemExit):
            intents.main(['--data=a.jsonl', '--output=b.jsonl', *flags])
        assert 'expected either' in capsys.readouterr().err


def test_the_data_is_not_written_over_nor_taken_if_it_is_not_what_was_prepared(tmp_path) -> None:
    data = people(tmp_path)
    with pytest.raises(SystemExit, match=r'^error: --output: expected another file than --data'):
        intents.main([f'--data={data}', f'--output={data}', '--model=m'])
    described = {'people.jsonl': {'size': 1, 'sha256': ''}}
    (tmp_path / 'manifest.json').write_text(json.dumps({'outputs': described}))
    with pytest.raises(SystemExit, match=r'^error: .*people\.jsonl: expected the file that manifest\.json'):
        intents.main([f'--data={data}', f'--output={tmp_path / "out.jsonl"}', '--model=m'])
