"""The compiled programs of a served model, and the arrays that a call gives them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from simrl.models.cache import Cache
from simrl.models.transformer import init_cache
from simrl.rollouts.agents import Policy
from simrl.serving.generation import MAX_STOP_IDS
from simrl.serving.shapes import Shapes
from simrl.serving.slots import (
    NO_ID,
    Asked,
    Block,
    Given,
    Progress,
    Scores,
    copy,
    decode,
    feed,
    put_back,
    take,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The compiled programs of a model, by number of rows and tokens of their caches; functions of `slots.py`."""

    feed: Mapping[tuple[int, int], Callable[..., tuple[Cache, Progress, Scores]]]
    take: Mapping[tuple[int, int], Callable[..., Cache]]
    decode: Mapping[tuple[int, int], Callable[..., tuple[Cache, Progress, Block]]]
    put_back: Mapping[tuple[int, int], Callable[..., Cache]]
    copy: Callable[..., Cache]


def blank_given(rows: int, chunk: int) -> Given:
    """Makes the arrays of a call that feeds no token."""
    each, none = np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32)
    return Given(
        rows=np.arange(rows, dtype=np.int32),
        tokens=each,
        start=none,
        count=none,
        targets=each,
        begins=none.astype(bool),
        pending=none,
        length=none,
        scored=np.array(False),
    )


def blank_asked(rows: int, vocab_size: int) -> Asked:
    """Makes the arrays of a call that samples no token."""
    none, zeros = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    return Asked(
        rows=np.arange(rows, dtype=np.int32),
        quota=none,
        max_tokens=none,
        seed=np.zeros((rows, 2), np.uint32),
        sample=none,
        temperature=zeros,
        top_k=none,
        top_p=zeros + 1,
        min_p=zeros,
        vocabulary=none,
        stop_ids=np.full((rows, MAX_STOP_IDS), NO_ID, np.int32),
        top=np.array(False),
        constrained=none.astype(bool),
        bits=np.zeros((rows, -(-vocab_size // 32)), np.uint32),
    )


def compile_programs(
    policy: Policy,
    masks: jax.Array,
    ends: jax.Array,
    cache: Cache,
    progress: Progress,
    shapes: Shapes,
    on_program: Callable[[], None],
) -> Programs:
    """Compiles all programs; `cache` and `progress` give shapes only. `on_program` is called after each."""

    def compiled(function: Any, changed: tuple[str, ...], *arguments: Any, **static: int) -> Any:
        made = jax.jit(functools.partial(function, **static), donate_argnames=changed).lower(*arguments).compile()
        on_program()
        return made

    config, dtype = policy.spec.config, policy.spec.execution.dtype
    for_decode = [(rows, size) for rows in shapes.decode_rows for size in shapes.decode_sizes]
    taken = {of: jax.eval_shape(functools.partial(init_cache, config, *of, dtype)) for of in for_decode}
    numbers = {rows: np.arange(rows, dtype=np.int32) for rows in shapes.decode_rows}
    asked = {rows: blank_asked(rows, config.padded_vocab_size) for rows in shapes.decode_rows}
    whole = (shapes.rows, shapes.context)
    changed = ('cache', 'progress')
    return Programs(
        feed={
            (rows, size): compiled(
                *(feed, changed, policy, masks, cache, progress, blank_given(rows, chunk)), size=size
            )
            for rows, chunk in shapes.feed
            for size in shapes.feed_sizes
        },
        take={of: compiled(take, (), cache, numbers[of[0]], size=of[1]) for of in for_decode if of != whole},
        decode={
            of: compiled(*(decode, changed, policy, masks, ends, taken[of], progress, asked[of[0]]), block=shapes.block)
            for of in for_decode
        },
        put_back={
            of: compiled(put_back, ('cache',), cache, taken[of], numbers[of[0]]) for of in for_decode if of != whole
        },
        copy=compiled(copy, ('cache',), cache, np.int32(0), np.int32(0)),
    )
