"""The table of tensor names and layouts of Hugging Face checkpoints.

Reading (`huggingface.py`) and writing (`export.py`) both follow it. RoPE is half-split on both sides, so nothing is
permuted.
"""

import dataclasses
import math
from collections.abc import Mapping

from simrl.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """Name and layout of one array of ours in a Hugging Face checkpoint.

    Layouts use the dimension letters of `transformer.py`. `stored` has a word per dimension of the file's tensor: 'NH
    D' is a matrix of N * H rows and D columns. `ours` has a letter per dimension of our array, without layers.
    """

    name: str  # tensor name in the file; '{layer}' stands for the layer's number
    path: tuple[str, ...]  # keys below params['decoder']
    stored: str
    ours: str

    @property
    def stacked(self) -> bool:
        return '{layer}' in self.name


# Matrices of a layer: module in the file, rows (outputs) and columns (inputs).
_MATRICES = {
    'query': ('self_attn.q_proj', 'NH', 'D'),
    'key': ('self_attn.k_proj', 'KH', 'D'),
    'value': ('self_attn.v_proj', 'KH', 'D'),
    'output': ('self_attn.o_proj', 'D', 'NH'),
    'gate': ('mlp.gate_proj', 'F', 'D'),
    'up': ('mlp.up_proj', 'F', 'D'),
    'down': ('mlp.down_proj', 'D', 'F'),
}


def weight_table(config: TransformerConfig) -> tuple[Row, ...]:
    """Lists a row for every array of a model of this config."""

    def layer(name: str, ours_name: str, stored: str, ours: str) -> Row:
        return Row('model.layers.{layer}.' + name, ('layers', ours_name), stored, ours)

    norms = {
        'before': ('input_layernorm', 'post_attention_layernorm'),
        'after': ('post_attention_layernorm', 'post_feedforward_layernorm'),
    }[config.norm_placement]
    rows = [
        Row('model.embed_tokens.weight', ('embedding',), 'V D', 'VD'),
        Row('model.norm.weight', ('final_norm',), 'D', 'D'),
        *(layer(f'{n}.weight', ours, 'D', 'D') for n, ours in zip(norms, ('attention_norm', 'mlp_norm'), strict=True)),
    ]
    for ours, (name, outputs, inputs) in _MATRICES.items():
        rows.append(layer(f'{name}.weight', ours, f'{outputs} {inputs}', inputs + outputs))
        if ours in config.biases:
            rows.append(layer(f'{name}.bias', f'{ours}_bias', outputs, outputs))
    if config.qk_norm != 'none':
        query, key = {'head': ('H', 'H'), 'all_heads': ('NH', 'KH')}[config.qk_norm]
        rows += [
            layer('self_attn.q_norm.weight', 'query_norm', query, query),
            layer('self_attn.k_norm.weight', 'key_norm', key, key),
        ]
    if not config.tied_embedding:
        rows.append(Row('lm_head.weight', ('head',), 'V D', 'VD'))
    return tuple(rows)


def axis_sizes(config: TransformerConfig, vocab_size: int) -> dict[str, int]:
    """Sizes of the table's dimension letters, for a vocabulary of `vocab_size` rows."""
    return {
        'D': config.model_dim,
        'N': config.num_heads,
        'K': config.num_kv_heads,
        'H': config.head_dim,
        'F': config.mlp_dim,
        'V': vocab_size,
    }


def tensor_names(row: Row, config: TransformerConfig) -> list[str]:
    """Names of a row's tensors in the file; one per layer if it is stacked."""
    return [row.name.format(layer=layer) for layer in range(config.num_layers)] if row.stacked else [row.name]


def stored_shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a row's tensors in the file."""
    return tuple(math.prod(sizes[letter] for letter in word) for word in row.stored.split())


def array_shape(row: Row, config: TransformerConfig) -> tuple[int, ...]:
    """Shape of a row's array in the params tree: stacked over layers, with a padded vocabulary."""
    sizes = axis_sizes(config, config.padded_vocab_size)
    return (config.num_layers,) * row.stacked + tuple(sizes[letter] for letter in row.ours)
