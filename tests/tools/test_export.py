"""The export tool: what it asks the hub for."""

import pytest

from tools import export


def test_a_revision_is_that_of_weights_and_of_the_generation_config(tmp_path, monkeypatch):
    asked = []

    def load_model(source, *, revision):
        asked.append(('model', source, revision))
        return 'config', 'params', 'tokenizer'

    def find_folder(source, revision):
        asked.append(('folder', source, revision))
        return tmp_path

    monkeypatch.setattr(export, 'load_model', load_model)
    monkeypatch.setattr(export, 'find_folder', find_folder)
    monkeypatch.setattr(export, 'export', lambda *_, **__: None)
    export.main(['--source=owner/model', '--revision=abc', f'--output={tmp_path / "out"}'])
    assert asked == [('model', 'owner/model', 'abc'), ('folder', 'owner/model', 'abc')]


def test_a_stage_takes_no_revision(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([f'--stage={tmp_path}', '--revision=abc', f'--output={tmp_path / "out"}'])
    assert '--revision: expected beside --source only' in capsys.readouterr().err
