"""The report says what the numbers support, shows what is there, names what is wrong, and fits a phone."""

import copy
import html.parser
import json
import re
import shutil
import struct

import pytest

from simrl.evaluation.report.figures import FONT_SIZE
from simrl.evaluation.report.report import REPORT_FILE, console_table, figure_pngs, write_report
from simrl.evaluation.report.summary import label
from simrl.evaluation.results import ResultError
from tests.evaluation.report.fake_run import HOSTILE, fake_results, write

SECTIONS = (
    'The assistants on people',
    'Win rates',
    'Training',
    'Every assistant with every user',
    'What is claimed',
    'Who else sees the gain',
    'How true the simulators are',
    'What the assistant does first',
    'The same person with every assistant',
    'Settings',
    'Where the time went',
)


@pytest.fixture(scope='module')
def files():
    return fake_results(seeds=3)


@pytest.fixture(scope='module')
def run(files, tmp_path_factory):
    """A run directory with every result, and its report."""
    workdir = tmp_path_factory.mktemp('run')
    write(workdir, files)
    write_report(workdir)
    return workdir


@pytest.fixture(scope='module')
def crowded(tmp_path_factory):
    """The same of many arms."""
    workdir = tmp_path_factory.mktemp('crowded')
    write(workdir, fake_results(seeds=2, people=60, sizes=('small', '', 'large')))
    write_report(workdir)
    return workdir


@pytest.fixture(scope='module')
def pictures(run):
    return figure_pngs(run)


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
    assert page.elements.count('svg') == sum(name == 'aria-label' for name, _ in page.attributes) == 3
    assert re.findall('<h2>(.*?)</h2>', text) == list(SECTIONS)


def test_what_models_say_is_text(run):
    text = (run / REPORT_FILE).read_text()
    assert HOSTILE not in text
    assert '&lt;script&gt;alert(&quot;&amp; no escape&quot;)&lt;/script&gt; $x_1$' in text


def test_equal_results_give_equal_bytes(run, files, pictures, tmp_path):
    write(tmp_path, files)
    assert write_report(tmp_path).read_bytes() == (run / REPORT_FILE).read_bytes()
    assert figure_pngs(tmp_path) == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'report.html', 'results'], (
        'no draft left'
    )


def test_pictures_are_those_of_the_report(pictures):
    assert list(pictures) == ['win_rates', 'training', 'matrix']
    for picture in pictures.values():
        assert picture.startswith(b'\x89PNG')
        width, height = struct.unpack('>II', picture[16:24])
        assert 300 < width < 3000
        assert 300 < height < 3000


def test_every_number_of_the_table_is_that_of_the_results(run, files):
    text = (run / REPORT_FILE).read_text()
    for arm, found in files['results/claims.json']['arms'].items():
        row = re.search(rf'</span>{label(arm)}</th>(.*?)</tr>', text, re.DOTALL).group(1)
        win = found['win_rate']
        assert f'{win["mean"]:.2f}<small>[{win["low"]:.2f}, {win["high"]:.2f}]</small>' in row
        assert f'>{found["satisfaction"]["mean"]:.2f}<' in row


@pytest.mark.parametrize(
    'missing', [('people',), ('claims', 'matrix', 'training'), ('fidelity', 'conversations', 'timings')]
)
def test_a_missing_result_is_said_to_be_missing(missing, files, tmp_path):
    gone = [f'results/{name}.json' for name in missing]
    write(tmp_path, {name: content for name, content in files.items() if name not in gone})
    text = write_report(tmp_path).read_text()
    Page(text)
    for name in gone:
        assert f'Not there yet: {name}.' in text
    assert re.findall('<h2>(.*?)</h2>', text) == list(SECTIONS)
    assert console_table(tmp_path)


def test_a_run_that_has_only_begun(tmp_path):
    text = write_report(tmp_path).read_text()
    assert text.count('Not there yet') == len(SECTIONS)
    assert 'Nothing came out so far' in text
    assert figure_pngs(tmp_path) == {}
    assert 'Nothing came out so far' in console_table(tmp_path)


