"""A model and people's files: what does not fit together is refused, and only what is needed is read."""

import dataclasses
import json
import pathlib

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
import transformers

from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.huggingface_tokenizer import terminal_id, with_terminal
from simrl.conversations.records import Conversation, Message, write_conversations
from simrl.conversations.row_files import RowError
from simrl.conversations.templates import chat_from_huggingface
from simrl.experiments import sources
from simrl.experiments.sources import DataSettings, ModelSettings, model_files, model_identity
from simrl.models import transformer
from simrl.models.files.export import export
from simrl.models.files.huggingface_config import config_to_json
from tests.tiny import CHATML, CHATML_TOKENS, byte_tokenizer, tiny_config

CONFIG = tiny_config(259, max_positions=64)


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


def test_an_exported_simulator_keeps_its_terminal_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True)
    config = dataclasses.replace(CONFIG, vocab_size=260)
    params = transformer.init_params(jax.random.key(0), config)
    export(params, config, tokenizer, tmp_path / 'simulator')
    model = sources.open_model(ModelSettings(str(tmp_path / 'simulator')))
    assert (model.chat.terminal, model.chat.size, model.config) == (259, 260, config)
    assert model.chat.token_mask(260, terminal=True, header='user')[259]
    assert not model.chat.token_mask(260, terminal=False)[259]
    assert 259 not in model.chat.encode(TERMINAL_TEXT)
    loaded = model.load_params()
    np.testing.assert_array_equal(loaded['decoder']['embedding'][:260], params['decoder']['embedding'][:260])
    assert model.tokenizer.add_tokens([TERMINAL_TEXT], special_tokens=True) == 0  # as the export of its next stage does
    export(loaded, model.config, model.tokenizer, tmp_path / 'again')
    assert sources.open_model(ModelSettings(str(tmp_path / 'again'))).chat.terminal == 259


def test_an_export_from_a_vocabulary_with_a_hole(tmp_path):
    """tokenizers counts tokens to find a new id, which here is that of the last one."""
    tokens = {token: i for token, i in byte_tokenizer(without='Ĕ').get_vocab().items() if token not in CHATML_TOKENS}
    model = tokenizers.models.BPE(
        vocab={**tokens, 'ab': 259} | dict(zip(CHATML_TOKENS, (256, 257, 258), strict=True)), merges=[]
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(CHATML_TOKENS))
    source = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    source.chat_template = CHATML
    terminal = chat_from_huggingface(source).terminal
    assert terminal == 260
    for _ in range(2):  # the same whenever it is asked
        with pytest.raises(ValueError, match=r'to become token 260, found 259, since .* no tokens of the ids \[\d+\]$'):
            with_terminal(source, terminal)
        assert terminal_id(source) is None
    backend.add_special_tokens(['<extra>'])
    source = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    source.chat_template = CHATML
    with pytest.raises(ValueError, match="expected one token of id 259, found '<extra>' and 'ab'"):
        chat_from_huggingface(source)
    whole = with_terminal(byte_tokenizer(without='Ĕ'), 259)
    assert chat_from_huggingface(whole).terminal == terminal_id(whole) == 259


def test_a_new_terminal_token_starts_as_an_end_of_turn(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=259)
    params = transformer.init_params(jax.random.key(0), config)
    export(params, config, byte_tokenizer(), tmp_path / 'model')
    model = sources.open_model(ModelSettings(str(tmp_path / 'model')))
    rows = model.load_params()['decoder']['embedding']
    np.testing.assert_array_equal(rows[model.chat.terminal], rows[model.chat.end_of_turn['user']])


def test_tokens_after_the_terminal_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match='as the last token, of id 260, found it as 259'):
        sources.open_model(model_folder(tmp_path, 261, TERMINAL_TEXT, '<extra>'))


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
    (tmp_path / 'none.jsonl').write_text('')
    with pytest.raises(ValueError, match=r'none\.jsonl: expected at least one row that can be used, found none$'):
        sources.conversations_of(DataSettings(tmp_path, pathlib.Path('none.jsonl')), check)


def test_the_files_of_a_model_are_inputs_of_stages(tmp_path):
    names = [f'm-0000{number}-of-00003.gguf' for number in (1, 2, 3)]
    for name in ('model.gguf', *names):
        (tmp_path / name).touch()
    (tmp_path / 'folder').mkdir()
    for name in ('model.gguf', 'folder'):
        assert model_files('model', ModelSettings(str(tmp_path / name))) == {'model': tmp_path / name}
    keys = ('simulator_model', 'simulator_model shard 2', 'simulator_model shard 3')
    for name in names:  # whichever shard is named
        settings = ModelSettings(str(tmp_path / name))
        assert model_files('simulator_model', settings) == dict(zip(keys, (tmp_path / n for n in names), strict=True))
        assert 'source' not in model_identity(settings)


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """Its main branch moves between two runs; within a run it is one model."""
    commits = {'main': 'a' * 40}
    for commit in ('a' * 40, 'b' * 40):
        (tmp_path / commit).mkdir()
        model_folder(tmp_path / commit, 259)
        params = transformer.init_params(jax.random.key(ord(commit[0])), CONFIG)
        export(params, CONFIG, None, tmp_path / f'{commit} weights')
        (tmp_path / f'{commit} weights' / 'model.safetensors').rename(tmp_path / commit / 'model.safetensors')

    def snapshot(name, revision, allow_patterns):
        assert name == 'owner/model'
        return str(tmp_path / commits.get(revision or 'main', revision))

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    settings = ModelSettings('owner/model')
    assert model_files('model', settings) == {}
    first = sources.open_model(settings)
    commits['main'] = 'b' * 40
    second = sources.open_model(settings)
    identities = [model_identity(model.settings) for model in (first, second)]
    assert [(identity['source'], identity['revision']) for identity in identities] == [
        ('owner/model', commit * 40) for commit in 'ab'
    ]
    rows = [model.load_params()['decoder']['embedding'][:259] for model in (first, second)]
    assert not np.array_equal(*rows)
    pinned = sources.open_model(dataclasses.replace(settings, revision='a' * 40))
    assert model_identity(pinned.settings) == identities[0]
    np.testing.assert_array_equal(pinned.load_params()['decoder']['embedding'][:259], rows[0])


def test_a_balanced_choice_has_equally_many_of_each_source_and_more_are_the_same_and_others():
    people = [
        Conversation(f'{source}{i}', source, 'test', (Message('user', 'hi'),))
        for source, number in (('large', 30), ('small', 3), ('middle', 9))
        for i in range(number)
    ]
    before: set[str] = set()
    for number, counts in ((3, (1, 1, 1)), (9, (3, 3, 3)), (15, (6, 3, 6)), (99, (30, 3, 9))):
        found = sources.balanced(people, number, seed=2)
        assert tuple(sum(one.source == source for one in found) for source in ('large', 'small', 'middle')) == counts
        assert [people.index(one) for one in found] == sorted(people.index(one) for one in found)
        assert before < {one.id for one in found}
        before = {one.id for one in found}
    assert sources.balanced(people, 9, seed=3) != sources.balanced(people, 9, seed=2)
