"""A participant's way through the pages: whatever they do, they are where they were, and nothing counts twice."""

import asyncio
import pathlib

from tests.study.pages import Browser, settings_of, study


def test_the_whole_way(tmp_path: pathlib.Path) -> None:
    async def go() -> None:
        async with study(settings_of(tmp_path)) as (running, app):
            browser = await Browser(app, running).enter()
            await browser.go_to('over')
            assert browser.state.outcome == 'completed'
            assert 'COMPLETED' in browser.page.text
            assert 'href="https://panel.example/done?cc=COMPLETED"' in browser.page.text

    asyncio.run(go())
