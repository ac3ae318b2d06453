"""WildChat: every rule's count on planted rows, whatever the format; kills; bad input."""

import dataclasses
import datetime
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import datasets
import huggingface_hub
import pyarrow
import pytest

from simrl.conversations import choices, raw_rows, wildchat, wildchat_facts
from simrl.conversations.records import read_conversations
from simrl.conversations.row_files import RowError
from simrl.conversations.splits import UserSplits
from simrl.conversations.wildchat import WildChatSettings
from tests.conversations.wildchat_rows import (
    WHEN,
    raw_message,
    raw_row,
    read_jsonl,
    wildbench_row,
    write_jsonl,
    write_parquet,
)

SETTINGS = WildChatSettings(max_openings=3)
OVER, UNDER = 'please write me a very short prompt about', 'please write me a rather long text about'


def planted() -> list[dict]:
    """Rows of every kind; those that stay are called keep-*."""
    word = (f'w{number}' for number in itertools.count())
    return [
        raw_row('keep-plain', 'Hello there', 'Hi.'),
        raw_row('keep-spaces', '  What is   that?\n', 'A bird. '),
        raw_row('keep-unanswered', 'Are you there', 'Yes.', 'Then why'),
        raw_row('keep-redacted', 'I am <PERSON>', 'Hi.', redacted=True),
        raw_row('keep-nowhere', 'Where am I', 'Here.', country=None),
        raw_row('keep-no-time', 'When is it', 'Now.', timestamp=None),
        raw_row('keep-no-turn', 'How often', 'Once.', turn=None),
        # One user in two countries, twice in one of them.
        raw_row('keep-carol-1', 'From Chile', 'Ok.', user='carol', country='Chile'),
        raw_row('keep-carol-2', 'From Peru', 'Ok.', user='carol', country='Peru'),
        raw_row('french', 'Bonjour', 'Salut.', language='French'),
        raw_row('no-language', 'Hm', 'Hm.', language=None),
        raw_row('toxic', 'Bad', 'Worse.', toxic=True),
        raw_row('french-and-toxic', 'Mal', 'Pire.', language='French', toxic=True),
        raw_row('no-user', 'I am nobody', 'So am I.', user=None),
        raw_row('empty', 'Hello', ' \n'),
        raw_row('null', 'Hello', None),
        raw_row('nothing-said', turn=0),
        raw_row('two-users', conversation=[raw_message('user', 'One'), raw_message('user', 'Two')], turn=2),
        raw_row('assistant-first', conversation=[raw_message('assistant', 'Hi.')], turn=0),
        raw_row('fewer-turns', 'One', 'Ok.', turn=2),
        raw_row('early', 'Long ago', 'Yes.', timestamp=datetime.datetime(1971, 1, 1, tzinfo=datetime.UTC)),
        raw_row('keep-plain', 'Hello there', 'Hi.', user='bob'),  # the same hash again
        raw_row('task-1', 'WRITE a   haiku about the sea', 'Waves.'),
        raw_row('task-2', 'write a haiku about the sea', 'Foam.', 'Longer', 'Foam and foam.'),
        raw_row('task-in-french', 'Explain gravity', 'Masse.', language='French'),
        raw_row('keep-later-task', 'Hi', 'Hi.', 'write a haiku about the sea', 'Waves.'),
        # Eight words of 4 openings are equal (over 3), of 3 others too (not over 3), whatever their case.
        *(raw_row(f'over-{i}', f'{next(word)} {text} {next(word)}', 'Ok.') for i, text in enumerate([OVER] * 3)),
        raw_row('over-3', OVER.upper(), 'Ok.'),
        *(raw_row(f'keep-under-{i}', f'{next(word)} {UNDER} {next(word)}', 'Ok.') for i in range(3)),
        raw_row('over-short', OVER.removesuffix(' about'), 'Ok.'),
        # Its repeated n-gram counts once; the copy of its hash not at all.
        raw_row('keep-itself', ' '.join(['one two three four five six seven'] * 9), 'Ok.'),
        raw_row('keep-itself', ' '.join(['one two three four five six seven'] * 9), 'Ok.'),
    ]


