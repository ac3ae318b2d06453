"""Hugging Face `config.json` <-> `TransformerConfig`.

Only settings that this decoder computes are accepted. Every setting of the known families that changes the function is
checked: a model is either computed correctly or refused with the field's name.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simrl.models.transformer import RopeScaling, TransformerConfig

KNOWN_MODEL_TYPES = ('llama', 'mistral', 'qwen2', 'qwen3')

# Optional settings with the values that the decoder computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    'hidden_act': ('silu', 'swish'),  # two names of one function
    'attention_bias': (False, None),  # of query, key, value and output; Qwen2's biases follow from its model_type
    'mlp_bias': (False, None),
    'use_sliding_window': (False, None),
    'pretraining_tp': (1, None),
    'partial_rotary_factor': (1, 1.0, None),
    'quantization_config': (None,),
    'is_encoder_decoder': (False, None),
    'add_cross_attention': (False, None),
    'tie_encoder_decoder': (False, None),
}

# Defaults of transformers for missing fields, equal in all known families.
_DEFAULTS: dict[str, Any] = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False}
_DEFAULT_ROPE_THETA = 10_000.0


def config_from_json(fields: Mapping[str, Any], file: str | os.PathLike[str] = 'config.json') -> TransformerConfig:
    """Converts a parsed Hugging Face `config.json` of transformers 4 or 5.

    Args:
        fields: the parsed JSON object.
        file: named in errors.

    Raises:
        ValueError: an unknown `model_type`, a missing or wrongly typed field, or a setting that this decoder does not
            compute (sliding windows below the model's positions, other activations, RoPE types, biases, quantization).
    """

    def wrong(field: str, expected: str, found: Any) -> ValueError:
        return ValueError(f'{file}: {field}: expected {expected}, found {found!r}')

    model_type = fields.get('model_type')
    if model_type not in KNOWN_MODEL_TYPES:
        raise wrong('model_type', f'one of {", ".join(KNOWN_MODEL_TYPES)}', model_type)
    for field, allowed in _ONLY.items():
        if field in fields and fields[field] not in allowed:
            raise wrong(field, ' or '.join(repr(value) for value in allowed), fields[field])
    other_layers = sorted(set(fields.get('layer_types') or ()) - {'full_attention'})
    if other_layers:
        raise wrong('layer_types', "'full_attention' in every layer", other_layers)

    def number(field: str, default: int | float | None = None) -> int | float:
        value = fields.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(field, 'a number', value)
        return value

    def count(field: str, default: int | None = None) -> int:
        value = number(field, default)
        if not isinstance(value, int) or value < 1:
            raise wrong(field, 'a whole number of at least 1', value)
        return value

    model_dim, num_heads, max_positions = (
        count(field) for field in ('hidden_size', 'num_attention_heads', 'max_position_embeddings')
    )
    # Mistral has no `use_sliding_window`. A window of all positions has no effect.
    if model_type == 'mistral':
        window = fields.get('sliding_window', 4096)  # transformers' default
        if window is not None and window < max_positions:
            raise wrong('sliding_window', f'null or at least max_position_embeddings={max_positions}', window)

    tied = fields.get('tie_word_embeddings', _DEFAULTS['tie_word_embeddings'])
    if not isinstance(tied, bool):
        raise wrong('tie_word_embeddings', 'true or false', tied)
    if fields.get('head_dim') is None and (model_type == 'qwen3' or model_dim % num_heads):
        raise wrong('head_dim', 'a number', fields.get('head_dim'))
    theta, scaling = _rope(fields, wrong)
    return TransformerConfig(
        vocab_size=count('vocab_size'),
        model_dim=model_dim,
        num_layers=count('num_hidden_layers'),
        num_heads=num_heads,
        # The other families' defaults are those of a large model, so the field is required.
        num_kv_heads=count('num_key_value_heads', num_heads if model_type == 'llama' else None),
        head_dim=count('head_dim', model_dim // num_heads),
        mlp_dim=count('intermediate_size'),
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=float(number('rms_norm_eps', _DEFAULTS['rms_norm_eps'])),
        qkv_bias=model_type == 'qwen2',
        qk_norm=model_type == 'qwen3',
        tied_embedding=tied,
    )


def _rope(fields: Mapping[str, Any], wrong: Callable[[str, str, Any], ValueError]) -> tuple[float, RopeScaling | None]:
    """Reads RoPE's base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    blocks: dict[str, Any] = {
        name: fields[name] for name in ('rope_parameters', 'rope_scaling') if fields.get(name) is not None
    }
    for name, block in blocks.items():
        if not isinstance(block, Mapping):
            raise wrong(name, 'an object', block)
    if len(blocks) == 2 and blocks['rope_parameters'] != blocks['rope_scaling']:
        raise wrong('rope_scaling', f'the same as rope_parameters={blocks["rope_parameters"]}', blocks['rope_scaling'])
    name, block = next(iter(blocks.items())) if blocks else ('rope_parameters', {})

    thetas = {source['rope_theta'] for source in (fields, block) if source.get('rope_theta') is not None}
    if len(thetas) > 1:
        raise wrong('rope_theta', 'one value', sorted(thetas))
    theta = next(iter(thetas), _DEFAULT_ROPE_THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise wrong('rope_theta', 'a number', theta)

    kind = block.get('rope_type', block.get('type', 'default'))
    known = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}
    if block.get('partial_rotary_factor', 1.0) != 1.0:
        raise wrong(f'{name}.partial_rotary_factor', '1.0', block['partial_rotary_factor'])
    if kind == 'default':
        scaling = None
    elif kind == 'llama3':
        scaling_fields = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
        known |= set(scaling_fields)
        for field in scaling_fields:
            if isinstance(block.get(field), bool) or not isinstance(block.get(field), int | float):
                raise wrong(f'{name}.{field}', 'a number', block.get(field))
        factor, low, high, original = (block[field] for field in scaling_fields)
        if not 0 < low < high:
            raise wrong(f'{name}.high_freq_factor', f'more than low_freq_factor={low}, both above 0', high)
        scaling = RopeScaling(float(factor), float(low), float(high), int(original))
    else:
        raise wrong(f'{name}.rope_type', "'default' or 'llama3'", kind)
    if set(block) - known:
        raise wrong(name, f'the fields {", ".join(sorted(known))}', sorted(set(block) - known))
    return float(theta), scaling


