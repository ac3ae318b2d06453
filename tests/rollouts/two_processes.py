"""Run by `test_host.py` in two processes of one device each: conversations whose rows both of them have a half of."""

import dataclasses
import json
import os
import time

import jax

from simrl.conversations.chat import ASSISTANT, USER
from simrl.conversations.records import Example
from simrl.models import placement, sharding
from simrl.rollouts import compaction, context
from simrl.rollouts.agents import Agent, HostConversation, Reply
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.schedule import Batching
from simrl.simulators.text_view import text_agent
from tests import many_devices
from tests.rollouts import test_host as scene

ON_BOTH = 'TEST_AN_AGENT_ON_THE_DEVICES_OF_BOTH'
LIMITS = dataclasses.replace(scene.LIMITS, turns=1)


def main() -> None:
    compaction.MIN_ROWS = context.SMALLEST_CACHE = 2**20  # batches and caches of few sizes: fewer programs
    many_devices.join()
    mesh = sharding.make_mesh(2, 1)
    assistant = scene.agent_of(ASSISTANT)  # each process makes its own
    many_devices.meet()
    assistant = for_sampling(assistant, mesh)

    def messages(
        user: Agent, examples: list[Example], rows_in_flight: int | None = None, batching: Batching = 'static'
    ) -> tuple[list[list[list[int]]], dict[str, str]]:
        batch, failures = collect(
            *(user, assistant, examples),
            chat=scene.CHAT,
            limits=LIMITS,
            seed=scene.SEED,
            step=scene.STEP,
            view=ASSISTANT,
            mesh=mesh,
            samples=scene.SAMPLES,
            rows_in_flight=rows_in_flight,
            batching=batching,
        )
        assert not batch.messages.is_fully_addressable
        found: list[list[list[int]]] = placement.to_host(batch.messages).tolist()
        return found, {str(row): reason for row, reason in failures.items()}

    results: dict[str, object] = {}
    # On the devices of both: each must run the same programs, whoever has how many rows that wait.
    if ON_BOTH in os.environ:
        agent = text_agent(for_sampling(scene.agent_of(USER), mesh), scene.CHAT, mesh)
        results['text'] = messages(agent, scene.EXAMPLES)
        user = for_sampling(scene.agent_of(USER), mesh)
        results['continuous'] = messages(user, scene.EXAMPLES, scene.ROWS // 3, 'continuous')
        replies = scene.partner_of(failing)
        results['continuous host'] = messages(replies, scene.EXAMPLES, scene.ROWS // 3, 'continuous')
    asked: list[tuple[str, int]] = []

    def reply(conversation: HostConversation, seed: int) -> Reply:
        asked.append((conversation.example.id, conversation.sample))
        time.sleep(0.02 * (jax.process_index() + 1))  # one process waits, and samples meanwhile, longer than the other
        return failing(conversation, seed)

    results['host'] = messages(scene.partner_of(reply), scene.EXAMPLES, rows_in_flight=scene.ROWS // 3)

    def broken(conversation: HostConversation, seed: int) -> Reply:
        if conversation.example.id == scene.EXAMPLES[0].id:
            raise OSError('no line')
        return Reply('10')

    try:
        messages(scene.partner_of(broken), scene.EXAMPLES, rows_in_flight=scene.ROWS // 3)
    except (OSError, RuntimeError) as error:
        results['error'] = str(error)
    print(json.dumps({'alike': results, 'asked': asked}))


def failing(conversation: HostConversation, seed: int) -> Reply:
    """Chats, and fails in every third sample."""
    if conversation.sample == 2:
        return Reply('', failure=f'no answer to {conversation.example.id}')
    return scene.chatty(conversation, seed)


if __name__ == '__main__':
    main()