DROPPED = {
    'language is not English': 4,
    'toxic': 1,
    'no user': 1,
    'empty content': 1,
    'missing field': 1,
    'no messages': 1,
    'two user messages in a row': 1,
    'the assistant speaks first': 1,
    'another number of turns': 1,
    'bad timestamp': 1,
    'first message of a WildBench task': 2,
    'duplicate conversation': 2,
    'frequent first message': 5,
}
KEPT = list(dict.fromkeys(row['conversation_hash'] for row in planted() if 'keep-' in row['conversation_hash']))
TASKS = [wildbench_row(text) for text in ('Write a haiku about the sea', 'explain gravity', 'Never asked')]


@pytest.fixture
def wildbench(tmp_path) -> str:
    return str(write_parquet(tmp_path / 'wildbench.parquet', TASKS))


@pytest.mark.parametrize('suffix', ['.parquet', '.jsonl', '.jsonl.gz', ''])
def test_every_planted_row_counts_under_its_reason(tmp_path, wildbench, suffix):
    if suffix:
        source = tmp_path / f'wildchat{suffix}'
        (write_parquet if suffix == '.parquet' else write_jsonl)(source, planted())
    else:  # a folder of files, read by name
        source = tmp_path / 'data'
        source.mkdir()
        write_parquet(source / 'a.parquet', planted()[:20])
        write_jsonl(source / 'b.jsonl', planted()[20:])
    made = wildchat.prepare(str(source), tmp_path / 'out', SETTINGS, wildbench=wildbench)
    assert made['dropped'] == DROPPED
    assert (made['rows'], made['kept']) == (len(planted()), len(KEPT))
    assert made['rows'] == made['kept'] + sum(made['dropped'].values())
    assert made['wildbench'] == {'tasks': 3, 'tasks found': 2, 'rows': 3}
    found, counts = read_conversations(tmp_path / 'out' / 'conversations.jsonl.gz')
    assert [conversation.id for conversation in found] == KEPT
    assert not counts  # texts are stripped already
    assert made['texts stripped of outer white space'] == 2
    ends = {conversation.id: conversation.end for conversation in found}
    assert [name for name in ends if ends[name] != 'natural'] == ['keep-unanswered']
    assert ends['keep-unanswered'] == 'cut'
    assert sum(made['conversations'].values()) == len(KEPT)
    assert sum(made['addresses'].values()) == 2  # alice and carol; bob's only row is a duplicate
    assert made['addresses in several splits'] == 0
    assert json.loads((tmp_path / 'out' / 'manifest.json').read_text()) == made


def test_toxic_and_redacted_rows_follow_the_policy(tmp_path):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    settings = dataclasses.replace(SETTINGS, toxic='keep', redacted='drop')
    made = wildchat.prepare(source, tmp_path / 'out', settings, wildbench=None)
    assert 'toxic' not in made['dropped']
    assert made['dropped']['redacted'] == 1
    assert made['dropped']['language is not English'] == DROPPED['language is not English']
    assert made['wildbench'] is None
    names = [row['id'] for row in read_jsonl(tmp_path / 'out' / 'conversations.jsonl.gz')]
    assert {'toxic', 'task-1', 'task-2'} <= set(names)
    with pytest.raises(RowError, match="toxic: expected true or false, found 'yes'"):
        wildchat.parse_row(raw_row('a', 'Hi', 'Hi.', toxic='yes'), SETTINGS)


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'conversation': ['Hi']}, 'wrong type: messages: expected a list of objects'),
        ({'conversation': 'Hi'}, 'wrong type: messages: expected a list of objects'),
        ({'conversation': None}, 'missing field: messages'),
        ({'conversation': [{'role': 'user'}]}, "missing field: message 0: expected 'content'"),
        ({'conversation_hash': None}, 'missing field: id: expected a string, found null'),
        ({'hashed_ip': 7}, 'no user: hashed_ip: expected a string, found 7'),
        ({'turn': '1'}, "another number of turns: turn: expected 1, found '1'"),
    ],
)
def test_a_row_of_other_types_is_dropped_with_its_reason(tmp_path, change, fault):
    with pytest.raises(RowError, match=fault):
        wildchat.parse_row(raw_row('a', 'Hi', 'Hi.') | change, SETTINGS)
    source = write_jsonl(tmp_path / 'wildchat.jsonl', [raw_row('a', 'Hi', 'Hi.'), raw_row('b', 'Hi', 'Hi.') | change])
    made = wildchat.prepare(str(source), tmp_path / 'out', wildbench=None)
    assert (made['kept'], made['dropped']) == (1, {fault.partition(':')[0]: 1})


