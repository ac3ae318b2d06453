"""The command from tasks to numbers, with assistants and judges behind a scripted server."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.stats

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Conversation, Message, write_conversations
from simrl.evaluation.results import files as result_files
from simrl.rollouts.agents import ModelAgent
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.token_sampling import Sampling
from simrl.serving.load import resampled
from tests.evaluation.report.fake_run import fake_results
from tests.evaluation.wildbench import made_up
from tests.remote.dying import Killed, dying_cache
from tests.remote.server import ScriptedServer, Status, chat_reply
from tests.serving.test_stream import CHAT, agent
from tools import device_replies, report, wildbench
from tools.device_replies import check_room

JUDGES = ('org/b', 'org_b', 'c')  # two are one file's name but for what it cannot hold
MODELS = ('mine', 'initial', *JUDGES)
NUM = 8


@pytest.fixture
def tasks(tmp_path: pathlib.Path) -> str:
    rows = [made_up.task_row(number, items=1 + number % 4, turns=1 + number % 3) for number in range(NUM)]
    path = tmp_path / 'tasks.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def judges(server: ScriptedServer, names: tuple[str, ...] = JUDGES) -> list[str]:
    quick = {'in_flight': 2, 'tries': 1, 'try_seconds': 1.0, 'deadline': 2.0}
    return ['--judge=' + json.dumps({'url': server.url, 'model': name, **quick}) for name in names]


def generate(server: ScriptedServer, tasks: str, output: pathlib.Path, model: str) -> None:
    endpoint = [
        f'--endpoint.url={server.url}',
        f'--endpoint.model={model}',
        '--endpoint.tries=1',
        '--endpoint.in_flight=2',
    ]
    wildbench.main(['generate', f'--tasks={tasks}', f'--output={output}', *endpoint])


def run(
    server: ScriptedServer,
    tasks: str,
    folder: pathlib.Path,
    names: tuple[str, ...] = JUDGES,
    *suppressed: type[BaseException],
) -> None:
    """All of it: replies of two assistants, and every protocol.

    Args:
        suppressed: what a command may end with.
    """

    def judge(*command: str) -> None:
        with contextlib.suppress(*suppressed):
            wildbench.main(command)

    mine, initial = (folder / f'{model}.json' for model in ('mine', 'initial'))
    for model, path in (('mine', mine), ('initial', initial)):
        generate(server, tasks, path, model)
        flags = [f'--tasks={tasks}', f'--generations={path}', *judges(server, names)]
        judge('checklist', *flags, f'--output={folder / model}.checklist.jsonl')
        judge('score', *flags, f'--output={folder / "score"}')
    flags = [f'--tasks={tasks}', f'--generations={mine}', f'--reference={initial}', *judges(server, names)]
    judge('pairs', *flags, f'--output={folder / "pairwise"}')


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """All results; a cache of answers is no result."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*') if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if '.sqlite' not in name}


