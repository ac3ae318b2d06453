"""Model folders in and out: parity with transformers, exact use of keys, and bad input."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from simrl.models.files import export as export_module
from simrl.models.files.export import export, read_generation_config
from simrl.models.files.huggingface import load_config, load_params
from simrl.models.files.huggingface_config import config_from_json, config_to_json
from simrl.models.files.huggingface_table import tensor_names, weight_table
from simrl.models.files.load import load_model, resize_vocabulary
from simrl.models.transformer import Execution, RopeScaling, TransformerConfig, apply, init_head, init_params, project

SIZES = {
    'vocab_size': 150,  # no multiple of 128
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,  # so that the heads' dimensions are not the model's
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
}
LLAMA3_ROPE = {
    'rope_type': 'llama3',
    'rope_theta': 500.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
FAMILIES = {
    'llama3': ('LlamaConfig', {'rope_parameters': LLAMA3_ROPE}),
    'mistral': (
        'MistralConfig',
        {'sliding_window': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}},
    ),
    'smollm2': (
        'LlamaConfig',
        {'tie_word_embeddings': True, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e5}},
    ),
    'qwen2': ('Qwen2Config', {'tie_word_embeddings': True, 'rms_norm_eps': 1e-6}),
    'qwen3': ('Qwen3Config', {'rms_norm_eps': 1e-6, 'attention_bias': True}),
    'olmo2': ('Olmo2Config', {'attention_bias': True}),
    'llama with biases': ('LlamaConfig', {'attention_bias': True, 'mlp_bias': True}),
    'mistral with a window': ('MistralConfig', {'sliding_window': 40}),  # as long as the rows
    'qwen2 with a window': ('Qwen2Config', {'use_sliding_window': True, 'sliding_window': 40, 'max_window_layers': 0}),
}
CONFIG = TransformerConfig(
    vocab_size=150, model_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, max_positions=64
)
MIXED_LAYERS = ['full_attention', 'sliding_attention']
TOKENS = np.random.default_rng(0).integers(0, 150, (2, 40)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=1)
def all_logits(params, config):
    hidden, _ = apply(params, config, Execution(), jnp.asarray(TOKENS))
    return project(params, hidden)


def our_logits(params, config):
    return np.asarray(all_logits(params, config))[..., : config.vocab_size]


def random_params(config):
    """Random host params; no compile."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def their_model(name):
    """A random model of transformers in which no array keeps a value that hides a mistake (all ones, all zeros)."""
    torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
    import transformers

    config_class, fields = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**{**SIZES, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.float().eval()


def their_logits(model):
    torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.float().numpy()


def assert_close(found, expected, tolerance=1e-4):
    assert np.max(np.abs(found - expected)) / np.max(np.abs(expected)) < tolerance


def tokenizer_of(num_tokens, without=()):
    import tokenizers
    import transformers

    vocab = {'<|im_end|>': 0} | {f't{i}': i for i in range(1, num_tokens) if i not in without}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='t1'))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='<|im_end|>', unk_token='t1')


@pytest.fixture(scope='module')
def params():
    return random_params(CONFIG)


@pytest.fixture
def folder(tmp_path, params):
    export(params, CONFIG, None, tmp_path / 'model')
    return tmp_path / 'model'


