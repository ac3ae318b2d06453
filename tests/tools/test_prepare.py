"""The command line of preparation: every setting is a flag, and what it writes is what an experiment reads."""

import json

import pytest

from simrl.conversations import wildchat
from simrl.experiments import sources
from simrl.experiments.sources import DataSettings
from tests.conversations.wildchat_rows import raw_row, wildbench_row, write_jsonl, write_parquet
from tools import prepare

ROWS = [raw_row(f'{i}', f'Hello {i}', 'Hi.', user=f'user {i}', toxic=i == 0) for i in range(40)]


def accept(text: str) -> None:
    """Takes any text, as `Chat.check` may not."""


def test_wildchat_becomes_the_folder_of_an_experiment(tmp_path, capsys):
    source = write_parquet(tmp_path / 'wildchat.parquet', ROWS)
    tasks = write_jsonl(tmp_path / 'tasks.jsonl', [wildbench_row('hello 39')])
    flags = [f'--source={source}', f'--output={tmp_path / "out"}', f'--wildbench={tasks}']
    prepare.main(['wildchat', *flags, '--toxic=keep', '--splits.test=0.5', '--splits.user=hashed_ip+country'])
    shown = json.loads(capsys.readouterr().out.split('rows/s\n')[-1])
    assert shown['settings']['splits'] == {'dev': 0.05, 'test': 0.5, 'seed': 42, 'user': 'hashed_ip+country'}
    assert (shown['settings']['toxic'], shown['kept'], shown['wildbench']['tasks found']) == ('keep', 39, 1)
    found = sources.conversations_of(DataSettings(tmp_path / 'out'), accept)
    assert shown['conversations'] == {name: len(sources.of_split(found, name)) for name in ('train', 'dev', 'test')}
    assert {conversation.id for conversation in found} == {f'{i}' for i in range(39)}
    prepare.main(['wildchat', *flags, '--toxic=keep', '--splits.test=0.5', '--splits.user=hashed_ip+country'])
    with pytest.raises(SystemExit, match=r"error: .*settings\.toxic: 'keep' -> 'drop'"):
        prepare.main(['wildchat', *flags, '--splits.test=0.5', '--splits.user=hashed_ip+country'])


@pytest.mark.parametrize(
    ('flags', 'fault'),
    [
        (['--splits.test=1'], r'error: settings\.splits\.test: expected a share of 0 to below 1, found 1\.0'),
        (['--max_openings=0'], r'error: settings\.max_openings: expected at least 1, found 0'),
        (['--wildbench=nothing'], 'error: nothing: expected a file, a folder or a hub name'),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, fault):
    source = write_parquet(tmp_path / 'wildchat.parquet', ROWS)
    with pytest.raises(SystemExit, match=fault):
        prepare.main(['wildchat', f'--source={source}', f'--output={tmp_path / "out"}', '--wildbench=none', *flags])


def test_every_setting_has_a_flag(capsys):
    with pytest.raises(SystemExit):
        prepare.main(['wildchat', '--help'])
    shown = capsys.readouterr().out
    for name in ('language', 'toxic', 'redacted', 'ngram', 'max_openings', *(f'splits.{x}' for x in ('dev', 'seed'))):
        assert f'--{name}' in shown
    with pytest.raises(SystemExit):
        prepare.main(['wildchat', '--output=x', '--toxic=maybe'])


def test_data_that_its_manifest_does_not_describe_is_refused(tmp_path):
    source = write_parquet(tmp_path / 'wildchat.parquet', ROWS)
    out = tmp_path / 'out'
    wildchat.prepare(str(source), out, wildbench=None)
    data, settings = out / 'conversations.jsonl.gz', DataSettings(out)
    assert len(sources.conversations_of(settings, accept)) == 39
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf'{data}: .* manifest\.json .* of {len(whole)} bytes, found {len(whole) - 1} bytes'
    ):
        sources.conversations_of(settings, accept)
    data.write_bytes(whole[:-1] + b'x')
    with pytest.raises(ValueError, match=rf'{data}: expected the file .* with sha256 .*, found '):
        sources.conversations_of(settings, accept)
    data.write_bytes(whole)
    manifest = json.loads((out / 'manifest.json').read_text())
    for broken, fault in (({'outputs': None}, 'expected the outputs'), ({'outputs': {data.name: 1}}, 'no size and')):
        (out / 'manifest.json').write_text(json.dumps(manifest | broken))
        with pytest.raises(ValueError, match=fault):
            sources.conversations_of(settings, accept)
    (out / 'manifest.json').write_text('{')
    with pytest.raises(RuntimeError, match=r'manifest\.json: expected JSON'):
        sources.conversations_of(settings, accept)
    (out / 'manifest.json').write_text(json.dumps(manifest))
    assert len(sources.conversations_of(settings, accept)) == 39
