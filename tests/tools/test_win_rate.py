"""The command from responses to a table, with judges behind a scripted server."""

import collections
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest

from simrl.evaluation.pairwise.responses import read_responses
from simrl.evaluation.results import files as result_files
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.run import config
from tests.evaluation.pairwise.test_responses import row, write
from tests.evaluation.report.fake_run import draw_few, fake_results
from tests.evaluation.wildbench import made_up
from tests.remote.dying import Killed, dying_cache
from tests.remote.server import Body, ScriptedServer, Status, chat_reply
from tests.tiny import byte_tokenizer, tiny_config
from tools import win_rate

NUM = 24
STRENGTH = {'strong': 2.5, 'middle': 0.0, 'weak': -2.5}


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The texts of A and B that a judge was asked about."""
    texts = {name: of['assistant'] for line in made_up.material(body) for name, of in line.items() if name in 'AB'}
    return texts['A'], texts['B']


def fair(judge: str, a: str, b: str) -> str:
    """Prefers by planted strength and a draw of its own for each two texts in their order."""
    gap = STRENGTH[a.split()[0]] - STRENGTH[b.split()[0]]
    number = int(made_up.pick([str(i) for i in range(128)], judge, a, b)) / 128
    return 'A' if number < 0.9 / (1 + math.exp(-gap)) else 'tie' if number > 0.9 else 'B'


def answer(verdict: str) -> Body:
    return chat_reply(json.dumps({'thought': 't', 'verdict': verdict}))


def script(body: dict[str, Any], attempt: int) -> Any:
    return answer('A' if body['model'] == 'biased' else fair(body['model'], *shown(body)))


def judges(server: ScriptedServer, *names: str) -> list[str]:
    settings = {'in_flight': 2, 'tries': 1}
    return ['--judge=' + json.dumps({'url': server.url, 'model': name, **settings}) for name in names]


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    """A tiny random model as a Hugging Face folder."""
    tokenizer = byte_tokenizer()
    size = tiny_config(len(tokenizer), max_positions=4096, tied_embedding=True)
    export(transformer.init_params(jax.random.key(0), size), size, tokenizer, folder)
    return folder


@pytest.fixture
def files(tmp_path: pathlib.Path) -> list[str]:
    """NAME=FILE of three assistants on the same prompts."""
    rows = {name: [row(f'x{i}', f'question {i}', f'{name} {i}') for i in range(NUM)] for name in STRENGTH}
    return [f'{name}={write(tmp_path / f"{name}.jsonl", *own)}' for name, own in rows.items()]


def run(server: ScriptedServer, output: pathlib.Path, files: Sequence[str], names: Sequence[str], *more: str) -> Any:
    win_rate.main(['judge', *files, f'--output={output}', *judges(server, *names), *more])
    return json.loads((output / 'results.json').read_text())


def written(output: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if '.sqlite' not in path.name}


def test_a_judge_that_prefers_the_first_gives_one_half_and_flips_always(tmp_path, files, capsys) -> None:
    """The strict reading has ties alone, from the same answers."""
    with ScriptedServer(script, models=['biased']) as server:
        for combine in ('mean', 'strict'):
            found = run(server, tmp_path / 'out', files[:2], ['biased'], f'--combine={combine}')
            (of,) = found['comparisons']
            assert found['combine'] == combine
            own = of['judges']['biased']
            assert own['win_rates']['observed']['by_participant']['mean'] == 0.5
            assert [own[of] for of in ('wins', 'ties', 'losses')] == [0, NUM, 0]
            assert own['position']['consistent']['mean'] == 0.0
            assert own['position']['first_position']['mean'] == own['position']['to_first']['mean'] == 1.0
            row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('  biased'))
            assert row.split()[-5:] == ['0', str(NUM), '0', '0%', '1.000']
        assert len(server.requests) == 2 * NUM


def test_planted_strengths_come_out_and_a_finished_command_asks_nothing(tmp_path, files, capsys) -> None:
    names = ('a', 'b', 'biased')
    with ScriptedServer(script, models=names) as server:
        found = run(server, tmp_path / 'out', files, names)
        printed = capsys.readouterr().out
        first = written(tmp_path / 'out')
        assert run(server, tmp_path / 'out', files, names) == found
        assert written(tmp_path / 'out') == first
        assert len(server.requests) == 3 * NUM * 2 * 3
    assert {body['temperature'] for body in server.requests} == {0.0}
    rows = [json.loads(line) for line in first['verdicts.jsonl'].splitlines()]
    assert len(rows) == len(server.requests)
    assert json.loads(rows[0]['raw']) == {'thought': 't', 'verdict': rows[0]['verdict']}

    gains = {'A': 1.0, 'tie': 0.5, 'B': 0.0}
    preferences: dict[tuple[str, str, str, str], float] = collections.defaultdict(float)
    for of in rows:
        number = of['id'].removeprefix('x')
        verdict = 'A' if of['judge'] == 'biased' else fair(of['judge'], f'{of["A"]} {number}', f'{of["B"]} {number}')
        assert of['verdict'] == verdict
        for one, other, gain in ((of['A'], of['B'], gains[verdict]), (of['B'], of['A'], 1 - gains[verdict])):
            preferences[of['judge'], one, other, of['id']] += gain / 2
    for of in found['comparisons']:
        two = (of['first'], of['second'])
        own = {name: [preferences[name, *two, f'x{i}'] for i in range(NUM)] for name in names}
        own['panel'] = [sum(of) / 3 for of in zip(*own.values(), strict=True)]
        for name, values in own.items():
            estimate = of['judges'][name]['win_rates']['observed']['by_participant']
            assert estimate['mean'] == pytest.approx(sum(values) / NUM)
            assert estimate['num_clusters'] == NUM
        assert of['judges']['a']['win_rates']['observed']['by_participant']['low'] > 0.5
        assert of['adjusted'] <= 3 * of['p_value'] < 0.01
        assert of['agreement']['errors'] is None
    assert found['rankings']['a']['models'] == ['strong', 'middle', 'weak']
    assert set(found['rankings']['a']['differences']) == {'strong over middle', 'strong over weak', 'middle over weak'}
    assert 'strong over weak: 24 prompts of 24 people or openings; characters: 9 and 7' in printed
    assert 'strengths by panel, in log-odds:' in printed


def test_a_command_that_is_killed_between_calls_ends_with_the_same_bytes(tmp_path, files, monkeypatch) -> None:
    with ScriptedServer(script, models=['a']) as server:
        run(server, tmp_path / 'whole', files[:2], ['a'])
        wanted = len(server.requests)
    left = dying_cache(monkeypatch)
    deaths = 0
    with ScriptedServer(script, models=['a']) as server:
        while True:
            left[0] = 11
            try:
                run(server, tmp_path / 'killed', files[:2], ['a'])
                break
            except Killed:
                deaths += 1
                assert not written(tmp_path / 'killed'), 'no table of a part'
        asked = len(server.requests)
    assert deaths >= 3
    assert written(tmp_path / 'killed') == written(tmp_path / 'whole')
    assert asked <= wanted + deaths * 3


def test_an_answer_without_a_verdict_is_counted_kept_and_asked_for_again(tmp_path, files, capsys) -> None:
    """It is bounded, and no score; the same command asks for it alone where the server failed."""
    broken = True

    def faulty(body: dict[str, Any], attempt: int) -> Any:
        a, b = shown(body)
        if broken and (a, b) == ('strong 1', 'weak 1'):
            return chat_reply('I would say A.')
        if broken and (a, b) == ('weak 2', 'strong 2'):
            return chat_reply('{"thought": "t", "verdict": "A, clearly"}')
        return Status(400) if broken and a == 'strong 3' else script(body, attempt)

    output = tmp_path / 'out'
    with ScriptedServer(faulty, models=['a', 'b']) as server:
        flags = ['judge', files[0], files[2], f'--output={output}', *judges(server, 'a', 'b'), '--tries=2']
        with pytest.raises(SystemExit, match='expected all responses and verdicts, found 6 missing; the same command'):
            win_rate.main(flags)
        # Those that cannot be read are asked for twice.
        assert len(server.requests) == 2 * (2 * NUM + 2)
        printed = capsys.readouterr().out
        for line in ('(invalid_json)', '(refused)', '(schema)'):
            assert f'no verdict: 2 {line}, the first by a on ' in printed
        assert "(schema), the first by a on 'x2': " in printed
        (of,) = json.loads((output / 'results.json').read_text())['comparisons']
        assert of['judges']['a']['failures'] == {'invalid_json': 1, 'refused': 1, 'schema': 1}
        rates = of['judges']['a']['win_rates']
        there = rates['observed']['by_participant']
        assert (rates['failures'], there['num_observations']) == (3, NUM - 3)
        for bound, more in (('all_lost', 0), ('all_won', 3)):
            expected = ((NUM - 3) * there['mean'] + more) / NUM
            assert rates[bound]['by_participant']['mean'] == pytest.approx(expected)
        rows = [json.loads(line) for line in (output / 'verdicts.jsonl').read_text().splitlines()]
        assert len(rows) == 4 * NUM
        lost = [of for of in rows if of['verdict'] is None]
        assert {(of['id'], of['raw']) for of in lost} == {
            ('x1', 'I would say A.'),
            ('x2', '{"thought": "t", "verdict": "A, clearly"}'),
            ('x3', ''),
        }
        assert all(of['preference for A'] is None for of in lost)
        before, broken = len(server.requests), False
        with pytest.raises(SystemExit, match='found 4 missing'):
            win_rate.main(flags)
        assert len(server.requests) == before + 2
    failures = json.loads((output / 'results.json').read_text())['comparisons'][0]['judges']['a']['failures']
    assert failures == {'invalid_json': 1, 'schema': 1}


def test_what_is_missing_or_empty_needs_no_judge(tmp_path, capsys) -> None:
    """The command succeeds: nobody can be asked for it."""
    strong = [row(f'x{i}', f'question {i}', f'strong {i}') for i in range(6)]
    weak = [row('x0', 'question 0', ' '), *(row(f'x{i}', f'question {i}', f'weak {i}') for i in range(1, 5))]
    files = [f'{name}={write(tmp_path / name, *rows)}' for name, rows in (('s.jsonl', strong), ('w.jsonl', weak))]
    with ScriptedServer(script, models=['a']) as server:
        flags = ['judge', *files, f'--output={tmp_path / "out"}', *judges(server, 'a')]
        with pytest.raises(SystemExit, match=r"error: w.jsonl: expected a response to each id, found none to 'x5' of"):
            win_rate.main(flags)
        assert not server.requests
        win_rate.main([*flags, '--on_missing=failure'])
        assert len(server.requests) == 8
    printed = capsys.readouterr().out
    assert 'empty: 1 of w.jsonl; missing: 1 of w.jsonl' in printed
    assert 'no verdict: 2 (no response)' in printed
    (of,) = json.loads((tmp_path / 'out' / 'results.json').read_text())['comparisons']
    assert of['judges']['a']['win_rates']['failures'] == 1
    assert of['judges']['a']['position']['consistent']['num_observations'] == 4


def test_people_qualify_judges(tmp_path, files) -> None:
    labels = [{'id': f'x{i}', 'first': 'weak', 'second': 'strong', 'preference': i % 4 / 3} for i in range(NUM)]
    with ScriptedServer(script, models=['a', 'b']) as server:
        path = write(tmp_path / 'labels.jsonl', *labels)
        found = run(server, tmp_path / 'out', [files[0], files[2]], ['a', 'b'], f'--labels={path}')
        errors = found['comparisons'][0]['agreement']['errors']
        rows = [json.loads(line) for line in (tmp_path / 'out' / 'verdicts.jsonl').read_text().splitlines()]
        asked = len(server.requests)
        for bad, told in (
            (
                [{'id': 'x0', 'first': 'weak', 'second': 'middle', 'preference': 1}],
                'line 1: expected a pair that is ju',
            ),
            ([{'id': 'x0', 'first': 'weak', 'second': 'strong', 'preference': 2}], 'line 1: expected id, first'),
            ([labels[0], labels[0]], 'line 2: expected a pair that is judged, found it again'),
        ):
            write(path, *bad)
            with pytest.raises(SystemExit, match=told):
                run(server, tmp_path / 'out', [files[0], files[2]], ['a', 'b'], f'--labels={path}')
        assert len(server.requests) == asked
    distance = dict.fromkeys('ab', 0.0)
    for i in range(NUM):
        for name in 'ab':
            own = [of for of in rows if of['judge'] == name and of['id'] == f'x{i}']
            of_weak = [of['preference for A'] if of['A'] == 'weak' else 1 - of['preference for A'] for of in own]
            distance[name] += abs(sum(of_weak) / 2 - i % 4 / 3) / NUM
    for name in 'ab':
        assert errors['agreement'][name]['mean'] == pytest.approx(1 - distance[name])


def test_the_report_of_a_run_shows_the_result(tmp_path, monkeypatch, capsys) -> None:
    """Win rates are over the initial assistant, whatever the order; other names are refused before anyone is asked."""
    folder = tmp_path / 'run'
    folder.mkdir()
    result_files.write(fake_results(seeds=1, people=4), folder)
    draw_few(monkeypatch)
    rows = {name: [row(f'x{i}', f'question {i}', f'{name} {i}') for i in range(6)] for name in ('weak', 'strong')}
    paths = {name: write(tmp_path / f'{name}.jsonl', *own) for name, own in rows.items()}
    files = [f'initial={paths["weak"]}', f'persona/seed-0={paths["strong"]}']
    with ScriptedServer(script, models=['a']) as server:
        for flags, told in (
            ([files[0], f'persona={paths["strong"]}', f'--run={folder}'], "assistants of the run, .*, found 'persona'"),
            ([*files, f'--run={tmp_path}'], 'experiment.json: expected the results of a finished run, found no such'),
        ):
            with pytest.raises(SystemExit, match=f'^error: .*{told}'):
                run(server, tmp_path / 'out', flags[:2], ['a'], flags[2])
        assert not server.requests
        found = run(server, tmp_path / 'out', files, ['a'], f'--run={folder}')
    (of,) = found['comparisons']
    assert (of['first'], of['second']) == ('persona/seed-0', 'initial')
    ((place, comparison),) = result_files.read_added(folder).judges.comparisons.items()
    assert place == str(tmp_path / 'out')
    (pair,) = comparison.pairs
    assert config.to_dict(pair.judges['a'].win_rates) == of['judges']['a']['win_rates']
    assert (comparison.unit, pair.p_value) == ('openings', of['p_value'])
    text = (folder / 'report.html').read_text()
    section = text[text.index('<h2>Preferred by judges of two responses</h2>') :]
    assert f'persona/seed-0 over initial</th><td>{pair.primary.rate.mean:.2f}<small>' in section
    assert f'report: {folder / "report.html"}' in capsys.readouterr().out
    events = b''.join(file.read_bytes() for file in (folder / 'tensorboard').iterdir())
    assert b'report/training_reward' in events, 'TensorBoard has the figures, too'


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda files: files[:1], 'expected responses of at least two assistants, found strong'),
        (lambda files: ['x.jsonl', files[0]], "expected NAME=FILE, found 'x.jsonl'"),
        (lambda files: [files[0], files[0]], "expected assistants of different names, found 'strong' twice"),
        (lambda files: [*files[:2], '--against=nobody'], "against: expected one of strong, middle, found 'nobody'"),
        (lambda files: [*files[:2], '--judge={'], '--judge: expected a JSON object'),
        (lambda files: [*files[:2], '--model=a'], "expected judges of different names, and none 'panel', found a, a"),
        (lambda files: [*files[:2], '--model=/nowhere'], '/nowhere'),
        (lambda files: [*files[:2], '--model=/nowhere', '--lengths', '9', '8'], 'expected ascending positive lengths'),
        (lambda files: [*files[:2], '--tries=0'], 'tries: expected at least 1, found 0'),
        (lambda files: [files[0], 'gone=/nowhere.jsonl'], 'No such file or directory'),
    ],
)
def test_bad_arguments_are_told_before_anything_is_asked(
    tmp_path, files, change: Callable[[list[str]], list[str]], told: str
) -> None:
    with ScriptedServer(script, models=['a']) as server:
        with pytest.raises(SystemExit, match=told) as caught:
            run(server, tmp_path / 'out', change(files), ['a'])
        assert str(caught.value).startswith('error: ')
        assert not server.requests
    with pytest.raises(SystemExit, match='expected at least one judge'):
        win_rate.main(['judge', *files, f'--output={tmp_path / "out"}'])


PROMPTS = [row('x', 'Hi!', person='p'), row('y', 'a', 'b', ' Hi! ', intent='tea'), row('z', 'x' * 3000)]


def test_an_endpoint_replies_to_prompts_of_a_file(tmp_path, capsys) -> None:
    """Rows as they were, with the reply; the same command asks for what is missing alone."""
    broken = True

    def replying(body: dict[str, Any], attempt: int) -> Any:
        said = [message['content'] for message in body['messages']]
        return Status(400) if broken and len(said[0]) > 100 else chat_reply(f'on {" ".join(said)}'[:20])

    path, output = write(tmp_path / 'prompts.jsonl', *PROMPTS), tmp_path / 'm.jsonl'
    with ScriptedServer(replying, models=['m']) as server:
        asked = [f'--endpoint.url={server.url}', '--endpoint.model=m', f'--prompts={path}', f'--output={output}']
        with pytest.raises(
            SystemExit, match=f'found 1 missing.* are kept in {output}.answers.sqlite: without the file'
        ):
            win_rate.main(['respond', *asked])
        printed = capsys.readouterr().out
        assert "no response: 1 (refused)\nno response to: 'z'\n" in printed
        assert "  first failure (refused): status 400, '" in printed
        broken = False
        win_rate.main(['respond', *asked])
        assert len(server.requests) == 4
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{**of, 'messages': of['messages'][:-1]} for of in rows] == PROMPTS
    assert [of['messages'][-1]['content'] for of in rows] == ['on Hi!', 'on a b Hi!', f'on {"x" * 17}']
    found, _ = read_responses(output, 'history')
    assert [of.person for of in found.values()] == ['p', None, None]


@pytest.mark.long
def test_an_assistant_on_the_device_replies_to_prompts_of_a_file(tmp_path, capsys) -> None:
    """The same rows each time; a prompt that is too long is counted."""
    path, output = write(tmp_path / 'prompts.jsonl', *PROMPTS), tmp_path / 'tiny.jsonl'
    flags = ['respond', f'--assistant={model_folder(tmp_path / "model")}', f'--prompts={path}', f'--output={output}']
    found = []
    for more in ([], [], ['--seed=1']):
        with pytest.raises(SystemExit, match='found 1 missing'):
            win_rate.main([*flags, '--rows=2', '--max_tokens=9', '--prompt_tokens=64', *more])
        assert 'no response: 1 (prompt too long)' in capsys.readouterr().out
        found.append(output.read_bytes())
    assert found[0] == found[1] != found[2]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{**of, 'messages': of['messages'][:-1]} for of in rows] == PROMPTS[:2]


def test_prompts_that_are_none_are_named(tmp_path) -> None:
    path, output = tmp_path / 'prompts.jsonl', tmp_path / 'tiny.jsonl'
    flags = ['respond', '--assistant=tiny', f'--prompts={path}', f'--output={output}']
    for bad, told in (
        ([row('x', 'a', 'b')], "line 1: no question: messages: expected them to end with the user's, found the assi"),
        ([row('x', 'a'), row('x', 'b')], "line 2: duplicate id: id: expected another in each row, found 'x' again"),
        ([row('x', '')], 'line 1: empty content: message 0: content: expected text, found none'),
        ([], 'expected at least one prompt, found none'),
    ):
        write(path, *bad)
        with pytest.raises(SystemExit, match=told):
            win_rate.main(flags)
    for wrong, told in (
        ([*flags, '--user=oracle'], 'expected either --prompts or --user'),
        (['respond', '--assistant=tiny', '--user=oracle', f'--output={output}'], 'expected an assistant of a run'),
        ([*flags, '--endpoint.url=http://x/v1', '--endpoint.model=m'], 'expected either --endpoint.url and'),
        ([flags[0], *flags[2:]], 'expected either --endpoint.url and --endpoint.model, or --assistant'),
        (
            [*flags, f'--output={tmp_path / "x.txt"}'],
            'a name that ends in .jsonl or .jsonl.gz or .parquet, found x.txt',
        ),
    ):
        with pytest.raises(SystemExit, match=told):
            win_rate.main(wrong)


@pytest.mark.long
def test_a_model_on_the_device_judges_beside_an_endpoint(tmp_path, files) -> None:
    """From its answers' log-probabilities; those are kept, so that another reading of them samples nothing."""
    folder = model_folder(tmp_path / 'model')
    flags = [f'--model={folder}', '--lengths', '2048', '--rows=4']
    with ScriptedServer(script, models=['a']) as server:
        first = run(server, tmp_path / 'out', files[:2], ['a'], *flags)
        rows = [json.loads(line) for line in (tmp_path / 'out' / 'verdicts.jsonl').read_text().splitlines()]
        whole = written(tmp_path / 'out')
        assert run(server, tmp_path / 'out', files[:2], ['a'], *flags) == first
        assert written(tmp_path / 'out') == whole
        mean = run(server, tmp_path / 'out', files[:2], ['a'], *flags, '--read=expected')
        assert len(server.requests) == 2 * NUM
    own = [of for of in rows if of['judge'] == str(folder)]
    assert len(own) == 2 * NUM
    assert all(of['raw'] == of['verdict'] == max(of['log_probs'], key=of['log_probs'].get) for of in own)
    assert first['comparisons'][0]['judges'].keys() == {'a', str(folder), 'panel'}
    expected = []
    for of in own:
        weights = {name: math.exp(x) for name, x in of['log_probs'].items()}
        share = (weights['A'] + weights['tie'] / 2) / sum(weights.values())
        expected.append(share if of['A'] == 'strong' else 1 - share)
    rates = mean['comparisons'][0]['judges'][str(folder)]['win_rates']
    assert rates['observed']['by_participant']['mean'] == pytest.approx(sum(expected) / len(expected))
