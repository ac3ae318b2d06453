"""The administrators' pages in Chromium: axe finds no fault, none is wider than a phone, nothing of them is blocked."""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import pytest

from tests.study.pages import ADMIN, Site, site
from tests.study.planted import planted_study
from tests.study.test_admin import CONFIRMATION, PLANTED, fill, planted_settings

pytestmark = pytest.mark.long
SIZES = ({'width': 1280, 'height': 900}, {'width': 390, 'height': 844})
EXPORT = 'Submission id,Participant id,Status'  # of the panel, its first line
RULES = {'runOnly': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}


@pytest.fixture(scope='module')
def chromium() -> Any:
    playwright = pytest.importorskip('playwright.sync_api')
    path = shutil.which('chromium')
    if path is None:
        pytest.skip('chromium is not installed')
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


class Page:
    """A browser's page of administrators, each look at which is checked; SIMRL_SHOTS names a folder for pictures."""

    def __init__(self, chromium: Any, size: dict[str, int], scheme: str = 'light') -> None:
        self.axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
        context = chromium.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        self.page, self.name = context.new_page(), f'{size["width"]}-{scheme}'
        self.problems: list[str] = []
        self.page.on('console', lambda message: self.problems.append(message.text))

    def sign_in(self, study: Site) -> None:
        self.page.goto(f'{study.url}/admin/participants')
        self.check('sign in')
        self.page.keyboard.press('Tab')
        self.page.keyboard.type(ADMIN)
        self.page.keyboard.press('Enter')
        self.page.wait_for_selector('text=planned participants completed')

    def check(self, where: str) -> None:
        found = [
            (fault['id'], fault['impact'], fault['nodes'][0]['html'])
            for fault in self.axe.run(self.page, options=RULES).response['violations']
        ]
        assert not found, where
        wide = self.page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
        assert wide <= 0, where
        if shots := os.environ.get('SIMRL_SHOTS'):
            name = where.strip('/').replace('/', '-').replace(' ', '_') or 'overview'
            self.page.screenshot(path=pathlib.Path(shots) / f'admin-{name}-{self.name}.png', full_page=True)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', SIZES, ids=['desktop', 'phone'])
def test_statuses_are_entered(chromium: Any, tmp_path: pathlib.Path, size: dict[str, int], scheme: str) -> None:
    """The page for the panel's export, empty, refused and taken, by the keyboard alone."""
    with site(planted_settings(tmp_path)) as study:
        browser = Page(chromium, size, scheme)
        browser.sign_in(study)
        page = browser.page
        page.goto(f'{study.url}/admin/statuses')
        browser.check('statuses')
        for export, where in (('Name,Status\nx,RETURNED\n', 'refused'), (f'{EXPORT}\n1,x,RETURNED\n', 'taken')):
            page.focus('#export')
            page.keyboard.press('Control+A')
            page.keyboard.insert_text(export)
            page.keyboard.press('Tab')
            page.keyboard.press('Enter')
            page.wait_for_selector('.errors' if where == 'refused' else '.notice')
            browser.check(f'statuses {where}')
        assert page.locator('.notice', has_text='Statuses read: 1. New: 0; ').count() == 1
        assert not [text for text in browser.problems if '422' not in text], browser.problems


def test_administrators_pages(chromium: Any, tmp_path: pathlib.Path) -> None:
    settings = planted_settings(tmp_path)
    events, _ = planted_study(dataclasses.replace(PLANTED, people=120), 1)
    fill(settings, events)
    with site(settings) as study:
        person = next(state.id for state in study.running.participants.values() if state.outcome == 'completed')
        for number, size in enumerate(SIZES):
            browser = Page(chromium, size)
            page, check, problems = browser.page, browser.check, browser.problems
            browser.sign_in(study)
            for path in ('', '/participants', f'/participants/{person}', '/exports', '/looks'):
                page.goto(f'{study.url}/admin{path}')
                for details in page.query_selector_all('details'):
                    details.evaluate('element => element.open = true')
                check(path)
            if number == 0:  # all who were planned have completed: the last look is open
                page.fill('#confirmation', CONFIRMATION)
                page.keyboard.press('Enter')
            else:
                page.goto(f'{study.url}/admin/looks/1')
            page.wait_for_selector('h1:has-text("Results, look 1")')
            check('results')
            page.goto(f'{study.url}/admin/exports')
            with page.expect_download() as download:
                page.click('text=CSV')
            assert download.value.suggested_filename == 'study-live-payments.csv'
            page.goto(f'{study.url}/admin/participants/{person}')
            if number == 0:  # open where there is an exclusion to be taken back
                page.click('summary >> nth=0')
            page.fill('#reason', 'wrote by machine')
            page.click('button:has-text("Exclude")' if number == 0 else 'button:has-text("Take back")')
            page.wait_for_selector('text=wrote by machine')
            assert not problems, problems
            page.click('text=Sign out')
            page.wait_for_selector('#token')
