"""WB-Score and WB-Reward: published numbers to the bit, slow loops, quirks by name, and bad judge files."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.evaluation.wildbench.asking import CUT
from simrl.evaluation.wildbench.judge_files import (
    OUTCOMES,
    Comparison,
    Score,
    judge_file,
    names_of,
    read_comparisons,
    read_scores,
)
from simrl.evaluation.wildbench.official import (
    LEADERBOARD,
    WEIGHTS,
    RewardSettings,
    ScoreSettings,
    adjusted_score,
    group_means,
    mean_length,
    mixture,
    position,
    reward_of_counts,
    task_macro,
    value_after_margin,
    wb_reward,
    wb_score,
)
from simrl.evaluation.wildbench.tasks import Overlap
from tests.evaluation.wildbench.made_up import task, tasks_of

DATA = os.environ.get('SIMRL_DATA')
needs_data = pytest.mark.skipif(not DATA, reason='SIMRL_DATA is not set')
FOLDER = pathlib.Path(DATA or '.') / 'wildbench'
TASKS = tasks_of(*map(task, range(12)))


def leaderboard(name: str) -> dict:
    return json.loads((FOLDER / 'leaderboard' / name).read_text())


@needs_data
def test_published_scores_from_the_judges_files() -> None:
    published, found = leaderboard('score.json'), 0
    for path in sorted((FOLDER / 'score_v2.0625_gpt4o').glob('*.jsonl.gz')):
        scores, left_out = read_scores(path)
        assert not left_out
        result = wb_score(scores)
        row = published.get(path.name.removesuffix('.jsonl.gz'))
        if row is not None:
            found += 1
            assert result.score.n == row['total']
            assert result.score.mean == row['score']
            assert result.adjusted == row['adjusted_score']
            assert result.length == row['avg_len']
    assert found >= 4


@needs_data
@pytest.mark.parametrize(('name', 'models'), [('score.json', 61), ('score-sonnet.json', 3)])
def test_published_adjusted_and_macro_scores_of_all_models(name: str, models: int) -> None:
    published = leaderboard(name)
    assert len(published) == models
    for row in published.values():
        assert adjusted_score(row['score']) == row['adjusted_score']
        assert task_macro(row['task_categorized_scores']) == row['task_macro_score']


@needs_data
@pytest.mark.parametrize(('reference', 'models'), [('haiku', 53), ('gpt4t', 51)])
@pytest.mark.parametrize('margin', [-1, 500])
def test_published_rewards_of_all_models_from_their_counts(reference: str, models: int, margin: int) -> None:
    published = leaderboard(f'pairwise-{reference}-K={margin}.json')
    assert len(published) == models
    for row in published.values():
        assert reward_of_counts(row, row['total']) == row['reward']
        groups = {group: reward_of_counts(counts) for group, counts in row['task_categorized_results'].items()}
        assert groups == row['task_categorized_rewards']
        assert task_macro(groups) == row['task_macro_reward']


@needs_data
def test_published_mixtures_over_three_references() -> None:
    """The counts against Llama-2-70b-chat are not published here: its rewards are those of the table itself."""
    published = leaderboard('all_stat_wildbench.500.json')
    scores, files = leaderboard('score.json'), {n: leaderboard(f'pairwise-{n}-K=500.json') for n in ('haiku', 'gpt4t')}
    assert len(published) == len(scores) == 61
    for model, row in published.items():
        for name, of_model in files.items():
            if model in of_model:
                assert row[f'{name}_reward.K=500'] == of_model[model]['reward'] * 100
                assert row[f'{name}_reward.task_macro.K=500'] == of_model[model]['task_macro_reward'] * 100
        for field, whole in (('', 'mixture_of_rewards'), ('.task_macro', 'task_macro_reward')):
            three = [row[f'{name}_reward{field}.K=500'] for name in ('haiku', 'llama', 'gpt4t')]
            assert mixture(three) == row[f'{whole}.K=500']
        assert adjusted_score(scores[model]['score']) * 10 == row['WB_score']


TEXTS = ('', 'a', 'a b', 'word ' * 9, f'long{CUT}')
VALUES = tuple(OUTCOMES.values())
ONE_ORDER = st.dictionaries(
    st.sampled_from(sorted(TASKS)),
    st.tuples(st.sampled_from(VALUES), st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.booleans()),
    min_size=1,
)


def official_rows(drawn: dict) -> list[dict]:
    """Rows as the benchmark's code writes them."""
    rows = []
    for name, (value, reply, reference, model_first) in drawn.items():
        a, b = ('m', 'ref') if model_first else ('ref', 'm')
        winner = 'tie' if value == 0 else 'm' if value > 0 else 'ref'
        outputs = {a: reply if a == 'm' else reference, b: reply if b == 'm' else reference}
        rows.append(
            {
                'session_id': name,
                'model_A': a,
                'model_B': b,
                'winner': winner,
                'extent': int(abs(value) * 2),
                'model_outputs': outputs,
            }
        )
    return rows


