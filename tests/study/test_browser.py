"""The study in Chromium, at the size of a desktop and of a phone: its script, its keyboard, what axe says of it."""

import asyncio
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from simrl.conversations.records import Message
from simrl.study.settings import TaskSettings
from tests.study.pages import ENTER, Site, settings_of, site

playwright = pytest.importorskip('playwright.sync_api')
axe_playwright = pytest.importorskip('axe_playwright_python.sync_playwright')
CHROMIUM = os.environ.get('SIMRL_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium, or its path in SIMRL_CHROMIUM')
SIZES = {'desktop': (1280, 900), 'phone': (390, 844)}
RULES = {'runOnly': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}
# All that Markdown can be, of two lengths.
REPLIES = (
    '# A way in\n\nPick **one** moment:\n\n1. The *door*.\n2. The kettle, still `warm`.\n\n> She read.\n\n---',
    '### Ideas\n\n- [a link](https://example.org)\n\n```\nfor line in text: print(line * 9, end="a long line")\n```\n'
    '\n\n| Opening | Effect |\n|---|:-:|\n| A lie | Distance |\n\n' + 'And so on, without an end. ' * 30 + 'x' * 200,
)


@pytest.fixture(scope='module')
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


class Models:
    """Assistants that answer at once, or once they are let."""

    def __init__(self) -> None:
        self.go, self.fail = threading.Event(), False
        self.go.set()

    async def __call__(self, model: str, conversation: Sequence[Message]) -> str | Exception:
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return RuntimeError('gone') if self.fail else REPLIES[model > 'p']


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def here(tmp_path: pathlib.Path, models: Models) -> Iterator[Site]:
    task = TaskSettings(exchanges=2, max_exchanges=5, min_words=20)
    with site(settings_of(tmp_path, task=task), models) as found:
        yield found


def open_page(chromium: Any, here: Site, size: str = 'desktop', name: str = 'person', **options: Any) -> Any:
    """A new browser's page, of somebody who followed the link. What its console says is an error."""
    width, height = SIZES[size]
    context = chromium.new_context(viewport={'width': width, 'height': height}, **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.said = said
    page.goto(here.url + ENTER.format(name))
    return page


def press(page: Any, name: str) -> None:
    page.get_by_role('button', name=name, exact=True).click()


def take_part(page: Any, here: Site, look: Callable[[str], None], models: Models) -> None:
    """Takes part from the consent to the end; looks at each step by name, and at what can go wrong there."""
    texts = here.running.texts
    labels = texts.labels
    look('consent')
    press(page, labels.agree)
    look('instructions')
    press(page, labels.start)
    press(page, labels.send_answers)
    look('check_errors')
    for number, question in enumerate(texts.check):
        page.check(f'input[name=answer_{number}][value="{(question.right + 1) % len(question.options)}"]')
    press(page, labels.send_answers)
    look('check_wrong')
    for number, question in enumerate(texts.check):
        page.check(f'input[name=answer_{number}][value="{question.right}"]')
    press(page, labels.send_answers)
    press(page, labels.start_writing)
    look('task_errors')
    page.locator('input[name=task]').nth(2).check()
    for number in range(3):
        page.fill(f'#note_{number}', 'For my sister, who has never seen the sea.')
    press(page, labels.start_writing)
    look('training')
    models.fail = True
    page.fill('#message', 'How could I begin?')
    press(page, labels.send)
    page.get_by_role('button', name=labels.retry).wait_for()
    look('void')
    models.fail = False
    models.go.clear()
    press(page, labels.retry)
    look('waiting')
    models.go.set()
    page.locator('#choice').wait_for()
    look('replies')
    press(page, labels.vote)
    look('vote_errors')
    vote(page, labels.vote)
    look('conversation')
    for _ in range(2):
        page.fill('#message', 'Make the second idea longer, please.')
        press(page, labels.send)
        page.locator('#choice').wait_for()
        vote(page, labels.vote)
    look('enough')
    press(page, labels.conclude)
    page.fill('#text', 'Too short.')
    press(page, labels.submit)
    look('final_errors')
    page.fill('#text', 'The house remembers everyone. ' * 10)
    page.locator('input[name=attention]').nth(2).check()
    page.get_by_role('link', name=labels.withdraw).click()
    look('leave')
    page.get_by_role('link', name=labels.keep_on).click()
    press(page, labels.submit)  # what was written is still there
    look('over')


def vote(page: Any, label: str) -> None:
    page.check('input[name=choice][value=b]')
    page.fill('#reason', 'B asks me what I want.')
    press(page, label)


def check(page: Any, name: str, shots: pathlib.Path | None, rules: dict[str, Any]) -> None:
    """No fault that axe finds, nothing beside the screen, one heading of the page, and no word on the console."""
    result = axe_playwright.Axe().run(page, options=rules).response
    faults = [
        (fault['id'], fault['impact'], [node['target'] for node in fault['nodes']]) for fault in result['violations']
    ]
    assert not faults, (name, faults)
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), name
    assert page.locator('h1').count() == 1, name
    assert not [text for text in page.said if '422' not in text], (name, page.said)
    if shots is not None:
        page.screenshot(path=shots / f'{name}.png', full_page=True)


