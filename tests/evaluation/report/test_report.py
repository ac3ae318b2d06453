"""The report shows every number of the results, loads nothing, and fits a phone."""

import dataclasses
import html.parser
import json
import re
import shutil
import struct

import pytest

from simrl.evaluation.report import sections
from simrl.evaluation.report.figures import FONT_SIZE
from simrl.evaluation.report.report import REPORT_FILE, console_table, figure_pngs, write_report
from simrl.evaluation.results import FidelityResult, SimulatorFidelity, TrainingResult, ValidationCurve
from tests.evaluation.report.fake_run import HOSTILE, SETTINGS, fake_results

SECTIONS = (
    'Satisfaction of new people',
    'Training',
    'Every assistant with every user',
    'Gains with other simulators',
    'Simulators beside people',
    'Satisfaction of new people: the same example with every assistant',
    'Settings',
    'Timings',
)


@pytest.fixture(scope='module')
def results():
    return fake_results(seeds=3)


@pytest.fixture(scope='module')
def run(results, tmp_path_factory):
    """A run directory with a config and its report."""
    workdir = tmp_path_factory.mktemp('run')
    (workdir / 'config.json').write_text(json.dumps(SETTINGS))
    write_report(results, workdir)
    return workdir


@pytest.fixture(scope='module')
def many():
    """Many arms and two measures."""
    return fake_results(seeds=2, people=60, more_arms=8, measures=2)


