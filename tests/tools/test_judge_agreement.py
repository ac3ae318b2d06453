"""The agreement of judges with people: pairs of both sets, what has no label, ties, and replies without a verdict."""

import gzip
import json

import numpy as np

from simrl.rewards.judging import Judge, Verdict
from simrl.rewards.rewards import TOO_LONG
from tools import judge_agreement as tool

ROWS = [
    {'input': 'ask', 'output_1': 'good', 'output_2': 'bad one', 'label': 1},
    {'input': 'ask', 'output_1': 'bad\u2028one', 'output_2': 'good', 'label': 2},
    *(
        {'instruction': 'do', 'input': text, 'response1': 'bad', 'response2': 'good', 'annotators': votes}
        for text, votes in (('x', [2, 2, 0]), ('', [2, 2, 2]), ('x', [0, 1, 2]), ('x', [0, 0, 1]))
    ),
    {'instruction': 'do', 'input': 'x', 'response1': '', 'response2': 'good', 'annotators': [2, 2, 2]},
]


def test_pairs_of_both_sets_are_read_and_rows_without_one_are_counted(tmp_path):
    with gzip.open(tmp_path / 'pairs.jsonl.gz', 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in ROWS)
    pairs, counts = tool.read_pairs(tmp_path / 'pairs.jsonl.gz')
    assert [(pair.opening, pair.chosen, pair.rejected) for pair in pairs] == [
        ('ask', 'good', 'bad one'),
        ('ask', 'good', 'bad\u2028one'),
        ('do\n\nx', 'good', 'bad'),
        ('do', 'good', 'bad'),
    ]
    assert counts == {'no majority for a reply': 2, 'a reply is empty': 1}


def test_the_agreement_counts_ties_half_and_pairs_without_a_verdict_apart(capsys):
    pairs = [pair for number, row in enumerate(ROWS[:4]) if not isinstance(pair := tool.pair_of(number, row), str)]
    tool.report('judge', np.array([0.5, 0.0, np.nan, -0.5]), pairs)
    printed = capsys.readouterr().out
    assert printed.startswith('judge: agrees on 0.500 [')
    assert 'longer wins: 0.333 [' in printed  # of the three that are judged
    assert printed.endswith('pairs without a verdict: 1\n')


def test_a_reply_is_judged_after_its_prompt():
    asked = []

    def submit(questions):
        asked.extend(questions)
        return lambda: [Verdict(0.5), Verdict(None, cause=TOO_LONG)]

    scores = tool.verdicts(Judge(submit), ['a', 'b'], ['x', 'y'])
    np.testing.assert_array_equal(scores, [0.5, np.nan])
    assert [question.messages for question in asked] == [
        (('user', 'a'), ('assistant', 'x')),
        (('user', 'b'), ('assistant', 'y')),
    ]
