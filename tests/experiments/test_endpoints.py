"""The endpoints of a run: whose answers are in which file, and how much of their use is shown."""

import dataclasses
import pathlib

import jax
import pytest

from simrl.conversations.records import Message
from simrl.experiments.endpoints import Endpoints, showing_usage, usage_metrics
from simrl.remote.requests import ChatRequest
from simrl.remote.settings import EndpointSettings
from simrl.remote.usage import Usage
from simrl.rollouts.token_sampling import Sampling
from tests.remote.server import ScriptedServer, Status, chat_reply


def requests(*texts: str) -> list[ChatRequest]:
    return [
        ChatRequest(messages=(Message('user', text),), max_tokens=9, sampling=Sampling(), version='1') for text in texts
    ]


def script(body, attempt):
    """An answer; 'b' fails once, 'c' for good."""
    text = body['messages'][0]['content']
    if text == 'b' and not attempt:
        return Status(500)
    return Status(400) if text == 'c' else chat_reply('yes', usage=(10, 2))


def settings_of(server: ScriptedServer, **changes) -> EndpointSettings:
    return EndpointSettings(server.url, 'model', backoff=0.001, output_price=1e6, **changes)


def test_each_process_of_a_job_has_a_file_of_its_own_that_it_finds_again(tmp_path, monkeypatch) -> None:
    """Hosts that share a run directory never write to one file; workers are the first process of their own job."""
    with ScriptedServer(script) as server:
        for process, asked in [(0, 1), (0, 1), (2, 2), (2, 2)]:
            monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
            outcomes = Endpoints(tmp_path).of(settings_of(server)).call(requests('a'))
            assert [outcome.text for outcome in outcomes] == ['yes']
            assert len(server.requests) == asked
    assert {path.name for path in tmp_path.glob('*.sqlite')} == {'answers.sqlite', 'answers-2.sqlite'}


def test_a_stage_shows_how_much_it_used_each_endpoint(tmp_path, capsys) -> None:
    """And nothing of endpoints that it did not use; the end of a stage may be an error."""
    with ScriptedServer(script, models=['model', 'other']) as server:
        endpoints = Endpoints(tmp_path)
        first, second = settings_of(server), dataclasses.replace(settings_of(server), in_flight=2)
        endpoints.of(dataclasses.replace(first, model='other'))

        def work(folder: pathlib.Path) -> None:
            endpoints.of(first).call(requests('a', 'b'))
            endpoints.of(second).call(requests('a', 'c'))
            if folder.name == 'broken':
                raise OSError('full')

        showing_usage(work, endpoints.usage)(tmp_path)
        line = (
            'endpoint model: calls: 4, from the cache: 1, failed: 1 (refused 1); tries: 4, failed: 1 (server 1); '
            'tokens: 20 in, 4 out; cost: 4\n'
        )
        assert capsys.readouterr().out == line
        with pytest.raises(OSError, match='full'):
            showing_usage(work, endpoints.usage)(tmp_path / 'broken')
        assert capsys.readouterr().out.startswith('endpoint model: calls: 4, from the cache: 3, failed: 1 (refused 1)')
        showing_usage(lambda _: None, endpoints.usage)(tmp_path)
        assert not capsys.readouterr().out


def test_steps_count_what_was_used_since_the_one_before(tmp_path) -> None:
    with ScriptedServer(script) as server:
        endpoints = Endpoints(tmp_path)
        metrics = usage_metrics(endpoints.usage)
        assert metrics() == {}
        endpoints.of(settings_of(server)).call(requests('a', 'b', 'c'))
        expected = {'calls': 3, 'cached': 0, 'tries': 4, 'failed_tries': 1, 'failures': 1, 'cost': 4}
        expected |= {'input_tokens': 20, 'output_tokens': 4}
        assert metrics() == {f'endpoint/model/{name}': (count, 1.0) for name, count in expected.items()}
        endpoints.of(settings_of(server)).call(requests('a'))
        assert {name: total for name, (total, _) in metrics().items() if total} == {
            'endpoint/model/calls': 1,
            'endpoint/model/cached': 1,
        }


def test_usages_add_and_subtract_cause_by_cause() -> None:
    one = Usage(calls=3, tries=2, failures={'cut': 1, 'schema': 2}, cost=0.5)
    other = Usage(calls=1, failures={'cut': 1}, failed_tries={'server': 1})
    assert one + other - other == one
    assert (one - other).failures == {'schema': 2}
    assert one - one == Usage()
