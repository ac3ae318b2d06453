"""Sections of what judges found of a run's assistants: every number is that of the verdicts, and text stays text."""

import collections
import csv
import dataclasses
import html
import io
import pathlib
import re

import numpy as np
import pytest

from simrl.evaluation.pairwise.of_run import assistants_of_run, comparison_of
from simrl.evaluation.pairwise.table import table
from simrl.evaluation.position import Votes
from simrl.evaluation.report import drawing, judge_figures, judges, sections, summary, tables, verdicts, wildbench
from simrl.evaluation.report.drawing import looks_of
from simrl.evaluation.report.report import console_table
from simrl.evaluation.results.files import Added, add_judges, add_wildbench, read_added
from simrl.evaluation.results.judges import PANEL, JudgesResult
from simrl.evaluation.results.study import StudyPair, StudyResult
from simrl.evaluation.statistics import Estimate
from simrl.evaluation.verdicts import verdicts_of
from simrl.run.config import ConfigError
from tests.evaluation.pairwise.test_table import judged_of, responses_of
from tests.evaluation.report.fake_judges import HOSTILE, judged_like, wildbench_like
from tests.evaluation.report.fake_run import fake_results

NUM = 24
ESTIMATE = Estimate(0.61, 0.5, 0.7, 45, 9, 0.95)


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=2, people=8)


@pytest.fixture(scope='module')
def found():
    """Two seeds of an arm over the initial assistant by two judges; one has no verdict on a prompt of the second."""
    random = np.random.default_rng(0)
    names = ('persona/seed-0', 'persona/seed-1')
    lengths = {name: random.integers(1, 40, NUM) for name in (*names, 'initial')}
    judged = []
    for name in names:
        single = {judge: random.choice([0.0, 0.5, 1.0], (2, NUM), p=[0.3, 0.1, 0.6]) for judge in ('a', HOSTILE)}
        if name == names[1]:
            single['a'][0, 3] = np.nan
        judged += judged_of((name, 'initial'), single)
    made = table(judged, responses_of((*names, 'initial'), NUM, lengths), combine='mean')
    return made, comparison_of(made, ('a', HOSTILE), [one.pair for one in judged])


def rows_of(section: str, title: str) -> list[list[str]]:
    """The cells, as text, of the first table after a title; what is in small type is after a space."""
    part = section[section.index(title) :]
    body = part[part.index('<tbody>') : part.index('</tbody>')].replace('<small>', ' ')
    rows = [re.findall('<t[hd].*?>(.*?)</t[hd]>', row) for row in body.split('<tr>')[1:]]
    return [[html.unescape(re.sub('<.*?>', '', cell)) for cell in row] for row in rows]


def section_of(results, found, folder='/judged') -> str:
    drawn = collections.defaultdict[str, str](str)
    return judges.section(
        results, JudgesResult({folder: found}), looks_of(results.experiment), drawn, pathlib.Path('/')
    )


def test_every_number_is_that_of_the_verdicts(results, found) -> None:
    made, comparison = found
    text = section_of(results, comparison)
    each = rows_of(text, 'Each judge, and the panel')
    assert [row[:2] for row in each] == [
        [f'persona/seed-{seed} over initial', judge] for seed in (0, 1) for judge in ('a', HOSTILE, PANEL)
    ]
    of = {(of.first, judge): own for of in made.comparisons for judge, own in of.judges.items()}
    for row in each:
        own = of[row[0].partition(' ')[0], row[1]]
        rate = own.win_rates.observed.by_participant
        assert row[2] == f'{rate.mean:.2f} [{rate.low:.2f}, {rate.high:.2f}]'
        assert row[3] == f'{own.length_controlled.controlled:.2f}'
        assert row[6:9] == [str(own.wins), str(own.ties), str(own.losses)]
        if row[1] != PANEL:
            assert row[9].startswith(f'{own.position.consistent.mean:.2f} [')
            assert row[10].startswith(f'{own.position.first_position.mean:.2f} [')
    failed = of['persona/seed-1', 'a']
    bounds = [getattr(failed.win_rates, side).by_participant.mean for side in ('all_lost', 'all_won')]
    assert each[3][4:6] == [f'{bound:.2f}' for bound in bounds]
    assert each[3][11:] == ['1', 'schema (1)']
    assert [row[11] for row in each] == ['0', '0', '0', '1', '0', '1'], 'the panel fails where a judge does'
    (first, second) = rows_of(text, judges.TITLE)
    pair = made.comparisons[0]
    assert first[5:9] == [summary.p_value(pair.p_value), summary.p_value(pair.adjusted), str(NUM), str(NUM)]
    rate = results.measures['people'].assistants['persona/seed-0'].win_rate
    assert first[-1].startswith(f'{rate.mean:.2f} ['), 'beside what the measure found'
    assert second[0] == 'persona/seed-1 over initial'
    votes = pair.agreement.votes
    row = rows_of(text, 'The judges beside each other')[0]
    assert row[2:4] == [
        f'{votes.mean_correlation:.2f}'.replace('-', '−'),
        f'{votes.effective:.2f} [{votes.low:.2f}, {votes.high:.2f}]',
    ]
    (arm,) = rows_of(text, 'Over training seeds')
    assert arm[:3] == [
        'persona over initial',
        '2',
        judges.estimate_cell(made.seeds[0].win_rate).text + ' ' + arm[2].partition(' ')[2],
    ]


