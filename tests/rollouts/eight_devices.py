"""Run by test_rollout.py in a process with eight devices: the scene's conversations, a row on each."""

import json
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from simrl.rollouts.rollout import rollout
from tests.rollouts import scene


def main() -> None:
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    dialogue = jax.device_put(scene.start(list(range(8))), rows)
    lowered = rollout.lower(
        *jax.device_put(scene.params(), everywhere),
        dialogue,
        jax.device_put(scene.keys(), rows),
        voices=scene.VOICES,
        turns=scene.TURNS,
        temperatures=jax.device_put(scene.temperatures(), rows),
        allowed=jax.device_put(scene.ALLOWED, everywhere),
    )
    compiled = lowered.compile()
    out = compiled(
        *jax.device_put(scene.params(), everywhere),
        dialogue,
        jax.device_put(scene.keys(), rows),
        temperatures=jax.device_put(scene.temperatures(), rows),
        allowed=jax.device_put(scene.ALLOWED, everywhere),
    )
    gathers = re.findall(r'= \(?\w+\[([\d,]*)\][^=]* all-gather', compiled.as_text())
    print(
        json.dumps(
            {
                'messages': np.asarray(out.messages).tolist(),
                'user': np.asarray(out.user.tokens).tolist(),
                'assistant': np.asarray(out.assistant.tokens).tolist(),
                'cache_shard': out.user.cache.value[0].addressable_shards[0].data.shape,
                'largest_gather': max((math.prod(int(n) for n in dims.split(',') if n) for dims in gathers), default=0),
                'gathers': gathers,
            }
        )
    )


if __name__ == '__main__':
    main()
