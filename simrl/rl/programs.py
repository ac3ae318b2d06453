"""A bound on the programs that a training compiles, from its settings.

Programs that differ in their sizes are bounded by function: those of conversations (`rollouts.programs`), and one for
each width of a microbatch. All others have one size, so that the first step compiles them.
"""

import collections
from collections.abc import Sequence

from jax.sharding import Mesh

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models.rows import bucket_widths
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rollouts.agents import Agent, Limits, MixedAgent, ModelAgent
from simrl.rollouts.dialogue import capacity
from simrl.rollouts.programs import conversation_programs
from simrl.rollouts.schedule import Batching
from simrl.run.compiles import Programs, counted


def training_programs(
    user: Agent,
    assistant: Agent,
    limits: Limits,
    algorithm: AlgorithmSettings,
    examples: Sequence[Example],
    chat: Chat,
    row_buckets: Sequence[int],
    *,
    role: int,
    rows: int,
    size: int,
    mesh: Mesh,
    batching: Batching,
    futures: bool,
) -> Programs:
    """Bounds of the programs of an RL run that differ in their sizes, by function.

    Those of a reward model are counted whether the reward is one or not.

    Args:
        role: the trained one.
        rows, size: conversations of a step, and of them in the device's batch.
        futures: True if replies are scored by what follows.
    """
    assert not isinstance(assistant, MixedAgent)
    total = collections.Counter(
        counted(
            conversation_programs(
                *(user, assistant, examples),
                chat=chat,
                limits=limits,
                view=role,
                rows=rows,
                size=size,
                mesh=mesh,
                batching=batching,
                replays=futures,
            )
        )
    )
    trained, partner = (user, assistant) if role == USER else (assistant, user)
    assert isinstance(trained, ModelAgent)
    room = capacity(trained.policy.spec, partner.max_new_tokens, limits.prompt_tokens, limits.turns)
    widths = len(bucket_widths(row_buckets, room))
    total.update(start_passes=1, add_passes=widths, assemble=1)
    total.update(zero_gradients=int(algorithm.microbatches > 1), add_gradients=widths, minibatch_step=1, _summed=1)
    total.update(_start=1, score_part=len(row_buckets) + 1)
    return {name: number for name, number in sorted(total.items()) if number}
