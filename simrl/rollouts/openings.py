"""Examples and a user in, one opening for each example out.

All conversations of an example then start from the same opening, as the samples of a group must. It is the opening that
the user would write in the first of them: it is drawn with the key of the example's sample 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rollouts.agents import GenerationSpec, HostAgent, HostConversation, Limits, ModelAgent, OneAgent
from simrl.rollouts.context import capacity_for, grow_cache, round_up
from simrl.rollouts.dialogue import add_message, capacity
from simrl.rollouts.host import HostReplies, OnWait
from simrl.rollouts.messages import room_to_send
from simrl.rollouts.prompts import Prompts, WrittenOpening, prompts_of, start_dialogue
from simrl.rollouts.state import EndReason


def write_openings(
    user: OneAgent,
    examples: Sequence[Example],
    idle: Sequence[bool],
    *,
    chat: Chat,
    limits: Limits,
    seed: int,
    step: int,
    mesh: Mesh,
    on_wait: OnWait | None = None,
) -> tuple[list[WrittenOpening], Mapping[int, str]]:
    """The opening of each example, and by example the reason why an agent off the device failed.

    Args:
        user: from `for_sampling`, with `opening='written'`.
        idle: the examples of which none is wanted; they get a failed one.
        seed, step: of the conversations.
        on_wait: see `HostReplies`.
    """
    rows = _filled(examples, mesh)
    prompts = opening_prompts(user, examples, idle, chat=chat, limits=limits, mesh=mesh)
    unwanted, none = prompts.end_reason == EndReason.FAILURE, prompts.opening_length
    policy = user.policy if isinstance(user, ModelAgent) else None
    dialogue, keys = start_dialogue(
        *(policy, None, placement.shard_batch(prompts, mesh), seed, step),
        limits=dataclasses.replace(limits, turns=1),
        max_new_tokens=(user.max_new_tokens, 1),
    )
    if isinstance(user, HostAgent):
        starts = [HostConversation(example, 0, ()) for example in rows]
        replies = HostReplies(user, starts, keys, chat, on_wait=on_wait)
        message = replies.reply(dialogue, np.arange(len(rows)), USER)
        ids, length, truncated = message.tokens, message.content_length, message.truncated
        resamples = message.resamples
        reasons = np.where(message.failed | unwanted, EndReason.FAILURE, np.where(message.ends, EndReason.SIGNAL, 0))
        failures = replies.failures
    else:
        assert policy is not None
        assert dialogue.user is not None
        context = grow_cache(dialogue.user, opening_rooms(policy.spec, limits)[1])
        dialogue = add_message(policy, None, dataclasses.replace(dialogue, user=context), keys, role=USER)
        ids, length, truncated, reasons = placement.to_host(
            (dialogue.messages[:, 0], dialogue.message_length[:, 0], dialogue.truncated[:, 0], dialogue.end_reason)
        )
        failures, resamples = dict[int, str](), none
    openings = [
        WrittenOpening(
            tuple(ids[i, : length[i]].tolist()), bool(truncated[i]), EndReason(int(reasons[i])), int(resamples[i])
        )
        for i in range(len(examples))
    ]
    return openings, failures


def opening_prompts(
    user: OneAgent, examples: Sequence[Example], idle: Sequence[bool], *, chat: Chat, limits: Limits, mesh: Mesh
) -> Prompts:
    """The prompts, on the host, from which `write_openings` starts, and some that fill up the rows of the mesh."""
    rows = _filled(examples, mesh)
    prompts = prompts_of(rows, user, None, chat, samples=1, prompt_tokens=limits.prompt_tokens)
    none = np.zeros(len(rows), np.int32)
    unwanted = np.array([*idle, *[True] * (len(rows) - len(examples))])
    over = np.where(unwanted, EndReason.FAILURE, EndReason.RUNNING).astype(np.int8)
    return dataclasses.replace(prompts, given=none > 0, opening_length=none, end_reason=over)


def opening_rooms(spec: GenerationSpec, limits: Limits) -> tuple[int, int]:
    """The room of caches after a prompt, and that in which an opening is written, in tokens."""
    most = capacity(spec, 1, limits.prompt_tokens, 1)
    first = min(round_up(limits.prompt_tokens), most)
    return first, max(first, capacity_for(limits.prompt_tokens + room_to_send(spec), most))


def _filled(examples: Sequence[Example], mesh: Mesh) -> list[Example]:
    return list(examples) + [examples[-1]] * (-len(examples) % mesh.shape['data'])