def change(content, path, value):
    """A copy with one key of it changed, or taken out where `value` is `...`."""
    content = copy.deepcopy(content)
    *parents, last = path
    inside = content
    for key in parents:
        inside = inside[key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return content


@pytest.mark.parametrize(
    ('name', 'path', 'value', 'message'),
    [
        (
            'people',
            ('assistants', 'initial', 'satisfaction', 'mean'),
            '0.4',
            r'initial\.satisfaction\.mean: expected flo',
        ),
        ('people', ('world', 'people'), ..., r'people\.json\.world\.people: missing'),
        ('people', ('assistants', 'oracle'), 1, r'people\.json\.assistants\.oracle: expected the fields of Assistant'),
        ('claims', ('arms', 'persona', 'gain', 'bound'), 1.0, r'arms\.persona\.gain\.bound: unknown field'),
        ('matrix', ('low',), [[0.1]], r'matrix\.json\.low: expected \[users, assistants\] \(4, 13\), found \(1, 1\)'),
        ('fidelity', ('people', 'left'), 'few', r'fidelity\.json\.people\.left: expected float or None, found'),
        ('training', ('oracle/seed-0', 'reward'), [0.1], r'oracle/seed-0\.reward: expected 50 values, found 1'),
        (
            'conversations',
            (0, 'talks', 'initial', 'messages', 0, 'role'),
            'narrator',
            r'messages\[0\]\.role: expected one',
        ),
        ('timings', ('stages', 'world'), None, r'timings\.json\.stages\.world: expected float'),
    ],
)
def test_a_malformed_result_is_an_error_that_names_file_and_key(name, path, value, message, files, tmp_path):
    file = f'results/{name}.json'
    write(tmp_path, {**files, file: change(files[file], path, value)})
    with pytest.raises(ResultError, match=message) as raised:
        write_report(tmp_path)
    assert str(tmp_path / file) in str(raised.value)


@pytest.mark.parametrize(
    ('content', 'message'), [('{', 'expected JSON'), ('[NaN]', 'NaN is no number of JSON'), ('null', 'found null')]
)
def test_a_file_that_is_not_json(content, message, tmp_path):
    write(tmp_path, {})
    (tmp_path / 'results/people.json').write_text(content)
    with pytest.raises(ResultError, match=message):
        console_table(tmp_path)


def test_an_arm_that_nobody_met_and_a_name_that_is_none(files, tmp_path):
    people = files['results/people.json']
    without = {name: found for name, found in people['assistants'].items() if not name.startswith('oracle')}
    write(tmp_path, {**files, 'results/people.json': {**people, 'assistants': without}})
    with pytest.raises(ResultError, match=r'claims\.json\.arms\.oracle: expected an assistant oracle/seed-K'):
        write_report(tmp_path)
    wrong = {**without, 'best': without['persona/seed-0']}
    write(tmp_path, {**files, 'results/people.json': {**people, 'assistants': wrong}})
    with pytest.raises(ResultError, match=r"people\.json\.assistants: expected .* found 'best'"):
        write_report(tmp_path)


def test_an_undefined_share_says_why(files, tmp_path):
    claims = copy.deepcopy(files['results/claims.json'])
    reason = "the oracle's gain +0.010 [-0.004, +0.024] is not above 0"
    for arm in claims['arms'].values():
        arm['recovered'] = {**arm['recovered'], 'mean': None, 'low': None, 'high': None, 'reason': reason}
    write(tmp_path, {**files, 'results/claims.json': claims})
    text = write_report(tmp_path).read_text()
    assert '<td>undefined</td>' in text
    assert 'Recovered shares are undefined: the oracle&#x27;s gain +0.010 [-0.004, +0.024] is not above 0.' in text


def test_only_the_initial_assistant_met_people(files, tmp_path):
    people = files['results/people.json']
    alone = {**people, 'assistants': {'initial': people['assistants']['initial']}}
    claims = {'seeds': [], 'arms': {}, 'differences': {}, 'transfers': {}}
    write(tmp_path, {'results/people.json': alone, 'results/claims.json': claims})
    text = write_report(tmp_path).read_text()
    assert 'initial</th>' in text
    assert 'Nothing came out so far' in text
    assert 'initial' in console_table(tmp_path)


def test_the_terminal_gets_at_most_120_columns(run, crowded):
    text, longer = console_table(run), console_table(crowded)
    assert 'fine_tuned - role_play' in text
    assert 'role_play-large - role_play' in longer
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
            "Array.from(document.querySelectorAll('figure svg'))"
            '.map(x => x.getBoundingClientRect().width / x.viewBox.baseVal.width)'
        )
        assert min(scales) * FONT_SIZE >= 8.5, 'letters of a figure, in pixels'


def test_the_settings_and_the_matrix_are_whole(run, files):
    text = (run / REPORT_FILE).read_text()
    assert '<th scope="row">rl.ppo.clip</th><td class="words">0.2</td>' in text
    matrix = files['results/matrix.json']
    assert text.count(f'n={matrix["conversations"][0][0]:,}') == len(matrix['users']) * len(matrix['assistants'])
    assert json.loads((run / 'config.json').read_text()) == files['config.json']