def test_a_draw_changes_no_split_and_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [raw_row(f'{i}', f'Hello {i}', 'Hi.', user=f'user {i % 40}') for i in range(100)]
    settings = WildChatSettings(splits=UserSplits(dev=0.2, test=0.3))
    found = []
    for name, number, given in (('all', None, rows), ('some', 30, rows), ('turned', 30, rows[::-1])):
        source = str(write_jsonl(tmp_path / f'{name}.jsonl', given))
        settings = dataclasses.replace(settings, max_conversations=number)
        made = wildchat.prepare(source, tmp_path / name, settings, wildbench=None)
        assert made['dropped'] == ({} if number is None else {'not drawn': 70})
        found.append({row['id']: row['split'] for row in read_jsonl(tmp_path / name / 'conversations.jsonl.gz')})
        assert made['kept'] == len(found[-1])
    assert found[1] == found[2]
    assert found[1].items() < found[0].items()
    assert set(found[0].values()) == {'train', 'dev', 'test'}


NUMBER = int(WHEN.timestamp())


@pytest.mark.parametrize(
    'value',
    [
        *(NUMBER * unit for unit in (1, 10**3, 10**6, 10**9)),
        *(float(NUMBER), NUMBER * 1e3, str(NUMBER), str(NUMBER * 10**9), f'{NUMBER}.0'),
        *('2023-04-09T00:02:53Z', '2023-04-09 00:02:53+00:00', '2023-04-09 00:02:53', '2023-04-09T02:02:53+02:00'),
        *('2023-04-09 00:02:53.000 UTC', WHEN, WHEN.replace(tzinfo=None)),
        WHEN.astimezone(datetime.timezone(datetime.timedelta(hours=-7))),
    ],
    ids=str,
)
def test_a_time_is_read_in_whatever_unit(value):
    assert raw_rows.read_time(value) == WHEN


@pytest.mark.parametrize(
    'value',
    [0, -1, True, '', 'yesterday', '20230409', float('nan'), float('inf'), 10**40, [1], WHEN.replace(year=1999)],
)
def test_a_time_that_may_be_misread_is_refused(value):
    with pytest.raises(RowError, match='bad timestamp: expected a time of 2000 to 2099, found'):
        raw_rows.read_time(value)


@pytest.mark.parametrize('unit', ['s', 'ms', 'us', 'ns', 'number', 'text'])
@pytest.mark.parametrize('zone', [None, 'UTC', 'America/New_York'])
def test_times_of_a_parquet_column_of_every_unit(tmp_path, unit, zone):
    when = WHEN + datetime.timedelta(seconds=7)
    rows = [raw_row('a', 'Hi', 'Hi.'), raw_row('b', 'Hello', 'Hi.', timestamp=when)]
    if unit in ('number', 'text'):
        rows = [row | {'timestamp': int(row['timestamp'].timestamp() * 1000)} for row in rows]
    kinds = {'number': pyarrow.int64(), 'text': pyarrow.string()}
    kind = kinds[unit] if unit in kinds else pyarrow.timestamp(unit, zone)
    source = write_parquet(tmp_path / 'wildchat.parquet', rows, timestamp=kind)
    made = wildchat.prepare(str(source), tmp_path / 'out', wildbench=None)
    assert made['period'] == ['2023-04-09T00:02:53+00:00', '2023-04-09T00:03:00+00:00']
    found = read_jsonl(tmp_path / 'out' / 'conversations.jsonl.gz')
    assert [row['timestamp'] for row in found] == made['period']


def test_only_the_columns_of_the_rules_are_read(tmp_path, monkeypatch):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    seen = []
    parse = wildchat.parse_row
    monkeypatch.setattr(wildchat_facts, 'parse_row', lambda row, *rest: seen.append(row) or parse(row, *rest))
    wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)
    assert {name for row in seen for name, value in row.items() if value is not None} == set(wildchat.FIELDS)
    assert {name for row in seen for message in row['conversation'] for name in message} == {'role', 'content'}