def assert_equal_trees(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def without_padding(params, config):
    def strip(path, leaf):
        return np.asarray(leaf)[: config.vocab_size] if path[-1].key in ('embedding', 'head') else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(strip, params)


# Parity with transformers.


@pytest.mark.parity
@pytest.mark.parametrize('name', FAMILIES)
def test_both_directions_agree_with_transformers(name, tmp_path):
    import transformers

    model = their_model(name)
    expected = their_logits(model)
    model.save_pretrained(tmp_path / 'theirs')
    config = load_config(tmp_path / 'theirs')
    params = load_params(tmp_path / 'theirs', config)
    assert_close(our_logits(params, config), expected)

    # The table names every key of the file once, and every array of ours once.
    names = [key for row in weight_table(config) for key in tensor_names(row, config)]
    assert sorted(names) == sorted(load_file(tmp_path / 'theirs' / 'model.safetensors'))
    paths = [row.path for row in weight_table(config)]
    ours = jax.tree_util.tree_flatten_with_path(random_params(config)['decoder'])[0]
    assert sorted(paths) == sorted(tuple(entry.key for entry in path) for path, _ in ours)

    export(params, config, None, tmp_path / 'ours')
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    np.testing.assert_array_equal(their_logits(loaded.float().eval()), expected)
    assert_equal_trees(load_params(tmp_path / 'ours', load_config(tmp_path / 'ours')), params)
    assert load_config(tmp_path / 'ours') == config


@pytest.mark.parity
def test_llama3_scaling_is_in_use(tmp_path):
    model = their_model('llama3')
    model.save_pretrained(tmp_path / 'theirs')
    config = load_config(tmp_path / 'theirs')
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
    plain = TransformerConfig(**{**config.__dict__, 'rope_scaling': None})
    params = load_params(tmp_path / 'theirs', config)
    assert np.max(np.abs(our_logits(params, plain) - our_logits(params, config))) > 1e-2


@pytest.mark.parity
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_files(dtype, tmp_path):
    torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
    import transformers

    their_model('qwen2').to(getattr(torch, dtype)).save_pretrained(tmp_path / 'theirs')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'theirs', dtype=torch.float32)
    config = load_config(tmp_path / 'theirs')
    params = load_params(tmp_path / 'theirs', config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {'float32'}
    assert_close(our_logits(params, config), their_logits(model))  # the same rounded weights in float32

    export(params, config, None, tmp_path / 'ours', dtype=dtype)
    theirs = load_file(tmp_path / 'theirs' / 'model.safetensors')
    ours = load_file(tmp_path / 'ours' / 'model.safetensors')
    assert_equal_trees(ours, theirs)
    assert {array.dtype.name for array in ours.values()} == {dtype}


@pytest.mark.parity
def test_sharded_folder_of_transformers_and_ours(tmp_path):
    import transformers

    model = their_model('smollm2')
    model.save_pretrained(tmp_path / 'theirs', max_shard_size='10KB')
    assert (tmp_path / 'theirs' / 'model.safetensors.index.json').exists()
    config = load_config(tmp_path / 'theirs')
    params = load_params(tmp_path / 'theirs', config)
    assert_close(our_logits(params, config), their_logits(model))
    export(params, config, None, tmp_path / 'ours', max_file_bytes=10_000)
    assert len(list((tmp_path / 'ours').glob('model-*-of-*.safetensors'))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    np.testing.assert_array_equal(their_logits(loaded.float().eval()), their_logits(model))
    assert_equal_trees(load_params(tmp_path / 'ours', config), params)


# Configs.


def test_config_forms_of_transformers_4_and_5_agree():
    new = {**SIZES, 'model_type': 'llama', 'rope_parameters': LLAMA3_ROPE}
    old_rope = {key: value for key, value in LLAMA3_ROPE.items() if key != 'rope_theta'}
    old = {**SIZES, 'model_type': 'llama', 'rope_theta': 500.0, 'rope_scaling': old_rope}
    assert config_from_json(new) == config_from_json(old)
    assert config_from_json(old).rope_theta == 500.0
    assert config_from_json(old).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
    assert config_from_json({**SIZES, 'model_type': 'llama', 'rope_theta': 7.0}).rope_theta == 7.0
    assert config_from_json({**SIZES, 'model_type': 'llama', 'rope_scaling': None}).rope_theta == 10_000.0


@pytest.mark.parametrize('name', ['LlamaConfig', 'MistralConfig', 'Qwen2Config', 'Qwen3Config', 'Olmo2Config'])
def test_absent_fields_mean_what_transformers_takes(name):
    import transformers

    config = getattr(transformers, name)(**{**SIZES, 'sliding_window': None})
    absent = ('rms_norm_eps', 'tie_word_embeddings', 'hidden_act', 'rope_parameters', 'attention_bias', 'layer_types')
    fields = getattr(transformers, name)(**{k: v for k, v in SIZES.items() if k not in absent}, sliding_window=None)
    full = fields.to_dict()
    assert config_from_json({k: v for k, v in full.items() if k not in absent}) == config_from_json(full)
    assert config_from_json(config.to_dict()).norm_epsilon == 1e-5


def test_config_round_trip():
    attention, mlp = ('query', 'key', 'value', 'output'), ('gate', 'up', 'down')
    olmo = {'norm_placement': 'after', 'qk_norm': 'all_heads'}
    for change, model_type in (
        ({}, 'llama'),
        ({'rope_scaling': RopeScaling(4.0, 1.0, 2.0, 16)}, 'llama'),
        ({'biases': attention}, 'llama'),
        ({'biases': mlp}, 'llama'),
        ({'biases': attention + mlp}, 'llama'),
        ({'sliding_window': 32}, 'mistral'),
        ({'biases': attention[:3]}, 'qwen2'),
        ({'biases': attention[:3], 'sliding_window': 32}, 'qwen2'),
        ({'qk_norm': 'head'}, 'qwen3'),
        ({'qk_norm': 'head', 'biases': attention, 'sliding_window': 32}, 'qwen3'),
        (olmo, 'olmo2'),
        (olmo | {'biases': attention}, 'olmo2'),
    ):
        config = dataclasses.replace(CONFIG, **change)
        fields = config_to_json(config, config.vocab_size, 'float32')
        assert (fields['model_type'], config_from_json(fields)) == (model_type, config)
    for change in ({'qk_norm': 'head', 'biases': attention[:3]}, {'biases': ('up',)}, {'norm_placement': 'after'}):
        with pytest.raises(ValueError, match=r'no family of llama, .* has the structure of TransformerConfig'):
            config_to_json(dataclasses.replace(CONFIG, **change), 150, 'float32')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model_type': 'gpt2'}, "model_type: expected one of llama, mistral, qwen2, qwen3, olmo2, found 'gpt2'"),
        ({'model_type': None}, 'model_type: expected one of llama'),
        ({'hidden_act': 'gelu'}, "hidden_act: expected 'silu' or 'swish', found 'gelu'"),
        ({'attention_bias': 1}, 'attention_bias: expected True or False or None, found 1'),
        ({'model_type': 'mistral', 'attention_bias': True}, 'attention_bias: expected False or None, found True'),
        ({'model_type': 'qwen2', 'attention_bias': True}, 'attention_bias: expected False'),
        ({'model_type': 'olmo2', 'mlp_bias': True}, 'mlp_bias: expected False'),
        ({'pretraining_tp': 2}, 'pretraining_tp: expected 1'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config: expected None'),
        ({'model_type': 'mistral', 'sliding_window': 0}, 'sliding_window: expected a whole number of at least 1'),
        ({'use_sliding_window': True}, 'use_sliding_window: expected False'),
        ({'model_type': 'olmo2', 'use_sliding_window': True}, 'use_sliding_window: expected False'),
        (
            {'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 32, 'max_window_layers': 1},
            'max_window_layers: expected sliding_window=32, less than .*=64, in all layers or in none, .*1 of 2',
        ),
        (
            {'model_type': 'qwen3', 'use_sliding_window': True, 'sliding_window': 32, 'layer_types': MIXED_LAYERS},
            'layer_types: expected sliding_window=32, less than .*=64, in all layers or in none, .*1 of 2',
        ),
        ({'model_type': 'qwen3', 'layer_types': MIXED_LAYERS}, r"layer_types: .* found \['sliding_attention'\]"),
        ({'layer_types': MIXED_LAYERS}, r"layer_types: .* found \['sliding_attention'\]"),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_scaling.rope_type: .* found 'linear'"),
        ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope_parameters.rope_type: .* found 'yarn'"),
        ({'rope_parameters': {**LLAMA3_ROPE, 'factor': None}}, 'rope_parameters.factor: expected a number above 0'),
        (
            {'rope_parameters': {**LLAMA3_ROPE, 'factor': 0}},
            'rope_parameters.factor: expected a number above 0, found 0',
        ),
        ({'rope_theta': -5}, 'rope_theta: expected a number above 0, found -5'),
        ({'rope_theta': [1e4]}, 'rope_theta: expected a number above 0'),
        ({'rms_norm_eps': float('nan')}, 'rms_norm_eps: expected a number, found nan'),
        ({'layer_types': 5}, 'layer_types: expected a list with one entry for each of the 2 layers, found 5'),
        ({'layer_types': ['full_attention']}, 'layer_types: expected a list with one entry for each of the 2 layers'),
        ({'rope_parameters': {**LLAMA3_ROPE, 'mscale': 1.0}}, 'rope_parameters: expected the fields .*mscale'),
        ({'rope_parameters': LLAMA3_ROPE, 'rope_theta': 9.0}, 'rope_theta: expected one value'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor: expected 1'),
        ({'hidden_size': None}, 'hidden_size: expected a number, found None'),
        ({'hidden_size': 24.5}, 'hidden_size: expected a whole number of at least 1, found 24.5'),
        ({'vocab_size': 0}, 'vocab_size: expected a whole number of at least 1, found 0'),
        ({'num_key_value_heads': 3}, 'num_heads: expected a multiple of num_kv_heads=3, found 4'),
        ({'model_type': 'qwen2', 'num_key_value_heads': None}, 'num_key_value_heads: expected a number'),
        ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings: expected true or false, found 'yes'"),
        ({'head_dim': None, 'num_attention_heads': 5}, 'head_dim: expected a number'),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json({**SIZES, 'model_type': 'llama', **change})


def test_a_window_that_no_row_reaches_is_none():
    fields = {**SIZES, 'model_type': 'mistral', 'sliding_window': 64}
    assert config_from_json(fields) == config_from_json({**fields, 'sliding_window': None})
    for model_type in ('qwen2', 'qwen3'):
        plain = {**SIZES, 'model_type': model_type}
        for windows in (
            {'sliding_window': 64, 'max_window_layers': 1},
            {'max_window_layers': 0},  # 4096 of 64 positions
            {'sliding_window': 16, 'max_window_layers': 2},
            {'sliding_window': 16},  # from layer 28 of 2
            {'sliding_window': 16, 'max_window_layers': 0, 'layer_types': ['full_attention'] * 2},
            {'sliding_window': None, 'max_window_layers': 0},
            {'sliding_window': 64, 'layer_types': MIXED_LAYERS},
        ):
            assert config_from_json(plain | {'use_sliding_window': True} | windows) == config_from_json(plain)


def test_rows_of_a_model_with_a_window_are_within_it():
    config = config_from_json({**SIZES, 'model_type': 'mistral', 'max_position_embeddings': 8192})
    assert (config.max_positions, config.sliding_window, config.max_row_tokens) == (8192, 4096, 4096)
    assert config.row_limit == 'sliding_window=4096 (of max_positions=8192)'
    assert (CONFIG.max_row_tokens, CONFIG.row_limit) == (64, 'max_positions=64')


@pytest.mark.parametrize('text', ['{"model_type": ', '[1, 2]', '\xff\xfe'])
def test_config_file_that_is_no_json_object(folder, text):
    (folder / 'config.json').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match=r'config\.json: expected'):
        load_config(folder)


# Bad weights.


def rewrite(folder, change):
    """Rewrites the folder's one safetensors file with its dict of tensors changed."""
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop('model.layers.1.mlp.up_proj.weight'))
    with pytest.raises(ValueError, match=r'expected the tensor model\.layers\.1\.mlp\.up_proj\.weight, found none'):
        load_params(folder, CONFIG)


@pytest.mark.parametrize('name', ['model.layers.2.mlp.up_proj.weight', 'model.layers.0.self_attn.q_proj.bias'])
def test_unknown_tensor(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=rf'model\.safetensors: {name}: not a tensor of this config'):
        load_params(folder, CONFIG)


def test_misshapen_tensor(folder):
    name = 'model.layers.0.mlp.down_proj.weight'
    rewrite(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(ValueError, match=rf'{name}: expected shape \[16, 24\], found \[24, 16\]'):
        load_params(folder, CONFIG)


def test_tensor_of_another_type(folder):
    rewrite(folder, lambda tensors: tensors.update({'model.norm.weight': np.zeros(16, np.int8)}))
    with pytest.raises(ValueError, match=r'model\.norm\.weight: expected one of F32, BF16, F16, found I8'):
        load_params(folder, CONFIG)


@pytest.mark.parametrize('kept', [0, 4, 100, -5])
def test_truncated_file(folder, kept):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r'model\.safetensors: expected a complete safetensors file, found a damaged one'
    ):
        load_params(folder, CONFIG)


def test_damaged_header(folder):
    file = folder / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[8:12] = b'\xff\xff\xff\xff'
    file.write_bytes(data)
    with pytest.raises(ValueError, match='found a damaged one'):
        load_params(folder, CONFIG)


def test_folder_without_weights(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(FileNotFoundError, match=r'expected model\.safetensors or .*found .*pytorch_model\.bin'):
        load_params(folder, CONFIG)


def test_tied_model_with_a_head_of_its_own(tmp_path):
    config = TransformerConfig(**{**CONFIG.__dict__, 'tied_embedding': True})
    params = random_params(config)
    export(params, config, None, tmp_path / 'model')
    rewrite(tmp_path / 'model', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'].copy()}))
    loaded = load_params(tmp_path / 'model', config)
    assert_equal_trees(without_padding(loaded, config), without_padding(params, config))
    rewrite(tmp_path / 'model', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] + 1}))
    with pytest.raises(ValueError, match=r'lm_head\.weight: expected the numbers of model\.embed_tokens\.weight'):
        load_params(tmp_path / 'model', config)


def test_tied_model_that_stores_only_its_head(tmp_path):
    config = dataclasses.replace(CONFIG, tied_embedding=True)
    params = random_params(config)
    export(params, config, None, tmp_path / 'model')
    rewrite(tmp_path / 'model', lambda t: t.update({'lm_head.weight': t.pop('model.embed_tokens.weight')}))
    loaded = load_params(tmp_path / 'model', config)
    assert_equal_trees(without_padding(loaded, config), without_padding(params, config))
    rewrite(tmp_path / 'model', lambda t: t.pop('lm_head.weight'))
    with pytest.raises(ValueError, match=r'expected the tensor model\.embed_tokens\.weight, found none'):
        load_params(tmp_path / 'model', config)


@pytest.mark.parametrize('name', ['model.layers.1.self_attn.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq'])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_stored_rope_frequencies_are_those_of_the_config(folder, params, name, dtype):
    frequencies = (10_000.0 ** -(np.arange(0, 8, 2) / 8)).astype(jnp.dtype(dtype))
    rewrite(folder, lambda tensors: tensors.update({name: frequencies}))
    assert_equal_trees(without_padding(load_params(folder, CONFIG), CONFIG), without_padding(params, CONFIG))
    for wrong in (frequencies / 2, frequencies[:-1]):  # linear scaling by 2; another head dimension
        rewrite(folder, lambda tensors, wrong=wrong: tensors.update({name: wrong}))
        with pytest.raises(ValueError, match=rf'{name}: expected the RoPE frequencies of the config, \[4\] from 1 to'):
            load_params(folder, CONFIG)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path, params):
        export(params, CONFIG, None, tmp_path / 'sharded', max_file_bytes=8_000)
        return tmp_path / 'sharded'

    def change_index(self, folder, change):
        file = folder / 'model.safetensors.index.json'
        index = json.loads(file.read_text())
        change(index['weight_map'])
        file.write_text(json.dumps(index))

    def test_missing_file(self, sharded):
        next(sharded.glob('model-00002-of-*')).unlink()
        with pytest.raises(
            FileNotFoundError, match=r'model-00002-of-0000\d\.safetensors: expected this safetensors file'
        ):
            load_params(sharded, CONFIG)

    def test_tensor_not_where_the_index_says(self, sharded):
        self.change_index(sharded, lambda m: m.update({'model.norm.weight': m['lm_head.weight']}))
        with pytest.raises(
            ValueError, match=r'index\.json: model\.norm\.weight: expected in model-0000\d.*, found model-'
        ):
            load_params(sharded, CONFIG)

    def test_tensor_that_the_index_lacks(self, sharded):
        self.change_index(sharded, lambda m: m.pop('model.norm.weight'))
        with pytest.raises(ValueError, match=r'index\.json: model\.norm\.weight: expected in None, found model-'):
            load_params(sharded, CONFIG)

    def test_tensor_in_two_files(self, sharded):
        file = next(sharded.glob('model-00002-of-*'))
        save_file(load_file(file) | {'model.embed_tokens.weight': np.zeros(16, np.float32)}, file)
        with pytest.raises(ValueError, match=r'model\.embed_tokens\.weight: also in model-'):
            load_params(sharded, CONFIG)

    def test_truncated_file(self, sharded):
        file = next(sharded.glob('model-00002-of-*'))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r'model-00002-of-0000\d\.safetensors: .* damaged'):
            load_params(sharded, CONFIG)

    def test_index_without_weight_map(self, sharded):
        (sharded / 'model.safetensors.index.json').write_text('{}')
        with pytest.raises(ValueError, match='weight_map: expected an object'):
            load_params(sharded, CONFIG)


