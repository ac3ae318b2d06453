"""The programs of an RL step, traced from shapes: the functions that training calls, with the arguments that it gives.

1. `start`: both prompts are fed (`start_dialogue`).
2. `message/user`, `message/assistant`: one message of either side with the largest caches (`add_message`): a header is
   fed, the message is sampled, and the partner's model hears it. With a user off the device `hear/user`: the assistant
   hears its message (`add_reply`); and one on the device that passes text feeds its whole view for each message,
   `reply/user` (`text_view.generated`).
   With compute.batching='continuous', in place of these, `block/SIDE` and `feed/SIDE` (`continuous.py`).
3. `passes`: one microbatch through old parameters and reference, where there is such a pass (`add_passes`).
4. `gradients`: one microbatch forward and backward (`add_gradients`), and `step`: the optimizer's (`minibatch_step`).
5. `reward`: one microbatch through the reward model (`score_part`).

Rows are as long as they may be. `start` and messages have each layer by itself, so that compiling takes longer the more
there are; the others scan over them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER
from simrl.experiments.memory import Training, training_of
from simrl.models import sharding
from simrl.models.abstract import params_of, placed
from simrl.models.rows import bucket_widths
from simrl.rewards.reward_model import score_part
from simrl.rewards.rewards import Rewards
from simrl.rl.prepare import prepare_programs
from simrl.rl.update import update_programs
from simrl.rollouts.context import capacity_for
from simrl.rollouts.dialogue import add_message, add_reply
from simrl.rollouts.host import HostMessage
from simrl.rollouts.prompts import start_dialogue
from simrl.rollouts.state import Dialogue
from simrl.rollouts.trajectories import trajectories
from simrl.simulators.text_view import generated
from simrl.training.optimizer import make_optimizer
from tools.compile_check.continuous import continuous_programs
from tools.compile_check.shapes import (
    by_rows,
    policy_of,
    prompts_of,
    scalar,
    whole,
    with_caches,
)
from tools.compile_check.work import SIDES, Work, walk

PACES = ('block/user', 'block/assistant', 'feed/user', 'feed/assistant')
UNROLLED = ('start', 'message/user', 'message/assistant', 'hear/user', 'reply/user', *PACES)  # layers by themselves
SCANNED = ('passes', 'gradients', 'step', 'reward')
NAMES = (*UNROLLED, *SCANNED)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced program.

    Attributes:
        name: of `NAMES`.
        traced: of JAX.
        calls: how often a step calls it, where all rows are as long as may be.
        holds: kinds of `shapes.kept_kinds` that are among its arguments.
        beside: bytes a device of other things that are there while it runs.
        sizes: programs like it, for the caches and the lengths of rows that a step has; it is of the largest.
    """

    name: str
    traced: Any
    calls: int
    holds: tuple[str, ...] = ()
    beside: int = 0
    sizes: int = 1


def rollout_programs(
    work: Work, mesh: Mesh, compile_start: Callable[[Program], Any], simulator_mesh: Mesh | None = None
) -> Iterator[Program]:
    """`start`, and the messages.

    Args:
        simulator_mesh: None: `mesh`. With another one batching is continuous.
        compile_start: `start` -> the shardings of its results, which are those of a message's arguments.
    """
    if (work.compute.batching == 'continuous' or simulator_mesh is not None) and work.user is not None:
        for pace in continuous_programs(work, {'user': simulator_mesh or mesh, 'assistant': mesh}):
            yield Program(pace.name, pace.traced, pace.calls, ('simulator',), pace.beside)
        return
    user, assistant = (policy_of(work.side(role), mesh) for role in SIDES.values())
    pieces, holds = work.rows // work.rows_at_once, () if work.user is None else ('simulator',)
    messages = list(walk(work))
    traced = start_dialogue.trace(
        *(user, assistant, prompts_of(work, mesh), 0, 0), limits=work.limits, max_new_tokens=work.max_new_tokens
    )
    start = Program('start', traced, pieces, holds)
    dialogue, keys = placed(traced.out_info, compile_start(start))
    for name, role in SIDES.items():
        sent = [message.cache for message in messages if message.role == role]
        if work.side(role) is not None and sent:
            grown = with_caches(dialogue, max(sent))
            yield Program(
                f'message/{name}',
                add_message.trace(user, assistant, grown, keys, role=role),
                pieces * len(sent),
                holds,
                sizes=len(set(sent)),
            )

    heard = [message.cache for message in messages if message.role == USER]
    if work.user is None and heard:
        calls, partner = pieces * len(heard), with_caches(dialogue, max(heard))
        traced = add_reply.trace(assistant, partner, host_message(work, mesh), role=USER)
        yield Program('hear/user', traced, calls, sizes=len(set(heard)))
        if work.text_user is not None:
            views = {view_width(work, tokens) for tokens in views_of(work)}
            yield Program('reply/user', reply_program(work, mesh), calls, ('simulator',), sizes=len(views))