class Killed(BaseException):
    """Stands for the end of the process: nothing of the program's own may handle it."""


def test_a_killed_preparation_resumes(tmp_path, wildbench, monkeypatch):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    unbroken = wildchat.prepare(source, tmp_path / 'unbroken', SETTINGS, wildbench=wildbench)
    out, read, passes = tmp_path / 'out', raw_rows._local_rows, []

    def dying(at_pass: int, at_row: int) -> Callable:
        def rows(path: pathlib.Path, fields: Sequence[str]) -> Iterator[Mapping]:
            if fields == wildchat.FIELDS:
                passes.append(at_row)
            for i, row in enumerate(read(path, fields)):
                if fields == wildchat.FIELDS and (len(passes), i) == (at_pass, at_row):
                    raise Killed
                yield row

        return rows

    for at_pass, at_row in ((1, 0), (1, 30), (2, 0), (1, 30), (1, len(KEPT))):  # the first pass is finished once
        passes.clear()
        monkeypatch.setattr(raw_rows, '_local_rows', dying(at_pass, at_row))
        with pytest.raises(Killed):
            wildchat.prepare(source, out, SETTINGS, wildbench=wildbench)
        assert not (out / 'manifest.json').exists()
        assert not (out / 'conversations.jsonl.gz').exists()
        (out / 'conversations.jsonl.gz.partial').write_bytes(b'what a kill of the process leaves')
    monkeypatch.setattr(raw_rows, '_local_rows', read)
    assert wildchat.prepare(source, out, SETTINGS, wildbench=wildbench) == unbroken
    for name in ('conversations.jsonl.gz', 'manifest.json'):
        assert (out / name).read_bytes() == (tmp_path / 'unbroken' / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {'conversations.jsonl.gz', 'manifest.json', 'stage.lock'}


def test_a_killed_first_pass_continues_after_its_last_checkpoint(tmp_path, wildbench, monkeypatch):
    """Whatever the row of the kill; files before the checkpoint are not opened."""
    rows, source = planted(), tmp_path / 'data'
    source.mkdir()
    write_parquet(source / 'a.parquet', rows[:13])
    write_jsonl(source / 'b.jsonl', rows[13:20])
    write_jsonl(source / 'c.jsonl.gz', rows[20:])
    unbroken = wildchat.prepare(str(source), tmp_path / 'unbroken', SETTINGS, wildbench=wildbench)
    monkeypatch.setattr(wildchat_facts, 'CHECKPOINT_ROWS', 5)
    parse, read = wildchat_facts.parse_row, raw_rows._local_rows
    parsed: list[Mapping] = []
    opened: list[str] = []

    def reading(path: pathlib.Path, fields: Sequence[str]) -> Iterator[Mapping]:
        opened.append(path.name)
        return read(path, fields)

    monkeypatch.setattr(raw_rows, '_local_rows', reading)
    done = 0
    for kill in range(0, len(rows), 3):

        def dying(row: Mapping, *rest: object, last: int = kill - done) -> tuple:
            if len(parsed) == last:
                raise Killed
            parsed.append(row)
            return parse(row, *rest)

        monkeypatch.setattr(wildchat_facts, 'parse_row', dying)
        parsed.clear()
        opened.clear()
        with pytest.raises(Killed):
            wildchat.prepare(str(source), tmp_path / 'out', SETTINGS, wildbench=wildbench)
        names = [row['conversation_hash'] for row in parsed]
        assert names == [row['conversation_hash'] for row in rows[done:kill]]
        assert opened[1:] == ['a.parquet', 'b.jsonl', 'c.jsonl.gz'][(done > 13) + (done > 20) :][: len(opened) - 1]
        done = kill - kill % 5
    assert done > 25
    monkeypatch.setattr(wildchat_facts, 'parse_row', parse)
    assert wildchat.prepare(str(source), tmp_path / 'out', SETTINGS, wildbench=wildbench) == unbroken
    first, second = (tmp_path / name / 'conversations.jsonl.gz' for name in ('unbroken', 'out'))
    assert first.read_bytes() == second.read_bytes()


def test_a_checkpoint_without_its_ngrams_is_refused(tmp_path, monkeypatch):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    monkeypatch.setattr(wildchat_facts, 'CHECKPOINT_ROWS', 5)
    with monkeypatch.context() as patch:
        patch.setattr(wildchat, 'decide', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)
    files = (tmp_path / 'out' / 'unfinished' / 'ngrams').glob('ngrams-*')
    next(path for path in files if path.stat().st_size).write_bytes(b'')
    with pytest.raises(ValueError, match=r'ngrams-\d\d: expected \d+ bytes of a killed preparation, found 0; delete '):
        wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)