# Export.


def test_round_trip_strips_and_restores_the_padding(folder, params):
    with safe_open(folder / 'model.safetensors', 'numpy') as file:
        assert file.get_slice('model.embed_tokens.weight').get_shape() == [150, 16]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever reads one may read all
    loaded = load_params(folder, CONFIG)
    assert_equal_trees(without_padding(loaded, CONFIG), without_padding(params, CONFIG))
    assert loaded['decoder']['embedding'].shape == (256, 16)
    assert not loaded['decoder']['embedding'][150:].any()
    np.testing.assert_array_equal(our_logits(loaded, CONFIG), our_logits(params, CONFIG))


@pytest.mark.parametrize('without', [(), (9,)])
def test_rows_written_cover_the_tokenizer(tmp_path, params, without):
    export(params, CONFIG, tokenizer_of(155, without), tmp_path / 'model')
    config, loaded, tokenizer = load_model(str(tmp_path / 'model'))
    assert (config.vocab_size, len(tokenizer)) == (155, 155 - len(without))
    np.testing.assert_array_equal(loaded['decoder']['embedding'][:155], params['decoder']['embedding'][:155])
    assert tokenizer('t5 t7')['input_ids'] == [5, 7]
    assert read_generation_config(tmp_path / 'model') == {'eos_token_id': 0}
    with pytest.raises(ValueError, match='at most 256 tokens'):
        export(params, CONFIG, tokenizer_of(257), tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_generation_config_is_kept(tmp_path, params):
    kept = {'eos_token_id': [3, 4], 'temperature': 0.6, 'do_sample': True}
    export(params, CONFIG, tokenizer_of(150), tmp_path / 'model', generation_config=kept)
    assert read_generation_config(tmp_path / 'model') == kept


@pytest.mark.parametrize(
    ('source', 'expected'), [(None, [3, 9, 0]), ({}, [3, 9]), ({'eos_token_id': 9, 'top_p': 0.5}, [3, 9])]
)
def test_stop_ids_come_before_those_of_the_source(tmp_path, params, source, expected):
    export(params, CONFIG, tokenizer_of(150), tmp_path / 'model', generation_config=source, stop_ids=[3, 9])
    written = read_generation_config(tmp_path / 'model')
    assert written['eos_token_id'] == expected
    assert written | {'eos_token_id': None} == {**(source or {}), 'eos_token_id': None}


def test_heads_travel_with_the_model(tmp_path, params):
    head = init_head(CONFIG) | {'kernel': jnp.arange(16.0), 'bias': jnp.float32(0.5)}
    export({**params, 'reward_head': head}, CONFIG, None, tmp_path / 'model')
    loaded = load_params(tmp_path / 'model', CONFIG)
    assert_equal_trees(loaded['reward_head'], head)
    assert 'value_head' not in loaded
    save_file({'reward_head.kernel': np.zeros(16, np.float32)}, tmp_path / 'model' / 'simrl_heads.safetensors')
    with pytest.raises(ValueError, match=r'expected the tensor reward_head\.bias'):
        load_params(tmp_path / 'model', CONFIG)


def test_export_refuses_a_folder_that_exists_and_params_of_another_config(folder, params, tmp_path):
    before = (folder / 'model.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match='expected no such folder yet'):
        export(params, CONFIG, None, folder)
    assert (folder / 'model.safetensors').read_bytes() == before
    for change in ({'mlp_dim': 32}, {'qk_norm': 'head'}, {'tied_embedding': True}):
        with pytest.raises(ValueError, match=r'params decoder/.*: expected shape'):
            export(params, TransformerConfig(**{**CONFIG.__dict__, **change}), None, tmp_path / 'other')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model']


def test_failed_export_leaves_nothing(tmp_path, params, monkeypatch):
    saved = []

    def save_two(tensors, file, metadata=None):
        if len(saved) == 2:
            raise OSError('No space left on device')
        saved.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(export_module.safetensors.numpy, 'save_file', save_two)
    with pytest.raises(OSError, match='No space left'):
        export(params, CONFIG, None, tmp_path / 'model', max_file_bytes=8_000)
    assert len(saved) == 2
    assert list(tmp_path.iterdir()) == []


# Sources.


def test_sources_that_are_no_model(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r'nothing\.gguf: expected a GGUF file'):
        load_model(str(tmp_path / 'nothing.gguf'))
    with pytest.raises(FileNotFoundError, match=r'expected a folder, a \.gguf file or a hub name'):
        load_model(str(tmp_path / 'nothing'))
    with pytest.raises(ValueError, match='expected the files of a tokenizer'):
        load_model(str(folder))
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'config\.json: expected this file'):
        load_model(str(folder))


def test_an_adapter_and_a_file_of_a_model_are_no_model(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors: expected a folder or a \.gguf file.* its folder'):
        load_model(str(folder / 'model.safetensors'))
    (folder / 'config.json').unlink()
    (folder / 'adapter_config.json').write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ValueError, match='expected a whole model, found a LoRA adapter of owner/base: merge it'):
        load_model(str(folder))


def test_why_nothing_came_from_the_hub_is_one_line(monkeypatch):
    import huggingface_hub.errors

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError('Connection refused\nPlease check your connection.')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    expected = (
        r'^a/b: no such folder, and nothing from the hub: LocalEntryNotFoundError: Connection refused Please check'
    )
    with pytest.raises(FileNotFoundError, match=expected):
        load_model('a/b')


def test_a_model_of_the_hub_is_looked_for_in_a_new_process(tmp_path):
    """Where no other package has imported parts of huggingface_hub."""
    code = "from simrl.models.files.load import find_folder; find_folder('a/b')"
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | offline, capture_output=True, text=True)
    assert 'FileNotFoundError: a/b: no such folder, and nothing from the hub: LocalEntryNotFoundError: ' in done.stderr


