"""Arrays that are not there: shapes, dtypes and shards of all that an RL step's programs take."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simrl.experiments.memory import GRADIENTS, SAMPLING, Other, Training
from simrl.models import placement, sharding
from simrl.models.abstract import cache_bytes, device_bytes, params_of, placed
from simrl.models.cache import extended
from simrl.rollouts.agents import ModelAgent, Policy
from simrl.rollouts.context import Context
from simrl.rollouts.prompts import PromptRows, Prompts
from simrl.rollouts.state import Dialogue
from tools.compile_check.work import SIDES, Work, walk


def by_rows(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays whose rows are split over `data`, as `rows.shard_rows` does; whole where it does not divide."""

    def one(x: Any) -> Any:
        split = x.shape and x.shape[0] % mesh.shape['data'] == 0
        spec = PartitionSpec('data') if split else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes)


def whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


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
        shapes = jax.eval_shape(functools.partial(extended, capacity=needed), context.cache)
        return dataclasses.replace(context, cache=placed(shapes, jax.tree.map(lambda x: x.sharding, context.cache)))

    for role in SIDES.values():
        if (context := dialogue.view(role)) is not None:
            dialogue = dialogue.with_view(role, grown(context))
    return dialogue


def scalar(dtype: Any, mesh: Mesh) -> Any:
    return whole((), jnp.dtype(dtype), mesh)


def others_of(work: Work) -> tuple[list[Other], list[Other]]:
    """The models beside the trained one, and the simulator apart from them."""
    others, simulators = list[Other](), list[Other]()
    if work.frame is not None:
        config = work.assistant.policy.spec.config
        others.append(Other('reward model', config, work.compute.training.dtype, ('reward_head',)))
    if (user := work.models().get('user')) is not None:
        spec = user.policy.spec
        simulators.append(Other('simulator', spec.config, spec.execution.dtype))
    return others, simulators


def passing_kinds(work: Work, training: Training, meshes: Mapping[str, Mesh]) -> Mapping[str, float]:
    """Bytes a device, by arithmetic, of what an RL step has for a while, by kind: with the largest caches.

    Args:
        meshes: of each side.
    """
    kinds: dict[str, float] = {GRADIENTS: device_bytes(training.state.params)}
    size = max(message.cache for message in walk(work))
    for name, role in SIDES.items():
        if (agent := work.side(role)) is not None:
            config, dtype = agent.policy.spec.config, agent.policy.spec.execution.dtype
            tokens, mesh = min(size, work.capacity(role)), meshes[name]
            kinds[f"the {name}'s cache"] = cache_bytes(config, dtype, rows=work.rows_at_once, tokens=tokens, mesh=mesh)
    assistant = policy_of(work.assistant, meshes['assistant'])
    assert assistant is not None
    kinds[SAMPLING] = device_bytes(assistant.params)
    return kinds
