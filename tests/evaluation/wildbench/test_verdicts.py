"""Scores and comparisons by our own judges: the official layout, both orders, empty replies, versions of prompts."""

import json
import pathlib
from typing import Any

import pytest

from simrl.conversations.splits import hash64
from simrl.evaluation.wildbench import checklist, verdicts
from simrl.evaluation.wildbench.asking import CUT, AskSettings, JudgePrompt
from simrl.evaluation.wildbench.generations import Generation
from simrl.evaluation.wildbench.judge_files import judge_file, read_comparisons, read_scores, write_verdicts
from simrl.evaluation.wildbench.official import LEADERBOARD, wb_reward
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from tests.evaluation.wildbench.made_up import choice_of, material, score_of, script, task, tasks_of
from tests.remote.server import ScriptedServer

TASKS = tasks_of(*map(task, range(4)))
NAMES = list(TASKS)


def generations(generator: str, *texts: str) -> dict[str, Generation]:
    return {name: Generation(name, text, generator) for name, text in zip(NAMES, texts, strict=False)}


def asked(call: Any, *args: Any, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of judge a, and the bodies of its requests."""
    with ScriptedServer(script, models=['a']) as server:
        with Endpoint(EndpointSettings(server.url, 'a', in_flight=2)) as endpoint:
            rows = call(TASKS, *args, {'a': endpoint}, AskSettings(max_tokens=50, **settings))
        return rows['a'], server.requests


def written(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text(json.dumps(rows))
    return path


def test_scores_are_in_the_official_layout_and_an_empty_reply_is_not_judged(tmp_path: pathlib.Path) -> None:
    rows, bodies = asked(verdicts.score, generations('m', 'one', ' \n', 'three'))
    assert len(bodies) == 2
    assert [(row['session_id'], row['model_test'], row['model_output']) for row in rows] == [
        (NAMES[0], 'm', 'one'),
        (NAMES[1], 'm', ' \n'),
        (NAMES[2], 'm', 'three'),
    ]
    assert [row['score'] for row in rows] == [score_of('a', 'one'), 1, score_of('a', 'three')]
    assert all(row['parsed_result'].keys() == {'strengths', 'weaknesses', 'score'} for row in rows)
    scores, left_out = read_scores(written(tmp_path / 'm.json', rows))
    assert ([of.score for of in scores], left_out) == ([row['score'] for row in rows], {})


def test_pairs_are_judged_in_both_orders_and_read_back_alike(tmp_path: pathlib.Path) -> None:
    mine, other = generations('m', 'one', '', 'three', ''), generations('r', 'uno', 'due', '', '')
    rows, bodies = asked(verdicts.pairs, mine, other)
    assert len(bodies) == 2, 'a pair with an empty reply is not judged'
    shown = [{name: text for line in material(body) for name, text in line.items()} for body in bodies]
    assert sorted((x['A'], x['B']) for x in shown) == [('one', 'uno'), ('uno', 'one')]
    comparisons, left_out = read_comparisons(written(tmp_path / 'm.json', rows), 'r')
    assert not left_out
    assert [(of.task, of.first) for of in comparisons] == [
        (name, first) for name in NAMES for first in ('assistant', 'reference')
    ]
    gain = {'A++': 1.0, 'A+': 0.5, 'A=B': 0.0, 'B+': -0.5, 'B++': -1.0}
    assert [of.value for of in comparisons] == [
        gain[choice_of('a', 'one', 'uno')],
        -gain[choice_of('a', 'uno', 'one')],
        *(-1.0, -1.0),
        *(1.0, 1.0),
        *(0.0, 0.0),
    ]
    assert [(of.reply, of.reference) for of in comparisons[::2]] == [
        ('one', 'uno'), ('', 'due'), ('three', ''), ('', '')
    ]  # fmt: skip
    assert wb_reward(comparisons[::2], TASKS, LEADERBOARD).left_out == {'empty or cut reply': 3}


def test_judges_see_replies_as_far_as_they_are_asked_to(tmp_path: pathlib.Path) -> None:
    rows, bodies = asked(verdicts.pairs, generations('m', 'a b c d'), generations('r', 'a b c'), max_words=3)
    assert rows[0]['model_outputs'] == {'m': f'a b c{CUT}', 'r': 'a b c'}
    assert sum(f'a b c{CUT}' in body['messages'][0]['content'] for body in bodies) == 2
    comparisons, _ = read_comparisons(written(tmp_path / 'm.json', rows), 'r')
    assert wb_reward(comparisons[:1], settings=LEADERBOARD).left_out == {'empty or cut reply': 1}


def test_what_judges_could_not_say_is_beside_their_file_and_counted_with_it(tmp_path: pathlib.Path) -> None:
    """The benchmark's own code reads a score of every row of every .json in the folder."""
    path = tmp_path / 'a' / 'm.json'
    rows, _ = asked(verdicts.score, generations('m', 'one', 'two', 'three'))
    lost = {**rows[1], 'parsed_result': None, 'score': None, 'meta_data': {'cause': 'schema', 'raw': '{}'}}
    assert write_verdicts(path, [rows[0], lost, rows[2]]) == {'schema': 1}
    assert json.loads(path.read_text()) == [rows[0], rows[2]]
    assert json.loads((path.parent / 'm.failures.jsonl').read_text()) == lost
    scores, left_out = read_scores(path)
    assert ([of.task for of in scores], left_out) == ([NAMES[0], NAMES[2]], {'schema': 1})
    assert not write_verdicts(path, rows)
    assert [found.name for found in path.parent.iterdir()] == ['m.json']
    assert write_verdicts(path, [lost]) == {'schema': 1}
    assert [found.name for found in path.parent.iterdir()] == ['m.failures.jsonl']
    (path.parent / 'm.failures.jsonl').write_text('{}\n')
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r'm.failures.jsonl, line 1: expected meta_data with a cause'):
        read_scores(path)


