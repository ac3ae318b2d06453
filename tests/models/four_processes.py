"""Run by `test_placement.py` in four processes of one device: the rows that each device has, and each process reads."""

import json
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from simrl.models import placement, sharding
from tests import many_devices

ROWS = np.arange(24).reshape(8, 3)  # of a batch, all different


def meshes() -> Iterator[Mesh]:
    for sizes in ((2, 2), (4, 1), (1, 4)):
        yield sharding.make_mesh(*sizes)
    for sizes in ((2, 2), (4, 1)):  # as on slices of TPUs, whose order of devices is not that of their processes
        devices = np.array(jax.devices())[[2, 0, 3, 1]].reshape(sizes)
        yield Mesh(devices, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def main() -> None:
    many_devices.join()
    results = []
    for mesh in meshes():
        batch = placement.shard_batch({'rows': ROWS}, mesh)['rows']
        found = {
            'mesh': [[device.id for device in row] for row in mesh.devices],
            'own': {shard.device.id: np.asarray(shard.data).tolist() for shard in batch.addressable_shards},
            'fetched': placement.to_host(batch).tolist(),
        }
        results.append(found)
    print(json.dumps(results))


if __name__ == '__main__':
    main()
