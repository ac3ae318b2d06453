"""Fine-tuning as a stage: its rows are rendered once, however often it resumes, and its model is kept once."""

import dataclasses
import json
import types

import jax
import pytest

from simrl.experiments import fitting
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Execution
from simrl.training import loop
from tests.experiments.test_checks import COMPUTE, MODEL, PAIRS, PEOPLE, REWARD, USER_SFT, changed
from tests.rl.scene import params_of


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


LORA = LoRASettings(rank=2, alpha=4.0, targets=('query',))


@pytest.mark.parametrize(
    ('run', 'data', 'settings', 'kept'),
    [
        (fitting.fine_tune_user, PEOPLE, USER_SFT, ['float32'] * 6),
        (fitting.fine_tune_user, PEOPLE, changed(USER_SFT, 'sft.lora', LORA), ['bfloat16'] * 2),
        (fitting.fit_reward_model, PAIRS, REWARD, ['float32'] * 6),
    ],
)
def test_nothing_of_a_loaded_model_is_kept_beside_the_state(run, data, settings, kept, tmp_path, monkeypatch):
    """When the first step begins there are the trained parameters and two moments of each, or what adapters adapt.

    Of each the embedding and the untied head are counted.
    """
    config, found = MODEL.config, []

    def embeddings():
        return [x for x in jax.live_arrays() if x.shape == (config.padded_vocab_size, config.model_dim)]

    def begins(*_, **__):
        found.extend(str(x.dtype) for x in embeddings() if not any(x is old for old in before))
        raise KilledError

    before = embeddings()
    monkeypatch.setattr(loop, 'run', begins)
    model = types.SimpleNamespace(chat=MODEL.chat, config=config, load_params=lambda mesh: params_of(config))
    with pytest.raises(KilledError):
        run(tmp_path, model, data, settings, dataclasses.replace(COMPUTE, training=Execution(dtype='bfloat16')))
    assert found == kept
