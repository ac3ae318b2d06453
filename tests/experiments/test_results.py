"""Results of stages of either scene: what stages wrote comes out, and what is not there is left out."""

import dataclasses
import json
import math

import numpy as np
import pytest

from simrl.evaluation.fidelity import distances
from simrl.evaluation.fidelity.annotators import Annotators
from simrl.evaluation.fidelity.measure import ALL
from simrl.evaluation.fidelity.turns import Turn, write_turns
from simrl.evaluation.report import summary, utility
from simrl.evaluation.report.browse import REPORT_FILE
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.files import read
from simrl.evaluation.results.measures import Arm, MeasureWords
from simrl.experiments.forecast_results import ForecastSpec
from simrl.experiments.results import (
    AssistantSpec,
    MatrixSpec,
    MeasureSpec,
    ResultsSpec,
    SimulatorSpec,
    png_size,
    results_of,
    write_results,
)
from tests.evaluation.report.fake_run import draw_few, page_text
from tests.experiments.test_forecasts import made_up

WORDS = MeasureWords('Replies to held-out openings', 'reward-model score', 'openings', 'Scores of one reply.')
SCORES = {'initial': (0.0, 1.0, 2.0, 2.0), 'b/seed-0': (1.0, 1.0, 2.0, 3.0), 'a/seed-0': (0.0, 0.0, 0.0, 0.0)}


def write(workdir, stage, content):
    (workdir / stage).mkdir(parents=True)
    (workdir / stage / 'result.json').write_text(json.dumps(content))


def outcomes(examples, scores, **own):
    number = len(scores)
    return {
        'example': list(examples),
        'cluster': [example[0] for example in examples],
        'score': list(scores),
        'end': ['turns'] * number,
        'assistant_turns': [1] * number,
        'truncated': [0] * number,
        'user_truncated': [0] * number,
        **own,
    }


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Two arms of one seed, one of whose simulators is off the device; four openings of two people, in two blocks."""
    draw_few(monkeypatch)
    examples = ('p1', 'p2', 'q1', 'q2')
    for name, scores in SCORES.items():
        for block in (0, 1):
            places = slice(2 * block, 2 * block + 2)
            messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': name}]
            shown = [{'example': 'p2', 'intent': None, 'traits': {}, 'messages': messages}] if block == 0 else []
            content = {'outcomes': outcomes(examples[places], scores[places]), 'statistics': {}, 'shown': shown}
            write(tmp_path, f'reply/{name}/block-{block}', content)
        for simulator in ('b', 'a/seed-0'):
            met = outcomes(examples, [x + (simulator == 'b') for x in scores], talk_kind=['short'] * 4)
            content = {'outcomes': met, 'statistics': {'words': 6, 'messages': 4}, 'shown': []}
            write(tmp_path, f'matrix/{name}/{simulator}', content)
    for arm in 'ba':
        curve = {'step': [1, 2], 'reward/mean': [0.5, 1.5], 'rollout/end_signal': [None, 0.5]}
        write(tmp_path, f'rl/{arm}/seed-0', curve | {'groups': [4, 0], 'groups_zero_variance': [1, 0]})
    write(tmp_path, 'likelihood/a/seed-0', {'log_likelihood': [-2.0, -4.0], 'tokens': [1, 2]})
    write(tmp_path, 'likelihood/b', {'log_likelihood': None, 'tokens': None})
    return ResultsSpec(
        arms={'b': Arm('http'), 'a': Arm('fine_tuned')},
        assistants={f'{arm}/seed-0': AssistantSpec(arm, 0, f'rl/{arm}/seed-0') for arm in 'ba'},
        measures={'reply': MeasureSpec(WORDS, {who: [f'reply/{who}/block-{k}' for k in (0, 1)] for who in SCORES})},
        simulators={'b': SimulatorSpec('b', 'likelihood/b'), 'a/seed-0': SimulatorSpec('a', 'likelihood/a/seed-0')},
        matrix=MatrixSpec('reward', {who: {x: f'matrix/{who}/{x}' for x in ('b', 'a/seed-0')} for who in SCORES}),
        rates={'words_per_message': ('words', 'messages'), 'typos': ('typos', 'values')},
        caution='A check of the pipeline.',
        seconds={'rl/b/seed-0': 2.0},
    )


def test_results_of_stages_by_hand(spec, tmp_path):
    found = results_of(spec, tmp_path)
    reply = found.measures['reply']
    assert (reply.examples, reply.clusters) == (4, 2)
    assert reply.assistants['b/seed-0'].gain.mean == 0.5
    assert reply.assistants['b/seed-0'].win_rate.mean == (1 + 0.5 + 0.5 + 1) / 4
    assert reply.arms['b'].gap_recovered is None, 'no arm trains against people'
    assert [(x.first, x.second, x.score.mean) for x in reply.differences] == [('a', 'b', -1.75)]
    assert found.scores.measures['reply'].clusters == (0, 0, 1, 1)
    assert found.matrix.users == ('b', 'a')
    assert found.matrix.mean == ((2.25, 2.75, 1.0), (1.25, 1.75, 0.0))
    assert found.matrix.transfers['b'].simulators['b'].mean == 0.5
    assert found.matrix.transfers['b'].other_kinds.mean == 0.5
    assert found.fidelity.simulators['b'].nats_per_token is None, 'off the device there are no likelihoods'
    assert found.fidelity.simulators['a'].perplexity == math.exp(2)
    assert found.fidelity.simulators['a'].statistics == {'words_per_message': 1.5, 'typos': None}
    assert found.training.assistants['b/seed-0'].zero_variance == (0.25, None)
    (shown,) = found.conversations.measures['reply']
    assert shown.example == 'p2'
    assert {who: (x.messages[1].content, x.score) for who, x in shown.conversations.items()} == {
        who: (who, scores[1]) for who, scores in SCORES.items()
    }


def lose(stage, causes, **fields):
    """Rewrites a stage's result as if the examples with a cause had no score."""
    path = stage / 'result.json'
    block = json.loads(path.read_text())
    for name, values in block['outcomes'].items():
        if name not in ('example', 'cluster'):
            values[:] = [None if cause else value for cause, value in zip(causes, values, strict=True)]
    block['outcomes']['cause'] = causes
    path.write_text(json.dumps(block | fields))