def test_figures_have_the_numbers_and_the_failures(results, found) -> None:
    _, comparison = found
    figures = judge_figures.drawings(JudgesResult({'/x': comparison, '/y': comparison}), looks_of(results.experiment))
    assert [one.name for one in figures['/x']] == ['judges_win_rate', 'judges_each', 'judges_seeds']
    assert [one.name for one in figures['/y']] == ['judges_win_rate_2', 'judges_each_2', 'judges_seeds_2']
    win_rate, each, _ = figures['/x']
    assert 'Win rate over initial by a panel of 2 judges' in win_rate.text
    assert (
        'n = 24 prompts of 24 openings for each pair, in both orders. 95% intervals are over openings' in win_rate.text
    )
    assert 'Without a preference: 1 of 48, left out; grey: with all of them lost to all won.' in win_rate.text
    assert 'Without a preference: 1 of 96, left out.' in each.text
    rows = list(csv.DictReader(io.StringIO(drawing.csv_text(win_rate))))
    assert [row['judge'] for row in rows] == ['a', HOSTILE, PANEL] * 2
    own = comparison.pairs[1].judges['a']
    assert [float(rows[3][name]) for name in ('win_rate', 'low', 'high')] == [
        own.rate.mean,
        own.rate.low,
        own.rate.high,
    ]
    assert [float(rows[3][name]) for name in ('all_lost', 'all_won')] == list(own.failure_bounds)
    assert [rows[3][name] for name in ('prompts', 'clusters', 'failures')] == ['24', '24', '1']


def test_verdicts_in_short_are_of_the_panel_and_over_seeds(results) -> None:
    """Of an arm with several seeds not each checkpoint; of WildBench each judge where there is no panel."""
    study = StudyResult(
        '/s', 'rehearsal', 'participant', 0, (StudyPair('a', 'b', 9, 45, ESTIMATE, None, 0.1, 0.1, False),)
    )
    judged, numbers = judged_like(results.experiment), wildbench_like(results.experiment)
    outputs = wildbench.WildBenchResult({name: tuple(own) for name, own in numbers.items()})
    found = verdicts_of(Added(study, JudgesResult({'/x': judged}), outputs))
    assert [(of.assistant, of.sample) for of in found[:2]] == [
        ('a', '9 participants'),
        ('role_play', '2 training seeds'),
    ]
    assert 'no people' in found[0].judges
    arms = [arm for arm in judged.arms if arm.win_rate.num_seeds > 1]
    assert [of.assistant for of in found[1:-6]] == [arm.arm for arm in arms]
    assert [of.number for of in found[-6:]] == [
        *('share of checklists', 'share of checklists', 'win rate by checklists', 'WB-Score', 'WB-Reward', 'WB-Reward')
    ]
    assert all(of.judges != HOSTILE for of in found)
    whole = dataclasses.replace(judged, arms=())
    assert len(verdicts_of(Added(judges=JudgesResult({'/x': whole})))) == len(whole.pairs)
    assert found[1].about('role_play')
    assert not found[1].about('role')
    (lines,) = (
        part
        for part in console_table(results, Added(judges=JudgesResult({'/x': judged}))).split('\n\n')
        if verdicts.TITLE in part
    )
    mean = judged.arms[0].win_rate
    assert f'role_play over initial  win rate  {mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}]' in lines.replace(
        '−', '-'
    )
    assert verdicts.TITLE not in console_table(results)
    assert verdicts_of(Added()) == ()


def test_text_of_judges_stays_text(results) -> None:
    experiment = results.experiment
    text = section_of(results, judged_like(experiment), f'/{HOSTILE}')
    looks = looks_of(experiment)
    found = wildbench.WildBenchResult({name: tuple(own) for name, own in wildbench_like(experiment).items()})
    text += wildbench.section(found, looks, '', pathlib.Path('/'))
    assert HOSTILE not in text
    assert '<script' not in text
    assert text.count(html.escape(HOSTILE)) > 20
    assert 'length_term: expected a spread, found &lt;script&gt;' in text


