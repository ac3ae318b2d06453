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
    assert {body['max_tokens'] for body in server.requests} == {16384}, 'thinking included'
    assert [(found.id, found.intent) for found in read_conversations(output)[0]] == [('a cake', 'You want a cake.')]
    usage, *rest = first.splitlines()
    assert usage.startswith(
        'endpoint m: calls: 3, from the cache: 0, failed: 1 (refused 1); tries: 3, failed: 0; tokens: '
    )
    assert rest == [
        "  first failure (refused): status 400, 'by the script'",
        f'{output}: written, 1 of 3 conversations',
        'left out: 1 (more than a line)',
        'left out: 1 (refused)',
    ]
    usage, *rest_again = capsys.readouterr().out.splitlines()
    assert usage.startswith('endpoint m: calls: 2, from the cache: 1, failed: 1 (refused 1); tries: 1, ')
    assert rest_again == rest


def test_an_answer_that_is_no_sentence_is_asked_for_again_and_all_are_in_the_cache(tmp_path, capsys) -> None:
    """The second command finds every answer of the first, and asks for one more by its --tries."""
    output = tmp_path / 'out.jsonl'
    output.write_text('of before')

    def answer(body, attempt):
        text = body['messages'][0]['content']
        return chat_reply('You want a cake.' if 'a cake' in text and attempt == 2 else f'You\nwant {attempt}.')

    with ScriptedServer(answer, models=['m']) as server:
        flags = [f'--data={people(tmp_path)}', f'--output={output}', f'--endpoint.url={server.url}']
        flags += ['--endpoint.model=m', '--intents.sees=opening']
        with pytest.raises(SystemExit, match=r'^error: expected a sentence of at least one conversation, found none'):
            intents.main([*flags, '--tries=2'])
        assert output.read_text() == 'of before'
        assert len(server.requests) == 6
        assert capsys.readouterr().out.splitlines()[1:] == [
            f'{output}: not written, 0 of 3 conversations',
            'left out: 3 (more than a line)',
            'asked again: 3 (more than a line)',
        ]
        intents.main([*flags, '--tries=3'])
        assert len(server.requests) == 9
    written = output.read_bytes()
    intents.main([*flags, '--tries=3'])  # the server is gone
    assert output.read_bytes() == written
    assert [(found.id, found.intent) for found in read_conversations(output)[0]] == [('a cake', 'You want a cake.')]
    assert 'asked again: 6 (more than a line)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'found'),
    [
        (['--endpoint.url=http://127.0.0.1:1/v1', '--endpoint.model=m'], 'expected a reply, found none'),
        (['--endpoint.url=http://127.0.0.1:1/v1'], r'--endpoint.model: missing'),
        (['--endpoint.model=m', '--endpoint.url=host'], r'--endpoint.url: expected http'),
        (['--model=m', '--sampling.top_k=3'], 'found top_k or min_p'),
        (['--model=m', '--intents.sees=all'], r"--intents.sees: expected one of 'conversation', 'opening'"),
        (['--model=m', '--data=missing.jsonl'], 'missing.jsonl'),
        (['--model=m', '--tries=0'], '--tries: expected at least 1, found 0'),
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
