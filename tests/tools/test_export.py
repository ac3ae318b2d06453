"""The export tool: what it asks the hub for."""

import importlib
import json

import pytest

from simrl.run import config as config_lib
from simrl.run import directory
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


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        (None, 'expected a stage in a run directory with config.json, found none'),
        ('quickstart', 'expected a run of a pretrained model, found one of the concierge world'),
        ('smollm2', 'expected a finished stage that left a model, found none'),
    ],
)
def test_what_is_no_stage_of_a_model_is_refused(tmp_path, config, expected):
    if config is not None:
        plain = config_lib.to_dict(importlib.import_module(f'configs.{config}').get_config('smoke'))
        content = {'format': directory.FORMAT, 'version': '0', **plain}
        (tmp_path / directory.CONFIG_FILE).write_text(json.dumps(content))
    stage = tmp_path / 'rl' / 'role_play' / 'seed-0'
    with pytest.raises(SystemExit, match=f'^error: {stage}: {expected}'):
        export.main([f'--stage={stage}', f'--output={tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()