def test_what_has_no_score_is_left_out_with_its_pairs_and_named(spec, tmp_path, capsys):
    """A block of this version beside one of an earlier version, without causes; a cell of the matrix."""
    lose(tmp_path / 'reply/b/seed-0/block-1', ['a judge failed: judge x: invalid_json', ''])
    path = tmp_path / 'matrix/a/seed-0/b/result.json'
    cell = json.loads(path.read_text())
    for name, values in cell['outcomes'].items():
        if name not in ('example', 'cluster'):
            values[1] = values[2] = None
    cell['outcomes']['cause'] = ['', 'no line', 'no line', '']
    path.write_text(json.dumps(cell))
    write_results(spec, tmp_path)
    found = read(tmp_path)
    assert found == results_of(spec, tmp_path)
    reply = found.measures['reply']
    assert reply.assistants['b/seed-0'].causes == {'a judge failed: judge x: invalid_json': 1}
    assert reply.assistants['a/seed-0'].causes == {}
    assert reply.assistants['b/seed-0'].gain.mean == (1 + 0 + 1) / 3
    assert found.scores.measures['reply'].assistants['b/seed-0'] == (1.0, 1.0, None, 3.0)
    assert [x.score.mean for x in reply.differences] == [pytest.approx(-5 / 3)], 'on the three that both have'
    assert (found.matrix.failed, found.matrix.causes) == (((0, 0, 2), (0, 0, 0)), {'no line': 2})
    assert found.matrix.conversations == ((4, 4, 2), (4, 4, 4))
    assert found.matrix.mean[0] == (2.25, 2.75, 1.0)
    assert found.matrix.transfers['a'].simulators['b'].mean == (1.0 + 1.0) / 2 - (1.0 + 3.0) / 2
    said = '1 of 12 have no reward-model score, at most 1 of 4 with one assistant (b/seed-0): a judge failed: judge x: '
    assert said in (tmp_path / REPORT_FILE).read_text()
    assert 'n=2, 2 without a score' in (tmp_path / REPORT_FILE).read_text()
    assert 'Conversations without a score are left out: no line (2).' in (tmp_path / REPORT_FILE).read_text()
    printed = capsys.readouterr().out
    assert '1 of 12 have no reward-model score' in printed
    assert 'Conversations without a score: no line (2).' in printed


def test_what_nobody_has_a_score_of_is_counted_and_every_win_rate_is_bounded(spec, tmp_path):
    """The first example has no score with any assistant, the third none with one of them."""
    for name in SCORES:
        lose(tmp_path / f'reply/{name}/block-0', ['no line', ''], shown=[])
    lose(tmp_path / 'reply/b/seed-0/block-1', ['no line', ''])
    reply = results_of(spec, tmp_path).measures['reply']
    assert reply.without_outcome == 1
    assert summary.failures(reply).endswith('with it its comparisons; 1 have none with any assistant')
    arm, one = reply.arms['b'], reply.assistants['b/seed-0']
    assert (arm.compared, reply.arms['a'].compared) == ((2,), (3,))
    assert one.win_rate.mean == arm.win_rate.mean == (0.5 + 1) / 2
    for found in (arm.win_rate_bounds, one.win_rate_bounds):
        assert (found.lost.mean, found.won.mean) == ((0.5 + 1) / 4, (1 + 0.5 + 1 + 1) / 4)
    assert (one.strict_win_rate, one.strict_win_rate_bounds, arm.strict_win_rate_bounds) == (None, None, None)
    assert [(x.compared, x.adjusted_p) for x in reply.differences] == [((2,), None)]
    (row,) = [x for x in summary.rows_of(results_of(spec, tmp_path).experiment, reply) if x.name == 'b']
    assert (row.failures, row.bounds) == (2, one.win_rate_bounds), 'of one seed over its openings'