def config_to_json(config: TransformerConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """Makes the `config.json` object of transformers 5 for a model with `vocab_size` rows stored in `dtype`.

    QK norm makes the family Qwen3 and QKV bias makes it Qwen2; everything else is Llama. Mistral without a sliding
    window computes the same as Llama.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError('TransformerConfig: no known Hugging Face family has both qkv_bias and qk_norm')
    if config.qk_norm:
        model_type, architecture = 'qwen3', 'Qwen3ForCausalLM'
    elif config.qkv_bias:
        model_type, architecture = 'qwen2', 'Qwen2ForCausalLM'
    else:
        model_type, architecture = 'llama', 'LlamaForCausalLM'
    rope: dict[str, Any] = {'rope_theta': config.rope_theta, 'rope_type': 'default'}
    if config.rope_scaling is not None:
        rope |= {
            'rope_type': 'llama3',
            'factor': config.rope_scaling.factor,
            'low_freq_factor': config.rope_scaling.low_freq_factor,
            'high_freq_factor': config.rope_scaling.high_freq_factor,
            'original_max_position_embeddings': config.rope_scaling.original_max_positions,
        }
    fields = {
        'architectures': [architecture],
        'model_type': model_type,
        'dtype': dtype,
        'vocab_size': vocab_size,
        'hidden_size': config.model_dim,
        'intermediate_size': config.mlp_dim,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': config.num_heads,
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': config.max_positions,
        'rms_norm_eps': config.norm_epsilon,
        'rope_parameters': rope,
        'tie_word_embeddings': config.tied_embedding,
    }
    if model_type == 'llama':
        fields |= {'attention_bias': False, 'mlp_bias': False}
    else:
        fields |= {'use_sliding_window': False, 'sliding_window': None}
    return fields


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file; raises a ValueError that names the file if it contains none."""
    try:
        value = json.loads(Path(file).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{file}: expected this file, found none') from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested deeply
        raise ValueError(f'{file}: expected JSON, found: {error}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{file}: expected a JSON object, found {type(value).__name__}')
    return value
