"""Requests made from the pages' own addresses and fields: none is a fault of the server."""

import collections
import pathlib
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simrl.study.web import FORM, PAGES, Web
from tests.study.pages import ADMIN, Browser, settings_of, site

schemathesis = pytest.importorskip('schemathesis')
pytestmark = pytest.mark.long
EXAMPLES = 100  # of each address
NUMBER = st.integers(0, 4).map(str)
GOOD: dict[str, Any] = {  # values that get further than any text
    'paused': st.sampled_from(['yes', 'no']),
    'agreed': st.just('yes'),
    'choice': st.sampled_from(['a', 'tie', 'b']),
    **dict.fromkeys(('attention', 'answer_0', 'answer_1', 'answer_2', 'pasted', 'typed', 'seconds'), NUMBER),
}


def forms() -> dict[str, Any]:
    """The body of a form, as OpenAPI states it: any text in each field that a template has."""
    pages = ''.join(path.read_text() for path in PAGES.glob('*.html'))
    names = {*re.findall(r'name="([a-z]+)"', pages), *re.findall(r"(?:writing|choosing)\('([a-z]+)'", pages)}
    assert {'csrf', 'version', 'message', 'choice', 'text', 'token', 'paused'} <= names
    fields = {name: {'type': 'string'} for name in (*names, 'answer_0', 'answer_1', 'answer_2', 'note_0', 'note_1')}
    return {'required': True, 'content': {FORM: {'schema': {'type': 'object', 'properties': fields}}}}


def test_no_request_is_a_fault(tmp_path: pathlib.Path) -> None:
    with site(settings_of(tmp_path)) as here:
        running = here.running
        web = Web(running.settings.web, running.texts, running.store.secret, ADMIN)
        people = []
        for step in ('consent', 'check', 'task', 'training', 'conversation', 'final', 'over'):
            browser = Browser(here.app, running)
            here.wait(browser.enter(step))
            here.wait(browser.go_to(step))
            people.append(browser.state.id)
        schema = here.app.openapi()
        for path in schema['paths'].values():
            if 'post' in path:
                path['post']['requestBody'] = forms()
        seen = collections.Counter[tuple[str, int]]()
        loaded = schemathesis.openapi.from_dict(schema)
        for found in loaded.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(
                case=operation.as_strategy(),
                id=st.sampled_from(people),
                fields=st.fixed_dictionaries({}, optional=GOOD),
            )
            def check(case: Any, id: str, fields: dict[str, str]) -> None:
                kind = 'administrator' if case.operation.path.startswith('/admin') else 'participant'
                session = 'ad317' if kind == 'administrator' else id
                if isinstance(case.body, dict):
                    version = str(running.participants[id].page)
                    case.body |= {'csrf': web.csrf(kind, session), 'version': version, **fields}
                cookie = f'{web.cookie_name(kind)}={web._signer(kind).sign(session).decode()}'
                answer = case.call(base_url=here.url, headers={'Cookie': cookie}, allow_redirects=False)
                seen[case.operation.path, answer.status_code] += 1
                case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])

            check()
        assert seen['/', 200]
        assert seen['/vote', 303]
        assert seen['/message', 400]
        assert seen['/admin', 200]
        assert here.running.participants.keys() >= set(people)