def test_the_whole_way_at_a_phone(chromium: Any, here: Site, models: Models) -> None:
    page = open_page(chromium, here, 'phone')
    seen: list[str] = []

    def look(name: str) -> None:
        seen.append(name)
        if name == 'vote_errors':  # the others: see below
            check(page, name, None, RULES)

    take_part(page, here, look, models)
    assert len(seen) == 15
    [state] = here.running.participants.values()
    assert state.outcome == 'completed'
    assert page.get_by_role('link', name=here.running.texts.labels.back_to_panel).get_attribute('href') == (
        'https://panel.example/done?cc=COMPLETED'
    )
    page.context.close()


@pytest.mark.long
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', SIZES)
def test_every_step_at_every_size(chromium: Any, here: Site, models: Models, size: str, scheme: str) -> None:
    """SIMRL_SHOTS names a folder for pictures of every step."""
    shots = os.environ.get('SIMRL_SHOTS')
    folder = pathlib.Path(shots) / f'{size}-{scheme}' if shots else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    page = open_page(chromium, here, size, color_scheme=scheme)
    take_part(page, here, lambda name: check(page, name, folder, RULES), models)
    page.set_viewport_size({'width': 320, 'height': 600})  # as zoomed in to 400%
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')


def test_a_form_that_was_stopped_may_be_sent_again(chromium: Any, here: Site, models: Models) -> None:
    page = chromium.new_page(base_url=here.url)
    page.clock.install()
    page.goto(ENTER.format('stopped'))
    page.route('**/consent', lambda route: route.fulfill(status=204))  # the browser stays where it is
    agree = page.get_by_role('button', name=here.running.texts.labels.agree)
    agree.click()
    page.clock.run_for(1000)
    assert agree.is_disabled()
    page.clock.run_for(10_000)
    assert agree.is_enabled()
    page.unroute('**/consent')
    agree.click()
    page.get_by_role('button', name=here.running.texts.labels.start).wait_for()
    page.close()


def test_what_is_typed_is_never_lost_and_nothing_counts_twice(chromium: Any, here: Site, models: Models) -> None:
    """Reload, no network, Back, a second tab, a double click; by the keyboard alone where that is how it is done."""
    texts = here.running.texts
    labels, notices = texts.labels, texts.notices
    page = open_page(chromium, here)
    go_to_training(here)
    page.reload()

    page.fill('#message', 'Half a')
    page.locator('#message').press_sequentially(' message')
    page.reload()  # or a crash of the tab
    assert page.input_value('#message') == 'Half a message'
    page.context.set_offline(True)
    press(page, labels.send)
    page.wait_for_timeout(100)
    page.context.set_offline(False)
    page.goto(here.url)
    assert page.input_value('#message') == 'Half a message'

    models.go.clear()
    page.locator('#message').evaluate(PASTE)
    page.get_by_role('button', name=labels.send).evaluate('button => { button.click(); button.click(); }')
    page.get_by_text(notices.waiting).wait_for()
    assert page.evaluate('document.activeElement.id') == 'now'
    page.context.set_offline(True)
    page.locator('#lost').wait_for()
    page.context.set_offline(False)
    page.locator('#lost').wait_for(state='hidden')
    models.go.set()
    page.locator('#choice').wait_for()  # nobody reloaded
    assert page.title().startswith(f'{labels.reply_a}, {labels.reply_b}')

    tab = page.context.new_page()
    tab.goto(here.url)
    page.focus('#choice input')
    for key in ('Space', 'ArrowDown', 'Tab'):
        page.keyboard.press(key)
    page.keyboard.type('Both are kind.')
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    page.locator('#message').wait_for()
    assert page.input_value('#message') == ''  # the draft was of another exchange
    vote(tab, labels.vote)
    assert notices.out_of_date in tab.locator('p[role=status]:visible').first.inner_text()
    page.go_back()
    page.goto(here.url)
    page.locator('#message').wait_for()

    [state] = here.running.participants.values()
    assert state.training is not None
    [turn] = state.training.turns
    assert turn.message == 'Half a message, pasted'
    assert (turn.conduct.pasted, turn.conduct.typed) == (8, len(' message') + 1)
    assert turn.conduct.seconds is not None
    assert turn.preferred is not None
    assert (turn.preferred.choice, turn.preferred.reason) == ('tie', 'Both are kind.')
    page.context.close()


# Pastes, as far as a page may: the event with its data, and the text.
PASTE = """field => {
  const data = new DataTransfer();
  data.setData('text', ', pasted');
  field.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true }));
  field.value += ', pasted';
  field.dispatchEvent(new InputEvent('input', { inputType: 'insertFromPaste', bubbles: true }));
}"""


def go_to_training(here: Site) -> None:
    """Does for the only participant what comes before the training exchange."""

    async def go() -> None:
        running = here.running
        [state] = running.participants.values()
        state = await running.consent(state.id, state.version, True)
        state = await running.instruct(state.id, state.version)
        rights = tuple(question.right for question in running.texts.check)
        state = await running.check(state.id, state.version, rights)
        kind = running.tasks.type(state.document_type or '')
        await running.prepare(state.id, state.version, kind.tasks[0].id, ['x'] * len(kind.questions))

    here.wait(go())