def test_a_kill_between_data_and_manifest_resumes(tmp_path, monkeypatch):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    unbroken = wildchat.prepare(source, tmp_path / 'unbroken', SETTINGS, wildbench=None)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr('simrl.conversations.manifest.describe', die)
        with pytest.raises(Killed):
            wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)
    assert (tmp_path / 'out' / 'conversations.jsonl.gz').exists()
    assert wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None) == unbroken


def test_what_a_kill_left_is_not_used_with_other_settings(tmp_path, monkeypatch):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    with monkeypatch.context() as patch:
        patch.setattr(wildchat, '_second_pass', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)
    settings = dataclasses.replace(SETTINGS, splits=UserSplits(seed=1))
    expected = wildchat.prepare(source, tmp_path / 'anew', settings, wildbench=None)
    assert wildchat.prepare(source, tmp_path / 'out', settings, wildbench=None) == expected


def test_a_finished_preparation_is_confirmed_or_refused(tmp_path, wildbench):
    source, out = tmp_path / 'wildchat.parquet', tmp_path / 'out'
    write_parquet(source, planted())
    made = wildchat.prepare(str(source), out, SETTINGS, wildbench=wildbench)
    before = (out / 'conversations.jsonl.gz').stat().st_mtime_ns
    assert wildchat.prepare(str(source), out, SETTINGS, wildbench=wildbench) == made
    assert (out / 'conversations.jsonl.gz').stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"out: .* other settings or inputs: settings\.toxic: 'drop' -> 'keep'"):
        wildchat.prepare(str(source), out, dataclasses.replace(SETTINGS, toxic='keep'), wildbench=wildbench)
    with pytest.raises(ValueError, match=r'inputs\.wildbench: .* -> \(absent\)'):
        wildchat.prepare(str(source), out, SETTINGS, wildbench=None)
    with (out / 'conversations.jsonl.gz').open('r+b') as file:
        file.seek(30)
        file.write(b'?')
    with pytest.raises(ValueError, match=r'conversations\.jsonl\.gz: expected the file that .* with sha256'):
        wildchat.prepare(str(source), out, SETTINGS, wildbench=wildbench)
    (out / 'conversations.jsonl.gz').unlink()
    with pytest.raises(ValueError, match=r'conversations\.jsonl\.gz: expected the file that .* found none'):
        wildchat.prepare(str(source), out, SETTINGS, wildbench=wildbench)
    write_parquet(source, planted()[:-1])
    with pytest.raises(ValueError, match=r'inputs\.source\.wildchat\.parquet\.sha256'):
        wildchat.prepare(str(source), out, SETTINGS, wildbench=wildbench)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    source = str(write_parquet(tmp_path / 'wildchat.parquet', planted()))
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'conversations.jsonl.gz').write_bytes(b'mine')
    with pytest.raises(ValueError, match=r'out: expected an empty folder .* found conversations\.jsonl\.gz'):
        wildchat.prepare(source, tmp_path / 'out', SETTINGS, wildbench=None)
    assert (tmp_path / 'out' / 'conversations.jsonl.gz').read_bytes() == b'mine'