def host_message(work: Work, mesh: Mesh) -> HostMessage:
    """A message of a user off the device, in all rows."""
    rows = work.rows_at_once

    def array(dtype: str, *columns: int) -> Any:
        return whole((rows, *columns), np.dtype(dtype), mesh)

    return HostMessage(
        tokens=array('int32', work.user_tokens + 1),
        content_length=array('int32'),
        replied=array('bool'),
        ends=array('bool'),
        truncated=array('bool'),
        failed=array('bool'),
        resamples=array('int32'),
    )


def reply_program(work: Work, mesh: Mesh) -> Any:
    """The message of a user that passes text, traced. Its own tokens are taken to be as many as the assistant's."""
    policy = policy_of(work.text_user, mesh)
    assert policy is not None
    rows = 1 << (work.rows_at_once - 1).bit_length()
    rows += -rows % mesh.shape['data']
    width = view_width(work, max(views_of(work)))

    def array(dtype: str, *columns: int) -> Any:
        return by_rows(jax.ShapeDtypeStruct((rows, *columns), dtype), mesh)

    return generated.trace(
        *(policy, array('int32', width), array('int8', width), array('int16', width), array('int32')),
        *(array('uint32', 2), array('int32'), array('bool'), np.uint32(0)),
    )


def views_of(work: Work) -> list[int]:
    """Tokens of the conversation before each message of the user."""
    return [message.before[ASSISTANT] for message in walk(work) if message.role == USER]


def view_width(work: Work, tokens: int) -> int:
    """Columns of the view of a user that passes text."""
    assert work.text_user is not None
    spec = work.text_user.policy.spec
    return capacity_for(tokens, spec.config.max_row_tokens - spec.max_new_tokens - 1)


def finished(work: Work, mesh: Mesh) -> Any:
    """The trajectories of a step, abstract."""
    shorter = work.with_layers(dict.fromkeys(work.layers(), 1))  # a conversation has nothing of the models
    user, assistant = (policy_of(shorter.side(role), mesh) for role in SIDES.values())
    prompts = prompts_of(
        dataclasses.replace(shorter, compute=dataclasses.replace(work.compute, rows_in_flight=None)), mesh
    )
    start = functools.partial(start_dialogue, limits=work.limits, max_new_tokens=work.max_new_tokens)
    dialogue: Dialogue = jax.eval_shape(lambda *arguments: start(*arguments, 0, 0)[0], user, assistant, prompts)
    ends = functools.partial(trajectories, view=ASSISTANT)
    return by_rows(
        jax.eval_shape(lambda x, *of: ends(x, example_id=of[0], group=of[1]), dialogue, prompts.example, prompts.group),
        mesh,
    )


