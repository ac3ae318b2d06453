"""Replay held-out conversations of people to a simulator, as the work of a stage.

Every simulator of an experiment replays the same turns: those with so few turns and tokens before them.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example
from simrl.evaluation.fidelity.turns import Turn, turns_of, write_turns
from simrl.experiments.outputs import save_result
from simrl.experiments.replies import check_answered
from simrl.experiments.scene import Scene
from simrl.rl.judged import check_judged
from simrl.rollouts.agents import Agent, HostConversation, Reply, agent_for
from simrl.rollouts.collect import ConversationError, for_sampling
from simrl.run import processes
from simrl.simulators.next_turns import next_turns

TURNS_FILE = 'turns.jsonl.gz'
REPLAY_STEP = 2**31 - 7  # in the keys of conversations, far above the steps of training: no two uses draw the same
Waiting = list[tuple[Turn, HostConversation]]  # a person's turn, and the conversation before it


def replay_people(folder: pathlib.Path, *, scene: Scene, arm: str, seed: int) -> None:
    """Replays people's conversations to a simulator; leaves its turns beside theirs, and counts.

    Raises:
        ConversationError: no turn is left, an endpoint did not answer, or half of the turns failed
            (`compute.loop.max_unjudged`).
    """
    settings, name = scene.settings.evaluation, f'replay of {arm}'
    people, mesh = scene.people_to_replay(settings.replayed), scene.compute.mesh.make()
    with jax.set_mesh(mesh):
        user = for_sampling(scene.simulator(arm, seed), mesh)
    waiting, left_out = waiting_turns(
        people,
        scene.example_of,
        user,
        scene.chat,
        most_turns=settings.replayed_turns,
        most_tokens=settings.replayed_tokens,
    )
    if not waiting:
        raise ConversationError(f'{name}: expected turns of people to take, found none; left out: {left_out or "none"}')
    replies = next_turns(
        user,
        [conversation for _, conversation in waiting],
        chat=scene.chat,
        mesh=mesh,
        batch_size=settings.batch_size,
        seed=settings.seed,
        step=REPLAY_STEP,
        name=name,
    )
    turns = [with_reply(turn, reply) for (turn, _), reply in zip(waiting, replies, strict=True)]
    failures = {number: turn.failure for number, turn in enumerate(turns) if turn.failure}
    check_answered(name, failures)
    check_judged(name, failures, len(turns), scene.compute.loop.max_unjudged)
    if processes.leads():
        write_turns(folder / TURNS_FILE, turns)
    failed = dict(collections.Counter(failures.values()))
    found = {'conversations': len(people), 'turns': len(turns), 'left_out': left_out, 'failed': failed}
    print(f'{name}: {found}', flush=True)
    save_result(folder, found)


def waiting_turns(
    people: Sequence[Conversation],
    example_of: Callable[[Conversation], Example],
    user: Agent,
    chat: Chat,
    *,
    most_turns: int,
    most_tokens: int,
) -> tuple[Waiting, dict[str, int]]:
    """People's turns that a simulator takes, each with the conversation before it, and how many are left out.

    Openings are among them if the simulator writes them.

    Args:
        example_of: the example that a conversation started from.
        chat: whose tokens are counted.
        most_turns: turns of a person, the opening included.
        most_tokens: of all messages before a turn.
    """
    waiting: Waiting = []
    left_out: collections.Counter[str] = collections.Counter()
    for conversation in people:
        example = example_of(conversation)
        written = example.opening is None or agent_for(user, example).opening == 'written'
        messages = tuple((message.role, message.content) for message in conversation.spoken)
        tokens = [len(chat.encode(text)) for _, text in messages]
        turns = turns_of(conversation, first=0 if written else 1)
        for turn in turns:
            if turn.turn >= most_turns:
                left_out[f'turns after the first {most_turns} of a person'] += 1
            elif sum(tokens[: 2 * turn.turn]) > most_tokens:
                left_out[f'turns after more than {most_tokens} tokens'] += 1
            else:
                waiting.append((turn, HostConversation(example, 0, messages[: 2 * turn.turn])))
    return waiting, dict(left_out)


def with_reply(turn: Turn, reply: Reply) -> Turn:
    """A person's turn with a simulator's in its place."""
    if reply.failure is not None:
        return dataclasses.replace(turn, failure=reply.failure or 'no reason was given')
    text = reply.text.strip()
    said = None if reply.ends and not text else text
    return dataclasses.replace(turn, simulated=said, ended=reply.ends, truncated=reply.truncated)
