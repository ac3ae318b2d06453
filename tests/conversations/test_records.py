"""Records: what is read is what was written, and every fault of a row is named or counted."""

import datetime
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations import records, row_files
from simrl.conversations.records import Conversation, Message, Preference
from simrl.conversations.row_files import RowError

DATA = os.environ.get('SIMRL_DATA')
needs_data = pytest.mark.skipif(not DATA, reason='SIMRL_DATA is not set')

USER = {'role': 'user', 'content': 'Hello'}
ASSISTANT = {'role': 'assistant', 'content': 'Hi.'}
ROW = {'id': 'a', 'source': 's', 'split': 'train', 'end': 'natural', 'messages': [USER, ASSISTANT]}
PAIR = {'id': 'a', 'source': 's', 'split': 'dev', 'prompt': [USER], 'chosen': 'Yes', 'rejected': 'No'}


def write_lines(path: pathlib.Path, *rows: object) -> pathlib.Path:
    path.write_bytes(b''.join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b'\n' for row in rows))
    return path


BAD_ROWS = {  # the reason, a faulty row, and what its error must name
    'not JSON': (b'{"id": "a", ', 'Expecting property name'),
    'unknown role': (ROW | {'messages': [{'role': 'human', 'content': 'x'}]}, "found 'human'"),
    'empty content': (ROW | {'messages': [USER, {'role': 'assistant', 'content': ' \n'}]}, 'message 1'),
    'two user messages in a row': (
        ROW | {'messages': [USER, USER]},
        "message 1: expected role 'assistant', found 'user'",
    ),
    'two assistant messages in a row': (ROW | {'messages': [USER, ASSISTANT, ASSISTANT]}, 'message 2'),
    'the assistant speaks first': (ROW | {'messages': [ASSISTANT]}, "expected role 'user'"),
    'system message after the start': (ROW | {'messages': [USER, {'role': 'system', 'content': 'x'}]}, 'message 1'),
    'no messages': (ROW | {'messages': [{'role': 'system', 'content': 'x'}]}, 'at least one user message'),
    'missing field': ({key: value for key, value in ROW.items() if key != 'split'}, "expected 'split'"),
    'bad end': (ROW | {'end': 'over'}, "found 'over'"),
    'bad split': (ROW | {'split': 'valid'}, "found 'valid'"),
    'wrong type': (ROW | {'messages': 'Hello'}, 'found Hello'),
    'not Unicode': (
        b'{"id":"a","source":"s","split":"dev","messages":[{"role":"user","content":"\\ud800"}]}',
        'surrogate',
    ),
}


@pytest.mark.parametrize('reason', BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_file_line_and_fault(tmp_path, reason):
    row, fault = BAD_ROWS[reason]
    path = write_lines(tmp_path / 'rows.jsonl', ROW | {'id': 'first'}, row)
    with pytest.raises(RowError, match='line 2') as caught:
        records.read_conversations(path)
    assert caught.value.reason == reason
    assert str(path) in str(caught.value)
    assert fault in str(caught.value)


def test_dropped_rows_are_counted_by_reason(tmp_path):
    rows = [row | {'id': f'{i}'} if isinstance(row, dict) else row for i, (row, _) in enumerate(BAD_ROWS.values())]
    path = write_lines(tmp_path / 'rows.jsonl', ROW | {'id': 'first'}, *rows, rows[-2], ROW | {'id': 'last'})
    found, counts = records.read_conversations(path, on_bad_rows='drop')
    assert [conversation.id for conversation in found] == ['first', 'last']
    assert counts == dict.fromkeys(BAD_ROWS, 1) | {'wrong type': 2}


NULL = {'role': 'assistant', 'content': None, 'tool_calls': []}


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'messages': [USER, NULL]}, 'missing field: message 1: content: expected a string, found null'),
        ({'messages': [USER, {'role': 'assistant'}]}, r"missing field: message 1: expected 'content', found only "),
        ({'messages': [USER, {'role': None, 'content': 'x'}]}, 'missing field: message 1: role: .* found null'),
        ({'messages': [USER, {'role': 'assistant', 'content': ['x']}]}, 'message 1: content: .* string, found list'),
        ({'messages': None}, 'missing field: messages: expected a list, found null'),
        ({'id': None}, 'missing field: id: expected a string, found null'),
        ({'id': 'c\ud800'}, 'not Unicode: id: found half of a surrogate pair at 1'),
        ({'source': '\udc00'}, 'not Unicode: source: found half of a surrogate pair at 0'),
        ({'intent': 'x\ud800'}, 'not Unicode: intent: found half of a surrogate pair at 1'),
    ],
)
def test_a_fault_names_message_and_field(tmp_path, change, fault):
    path = write_lines(tmp_path / 'rows.jsonl', ROW, ROW | {'id': 'b'} | change)
    with pytest.raises(RowError, match=f'line 2: .*{fault}'):
        records.read_conversations(path)
    found, counts = records.read_conversations(path, on_bad_rows='drop')
    assert (len(found), counts.total()) == (1, 1)


