"""Fine-tuning as a stage: its rows are rendered once, however often it resumes."""

import json
import types

import pytest

from simrl.experiments import fitting
from tests.experiments.test_checks import COMPUTE, MODEL, PAIRS, PEOPLE, REWARD, USER_SFT


class KilledError(Exception):
    pass


def killed(*args, **options):
    raise KilledError


def test_a_fine_tuning_that_resumes_renders_nothing(tmp_path, monkeypatch):
    model = types.SimpleNamespace(chat=MODEL.chat, config=MODEL.config, load_params=lambda mesh: {})
    monkeypatch.setattr(fitting, 'fit_role', killed)
    with pytest.raises(KilledError):
        fitting.fine_tune_user(tmp_path, model, PEOPLE, USER_SFT, COMPUTE)
    monkeypatch.setattr(fitting, 'rows_of', lambda *_: pytest.fail('rendered twice'))
    found = []
    monkeypatch.setattr(fitting, 'fit_role', lambda folder, params, rows, held_out, **_: found.extend(rows) or {})
    fitting.fine_tune_user(tmp_path, model, PEOPLE, USER_SFT, COMPUTE)
    monkeypatch.undo()
    rows, _ = fitting.rows_of([person for person in PEOPLE if person.split == 'train'], USER_SFT, model)
    assert [row.tokens.tolist() for row in found] == [row.tokens.tolist() for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ['result.json']
    assert json.loads((tmp_path / 'result.json').read_text())['train_rows'] == len(rows)


def test_a_reward_model_that_resumes_renders_no_training_pair(tmp_path, monkeypatch):
    model = types.SimpleNamespace(chat=MODEL.chat, config=MODEL.config, load_params=lambda mesh: {})
    monkeypatch.setattr(fitting.preference, 'fit', killed)
    for render in (fitting.preference_rows, lambda *_, **options: pytest.fail('rendered twice')):
        monkeypatch.setattr(fitting, 'preference_rows', render)
        with pytest.raises(KilledError):
            fitting.fit_reward_model(tmp_path, model, PAIRS, REWARD, COMPUTE)
    assert [path.name for path in tmp_path.iterdir()] == ['train_rows.npz']
