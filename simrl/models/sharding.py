"""Where arrays live: a mesh of two axes, and rule lists from the parameters' logical axes to it.

1. A mesh has the axes `data` (rows of a batch; in training also parameters, FSDP) and `model` (tensor parallel).
2. Every parameter names its dimensions by logical axes (in `transformer.py`, beside its shape).
3. A rule list says on which mesh axis each logical axis lies. A parameter whose axis has no rule is an error.

The axes are Auto: XLA places the intermediate arrays and inserts the communication. So the program is the same on one
device, eight, or several processes.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simrl.models import layouts, lora
from simrl.models.transformer import Params, TransformerConfig, init_boxed_params, init_head

Rules = tuple[tuple[str, str | None], ...]

# Both lists split the same dimensions on `model`, so that going from one to the other only gathers over `data`.
_TENSOR_PARALLEL: Rules = (
    ('vocab', 'model'),
    ('heads', 'model'),
    ('kv_heads', 'model'),
    ('mlp', 'model'),
    ('head_dim', None),
    ('norm', None),
    ('layers', None),
    ('rank', None),  # of LoRA
)
TRAINING_RULES: Rules = (*_TENSOR_PARALLEL, ('embed', 'data'))  # FSDP: gathered layer by layer where used
SAMPLING_RULES: Rules = (*_TENSOR_PARALLEL, ('embed', None))  # a weight gathered per token would cost more than it does

_HEAD_AXES: Mapping[str, tuple[str, ...]] = {'kernel': ('norm',), 'bias': ()}  # small: whole on every device


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices.

    Args:
        devices: those to use; None for all of all processes. Their number must be `data * model`.
    """
    num_devices = jax.device_count() if devices is None else len(devices)
    if data < 1 or model < 1 or data * model != num_devices:
        raise ValueError(f'mesh: expected data * model = {num_devices} devices, found data={data}, model={model}')
    return jax.make_mesh((data, model), ('data', 'model'), (AxisType.Auto, AxisType.Auto), devices=devices)


def _boxed_params(config: TransformerConfig) -> Params:
    return jax.eval_shape(functools.partial(init_boxed_params, config=config), jax.random.key(0))


def logical_axes(config: TransformerConfig, heads: Sequence[str] = (), adapters: Sequence[str] = ()) -> Params:
    """A tree like the params whose leaves are tuples of logical axis names, one per dimension.

    Args:
        heads: which of 'value_head' and 'reward_head' the params have.
        adapters: which weights have adapters (`lora.TARGETS`); they are split as the weights are.
    """
    boxed = _boxed_params(config)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731

    def axes(path: Any, leaf: Any) -> tuple[str, ...]:
        if not is_box(leaf):
            raise ValueError(f'parameter {jax.tree_util.keystr(path)} has no logical axes')
        return tuple(leaf.names)

    tree = jax.tree_util.tree_map_with_path(axes, boxed, is_leaf=is_box)
    if adapters:
        layers = tree['decoder']['layers']
        tree['adapters'] = {name: lora.adapter_dims(name, layers[name], 'rank') for name in adapters}
        tree['adapter_scale'] = ()
    return tree | {head: dict(_HEAD_AXES) for head in heads}


def param_shardings(
    config: TransformerConfig, mesh: Mesh, rules: Rules, heads: Sequence[str] = (), adapters: Sequence[str] = ()
) -> Params:
    """A tree of `NamedSharding` like the params, with these heads and adapters.

    Key/value heads that `model` does not divide are whole on every device of that axis. Any other dimension must
    divide evenly.

    Raises:
        ValueError: a logical axis with no rule or with two, or a dimension that its mesh axis does not divide.
    """
    names = [name for name, _ in rules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'sharding rules: expected one rule per logical axis, found two for {twice[0]!r}')
    table = dict(rules)
    sizes = {
        'vocab': ('the padded vocab_size', config.padded_vocab_size),
        'embed': ('model_dim', config.model_dim),
        'heads': ('num_heads', config.num_heads),
        'kv_heads': ('num_kv_heads', config.num_kv_heads),
        'head_dim': ('head_dim', config.head_dim),
        'mlp': ('mlp_dim', config.mlp_dim),
        'norm': ('model_dim', config.model_dim),
        'layers': ('num_layers', config.num_layers),
    }

    def mesh_axis(path: Any, axis: str) -> str | None:
        if axis not in table:
            raise ValueError(f'parameter {jax.tree_util.keystr(path)}: no sharding rule for its logical axis {axis!r}')
        target = table[axis]
        if target is None:
            return None
        field, size = sizes[axis]
        if size % mesh.shape[target] == 0:
            return target
        if axis == 'kv_heads':
            return None
        raise ValueError(
            f'mesh axis {target!r} of {mesh.shape[target]} devices: expected a divisor of {field}={size}, which is '
            f'split over it'
        )

    def place_on_mesh(path: Any, axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(mesh_axis(path, axis) for axis in axes)))

    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place_on_mesh, logical_axes(config, heads, adapters), is_leaf=is_axes)