@pytest.mark.parametrize(
    ('rows', 'suffix', 'fault'),
    [
        (
            [{'conversation_hash': 'a', 'conversation': []}],
            '.parquet',
            r'row 1: expected the fields model, timestamp, turn, language, toxic, redacted, country, hashed_ip, found',
        ),
        ([raw_row('a', 'Hi', 'Hi.'), {'prompt': 'Hi'}], '.jsonl', 'line 2: expected the fields conversation_hash, '),
        ([raw_row('a', 'Hi', 'Hi.', language='French')], '.jsonl', "found none: {'language is not English': 1}"),
        ([], '.jsonl', 'expected conversations that pass all rules, found none: {}'),
    ],
)
def test_data_of_another_schema_is_refused(tmp_path, rows, suffix, fault):
    path = (write_parquet if suffix == '.parquet' else write_jsonl)(tmp_path / f'rows{suffix}', rows)
    with pytest.raises(ValueError, match=f'{path}.*{fault}'):
        wildchat.prepare(str(path), tmp_path / 'out', wildbench=None)
    assert not (tmp_path / 'out' / 'manifest.json').exists()


def test_damaged_and_missing_files_are_named(tmp_path):
    path = write_jsonl(tmp_path / 'rows.jsonl', planted())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RowError, match=rf'rows\.jsonl, line {len(planted())}: not JSON'):
        wildchat.prepare(str(path), tmp_path / 'out', wildbench=None)
    path = write_parquet(tmp_path / 'rows.parquet', planted())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r'rows\.parquet: not a Parquet file, or damaged after row 0'):
        wildchat.prepare(str(path), tmp_path / 'out2', wildbench=None)
    with pytest.raises(FileNotFoundError, match='nothing: expected a file, a folder or a hub name OWNER/NAME'):
        wildchat.prepare(str(tmp_path / 'nothing'), tmp_path / 'out3')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match=r'empty: expected files that end in one of \.parquet, \.jsonl'):
        wildchat.prepare(str(tmp_path / 'empty'), tmp_path / 'out3')
    with pytest.raises(ValueError, match='expected none for the local data'):
        wildchat.prepare(str(path), tmp_path / 'out3', revision='main')
    no_tasks = write_jsonl(tmp_path / 'tasks.jsonl', [])
    with pytest.raises(ValueError, match=r'tasks\.jsonl: expected at least one task'):
        wildchat.prepare(str(tmp_path / 'rows.jsonl'), tmp_path / 'out3', wildbench=str(no_tasks))
    no_user = write_jsonl(tmp_path / 'tasks2.jsonl', [{'conversation_input': []}])
    with pytest.raises(ValueError, match='expected a user message in conversation_input'):
        wildchat.prepare(str(tmp_path / 'rows.jsonl'), tmp_path / 'out3', wildbench=str(no_user))


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'ngram': 0}, 'ngram: expected at least 1'),
        ({'max_openings': 0}, 'max_openings: expected at least 1'),
        ({'max_conversations': 0}, 'max_conversations: expected at least 1'),
    ],
)
def test_impossible_settings(change, fault):
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(SETTINGS, **change)


