"""Requests made from the API's own OpenAPI, fitting and not fitting it: none is a fault of the server."""

import collections
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from simrl.serving.server import make_app
from simrl.serving.settings import HttpSettings
from tests.serving.scripted import ScriptedEngine, served

schemathesis = pytest.importorskip('schemathesis')
pytestmark = pytest.mark.parity


def operations() -> Iterator[tuple[Any, Any]]:
    """Each operation of the API, with data that fits it and, where it takes a body, with data that does not."""
    app = make_app({'model': served(ScriptedEngine())}, HttpSettings())
    for found in schemathesis.openapi.from_asgi('/openapi.json', app).get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
            yield operation, mode


def statuses(examples: int) -> collections.Counter[tuple[str, int]]:
    """Counts of statuses by path; a status of 500 and more fails."""
    seen = collections.Counter[tuple[str, int]]()
    for operation, mode in operations():

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call()
            seen[case.operation.path, response.status_code] += 1
            case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
            if response.status_code >= 400:
                assert response.json()['error'].keys() == {'message', 'type', 'param', 'code'}

        check()
    return seen


def test_no_request_is_a_fault() -> None:
    seen = statuses(20)
    assert seen['/v1/chat/completions', 200]
    assert seen['/v1/completions', 200]
    assert seen['/v1/completions', 400]


@pytest.mark.long
def test_no_request_of_many_is_a_fault() -> None:
    assert statuses(1000)['/v1/completions', 200] > 100