@pytest.fixture(scope='module')
def crowded(many, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('crowded')
    write_report(many, workdir)
    return workdir


@pytest.fixture(scope='module')
def pictures(results):
    return figure_pngs(results)


class Page(html.parser.HTMLParser):
    """What a browser would load or run, and whether every element is closed where it should be."""

    VOID = frozenset({'meta', 'link', 'br', 'img', 'path', 'use', 'rect', 'image'})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes.extend(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_one_file_that_loads_nothing_and_runs_nothing(run):
    text = (run / REPORT_FILE).read_text()
    page = Page(text)
    assert not {'script', 'link', 'img', 'iframe', 'image'} & set(page.elements)
    links = [value for name, value in page.attributes if name in ('src', 'href', 'xlink:href')]
    assert links
    assert all(link.startswith('#') for link in links), 'parts of the page itself'
    ids = [value for name, value in page.attributes if name == 'id']
    assert len(ids) == len(set(ids)), 'figures do not take each other’s shapes'
    assert not re.search(r'@import|url\((?!#)', text)
    assert page.elements.count('svg') == sum(name == 'aria-label' for name, _ in page.attributes) == 7
    assert re.findall('<h2>(.*?)</h2>', text) == list(SECTIONS)


def test_text_of_models_is_escaped(run):
    text = (run / REPORT_FILE).read_text()
    assert HOSTILE not in text
    bubbles = text.count('class="bubble')
    assert bubbles > 0
    assert text.count('" dir="auto"><span class="who" dir="ltr">') == bubbles, 'right to left too'
    assert '&lt;script&gt;alert(&quot;&amp; no escape&quot;)&lt;/script&gt; $x_1$' in text


def test_equal_results_give_equal_bytes(run, results, pictures, tmp_path):
    shutil.copy(run / 'config.json', tmp_path)
    assert write_report(results, tmp_path).read_bytes() == (run / REPORT_FILE).read_bytes()
    assert figure_pngs(results) == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'report.html'], 'no draft left'


def test_pictures_are_those_of_the_report(pictures):
    assert list(pictures) == [
        *('win_rates_people_0', 'win_rates_people_1'),
        *('training_0', 'training_1', 'training_2', 'training_3', 'matrix'),
    ]
    for picture in pictures.values():
        assert picture.startswith(b'\x89PNG')
        width, height = struct.unpack('>II', picture[16:24])
        assert 300 < width < 3000
        assert 300 < height < 3000


def test_every_number_of_the_table_is_that_of_the_results(run, results):
    text = (run / REPORT_FILE).read_text()
    for name, arm in results.measures['people'].arms.items():
        kind = results.experiment.arms[name].kind
        row = re.search(rf'</span>{name}<small>{kind}</small></th>(.*?)</tr>', text, re.DOTALL).group(1)
        win = arm.win_rate
        assert f'{win.mean:.2f}<small>[{win.low:.2f}, {win.high:.2f}]</small>' in row
        assert f'>{arm.score.mean:.2f}<' in row
    matrix = results.matrix
    assert text.count(f'n={matrix.conversations[0][0]:,}') == len(matrix.users) * len(matrix.assistants)
    assert '<th scope="row">rl.ppo.clip</th><td class="words">0.2</td>' in text


def test_many_pairs_of_arms_are_folded_and_every_measure_has_its_words(many, crowded):
    text = (crowded / REPORT_FILE).read_text()
    Page(text)
    assert text.count('<summary>All 66 pairs of arms</summary>') == 2
    assert 'Replies to held-out openings</h2>' in text
    assert 'Mean reward-model score is' in text
    assert '95% t-intervals are over training seeds' in text
    assert 'resamples openings: it is of these checkpoints only' in text
    people, replies = text.split('Replies to held-out openings</h2>')
    assert 'strict win rate' in people
    assert 'strict win rate' not in replies.partition('<h2>')[0], 'the higher score wins: there is one win rate'


def test_an_undefined_gap_says_why(results, tmp_path):
    people = results.measures['people']
    reason = "the oracle's gain +0.010 [-0.004, +0.024] over examples is not above 0"
    arms = {
        name: dataclasses.replace(
            arm,
            gap_recovered=dataclasses.replace(arm.gap_recovered, mean=None, low=None, high=None, reason=reason),
        )
        for name, arm in people.arms.items()
    }
    changed = dataclasses.replace(results, measures={'people': dataclasses.replace(people, arms=arms)})
    text = write_report(changed, tmp_path).read_text()
    assert '<td>undefined</td>' in text
    assert 'It is undefined here: the oracle&#x27;s gain +0.010 [-0.004, +0.024] over examples is not above 0.' in text


def test_no_matrix_no_oracle_and_no_likelihood_leave_nothing_behind(results, tmp_path):
    people = results.measures['people']
    arms = {name: dataclasses.replace(arm, gap_recovered=None) for name, arm in people.arms.items()}
    changed = dataclasses.replace(
        results,
        measures={'people': dataclasses.replace(people, arms=arms)},
        matrix=None,
        fidelity=FidelityResult({}, {'persona': SimulatorFidelity(None, None, {})}),
    )
    text = write_report(changed, tmp_path).read_text()
    Page(text)
    assert re.findall('<h2>(.*?)</h2>', text) == [SECTIONS[0], SECTIONS[1], *SECTIONS[4:]]
    assert 'ap recovered' not in text
    assert 'matrix' not in figure_pngs(changed)
    assert 'other kinds' not in console_table(changed)


def test_the_terminal_gets_at_most_120_columns(results, many):
    text, longer = console_table(results), console_table(many)
    assert re.search(r'sft 7b - role_play +(yes|no) ', text)
    assert '42 more in report.html' in longer
    for line in (*text.splitlines(), *longer.splitlines()):
        assert len(line) <= 120, line


@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no chromium on this machine')
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with playwright.sync_playwright() as starter:
        yield starter.chromium.launch(executable_path=chromium, args=['--no-sandbox'])


@pytest.mark.parametrize('width', [390, 1280])
def test_nothing_is_wider_than_the_window(width, run, crowded, browser):
    """In a browser: the page does not scroll sideways, wide things scroll within their own box."""
    page = browser.new_page(viewport={'width': width, 'height': 800})
    for workdir in (run, crowded):
        page.goto((workdir / REPORT_FILE).as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
        assert page.evaluate('document.documentElement.scrollWidth') == width
        boxes = page.evaluate(
            "Array.from(document.querySelectorAll('.box, .talks')).map(x => [x.scrollWidth, x.clientWidth])"
        )
        assert width > 390 or any(inside > shown for inside, shown in boxes), 'a phone scrolls tables in their boxes'
        scales = page.evaluate(
            "Array.from(document.querySelectorAll('.panels svg'))"
            '.map(x => x.getBoundingClientRect().width / x.viewBox.baseVal.width)'
        )
        assert min(scales) * FONT_SIZE >= 8.5, 'letters of a figure, in pixels'


def test_validation_conversations_without_a_reward_are_counted(results):
    def about(**changes):
        validation = ValidationCurve((0, 5, 10), (0.1, 0.2, 0.3), chosen=10, margin=1.0, **changes)
        curves = dict(results.training.assistants)
        curves['persona/seed-1'] = dataclasses.replace(curves['persona/seed-1'], validation=validation)
        return sections._about_training(dataclasses.replace(results, training=TrainingResult(curves)))

    said = ' Validation conversations without a reward, left out: persona/seed-1 3 of 24.'
    assert about(judged=(8, 6, 7), examples=8).endswith(said)
    assert about(judged=(8, 8, 8), examples=8) == about(), 'of an earlier version nothing is known'
