"""Run by test_continuous.py in a process with eight devices: conversations whose two sides have a mesh each."""

import dataclasses
import json

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models import placement, sharding
from simrl.rollouts import compaction, context
from simrl.rollouts.collect import collect, for_sampling
from tests.rollouts import test_host as scene


def mesh_of(data: int, model: int, first: int = 0) -> Mesh:
    return sharding.make_mesh(data, model, jax.devices()[first : first + data * model])


def main() -> None:
    compaction.MIN_ROWS = context.SMALLEST_CACHE = 2**20  # few programs
    found = {}
    for name, mesh, own in (('same', mesh_of(4, 1), mesh_of(2, 2)), ('other', mesh_of(2, 1), mesh_of(1, 2, first=2))):
        user = for_sampling(dataclasses.replace(scene.agent_of(USER), mesh=own), mesh)
        batch, failures = collect(
            *(user, for_sampling(scene.agent_of(ASSISTANT), mesh), scene.EXAMPLES),
            chat=scene.CHAT,
            limits=scene.LIMITS,
            seed=scene.SEED,
            step=scene.STEP,
            view=ASSISTANT,
            mesh=mesh,
            samples=scene.SAMPLES,
            rows_in_flight=scene.ROWS // 2,
        )
        assert not failures
        host = placement.to_host(batch)
        found[name] = {
            'messages': np.asarray(host.messages).tolist(),
            'tokens': np.asarray(host.tokens).tolist(),
            'devices': [
                sorted(device.id for device in x.devices())
                for x in (batch.tokens, jax.tree.leaves(user.policy.params)[0])
            ],
        }
    print(json.dumps(found))


if __name__ == '__main__':
    main()
