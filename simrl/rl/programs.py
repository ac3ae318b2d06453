"""The programs of a training, by the sizes that its settings allow: counted before the first step, or compiled ahead.

1. Those of conversations with each user, and of replays where replies are scored by their futures.
2. Those of a reward model, where it is the score.
3. Those of `prepare` and of the update: one for each width of a microbatch, and a few of one size.

All are those that `rl.train` calls, with the arguments that it gives. What the conversations were worth decides the
values of their arguments, and not their shapes. What is left out has one size: the first step compiles it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models.abstract import by_rows
from simrl.models.rows import bucket_widths
from simrl.models.transformer import Params
from simrl.rewards.rewards import Rewards, Score
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.futures import FutureScore
from simrl.rl.judged import judged_programs
from simrl.rl.prepare import PreparePrograms
from simrl.rl.update import UpdatePrograms
from simrl.rollouts.agents import Agent, Limits, ModelAgent
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.programs import Conversations
from simrl.rollouts.schedule import Batching
from simrl.run.compiles import Program, abstract, lowered_with_results
from simrl.training.optimizer import TrainState

Learning = Callable[[Conversations, int, tuple[int, ...]], Iterator[Program]]  # see `training_programs`


def training_programs(
    user: Agent,
    assistant: Agent,
    examples: Sequence[Example],
    score: Score | FutureScore,
    *,
    chat: Chat,
    limits: Limits,
    view: int,
    mesh: Mesh,
    rows: int,
    size: int,
    batching: Batching,
    openings: Sequence[int],
    learning: Learning,
) -> Iterator[Program]:
    """The programs of conversations with each user, of their score, and those of the update.

    Args:
        user, assistant: to compile, from `for_sampling`; others as of `collect`.
        rows: conversations of a step, of which `size` are in the device's batch.
        openings: numbers of examples for which openings are written at once.
        learning: (conversations, their tokens, the shape of their rewards) -> `learning_programs`.
    """
    own, futures = (score.score, True) if isinstance(score, FutureScore) else (score, False)
    conversations = yield from judged_programs(
        *(user, assistant, examples, own),
        chat=chat,
        limits=limits,
        view=view,
        mesh=mesh,
        rows=rows,
        size=size,
        batching=batching,
        openings=openings,
        replays=futures,
    )
    trained, partner = (user, assistant) if view == USER else (assistant, user)
    assert isinstance(trained, ModelAgent)
    room = capacity(trained.policy.spec, partner.max_new_tokens, limits.prompt_tokens, limits.turns)
    yield from learning(conversations, room, (rows, limits.turns) if futures else (rows,))


def learning_programs(
    conversations: Conversations,
    tokens: int,
    rewards: tuple[int, ...],
    *,
    state: TrainState,
    frozen: Params,
    reference: Params | None,
    prepare: PreparePrograms,
    update: UpdatePrograms,
    settings: AlgorithmSettings,
    row_buckets: Sequence[int],
    token_mask: jax.Array,
    temperature: jax.Array | float,
    mesh: Mesh,
) -> Iterator[Program]:
    """The programs of `prepare` and of the update; arguments as there.

    Args:
        tokens: of a conversation.
        rewards: shape of the rewards.
    """
    rows, widths = rewards[0], bucket_widths(row_buckets, tokens)
    own, members = np.zeros(settings.rows_per_microbatch(rows), np.int32), np.zeros(rows, np.bool_)
    whole, masked = {**frozen, **state.params}, (token_mask, temperature)
    so_far = abstract(state.params) if settings.microbatches > 1 else None

    @functools.cache
    def start() -> tuple[Lowered, Any]:
        batch, flags = conversations(), {'value': 'value_head' in whole, 'reference': reference is not None}
        return lowered_with_results(prepare.start.trace(batch.role, batch.length, batch.log_prob, **flags))

    def add_passes(width: int) -> Any:
        return prepare.add.lower(start()[1], whole, reference, conversations().tokens, own, *masked, width=width)

    @functools.cache
    def prepared() -> Any:
        return by_rows(jax.eval_shape(prepare.finish, start()[1], conversations(), _rewards(rewards))[0], mesh)

    @functools.cache
    def add_gradients(width: int) -> Any:
        return update.add.trace(
            *(state.params, so_far, prepared(), members, own, state.step, *masked), frozen, width=width
        )

    def take_step() -> Any:
        parts = [by_rows(add_gradients(widths[-1]).out_info[1], mesh)] * settings.microbatches
        return update.take_step.lower(state, abstract(state.params), parts)

    yield Program('start_passes', lambda: start()[0])
    if settings.reads_old or reference is not None:
        for width in widths:
            yield Program('add_passes', functools.partial(add_passes, width))
    if so_far is not None:
        yield Program('zero_gradients', lambda: update.zeros.lower(state.params))
    for width in widths:
        yield Program('add_gradients', functools.partial(lambda width: add_gradients(width).lower(), width))
    yield Program('minibatch_step', take_step)


def _rewards(shape: tuple[int, ...]) -> Rewards:
    """Abstract rewards. No shape of the update depends on their parts."""
    one: Any = jax.ShapeDtypeStruct
    return Rewards(one(shape, np.float32), one(shape, np.bool_), {}, one(shape[:1], np.int32))