def slow_reward(rows: list[dict], margin: int | None) -> tuple[float, dict[str, float], collections.Counter[str]]:
    """The leaderboard's rules, a row at a time, from what is written down about its files."""
    total, counts, of_group = len(rows), collections.Counter[str](), collections.defaultdict(list)
    for row in rows:
        own, other = row['model_outputs']['m'], row['model_outputs']['ref']
        if any(text == '' or text.endswith('... (truncated)') for text in (own, other)):
            continue
        if row['winner'] == 'tie':
            outcome = 'tie'
        else:
            won = row['winner'] == 'm'
            outcome = ('win' if won else 'lose') + ('_much' if row['extent'] == 2 else '')
            longer, shorter = (own, other) if won else (other, own)
            if row['extent'] == 1 and margin is not None and len(longer) > len(shorter) + margin:
                outcome = 'tie'
        counts[outcome] += 1
        for group in TASKS[row['session_id']].groups:
            of_group[group].append(outcome)
    gain = {'win_much': 1, 'win': 0.5, 'tie': 0, 'lose': -0.5, 'lose_much': -1}
    groups = {group: statistics.fmean(gain[o] for o in outcomes) for group, outcomes in of_group.items()}
    return sum(gain[outcome] * count for outcome, count in counts.items()) / total, groups, counts


@given(ONE_ORDER, st.sampled_from([None, 0, 3, 20]))
def test_the_leaderboards_rules_agree_with_a_slow_loop(tmp_path_factory, drawn, margin) -> None:
    rows = official_rows(drawn)
    path = tmp_path_factory.mktemp('wb') / 'm.json'
    path.write_text(json.dumps(rows))
    comparisons, left_out = read_comparisons(path, 'ref')
    assert not left_out
    found = wb_reward(comparisons, TASKS, dataclasses.replace(LEADERBOARD, length_margin=margin))
    reward, groups, counts = slow_reward(rows, margin)
    assert found.reward.mean == pytest.approx(reward)
    assert {group: of.mean for group, of in found.groups.items()} == pytest.approx(groups)
    assert {name: count for name, count in found.counts.items() if count} == dict(counts)
    assert found.left_out.get('empty or cut reply', 0) == len(rows) - counts.total()
    assert reward_of_counts(found.counts, len(rows)) == pytest.approx(reward)
    gained, missing = reward_of_counts(found.counts, 1), len(TASKS) - sum(found.counts.values())
    assert found.bounds == pytest.approx(((gained - missing) / len(TASKS), (gained + missing) / len(TASKS)))
    assert found.unjudged == missing
    equal = wb_reward(comparisons, TASKS, dataclasses.replace(LEADERBOARD, length_margin=margin, weights='equal'))
    assert (equal.task_macro and equal.task_macro.mean) == (
        pytest.approx(statistics.fmean(groups.values())) if groups else None
    )
    assert dataclasses.replace(equal, task_macro=found.task_macro) == found
    of_file = wb_reward(comparisons, settings=LEADERBOARD)
    assert (of_file.unjudged, of_file.bounds, of_file.task_macro, of_file.groups) == (None, None, None, {})
    if groups:
        weights = sum(WEIGHTS[group] for group in groups)
        assert found.task_macro.mean == pytest.approx(sum(WEIGHTS[g] * x for g, x in groups.items()) / weights)
    else:
        assert found.task_macro is None


BOTH = st.dictionaries(st.sampled_from(sorted(TASKS)), st.tuples(*[st.sampled_from(VALUES)] * 2), min_size=1)


def both_orders(drawn: dict) -> list[Comparison]:
    return [
        Comparison(name, value, 'reply', 'reference', first)
        for name, values in drawn.items()
        for value, first in zip(values, ('assistant', 'reference'), strict=True)
    ]


