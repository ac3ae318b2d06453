"""A simulator's next turn in given conversations: any simulator, on the device or off it, whatever was said before.

A rollout's conversations begin with an example and are the agents' own. These were held by others, and each is a text,
so that a simulator on the device is met through its texts as well. With equal texts it samples as in a rollout.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import USER, Chat
from simrl.models import placement
from simrl.rollouts.agents import Agent, HostAgent, HostConversation, ModelAgent, OneAgent, Reply, agent_for, mesh_of
from simrl.rollouts.host import FailedReplyError, agent_seeds, encode_reply
from simrl.rollouts.state import example_hash, row_keys
from simrl.run import processes
from simrl.run.progress import Progress
from simrl.simulators.text_view import text_agent


def next_turns(
    user: Agent,
    conversations: Sequence[HostConversation],
    *,
    chat: Chat,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    step: int,
    name: str,
) -> list[Reply]:
    """The user's next message in each conversation, cut as in a rollout; with `failure`, there is none.

    Conversations of similar length are in one batch, which changes no message of a simulator on the device.

    Args:
        user: from `for_sampling`.
        conversations: that wait for the user.
        chat: the tokenizer in which messages are counted and cut.
        seed, step: with the example and the sample they decide every draw.
        name: of the progress bar.
    """
    ids = jnp.array([example_hash(one.example.id) for one in conversations], jnp.uint32)
    samples = jnp.array([one.sample for one in conversations], jnp.int32)
    seeds = np.asarray(placement.to_host(agent_seeds(row_keys(seed, step, ids, samples))))
    agents = [agent_for(user, one.example) for one in conversations]
    replies: dict[int, Reply] = {}
    with Progress(name, len(conversations)) as progress:
        for agent in dict.fromkeys(agents):
            own = [number for number, found in enumerate(agents) if found == agent]
            own.sort(key=lambda number: sum(len(text) for _, text in conversations[number].messages))
            asked = text_agent(agent, chat, mesh_of(agent, mesh)) if isinstance(agent, ModelAgent) else agent
            for start in range(0, len(own), batch_size):
                chosen = own[start : start + batch_size]
                found = _replies(asked, [conversations[number] for number in chosen], seeds[chosen])
                for number, reply in zip(chosen, found, strict=True):
                    replies[number] = _as_heard(reply, agent, chat)
                    progress.update()
    return [replies[number] for number in range(len(conversations))]


def _replies(agent: HostAgent, conversations: Sequence[HostConversation], seeds: np.ndarray) -> Sequence[Reply]:
    """An agent's replies; of several processes each asks for its share, where the agent is asked so."""
    if agent.asked == 'all' or processes.count() == 1:
        return agent.reply(conversations, seeds)
    own = slice(processes.index(), None, processes.count())
    found: list[Reply | None] = [None] * len(conversations)
    mine = (
        [dataclasses.asdict(reply) for reply in agent.reply(conversations[own], seeds[own])] if seeds[own].size else []
    )
    for process, replies in enumerate(processes.gather('replies', mine)):
        found[process :: processes.count()] = [Reply(**reply) for reply in replies]
    return [reply for reply in found if reply is not None]


def _as_heard(reply: Reply, agent: OneAgent, chat: Chat) -> Reply:
    """A reply as its partner would read it: of an agent off the device, cut and encoded as in a rollout."""
    if not isinstance(agent, HostAgent):
        return reply
    try:
        content, truncated = encode_reply(reply, chat, USER, agent.max_new_tokens)
    except FailedReplyError as error:
        return Reply('', failure=str(error), resamples=reply.resamples)
    text = chat.decode(content[:-1] if reply.ends else content)
    return dataclasses.replace(reply, text=text, truncated=truncated)
