"""Hugging Face `config.json` <-> `TransformerConfig`.

Only settings that this decoder computes are accepted. Every setting of the known families that changes the function is
checked: a model is either computed correctly or refused with the field's name.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from simrl.models.layouts import MATRICES
from simrl.models.transformer import RopeScaling, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Structure that a `model_type` gives the decoder, and the settings of config.json that change it."""

    architecture: str  # transformers' class
    norm_placement: Literal['before', 'after'] = 'before'
    qk_norm: Literal['none', 'head', 'all_heads'] = 'none'
    biases: tuple[str, ...] = ()  # matrices that always have a bias
    bias_fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # that give matrices a bias
    windows: Literal['none', 'all', 'by_layer'] = 'none'  # layers with `sliding_window`; by_layer: fields decide
    norm_epsilon: float = 1e-6  # default of `rms_norm_eps`
    required: tuple[str, ...] = ()  # fields whose default would be that of a large model


_QKV = ('query', 'key', 'value')
_ATTENTION_BIAS = {'attention_bias': (*_QKV, 'output')}
_LARGE_MODEL = ('num_key_value_heads',)
FAMILIES: Mapping[str, Family] = {
    'llama': Family('LlamaForCausalLM', bias_fields=_ATTENTION_BIAS | {'mlp_bias': ('gate', 'up', 'down')}),
    'mistral': Family('MistralForCausalLM', windows='all', required=_LARGE_MODEL),
    'qwen2': Family('Qwen2ForCausalLM', biases=_QKV, windows='by_layer', required=_LARGE_MODEL),
    'qwen3': Family(
        'Qwen3ForCausalLM',
        qk_norm='head',
        bias_fields=_ATTENTION_BIAS,
        windows='by_layer',
        required=(*_LARGE_MODEL, 'head_dim'),
    ),
    'olmo2': Family(
        'Olmo2ForCausalLM',
        norm_placement='after',
        qk_norm='all_heads',
        bias_fields=_ATTENTION_BIAS,
        norm_epsilon=1e-5,
    ),
}

# Optional settings with the values that the decoder computes, in every family.
_ONLY: dict[str, tuple[Any, ...]] = {
    'hidden_act': ('silu', 'swish'),  # two names of one function
    'pretraining_tp': (1, None),
    'partial_rotary_factor': (1, 1.0, None),
    'quantization_config': (None,),
    'is_encoder_decoder': (False, None),
    'add_cross_attention': (False, None),
    'tie_encoder_decoder': (False, None),
}
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_WINDOW, _DEFAULT_FIRST_WINDOWED_LAYER = 4096, 28
_FULL, _SLIDING = 'full_attention', 'sliding_attention'