@given(BOTH)
def test_both_orders_are_averaged_and_strict_makes_a_flip_a_tie(drawn) -> None:
    comparisons = both_orders(drawn)
    mean, strict = (wb_reward(comparisons, TASKS, RewardSettings(orders=orders)) for orders in ('mean', 'strict'))
    assert mean.reward.mean == pytest.approx(statistics.fmean(sum(pair) / 2 for pair in drawn.values()))
    kept = [
        sum(pair) / 2 if (a > 0) == (b > 0) and (a < 0) == (b < 0) else 0 for pair in drawn.values() for a, b in [pair]
    ]
    assert strict.reward.mean == pytest.approx(statistics.fmean(kept))
    assert mean.reward.n == strict.reward.n == len(drawn)
    assert sum(mean.counts.values()) == 2 * len(drawn)
    assert mean.flips == strict.flips
    if len(drawn) > 1:
        values = [sum(pair) / 2 for pair in drawn.values()]
        assert mean.reward.sem == pytest.approx(statistics.stdev(values) / len(values) ** 0.5)
    shuffled = random.Random(0).sample(comparisons, len(comparisons))
    assert wb_reward(shuffled, TASKS).reward.mean == pytest.approx(mean.reward.mean)


@given(BOTH)
def test_a_judge_that_only_sees_the_place_gives_no_reward(drawn) -> None:
    """Position bias cancels between the orders."""
    biased = [dataclasses.replace(of, value=0.5 if of.first == 'assistant' else -0.5) for of in both_orders(drawn)]
    found = wb_reward(biased)
    assert (found.reward.mean, found.flips) == (0.0, len(drawn))
    bias = position(biased)
    assert bias is not None
    assert (bias.to_first.mean, bias.consistent.mean, bias.first_position.mean) == (1.0, 0.0, 0.75)
    assert position(biased[:1]) is None


def test_one_order_alone_is_left_out_unless_each_has_one() -> None:
    comparisons = both_orders({'task0': (1.0, 0.5), 'task1': (-1.0, -1.0)})[:3]
    found = wb_reward(comparisons)
    assert (found.reward.mean, found.left_out) == (0.75, {'one order only': 1})
    with pytest.raises(ValueError, match="expected 'mean' or 'strict' for task task0, judged in both, found 'single'"):
        wb_reward(comparisons, settings=RewardSettings(orders='single'))
    with pytest.raises(
        ValueError, match=r"expected at least one that is judged, found none; .*orders='single' takes them"
    ):
        wb_reward(comparisons[2:])


