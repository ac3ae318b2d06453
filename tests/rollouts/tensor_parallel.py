"""Run by test_tensor_parallel.py in a process with eight devices: the scene's conversations of split models.

Two devices share a model. The assistant's only key/value head is on both, and one of the blocks of its vocabulary
begins on one and ends on the other.
"""

import dataclasses
import json

import jax
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models import sharding
from simrl.models.cache import CACHE_LAYOUTS
from simrl.rollouts.compaction import shard_tree
from simrl.rollouts.dialogue import add_message
from tests.many_devices import collectives
from tests.rollouts import scene

ROWS = list(range(scene.ROWS))


def main() -> None:
    expected = scene.converse(*scene.policies(), scene.start(ROWS), scene.keys(ROWS), turns=scene.TURNS)
    CACHE_LAYOUTS['cpu'] = 'time_first'  # as on a TPU
    mesh = sharding.make_mesh(4, 2)
    policies = []
    for policy in scene.policies():
        config = policy.spec.config
        placed = sharding.param_shardings(config, mesh, sharding.SAMPLING_RULES)['decoder']
        placed = sharding.output_major(sharding.layers_apart(placed, config.num_layers))
        params = jax.device_put(policy.params, {'decoder': placed})
        policies.append(dataclasses.replace(policy, params=params))
    names = ('messages', 'message_length', 'end_reason', 'decoded_steps')
    heads = jax.NamedSharding(mesh, jax.P('data', None, 'model'))
    shapes, sent = [], []
    with jax.set_mesh(mesh):
        dialogue, keys = jax.jit(shard_tree)((scene.start(ROWS), scene.keys(ROWS)))
        for role in (USER, ASSISTANT):
            view = dialogue.view(role)
            dialogue = dialogue.with_view(role, dataclasses.replace(view, cache=jax.device_put(view.cache, heads)))
        for role in (USER, ASSISTANT):
            message = add_message.lower(*policies, dialogue, keys, role=role).compile()
            sent += collectives(message.as_text())
            cache, placed = dialogue.view(role).cache, message.output_shardings.view(role).cache
            shapes += [
                placed.shard_shape(x.shape)
                for x, placed in zip(jax.tree.leaves(cache), jax.tree.leaves(placed), strict=True)
            ]
        found = scene.converse(*policies, dialogue, keys, turns=scene.TURNS)
    results = [jax.device_get([getattr(x, name) for name in names]) for x in (found, expected)]
    same = [np.array_equal(*pair) for pair in zip(*results, strict=True)]
    said = int(np.sum(jax.device_get(expected.num_messages)))
    print(json.dumps({'same': same, 'said': said, 'cache_shards': shapes, 'sent': sent}))


if __name__ == '__main__':
    main()