def test_a_user_without_a_home_folder_has_no_place_for_models_of_the_hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', '~/.cache/huggingface/hub')
    with pytest.raises(FileNotFoundError, match=r'^a/b: no home folder for models of the hub; set HOME or HF_HOME$'):
        load_model('a/b')


@pytest.fixture
def hub(tmp_path, params, monkeypatch):
    """A folder that stands for a repository of the hub, and the calls of its download."""
    import huggingface_hub.utils

    repository, commit, asked = tmp_path / 'repository', tmp_path / 'snapshots' / 'commit', []
    export(params, CONFIG, tokenizer_of(150), repository, max_file_bytes=8_000)

    def snapshot(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        commit.mkdir(parents=True, exist_ok=True)
        for file in huggingface_hub.utils.filter_repo_objects(
            sorted(path.name for path in repository.iterdir()), allow_patterns=allow_patterns
        ):
            shutil.copy(repository / file, commit)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    return repository, commit, asked


def test_hub_names_go_to_the_hub_without_code_or_pickles(hub):
    repository, commit, asked = hub
    for name in ('pytorch_model.bin', 'modeling.py', 'consolidated.safetensors', 'weights.pt'):
        (repository / name).write_text('not to be read')
    config, _, tokenizer = load_model('someone/model', revision='abc')
    assert config == CONFIG
    assert len(tokenizer) == 150
    assert [(name, revision) for name, revision, _ in asked] == [('someone/model', 'abc'), ('someone/model', 'commit')]
    assert {path.name for path in repository.iterdir()} - {path.name for path in commit.iterdir()} == {
        'pytorch_model.bin',
        'modeling.py',
        'consolidated.safetensors',
        'weights.pt',
    }


def test_weights_of_a_hub_model_are_those_that_its_index_names(hub, params):
    repository, _, _ = hub
    index = repository / 'model.safetensors.index.json'
    for file in sorted(repository.glob('model-*.safetensors')):
        number, _, count = file.stem.removeprefix('model-').partition('-of-')
        file.rename(renamed := repository / f'model.safetensors-{number}-of-{count} [1].safetensors')
        index.write_text(index.read_text().replace(file.name, renamed.name))
    assert_equal_trees(without_padding(load_model('someone/model')[1], CONFIG), without_padding(params, CONFIG))
    index.write_text(index.read_text().replace('[1].safetensors', '[1].bin'))
    with pytest.raises(ValueError, match=r'index\.json: weight_map: expected an object of names to files'):
        load_model('someone/model')


# The terminal token.


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize(('vocab_size', 'num_rows'), [(128, 129), (150, 151), (150, 148)])
def test_resize_vocabulary(tied, vocab_size, num_rows):
    config = TransformerConfig(**{**CONFIG.__dict__, 'vocab_size': vocab_size, 'tied_embedding': tied})
    host = random_params(config)
    device = jax.tree.map(jnp.array, host)
    before = jax.tree.map(np.array, host)
    for params in (host, device):
        resized, new_config = resize_vocabulary(params, config, num_rows, copy_from=7)
        assert new_config.vocab_size == max(vocab_size, num_rows)
        for name in {'embedding', 'head'} & set(params['decoder']):
            rows = np.asarray(resized['decoder'][name])
            assert rows.shape == (new_config.padded_vocab_size, 16)
            expected = before['decoder'][name]
            np.testing.assert_array_equal(rows[num_rows - 1], expected[7])
            kept = [i for i in range(vocab_size) if i != num_rows - 1]
            np.testing.assert_array_equal(rows[kept], expected[kept])
        assert_equal_trees(jax.tree.map(np.array, params), before)  # the old params are as they were
    with pytest.raises(ValueError, match='copy_from: expected an id from 0 to'):
        resize_vocabulary(host, config, num_rows, copy_from=num_rows - 1)


def test_resized_model_exports_its_new_row(tmp_path, params):
    resized, config = resize_vocabulary(params, CONFIG, 151, copy_from=3)
    export(resized, config, tokenizer_of(150), tmp_path / 'model')
    config, loaded, _ = load_model(str(tmp_path / 'model'))
    assert config.vocab_size == 151
    np.testing.assert_array_equal(loaded['decoder']['head'][150], params['decoder']['head'][3])


def test_export_tool(folder, tmp_path):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[3] / 'tools'))
    try:
        import export as tool
    finally:
        sys.path.pop(0)
    tokenizer_of(150).save_pretrained(folder)
    (folder / 'generation_config.json').write_text('{"top_p": 0.5}')
    tool.main([f'--source={folder}', f'--output={tmp_path / "out"}', '--dtype=bfloat16'])
    assert read_generation_config(tmp_path / 'out') == {'top_p': 0.5}
    assert {a.dtype.name for a in load_file(tmp_path / 'out' / 'model.safetensors').values()} == {'bfloat16'}
    config, _, tokenizer = load_model(str(tmp_path / 'out'))
    assert (config, len(tokenizer)) == (CONFIG, 150)
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match='expected no such folder'):
        tool.main([f'--source={folder}', f'--output={tmp_path / "out"}'])