def test_a_json_file_that_is_not_a_row_a_line_is_told_the_form(tmp_path):
    path = tmp_path / 'rows.jsonl'
    for text in (json.dumps([ROW], indent=1), json.dumps(ROW, indent=1), json.dumps([ROW])):
        for encoding in ('utf-8', 'utf-16'):
            path.write_bytes(f'{text}\n'.encode(encoding))
            with pytest.raises(RowError, match=r'rows\.jsonl, line 1: not JSON: expected an object'):
                records.read_conversations(path)


def test_deep_json_is_a_bad_row(tmp_path):
    deep = json.dumps(ROW).encode()[:-1] + b', "raw": ' + b'[' * 100_000 + b']' * 100_000 + b'}'
    path = write_lines(tmp_path / 'rows.jsonl', ROW | {'id': 'b'}, deep)
    with pytest.raises(
        RowError, match='line 2: not JSON: expected an object a line, in UTF-8: maximum recursion depth exceeded'
    ):
        records.read_conversations(path)
    found, counts = records.read_conversations(path, on_bad_rows='drop')
    assert (len(found), counts) == (1, {'not JSON': 1})


def refuse(text: str) -> None:
    if 'é' in text:
        raise ValueError(f'cannot encode {text!r}')


@pytest.mark.parametrize(
    ('row', 'where'),
    [
        (ROW | {'messages': [USER, {'role': 'assistant', 'content': 'café'}]}, 'message 1'),
        (ROW | {'intent': 'café'}, 'intent'),
        (PAIR | {'prompt': [{'role': 'user', 'content': 'café'}]}, 'message 0'),
        (PAIR | {'chosen': 'café'}, 'chosen'),
        (PAIR | {'rejected': 'café'}, 'rejected'),
    ],
)
def test_a_text_that_cannot_be_used_is_a_bad_row(tmp_path, row, where):
    read = records.read_preferences if 'chosen' in row else records.read_conversations
    path = write_lines(tmp_path / 'rows.jsonl', (PAIR if 'chosen' in row else ROW) | {'id': 'good'}, row)
    assert len(read(path)[0]) == 2
    with pytest.raises(RowError, match=f"line 2: unusable text: 'a', {where}: cannot encode 'café'"):
        read(path, check=refuse)
    found, counts = read(path, on_bad_rows='drop', check=refuse)
    assert ([record.id for record in found], counts) == (['good'], {'unusable text': 1})


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'prompt': [USER, ASSISTANT]}, 'bad prompt'),
        ({'rejected': 'Yes'}, 'equal replies'),
        ({'rejected': ' '}, 'empty content'),
        ({'chosen': None}, 'missing field'),
        ({'split': ''}, 'wrong type'),
    ],
)
def test_bad_preferences(tmp_path, change, reason):
    path = write_lines(tmp_path / 'pairs.jsonl', PAIR | {'id': 'good'}, PAIR | change)
    with pytest.raises(RowError, match=f'line 2: {reason}'):
        records.read_preferences(path)
    found, counts = records.read_preferences(path, on_bad_rows='drop')
    assert len(found) == 1
    assert counts == {reason: 1}


def test_an_id_occurs_once(tmp_path):
    path = write_lines(tmp_path / 'rows.jsonl', ROW, ROW | {'id': 'b'}, ROW)
    with pytest.raises(RowError, match=r"line 3: duplicate id: 'a' is also at line 1"):
        records.read_conversations(path)
    found, counts = records.read_conversations(path, on_bad_rows='drop')
    assert len(found) == 2
    assert counts == {'duplicate id': 1}


def test_outer_white_space_is_stripped_and_counted(tmp_path):
    messages = [{'role': 'user', 'content': ' Hello\n'}, ASSISTANT, {'role': 'user', 'content': '\u00a0Bye'}]
    path = write_lines(tmp_path / 'rows.jsonl', ROW | {'messages': messages})
    (found,), counts = records.read_conversations(path)
    assert [turn.content for turn in found.spoken] == ['Hello', 'Hi.', 'Bye']
    assert counts == {records.STRIPPED: 2}