def layers_apart(shardings: Params, num_layers: int) -> Params:
    """The shardings of `layouts.layers_apart` of a decoder that has these."""

    def of_one(stacked: NamedSharding) -> NamedSharding:
        return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))

    return {**shardings, 'layers': (jax.tree.map(of_one, shardings['layers']),) * num_layers}


def output_major(shardings: Params) -> Params:
    """The shardings of `layouts.output_major` of a decoder, its layers apart, that has these."""

    def inputs_last(sharding: NamedSharding, inputs: int) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[inputs:], *sharding.spec[:inputs]))

    return layouts.output_major(shardings, inputs_last)


def init_sharded(
    key: jax.Array, config: TransformerConfig, mesh: Mesh, rules: Rules, heads: Sequence[str] = ()
) -> Params:
    """Random float32 params, made in their shards; the same numbers on every mesh. Heads are zero."""

    def init(key: jax.Array) -> Params:
        return nn.meta.unbox(init_boxed_params(key, config)) | {head: init_head(config) for head in heads}

    return jax.jit(init, out_shardings=param_shardings(config, mesh, rules, heads))(key)


def shard(tree: Any, shardings: Any) -> Any:
    """New arrays on devices by a tree of shardings, each device its shards; the given arrays stay good.

    Arrays that lie on the shardings' devices go from shards to shards: nothing holds them whole that did not. All
    others, which must be the same in every process, go by way of the host.
    """
    leaves, targets = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    stays = [
        isinstance(array, jax.Array) and array.sharding.device_set == target.device_set
        for array, target in zip(leaves, targets, strict=True)
    ]

    # By a compiled copy: `device_put` reshards by way of the host, and may share memory with what it was given.
    copy = jax.jit(
        lambda arrays: [jnp.copy(array) for array in arrays], out_shardings=list(itertools.compress(targets, stays))
    )
    resharded = iter(copy(list(itertools.compress(leaves, stays))))

    def put(array: Any, target: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, target, lambda index: host[index])

    placed = [
        next(resharded) if there else put(array, target)
        for array, target, there in zip(leaves, targets, stays, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shardings), placed)


def shard_local_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch onto the mesh, its rows split over `data`.

    Args:
        batch: a tree of host arrays `[rows, ...]`, this process's part of the batch.

    Returns:
        The tree of global arrays: the rows of all processes, in their order.
    """
    rows = NamedSharding(mesh, PartitionSpec('data'))
    local = mesh.local_mesh.shape['data']

    def put(path: Any, array: Any) -> jax.Array:
        host = np.asarray(array)
        if host.ndim == 0 or host.shape[0] % local:
            raise ValueError(
                f'batch{jax.tree_util.keystr(path)}: expected a number of rows that is a multiple of {local} (the '
                f"mesh's data axis in this process), found shape {list(host.shape)}"
            )
        return jax.make_array_from_process_local_data(rows, host)

    return jax.tree_util.tree_map_with_path(put, batch)


def state_shardings(state: Any, params: Params, shardings: Params) -> Any:
    """Shardings of a training state, in which copies of the params (the optimizer's moments) lie as the params do.

    A leaf belongs to a parameter when its path ends with the parameter's path and it has its shape; all others (steps,
    counts) are whole on every device.

    Args:
        state: a tree of arrays or shapes (of `jax.eval_shape`).
        params: the params' arrays or shapes, and
        shardings: their shardings, all on one mesh.
    """
    flat_shardings = jax.tree.leaves(shardings)
    targets = [
        (_keys(path), leaf.shape, sharding)
        for (path, leaf), sharding in zip(jax.tree_util.tree_flatten_with_path(params)[0], flat_shardings, strict=True)
    ]
    whole = NamedSharding(flat_shardings[0].mesh, PartitionSpec())

    def find(path: Any, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for target, shape, sharding in targets:
            if keys[-len(target) :] == target and leaf.shape == shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(find, state)


def _keys(path: Any) -> tuple[str, ...]:
    """A tree path as plain names, whether its nodes are dicts, dataclasses or tuples."""
    return tuple(str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry)))) for entry in path)
