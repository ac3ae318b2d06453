"""The start of a server: what is wrong is said before anything is loaded, and nothing listens until all is ready."""

import socket
import types
from typing import Any

import pytest

from simrl.serving import start
from simrl.serving.load import LoadedModel
from simrl.serving.settings import HttpSettings, ServeSettings
from simrl.serving.shapes import EngineSettings
from tests.serving.scripted import CHAT, ScriptedEngine
from tests.tiny import tiny_config


def model() -> LoadedModel:
    """A model without weights."""
    spec = types.SimpleNamespace(config=tiny_config(CHAT.size))
    return LoadedModel(types.SimpleNamespace(spec=spec), CHAT, False)  # type: ignore[arg-type]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return int(found.getsockname()[1])


def test_the_address_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(start, 'find_model', found.append)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f'^127.0.0.1:{port}: cannot listen there'):
            start.serve(ServeSettings(models=('a',), http=HttpSettings(port=port)))
    assert not found


def test_all_names_are_looked_up_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    loaded: list[str] = []

    def find(name: str) -> Any:
        if name == 'nowhere':
            raise FileNotFoundError('nowhere: expected a folder')
        return lambda: loaded.append(name)

    monkeypatch.setattr(start, 'find_model', find)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        start.serve(ServeSettings(models=('here', 'nowhere'), http=HttpSettings(port=free_port)))
    assert not loaded
    with socket.create_server(('127.0.0.1', free_port)):
        pass  # the address is free again


def test_what_is_compiled_is_counted_and_no_time_is_promised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 5.0, 16.0, 17.0, 33.4])
    monkeypatch.setattr(start.time, 'monotonic', seconds.__next__)
    count = start.counter('tiny', 4)
    for _ in range(4):
        count()
    assert capsys.readouterr().out.splitlines() == [
        'tiny: compiled 2 of 4 programs in 16 s',
        'tiny: compiled 4 of 4 programs in 33 s',
    ]


def test_nothing_listens_while_models_are_loaded(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    def engine(*_: Any, **__: Any) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(('127.0.0.1', free_port))
        raise ValueError('no room')

    monkeypatch.setattr(start, 'find_model', lambda name: model)
    monkeypatch.setattr(start, 'Engine', engine)
    with pytest.raises(ValueError, match='no room'):
        start.serve(ServeSettings(models=('a',), http=HttpSettings(port=free_port)))


def test_a_context_that_the_model_has_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, 'find_model', lambda name: model)
    with pytest.raises(ValueError, match=r"EngineSettings.context: expected at most the model's .*, found 10000"):
        start.serve(ServeSettings(models=('a',), http=HttpSettings(port=0), engine=EngineSettings(context=10_000)))


def test_an_engine_that_breaks_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise MemoryError('no room')

    monkeypatch.setattr(start, 'find_model', lambda name: model)
    monkeypatch.setattr(start, 'Engine', lambda *_, **__: ScriptedEngine())
    monkeypatch.setattr(start, 'run', run)
    with pytest.raises(MemoryError, match='no room'):
        start.serve(ServeSettings(models=('a',), http=HttpSettings(port=0)))


@pytest.mark.parametrize('models', [(), ('a', 'a'), ('x=a', 'x=b'), ('x=',), ('',), ('=a',)])
def test_names_are_checked(models: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r'ServeSettings\.models: expected'):
        ServeSettings(models=models).sources()


def test_names_of_requests_are_those_of_the_models_or_given() -> None:
    settings = ServeSettings(models=('runs/a/b', 'judge=OWNER/MODEL-2.5', 'x=runs/lr=0.1/a'))
    assert settings.sources() == {'runs/a/b': 'runs/a/b', 'judge': 'OWNER/MODEL-2.5', 'x': 'runs/lr=0.1/a'}