class Hub:
    """Data sets of a hub, each a local file, behind the two calls that reach for the network."""

    def __init__(self, files: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        load = datasets.load_dataset

        def dataset_info(_: object, name: str, *, revision: str | None, files_metadata: bool) -> object:
            if name not in files:
                raise ConnectionError('no such data set')
            lfs = {'size': 1, 'sha256': f'sha of {name}', 'pointerSize': 1}
            siblings = [{'rfilename': 'README.md'}, {'rfilename': f'data/train{files[name].suffix}', 'lfs': lfs}]
            return huggingface_hub.DatasetInfo(id=name, sha=revision or 'main-commit', siblings=siblings, tags=[])

        def load_dataset(path: str, **options: object) -> object:
            self.calls.append((path, options))
            kept = {key: options[key] for key in ('streaming', 'columns', 'batch_size') if key in options}
            kind = 'parquet' if files[path].suffix == '.parquet' else 'json'
            return load(kind, data_files=str(files[path]), split='train', **kept)

        monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', dataset_info)
        monkeypatch.setattr(datasets, 'load_dataset', load_dataset)


def test_a_hub_data_set_is_streamed_at_one_commit(tmp_path, wildbench, monkeypatch):
    source = write_parquet(tmp_path / 'wildchat.parquet', planted())
    local = wildchat.prepare(str(source), tmp_path / 'local', SETTINGS, wildbench=wildbench)
    hub = Hub({wildchat.SOURCE: source, wildchat.WILDBENCH: pathlib.Path(wildbench)}, monkeypatch)
    made = wildchat.prepare(wildchat.SOURCE, tmp_path / 'hub', SETTINGS)
    assert {**made, 'inputs': 0} == {**local, 'inputs': 0}
    assert made['inputs']['source'] == {
        'commit': 'main-commit',
        'data/train.parquet': {'size': 1, 'sha256': 'sha of allenai/WildChat-1M'},
    }
    of_source = [options for name, options in hub.calls if name == wildchat.SOURCE]
    assert len(of_source) == 2  # passes
    for options in of_source:
        assert options['revision'] == 'main-commit'
        assert options['columns'] == list(wildchat.FIELDS)
        assert options['streaming'] is True
    (of_tasks,) = (options for name, options in hub.calls if name == wildchat.WILDBENCH)
    assert (of_tasks['name'], of_tasks['split']) == ('v2', 'test')
    with pytest.raises(
        FileNotFoundError, match=r'owner/name: .* the hub gives no data set of this name: ConnectionError'
    ):
        wildchat.prepare('owner/name', tmp_path / 'out', SETTINGS)


def test_a_killed_stream_of_the_hub_continues_in_its_file(tmp_path, wildbench, monkeypatch):
    (tmp_path / 'data').mkdir()
    for name, rows in (('a', planted()[:13]), ('b', planted()[13:26]), ('c', planted()[26:])):
        write_parquet(tmp_path / 'data' / f'{name}.parquet', rows)
    local = wildchat.prepare(str(tmp_path / 'data'), tmp_path / 'local', SETTINGS, wildbench=wildbench)
    Hub({wildchat.SOURCE: tmp_path / 'data' / '*.parquet', wildchat.WILDBENCH: pathlib.Path(wildbench)}, monkeypatch)
    monkeypatch.setattr(wildchat_facts, 'CHECKPOINT_ROWS', 5)
    opened, read = [], raw_rows._shard_rows

    def reading(shard: object, fields: Sequence[str], place: str) -> Iterator[Mapping]:
        opened.append(place)
        return read(shard, fields, place)

    monkeypatch.setattr(raw_rows, '_shard_rows', reading)
    with monkeypatch.context() as patch:
        parsed, parse = [], wildchat_facts.parse_row

        def dying(row: Mapping, *rest: object) -> tuple:
            if len(parsed) == 17:
                raise Killed
            parsed.append(row)
            return parse(row, *rest)

        patch.setattr(wildchat_facts, 'parse_row', dying)
        with pytest.raises(Killed):
            wildchat.prepare(wildchat.SOURCE, tmp_path / 'out', SETTINGS)
    before = len(opened)
    made = wildchat.prepare(wildchat.SOURCE, tmp_path / 'out', SETTINGS)
    assert {**made, 'inputs': 0} == {**local, 'inputs': 0}
    files = [f'{wildchat.SOURCE}, train, file {number}' for number in (1, 2, 3)]
    tasks = f'{wildchat.WILDBENCH}, test, file 1'
    assert opened[:before] == [tasks, *files[:2]]
    assert opened[before:] == [tasks, *files[1:], *files]  # of the first pass, then of the second


def test_json_of_the_hub_is_streamed_from_its_folder_and_splits(tmp_path, monkeypatch):
    texts = [f'\n\nHuman: {i}\n\nAssistant: ' for i in range(9)]
    rows = [{'chosen': f'{text}Yes.', 'rejected': f'{text}No.'} for text in texts]
    source = write_jsonl(tmp_path / 'train.jsonl', rows)
    hub = Hub({choices.HH_RLHF: source}, monkeypatch)
    made = choices.prepare_hh_rlhf(choices.HH_RLHF, tmp_path / 'out', choices.HHSettings(), revision='abc')
    assert made['dropped'] == {'duplicate pair': 9}  # both splits are the same file here
    assert [(options['split'], options['data_dir'], options['revision']) for _, options in hub.calls] == [
        ('train', 'helpful-base', 'abc'),
        ('test', 'helpful-base', 'abc'),
    ]
