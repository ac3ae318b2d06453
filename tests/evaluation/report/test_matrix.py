"""The matrix on the page and in the terminal: scores of at most 1 times 100, pairs, and held-out simulators marked."""

import dataclasses
import re

import pytest

from simrl.evaluation.position import Votes
from simrl.evaluation.report import figures, matrix, page
from simrl.evaluation.report.drawing import looks_of
from simrl.evaluation.report.report import console_table
from simrl.evaluation.results.simulators import SimulatorDifference
from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import Estimate
from tests.evaluation.report.fake_run import fake_results

HELD_OUT = 'persona'  # as if its runs were another arm's


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=3, people=30)


@pytest.fixture(scope='module')
def held_out(results):
    """The same with a held-out simulator, one gain that is known, and one pair of arms."""
    arms = dict(results.experiment.arms)
    arms[HELD_OUT] = dataclasses.replace(arms[HELD_OUT], held_out=True)
    transfers = dict(results.matrix.transfers)
    gains = t_interval([0.011, 0.012, 0.016], null=0.0)
    transfers['sft 7b'] = dataclasses.replace(
        transfers['sft 7b'],
        held_out=gains,
        simulators={**transfers['sft 7b'].simulators, HELD_OUT: gains},
        checkpoints={HELD_OUT: Estimate(0.013, 0.0123, 0.0247, 90, 30, 0.95)},
    )
    pair = SimulatorDifference(
        HELD_OUT, 'sft 7b', 'role_play', (0, 1, 2), gains, Estimate(-0.2, -0.31, -0.12, 90, 30, 0.95)
    )
    return dataclasses.replace(
        results,
        experiment=dataclasses.replace(results.experiment, arms=arms),
        matrix=dataclasses.replace(results.matrix, times=100, transfers=transfers, differences=(pair,)),
    )


def sections_of(results) -> str:
    """The two sections of the page, without the figure."""
    found, colours = results.matrix, dict.fromkeys((*results.matrix.assistants, *results.experiment.arms), '#000000')
    parts = {
        'Assistants': matrix.matrix(results.experiment, found, colours, ''),
        'Gains': matrix.transfers(results, found, colours),
    }
    return ''.join(page.section(matrix.titled(title, found), *inside) for title, inside in parts.items())


def test_scores_of_at_most_one_are_shown_times_a_hundred_and_the_headings_say_so(held_out):
    text = sections_of(held_out)
    assert '<h2>Assistants (× 100)</h2>' in text
    assert '<h2>Gains (× 100)</h2>' in text
    assert 'Mean satisfaction × 100. Rows are assistants' in text
    found = held_out.matrix
    cell = f'{found.mean[0][0] * 100:.1f}<small>[{found.low[0][0] * 100:.1f}, {found.high[0][0] * 100:.1f}] n=1,024'
    assert cell in text
    people = held_out.measures['people'].arms['sft 7b'].gain
    assert f'{people.mean * 100:+.1f}<small>[' in text, 'the gain with people too'
    assert f'{found.mean[0][0] * 100:.1f}' in figures.matrix(held_out.experiment, found).text


def test_differences_have_the_interval_over_conversations_below_that_over_seeds(held_out):
    text = sections_of(held_out)
    rows = dict(re.findall(r'<th scope="row">([^<]+ − [^<]+)</th>(.*?)</tr>', text.split('Differences with each')[1]))
    assert '+1.3<small>[+0.6, +2.0]<br>checkpoints [+1.2, +2.5]</small>' in rows['sft 7b − initial']
    assert 'checkpoints [−31.0, −12.0]' in rows['sft 7b − role_play']
    assert rows['sft 7b − role_play'].count('<td>–</td>') == 2, 'nothing is known with the other simulators'


def test_of_a_panel_each_judge_has_its_means(held_out):
    found, looks = held_out.matrix, looks_of(held_out.experiment)
    own = tuple(tuple(x / 2 for x in row) for row in found.mean[: len(found.users) - (found.people is not None)])
    panel = dataclasses.replace(found, judges={'judge_a': own, 'judge_<b>': own}, votes=Votes(1.0, 1.0, 0.9, 1.1))
    colours = {name: look.colour for name, look in looks.items()}
    text, plain = (''.join(matrix.matrix(held_out.experiment, of, colours, '')) for of in (panel, found))
    assert 'each judge of the panel' not in plain
    part = text[text.index('each judge of the panel') :]
    assert part.count('&lt;b&gt;') == len(found.assistants)
    assert f'<td>{own[0][0] * found.times:.{matrix.mean_digits(found.times)}f}</td>' in part
    assert 'worth 1.00 [0.90, 1.10] independent judges' in part


def test_held_out_simulators_are_marked_everywhere(held_out):
    text = sections_of(held_out)
    assert text.count(f'<th scope="col">with {HELD_OUT} (held out)</th>') == 2, 'in the matrix and in the differences'
    assert '<th scope="col">with held-out simulators</th>' in text
    assert 'Held out: no assistant trained against it.' in text
    assert f'{HELD_OUT} (held out)' in figures.matrix(held_out.experiment, held_out.matrix).text
    (header,) = (line for line in console_table(held_out).splitlines() if line.startswith('gain over initial with'))
    assert re.split('  +', header) == [
        *('gain over initial with (× 100)', 'its own simulator', 'other kinds', 'held-out simulators', 'people'),
    ]


def test_one_seed_has_the_interval_over_conversations(held_out):
    """Of the arm that has one seed alone; its mean over seeds has none."""
    transfers = dict(held_out.matrix.transfers)
    alone = t_interval([0.013], null=0.0)
    own = Estimate(0.013, 0.002, 0.024, 30, 30, 0.95)
    transfers['sft 7b'] = dataclasses.replace(
        transfers['sft 7b'], seeds=(0,), held_out=alone, checkpoint_held_out=own, other_kinds=None
    )
    changed = dataclasses.replace(held_out, matrix=dataclasses.replace(held_out.matrix, transfers=transfers))
    printed = console_table(changed)
    assert re.search(r'\nsft 7b +\S+ \S+ \S+ +– +\+1\.3 \[\+0\.2, \+2\.4\] ', printed)
    assert '\nIntervals of sft 7b are over conversations: of one checkpoint only.' in printed
    assert '<td>+1.3<small>checkpoints [+0.2, +2.4]</small></td>' in sections_of(changed)
    assert 'Intervals of' not in console_table(held_out).split('gain over initial')[1]


def test_without_a_bound_nor_a_held_out_simulator_all_is_as_measured(results):
    text = sections_of(results)
    assert '<h2>Assistants</h2>' in text
    assert 'eld out' not in text + console_table(results)
    assert f'{results.matrix.mean[0][0]:.2f}<small>[{results.matrix.low[0][0]:.2f}, ' in text


def test_a_scaled_estimate_keeps_its_p_value_and_its_size():
    one = t_interval([0.1, 0.3], null=0.0)
    many = matrix.scaled(one, 100)
    assert many.values == pytest.approx((10.0, 30.0))
    assert (many.mean, many.low, many.high) == pytest.approx((20.0, 100 * one.low, 100 * one.high))
    assert (many.p_value, many.df, many.level) == (one.p_value, one.df, one.level)
    assert matrix.scaled(Estimate(0.5, None, None, 3, 1, 0.95), 100) == Estimate(50.0, None, None, 3, 1, 0.95)
    assert matrix.scaled(None, 100) is None
