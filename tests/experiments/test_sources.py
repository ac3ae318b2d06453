"""A model and people's files: what does not fit together is refused, and only what is needed is read."""

import dataclasses
import json

import pytest

from simrl.conversations.chat import chat_from_huggingface
from simrl.conversations.records import Conversation, Message, RowError, write_conversations
from simrl.experiments import sources
from simrl.experiments.sources import DataSettings, ModelSettings
from simrl.models.files.huggingface_config import config_to_json
from simrl.models.transformer import TransformerConfig
from tests.tiny import CHATML_TOKENS, byte_tokenizer

CONFIG = TransformerConfig(
    vocab_size=259, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, max_positions=64
)


def model_folder(folder, rows, *more_tokens):
    """A model's files without its weights, which nothing here reads."""
    byte_tokenizer((*CHATML_TOKENS, *more_tokens)).save_pretrained(folder)
    config = dataclasses.replace(CONFIG, vocab_size=rows)
    (folder / 'config.json').write_text(json.dumps(config_to_json(config, rows, 'float32')))
    return ModelSettings(str(folder))


@pytest.mark.parametrize(('rows', 'first'), [(130, '130 is '), (258, r"258 is '<\|im_end\|>'")])
def test_tokens_without_a_row_are_refused(tmp_path, rows, first):
    with pytest.raises(ValueError, match=rf'{tmp_path}: .* the 259 tokens .* vocab_size={rows} rows; token {first}'):
        sources.open_model(model_folder(tmp_path, rows))


def test_special_tokens_that_nothing_writes_need_no_row(tmp_path):
    model = sources.open_model(model_folder(tmp_path, 259, '<extra 1>', '<extra 2>'))
    assert model.config.vocab_size == model.chat.size == 262


def test_a_tokenizer_of_a_newer_library_names_its_folder(tmp_path):
    settings = model_folder(tmp_path, 259)
    state = json.loads((tmp_path / 'tokenizer.json').read_text())
    (tmp_path / 'tokenizer.json').write_text(json.dumps(state | {'pre_tokenizer': {'type': 'FutureSplit'}}))
    with pytest.raises(ValueError, match=rf'^{tmp_path}: expected the files of a tokenizer, found: data did not match'):
        sources.open_model(settings)


def test_deep_json_of_a_model_names_its_file(tmp_path):
    settings = model_folder(tmp_path, 259)
    (tmp_path / 'config.json').write_text('[' * 100_000)
    with pytest.raises(ValueError, match=r'config\.json: expected JSON, found: maximum recursion depth exceeded'):
        sources.open_model(settings)


def test_conversations_that_the_tokenizer_cannot_write_are_bad_rows(tmp_path, capsys):
    check = chat_from_huggingface(byte_tokenizer(without='Ĕ')).check  # U+0014
    write_conversations(
        tmp_path / 'conversations.jsonl.gz',
        [Conversation(id, 'made up', 'train', (Message('user', text),)) for id, text in (('a', 'Hi'), ('b', 'x\x14y'))],
    )
    with pytest.raises(RowError, match=r"conversations\.jsonl\.gz, line 2: unusable text: 'b', message 0: .*U\+0014"):
        sources.conversations_of(DataSettings(tmp_path), check)
    found = sources.conversations_of(DataSettings(tmp_path, on_bad_rows='drop'), check)
    assert [conversation.id for conversation in found] == ['a']
    assert capsys.readouterr().out == 'conversations: 1; unusable text: 1\n'
