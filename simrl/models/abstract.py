"""Arrays that are not there: the shapes, dtypes and shards of a model's, and the bytes that they take of a device."""

import functools
import math
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.models import sharding, transformer
from simrl.models.cache import Cache, extended, heads_of_cache
from simrl.models.transformer import Params, TransformerConfig

_Tree = TypeVar('_Tree')

ITEM_BYTES = {'float32': 4, 'bfloat16': 2}
LOGITS = 3  # arrays of a chunk's logits, float32, in a gradient: tempered, as probabilities, their gradient


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays in their shards."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s, weak_type=x.weak_type), shapes, shardings
    )


def by_rows(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays, sharded by their rows over `data`; single numbers whole."""
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('data',), ()))
    return placed(tree, jax.tree.map(lambda x: rows if x.shape else whole, tree))


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(_shard_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard_size(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape)


def params_of(
    config: TransformerConfig, mesh: Mesh, rules: sharding.Rules, *, heads: tuple[str, ...] = (), dtype: str = 'float32'
) -> Params:
    """Parameters of a model: `{'decoder', heads}`, the decoder in `dtype`, heads in float32."""

    shapes = _shapes(config, heads)
    decoder = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes['decoder'])
    return placed(shapes | {'decoder': decoder}, sharding.param_shardings(config, mesh, rules, heads))


@functools.cache  # a model is traced for it
def _shapes(config: TransformerConfig, heads: tuple[str, ...]) -> Params:
    def make() -> Params:
        params = transformer.init_params(jax.random.key(0), config)
        return params | {head: transformer.init_head(config) for head in heads}

    shapes: Params = jax.eval_shape(make)
    return shapes


def cache_bytes(config: TransformerConfig, dtype: str, *, rows: int, tokens: int, mesh: Mesh) -> int:
    """Bytes on a device of the keys and values of one view of `rows` conversations, split over the mesh's `data`.

    Heads are repeated where `model` does not divide them otherwise (`cache.heads_of_cache`).
    """
    data, model = mesh.shape['data'], mesh.shape['model']
    heads = heads_of_cache(config.num_heads, config.num_kv_heads, model)
    own = heads if heads % model else heads // model
    return 2 * config.num_layers * own * config.head_dim * -(-rows // data) * tokens * ITEM_BYTES[dtype]


def activation_bytes(
    config: TransformerConfig,
    *,
    rows: int,
    tokens: int,
    item: int,
    remat: Literal['none', 'dots', 'full'],
    scores: bool,
    logits: int,
    model: int = 1,
) -> int:
    """About the bytes that a gradient keeps of its forward pass on a device, within a factor of two.

    For each token and layer what the backward pass reads (six vectors of the model's width, four of the heads', four of
    the MLP's), of one layer only where `remat` recomputes it: 'full' keeps a vector of the others, and 'dots' what
    their matrices give as well; and `LOGITS` arrays of a chunk's logits, float32.

    Args:
        rows: on the device.
        tokens: of a row.
        item: bytes of a number.
        scores: True if attention has the scores of whole rows: two of a layer are kept, for each head.
        logits: positions whose logits exist at once.
        model: devices that heads, MLP and vocabulary are split over.
    """
    c = config
    split = 4 * c.num_heads * c.head_dim + 4 * c.mlp_dim + (2 * c.num_heads * tokens if scores else 0)
    wide = 6 * c.model_dim + split // model
    given = 2 * c.model_dim + ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * c.mlp_dim) // model
    kept = {
        'none': c.num_layers * wide,
        'dots': wide + c.num_layers * (c.model_dim + given),
        'full': wide + c.num_layers * c.model_dim,
    }[remat]
    return rows * tokens * kept * item + min(logits, rows * tokens) * LOGITS * 4 * c.vocab_size // model


def with_rows(tree: _Tree, number: int) -> _Tree:
    """Abstract arrays with another number of rows, in the same shards."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype, sharding=x.sharding, weak_type=x.weak_type),
        tree,
    )


def with_room(cache: Cache, room: int) -> Cache:
    """An abstract cache with room for so many tokens, in the same shards."""
    shapes = jax.eval_shape(functools.partial(extended, capacity=room), cache)
    return jax.tree.map(lambda x, old: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=old.sharding), shapes, cache)
