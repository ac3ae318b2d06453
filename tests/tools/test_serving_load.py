"""The load generator: known delays are measured, failures are counted by cause, and ratios are those of the rates."""

import contextlib
import itertools
import json
import os
import re
from typing import Any

import numpy as np
import pytest

from simrl.conversations.records import Conversation, Message, write_conversations
from simrl.remote.answers import Answer, Failure
from tests.remote.server import Reply, ScriptedServer, Status, chat_stream
from tests.tools.test_chat import model_folder
from tools.serving_load import __main__ as tool
from tools.serving_load import drive
from tools.serving_load.drive import Asked, Load, load_of
from tools.serving_load.report import Memory, Row, table

FIRST, GAP, PIECES, TOKENS = 0.06, 0.02, 4, 7


def timed(body: dict[str, Any], attempt: int) -> Reply:
    return chat_stream(['so '] * PIECES, first=FIRST, gap=GAP, usage=(3, TOKENS))


def measure(tmp_path, *words: str) -> dict[str, Any]:
    tool.main([*words, f'--output={tmp_path / "load.json"}'])
    return json.loads((tmp_path / 'load.json').read_text())


def test_known_delays_are_measured(tmp_path, capsys):
    with ScriptedServer(timed) as server:
        found = measure(tmp_path, f'mine={server.url}', '--streams', '1', '4', '--requests=4', '--repeats=2')
    assert server.most_in_flight == 4
    assert len(server.requests) == 1 + 4 + 2 * 2 * 4
    prompts = [body['messages'][0]['content'] for body in server.requests]
    assert len(set(prompts)) == len(prompts)  # no server can use one again
    assert len({body['seed'] for body in server.requests}) == len(prompts)
    for row, streams in zip(found['rows'], (1, 4), strict=True):
        assert (row['case'], row['streams'], row['side'], row['ratio']['of_medians']) == ('streams', streams, 'mine', 1)
        longest = max(repeat['seconds'] for repeat in row['repeats'])
        assert FIRST <= row['p50']['first_text'] <= row['p95']['first_text'] < longest
        assert 0 < row['p50']['gap'] <= row['p95']['gap'] < longest  # on a busy machine pieces come together
        for repeat in row['repeats']:
            assert (repeat['requests'], repeat['tokens'], repeat['failures']) == (4, 4 * TOKENS, {})
            assert repeat['seconds'] >= (FIRST + (PIECES - 1) * GAP) * 4 / streams
    assert re.search(r'^\| streams \| 4 \| mine \| [\d.,]+ \| – \| [\d.]+ \| ', capsys.readouterr().out, re.MULTILINE)


def test_sides_take_turns_and_the_first_is_compared_with_each(tmp_path, monkeypatch, capsys):
    """The offline sampler is such a side, on the prompts that the servers had."""
    asked: list[dict[str, Any]] = []

    class Child(contextlib.AbstractContextManager):
        def __exit__(self, *_: object) -> None:
            pass

        def load(self) -> None:
            pass

        def request(self, op: str, **fields: Any) -> dict[str, Any]:
            asked.append(fields)
            return {'sampling_seconds': 0.5, 'tokens': 40}

    monkeypatch.setattr(tool.offline, 'start', lambda *_, **__: Child())
    order: list[str] = []

    def named(name: str) -> ScriptedServer:
        return ScriptedServer(lambda *_: order.append(name) or chat_stream(['a'], usage=(1, 1)), models=(name,))

    with named('a') as a, named('b') as b:
        words = [f'{x}={server.url}' for x, server in (('A', a), ('B', b))]
        options = ['--streams=2', '--requests=3', '--repeats=2', '--offline=model', '--cases', 'streams', 'chats']
        found = measure(tmp_path, *words, *options, '--turns=1')
    assert order == list('aabb' + 'aaabbb' * 2) * 2
    sent = [[body['messages'][-1]['content'] for body in server.requests] for server in (a, b)]
    assert [set(texts[k : k + 3]) for texts in sent for k in (2, 5)] == [set(sent[0][2:5]), set(sent[0][5:8])] * 2
    assert [set(run['texts']) for run in asked] == [set(sent[0][2:5]), set(sent[0][5:8])]
    assert [row['side'] for row in found['rows']] == ['A', 'B', 'offline', 'A', 'B']
    offline = found['rows'][2]
    assert offline['tokens_per_second'] == 80
    assert offline['ratio']['of_medians'] == pytest.approx(found['rows'][0]['tokens_per_second'] / 80)
    assert {body['model'] for body in b.requests} == {'b'}


