"""The libraries of the extra, each by what it is known to say; and an encoder beside transformers'."""

import importlib
import json
import pathlib
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from simrl.evaluation.fidelity import annotators
from simrl.evaluation.fidelity.annotators import Annotators, MissingPackageError
from simrl.evaluation.fidelity.embeddings import encoder
from simrl.evaluation.fidelity.features import FEATURES


def test_the_libraries_spell_tag_and_feel():
    usual = Annotators()
    is_word = usual.make('words')
    assert all(map(is_word, ('hello', "don't", 'doesn’t')))
    assert not any(map(is_word, ('teh', 'recieve')))
    tags = FEATURES['part of speech'].counter(usual.make('tags'))
    assert tags("I don't want the car") == {'PNP': 1, 'VDB': 1, 'XX0': 1, 'VVI': 1, 'AT0': 1, 'NN1': 1}
    assert tags('é' * 500 + ' 12:30 ¿? \u200b 😀').total() > 4
    score = usual.make('sentiment')
    assert score('I love it!') > 0.5 > 0 > -0.5 > score('this is awful and wrong')
    assert score('a table') == 0


@pytest.mark.parametrize('name', ['words', 'tags', 'sentiment', 'embeddings'])
def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)

    real = importlib.import_module

    def import_module(module):
        if not module.startswith('simrl'):
            raise ModuleNotFoundError(f'No module named {module!r}')
        return real(module)

    monkeypatch.setattr(annotators.importlib, 'import_module', import_module)
    with pytest.raises(MissingPackageError, match=r"is not installed.*pip install (--no-deps|'simrl\[fidelity\]')"):
        Annotators().make(name)


WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *'abcdefgh']
CONFIG = {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'vocab_size': len(WORDS),
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 24,
    'max_position_embeddings': 12,
    'layer_norm_eps': 1e-12,
}
SIZES = {'attention.output.dense': (16, 16), 'intermediate.dense': (24, 16), 'output.dense': (16, 24)}
SIZES |= {f'attention.self.{name}': (16, 16) for name in ('query', 'key', 'value')}


def random_weights() -> dict[str, np.ndarray]:
    """Of a tiny BERT, under its names."""
    random = np.random.default_rng(0)
    rows = {'word': len(WORDS), 'position': 12, 'token_type': 2}
    shapes = {f'embeddings.{name}_embeddings.weight': (number, 16) for name, number in rows.items()}
    layers = [f'encoder.layer.{layer}' for layer in (0, 1)]
    for name in ('embeddings', *(f'{x}.{part}' for x in layers for part in ('attention.output', 'output'))):
        shapes |= {f'{name}.LayerNorm.{part}': (16,) for part in ('weight', 'bias')}
    for name, (out, size) in ((f'{x}.{name}', sizes) for x in layers for name, sizes in SIZES.items()):
        shapes |= {f'{name}.weight': (out, size), f'{name}.bias': (out,)}
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]')
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        '[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    tokenizer.enable_padding(length=12)  # as in the file of all-MiniLM-L6-v2
    with zipfile.ZipFile(tmp_path / 'model.zip', 'w') as archive:
        archive.writestr('model.safetensors', safetensors.numpy.save(random_weights()))
        archive.writestr('tokenizer.json', tokenizer.to_str())
        archive.writestr('config.json', json.dumps(CONFIG))
    return tmp_path / 'model.zip'


def test_a_sentence_has_length_one_whatever_is_beside_it_and_only_its_first_tokens_count(model):
    embed = encoder(model)
    texts = ['a b c', 'd', 'c b a', 'a ' * 10, 'a ' * 11]
    found = embed(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, np.concatenate([embed([text]) for text in texts]), atol=1e-6)
    np.testing.assert_allclose(found[3], found[4], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-4, 'the order of words counts'


def test_another_architecture_is_refused(model, tmp_path):
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(tmp_path / 'other.zip', 'w') as new:
        for name in old.namelist()[:2]:
            new.writestr(name, old.read(name))
        new.writestr('config.json', json.dumps(CONFIG | {'hidden_act': 'relu'}))
    with pytest.raises(ValueError, match=r"other.zip: config.json: hidden_act: expected 'gelu', found 'relu'"):
        encoder(tmp_path / 'other.zip')


@pytest.mark.long
def test_the_encoder_computes_what_transformers_does(model):
    torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
    import transformers

    theirs = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False).eval()
    weights = {name: torch.tensor(x) for name, x in random_weights().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all('position_ids' in name or 'token_type_ids' in name for name in missing)
    texts = ['a b c', 'd', 'e f g h a b']
    for text, own in zip(texts, encoder(model)(texts), strict=True):
        ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            mean = theirs(ids).last_hidden_state.mean(1)[0].numpy()
        np.testing.assert_allclose(own, mean / np.linalg.norm(mean), atol=1e-5)