def config_from_json(fields: Mapping[str, Any], file: str | os.PathLike[str] = 'config.json') -> TransformerConfig:
    """Converts a parsed Hugging Face `config.json` of transformers 4 or 5.

    Args:
        fields: the parsed JSON object.
        file: named in errors.

    Raises:
        ValueError: an unknown `model_type`, a missing or wrongly typed field, or a setting that this decoder does not
            compute (sliding windows of some layers, other activations, RoPE types, biases, quantization).
    """

    def wrong(field: str, expected: str, found: Any) -> ValueError:
        return ValueError(f'{file}: {field}: expected {expected}, found {found!r}')

    family = FAMILIES.get(str(fields.get('model_type')))
    if family is None:
        raise wrong('model_type', f'one of {", ".join(FAMILIES)}', fields.get('model_type'))
    settings = _Settings(fields, wrong)
    for field, allowed in _ONLY.items():
        if field in fields and fields[field] not in allowed:
            raise wrong(field, ' or '.join(repr(value) for value in allowed), fields[field])
    biases = set(family.biases)
    for field in ('attention_bias', 'mlp_bias'):
        if settings.flag(field, known=field in family.bias_fields):
            biases |= set(family.bias_fields[field])

    model_dim, num_heads, max_positions = (
        settings.count(field) for field in ('hidden_size', 'num_attention_heads', 'max_position_embeddings')
    )
    for field in family.required:
        settings.count(field)
    if fields.get('head_dim') is None and model_dim % num_heads:
        raise wrong('head_dim', 'a number', None)
    tied = fields.get('tie_word_embeddings', False)
    if not isinstance(tied, bool):
        raise wrong('tie_word_embeddings', 'true or false', tied)
    num_layers = settings.count('num_hidden_layers')
    theta, scaling = _rope(fields, wrong)
    return TransformerConfig(
        vocab_size=settings.count('vocab_size'),
        model_dim=model_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=settings.count('num_key_value_heads', num_heads),
        head_dim=settings.count('head_dim', model_dim // num_heads),
        mlp_dim=settings.count('intermediate_size'),
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_sliding_window(settings, family, num_layers, max_positions),
        norm_epsilon=float(settings.number('rms_norm_eps', family.norm_epsilon)),
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        biases=tuple(name for name in MATRICES if name in biases),
        tied_embedding=tied,
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Typed access to the fields of a config; null is a missing field."""

    fields: Mapping[str, Any]
    wrong: Callable[[str, str, Any], ValueError]

    def number(self, field: str, default: int | float | None = None) -> int | float:
        value = self.fields.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.wrong(field, 'a number', value)
        return value

    def count(self, field: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.number(field, default)
        if not isinstance(value, int) or value < least:
            raise self.wrong(field, f'a whole number of at least {least}', value)
        return value

    def flag(self, field: str, *, known: bool) -> bool:
        """Reads a setting that is off unless stated; a family that does not know it must not state it."""
        value, expected = self.fields.get(field), (True, False, None) if known else (False, None)
        if not any(value is allowed for allowed in expected):
            raise self.wrong(field, ' or '.join(map(repr, expected)), value)
        return bool(value)


def _sliding_window(settings: _Settings, family: Family, num_layers: int, max_positions: int) -> int | None:
    """Reads the window of all layers; None if no layer has one, or it holds every position."""
    fields, window = settings.fields, None
    used = settings.flag('use_sliding_window', known=family.windows == 'by_layer') or family.windows == 'all'
    if used and fields.get('sliding_window', _DEFAULT_WINDOW) is not None:
        window = settings.count('sliding_window', _DEFAULT_WINDOW)
    kinds = fields.get('layer_types') or []
    if not isinstance(kinds, list) or (kinds and len(kinds) != num_layers):
        raise settings.wrong('layer_types', f'a list with one entry for each of the {num_layers} layers', kinds)
    known = {_FULL, _SLIDING} if window is not None and family.windows == 'by_layer' else {_FULL}
    if others := sorted(set(map(str, kinds)) - known):
        raise settings.wrong('layer_types', f'{" or ".join(map(repr, sorted(known)))} in every layer', others)
    if window is None or window >= max_positions:
        return None
    if family.windows == 'all':
        return window
    first = settings.count('max_window_layers', _DEFAULT_FIRST_WINDOWED_LAYER, least=0)
    windowed = [kind == _SLIDING for kind in kinds] or [layer >= first for layer in range(num_layers)]
    if any(windowed) and not all(windowed):
        raise settings.wrong(
            'layer_types' if kinds else 'max_window_layers',
            f'sliding_window={window}, less than max_position_embeddings={max_positions}, in all layers or in none',
            f'it in {sum(windowed)} of {num_layers}',
        )
    return window if any(windowed) else None


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

    def positive(source: Mapping[str, Any], name: str, field: str) -> int | float:
        value = source.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise wrong(name, 'a number above 0', value)
        return value

    thetas = {
        positive(source, 'rope_theta', 'rope_theta')
        for source in (fields, block)
        if source.get('rope_theta') is not None
    }
    if len(thetas) > 1:
        raise wrong('rope_theta', 'one value', sorted(thetas))
    theta = next(iter(thetas), _DEFAULT_ROPE_THETA)

    kind = block.get('rope_type', block.get('type', 'default'))
    known = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}
    if block.get('partial_rotary_factor', 1.0) != 1.0:
        raise wrong(f'{name}.partial_rotary_factor', '1.0', block['partial_rotary_factor'])
    if kind == 'default':
        scaling = None
    elif kind == 'llama3':
        scaling_fields = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
        known |= set(scaling_fields)
        factor, low, high, original = (positive(block, f'{name}.{field}', field) for field in scaling_fields)
        if not low < high:
            raise wrong(f'{name}.high_freq_factor', f'more than low_freq_factor={low}, both above 0', high)
        scaling = RopeScaling(float(factor), float(low), float(high), int(original))
    else:
        raise wrong(f'{name}.rope_type', "'default' or 'llama3'", kind)
    if set(block) - known:
        raise wrong(name, f'the fields {", ".join(sorted(known))}', sorted(set(block) - known))
    return float(theta), scaling


def config_to_json(config: TransformerConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """Makes the `config.json` object of transformers 5 for a model with `vocab_size` rows stored in `dtype`.

    The family is the first whose `config.json` reads back as this config: Mistral without a window is a Llama.
    """
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
    for model_type, family in FAMILIES.items():
        own: dict[str, Any] = {'model_type': model_type, 'architectures': [family.architecture]}
        own |= {field: set(names) <= set(config.biases) for field, names in family.bias_fields.items()}
        if family.windows != 'none':
            own['sliding_window'] = config.sliding_window
        if family.windows == 'by_layer':
            own['use_sliding_window'] = config.sliding_window is not None
            own['max_window_layers'] = 0 if config.sliding_window else config.num_layers
        if config_from_json(fields | own) == dataclasses.replace(config, vocab_size=vocab_size):
            return fields | own
    raise ValueError(f'TransformerConfig: no family of {", ".join(FAMILIES)} has the structure of {config}')


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