def test_chats_are_sent_with_their_history_and_a_fresh_one_shares_no_prefix(tmp_path):
    conversations = [
        Conversation(
            f'c{i}', 'test', 'train', tuple(Message(('user', 'assistant')[k % 2], f'{i} {k}') for k in range(5))
        )
        for i in range(8)
    ]
    conversations.append(Conversation('short', 'test', 'train', (Message('user', 'one'),)))
    write_conversations(tmp_path / 'people.jsonl', conversations)
    with ScriptedServer(lambda body, _: chat_stream([f'reply {len(body["messages"])}'])) as server:
        words = [
            server.url,
            '--streams=2',
            '--requests=2',
            '--repeats=1',
            '--turns=3',
            f'--data={tmp_path}/people.jsonl',
        ]
        found = measure(tmp_path, *words, '--cases', 'chats', 'chats-fresh')
    for fresh, row in enumerate(found['rows']):
        assert (row['repeats'][0]['requests'], len(row['first_text_by_turn'])) == (6, 3)
        bodies = [body['messages'] for body in server.requests[12 * fresh + 6 : 12 * fresh + 12]]
        chats = {body[1]['content']: sorted((b for b in bodies if b[1] == body[1]), key=len) for body in bodies}
        assert set(chats) == ({'6 0', '7 0'} if fresh else {'2 0', '3 0'})
        for opening, turns in chats.items():
            assert [len(turn) for turn in turns] == [2, 4, 6]
            replies = [f'reply {n}' for n in (2, 4)]
            person = opening[0]
            assert [m['content'] for m in turns[-1][1:]] == [
                opening,
                replies[0],
                f'{person} 2',
                replies[1],
                f'{person} 4',
            ]
            systems = [turn[0]['content'] for turn in turns]
            assert len(set(systems)) == (3 if fresh else 1)
            assert len(set(map(len, systems))) == 1


def test_failures_are_counted_by_cause(tmp_path, capsys):
    counted = chat_stream(['a'], usage=(1, 5))
    chats = [  # the first is not measured
        [counted, counted],
        [Status(429)],
        [chat_stream(['a'], finish=None)],
        [chat_stream(['a'], usage=None), counted],
        [Status(503)],
        [Status(503)],
    ]
    replies = itertools.chain(*chats)
    with ScriptedServer(lambda *_: next(replies)) as server:
        words = ['--streams=1', '--requests=5', '--repeats=1', '--turns=2', '--cases=chats']
        (row,) = measure(tmp_path, server.url, *words)['rows']
    (repeat,) = row['repeats']
    assert repeat['requests'] == 10
    assert repeat['failures'] == {'rate_limit': 1, 'cut': 1, 'no usage': 1, 'server': 2, 'not asked': 4}
    assert repeat['tokens'] == 5
    printed = capsys.readouterr().out
    assert '| 9 (cut 1, no usage 1, not asked 4, rate_limit 1, server 2) |' in printed
    assert '  first failure (cut): the reply ended early: ' in printed


def test_times_of_requests():
    answer = Answer('abc', output_tokens=6)
    done = [
        Asked(0, 1.0, (1.5, 1.75, 2.5), answer),
        Asked(1, 3.0, (3.25,), answer),
        Asked(0, 1.0, (1.125,), Failure('cut', 'early')),  # what came of it counts for nothing
    ]
    load = load_of(done, requests=4, seconds=3.0, computed=1.5)
    assert load == Load(3.0, 1.5, 4, 12, {'cut': 1, 'not asked': 1}, ((0.5,), (0.25,)), (0.25, 0.75), {'cut': 'early'})
    assert load.rate == 4


