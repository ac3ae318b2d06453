"""Run by test_dialogue.py in a process with eight devices: the scene's conversations, two rows on each."""

import dataclasses
import json
from typing import Any
from unittest import mock

import jax
import numpy as np

from simrl.conversations.chat import USER
from simrl.models import sharding
from simrl.rollouts import compaction
from simrl.rollouts import dialogue as dialogue_lib
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.dialogue import add_message
from simrl.rollouts.state import Dialogue
from tests.many_devices import collectives
from tests.rollouts import scene

# Of each device's two rows one ends early: then every device's batch is the other row alone.
ROWS = [row for late in (0, 5, 6, 0, 5, 6, 0, 5) for row in (late, 2)]


def main() -> None:
    compiles: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **names: compiles.append(names.get('fun_name', '')) if 'backend_compile' in event else None
    )
    mesh = sharding.make_mesh(8, 1)
    split = jax.jit(shard_tree)
    with jax.set_mesh(mesh):

        def start() -> tuple[Dialogue, jax.Array]:
            return split((scene.start(ROWS), scene.keys(ROWS)))

        replicated = jax.NamedSharding(mesh, jax.P())
        policies = tuple(
            dataclasses.replace(policy, params=jax.device_put(policy.params, replicated)) for policy in scene.policies()
        )
        active = []

        def watched(*args: Any, **kwargs: Any) -> Dialogue:
            rows = [len(x.addressable_shards[0].data) for x in (args[2].num_messages, args[2].user.tokens, args[3])]
            cached = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(args[2].user.cache))
            active.append([*rows, cached])
            return add_message(*args, **kwargs)

        dialogue, keys = start()
        with mock.patch.object(dialogue_lib, 'add_message', watched):
            out = scene.converse(*policies, dialogue, keys, turns=scene.TURNS)
        compiled = [name for name in compiles if name in ('jit(add_message)', 'jit(gather_rows)', 'jit(scatter_rows)')]
        dialogue, keys = start()
        message = add_message.lower(*policies, dialogue, keys, role=USER)
        fewer = compaction.jit_gather_rows.lower(dialogue, np.zeros((8, 1), np.int64))
        reading = scene.jit_prefill.lower(policies[0], *split(scene.prompts(0, ROWS)), capacity=scene.CAPACITIES[0])
        programs = {'message': message, 'gathering rows': fewer, 'prefill': reading}
    print(
        json.dumps(
            {
                'rows': ROWS,
                'messages': np.asarray(out.messages).tolist(),
                'user': np.asarray(out.user.tokens).tolist(),
                'assistant': np.asarray(out.assistant.tokens).tolist(),
                'compiled': compiled,
                'active': active,
                'sent': {name: collectives(p.compile().as_text()) for name, p in programs.items()},
            }
        )
    )


if __name__ == '__main__':
    main()
