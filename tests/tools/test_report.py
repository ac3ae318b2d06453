"""A finished run's report is made again from its files alone; several runs have one page."""

import json
import re

import pytest

from simrl.evaluation.report import drawing, utility, verdicts
from simrl.evaluation.report.report import write_report
from simrl.evaluation.report.several import names_of
from simrl.evaluation.results.files import add_judges, read, write
from simrl.evaluation.seeds import SeedEstimate
from simrl.evaluation.verdicts import WIN_RATE
from tests.evaluation.report.fake_judges import judged_like
from tests.evaluation.report.fake_run import SETTINGS, draw_few, fake_results, write_training
from tools import report


def finished(folder, settings=SETTINGS, **options):
    folder.mkdir(parents=True)
    results = fake_results(**options)
    (folder / 'config.json').write_text(json.dumps(settings))
    write(results, folder)
    return results


def test_the_report_of_a_run_is_made_again(tmp_path, capsys, monkeypatch):
    run = tmp_path / 'run'
    results = finished(run, seeds=1, people=4)
    kept = write_training(run, results.experiment, 20)
    draw_few(monkeypatch)
    write_report(results, run, tmp_path / 'wanted', kept)
    figures = run / 'figures'
    figures.mkdir()
    for name in ('earlier', 'of_the_user'):
        (figures / f'{name}.csv').touch()
    (figures / 'earlier.png').write_bytes((tmp_path / 'wanted' / 'figures' / 'training_reward.png').read_bytes())
    (figures / 'of_the_user.png').write_bytes(b'\x89PNG')
    report.main([str(run)])
    assert capsys.readouterr().out == f'report: {run / "report.html"}\n'
    for file in (tmp_path / 'wanted').rglob('*.*'):
        assert (run / file.relative_to(tmp_path / 'wanted')).read_bytes() == file.read_bytes()
    others = {path.name for path in figures.iterdir()} - {path.name for path in (tmp_path / 'wanted/figures').iterdir()}
    assert others == {'of_the_user.png', 'of_the_user.csv'}, 'a figure that is no longer drawn goes'


def test_several_runs_have_one_page(tmp_path, capsys, monkeypatch):
    other = 'b #"<i>'
    runs = [tmp_path / name / 'run' for name in ('a', other)]
    first = finished(runs[0], seeds=1, people=4)
    finished(runs[1], {**SETTINGS, 'rl': {'ppo': {'clip': 0.3}}}, seeds=2, people=4)
    (runs[1] / 'report.html').write_text('of the run')
    with pytest.raises(SystemExit):
        report.main([*map(str, runs)])
    assert '--output: expected a folder for the page of several runs' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='error: --output: expected a folder apart from the runs'):
        report.main([*map(str, runs), f'--output={runs[0]}'])
    monkeypatch.setattr(utility, 'AGAINST', utility.AGAINST[:1])
    add_judges(tmp_path, judged_like(first.experiment), runs[0])
    report.main([*map(str, runs), f'--output={tmp_path / "page"}'])
    text = (tmp_path / 'page' / 'report.html').read_text()
    titles = ['Runs', 'Settings that differ', 'Utility', verdicts.TITLE, 'a/run', 'b #&quot;&lt;i&gt;/run']
    assert re.findall('<h2>(.*?)</h2>', text) == titles
    assert '<i>' not in text
    assert {*re.findall(' id="(.*?)-.*?"', text)} == {'win_rates', 'utility_by_size', 'run'}
    assert '<th scope="row">rl.ppo.clip</th><td class="words">0.2</td><td class="words">0.3</td>' in text
    assert '2 fields of config.json' in text, 'the other is absent in one'
    assert re.findall('<a href="(.*?)"', text) == ['../b%20%23%22%3Ci%3E/run/report.html'], 'where there is one'
    win = first.measures['people'].assistants['persona/seed-0'].win_rate
    assert f'<small>a/run</small></th><td>prompted</td><td>135M</td><td>1</td><td>{win.mean:.2f}<small>' in text
    said = f'persona/seed-0 over initial<small>a/run</small></th><td>{WIN_RATE}</td><td>0.53<small>[0.46, 0.60]</small>'
    assert f'{said}</td><td class="words">a panel of 2 judges</td><td>40 openings</td><td>0.51 to 0.56</td>' in text
    other_run = read(runs[1]).measures['people'].arms['persona']
    pooled, alone = other_run.win_rate_intervals.pooled, other_run.win_rate
    both = ''.join(f'<td>{alone.mean:.2f}<small>[{x.low:.2f}, {x.high:.2f}]</small></td>' for x in (alone, pooled))
    assert both.replace('-', '−') in text, 'of few seeds also with the spread of all arms'
    figures = {path.stem for path in (tmp_path / 'page' / 'figures').iterdir()}
    of_run = ('training_reward', 'ends', 'matrix')
    assert figures == {
        *('win_rates', 'utility_by_size'),
        *(f'{name}_{run}_run' for name in of_run for run in ('a', other)),
    }
    sizes = (tmp_path / 'page' / 'figures' / 'utility_by_size.csv').read_text().splitlines()
    assert len(sizes) == 1 + 2 * 3
    assert sizes[1].startswith('role_play (a/run),135000000.0,')


def test_what_is_no_finished_run_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r'error: .*experiment.json: expected the results of a finished run'):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=f'error: expected different run directories, found {tmp_path} twice'):
        report.main([str(tmp_path), str(tmp_path / 'x' / '..'), f'--output={tmp_path}'])


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [tmp_path / name for name in ('a/1/run', 'a/2/run', 'b/other')]
    assert list(names_of(folders)) == ['1/run', '2/run', 'b/other']
    assert list(names_of(folders[:1])) == ['run']


def test_utility_is_drawn_against_a_number_that_differs_by_more_than_rounding():
    utility_of = SeedEstimate(0.5, 0.4, 0.6, (0.4, 0.6), None, 0.95)

    def differ(*numbers):
        return utility.differ([utility.Point('arm', x, utility_of, drawing.look_at(0)) for x in numbers])

    assert not differ(-0.000625, -0.000625 * (1 + 1e-7))
    assert differ(0.1, 0.1001)
    assert not differ(0.1)


@pytest.mark.parametrize(('arms', 'said'), [(3, ''), (4, 'Rank correlation −0.80. ')])
def test_a_few_arms_have_no_rank_correlation(arms, said):
    utilities = [SeedEstimate(mean, None, None, (mean,), None, 0.95) for mean in (0.9, 0.7, 0.5, 0.6)[:arms]]
    points = [utility.Point('arm', float(x), found, drawing.look_at(0)) for x, found in enumerate(utilities)]
    assert utility._order(points) == said


def test_points_that_would_hide_one_another_are_drawn_side_by_side():
    assert utility.beside([1.0, 5.0, 3.0], log=False) == [1.0, 5.0, 3.0]
    first, second, other = utility.beside([10.0, 10.0, 1000.0], log=True)
    assert first < 10 < second < 15
    assert first * second == pytest.approx(100)
    assert other == pytest.approx(1000)
    first, other, second = utility.beside([7.0, 5.0, 7.001], log=False)
    assert (second - first, other) == (pytest.approx(0.025 * 2.001), 5.0)
