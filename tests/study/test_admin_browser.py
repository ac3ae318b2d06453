"""The administrators' pages in Chromium: axe finds no fault, none is wider than a phone, nothing of them is blocked."""

import dataclasses
import pathlib
import shutil
from typing import Any

import pytest

from tests.study.pages import ADMIN, site
from tests.study.planted import planted_study
from tests.study.test_admin import CONFIRMATION, PLANTED, fill, planted_settings

pytestmark = pytest.mark.long
SIZES = ({'width': 1280, 'height': 900}, {'width': 390, 'height': 844})


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


def test_administrators_pages(chromium: Any, tmp_path: pathlib.Path) -> None:
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    settings = planted_settings(tmp_path)
    events, _ = planted_study(dataclasses.replace(PLANTED, people=120), 1)
    fill(settings, events)
    with site(settings) as study:
        person = next(state.id for state in study.running.participants.values() if state.outcome == 'completed')
        for number, size in enumerate(SIZES):
            page = chromium.new_context(viewport=size, accept_downloads=True).new_page()
            problems: list[str] = []
            page.on('console', lambda message, to=problems: to.append(message.text))

            def check(where: str, page: Any = page) -> None:
                found = [
                    (fault['id'], fault['impact'], fault['nodes'][0]['html'])
                    for fault in axe.run(page).response['violations']
                ]
                assert not found, where
                wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
                assert wide <= 0, where

            page.goto(f'{study.url}/admin/participants')
            check('sign in')
            page.keyboard.press('Tab')
            page.keyboard.type(ADMIN)
            page.keyboard.press('Enter')
            page.wait_for_selector('text=planned participants completed')
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