def test_ratios_and_percentiles():
    def row(side: str, seconds: list[float]) -> Row:
        loads = tuple(Load(s, s / 10, 1, 60, {}, ((s / 10, s / 5),), (0.25, 0.5)) for s in seconds)
        return Row('streams', 8, side, loads)

    first, other = row('mine', [1.0, 2.0, 3.0]), row('other', [2.0, 8.0, 3.0])
    assert other.rate == 20
    assert other.ratio(first) == (1.5, 1.0, 4.0)
    assert other.first_text(50) == pytest.approx(np.percentile([0.2, 0.4, 0.8, 1.6, 0.3, 0.6], 50))
    assert other.gap(95) == pytest.approx(0.5)
    nothing = Row('streams', 8, 'broken', (Load(1.0, 0.0, 2, 0, {'connection': 2}),) * 3)
    assert nothing.ratio(first) is None
    lines = table([first, other, nothing]).splitlines()
    assert lines[3] == '| streams | 8 | other | 20.0 | 1.50 [1.00, 4.00] | 500 | 1,400 | – | 375 | 500 | 3 | 0 | 10% |'
    assert lines[4] == '| streams | 8 | broken | 0.0 | – | – | – | – | – | – | 6 | 6 (connection 6) | 0% |'


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        ([*range(0, 400, 10), *[400] * 120], True),  # it fills, then stays
        ([400 + i % 3 for i in range(160)], True),
        ([400 + 0.05 * i for i in range(160)], True),  # 4 MiB from quarter to quarter: within 1% or 4 MiB
        ([400 + 0.5 * i for i in range(160)], False),
        ([400] * 7, None),
    ],
)
def test_memory_is_flat_if_it_does_not_grow_after_the_first_quarter(sizes, expected):
    memory = Memory(2**20, tuple(int(size * 2**20) for size in sizes), 2**20)
    assert memory.is_flat is expected
    assert str(memory).endswith({True: ': flat', False: 'not flat', None: 'no verdict'}[expected])


def test_soak_watches_the_server(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drive, 'WATCH_SECONDS', 0.005)
    with ScriptedServer(lambda *_: chat_stream(['a'], first=0.01)) as server:
        words = [f'mine={server.url}', '--cases=soak', '--streams', '1', '4', '--requests=40', f'--pid={os.getpid()}']
        found = measure(tmp_path, *words)
    assert (len(server.requests), server.most_in_flight) == (40, 4)
    memory = found['memory']['mine']
    assert len(memory['sizes']) > 8
    assert 2**20 < memory['before'] < 2**40
    assert re.search(r'^mine, resident MiB: .* before, .* after, .*flat$', capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['URL', 'URL'], 'expected another name than those before, and than offline, found http'),
        (['offline=URL'], 'expected another name than those before, and than offline, found offline'),
        (['URL', '--model', 'a', 'b'], '--model: expected one, or one for each of 1 servers, found 2'),
        (['URL', '--model=b'], "expected the model 'b', found model"),
        (['URL', '--pid', '1', '2'], '--pid: expected one for each of 1 servers, found 2'),
        (['URL', '--pid=999999999'], 'No such file'),
        (['URL', '--data=nowhere.jsonl'], 'No such file'),
        (['URL', '--extra={'], r'EndpointSettings.extra: expected a JSON object'),
        (['http://127.0.0.1:9/v1'], 'expected a reply, found none'),
    ],
)
def test_errors_are_one_line(tmp_path, words, expected):
    with (
        ScriptedServer(timed) as server,
        pytest.raises(SystemExit, match=f'^error: .*{expected}') as error,
    ):
        measure(tmp_path, *(word.replace('URL', server.url) for word in words))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'load.json').exists()


@pytest.mark.long
def test_the_offline_sampler_is_measured_in_a_process_of_its_own(tmp_path):
    folder = model_folder(tmp_path / 'model')
    people = [Conversation(f'c{i}', 'test', 'train', (Message('user', f'{i}' * 9),)) for i in range(10)]
    write_conversations(tmp_path / 'people.jsonl', people)
    with ScriptedServer(timed) as server:
        options = [
            f'--offline={folder}',
            f'--data={tmp_path}/people.jsonl',
            '--streams=4',
            '--requests=6',
            '--repeats=1',
            '--max-tokens=5',
        ]
        found = measure(tmp_path, server.url, *options)
        offline = found['rows'][1]
        assert offline['side'] == 'offline'
        assert 6 <= offline['repeats'][0]['tokens'] <= 6 * 5
        assert offline['tokens_per_second'] > 0
        with pytest.raises(SystemExit, match=r'^error: offline: .*nowhere: expected a folder'):
            measure(tmp_path, server.url, '--offline=nowhere')
