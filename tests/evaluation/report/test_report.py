"""The report shows every number of the results, loads nothing, and fits a phone."""

import csv
import dataclasses
import html.parser
import json
import re
import shutil
import struct

import numpy as np
import pytest
import scipy.stats

from simrl.evaluation.report import drawing, gallery, lengths, sections, utility
from simrl.evaluation.report.browse import BROWSE_FILE, REPORT_FILE, browse_page
from simrl.evaluation.report.drawing import CAPTION_SIZE, look_at, looks_of
from simrl.evaluation.report.report import _columns, console_table, write_report
from simrl.evaluation.results.conversations import ConversationsResult
from simrl.evaluation.results.files import read_added
from simrl.evaluation.results.simulators import FidelityResult, SimulatorFidelity
from simrl.evaluation.results.training import TrainingResult, ValidationCurve
from simrl.evaluation.statistics import Estimate
from tests.evaluation.report.fake_judges import HOSTILE, add_all
from tests.evaluation.report.fake_run import SETTINGS, fake_results, page_text, training_rows, write_training

SECTIONS = (
    'Satisfaction of new people',
    'Preferred by judges of two responses',
    'On the tasks of WildBench',
    'Utility by what is known of a simulator',
    'Training',
    'Lengths and endings',
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
def written(results, tmp_path_factory):
    """A run directory with a config, conversations of training and its report; the PNG files."""
    workdir = tmp_path_factory.mktemp('run')
    (workdir / 'config.json').write_text(json.dumps(SETTINGS))
    (workdir / 'results').mkdir()
    add_all(results.experiment, workdir)
    path, pictures = write_report(results, workdir, kept=write_training(workdir, results.experiment, 900))
    assert path == workdir / REPORT_FILE
    return workdir, pictures


@pytest.fixture(scope='module')
def run(written):
    return written[0]


@pytest.fixture(scope='module')
def many():
    """Many arms and two measures."""
    return fake_results(seeds=2, people=60, more_arms=8, measures=2)


@pytest.fixture(scope='module')
def crowded(many, tmp_path_factory):
    """Its page; of the curves, which take time and are alike, one of each section."""
    workdir, looks = tmp_path_factory.mktemp('crowded'), looks_of(many.experiment)
    drawings = gallery.drawings_of(many, looks)
    few = {name: found[:1] if name in ('training', 'lengths') else found for name, found in drawings.items()}
    text = sections.report_page(many, {}, looks, few)
    (workdir / REPORT_FILE).write_text(text)
    return workdir


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
    assert not {'script', 'img', 'iframe', 'image'} & set(page.elements)
    links = [value for name, value in page.attributes if name in ('src', 'href', 'xlink:href')]
    others = {link for link in links if not link.startswith('#')}
    assert {link for link in others if '../' not in link} == {BROWSE_FILE, 'data:,'}, 'else parts of the page'
    assert [link.endswith('/judged/by%20two') for link in others if '../' in link] == [True]
    ids = [value for name, value in page.attributes if name == 'id']
    assert len(ids) == len(set(ids)), 'figures do not take each other’s shapes'
    assert not re.search(r'@import|url\((?!#)', text)
    assert page.elements.count('svg') == sum(name == 'aria-label' for name, _ in page.attributes)
    assert text.count('class="wide"') == text.count('<div class="box lone">') == 3, 'ends, matrix, judges'
    assert re.findall('<h2>(.*?)</h2>', text) == list(SECTIONS)


def test_text_of_models_is_escaped(run):
    text = (run / REPORT_FILE).read_text()
    assert HOSTILE not in text
    bubbles = text.count('class="bubble')
    assert bubbles > 0
    assert text.count('" dir="auto"><span class="who" dir="ltr">') == bubbles, 'right to left too'
    assert '&lt;script&gt;alert(&quot;&amp; no escape&quot;)&lt;/script&gt; $x_1$' in text


def test_equal_results_give_equal_bytes(written, results):
    run, pictures = written
    page = (run / REPORT_FILE).read_text()
    looks = looks_of(results.experiment)
    again = gallery.drawings_of(results, looks)
    for one in (again['measure/people'][0], again['training'][0]):
        assert drawing.png(one) == pictures[one.name]
        figure = drawing.svg(one, one.name, drawing.NARROW)
        assert figure[figure.index('viewBox') :] in page
    kept = {name: run / 'rl' / name / 'conversations' / 'rl.jsonl' for name in results.experiment.runs}
    assert browse_page(results, kept, looks) == (run / BROWSE_FILE).read_text()
    names = ['config.json', BROWSE_FILE, 'figures', REPORT_FILE, 'results', 'rl']
    assert sorted(path.name for path in run.iterdir()) == names, 'no draft left'


def test_figures_are_files_too(written, results):
    run, pictures = written
    assert list(pictures) == [
        *('win_rate_people', 'score_people', 'ends_people'),
        *(f'utility_by_{name}' for name in ('size', 'likelihood', 'cosine', 'best_of_n')),
        *('training_reward', 'training_end_signal', 'training_kl', 'training_zero_variance'),
        *('training_message_tokens', 'training_truncated', 'training_end_turns', 'reward_by_length', 'matrix'),
        *(f'judges_{name}' for name in ('win_rate', 'each', 'seeds')),
        *('wildbench_checklist', 'wildbench_checklist_groups', 'wildbench_win_rate', 'wildbench_wb_score'),
        *('wildbench_wb_reward', 'wildbench_wb_reward_groups'),
    ]
    files = {path.name for path in (run / 'figures').iterdir()}
    assert files == {f'{name}.{kind}' for name in pictures for kind in ('png', 'csv')}
    for name, picture in pictures.items():
        assert (run / 'figures' / f'{name}.png').read_bytes() == picture
        assert picture.startswith(b'\x89PNG')
        width, height = struct.unpack('>II', picture[16:24])
        assert 300 < width < 3000
        assert 300 < height < 3000

    def rows(name):
        with (run / 'figures' / f'{name}.csv').open(newline='') as file:
            return list(csv.DictReader(file))

    arms = results.measures['people'].arms
    assert {row['arm']: (float(row['win_rate']), float(row['low'])) for row in rows('win_rate_people')} == {
        name: (arm.win_rate.mean, arm.win_rate.low) for name, arm in arms.items()
    }
    assert {row['arm']: float(row['x']) for row in rows('utility_by_size')} == {
        name: arm.parameters for name, arm in results.experiment.arms.items() if arm.parameters
    }
    curve = results.training.assistants['persona/seed-1'].message_tokens
    found = [row for row in rows('training_message_tokens') if row['assistant'] == 'persona/seed-1']
    assert [float(row['value']) for row in found] == list(curve)


def test_every_figure_states_its_sample_and_failures(run, results):
    drawings = gallery.drawings_of(results, looks_of(results.experiment), read_added(run))
    for one in (one for found in drawings.values() for one in found):
        (label,) = {text.get_text() for text in (one.draw(4.8)._supxlabel,)}
        said = label.replace('\n', ' ')
        assert one.text.endswith(said)
        assert 'n = ' in said
        assert 'interval' in said, 'what they are over, or that there are none'
        assert re.search('[Ww]ithout a', said)


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


def test_lengths_are_those_at_both_ends_of_training(results):
    looks = looks_of(results.experiment)
    header, rows = lengths.table(results, looks)
    (row,) = (dict(zip(header, row, strict=True)) for row in rows if row[0].text == 'persona')
    curves = [results.training.assistants[f'persona/seed-{seed}'] for seed in range(3)]
    tokens, rewards = (np.array([getattr(curve, field) for curve in curves]) for field in ('message_tokens', 'reward'))
    assert row['tokens a message, in training'] == f'{tokens[:, :10].mean():.1f} → {tokens[:, -10:].mean():.1f}'
    assert row['reward'] == f'{rewards[:, :10].mean():.2f} → {rewards[:, -10:].mean():.2f}'
    order = np.mean([scipy.stats.spearmanr(*of_seed).statistic for of_seed in zip(tokens, rewards, strict=True)])
    assert row['ρ of steps'] == f'{order:.2f}'
    found = results.measures['people'].assistants
    evaluated = np.mean([found[f'persona/seed-{seed}'].message_tokens for seed in range(3)])
    assert row['tokens a message, in the evaluation'] == f'{evaluated:.1f}'
    earlier = dataclasses.replace(
        results,
        training=TrainingResult(
            {
                name: dataclasses.replace(curve, message_tokens=None, truncated=None, ends={})
                for name, curve in results.training.assistants.items()
            }
        ),
        measures={
            'people': dataclasses.replace(
                results.measures['people'],
                assistants={name: dataclasses.replace(x, message_tokens=None) for name, x in found.items()},
            )
        },
    )
    assert lengths.table(earlier, looks)[1] == [], 'of an earlier version nothing is known'
    assert lengths.drawings(earlier, looks) == []


def test_of_many_shown_examples_the_first_are_on_the_page(results):
    (example, *_) = results.conversations.measures['people']
    many = tuple(dataclasses.replace(example, example=f'person {k}') for k in range(30))
    text = page_text(dataclasses.replace(results, conversations=ConversationsResult({'people': many})))
    assert 'Here are the first 12 of 30.' in text
    assert 'person 11:' in text
    assert 'person 12:' not in text


def test_a_forecast_is_beside_the_utility(results):
    text = page_text(results).split('Utility by what is known of a simulator')[1].partition('</section>')[0]
    assert re.search(r'persona</th><td>0\.\d\d<small>.*?<td>0.20<small>\[0.10, 0.30\]</small></td><td>\+0.010', text)
    assert '<td class="words">its gradient is not told from noise</td>' in text
    said = 'cosine with win rate 0.80 [0.20, 1.00] over 3 arms, permutation p 0.100'
    assert 'Forecasts are from 64 examples, 8 samples of each, best of 8. People themselves stand for people. ' in text
    assert f'Rank correlations by people: {said}' in text
    assert 'eyond people' not in text, 'nothing is said of a column that is not there'


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


def test_an_undefined_gap_says_why(results):
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
    text = page_text(changed)
    assert '<td>undefined</td>' in text
    assert 'It is undefined here: the oracle&#x27;s gain +0.010 [-0.004, +0.024] over examples is not above 0.' in text


def test_no_matrix_no_oracle_no_likelihood_and_no_sizes_leave_nothing_behind(results):
    people = results.measures['people']
    arms = {name: dataclasses.replace(arm, gap_recovered=None) for name, arm in people.arms.items()}
    changed = dataclasses.replace(
        results,
        measures={'people': dataclasses.replace(people, arms=arms)},
        matrix=None,
        forecast=None,
        fidelity=FidelityResult({}, {'persona': SimulatorFidelity(None, None, {})}),
        experiment=dataclasses.replace(
            results.experiment,
            arms={name: dataclasses.replace(arm, parameters=None) for name, arm in results.experiment.arms.items()},
        ),
    )
    text = page_text(changed)
    Page(text)
    assert re.findall('<h2>(.*?)</h2>', text) == [SECTIONS[0], *SECTIONS[4:6], *SECTIONS[8:]]
    assert 'ap recovered' not in text
    drawings = gallery.drawings_of(changed, looks_of(changed.experiment))
    assert drawings['matrix'] == drawings['utility'] == []
    assert 'other kinds' not in console_table(changed)


def test_the_terminal_gets_at_most_120_columns(results, many):
    text, longer = console_table(results), console_table(many)
    assert re.search(r'sft 7b - role_play +(yes|no) ', text)
    assert '42 more in report.html' in longer
    for line in (*text.splitlines(), *longer.splitlines()):
        assert len(line) <= 120, line
    rows = [('arm', 'wide', 'score', 'left'), ('a', 'w' * 110, '1', '2')]
    assert _columns(rows)[2:] == ['In report.html too: score, left.']
    assert len(_columns([('arm', 'score'), ('a' * 200, '1')])) == 3


@pytest.fixture(scope='module')
def browser():
    """A browser without a network."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('no chromium on this machine')
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with playwright.sync_playwright() as starter:
        yield starter.chromium.launch(executable_path=chromium, args=['--no-sandbox'])


@pytest.fixture
def opened(browser):
    """Opens a page; in the end none has written to the console or asked for anything."""
    said = []

    def open_page(path, width):
        page = browser.new_context(offline=True, viewport={'width': width, 'height': 800}).new_page()
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('requestfailed', lambda request: said.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert said == []


@pytest.mark.parametrize('width', [390, 1280])
def test_nothing_is_wider_than_the_window(width, run, crowded, opened):
    """In a browser: the page does not scroll sideways, wide things scroll within their own box and say so."""
    for workdir in (run, crowded):
        page = opened(workdir / REPORT_FILE, width)
        page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
        assert page.evaluate('document.documentElement.scrollWidth') == width
        boxes = page.evaluate(
            "Array.from(document.querySelectorAll('.box, .strip')).map(x => "
            "[x.scrollWidth - x.clientWidth, parseFloat(getComputedStyle(x, '::after').height)])"
        )
        assert width > 390 or any(hidden > 0 for hidden, _ in boxes), 'a phone scrolls tables in their boxes'
        assert all((sign > 10) == (hidden > 0) for hidden, sign in boxes)
        scales = page.evaluate(
            "Array.from(document.querySelectorAll('.panels svg'))"
            '.map(x => x.getBoundingClientRect().width / x.viewBox.baseVal.width).filter(x => x)'
        )
        assert min(scales) * CAPTION_SIZE >= 8.5, 'letters of a figure, in pixels'
        rows = page.evaluate(
            "Array.from(document.querySelectorAll('.panels')).map(x => "
            '[x.lastElementChild.getBoundingClientRect().right, x.getBoundingClientRect().right])'
        )
        assert all(abs(last - whole) < 1 for last, whole in rows), 'the last figure of a row ends where the page does'


def test_conversations_are_browsed(run, opened):
    page = opened(run / BROWSE_FILE, 1280)

    def check(said, **filters):
        """Sets filters, and waits for what the page then says that it found."""
        for name, value in filters.items():
            field = page.locator(f'[name={name}]')
            (field.fill if name in ('low', 'high', 'text') else field.select_option)(value)
        page.get_by_text(said, exact=True).wait_for(timeout=20_000)

    check('10,818 of 10,818; here 1 to 50')
    assert page.locator('details.one').count() == 50
    check('900 of 10,818; here 1 to 50', arm='persona', seed='1', source='training')
    rewards = [(np.ravel(row['reward'])[0], row['end_reason']) for row in training_rows(900)]
    number = sum(reward is not None and 0.5 <= reward <= 0.6 and end == 'signal' for reward, end in rewards)
    check(f'{number} of 10,818; here 1 to {number}', low='0.5', high='0.6', end='by the user')
    check('1 of 10,818; here 1 to 1', low='', high='', end='', text='THAI 77 <script>')
    assert page.locator('details.one .score').all_inner_texts() == [f'{rewards[77][0]:.3f}']
    page.locator('details.one summary').click()
    page.locator('details.one .bubble').first.wait_for()
    bubbles = page.locator('details.one .bubble').all_inner_texts()
    assert bubbles[0] == f'user\nsomething thai 77 {HOSTILE}', 'text stays text'
    assert page.locator('details.one script').count() == 0
    check('900 of 10,818; here 1 to 50', text='', sort='score', direction='-1')
    scores = [float(text) for text in page.locator('details.one .score').all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.locator('nav button', has_text='Next').first.click()
    check('900 of 10,818; here 51 to 100')
    check('None of 10,818 passes the filters.', text='no such words')


def test_validation_conversations_without_a_reward_are_counted(results):
    def about(**changes):
        validation = ValidationCurve((0, 5, 10), (0.1, 0.2, 0.3), chosen=10, margin=1.0, **changes)
        curves = dict(results.training.assistants)
        curves['persona/seed-1'] = dataclasses.replace(curves['persona/seed-1'], validation=validation)
        return sections._about_training(dataclasses.replace(results, training=TrainingResult(curves)))

    said = ' Validation conversations without a reward, left out: persona/seed-1 3 of 24.'
    assert about(judged=(8, 6, 7), examples=8).endswith(said)
    assert about(judged=(8, 8, 8), examples=8) == about(), 'of an earlier version nothing is known'


@pytest.mark.parametrize('width', [drawing.NARROW, drawing.WIDE])
@pytest.mark.parametrize(
    ('names', 'columns'),
    [
        (['a', 'b', 'c', 'd'], (2, 4)),
        (['persona_of_a_long_name (runs/quickstart)', 'b (runs/second)', 'c (runs/second)'], (1, 2)),
        (['an arm ' * 30 + '(run)', 'W' * 60], (1, 1)),
    ],
)
def test_a_legend_fits_into_its_figure(width: float, names: list[str], columns: tuple[int, int]) -> None:
    """As wide as it may be, and below the title; names that are longer are in lines."""
    points = [utility.Point(name, i, Estimate(0.5, 0.4, 0.6, 9, 9, 0.95), look_at(0)) for i, name in enumerate(names)]
    with drawing.style():
        figure = utility.scatter(utility.AGAINST[1], points, 'Caption.').draw(width)
        figure.draw_without_rendering()
    (axis,) = figure.axes
    legend = axis.get_legend()
    assert legend is not None
    assert len({text.get_window_extent().x0 for text in legend.get_texts()}) == min(
        columns[width == drawing.WIDE], len(names)
    )
    drawn = legend.get_window_extent()
    assert drawn.x0 >= 0
    assert drawn.x1 <= figure.bbox.x1
    assert drawn.y1 <= figure.bbox.y1
    assert axis.get_window_extent().width > figure.bbox.width / 2
