"""Run by test_continuous.py in a process with eight devices: conversations at their own pace, on four or on eight."""

import json
from typing import Any
from unittest import mock

import jax
import numpy as np

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models import placement, sharding
from simrl.rollouts import compaction, context, continuous, window
from simrl.rollouts.collect import collect, for_sampling
from tests.many_devices import collectives
from tests.rollouts import test_host as scene


def main() -> None:
    compaction.MIN_ROWS = context.SMALLEST_CACHE = 2**20  # few programs
    found: dict[str, Any] = {}
    for data, model in ((8, 1), (4, 2)):
        mesh = sharding.make_mesh(data, model)
        with jax.set_mesh(mesh):
            agents = [for_sampling(scene.agent_of(role), mesh) for role in (USER, ASSISTANT)]
        lowered: dict[str, Any] = {}

        def watched(name: str, function: Any, lowered: dict[str, Any] = lowered) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if name not in lowered:
                    lowered[name] = function.lower(*args, **kwargs).compile().as_text()
                return function(*args, **kwargs)

            return call

        with (
            mock.patch.object(continuous, 'decode_block', watched('decode', continuous.decode_block)),
            mock.patch.object(window, 'move_rows', watched('move', window.move_rows)),
            mock.patch.object(window, 'feed_rows', watched('feed', window.feed_rows)),
        ):
            batch, failures = collect(
                *(agents[0], agents[1], scene.EXAMPLES),
                chat=scene.CHAT,
                limits=scene.LIMITS,
                seed=scene.SEED,
                step=scene.STEP,
                view=ASSISTANT,
                mesh=mesh,
                samples=2 * scene.SAMPLES,
                rows_in_flight=scene.ROWS,
                batching='continuous',
            )
        assert not failures
        host = placement.to_host(batch)
        found[f'{data}x{model}'] = {
            'messages': np.asarray(host.messages).tolist(),
            'tokens': np.asarray(host.tokens).tolist(),
            'sent': {name: collectives(text) for name, text in lowered.items()},
            'rows': [len(x.data) for x in batch.tokens.addressable_shards],
        }
    print(json.dumps(found))


if __name__ == '__main__':
    main()