def test_what_a_row_says_arrives(tmp_path):
    cut = USER | {'truncated_chars': 12}
    row = ROW | {'messages': [{'role': 'system', 'content': 'Be brief.'}, USER, ASSISTANT, cut], 'intent': 'Greet.'}
    bare = {key: value for key, value in ROW.items() if key != 'end'} | {'id': 'b', 'intent': None, 'licence': 'MIT'}
    path = write_lines(tmp_path / 'rows.jsonl', row, b'', bare)
    (found, default), counts = records.read_conversations(path)
    assert (found.system, found.opening, found.end, found.intent) == ('Be brief.', 'Hello', 'natural', 'Greet.')
    assert [turn.truncated for turn in found.spoken] == [False, False, True]
    assert (default.system, default.end, default.intent) == (None, 'unknown', None)
    assert not counts


def test_rows_end_at_newlines_only(tmp_path):
    content = 'one\u2028two\x85three\rfour\x1cfive'
    row = ROW | {'messages': [{'role': 'user', 'content': content}]}
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode() + b'\r\n')
    assert '\u2028'.encode() in path.read_bytes()
    (found,), _ = records.read_conversations(path)
    assert found.opening == content


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'absent\.jsonl\.gz'):
        records.read_conversations(tmp_path / 'absent.jsonl.gz')
    with pytest.raises(FileNotFoundError, match=r'absent\.parquet'):
        records.read_conversations(tmp_path / 'absent.parquet')
    with pytest.raises(ValueError, match=r'rows\.csv: expected a name that ends in'):
        records.read_conversations(tmp_path / 'rows.csv')
    with pytest.raises(ValueError, match=r'rows\.csv: expected a name that ends in'):
        records.write_conversations(tmp_path / 'rows.csv', [])
    whole = gzip.compress(b''.join(json.dumps(ROW | {'id': str(i)}).encode() + b'\n' for i in range(2000)))
    (tmp_path / 'cut.jsonl.gz').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r'cut\.jsonl\.gz: the compressed file is damaged after line \d+'):
        records.read_conversations(tmp_path / 'cut.jsonl.gz', on_bad_rows='drop')
    (tmp_path / 'rows.parquet').write_bytes(b'not this')
    with pytest.raises(ValueError, match=r'rows\.parquet: not a Parquet file'):
        records.read_conversations(tmp_path / 'rows.parquet')


@pytest.mark.parametrize('suffix', ['.jsonl.gz', '.parquet'])
def test_a_damaged_file_is_named_wherever_a_byte_is_flipped(tmp_path, suffix):
    """Parquet pages carry no checksum, so a flipped byte of text may go by; but every error names the file."""
    path = tmp_path / f'rows{suffix}'
    turns = (Message('user', 'Hello'), Message('assistant', 'Hi.'))
    records.write_conversations(path, [Conversation(f'id {i}', 's', 'train', turns) for i in range(50)])
    whole = path.read_bytes()
    faults = []
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            records.read_conversations(path)
        except ValueError as error:  # any other kind of error fails the test
            faults.append(str(error))
    assert len(faults) > len(whole) / 7 / 2
    assert all(fault.startswith(str(path)) for fault in faults)


TEXTS = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=12).map(str.strip).filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> list[Conversation]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        texts = draw(st.lists(TEXTS, min_size=1, max_size=5))
        turns = [Message(('user', 'assistant')[i % 2], text, draw(st.booleans())) for i, text in enumerate(texts)]
        if draw(st.booleans()):
            turns.insert(0, Message('system', draw(TEXTS)))
        end, split = draw(st.sampled_from(records.ENDS)), draw(st.sampled_from(records.SPLITS))
        intent = draw(st.none() | TEXTS)
        found.append(Conversation(f'id {number}', draw(TEXTS), split, tuple(turns), end, intent))
    return found


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.parquet'])
@settings(max_examples=20, deadline=None)
@given(written=conversations())
def test_what_is_written_is_read(suffix, written):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'sub', 'rows' + suffix)
        records.write_conversations(path, written)
        assert records.read_conversations(path) == (written, {})
        assert os.listdir(path.parent) == [path.name]
        pairs = [
            Preference(c.id, c.source, c.split, c.messages[: 1 + (c.system is not None)], 'a', 'b') for c in written
        ]
        records.write_preferences(path, pairs)
        assert records.read_preferences(path) == (pairs, {})