def test_each_judge_and_assistant_has_a_place_of_its_own(tmp_path: pathlib.Path) -> None:
    """Names that differ only by what a file name cannot hold, and names of files that are no judge files."""
    names = ['org/m', 'org_m', 'org%2Fm', 'org m', 'm', 'm.failures', 'm@host', '..', 'mönch']
    folder = tmp_path / 'eval'
    places = [judge_file(folder, judge, model) for judge in names for model in names]
    places += [judge_file(folder, 'a', model, reference) for model in names for reference in names]
    places += [path.with_suffix('.failures.jsonl') for path in places]
    assert len({*places}) == len(places)
    for path in places:
        assert '..' not in path.relative_to(folder).parts
    assert judge_file(folder, 'gpt-4o', 'Qwen1.5-72B-Chat@together', 'claude-3').relative_to(folder) == pathlib.Path(
        'eval=gpt-4o/ref=claude-3/Qwen1.5-72B-Chat@together.json'
    )


def test_pairs_need_two_names_and_a_common_task() -> None:
    with pytest.raises(ValueError, match="generator: expected two assistants of different names, found 'm' twice"):
        asked(verdicts.pairs, generations('m', 'a'), generations('m', 'b'))
    with pytest.raises(ValueError, match='expected at least one task with replies of both assistants'):
        asked(verdicts.pairs, generations('m', 'a'), {NAMES[1]: Generation(NAMES[1], 'x', 'r')})


PROMPTS = {  # by protocol and version; a change of a word needs another version, and its hash here
    'wildbench-checklist-1': 10871530333995509260,
    'wildbench-score-1': 11579509099135538246,
    'wildbench-pair-1': 18194449524436153839,
}


def test_a_changed_prompt_has_another_version() -> None:
    one = task(0, items=2, turns=2)
    prompts: list[JudgePrompt] = [
        checklist.checklist_prompt(one, 'reply'),
        verdicts.score_prompt(one, 'reply'),
        verdicts.pair_prompt(one, 'reply', 'other'),
    ]
    assert {of.version: hash64(of.text + json.dumps(of.schema)) for of in prompts} == PROMPTS
