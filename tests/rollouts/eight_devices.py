"""Run by test_rollout.py in a process with eight devices: the scene's conversations, two rows on each."""

import json
from typing import Any
from unittest import mock

import jax
import numpy as np

from simrl.conversations.chat import USER
from simrl.models import sharding
from simrl.rollouts import compaction as crowd_lib
from simrl.rollouts import dialogue as rollout_lib
from simrl.rollouts.compaction import keep_split
from simrl.rollouts.dialogue import rollout, turn
from simrl.rollouts.state import Dialogue
from tests.many_devices import collectives
from tests.rollouts import scene

# Of each device's two rows one ends early: then every device holds the other alone.
ROWS = [row for late in (0, 1, 2, 3, 5, 0, 1, 2) for row in (late, 4 if late % 2 else 6)]


def main() -> None:
    compiles: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **names: compiles.append(names.get('fun_name', '')) if 'backend_compile' in event else None
    )
    mesh = sharding.make_mesh(8, 1)
    split = jax.jit(keep_split)
    with jax.set_mesh(mesh):

        def start() -> tuple[Dialogue, jax.Array]:
            return split((scene.start(ROWS), scene.keys(ROWS)))

        params = jax.device_put(scene.params(), jax.NamedSharding(mesh, jax.P()))
        temperatures = tuple(temperature[np.array(ROWS)] for temperature in scene.temperatures())
        held = []

        def watched(*args: Any, **kwargs: Any) -> Dialogue:
            rows = [len(x.addressable_shards[0].data) for x in (args[2].num_messages, args[2].user.tokens, args[3])]
            cached = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(args[2].user.cache))
            held.append([*rows, cached])
            return turn(*args, **kwargs)

        dialogue, keys = start()
        with mock.patch.object(rollout_lib, 'turn', watched):
            out = rollout(
                *params,
                dialogue,
                keys,
                specs=scene.SPECS,
                turns=scene.TURNS,
                temperatures=temperatures,  # type: ignore[arg-type]
                token_mask=scene.ALLOWED,  # type: ignore[arg-type]
            )
        compiled = [name for name in compiles if name in ('jit(turn)', 'jit(take_rows)', 'jit(_put_rows)')]
        dialogue, keys = start()
        message = turn.lower(
            *params,
            dialogue,
            keys,
            role=USER,
            specs=scene.SPECS,
            temperatures=split(temperatures),
            token_mask=scene.ALLOWED,  # type: ignore[arg-type]
        )
        fewer = crowd_lib._take.lower(dialogue, np.zeros((8, 1), np.int64))
        user = scene.USER_VOICE
        reading = scene.jit_prefill.lower(
            params[0],
            user.config,
            user.execution,
            *split(scene.prompts(0, ROWS)),
            capacity=scene.CAPACITIES[0],
            chunk=user.feed_chunk,
        )
        programs = {'turn': message, 'taking rows': fewer, 'prefill': reading}
    print(
        json.dumps(
            {
                'rows': ROWS,
                'messages': np.asarray(out.messages).tolist(),
                'user': np.asarray(out.user.tokens).tolist(),
                'assistant': np.asarray(out.assistant.tokens).tolist(),
                'compiled': compiled,
                'held': held,
                'sent': {name: collectives(p.compile().as_text()) for name, p in programs.items()},
            }
        )
    )


if __name__ == '__main__':
    main()