@given(st.sampled_from(VALUES), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_the_margin_touches_slight_wins_of_longer_replies_only(value, length, other, margin) -> None:
    comparison = Comparison('t', value, 'x' * length, 'x' * other, 'assistant')
    winner, loser = (length, other) if value > 0 else (other, length)
    expected = 0.0 if abs(value) == 0.5 and winner > loser + margin else value
    assert value_after_margin(comparison, margin) == expected
    assert value_after_margin(comparison, None) == value


@given(
    st.dictionaries(st.sampled_from(sorted(TASKS)), st.tuples(st.integers(1, 10), st.sampled_from(TEXTS)), min_size=1)
)
def test_scores_agree_with_a_slow_loop(drawn) -> None:
    scores = [Score(name, float(score), reply) for name, (score, reply) in drawn.items()]
    for cut_replies in ('judged', 'left out'):
        found = wb_score(scores, TASKS, ScoreSettings(cut_replies))
        of_group = collections.defaultdict(list)
        for name, (score, reply) in drawn.items():
            if cut_replies == 'judged' or (reply and not reply.endswith(CUT)):
                for group in TASKS[name].groups:
                    of_group[group].append(score)
        means = {group: of.mean for group, of in found.groups.items()}
        assert means == pytest.approx({g: (statistics.fmean(x) - 5) * 2 for g, x in of_group.items()})
        assert found.adjusted == pytest.approx((statistics.fmean(score for score, _ in drawn.values()) - 5) * 2)
        total, missing = sum(score for score, _ in drawn.values()), len(TASKS) - len(drawn)
        assert found.bounds == pytest.approx(((total + missing) / len(TASKS), (total + 10 * missing) / len(TASKS)))
        assert found.unjudged == missing
        equal = wb_score(scores, TASKS, ScoreSettings(cut_replies, 'equal'))
        assert (equal.task_macro and equal.task_macro.mean) == (
            pytest.approx(statistics.fmean(means.values())) if means else None
        )
        lengths = [len(reply) for _, reply in drawn.values() if reply and not reply.endswith(CUT)]
        assert found.length == (pytest.approx(statistics.fmean(lengths)) if lengths else None)


@given(BOTH, st.sets(st.sampled_from(sorted(TASKS))))
def test_the_numbers_without_tasks_that_training_data_has(drawn, known) -> None:
    overlap = Overlap(9, tuple(sorted(known)))
    others = {task: pair for task, pair in drawn.items() if task not in known}
    scores = [Score(name, 5 + 4 * pair[0], 'r') for name, pair in drawn.items()]
    for found, values in (
        (wb_reward(both_orders(drawn), TASKS, overlap=overlap), [sum(pair) / 2 for pair in others.values()]),
        (wb_score(scores, TASKS, overlap=overlap), [5 + 4 * pair[0] for pair in others.values()]),
    ):
        told = dict(found.overlap)
        without = told.pop('without them')
        assert told == {'conversations': 9, 'ids': overlap.ids, 'tasks': len(known)}
        assert without['n'] == len(others)
        assert without['mean'] == (pytest.approx(statistics.fmean(values)) if values else None)
    for found in (wb_reward(both_orders(drawn), TASKS), wb_score(scores, TASKS)):
        assert found.overlap == 'not measured'


def test_the_error_of_the_macro_is_that_of_independent_groups_and_of_common_tasks() -> None:
    """Of groups apart it is the sum over groups; of tasks in several groups that of redrawn tasks."""
    random = np.random.default_rng(0)
    alone = tasks_of(*(dataclasses.replace(task(i), groups=(tuple(WEIGHTS)[i % 5],)) for i in range(60)))
    values = {name: float(x) for name, x in zip(alone, random.normal(5, 2, 60), strict=True)}
    groups, macro = group_means(alone, values)
    expected = sum((WEIGHTS[g] / sum(WEIGHTS.values()) * of.sem) ** 2 for g, of in groups.items()) ** 0.5
    assert macro is not None
    assert macro.sem == pytest.approx(expected)
    several = tasks_of(*(dataclasses.replace(task(i), groups=tuple(WEIGHTS)[i % 3 : i % 3 + 3]) for i in range(300)))
    values = {name: float(x) for name, x in zip(several, random.normal(5, 2, 300), strict=True)}
    _, macro = group_means(several, values, 'equal')
    assert macro is not None
    found, member = (
        np.array(list(values.values())),
        np.array([[g in of.groups for g in WEIGHTS] for of in several.values()]),
    )
    drawn = random.integers(0, 300, (4000, 300))
    means = np.einsum('rn,rng->rg', found[drawn], member[drawn]) / member[drawn].sum(1)
    assert macro.sem == pytest.approx(means.mean(1).std(), rel=0.05)
    apart = sum((of.sem / 5) ** 2 for of in group_means(several, values)[0].values()) ** 0.5
    assert macro.sem > 1.3 * apart, 'common tasks do not count as others'
    _, macro = group_means(several, dict(list(values.items())[:1]))
    assert macro is not None
    assert (macro.sem, macro.n) == (None, 1)


def test_a_judge_files_place_names_the_judge_and_the_assistant(tmp_path: pathlib.Path) -> None:
    for names in (('org/b', 'a b.json'), ('gpt-4o', 'eval=x')):
        assert names_of(judge_file(tmp_path, *names)) == names
        assert names_of(judge_file(tmp_path, *names, 'ref')) == names
    assert names_of(tmp_path / 'eval=a' / 'm.jsonl.gz') == ('a', 'm')
    with pytest.raises(ValueError, match=r'm.json: expected a file in a folder eval=JUDGE, which names the judge'):
        names_of(tmp_path / 'retrieval=a' / 'm.json')


def written(path: pathlib.Path, rows: object) -> pathlib.Path:
    path.write_text(json.dumps(rows))
    return path


def test_scores_without_a_verdict_are_counted_and_never_a_number(tmp_path: pathlib.Path) -> None:
    values = [7, '8', '6.5', None, 'N/A', '8/10', 0, 11, True, 'nan', [5]]
    rows = [{'session_id': f't{i}', 'score': x, 'model_output': 'r'} for i, x in enumerate(values)]
    scores, left_out = read_scores(written(tmp_path / 'm.json', rows))
    assert [of.score for of in scores] == [7.0, 8.0, 6.5]
    assert left_out == {'no verdict': 8}
    del rows[3]['score']
    assert read_scores(written(tmp_path / 'm.json', rows)) == (scores, left_out)


def test_comparisons_without_a_verdict_are_counted(tmp_path: pathlib.Path) -> None:
    rows = official_rows({f't{i}': (0.5, 'a', 'b', True) for i in range(6)})
    for row, changes in zip(
        rows[1:],
        ({'winner': None}, {'winner': 'third'}, {'extent': 3}, {'extent': True}, {'winner': 'tie', 'extent': 0}),
        strict=True,
    ):
        row |= changes
    comparisons, left_out = read_comparisons(written(tmp_path / 'm.json', rows), 'ref')
    assert [of.value for of in comparisons] == [0.5, 0.0]
    assert left_out == {'no verdict': 4}


ROW = official_rows({'t': (0.5, 'a', 'b', True)})[0]
BAD = {
    'no list': ({'a': 1}, 'expected a list of objects, found dict'),
    'empty': ([], 'expected a list of objects, found an empty one'),
    'a text': (['x'], 'row 1: expected session_id, .* found str'),
    'no outputs': ([ROW, {**ROW, 'model_outputs': None}], 'row 2: expected session_id, .*, found .*model_outputs'),
    'one model twice': ([{**ROW, 'model_B': 'm'}], "row 1: expected replies of 'ref' and another"),
    'the reference twice': ([{**ROW, 'model_A': 'ref'}], "row 1: expected replies of 'ref' and another"),
    'a reply missing': ([{**ROW, 'model_outputs': {'m': 'a'}}], "row 1: expected replies of 'ref'"),
    'two assistants': (
        [ROW, {**ROW, 'session_id': 'u', 'model_A': 'n', 'model_outputs': {'n': 'a', 'ref': 'b'}}],
        r"row 2: expected one assistant beside the reference, found \['m', 'n'\]",
    ),
    'twice': ([ROW, ROW], 'row 2: expected one row of a session_id and order, found another of t, assistant first'),
    'twice, once without a verdict': ([ROW, {**ROW, 'winner': '?'}], 'row 2: .* found another of t, assistant first'),
    'none': ([{**ROW, 'winner': '?'}], 'expected at least one verdict, found none'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_of_pairs_are_one_error(tmp_path: pathlib.Path, name: str) -> None:
    rows, expected = BAD[name]
    with pytest.raises(ValueError, match=f'm.json.*{expected}'):
        read_comparisons(written(tmp_path / 'm.json', rows), 'ref')


def test_bad_files_of_scores_are_one_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'm.json'
    row = {'session_id': 't', 'score': 5, 'model_output': 'r'}
    for rows, expected in (
        ([{**row, 'model_output': None}], 'row 1: expected session_id and model_output, found model_output, score'),
        ([row, row], 'row 2: expected one row of a session_id and order, found another of t'),
        ([row, {**row, 'score': 'x'}], 'row 2: expected one row of a session_id and order, found another of t'),
        ([{**row, 'score': 'x'}], 'expected at least one verdict, found none'),
        (
            [{**row, 'model_test': 'm'}, {**row, 'session_id': 'u', 'model_test': 'n'}],
            r"row 2, model_test: expected one assistant, found \['m', 'n'\]",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            read_scores(written(path, rows))
    path.write_text('[{')
    with pytest.raises(ValueError, match=r'm.json: expected JSON'):
        read_scores(path)
    with pytest.raises(ValueError, match=r"scores: .* 1 others, for instance 't'"):
        wb_score([Score('t', 5.0, 'r')], TASKS)
    with pytest.raises(ValueError, match=r"comparisons: .* 1 others, for instance 't'"):
        wb_reward([Comparison('t', 0.5, 'a', 'b', 'assistant')], TASKS)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r'RewardSettings.length_margin: expected at least 0, or None, found -1'):
        RewardSettings(length_margin=-1)
    with pytest.raises(ValueError, match='groups: expected some of'):
        task_macro({})
    assert mean_length(['', f'x{CUT}']) is None


def test_a_line_that_is_no_json_is_named_by_its_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'scores.jsonl'
    path.write_text('{"session_id": "a", "model_output": "x", "score": 5}\n{"session_id"\n')
    with pytest.raises(ValueError, match=rf'^{path}, line 2: not JSON: '):
        read_scores(path)
