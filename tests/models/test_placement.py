"""Rows on several processes: each is on the devices that are to have it, whatever the order of devices in the mesh."""

import json

from tests import many_devices
from tests.models import four_processes


def test_every_process_gets_its_rows_once_in_the_hosts_order() -> None:
    printed = many_devices.run_processes(four_processes.__name__, 4)
    processes = [json.loads(lines.splitlines()[-1]) for lines in printed]  # after what Gloo prints
    sizes = set()
    for found in zip(*processes, strict=True):
        mesh = found[0]['mesh']
        assert all(process['mesh'] == mesh for process in found)
        own = {int(device): rows for process in found for device, rows in process['own'].items()}
        assert all(len(process['own']) == 1 for process in found)
        for column in zip(*mesh, strict=True):  # the devices along `data` have all rows, in their order
            assert [row for device in column for row in own[device]] == four_processes.ROWS.tolist()
        assert all(process['fetched'] == four_processes.ROWS.tolist() for process in found)
        order = [device for row in mesh for device in row]
        sizes |= {(len(mesh), len(mesh[0]), order == sorted(order))}
    assert sizes == {(2, 2, True), (4, 1, True), (1, 4, True), (2, 2, False), (4, 1, False)}