def test_equal_records_make_equal_files(tmp_path, monkeypatch):
    conversation = Conversation('a', 's', 'train', (Message('user', 'Hello'),))
    for name, now in (('one.jsonl.gz', 1e9), ('two.jsonl.gz', 2e9)):
        monkeypatch.setattr('time.time', lambda now=now: now)  # gzip files hold the time unless told otherwise
        records.write_conversations(tmp_path / name, [conversation])
    assert (tmp_path / 'one.jsonl.gz').read_bytes() == (tmp_path / 'two.jsonl.gz').read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'rows.jsonl'
    conversation = Conversation('a', 's', 'train', (Message('user', 'Hello'),))
    records.write_conversations(path, [conversation])
    before = path.read_bytes()
    unwritable = Conversation('a', object(), 'train', (Message('user', 'Hello'),))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        records.write_conversations(path, [conversation, unwritable])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['rows.jsonl']


def test_parquet_is_that_of_datasets(tmp_path):
    rows = [ROW | {'intent': None}, ROW | {'id': 'b', 'intent': 'Greet.', 'messages': [USER | {'truncated_chars': 3}]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'theirs.parquet')
    found, _ = records.read_conversations(tmp_path / 'theirs.parquet')
    assert [c.intent for c in found] == [None, 'Greet.']
    assert [[turn.truncated for turn in c.messages] for c in found] == [[False, False], [True]]
    records.write_conversations(tmp_path / 'ours.parquet', found)
    theirs = datasets.Dataset.from_parquet(str(tmp_path / 'ours.parquet'), cache_dir=str(tmp_path / 'cache'))
    assert theirs[1]['messages'] == [{'role': 'user', 'content': 'Hello', 'truncated': True}]


OUT_OF_RANGE = pyarrow.array([253402300800000000], pyarrow.timestamp('us'))  # the year 10000


def test_only_needed_columns_of_parquet_are_read(tmp_path):
    scores = {'role': 'user', 'content': 'Hello', 'moderation': [{'content': 0.5, 'at': 1}]}
    table = pyarrow.Table.from_pylist([ROW | {'messages': [scores, ASSISTANT]}]).append_column('expires', OUT_OF_RANGE)
    pyarrow.parquet.write_table(table, tmp_path / 'rows.parquet')
    paths = ['id', 'expires', *(f'messages.list.element.{x}' for x in ('role', 'content', 'scores.list.element.role'))]
    assert row_files._columns(paths, ('id', 'messages')) == ['id', *paths[2:4]]
    assert row_files._columns(['messages.role.list.element'], ('id', 'messages')) == ['messages.role.list.element']
    (found,), _ = records.read_conversations(tmp_path / 'rows.parquet')
    assert [message.content for message in found.messages] == ['Hello', 'Hi.']

    pyarrow.parquet.write_table(table.drop_columns(['split']), tmp_path / 'without.parquet')
    with pytest.raises(RowError, match=r"row 1: missing field: expected 'split', found only .*'expires'"):
        records.read_conversations(tmp_path / 'without.parquet')
    pyarrow.parquet.write_table(table.select(['expires']), tmp_path / 'others.parquet')
    assert records.read_conversations(tmp_path / 'others.parquet', on_bad_rows='drop') == ([], {'missing field': 1})
    pyarrow.parquet.write_table(table.set_column(0, 'id', OUT_OF_RANGE), tmp_path / 'id.parquet')
    with pytest.raises(ValueError, match=r'id\.parquet: .* after row 0: date value out of range'):
        records.read_conversations(tmp_path / 'id.parquet')


def test_parquet_with_a_list_for_each_field_of_the_messages(tmp_path):
    """`datasets` before version 4 makes such files of a list of objects."""
    table = pyarrow.Table.from_pylist([ROW | {'messages': None}])

    def write(**lists):
        struct = pyarrow.StructArray.from_arrays([[values] for values in lists.values()], list(lists))
        index = table.column_names.index('messages')
        pyarrow.parquet.write_table(table.set_column(index, 'messages', struct), tmp_path / 'rows.parquet')

    write(role=['user', 'assistant'], content=['Hello', 'Hi.'], truncated=[None, True])
    (found,), _ = records.read_conversations(tmp_path / 'rows.parquet')
    assert found.messages == (Message('user', 'Hello'), Message('assistant', 'Hi.', truncated=True))
    write(role=['user', 'assistant'], content=['Hello'])
    with pytest.raises(RowError, match=r"row 1: .* an object of lists of one length, found {'role': \['user', "):
        records.read_conversations(tmp_path / 'rows.parquet')
    write(role=['user'], content=['Hello'])
    assert len(records.read_conversations(tmp_path / 'rows.parquet')[0]) == 1
    with pytest.raises(RowError, match=r"expected a list of objects, or .*, found {'role': 'user'"):
        records.parse_conversation(ROW | {'messages': USER})


def test_times_inside_the_messages_of_parquet_are_read(tmp_path):
    """In nanoseconds, which Python has not; as a list of objects, and as an object of lists."""
    moment = pyarrow.array([1_700_000_000_000_000_001, None], pyarrow.timestamp('ns', 'UTC'))
    fields = {'role': pyarrow.array(['user', 'assistant']), 'content': pyarrow.array(['Hello', 'Hi.']), 'when': moment}
    objects = pyarrow.StructArray.from_arrays(list(fields.values()), list(fields))
    whole = pyarrow.array([0, 2], pyarrow.int32())
    listed = pyarrow.ListArray.from_arrays(whole, objects)
    lists = pyarrow.StructArray.from_arrays(
        [pyarrow.ListArray.from_arrays(whole, column) for column in fields.values()], list(fields)
    )
    for messages in (listed, lists):
        batch = pyarrow.record_batch([messages], ['messages'])
        (read,) = row_files.batch_rows(batch)
        times = [m['when'] for m in read['messages']] if messages is listed else read['messages']['when']
        assert times == [datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC), None]
        table = pyarrow.Table.from_pylist([ROW | {'messages': None}])
        index = table.column_names.index('messages')
        pyarrow.parquet.write_table(table.set_column(index, 'messages', messages), tmp_path / 'rows.parquet')
        (found,), _ = records.read_conversations(tmp_path / 'rows.parquet')
        assert found.messages == (Message('user', 'Hello'), Message('assistant', 'Hi.'))


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, 'PARQUET_ROWS', 2)
    rows = [ROW | {'id': str(i)} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
    found, _ = records.read_conversations(tmp_path / 'rows.parquet')
    assert [conversation.id for conversation in found] == list('01234')


def test_bad_parquet_rows_are_named(tmp_path):
    datasets.Dataset.from_list([ROW, ROW | {'id': 'b', 'split': 'x'}]).to_parquet(tmp_path / 'rows.parquet')
    with pytest.raises(RowError, match=r'rows\.parquet, row 2: bad split'):
        records.read_conversations(tmp_path / 'rows.parquet')


def test_the_persona_seed_is_the_same_in_every_process():
    conversation = Conversation('sg-hRPPgZT', 's', 'train', (Message('user', 'Hello'),), intent='Greet.')
    example = records.example_of(conversation)
    assert (example.id, example.opening, example.intent, example.split) == ('sg-hRPPgZT', 'Hello', 'Greet.', 'train')
    code = (
        'from simrl.conversations.records import *; '
        "print(example_of(Conversation('sg-hRPPgZT', 's', 'train', (Message('user', 'Hello'),))).persona_seed)"
    )
    env = os.environ | {'PYTHONHASHSEED': '7'}
    other = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert int(other.stdout) == example.persona_seed
    assert 0 <= example.persona_seed < 2**31
    assert (
        records.example_of(Conversation('b', 's', 'train', conversation.messages)).persona_seed != example.persona_seed
    )


@needs_data
@pytest.mark.parametrize(
    ('name', 'kept', 'dropped'),
    [
        (
            'conversations',
            1615 - 18,
            {'two assistant messages in a row': 16, 'two user messages in a row': 1, 'the assistant speaks first': 1},
        ),
        ('sharegpt', 4805, {}),
    ],
)
def test_real_conversations(name, kept, dropped):
    path = pathlib.Path(DATA, name, 'conversations.jsonl.gz')
    found, counts = records.read_conversations(path, on_bad_rows='drop')
    stripped = counts.pop(records.STRIPPED)
    assert len(found) == kept
    assert counts == dropped
    ids = {conversation.id for conversation in found}
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).split(b'\n') if line]
    texts = [m['content'] for row in rows if row['id'] in ids for m in row['messages']]
    texts += [row['intent'] for row in rows if row['id'] in ids and row.get('intent')]
    assert stripped == sum(text != text.strip() for text in texts)
    assert sum(turn.truncated for c in found for turn in c.messages) == sum(
        bool(m.get('truncated_chars')) for row in rows if row['id'] in ids for m in row['messages']
    )
    if dropped:
        with pytest.raises(RowError, match=r'conversations\.jsonl\.gz, line \d+: two assistant messages in a row'):
            records.read_conversations(path)


@needs_data
def test_real_preferences():
    path = pathlib.Path(DATA, 'conversations', 'preferences.jsonl.gz')
    found, counts = records.read_preferences(path, on_bad_rows='drop')
    counts.pop(records.STRIPPED, None)
    assert (len(found), counts) == (1694 - 15, {'two assistant messages in a row': 15})
    assert len({preference.opening for preference in found}) < len(found)