def test_forecasts_are_those_of_the_first_measures_arms(spec, tmp_path):
    made_up(tmp_path, {'b': 0.1, 'a/seed-0': 0.9})
    stages = {'b': ['forecast/b'], 'a': ['forecast/a/seed-0']}
    write_results(changed(spec, forecast=ForecastSpec('Made up.', 'people_forecast', stages, n=2)), tmp_path)
    forecast = read(tmp_path).forecast
    assert forecast.measure == 'reply'
    assert forecast.simulators['b'].cosine.mean < forecast.simulators['a'].cosine.mean
    assert {x.num_arms for x in forecast.correlations if x.forecast == 'cosine'} == {2}


def test_an_example_that_failed_with_an_assistant_is_shown_with_the_others(spec, tmp_path):
    lose(tmp_path / 'reply/b/seed-0/block-0', ['', 'no line'], shown=[])
    (shown,) = results_of(spec, tmp_path).conversations.measures['reply']
    assert list(shown.conversations) == ['initial', 'a/seed-0']


def test_everything_is_written_and_can_be_read(spec, tmp_path, capsys):
    write_results(spec, tmp_path)
    assert read(tmp_path) == results_of(spec, tmp_path)
    first = (tmp_path / REPORT_FILE).read_bytes()
    assert b'a check of the pipeline' in first.lower()
    write_results(spec, tmp_path)
    assert (tmp_path / REPORT_FILE).read_bytes() == first
    written = [path.stat().st_size > 0 for path in sorted((tmp_path / 'tensorboard').iterdir())]
    assert written == [False, True], 'of the last call alone'
    printed = capsys.readouterr().out
    assert 'a - b' in printed
    assert f'report: {tmp_path / REPORT_FILE}' in printed


def test_png_size():
    assert png_size(b'\x89PNG\r\n\x1a\n' + bytes(8) + (640).to_bytes(4, 'big') + (480).to_bytes(4, 'big')) == (640, 480)


def changed(spec, **changes):
    return ResultsSpec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes})


def test_what_cannot_be_is_refused(spec):
    measure = spec.measures['reply']
    with pytest.raises(ValueError, match="'matrix' is the name of another file of results"):
        changed(spec, measures={'matrix': measure})
    with pytest.raises(ValueError, match=r'measures.reply.stages: expected .*, found \[\]'):
        changed(spec, measures={'reply': MeasureSpec(WORDS, {})})
    with pytest.raises(ValueError, match='expected at most one oracle, found b, a'):
        changed(spec, arms={'b': Arm('people', True), 'a': Arm('people', True)})


def test_replayed_turns_and_likelihoods_are_measured_by_data_set(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(distances, 'DRAWS', 20)
    turns = [
        Turn(f'c{c}', f'set {c % 2}', t, 'natural', real='a Word', real_end=t == 1, simulated='a word', ended=t == 1)
        for c in range(6)
        for t in (0, 1)
    ]
    for name in 'ba':
        (tmp_path / 'replay' / name).mkdir(parents=True)
        write_turns(tmp_path / 'replay' / name / 'turns.jsonl.gz', turns)
    likelihood = {'log_likelihood': [-2.0, -4.0, -9.0], 'tokens': [1, 2, 3], 'source': ['set 0', 'set 0', 'set 1']}
    (tmp_path / 'likelihood/a/seed-0/result.json').write_text(json.dumps(likelihood))
    spec = dataclasses.replace(
        spec,
        simulators={
            'b': SimulatorSpec('b', 'likelihood/b', 'replay/b'),
            'a/seed-0': SimulatorSpec('a', 'likelihood/a/seed-0', 'replay/a'),
        },
        annotators=Annotators('', '', '', ''),
    )
    found = results_of(spec, tmp_path)
    b, a = (found.fidelity.simulators[arm] for arm in 'ba')
    assert list(b.replayed) == [ALL, 'set 0', 'set 1']
    assert b.replayed[ALL].distances['capitalisation'].excess.mean == pytest.approx(0.5, abs=0.3)
    assert b.replayed['set 0'].termination.f1.mean == 1.0
    assert b.replayed['set 0'].not_measured['typo rate'] == 'no annotator is named for words'
    assert {name: x.mean for name, x in a.nats_by_source.items()} == {'set 0': 2.0, 'set 1': 3.0}
    assert (a.perplexity, b.nats_by_source) == (math.exp(15 / 6), {})
    result_files.write(found, tmp_path)
    assert read(tmp_path).fidelity == found.fidelity
    against = next(x for x in utility.AGAINST if x.name == 'utility_by_distributions')
    shared = ('utterance length', 'punctuation', 'capitalisation')  # others have no annotator
    assert against.read(found)['b'] == np.mean([b.replayed[ALL].distances[name].excess.mean for name in shared])
    page = page_text(found)
    assert 'Turns of real conversations, replayed' in page
    for column in ('beyond people: distributions (bits)', 'Beyond people: the excess', 'Intent covered: the share of'):
        assert column in page
    assert 'Not measured: typo rate: no annotator is named for words.' in page
    assert f'{math.exp(2):.3f}' in page or f'{math.exp(2):.2f}' in page
