"""Arrays that are not there: shapes, dtypes and shards of all that an RL step's programs take."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.models import lora, placement, sharding, transformer
from simrl.models.transformer import Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, Policy
from simrl.rollouts.context import Context
from simrl.rollouts.prompts import PromptRows, Prompts
from simrl.rollouts.state import Dialogue
from simrl.training.optimizer import Optimizer, TrainState, init_state
from tools.benchmark.limits import ITEM_BYTES, weights_of
from tools.compile_check.work import SIDES, Work, walk


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(_shard_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard_size(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape)


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays in their shards."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def by_rows(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays whose rows are split over `data`, as `rows.shard_rows` does; whole where it does not divide."""

    def one(x: Any) -> Any:
        split = x.shape and x.shape[0] % mesh.shape['data'] == 0
        spec = PartitionSpec('data') if split else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes)


def whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def params_of(
    config: TransformerConfig, mesh: Mesh, rules: sharding.Rules, *, heads: tuple[str, ...] = (), dtype: str = 'float32'
) -> Params:
    """Parameters of a model: `{'decoder', heads}`."""

    def make() -> Params:
        params = transformer.init_params(jax.random.key(0), config)
        return params | {head: transformer.init_head(config) for head in heads}

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), jax.eval_shape(make))
    return placed(shapes, sharding.param_shardings(config, mesh, rules, heads))


def policy_of(agent: ModelAgent | None, mesh: Mesh) -> Policy | None:
    """The agent's policy with parameters in the sampler's dtype, layout and shards, by the cast that makes them."""
    if agent is None:
        return None
    spec = agent.policy.spec
    cast = placement.for_sampling(spec.config, spec.execution.dtype, mesh)
    params = jax.eval_shape(cast, params_of(spec.config, mesh, sharding.TRAINING_RULES))
    mask = whole((spec.config.padded_vocab_size,), bool, mesh)
    return dataclasses.replace(agent.policy, params=params, token_mask=mask)


def prompts_of(work: Work, mesh: Mesh) -> Prompts:
    """Prompts of the batch's rows, as wide as they may be."""
    rows, width = work.rows_at_once, max(work.limits.prompt_tokens, work.user_tokens if work.written else 0)

    def array(dtype: str, *columns: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *columns), dtype)

    def view(role: int) -> PromptRows:
        size = work.prompt_width(role)
        return PromptRows(array('int32', size), array('int8', size), array('int16', size), array('int32'))

    prompts = Prompts(
        user=view(SIDES['user']),
        assistant=view(SIDES['assistant']),
        opening=array('int32', width),
        opening_length=array('int32'),
        given=array('bool'),
        truncated=array('bool'),
        end_reason=array('int8'),
        example=array('uint32'),
        sample=array('int32'),
        group=array('int32'),
        resamples=array('int32'),
    )
    return by_rows(prompts, mesh)


def with_caches(dialogue: Dialogue, size: int) -> Dialogue:
    """The dialogue with caches of `size` tokens, in the shards of those that it has."""

    def grown(context: Context) -> Context:
        needed = max(min(size, context.capacity), context.cache.capacity)
        shapes = jax.eval_shape(functools.partial(transformer.extended, capacity=needed), context.cache)
        return dataclasses.replace(context, cache=placed(shapes, jax.tree.map(lambda x: x.sharding, context.cache)))

    for role in SIDES.values():
        if (context := dialogue.view(role)) is not None:
            dialogue = dialogue.with_view(role, grown(context))
    return dialogue


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The arrays of an update that outlive a step.

    Attributes:
        state: of the trained parameters.
        shardings: of the state.
        frozen: the frozen decoder with its adapters' scale; `{}` without LoRA.
        reference: None without one. With LoRA it is `frozen`.
    """

    state: TrainState
    shardings: TrainState
    frozen: Params
    reference: Params | None


def training_of(work: Work, mesh: Mesh, optimizer: Optimizer) -> Training:
    """The training state of an arm, as `rl.train` places it."""
    config, settings, adapted = work.assistant.policy.spec.config, work.rl, work.rl.lora
    decoder, frozen = params_of(config, mesh, sharding.TRAINING_RULES), {}
    trained: Params = decoder
    if adapted is not None:
        adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), config, adapted))
        shapes = {'adapters': adapters}
        trained = placed(shapes, placement.shardings_of(shapes, config, mesh, sharding.TRAINING_RULES))
        dtype = work.compute.training.dtype
        frozen = params_of(config, mesh, sharding.TRAINING_RULES, dtype=dtype)
        frozen |= {'adapter_scale': whole((), np.float32, mesh)}
    if settings.algorithm.advantage == 'gae':
        heads = params_of(config, mesh, sharding.TRAINING_RULES, heads=('value_head',))
        trained = trained | {'value_head': heads['value_head']}
    abstract = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    shardings = placement.shardings_of(trained, config, mesh, sharding.TRAINING_RULES)
    state_shardings = sharding.state_shardings(abstract, trained, shardings)
    reference = None if settings.algorithm.kl == 'none' else frozen or decoder
    return Training(placed(abstract, state_shardings), state_shardings, frozen, reference)


def scalar(dtype: Any, mesh: Mesh) -> Any:
    return whole((), jnp.dtype(dtype), mesh)


def kept_kinds(work: Work, training: Training, mesh: Mesh) -> Mapping[str, int]:
    """Bytes a device, by arithmetic, of what an RL step keeps from its start to its end, by kind.

    The copy that was loaded stays, since its trained successor is made of it at the end (`partition.whole_decoder`).
    """
    config = work.assistant.policy.spec.config
    state = training.state
    kinds = {
        'parameters': device_bytes(state.params),
        'optimizer': device_bytes(state.opt_state),
        'assistant as loaded': device_bytes(params_of(config, mesh, sharding.TRAINING_RULES)),
    }
    if training.frozen:
        kinds['frozen'] = device_bytes(training.frozen)
    elif training.reference is not None:
        kinds['reference'] = device_bytes(training.reference)
    if work.frame is not None:
        kinds['reward model'] = device_bytes(params_of(config, mesh, sharding.SAMPLING_RULES, heads=('reward_head',)))
    if (user := policy_of(work.models().get('user'), mesh)) is not None:
        kinds['simulator'] = device_bytes(user.params)
    return kinds


def passing_kinds(work: Work, training: Training, mesh: Mesh) -> Mapping[str, float]:
    """Bytes a device, by arithmetic, of what an RL step has for a while, by kind: with the largest caches."""
    data, model = mesh.shape['data'], mesh.shape['model']
    kinds: dict[str, float] = {'gradients': device_bytes(training.state.params)}
    size = max(message.cache for message in walk(work))
    for name, role in SIDES.items():
        if (agent := work.side(role)) is not None:
            config, dtype = agent.policy.spec.config, agent.policy.spec.execution.dtype
            split = model if config.num_kv_heads % model == 0 else 1
            tokens = work.rows_at_once / data * min(size, work.capacity(role))
            kinds[f'cache of the {name}'] = tokens * weights_of(config).cache * ITEM_BYTES[dtype] / split
    assistant = policy_of(work.assistant, mesh)
    assert assistant is not None
    kinds['assistant in sampling'] = device_bytes(assistant.params)
    return kinds
