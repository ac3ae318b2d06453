"""Run by `test_host.py` in two processes of one device each: conversations whose rows both of them have a half of."""

import dataclasses
import json

from simrl.conversations.chat import ASSISTANT, USER
from simrl.conversations.records import Example
from simrl.models import placement, sharding
from simrl.rollouts.agents import Agent, opening_only
from simrl.rollouts.collect import collect, for_sampling
from tests import many_devices
from tests.rollouts import test_host as scene

LIMITS = dataclasses.replace(scene.LIMITS, turns=1)
GIVEN = [example for example in scene.EXAMPLES if example.opening is not None]


def main() -> None:
    many_devices.join()
    mesh = sharding.make_mesh(2, 1)
    agents = scene.agent_of(USER), scene.agent_of(ASSISTANT)  # each process makes its own
    many_devices.meet()
    user, assistant = (for_sampling(agent, mesh) for agent in agents)

    def messages(user: Agent, examples: list[Example]) -> list[list[list[int]]]:
        batch, _ = collect(
            *(user, assistant, examples),
            chat=scene.CHAT,
            limits=LIMITS,
            seed=scene.SEED,
            step=scene.STEP,
            view=ASSISTANT,
            mesh=mesh,
            samples=scene.SAMPLES,
        )
        assert not batch.messages.is_fully_addressable
        found: list[list[list[int]]] = placement.to_host(batch.messages).tolist()
        return found

    results = {'model': messages(user, scene.EXAMPLES), 'given': messages(opening_only(), GIVEN)}
    try:
        messages(scene.partner_of(scene.chatty), scene.EXAMPLES)
        refused = ''
    except ValueError as error:
        refused = str(error)
    print(json.dumps({**results, 'refused': refused}))


if __name__ == '__main__':
    main()
