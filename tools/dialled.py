"""People's own program as simulators of the concierge world: with traits between the stereotype's and their own.

`simulator='tools.dialled:dial_25'` is an arm whose people are a quarter of the way from the stereotype that role-play
knows (dial 0) to people as they are (100).
"""

import functools
from collections.abc import Sequence

import numpy as np

from simrl.experiments.concierge import ConciergeScene
from simrl.rollouts.agents import HostAgent, HostConversation, Reply
from simrl.worlds.concierge.language import read_assistant, read_user
from simrl.worlds.concierge.people import Person, World, person_of
from simrl.worlds.concierge.replies import Mind, Said, answer, cost, open_talk

DIALS = (0, 25, 50, 75, 90)  # of a hundred


def next_message(person: Person, messages: Sequence[tuple[str, str]], seed: int) -> Said:
    """A person's next message in a conversation that may have begun otherwise: it goes by what was said.

    In a conversation of its own it is that of `replies.speak`.
    """
    spoken, heard = ([text for role, text in messages if role == own] for own in ('user', 'assistant'))
    if not heard:
        return open_talk(person, seed)[1]
    patience, disclosed = person.traits.patience, frozenset[int]()
    for said, text in enumerate(heard, start=1):
        disclosed |= {statement.attribute for statement in read_user(spoken[said - 1]) if not statement.denied}
        mind = Mind(patience, disclosed, said)
        patience = round(patience - cost(read_assistant(text), person.intent, disclosed), 9)
    return answer(person, mind, heard[-1], seed)[1]


def dialled(scene: ConciergeScene, dial: float) -> HostAgent:
    """People whose traits are so far from the stereotype as a simulator."""
    world = scene.settings.world
    person_called = functools.cache(functools.partial(person_of, World(world.seed, dial * world.dial)))

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        said = [
            next_message(person_called(conversation.example.id), conversation.messages, seed)
            for conversation, seed in zip(conversations, seeds.tolist(), strict=True)
        ]
        return [Reply(x.text, ends=x.end is not None) for x in said]

    return HostAgent(reply, max_new_tokens=scene.limits.user_tokens, replayable=True)


dial_0, dial_25, dial_50, dial_75, dial_90 = (functools.partial(dialled, dial=dial / 100) for dial in DIALS)