def update_programs_of(work: Work, mesh: Mesh, training: Training) -> Iterator[Program]:
    """`passes` where there are any, `gradients` and `step`."""
    spec, settings, execution = work.assistant.policy.spec, work.rl.algorithm, work.compute.training
    config, temperature = spec.config, work.assistant.policy.temperature
    batch = finished(work, mesh)
    mask, rows = whole((config.padded_vocab_size,), bool, mesh), whole((work.rows_of_microbatch,), np.int32, mesh)
    widths = bucket_widths(work.rl.row_buckets, batch.tokens.shape[1])
    params, reference, frozen = training.state.params, training.reference, training.frozen
    programs = prepare_programs(trained_role=ASSISTANT, config=config, execution=execution, settings=settings)
    passes = by_rows(
        jax.eval_shape(
            functools.partial(programs.start, value='value_head' in params, reference=reference is not None),
            *(batch.role, batch.length, batch.log_prob),
        ),
        mesh,
    )
    number = settings.minibatches * settings.microbatches
    if passes.old is not None or passes.ref_log_prob is not None:
        traced = programs.add.trace(
            *(passes, {**frozen, **params}, reference, batch.tokens, rows, mask, temperature), width=widths[-1]
        )
        holds = ('parameters',) if passes.old is not None else ()
        kept = 'frozen' if frozen else 'reference'
        yield Program('passes', traced, number, (*holds, kept), sizes=len(widths))
    prepared, _ = jax.eval_shape(programs.finish, passes, batch, rewards_of(work))
    prepared = by_rows(prepared, mesh)
    optimizer = make_optimizer(work.rl.optimizer, work.rl.steps * settings.updates_per_batch)
    update = update_programs(config, execution, settings, optimizer, state_sharding=training.shardings)
    so_far = params if settings.microbatches > 1 else None
    traced = update.add.trace(
        *(params, so_far, prepared, whole((work.rows,), bool, mesh), rows, scalar(np.int32, mesh), mask, temperature),
        frozen,
        width=widths[-1],
    )
    yield Program('gradients', traced, settings.epochs * number, ('parameters', 'frozen'), sizes=len(widths))
    _, part = traced.out_info
    parts = [jax.tree.map(lambda x: whole(x.shape, x.dtype, mesh), part)] * settings.microbatches
    traced = update.take_step.trace(training.state, params, parts)
    yield Program('step', traced, settings.epochs * settings.minibatches, ('parameters', 'optimizer'))


def rewards_of(work: Work) -> Rewards:
    """Rewards of whole conversations, abstract."""
    one: Any = functools.partial(jax.ShapeDtypeStruct, (work.rows,))
    return Rewards(value=one(np.float32), valid=one(bool), parts={}, cause=one(np.int32))


def reward_programs(work: Work, mesh: Mesh) -> Iterator[Program]:
    """`reward`, where the reward is a model's."""
    if work.frame is None:
        return
    config, batch = work.assistant.policy.spec.config, finished(work, mesh)
    _, messages, longest = batch.messages.shape
    length = work.frame.row_length(messages, longest, max(work.max_new_tokens))
    widths = bucket_widths(work.rl.row_buckets, length)
    scored = tuple(by_rows(jax.ShapeDtypeStruct((work.rows, messages // 2), x), mesh) for x in (np.float32, bool))
    visible = by_rows(jax.ShapeDtypeStruct((work.rows,), np.int32), mesh)
    dtype = work.compute.training.dtype
    params = params_of(config, mesh, sharding.SAMPLING_RULES, heads=('reward_head',), dtype=dtype)
    rows = whole((work.rows_of_microbatch,), np.int32, mesh)
    traced = score_part.trace(
        *(params, scored, batch.messages, batch.message_length, visible, rows),
        config=config,
        execution=work.compute.training,
        frame=work.frame,
        width=widths[-1],
    )
    calls = work.rows // work.rows_of_microbatch
    yield Program('reward', traced, calls, ('reward model',), sizes=len(widths))


def training_programs(work: Work, mesh: Mesh) -> tuple[Training, Iterator[Program]]:
    """All programs that scan over layers, and the arrays that they share."""
    settings = work.rl
    optimizer = make_optimizer(settings.optimizer, settings.steps * settings.algorithm.updates_per_batch)
    config, dtype = work.assistant.policy.spec.config, work.compute.training.dtype
    training = training_of(config, settings, dtype, mesh, optimizer)

    def programs() -> Iterator[Program]:
        yield from update_programs_of(work, mesh, training)
        yield from reward_programs(work, mesh)

    return training, programs()
