"""The export tool: what it asks the hub for, and where other software stops."""

import importlib
import json

import jax
import pytest
import transformers

from simrl.models import transformer
from simrl.models.files.export import export as export_model
from simrl.models.files.export import read_generation_config
from simrl.run import config as config_lib
from simrl.run import directory
from tests.tiny import CHATML, TEXT_TEMPLATES, byte_tokenizer, tiny_config
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


@pytest.mark.parametrize(
    ('template', 'own', 'expected'),
    [
        (CHATML, None, ['<|im_end|>', '<|endoftext|>']),  # instruction-tuned, with the end of the base model
        (CHATML, {'eos_token_id': 3, 'top_p': 0.5}, ['<|im_end|>', 3]),
        (TEXT_TEMPLATES['zephyr'], None, ['<|endoftext|>']),
        (None, None, ['<|endoftext|>']),  # a base model
    ],
)
def test_other_software_stops_where_the_template_ends_a_message(tmp_path, capsys, template, own, expected):
    tokenizer = byte_tokenizer(template=template, eos_token='<|endoftext|>')
    config = tiny_config(len(tokenizer))
    params = transformer.init_params(jax.random.key(0), config)
    export_model(params, config, tokenizer, tmp_path / 'model', generation_config=own)
    export.main([f'--source={tmp_path / "model"}', f'--output={tmp_path / "out"}'])
    found = read_generation_config(tmp_path / 'out')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    ids = [tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token for token in expected]
    assert found == (own or {}) | {'eos_token_id': ids[0] if template is None else ids}
    said = capsys.readouterr().out
    if template is None:
        assert 'generation stops by its own generation config alone: ' in said
        assert 'the tokenizer has no chat template' in said
    else:
        assert 'generation stops' not in said
        chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        rendered = tokenizer.apply_chat_template(chat)['input_ids']
        content = max(i for i, token in enumerate(rendered) if token == tokenizer.encode('b')[0])
        assert rendered[content + 1] == ids[0]
