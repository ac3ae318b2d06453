"""The compiled programs of a served model, and the arrays that a call gives them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from simrl.rollouts.agents import Policy
from simrl.serving.shapes import Shapes
from simrl.serving.slots import MAX_STOP_IDS, NO_ID, Asked, Block, Given, Scores, Slots, copy, decode, feed


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The compiled programs of a model, by number of rows and size."""

    feed: Mapping[tuple[int, int], Callable[..., tuple[Slots, Scores]]]
    decode: Mapping[tuple[int, int], Callable[..., tuple[Slots, Block]]]
    copy: Callable[..., Slots]


def blank_given(rows: int, chunk: int) -> Given:
    """Of no tokens."""
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
    """Of no tokens."""
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
    policy: Policy, masks: jax.Array, ends: jax.Array, slots: Slots, shapes: Shapes, on_program: Callable[[], None]
) -> Programs:
    """Compiles all programs; `slots` gives shapes only. `on_program` is called after each."""

    def compiled(function: Any, *arguments: Any, **static: int) -> Any:
        made = jax.jit(functools.partial(function, **static), donate_argnames='slots').lower(*arguments).compile()
        on_program()
        return made

    vocab_size = policy.spec.config.padded_vocab_size
    return Programs(
        feed={
            (rows, size): compiled(feed, policy, masks, slots, blank_given(rows, shapes.chunk), size=size)
            for rows in shapes.feed_rows
            for size in shapes.feed_sizes
        },
        decode={
            (rows, size): compiled(
                *(decode, policy, masks, ends, slots, blank_asked(rows, vocab_size)), size=size, block=shapes.block
            )
            for rows in shapes.decode_rows
            for size in shapes.decode_sizes
        },
        copy=compiled(copy, slots, np.int32(0), np.int32(0)),
    )