def result(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON at the end of the output."""
    out = capsys.readouterr().out
    return json.loads(out[out.index('\n{\n') if '\n{\n' in out else 0 :])


def test_from_tasks_to_both_protocols_numbers(tmp_path, tasks, capsys) -> None:
    folder = tmp_path / 'out'
    with ScriptedServer(made_up.script, models=MODELS) as server:
        run(server, tasks, folder)
        first = files(folder)
        assert len(server.requests) == 2 * NUM * (1 + 3 + 3) + 2 * NUM * 3
        capsys.readouterr()
        run(server, tasks, folder)
        assert files(folder) == first
        assert len(server.requests) == 2 * NUM * 7 + 2 * NUM * 3, 'all answers are in the caches'
    generated = json.loads(first['mine.json'])
    assert [row['session_id'] for row in generated] == [f'task{i}' for i in range(NUM)]
    questions = [row['chat_history'][-1] for row in generated]
    assert [row['output'] for row in generated] == [[f'mine on {question}'] for question in questions]

    def slow(model: str) -> list[tuple[int, int]]:
        counts = []
        for number in range(NUM):
            row = made_up.task_row(number, items=1 + number % 4)
            reply = f'{model} on {questions[number]}'
            votes = [[made_up.verdict_of(judge, item, reply) == 'yes' for judge in JUDGES] for item in row['checklist']]
            counts.append((sum(sum(vote) >= 2 for vote in votes), len(votes)))
        return counts

    satisfied = {model: slow(model) for model in ('mine', 'initial')}
    for model, counts in satisfied.items():
        summary = json.loads(first[f'{model}.checklist.jsonl.summary.json'])
        assert summary['share']['mean'] == pytest.approx(sum(got / of for got, of in counts) / NUM)
        assert summary['tasks'] == {'all': NUM, 'judged': NUM, 'without a reply': 0, 'without a verdict': 0}
        assert list(summary['judges']) == list(JUDGES)
        assert summary['overlap'] == 'not measured'
    capsys.readouterr()
    wildbench.main(['compare', *(str(folder / f'{model}.checklist.jsonl') for model in ('mine', 'initial'))])
    found = json.loads(capsys.readouterr().out)
    (folder / 'short.jsonl').write_bytes(first['mine.checklist.jsonl'].partition(b'\n')[0] + b'\n')
    for command in ('compare', 'agreement'):
        both = [str(folder / name) for name in ('short.jsonl', 'initial.checklist.jsonl')]
        with pytest.raises(SystemExit, match=f'^error: {both[0]} and {both[1]}: .*session_id'):
            wildbench.main([command, *both])
    pairs = list(zip(*satisfied.values(), strict=True))
    wins = [sum(mine[0] > initial[0] for mine, initial in pairs), sum(x[0] == y[0] for x, y in pairs)]
    assert found['wins, ties, losses'] == [*wins, NUM - sum(wins)]
    assert found['win rate']['mean'] == pytest.approx((wins[0] + wins[1] / 2) / NUM)

    for judge, place in zip(JUDGES, ('org%2Fb', 'org_b', 'c'), strict=True):
        path = folder / 'score' / f'eval={place}' / 'mine.json'
        scores = [made_up.score_of(judge, f'mine on {question}') for question in questions]
        assert [row['score'] for row in json.loads(path.read_text())] == scores
        wildbench.main(['wb-score', str(path)])
        assert json.loads(capsys.readouterr().out)['adjusted'] == pytest.approx((sum(scores) / NUM - 5) * 2)
        path = folder / 'pairwise' / f'eval={place}' / 'ref=initial' / 'mine.json'
        assert len(json.loads(path.read_text())) == 2 * NUM
        wildbench.main(['wb-reward', str(path), '--reference=initial', f'--tasks={tasks}'])
        gain = {'A++': 1, 'A+': 0.5, 'A=B': 0, 'B+': -0.5, 'B++': -1}
        values = []
        for question in questions:
            mine, other = (f'{model} on {question}' for model in ('mine', 'initial'))
            values.append(
                (gain[made_up.choice_of(judge, mine, other)] - gain[made_up.choice_of(judge, other, mine)]) / 2
            )
        reward = result(capsys)
        assert reward['reward']['mean'] == pytest.approx(sum(values) / NUM)
        assert reward['task_macro'] is not None


def test_a_command_that_is_killed_between_calls_ends_with_the_same_bytes(tmp_path, tasks, monkeypatch) -> None:
    """Each command dies at its first writes of answers again and again; what it paid for is not asked for again."""

    def script(body: dict[str, Any], attempt: int) -> Any:
        """Many of the judge's first answers cannot be read, and of the second ones, too, which are asked for warmer."""
        answer = made_up.pick(('unreadable', 'readable', 'readable'), body['messages'], body['temperature'])
        is_asked = 'response_format' in body and answer == 'unreadable'
        return chat_reply('hm') if is_asked else made_up.script(body, attempt)

    with ScriptedServer(script, models=MODELS) as server:
        run(server, tasks, tmp_path / 'whole', ('c',), SystemExit)
        wanted = len(server.requests)
    left = dying_cache(monkeypatch)
    deaths = 0
    with ScriptedServer(script, models=MODELS) as server:
        while True:
            left[0] = 4 * (deaths + 1)
            try:
                run(server, tasks, tmp_path / 'killed', ('c',), SystemExit)
                break
            except Killed:
                deaths += 1
        asked = len(server.requests)
    assert deaths >= 4
    assert files(tmp_path / 'killed') == files(tmp_path / 'whole')
    assert asked <= wanted + deaths * 2, 'at most the calls in flight are lost'
    assert b'"cause": "invalid_json"' in files(tmp_path / 'whole')['mine.checklist.jsonl']


def test_a_finished_command_asks_for_nothing_that_was_answered(tmp_path, tasks, capsys) -> None:
    """The server would give other answers now: unreadable ones stay, too, and more --tries ask for others."""

    def script(body: dict[str, Any], attempt: int) -> Any:
        text = body['messages'][-1]['content']
        if 'response_format' not in body:
            return chat_reply('' if 'Question 7.' in text and not attempt else f'reply {attempt} to {text}')
        readable = 'Question 3.' not in text and (body['temperature'] or attempt)
        return made_up.script({**body, 'model': f'{body["model"]} {attempt}'}, 0) if readable else chat_reply('hm')

    def everything() -> None:
        for command in commands:
            with pytest.raises(
                SystemExit, match=r'^error: expected replies and verdicts of all tasks, found 1 missing'
            ):
                wildbench.main(command)

    with ScriptedServer(script, models=MODELS) as server:
        generations = tmp_path / 'mine.json'
        flags = [f'--tasks={tasks}', f'--generations={generations}', *judges(server, ('c',))]
        endpoint = [f'--endpoint.url={server.url}', '--endpoint.model=mine']
        sampled = ['--temperature=0.5', '--top_p=0.9', '--max_tokens=77']
        commands = [
            ['generate', f'--tasks={tasks}', f'--output={generations}', *endpoint, *sampled],
            ['checklist', *flags, f'--output={tmp_path / "c.jsonl"}'],
            ['score', *flags, f'--output={tmp_path / "score"}'],
        ]
        everything()
        first, asked = files(tmp_path), len(server.requests)
        # Each of 7 replies has a first answer that cannot be read, and of task 3 all three cannot.
        assert asked == NUM + 2 * (6 * 2 + 3)
        for body in server.requests[:NUM]:
            assert (body['temperature'], body['top_p'], body['max_tokens']) == (0.5, 0.9, 77)
        everything()
        assert (files(tmp_path), len(server.requests)) == (first, asked)
        assert 'no verdict: 1 (invalid_json)' in capsys.readouterr().out
        with pytest.raises(SystemExit, match='found 1 missing'):
            wildbench.main([*commands[1], '--tries=4'])
        assert len(server.requests) == asked + 1
    everything()  # the server is gone
    assert files(tmp_path) == first


def test_a_model_on_the_device_replies_to_whole_conversations(tmp_path, monkeypatch, capsys) -> None:
    """A task that is too long is counted; the same command samples nothing anew, and another seed all of it.

    Replies are those of the model's contents: they are found again where it was moved, and not for another one there.
    """
    loaded: list[str] = []

    @contextlib.contextmanager
    def on_device(name: str, sampling: Sampling, max_tokens: int) -> Iterator[tuple[Any, Any]]:
        assert (sampling, max_tokens) == (Sampling(1.0), 2048)
        loaded.append(name)
        yield agent(ASSISTANT), CHAT

    chats = [('Hi!',), ('a', 'b', 'Hi!'), ('a', 'c', 'Hi!'), ('x' * 80,)]
    rows = [
        made_up.task_row(
            number,
            conversation_input=[
                {'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)
            ],
        )
        for number, texts in enumerate(chats)
    ]
    tasks, output = tmp_path / 'tasks.jsonl', tmp_path / 'm.json'
    tasks.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.setattr(device_replies, 'on_device', on_device)
    contents = {'tiny': 'one', 'moved': 'one'}
    monkeypatch.setattr(device_replies, 'identity_of', lambda name: contents[name])
    flags = ['generate', f'--tasks={tasks}', f'--output={output}', '--model=tiny', '--prompt_tokens=40', '--rows=8']
    found = []
    for more in ([], [], ['--seed=1']):
        with pytest.raises(SystemExit, match='found 1 missing; the same command finds the same'):
            wildbench.main([*flags, *more])
        assert "no reply: 1 (prompt too long)\nno reply to: 'task3'\n" in capsys.readouterr().out
        found.append(output.read_bytes())
    assert found[0] == found[1] != found[2]
    replies = json.loads(found[0])
    assert [row['session_id'] for row in replies] == ['task0', 'task1', 'task2']
    assert len({row['output'][0] for row in replies}) == 3
    assert {row['generator'] for row in replies} == {'tiny'}
    assert len(loaded) == 3
    tasks.write_text(''.join(json.dumps(row) + '\n' for row in rows[:3]))
    flags[3] = '--model=moved'
    wildbench.main(flags)
    assert json.loads(output.read_bytes()) == [row | {'generator': 'moved'} for row in replies]
    assert len(loaded) == 3, 'nothing is loaded where nothing is missing'
    contents['moved'] = 'two'
    wildbench.main(flags)
    assert loaded[3:] == ['moved']


def test_an_error_names_token_numbers_that_fit_the_model() -> None:
    """They are as many as fit: the same conversation has no room for one more."""
    reader = agent(ASSISTANT)
    with pytest.raises(ValueError, match=r'^--prompt_tokens and --max_tokens: expected .* found 90000 \+ ') as caught:
        check_room(reader, 90000)
    prompt, reply = (int(flag.partition('=')[2]) for flag in str(caught.value).split()[-2:])
    reader = resampled(reader, max_new_tokens=reply)
    assert isinstance(reader, ModelAgent)
    check_room(reader, prompt)
    capacity(reader.policy.spec, 1, prompt, 1)
    with pytest.raises(ValueError, match='expected conversations of at most'):
        capacity(reader.policy.spec, 1, prompt + 1, 1)


def test_what_is_missing_is_told_and_the_same_command_asks_for_it_alone(tmp_path, tasks, capsys) -> None:
    broken = True

    def script(body: dict[str, Any], attempt: int) -> Any:
        text = body['messages'][-1]['content']
        if broken and 'response_format' not in body and made_up.numbered(text) == 1:
            return Status(400)
        if broken and body['model'] == 'org_b' and 'Question 2.' in text:
            return Status(500)
        if broken and body['model'] == 'c' and 'Question 3.' in text:
            return chat_reply('{"score": "10"}')
        return made_up.script(body, attempt)

    with ScriptedServer(script, models=MODELS) as server:
        path = tmp_path / 'mine.json'
        with pytest.raises(SystemExit, match=r'^error: expected replies and verdicts of all tasks, found 1 missing'):
            generate(server, tasks, path, 'mine')
        printed = capsys.readouterr().out
        assert "no reply: 1 (refused)\nno reply to: 'task1'\n" in printed
        assert "  first failure (refused): status 400, '" in printed
        assert len(json.loads(path.read_text())) == NUM - 1
        flags = [f'--tasks={tasks}', f'--generations={path}', *judges(server)]
        checked = ['checklist', *flags, f'--output={tmp_path / "c.jsonl"}']
        with pytest.raises(SystemExit, match='found 2 missing'):
            wildbench.main(checked)
        summary = result(capsys)
        assert summary['tasks'] == {'all': NUM, 'judged': NUM - 3, 'without a reply': 1, 'without a verdict': 2}
        assert {name: of['failures'] for name, of in summary['judges'].items()} == {
            'org/b': {},
            'org_b': {'server': 1},
            'c': {'schema': 1},
        }
        rows = [json.loads(line) for line in (tmp_path / 'c.jsonl').read_text().splitlines()]
        assert [row['session_id'] for row in rows] == [f'task{i}' for i in range(NUM)]
        assert rows[1]['judges'] == {}
        assert rows[2]['judges']['org_b'] == {'model': 'org_b', 'verdicts': None, 'cause': 'server', 'raw': ''}
        assert (rows[3]['judges']['c']['cause'], rows[3]['judges']['c']['raw']) == ('schema', '{"score": "10"}')
        with pytest.raises(SystemExit, match=f'found 2 missing.*{tmp_path}/score/score.answers.sqlite: more --tries'):
            wildbench.main(['score', *flags, f'--output={tmp_path / "score"}'])
        out = capsys.readouterr().out
        assert 'no verdict: 1 (schema)' in out
        assert f'eval=c/mine.json: {NUM - 2} of {NUM - 1} verdicts' in out
        assert '"schema": 1' in out
        assert f'{path}: {NUM - 1} replies; tasks without one: 1' in out
        broken = False
        before = len(server.requests)
        generate(server, tasks, path, 'mine')
        with pytest.raises(SystemExit, match='found 1 missing'):
            wildbench.main(checked)
        # The reply; the verdicts on it of three judges; and the one that the server failed.
        assert len(server.requests) == before + 1 + 3 + 1
    assert result(capsys)['judges']['c']['failures'] == {'schema': 1}, "the judge's own answers stay"


def test_a_task_without_a_checklist_stops_the_command_or_is_left_out_with_its_reply(tmp_path, capsys) -> None:
    """Files that others wrote have replies to it, and scores."""
    path, generations, scores = (tmp_path / name for name in ('tasks.jsonl', 'm.json', 'scores.json'))
    rows = [made_up.task_row(number, checklist=[] if number == 1 else ['?']) for number in range(3)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    names = [row['session_id'] for row in rows]
    histories = [[message['content'] for message in row['conversation_input']] for row in rows]
    told = {'output': ['r'], 'generator': 'm'}
    replies = [{'session_id': x, 'chat_history': y, **told} for x, y in zip(names, histories, strict=True)]
    generations.write_text(json.dumps(replies))
    scores.write_text(json.dumps([{'session_id': x, 'model_output': 'r', 'score': 5} for x in names]))
    with ScriptedServer(made_up.script, models=MODELS) as server:
        flags = [f'--generations={generations}', f'--output={tmp_path / "c.jsonl"}', *judges(server, ('c',))]
        commands = [['checklist', f'--tasks={path}', *flags], ['wb-score', f'--tasks={path}', str(scores)]]
        for command in commands:
            with pytest.raises(SystemExit, match=r'^error: .*tasks.jsonl, row 2: no checklist: checklist: expected at'):
                wildbench.main(command)
        assert not server.requests
        wildbench.main([*commands[0], '--on_bad_rows=drop'])
        assert len(server.requests) == 2
    out = capsys.readouterr().out
    assert '2 tasks\n  no checklist: 1\n' in out
    assert f'{generations}: 2 replies; tasks without one: 0; left out: 1 (no task)' in out
    wildbench.main([*commands[1], '--on_bad_rows=drop'])
    found = result(capsys)
    assert (found['score']['n'], found['unjudged'], found['left_out']) == (2, 0, {'no task': 1})


def test_overlap_with_training_data_is_reported(tmp_path, tasks, capsys) -> None:
    openings = ['question 1.0? ', 'something else', 'Question 4.0?']
    people = tmp_path / 'people.jsonl'
    split = dict.fromkeys(openings, 'train') | {'Question 5.0?': 'test'}
    write_conversations(people, [Conversation(x, 'wildchat', of, (Message('user', x),)) for x, of in split.items()])
    with ScriptedServer(made_up.script, models=MODELS) as server:
        generate(server, tasks, tmp_path / 'mine.json', 'mine')
        flags = [f'--tasks={tasks}', f'--generations={tmp_path / "mine.json"}', *judges(server)]
        wildbench.main(['checklist', *flags, f'--output={tmp_path / "c.jsonl"}', f'--training={people}'])
        found = [result(capsys)]
        wildbench.main(['score', *flags[:-2], f'--output={tmp_path}', f'--training={people}'])
        found.append(result(capsys))
        path = tmp_path / 'eval=org%2Fb' / 'mine.json'
        wildbench.main(['wb-score', str(path), f'--tasks={tasks}', f'--training={people}'])
        found.append(result(capsys))
        with pytest.raises(SystemExit, match=r'^error: --training: expected --tasks beside it, found none'):
            wildbench.main(['wb-score', str(path), f'--training={people}'])
        write_conversations(people, [Conversation('x', 'wildchat', 'test', (Message('user', 'x'),))])
        with pytest.raises(SystemExit, match=r'^error: .*people.jsonl: expected conversations of the split train'):
            wildbench.main(['wb-score', str(path), f'--tasks={tasks}', f'--training={people}'])
    for one in found:
        told = {key: one['overlap'][key] for key in ('conversations', 'tasks', 'ids')}
        assert told == {'conversations': 3, 'tasks': 2, 'ids': ['task1', 'task4']}
        assert one['overlap']['without them']['n'] == NUM - 2


def test_judges_are_held_against_people_by_a_copy_of_their_file(tmp_path, tasks, capsys) -> None:
    with ScriptedServer(made_up.script, models=MODELS) as server:
        generate(server, tasks, tmp_path / 'mine.json', 'mine')
        flags = [f'--tasks={tasks}', f'--generations={tmp_path / "mine.json"}', *judges(server)]
        wildbench.main(['checklist', *flags, f'--output={tmp_path / "c.jsonl"}'])
    rows = [json.loads(line) for line in (tmp_path / 'c.jsonl').read_text().splitlines()]
    for row in rows:  # people agree with the last judge
        row['satisfied'] = [verdict == 'yes' for verdict in row['judges']['c']['verdicts']]
    (tmp_path / 'people.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    capsys.readouterr()
    wildbench.main(['agreement', str(tmp_path / 'c.jsonl'), str(tmp_path / 'people.jsonl')])
    found = json.loads(capsys.readouterr().out)
    assert (found['agreement']['c']['mean'], found['failures']) == (1.0, 0)
    assert found['agreement']['org/b']['mean'] < 1
    assert found['effective_votes'] is None, 'a judge without an error has no correlation'


JUDGE = '--judge={"url": "http://127.0.0.1:1/v1", "model": "a"}'


@pytest.mark.parametrize(
    ('change', 'found'),
    [
        (['--judge={'], '--judge: expected a JSON object'),
        (['--judge=[]'], '--judge: expected a JSON object'),
        (['--judge={"model": "a"}'], '--judge.url: missing'),
        ([JUDGE] * 2, 'expected judges of different models'),
        ([JUDGE], 'expected a reply, found none'),
        ([JUDGE, '--tries=0'], 'settings.tries: expected at least 1, found 0'),
        ([JUDGE, '--output=verdicts'], '--output: expected a name that ends in .jsonl or .jsonl.gz, found verdicts'),
        ([JUDGE, '--tasks=no.jsonl'], 'no.jsonl'),
        ([JUDGE, '--generations=no.json'], 'no.json'),
    ],
)
def test_bad_input_is_one_error(tmp_path, tasks, change: list[str], found: str) -> None:
    row = made_up.task_row(0)
    history = [message['content'] for message in row['conversation_input']]
    rows = [{'session_id': 'task0', 'chat_history': history, 'output': ['x'], 'generator': 'm'}]
    path = tmp_path / 'm.json'
    path.write_text(json.dumps(rows))
    flags = [f'--tasks={tasks}', f'--generations={path}', f'--output={tmp_path / "c.jsonl"}', *change]
    with pytest.raises(SystemExit, match=f'^error: .*{found}'):
        wildbench.main(['checklist', *flags])


def test_files_that_are_not_checklists_are_refused(tmp_path) -> None:
    good = {'session_id': 't', 'task': 'k', 'generator': 'm', 'version': '1', 'satisfied': [True], 'judges': {}}
    path = tmp_path / 'c.jsonl'
    for rows, expected in (
        ([good, good], 'line 2: expected a row of the checklist protocol with a session_id of its own'),
        ([{**good, 'satisfied': 1}], 'line 1: expected a row of the checklist protocol'),
        ([{**good, 'satisfied': [0.5]}], 'line 1: expected a row of the checklist protocol'),
        ([{**good, 'judges': {'a': {}}}], 'line 1: expected a row of the checklist protocol'),
        ([], 'expected at least one row, found none'),
        ([good, {**good, 'session_id': 'u', 'generator': 'n'}], 'generator: expected one, found m, n'),
    ):
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        with pytest.raises(SystemExit, match=f'^error: .*c.jsonl.*{expected}'):
            wildbench.main(['compare', str(path), str(path)])


def test_one_assistant_is_needed(tmp_path, tasks) -> None:
    for more in ([], ['--model=m', '--endpoint.url=http://127.0.0.1:1/v1', '--endpoint.model=m']):
        with pytest.raises(
            SystemExit, match=r'^error: expected either --endpoint.url and --endpoint.model, or --model'
        ):
            wildbench.main(['generate', f'--tasks={tasks}', f'--output={tmp_path / "m.json"}', *more])


def test_numbers_of_a_runs_assistants_are_left_in_it(tmp_path, tasks, capsys, monkeypatch) -> None:
    """Of every protocol, by the file of their verdicts; another assistant is refused before anyone is asked."""
    folder, written = tmp_path / 'run', list[str]()
    folder.mkdir()
    result_files.write(fake_results(seeds=1, people=4), folder)
    monkeypatch.setattr(report, 'main', written.extend)
    mine, initial = (tmp_path / f'{model}.json' for model in ('mine', 'initial'))
    own = [f'--run={folder}', '--assistants', 'mine=persona/seed-0']
    lists = [f'{path.with_suffix("")}.checklist.jsonl' for path in (mine, initial)]
    with ScriptedServer(made_up.script, models=MODELS) as server:
        for path in (mine, initial):
            generate(server, tasks, path, path.stem)
        asked = [f'--tasks={tasks}', *judges(server, JUDGES[1:])]
        before = len(server.requests)
        for given, told in (([], 'mine=ASSISTANT, one of initial, .*, found none of that name'), (['x'], "found 'x'")):
            flags = ['--assistants', *given] if given else []
            with pytest.raises(SystemExit, match=f'^error: --assistants: expected .*{told}'):
                wildbench.main(['checklist', *asked, f'--generations={mine}', f'--output={lists[0]}', own[0], *flags])
        assert len(server.requests) == before
        for path, output in zip((mine, initial), lists, strict=True):
            wildbench.main(['checklist', *asked, f'--generations={path}', f'--output={output}', *own])
        wildbench.main(['compare', *lists, *own])
        wildbench.main(['score', *asked, f'--generations={mine}', f'--output={tmp_path / "score"}', *own])
        flags = [f'--generations={mine}', f'--reference={initial}', f'--output={tmp_path / "pairs"}']
        capsys.readouterr()
        wildbench.main(['pairs', *asked, *flags, *own])
        rewards = capsys.readouterr().out
        (score,) = (tmp_path / 'score').glob('eval=c/mine.json')
        (pair,) = (tmp_path / 'pairs').glob('eval=c/*/mine.json')
    assert written == [str(folder)] * 5
    before = result_files.read_added(folder).wildbench.outputs
    more = [f'--tasks={tasks}', *own]
    wildbench.main(['wb-score', str(score), *more])
    wildbench.main(['wb-reward', str(pair), '--reference=initial', *more])
    assert result_files.read_added(folder).wildbench.outputs == before, 'a judge file is read as it was written'
    for command, told in (
        (['wb-score', str(score), *own], '--tasks: expected a hub name, a file or a folder, found none'),
        (['wb-score', str(score), *more, f'--run={tmp_path}'], 'experiment.json: expected the results of a finished'),
        (['wb-score', str(score), f'--tasks={tasks}', own[0]], 'mine=ASSISTANT, one of initial'),
    ):
        with pytest.raises(SystemExit, match=f'^error: .*{told}'):
            wildbench.main(command)
    wildbench.main(['wb-score', str(score), *more, '--weights=equal'])
    assert written == [str(folder)] * 8, 'the report of the run is made again each time'
    (equal,) = result_files.read_added(folder).wildbench.outputs[str(score)]
    assert (equal.settings, equal.judge, equal.assistant) == ({'weights': 'equal'}, 'c', 'persona/seed-0')
    assert equal.macro == pytest.approx(sum(of.mean for of in equal.groups.values()) / len(equal.groups))
    wildbench.main(['wb-score', str(score), *more])
    renamed = [*more, 'initial=persona/seed-0']
    wildbench.main(['wb-reward', str(pair), '--reference=initial', *renamed])
    assert result_files.read_added(folder).wildbench.outputs[str(pair)][0].against == 'persona/seed-0'
    wildbench.main(['wb-reward', str(pair), '--reference=initial', *more])
    outputs = result_files.read_added(folder).wildbench.outputs
    assert [pathlib.Path(place).name for place in outputs] == [
        *('mine.checklist.jsonl', 'initial.checklist.jsonl', 'initial.checklist.jsonl'),
        *['mine.json'] * 4,
    ]
    summary = json.loads(pathlib.Path(f'{lists[0]}.summary.json').read_text())
    panel, *each = outputs[lists[0]]
    share = summary['share']
    assert (panel.assistant, panel.judge, panel.tasks) == ('persona/seed-0', 'panel', NUM)
    assert panel.estimate.mean == share['mean'] == pytest.approx(panel.lost) == pytest.approx(panel.won)
    half = scipy.stats.t.ppf(0.975, NUM - 1) * share['sem']
    assert panel.estimate.high - panel.estimate.mean == pytest.approx(half)
    assert [of.estimate.mean for of in each] == [of['share']['mean'] for of in summary['judges'].values()]
    numbers = [of for own in outputs.values() for of in own]
    assert [of.metric for of in numbers if of.judge == 'c'] == [
        *('checklist', 'checklist', 'win rate', 'WB-Score', 'WB-Reward')
    ]
    assert {(of.assistant, of.against) for of in numbers if of.metric in ('win rate', 'WB-Reward')} == {
        ('persona/seed-0', 'initial')
    }
    told = json.loads(rewards[rewards.rindex('\n{\n') :])
    assert told['reward']['mean'] == numbers[-1].estimate.mean
    macro = told['task_macro']
    assert {group: of.mean for group, of in numbers[-1].groups.items()} == {
        g: x['mean'] for g, x in told['groups'].items()
    }
    assert numbers[-1].macro == macro['mean']
    smallest = min(of['n'] for of in told['groups'].values())
    half = scipy.stats.t.ppf(0.975, smallest - 1) * macro['sem'] if smallest > 1 else None
    assert numbers[-1].macro_high == (half and pytest.approx(macro['mean'] + half))
