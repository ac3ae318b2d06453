"""Sharding of parameters, batches and training states over a mesh of two axes.

1. A mesh has the axes `data` (rows of a batch; in training also parameters, FSDP) and `model` (tensor parallel).
2. Every parameter names its dimensions by logical axes (in `transformer.py`, beside its shape).
3. A rule list maps logical axes to mesh axes. A parameter whose axis has no rule is an error.

The axes are Auto: XLA places intermediate arrays and inserts communication, so the program is the same on one device,
eight, or several processes.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simrl.models import layouts, lora
from simrl.models.transformer import Params, TransformerConfig, init_boxed_params, init_head

Rules = tuple[tuple[str, str | None], ...]

# Both lists shard the same dimensions over `model`, so resharding from one to the other only gathers over `data`.
_TENSOR_PARALLEL: Rules = (
    ('vocab', 'model'),
    ('heads', 'model'),
    ('kv_heads', 'model'),
    ('mlp', 'model'),
    ('head_dim', None),
    ('norm', None),
    ('layers', None),
    ('rank', None),  # LoRA's rank
)
TRAINING_RULES: Rules = (*_TENSOR_PARALLEL, ('embed', 'data'))  # FSDP: weights are gathered layer by layer
SAMPLING_RULES: Rules = (*_TENSOR_PARALLEL, ('embed', None))  # no gather per token

_HEAD_AXES: Mapping[str, tuple[str, ...]] = {'kernel': ('norm',), 'bias': ()}  # heads are small: replicated


def make_mesh(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of `data` x `model` devices. Those of `model` are close together: in a line, a block, or one host.

    Args:
        devices: `data * model` devices; None for all devices of all processes. TPUs that form no block, such as a part
            of each host's, keep their order.

    Raises:
        ValueError: another number of devices, TPUs of several slices, or TPUs of a flat slice that form no block.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1 or model < 1 or data * model != len(devices):
        raise ValueError(f'mesh: expected data * model = {len(devices)} devices, found data={data}, model={model}')
    slices = {getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'}
    if len(slices) > 1:
        raise ValueError(f'mesh: expected TPUs of one slice, found those of {len(slices)}')
    if devices[0].platform == 'tpu' and not _form_block(devices):
        if devices[0].device_kind.endswith('lite'):  # v5e and v6e, for parts of which XLA compiles no program
            raise ValueError(f'mesh: expected TPUs that fill a block of their slice, found {len(devices)} that do not')
        return Mesh(np.asarray(devices).reshape(data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    # `jax.make_mesh` splits a side of a slice between both axes on v5e alone, so that a v6e:8x8 would be no 16x4; and
    # it refuses the GPUs of several hosts.
    laid_out = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(laid_out, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def _form_block(devices: Sequence[jax.Device]) -> bool:
    """True if TPUs fill a block of their slice, as JAX needs of those that it lays out."""
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return bool(np.prod(places.max(axis=0) - places.min(axis=0) + 1) == len(devices))


@functools.cache  # a model is traced for it
def _boxed_params(config: TransformerConfig) -> Params:
    return jax.eval_shape(functools.partial(init_boxed_params, config=config), jax.random.key(0))


def logical_axes(config: TransformerConfig, heads: Sequence[str] = (), adapters: Sequence[str] = ()) -> Params:
    """Makes a tree like the params whose leaves are tuples of logical axis names, one per dimension.

    Args:
        heads: names of the params' heads ('value_head', 'reward_head').
        adapters: names of the weights with adapters (`lora.TARGETS`), which are sharded like the weights.
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
    """Makes a tree of `NamedSharding` like the params, with these heads and adapters.

    Key/value heads are replicated over `model` if it does not divide them. Any other dimension must divide evenly.

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
            f'mesh.{target}: expected a divisor of {field}={size}, which is sharded over it, found {mesh.shape[target]}'
        )

    def sharding_of(path: Any, axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(mesh_axis(path, axis) for axis in axes)))

    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree_util.tree_map_with_path(sharding_of, logical_axes(config, heads, adapters), is_leaf=is_axes)


def layers_apart(shardings: Params, num_layers: int) -> Params:
    """Shardings for the result of `layouts.layers_apart`, from those of its argument."""

    def one_layer(stacked: NamedSharding) -> NamedSharding:
        return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))

    return {**shardings, 'layers': (jax.tree.map(one_layer, shardings['layers']),) * num_layers}


def output_major(shardings: Params) -> Params:
    """Shardings for the result of `layouts.output_major`, from those of its argument."""

    def inputs_last(sharding: NamedSharding, inputs: int) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[inputs:], *sharding.spec[:inputs]))

    return layouts.output_major(shardings, inputs_last)


def flat(shardings: Params) -> Params:
    """Shardings for the result of `layouts.flat`, from those of its argument: of joined dimensions, the first one's."""

    def as_matrix(sharding: NamedSharding, inputs: int) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[inputs], sharding.spec[0]))

    return layouts.flat(shardings, as_matrix)


def init_sharded(
    key: jax.Array, config: TransformerConfig, mesh: Mesh, rules: Rules, heads: Sequence[str] = ()
) -> Params:
    """Initialises random float32 params in their shards, equal on every mesh but for rounding. Heads are zero."""
    return _initialiser(config, mesh, rules, tuple(heads))(key)


@functools.cache  # each stage of an experiment initialises the same models
def _initialiser(
    config: TransformerConfig, mesh: Mesh, rules: Rules, heads: tuple[str, ...]
) -> Callable[[jax.Array], Params]:
    def init(key: jax.Array) -> Params:
        return nn.meta.unbox(init_boxed_params(key, config)) | {head: init_head(config) for head in heads}

    return jax.jit(init, out_shardings=param_shardings(config, mesh, rules, heads))


@functools.cache
def _copier(shardings: tuple[NamedSharding, ...]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """A compiled copy: `device_put` reshards through the host, and its result may share memory with its argument."""
    return jax.jit(lambda arrays: [jnp.copy(array) for array in arrays], out_shardings=list(shardings))


def shard(tree: Any, shardings: Any) -> Any:
    """Copies a tree of arrays to devices by a tree of shardings; the given arrays remain valid.

    Arrays on the shardings' devices are resharded without ever being whole on one device. Other arrays, which must be
    equal in every process, go through the host.
    """
    leaves, targets = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    stays = [
        isinstance(array, jax.Array) and array.sharding.device_set == target.device_set
        for array, target in zip(leaves, targets, strict=True)
    ]

    copy = _copier(tuple(itertools.compress(targets, stays)))
    resharded = iter(copy(list(itertools.compress(leaves, stays))))

    def put(array: Any, target: NamedSharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, target, lambda index: host[index])

    placed = [
        next(resharded) if there else put(array, target)
        for array, target, there in zip(leaves, targets, stays, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shardings), placed)


def state_shardings(state: Any, params: Params, shardings: Params) -> Any:
    """Makes shardings for a training state: the optimizer's moments are sharded like the params.

    A leaf gets a parameter's sharding if its path ends with the parameter's path and the shapes agree. All other leaves
    (steps, counts) are replicated.

    Args:
        state: a tree of arrays or shapes (of `jax.eval_shape`).
        params: arrays or shapes of the params.
        shardings: of the params, all on one mesh.
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
    """Names along a tree path through dicts, dataclasses and tuples."""
    return tuple(str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry)))) for entry in path)
