"""The programs of continuous batching (`rollouts.continuous`), traced from shapes: with all rows in flight.

A side's program leaves the other side's caches and parameters where they are: they are counted beside it. Each side may
have a mesh of its own, of the same devices.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.models.abstract import device_bytes, placed
from simrl.rollouts.agents import Policy
from simrl.rollouts.context import capacity_for
from simrl.rollouts.flight import parts_of
from simrl.rollouts.messages import header_lengths, room_to_receive
from simrl.rollouts.schedule import MOST_STEPS, Level, levels
from simrl.rollouts.window import Asked, Caches, decode_block, feed_rows, idle_rows, new_caches
from tools.compile_check.shapes import policy_of, whole
from tools.compile_check.work import SIDES, Work, walk


@dataclasses.dataclass(frozen=True, eq=False)
class Pace:
    """A program of one side, traced.

    Attributes:
        calls: in a step, where all messages are as long as may be.
        beside: bytes a device of the other side's caches and parameters.
    """

    name: str
    traced: Any
    calls: int
    beside: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    policy: Policy
    caches: Caches
    level: Level
    heard: int  # max tokens fed to a row at once


def continuous_programs(work: Work, meshes: Mapping[str, Mesh]) -> Iterator[Pace]:
    """`block/SIDE`: a block of the decode loop; and `feed/SIDE`: rows that enter are fed.

    Both sides are on the device; else batching is static.

    Args:
        meshes: of each side.
    """
    shards = parts_of(work.rows_at_once, (meshes['user'], meshes['assistant']))
    sides = {name: _side(work, name, meshes[name], shards) for name in SIDES}
    pieces, messages = work.rows // work.rows_at_once, list(walk(work))
    for name, side in sides.items():
        beside = sum(device_bytes((x.policy.params, x.caches)) for other, x in sides.items() if other != name)
        spec, level, mesh = side.policy.spec, side.level, meshes[name]
        sent = pieces * sum(message.role == SIDES[name] for message in messages)
        steps = min(MOST_STEPS, spec.max_new_tokens)
        with jax.set_mesh(mesh):
            traced = decode_block.trace(side.policy, side.caches, _asked(side, shards, mesh), steps=steps)
        blocks = -(-spec.max_new_tokens // steps) * -(-level.rows // level.window)
        yield Pace(f'block/{name}', traced, sent * blocks, beside)
        rows = shards * level.entering
        given = [whole(shape, np.dtype('int32'), mesh) for shape in ((rows, side.heard), (rows,), (rows,))]
        with jax.set_mesh(mesh):
            traced = feed_rows.trace(side.policy, side.caches.entering, *given)
        entries = sent * -(-level.rows // level.entering)
        yield Pace(f'feed/{name}', traced, entries, beside + device_bytes((side.caches.window, side.caches.parked)))


def _side(work: Work, name: str, mesh: Mesh, shards: int) -> _Side:
    role = SIDES[name]
    policy, partner = policy_of(work.side(role), mesh), work.max_new_tokens[name == 'user']
    assert policy is not None
    spec, rows = policy.spec, work.rows_at_once
    level, room = levels(rows, shards, len(SIDES))[0], work.capacity(role)
    longest = max(message.before[role] for message in walk(work) if message.role == role)
    size = capacity_for(longest + header_lengths(spec)[0] + spec.max_new_tokens, room)
    make = functools.partial(new_caches, spec, level, shards, size)
    with jax.set_mesh(mesh):
        caches = placed(jax.eval_shape(make), jax.jit(make).lower().compile().output_shardings)
    heard = max(room_to_receive(spec, partner) + header_lengths(spec)[0], work.prompt_width(role))
    return _Side(policy, caches, level, heard)


def _asked(side: _Side, shards: int, mesh: Mesh) -> Asked:
    """The rows of a window."""
    rows = idle_rows(side.policy.spec, shards * side.level.window)
    return jax.tree.map(lambda x: whole(x.shape, x.dtype, mesh), rows)