def test_numbers_on_wildbench_are_by_group_with_what_is_left_out(results) -> None:
    """Earlier runs have neither; two files of one assistant are told apart."""
    numbers = wildbench_like(results.experiment)
    found = wildbench.WildBenchResult({name: tuple(own) for name, own in numbers.items()})
    text = wildbench.section(found, looks_of(results.experiment), '', pathlib.Path('/'))
    rows = rows_of(text, wildbench.TITLE)
    second = numbers['/score.json'][0].assistant
    assert [row[8] for row in rows if row[0].startswith(second)] == ['–', '4.10 [3.90, 4.30]', '0.30 [0.20, 0.40]', '–']
    assert [row[9:11] for row in rows[-3:]] == [['–', '–'], *[[f'{HOSTILE} (24)', 'length_margin 500']] * 2]
    groups = rows_of(text, 'By group of tasks')
    assert [row[1] for row in groups] == ['checklist', 'WB-Reward', 'WB-Reward']
    assert groups[0][3:] == ['0.50 [0.58, 0.64]n = 200', '0.70 [0.58, 0.64]n = 200']
    figures = {one.name: one for one in wildbench.drawings(found)}
    assert [name for name in figures if 'groups' in name] == [
        'wildbench_checklist_groups',
        'wildbench_wb_reward_groups',
    ]
    cells = list(csv.DictReader(io.StringIO(drawing.csv_text(figures['wildbench_wb_reward_groups']))))
    assert [(row['group'], row['against'], float(row['mean']), row['tasks']) for row in cells] == [
        (group, HOSTILE, mean, '200') for group, mean in (('Coding', 0.5), ('Math', 0.7)) for _ in range(2)
    ]
    drawing.svg(figures['wildbench_wb_reward_groups'], 'x', drawing.NARROW)
    plain = [dataclasses.replace(of, groups={}, left_out={}, settings={}) for own in numbers.values() for of in own]
    text = wildbench.section(wildbench.WildBenchResult({'/a': tuple(plain)}), {}, '', pathlib.Path('/'))
    assert all(word not in text for word in ('By group', '>left out<', '>settings<'))


def test_a_run_keeps_what_tools_added_and_broken_files_are_named(results, found, tmp_path) -> None:
    """Another call with the same output is in the place of the first; others stay."""
    _, comparison = found
    (tmp_path / 'results').mkdir()
    fake, numbers = judged_like(results.experiment), wildbench_like(results.experiment)
    for folder, of in (('a', fake), ('b', fake), ('a', comparison)):
        add_judges(tmp_path / folder, of, tmp_path)
    add_wildbench(numbers, tmp_path)
    added = read_added(tmp_path)
    assert added.judges.comparisons == {str(tmp_path / 'a'): comparison, str(tmp_path / 'b'): fake}
    assert added.wildbench.outputs == {name: tuple(own) for name, own in numbers.items()}
    assert added.study is None
    file = tmp_path / 'results' / 'judges.json'
    file.write_text(file.read_text().replace('"combine": "mean"', '"combine": "median"'))
    with pytest.raises(ConfigError, match=r"judges.json.*combine: expected one of 'mean', 'strict', found 'median'"):
        read_added(tmp_path)


def test_a_measure_by_a_panel_says_what_its_judges_are_worth(results) -> None:
    text = tables.panel_text(['judge_a', 'share_met', 'judge_b'], Votes(0.5, 1.33, 1.2, None))
    assert 'the mean of 2 judges' in text
    assert 'correlate at 0.50: as votes they are worth 1.33 [no interval] independent judges' in text
    cancelled = tables.panel_text(['judge_a', 'judge_b'], Votes(-1.0, None, None, None))
    assert cancelled.endswith('correlate at −1.00, so that they cancel each other. ')
    assert tables.panel_text(['judge_a'], None) == ''
    measures = {'people': dataclasses.replace(results.measures['people'], votes=Votes(0.5, 1.33, 1.2, 1.5))}
    changed = dataclasses.replace(results, measures=measures)
    drawn = collections.defaultdict[str, list[drawing.Drawing]](list)
    for found, there in ((results, False), (changed, True)):
        page = sections.report_page(found, {}, looks_of(results.experiment), drawn)
        assert ('are worth 1.33 [1.20, 1.50] independent judges' in page) == there


def test_an_assistant_that_the_run_no_longer_has_is_shown(results) -> None:
    fake = judged_like(results.experiment)
    own = {of: {'gone/seed-0': 1, 'initial': 1} for of in ('characters', 'missing', 'empty')}
    gone = dataclasses.replace(fake, pairs=(dataclasses.replace(fake.pairs[0], first='gone/seed-0', **own),), arms=())
    assert 'gone/seed-0 over initial' in section_of(results, gone)
    assert judge_figures.drawings(JudgesResult({'/x': gone}), looks_of(results.experiment))['/x']


def test_other_assistants_than_the_runs_are_refused(results) -> None:
    responses = responses_of(('initial', 'persona/seed-1', 'persona/seed-0'), 2)
    names = list(assistants_of_run(responses, results.experiment))
    assert names == ['persona/seed-1', 'persona/seed-0', 'initial'], 'win rates are over the initial one'
    with pytest.raises(ValueError, match=r"--run: expected assistants of the run, initial, .*, found 'persona'"):
        assistants_of_run(responses_of(('initial', 'persona'), 2), results.experiment)
