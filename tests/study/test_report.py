"""A store becomes a report that says what its numbers are of, and shows every vote; and nothing in it runs."""

import json
import re
import shutil

import pytest

from simrl.evaluation.report import report as run_report
from simrl.evaluation.results import files as result_files
from simrl.study.analysis import PRIMARY, analyse, samples_of
from simrl.study.events import STUDY, Excluded, RecruitmentEnded
from simrl.study.looks import NoLookError
from simrl.study.report import figures
from simrl.study.report.settings import StudyReportSettings
from simrl.study.report.write import NoStudyError, read_study, study_result, write_study
from simrl.study.screens import names_of
from simrl.study.store import Entry, Store, StoreError, read_events
from simrl.study.text_files import read_tasks
from simrl.study.votes import votes
from tests.evaluation.report import fake_run
from tests.study.planted import Planted, planted_study, store_planted

REASON = '</script><script>document.title = "gone"</script><img src=x onerror=alert(1)>'
TASKS = read_tasks(None)
OWN = {kind.id: {task.id: task.brief for task in kind.tasks} for kind in TASKS.types}
PAIRS = {('persona-seed-0', 'initial'): 0.62, ('initial', 'truth'): 0.4}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A study of 24 who were planned, one of whom was excluded afterwards, and its report."""
    folder = tmp_path_factory.mktemp('study')
    url = f'sqlite:///{folder}/study.sqlite'
    events = store_planted(url, Planted(people=24, win_rates=PAIRS, named=0.1, tasks=OWN), 7, participants=23)
    name = events[-1].participant
    with Store(url, 'live') as store:
        store.append([Entry(name, events[-1].version + 1, 2e9, (Excluded(True, REASON),))])
    settings = StudyReportSettings(store=url, output=folder / 'report', resamples=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, 'drawings_of', lambda analysis, names: {x: [] for x in ('win_rates', 'types', 'turns')})
        study = read_study(settings, TASKS)
        path, analysis = write_study(study, settings, TASKS)
    return settings, study, path, analysis


def test_the_page_has_the_numbers_and_what_they_are_of(made):
    _, study, path, analysis = made
    text = path.read_text()
    for pair in analysis.pairs:
        estimate = pair.rate.estimate
        assert f'the win rate of {pair.first} is {estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]' in text
    assert (
        '23 of 23 planned participants completed, 2023-11-14 (UTC). It is a look that was planned, at the end.' in text
    )
    assert '1 participant was excluded by an administrator, for reasons below.' in text
    assert 'share a history' in text
    by_task = text[text.index('<summary>By task') : text.index('>By turn<')]
    assert by_task.count('too few participants') > 10
    assert '[' not in by_task
    assert analysis.flow.excluded == {REASON: 1}
    kept = json.loads((path.parent / 'results.json').read_text())
    assert kept['plan_hash'] == 'plan'
    assert kept['samples']['primary'].keys() == {':'.join(pair) for pair in PAIRS}
    assert kept['departures'] == list(study.departed)


def test_a_look_is_stored_once(made):
    settings, study, *_ = made
    again = read_study(settings, TASKS)
    assert (study.look.kind, study.look.number, again.look.kind, again.look.number) == ('planned', 0, 'planned', 1)
    assert [type(stored.event).__name__ for stored in read_events(settings.store) if stored.participant == STUDY] == [
        'Opened',
        'PlanFrozen',
        'Looked',
    ]


def test_a_study_that_ended_early_has_a_valid_report(tmp_path):
    """Of 3 where 4 were planned: the last look is a planned one, and the report gives the reason."""
    url = f'sqlite:///{tmp_path}/study.sqlite'
    store_planted(url, Planted(people=3, tasks=OWN), participants=4)
    settings = StudyReportSettings(store=url)
    with pytest.raises(NoLookError, match='an end of recruitment makes the last look planned'):
        read_study(settings, TASKS)
    with Store(url, 'live') as store:
        store.append([Entry(STUDY, 3, 2e9, (RecruitmentEnded('no money is left'),))])
    for number in (0, 1):
        found = read_study(settings, TASKS)
        assert (found.look.kind, found.look.number, found.look.completed, found.look.shares) == (
            'planned',
            number,
            3,
            (1.0,),
        )
        assert 'Recruitment was ended once 3 participants of 4 had completed: no money is left.' in found.departed


def test_a_look_that_cannot_be_stored_shows_nothing(tmp_path):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    with pytest.raises(StoreError, match=r'study\.sqlite'):
        read_study(StudyReportSettings(store=url), TASKS)
    store_planted(url, Planted(people=0))
    with pytest.raises(NoStudyError, match='expected participants, found none'):
        read_study(StudyReportSettings(store=url), TASKS)
    store_planted(f'sqlite:///{tmp_path}/full.sqlite', Planted(people=2), participants=2)
    with Store(f'sqlite:///{tmp_path}/full.sqlite', 'live'), pytest.raises(StoreError, match=r'full\.sqlite.*Results$'):
        read_study(StudyReportSettings(store=f'sqlite:///{tmp_path}/full.sqlite'), TASKS)


def test_tasks_of_another_study_are_refused(tmp_path):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    store_planted(url, Planted(people=2, mode='rehearsal'))
    with pytest.raises(NoStudyError, match="tasks: expected the tasks of the study, found none of the id '"):
        read_study(StudyReportSettings(store=url), TASKS)


def test_planted_cheaters_are_left_out_by_the_flags_of_the_plan(tmp_path):
    url = f'sqlite:///{tmp_path}/study.sqlite'
    flags = ('attention', 'fast', 'repeated_messages', 'assistant_phrases', 'one_side')
    cheaters = {'inattentive': 0.1, 'fast': 0.1, 'repeats': 0.1, 'ai': 0.1, 'left': 0.1}
    planted = Planted(
        people=90, win_rates={('a', 'b'): 0.7}, icc=0.0, position=-0.2, cheaters=cheaters, tasks=OWN, mode='rehearsal'
    )
    store_planted(url, planted, 1, excluded_flags=list(flags))
    study = read_study(StudyReportSettings(store=url), TASKS)
    honest = {one.id for one in study.participants.values()} - set(planted_study(planted, 1)[1])
    found = votes(study.participants.values(), 'rehearsal', names_of(study.flags))
    result = analyse(study.participants.values(), found, study.plan, mode='rehearsal', resamples=200)
    assert len(honest ^ {vote.participant for vote in samples_of(found, study.plan)[PRIMARY]}) <= 2
    rates = {name: of['a', 'b'].estimate for name, of in result.samples.items()}
    assert rates[PRIMARY].low < 0.7 < rates[PRIMARY].high
    assert rates['with flagged participants'].high < 0.7, 'half of the votes are at random'


def test_the_report_of_a_run_shows_the_study_beside_its_measures(made, tmp_path, monkeypatch):
    _, study, path, analysis = made
    fake_run.draw_few(monkeypatch)
    results = fake_run.fake_results(seeds=1, people=20)
    result_files.write(results, tmp_path)
    found = study_result(study, analysis, path, results.experiment, ())
    result_files.add_study(found, tmp_path)
    assert result_files.read_added(tmp_path).study == found
    result_files.write(results, tmp_path)
    assert result_files.read_added(tmp_path).study == found, 'a run that goes on keeps it'
    persona, truth = found.pairs
    assert (persona.first, persona.second, truth.first, truth.second) == (
        'persona/seed-0',
        'initial',
        'truth/seed-0',
        'initial',
    )
    assert truth.win_rate.mean == pytest.approx(1 - analysis.pairs[1].rate.estimate.mean)
    assert truth.win_rate.low == pytest.approx(1 - analysis.pairs[1].rate.estimate.high)
    text = run_report.write_report(results, tmp_path)[0].read_text()
    section = text[text.index('Preferred in a blind user study') :]
    section = section[: section.index('</section>')]
    rate = results.measures['people'].assistants['truth/seed-0'].win_rate
    assert f'{truth.win_rate.mean:.2f}<small>[{truth.win_rate.low:.2f}, {truth.win_rate.high:.2f}]' in section
    assert f'{rate.mean:.2f}<small>[{rate.low:.2f}, {rate.high:.2f}]' in section
    with pytest.raises(NoStudyError, match=r"truth=ASSISTANT, one of initial, .*, found 'nobody'"):
        study_result(study, analysis, path, results.experiment, ('truth=nobody',))


def test_votes_are_read_in_a_browser(made):
    """At a phone's width: filters find votes, text of participants is text, and the page asks for nothing."""
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no chromium on this machine')
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    _, study, path, _ = made
    given = votes(study.participants.values(), 'live')
    said = []
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_context(offline=True, viewport={'width': 390, 'height': 800}).new_page()
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') == 390
        page.get_by_role('link', name='All votes with their replies and reasons').click()
        assert page.evaluate('document.documentElement.scrollWidth') == 390
        page.select_option('[name=counted]', 'no')
        out = [vote for vote in given if vote.excluded is not None]
        page.locator('#found', has_text=re.compile(f'^{len(out)} of ')).wait_for()
        page.locator('details.one').first.click()
        page.locator('details.one .reason').wait_for()
        inside = page.locator('details.one').first.inner_text()
        assert f'Left out of the analysis: excluded by an administrator: {REASON}' in inside
        assert out[0].left_text in inside
        assert out[0].right_text in inside
        page.select_option('[name=counted]', '')
        page.select_option('[name=preferred]', 'truth')
        page.fill('[name=text]', given[-1].participant)
        wins = [x for x in out if {'left': x.left, 'right': x.right}.get(x.choice) == 'truth']
        expected = f'{len(wins)} of' if wins else 'None of'
        page.locator('#found', has_text=re.compile(f'^{expected}')).wait_for()
        assert page.title() == 'Votes and their reasons'
        browser.close()
    assert said == []
